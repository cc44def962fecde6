// Block verification of chains of drafts (contract and source in kernels/api.py), in four steps:
//
// 1. the sums of all rows of masses;
// 2. w of each row, by a walk down each chain;
// 3. h of each row: the mass of its residual max(w p - q, 0), where w leaves it open;
// 4. each chain's coins, and the last draw: the race of the sampler over log(share).
//
// Rows run in parallel in 1 and 3, chains in 4. Shares are float64, each operation rounded by itself, and residuals are integers in units
// of 2^-62, so that their sums are the oracle's in any order. The time is that of reading both matrices twice. Ties go to the lowest id.
// Called by bind_verify.cpp.
#include "../kernels.h"
#include "../thread_pool.h"
#include "noise.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr float kInf = __builtin_inff();
constexpr double kShare = 0x1p62;  // units of a residual in 1

struct ChainRow {
    bool goes_on;  // to the next row
    double target_sum, proposal_sum;
    double w, h;
};

// max(w p - q, 0) of each token in units of 2^-62; without a proposal p.
struct Residual {
    const int64_t* target;
    const int64_t* proposal;  // or null
    double w, target_sum, proposal_sum;

    ENGINE_METHOD int64_t at(int64_t token) const {
        const double p = static_cast<double>(target[token]) / target_sum;
        if (proposal == nullptr) return static_cast<int64_t>(p * kShare);
        const double rest = w * p - static_cast<double>(proposal[token]) / proposal_sum;
        return static_cast<int64_t>((rest > 0 ? rest : 0) * kShare);
    }

    ENGINE_METHOD int64_t sum(int64_t vocab) const {
        int64_t total = 0;
        for (int64_t token = 0; token < vocab; ++token) total += at(token);
        return total;
    }
};

ENGINE_INLINE double sum_of(const int64_t* masses, int64_t n) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += masses[i];
    return static_cast<double>(total);
}

ENGINE_INLINE Residual residual_after(const VerifyBlockArgs& a, const ChainRow* rows, int64_t r) {
    const int64_t* target = a.target + r * a.vocab;
    if (!rows[r].goes_on) return {target, nullptr, 1, rows[r].target_sum, 1};
    return {target, a.proposal + (r + 1) * a.vocab, rows[r].w, rows[r].target_sum, rows[r + 1].proposal_sum};
}

ENGINE_INLINE NoiseKey key_of(const VerifyBlockArgs& a, int64_t s) {
    return {static_cast<uint64_t>(a.seed[s]), static_cast<uint32_t>(a.position[s]), static_cast<uint32_t>(a.stream[s])};
}

// A chain ends with the first row that failed.
ENGINE_INLINE void link(const VerifyBlockArgs& a, int64_t s, ChainRow* rows) {
    bool goes_on = true;
    for (int64_t r = a.start[s]; r < a.start[s + 1]; ++r) {
        goes_on = goes_on && r + 1 < a.start[s + 1] && a.status[r] == kOk;
        rows[r].goes_on = goes_on;
    }
}

// Step 2.
ENGINE_INLINE void walk(const VerifyBlockArgs& a, int64_t s, ChainRow* rows) {
    int64_t r = a.start[s];
    rows[r].w = 1;
    while (rows[r++].goes_on) {
        const double p = static_cast<double>(a.target[(r - 1) * a.vocab + a.draft[r]]) / rows[r - 1].target_sum;
        const double q = static_cast<double>(a.proposal[r * a.vocab + a.draft[r]]) / rows[r].proposal_sum;
        const double w = q > 0 ? rows[r - 1].w * p / q : 0;  // q is 0 where the token was drawn all the same: a mass below 1 is none
        rows[r].w = w < 1 ? w : 1;
    }
}

// Step 3. For w of 0 or 1 h is w whatever the residual is.
ENGINE_INLINE double acceptance(const VerifyBlockArgs& a, const ChainRow* rows, int64_t r) {
    const double w = rows[r].w;
    if (!rows[r].goes_on || !(w > 0 && w < 1)) return w;
    const double z = static_cast<double>(residual_after(a, rows, r).sum(a.vocab)) / kShare;
    return z / (z + (1 - w));
}

