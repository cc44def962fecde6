// What each row of `sample` is drawn from, as the integer masses of the token law (contract in kernels/api.py): the sampler's own first
// pass and thresholds (sample_row.h, sample_filter.h), and then the weight of each token that is kept.
//
// Reads the logits about twice and writes 8 bytes a token, most of the bytes there are to move. Rows run in parallel. Called by
// bind_sample.cpp.
#include "../kernels.h"
#include "../thread_pool.h"
#include "sample_filter.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kWhole = int64_t{1} << kWeightBits;

// The masses of a row whose largest z is `top`.
template <class T>
void write(const Row& row, const Logits<T>& logits, float top, int64_t* out) {
    if (row.greedy || top == kInf) {
        memset(out, 0, static_cast<size_t>(row.vocab) * 8);
        for (int64_t token = first_largest(row.block_z, row.blocks()) * kBlock; token < row.vocab; ++token) {
            if (logits.at(token) != top) continue;
            out[token] = kWhole;
            if (row.greedy) break;
        }
        return;
    }
    const float tau = filter(row, logits, top).tau;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        int64_t* mine = out + b * kBlock;
        const int64_t n = smaller(kBlock, row.vocab - b * kBlock);
        if (row.block_z[b] < tau || row.block_z[b] - top < kWeightFloor) {
            memset(mine, 0, static_cast<size_t>(n) * 8);
            continue;
        }
        alignas(64) float z[kBlock];
        logits.block(b, z);
        for (int i = 0; i < kBlock; i += kLanes) {
            const VecF value = load(z + i);
            store(z + i, zero_where_less(scaled_exp(sub(value, set1(top))), value, set1(tau)));
        }
        for (int64_t i = 0; i < n; ++i) mine[i] = static_cast<int64_t>(z[i]);
    }
}

template <class T>
void masses_of_row(const SampleArgs& a, int64_t r, int64_t* out) {
    const T* raw = static_cast<const T*>(a.logits) + r * a.row_stride;
    Row row = row_of(a, r);
    lay_out(&row, static_cast<char*>(scratch(kThreadScratch, lay_out(&row, nullptr))));
    bool nan = false;
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
        scan(row, raw, chunk);
        nan = nan || row.stats[chunk].nan;
    }
    const bool adjusted = adjust_copy(row, raw, adjustments_of(a.lists, r, a.position[r], a.vocab));
    const float top = extremes(row.block_z, row.blocks()).most;
    a.status[r] = nan ? kNan : top == -kInf ? kNothingAllowed : kOk;
    if (a.status[r] != kOk)
        memset(out, 0, static_cast<size_t>(row.vocab) * 8);
    else if (adjusted)
        write(row, Logits<float>{row.adjusted, row.vocab, row.temperature}, top, out);
    else
        write(row, Logits<T>{raw, row.vocab, row.temperature}, top, out);
}

template <class T>
void masses_of_rows(const SampleArgs& a, int64_t* out) {
    parallel_for(a.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) masses_of_row<T>(a, r, out + r * a.vocab);
    });
}

}  // namespace

void masses(const SampleArgs& a, int64_t* out) {
    if (a.dtype == kBF16)
        masses_of_rows<BF16>(a, out);
    else if (a.dtype == kF16)
        masses_of_rows<F16>(a, out);
    else
        masses_of_rows<float>(a, out);
}

}  // namespace ENGINE_ISA
}  // namespace engine
