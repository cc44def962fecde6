// The best continuations of groups of beams (contract in kernels/api.py), with about one read of the logits from memory:
//
// 1. Each row: block maxima, top-k threshold and mass of what is kept, as the sampler does it (sample_row.h, sample_filter.h). The score of
// a
//    continuation rises with its z, rounding included, so that a block's largest z gives its best score. Where lists or a mask change
//    single log-probabilities, they are written out and changed.
// 2. Each group: the C-th largest of the blocks' best scores is a lower bound of the C-th best score, so that only blocks that reach it are
//    looked into. Under noise there is no such bound; instead, words are ruled out by an integer comparison against the C-th best so far
//    (word_limit in noise.h).
//
// Rows, then groups, run in parallel. Ties go to the lower row, then the lower token: continuations come in that order, and of equal ones
// the first stay. Called by bind_beam.cpp.
#include "../kernels.h"
#include "../thread_pool.h"
#include "sample_filter.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// What a row is after the first pass.
struct Beam {
    int status;
    float top, tau, log_mass;  // largest z; smallest that is kept
    float* log_probabilities;  // [blocks * kBlock] if they were written out, else null
    float* best;               // [blocks] largest log-probability of each block

    // Step 2 of the contract.
    ENGINE_METHOD float log_probability(float z) const {
        if (z < tau) return -kInf;
        return top == kInf ? -log_mass : (z - top) - log_mass;
    }
};

template <class T>
ENGINE_INLINE void log_probabilities_of_block(const Beam& beam, const Logits<T>& logits, int64_t b, float* out) {
    logits.block(b, out);
    if (beam.top == kInf) {
        for (int i = 0; i < kBlock; ++i) out[i] = beam.log_probability(out[i]);
        return;
    }
    const VecF top = set1(beam.top), log_mass = set1(beam.log_mass), out_of_it = set1(-kInf);
    for (int i = 0; i < kBlock; i += kLanes) {
        const VecF z = load(out + i);
        store(out + i, where_less(out_of_it, sub(sub(z, top), log_mass), z, set1(beam.tau)));
    }
}

template <class T>
void prepare(const BeamArgs& a, int64_t r, Beam* beam) {
    const T* raw = static_cast<const T*>(a.logits) + r * a.row_stride;
    Row row{};
    row.vocab = a.vocab;
    row.temperature = a.temperature[r];
    row.top_k = a.top_k[r] > 0 && a.top_k[r] < a.vocab ? a.top_k[r] : 0;
    lay_out(&row, static_cast<char*>(scratch(kThreadScratch, lay_out(&row, nullptr))));
    beam->status = kNothingAllowed;
    if (a.scores[r] == -kInf) return;
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
        scan(row, raw, chunk);
        if (row.stats[chunk].nan) {
            beam->status = kNan;
            return;
        }
    }
    const Logits<T> logits = {raw, row.vocab, row.temperature};
    beam->top = extremes(row.block_z, row.blocks()).most;
    if (beam->top == -kInf) return;
    if (beam->top == kInf) {
        beam->tau = kInf;
        beam->log_mass = fixed_log(static_cast<float>(row_count_at_least(row, logits, kInf)));
    } else {
        const float tau = row.top_k > 0 ? keep_top_k(row, logits, beam->top).tau : -kInf;
        beam->tau = tau > kLowest ? tau : kLowest;
        const int64_t mass = row_masses(row, logits, beam->top, beam->tau, kInf).whole;
        beam->log_mass = fixed_log(static_cast<float>(mass) * 0x1p-40f);
    }
    static_assert(kWeightBits == 40, "the scale above");
    for (int64_t b = 0; b < row.blocks(); ++b) row.block_z[b] = beam->log_probability(row.block_z[b]);

    const Adjustments adjustments = adjustments_of(a.lists, r, a.position[r], a.vocab);
    if (adjustments.any()) {
        row.adjusted = beam->log_probabilities;
        for (int64_t b = 0; b < row.blocks(); ++b) log_probabilities_of_block(*beam, logits, b, row.adjusted + b * kBlock);
        adjust(row, adjustments, 1.0f);
    } else {
        beam->log_probabilities = nullptr;
    }
    memcpy(beam->best, row.block_z, static_cast<size_t>(row.blocks()) * 4);
    if (extremes(beam->best, row.blocks()).most > -kInf) beam->status = kOk;
}