ENGINE_INLINE double coin(NoiseKey key, int64_t i) {
    const uint32_t index = static_cast<uint32_t>(i / 4);
    const double high = noise_words(key, index, kDomainCoin).word[i % 4],
                 low = noise_words(key, index, kDomainCoin + kDomainTail).word[i % 4];
    return (high * 0x1p32 + low + 0.5) * 0x1p-64;
}

// argmax(log(share) - log(E)); -1 where nothing has a share. A token needs no logarithms where share / u, no less than share / E, stays
// below the best share / E so far by more than all roundings (2e-5).
int64_t draw(const Residual& residual, int64_t vocab, NoiseKey key) {
    const RowNoise noise = row_noise(key, kDomainResidual);
    int64_t token = -1;
    float best = -kInf;
    double best_rate = 0;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        int64_t masses[kBlock], any = 0;
        for (int64_t i = 0; i < n; ++i) any |= masses[i] = residual.at(begin + i);
        if (any == 0) continue;
        uint32_t words[kBlock];
        block_words(noise, static_cast<uint32_t>(begin), words);
        for (int64_t i = 0; i < n; ++i) {
            const double share = static_cast<double>(masses[i]) / kShare;
            if (masses[i] == 0) continue;
            if (words[i] >= kTailWords && share * 1.001 < best_rate * (words[i] * 0x1p-32)) continue;
            const uint32_t tail =
                words[i] >= kTailWords
                    ? 0
                    : noise_words(key, static_cast<uint32_t>((begin + i) / 4), kDomainResidual + kDomainTail).word[(begin + i) % 4];
            const float e = noise_exponential(words[i], tail), score = fixed_log(static_cast<float>(share)) - fixed_log(e);
            if (score <= best) continue;
            best = score;
            best_rate = share / static_cast<double>(e);
            token = begin + i;
        }
    }
    return token;
}

// Step 4.
void decide(const VerifyBlockArgs& a, int64_t s, const ChainRow* rows) {
    const int64_t first = a.start[s], end = a.start[s + 1];
    const NoiseKey key = key_of(a, s);
    int64_t tau = 0;
    while (rows[first + tau].goes_on) ++tau;
    while (tau > 0 && !(coin(key, tau) <= rows[first + tau].h)) --tau;
    const int64_t last = first + tau;
    a.tokens[s] = -1;
    a.outcome[s] = a.status[last];
    if (a.status[last] == kOk) {
        a.tokens[s] = draw(residual_after(a, rows, last), a.vocab, key);
        if (a.tokens[s] < 0) a.tokens[s] = draw({a.target + last * a.vocab, nullptr, 1, rows[last].target_sum, 1}, a.vocab, key);
    }
    a.num_accepted[s] = static_cast<int32_t>(tau);
    for (int64_t r = first; r < end; ++r) a.path[r] = r - first <= tau ? static_cast<int32_t>(r - first) : -1;
}

}  // namespace

void verify_block(const VerifyBlockArgs& a) {
    ChainRow* rows = static_cast<ChainRow*>(scratch(kCallScratch, a.rows * static_cast<int64_t>(sizeof(ChainRow))));
    for (int64_t s = 0; s < a.sequences; ++s) link(a, s, rows);
    parallel_for(a.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            rows[r].w = 0;
            rows[r].target_sum = sum_of(a.target + r * a.vocab, a.vocab);
            if (r > 0 && rows[r - 1].goes_on) rows[r].proposal_sum = sum_of(a.proposal + r * a.vocab, a.vocab);
        }
    });
    for (int64_t s = 0; s < a.sequences; ++s) walk(a, s, rows);
    parallel_for(a.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) rows[r].h = acceptance(a, rows, r);
    });
    parallel_for(a.sequences, 1, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) decide(a, s, rows);
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