// ---- the best so far ----

struct Continuation {
    float score, log_probability;
    int64_t flat;  // row of the call * vocab + token
};

// The best `wanted` of what is put in, which comes in ascending order of `flat`.
class Collector {
  public:
    static ENGINE_METHOD int64_t room(int64_t wanted) { return 2 * wanted + 16 * kBlock; }
    ENGINE_METHOD Collector(Continuation* entries, float* scores, int64_t wanted) : entries_(entries), scores_(scores), wanted_(wanted) {}

    ENGINE_METHOD float lowest() const { return lowest_; }  // what is below it is not among the best
    ENGINE_METHOD void raise(float lowest) { lowest_ = lowest > lowest_ ? lowest : lowest_; }

    ENGINE_METHOD void put(Continuation c) {
        if (!(c.score >= lowest_)) return;
        entries_[count_++] = c;
        if (count_ == room(wanted_)) keep_best();
    }

    // The best, in order; returns their number.
    ENGINE_METHOD int64_t finish() {
        if (count_ > wanted_) keep_best();
        sort(entries_, entries_ + wanted_, count_);
        return count_;
    }

  private:
    ENGINE_METHOD void keep_best() {
        for (int64_t i = 0; i < count_; ++i) scores_[i] = entries_[i].score;
        const Selected worst = select(scores_, nullptr, count_, wanted_);
        int64_t ties = wanted_ - worst.above, kept = 0;
        for (int64_t i = 0; i < count_; ++i) {
            const bool tie = entries_[i].score == worst.value;
            if (entries_[i].score < worst.value || (tie && ties == 0)) continue;
            ties -= tie;
            entries_[kept++] = entries_[i];
        }
        count_ = kept;
        lowest_ = value_of(rank_of(worst.value) + 1);  // a later tie would lose
    }

    // By score, equal ones as they come: merges of growing runs, there and back.
    static void sort(Continuation* entries, Continuation* spare, int64_t n) {
        for (int64_t width = 1; width < n; width *= 2) {
            for (int64_t begin = 0; begin < n; begin += 2 * width) {
                const int64_t middle = smaller(n, begin + width), end = smaller(n, begin + 2 * width);
                int64_t left = begin, right = middle;
                for (int64_t i = begin; i < end; ++i)
                    spare[i] =
                        left < middle && (right == end || entries[left].score >= entries[right].score) ? entries[left++] : entries[right++];
            }
            memcpy(static_cast<void*>(entries), spare, static_cast<size_t>(n) * sizeof(Continuation));
        }
    }

    Continuation* entries_;
    float* scores_;
    int64_t wanted_, count_ = 0;
    float lowest_ = kLowest;
};

// ---- a group ----

// Put in the continuations of a row.
template <class T>
void collect(const BeamArgs& a, int64_t r, const Beam& beam, Collector* best) {
    const Logits<T> logits = {static_cast<const T*>(a.logits) + r * a.row_stride, a.vocab, a.temperature[r]};
    const int64_t blocks = (a.vocab + kBlock - 1) / kBlock;
    const float score = a.scores[r];
    NoiseKey key{};
    if (a.seed != nullptr)
        key = {static_cast<uint64_t>(a.seed[r]), static_cast<uint32_t>(a.position[r]), static_cast<uint32_t>(a.stream[r])};
    const RowNoise noise = row_noise(key);
    for (int64_t b = 0; b < blocks; ++b) {
        const float top = beam.best[b] + score;
        uint32_t limit = ~0u;
        if (top == -kInf) continue;
        if (a.seed == nullptr ? top < best->lowest() : !word_limit(top, best->lowest(), &limit)) continue;
        alignas(64) uint32_t words[kBlock];
        if (a.seed != nullptr) {
            block_words(noise, static_cast<uint32_t>(b * kBlock), words);
            if (!any_at_most(words, limit)) continue;
        }
        alignas(64) float own[kBlock];
        const float* l = own;
        if (beam.log_probabilities != nullptr)
            l = beam.log_probabilities + b * kBlock;
        else
            log_probabilities_of_block(beam, logits, b, own);
        for (int i = 0; i < kBlock; ++i) {
            const int64_t token = b * kBlock + i;
            float total = l[i] + score;
            if (total == -kInf) continue;
            if (a.seed != nullptr) {
                if (words[i] > limit) continue;
                const uint32_t tail =
                    words[i] < kTailWords ? noise_words(key, static_cast<uint32_t>(token / 4), kDomainTail).word[token & 3] : 0;
                total = total - fixed_log(noise_exponential(words[i], tail));
            }
            best->put({total, l[i], r * a.vocab + token});
        }
    }
}

template <class T>
void select_group(const BeamArgs& a, int64_t g, const Beam* beams) {
    const int64_t blocks = (a.vocab + kBlock - 1) / kBlock, first = a.group_start[g], last = a.group_start[g + 1];
    const int64_t room = Collector::room(a.candidates), bounds = (last - first) * blocks;
    char* memory = static_cast<char*>(scratch(kThreadScratch, room * static_cast<int64_t>(sizeof(Continuation)) + (room + bounds) * 4));
    Continuation* entries = reinterpret_cast<Continuation*>(memory);
    float* scores = reinterpret_cast<float*>(entries + room);
    Collector best(entries, scores, a.candidates);
    if (a.seed == nullptr && bounds >= a.candidates) {
        float* bound = scores + room;
        int64_t n = 0;
        for (int64_t r = first; r < last; ++r) {
            if (beams[r].status != kOk) continue;
            for (int64_t b = 0; b < blocks; ++b) bound[n++] = beams[r].best[b] + a.scores[r];
        }
        if (n >= a.candidates) best.raise(select(bound, nullptr, n, a.candidates).value);
    }
    for (int64_t r = first; r < last; ++r)
        if (beams[r].status == kOk) collect<T>(a, r, beams[r], &best);
    const int64_t found = best.finish();
    for (int64_t i = 0; i < a.candidates; ++i) {
        const int64_t at = g * a.candidates + i;
        const bool there = i < found;
        a.best[at] = there ? entries[i].score : -kInf;
        a.logprobs[at] = there ? entries[i].log_probability : -kInf;
        a.tokens[at] = there ? entries[i].flat % a.vocab : -1;
        a.parents[at] = there ? static_cast<int32_t>(entries[i].flat / a.vocab) : -1;
    }
}

template <class T>
void run(const BeamArgs& a) {
    const int64_t blocks = (a.vocab + kBlock - 1) / kBlock;
    const TokenLists& l = a.lists;
    const bool lists = l.penalised.start != nullptr || l.biased.start != nullptr || l.ends.start != nullptr || l.allowed != nullptr;
    const int64_t floats = a.rows * blocks * (lists ? kBlock + 1 : 1);
    char* memory = static_cast<char*>(scratch(kCallScratch, floats * 4 + a.rows * static_cast<int64_t>(sizeof(Beam))));
    Beam* beams = reinterpret_cast<Beam*>(memory);
    float* values = reinterpret_cast<float*>(beams + a.rows);
    parallel_for(a.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            beams[r] = {};
            beams[r].best = values + r * blocks;
            beams[r].log_probabilities = lists ? values + a.rows * blocks + r * blocks * kBlock : nullptr;
            prepare<T>(a, r, &beams[r]);
            a.status[r] = beams[r].status;
        }
    });
    parallel_for(a.groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) select_group<T>(a, g, beams);
    });
}

}  // namespace

void beam_select(const BeamArgs& a) {
    if (a.dtype == kBF16)
        run<BF16>(a);
    else if (a.dtype == kF16)
        run<F16>(a);
    else
        run<float>(a);
}

}  // namespace ENGINE_ISA
}  // namespace engine
