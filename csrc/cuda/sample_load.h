// Steps 1 to 3 of the contract: the row's tokens from global to shared memory, once; its lists and its mask; the temperature.
#pragma once

#include "cuda/sample_block.h"

namespace engine::cuda {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
ENGINE_DEVICE float to_float(float x) { return x; }
ENGINE_DEVICE float to_float(Bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
ENGINE_DEVICE float to_float(Float16 x) { return half_to_float(x.bits); }

constexpr float kLargestAddend = 1e30f;  // of penalties and biases
constexpr int32_t kMaxCount = 1 << 24;

template <class T>
ENGINE_DEVICE const T* tokens_of(const SampleArgs& a, const Row& row) {
    return static_cast<const T*>(a.logits) + row.index * a.row_stride + row.first;
}

// take(i, x) for every four tokens x[0..4) from the block's i-th on, by one thread each; -inf past the row.
template <class T, class Take>
ENGINE_DEVICE void for_each_quad(const T* from, const Row& row, Take take) {
    constexpr int kPerVector = 16 / sizeof(T), kAtOnce = 4;
    int done = 0;
    if ((reinterpret_cast<uintptr_t>(from) & 15) == 0) {
        const Words* vectors = reinterpret_cast<const Words*>(from);
        const int count = row.tokens / kPerVector;
        for (int start = thread_index(); start < count; start += kAtOnce * kSampleThreads) {
            Words loaded[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
                if (start + j * kSampleThreads < count) loaded[j] = vectors[start + j * kSampleThreads];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int v = start + j * kSampleThreads;
                if (v >= count) break;
#pragma unroll
                for (int quad = 0; quad < kPerVector / 4; ++quad) {
                    float x[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if constexpr (sizeof(T) == 4)
                            x[i] = bits_to_float(loaded[j].word[i]);
                        else
                            x[i] = to_float(T{static_cast<uint16_t>(loaded[j].word[2 * quad + i / 2] >> (i % 2 * 16))});
                    }
                    take(v * kPerVector + 4 * quad, x);
                }
            }
        }
        done = count * kPerVector;
    }
#pragma unroll 1
    for (int i = done + 4 * thread_index(); i < row.chunk; i += 4 * kSampleThreads) {
        float x[4];
        for (int j = 0; j < 4; ++j) x[j] = i + j < row.tokens ? to_float(from[i + j]) : -kInf;
        take(i, x);
    }
}

// The row as given into z, as the bits of floats; its largest logit and whether it has a NaN go to shared memory. No barrier at its end.
template <class T>
ENGINE_DEVICE void load_raw(const SampleArgs& a, const Row& row, Shared& s, uint32_t* z) {
    uint32_t largest = 0;
    bool nan = false;
    for_each_quad(tokens_of<T>(a, row), row, [&](int i, const float (&x)[4]) {
        Words bits;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            bits.word[j] = float_to_bits(x[j]);
            if (x[j] == x[j])
                largest = larger(largest, ordered(x[j]));
            else
                nan = true;
        }
        *reinterpret_cast<Words*>(z + i) = bits;
    });
    largest = warp_largest(largest);
    if (thread_index() % kWarp == 0) atomic_max(&s.raw_largest, largest);
    if (nan) atomic_or(&s.flags, kFlagNan);
}

// ---- lists ----

struct Entries {
    int32_t first, end;
};

// Those of the row; none, and the row is bad, where they are out of range.
ENGINE_DEVICE Entries entries_of(const int32_t* start, int64_t size, const Row& row, Shared& s) {
    if (start == nullptr) return {0, 0};
    const Entries e = {start[row.index], start[row.index + 1]};
    if (e.first >= 0 && e.end >= e.first && e.end <= size) return e;
    atomic_or(&s.flags, kFlagBad);
    return {0, 0};
}

// Where a listed id is in this block; -1 elsewhere, and the row is bad if that is nowhere.
ENGINE_DEVICE int32_t place_of(int32_t id, const Row& row, Shared& s) {
    if (id < 0 || id >= row.vocab) {
        atomic_or(&s.flags, kFlagBad);
        return -1;
    }
    return id >= row.first && id < row.first + row.tokens ? id - row.first : -1;
}

// Mark a token; a row whose list has it twice is bad.
ENGINE_DEVICE void mark(int32_t place, Shared& s) {
    const uint32_t bit = 1u << (place % 32);
    if ((atomic_or(&s.counts[place / 32], bit) & bit) != 0) atomic_or(&s.flags, kFlagBad);
}

ENGINE_DEVICE void clear_marks(const Row& row, Shared& s) {
    for (int i = thread_index(); i < row.chunk / 32; i += kSampleThreads) s.counts[i] = 0;
    block_barrier();
}

// Penalties, bias and early end tokens on z, which holds the bits of floats. A list's ids are distinct, so that each is one thread's; of
// two lists the second sees what the first has left.
ENGINE_DEVICE void apply_lists(const SampleArgs& a, const Row& row, Shared& s, uint32_t* z) {
    const Entries penalties = entries_of(a.penalty_start, a.penalty_size, row, s), biases = entries_of(a.bias_start, a.bias_size, row, s),
                  ends = entries_of(a.end_start, a.end_size, row, s);
    if (a.penalty_start != nullptr) {
        const float repetition = a.repetition[row.index], presence = a.presence[row.index], frequency = a.frequency[row.index];
        if (!(repetition > 0.0f && repetition < kInf && fabsf(presence) <= kLargestAddend && fabsf(frequency) <= kLargestAddend))
            atomic_or(&s.flags, kFlagBad);
        if (penalties.end > penalties.first) {
            clear_marks(row, s);
#pragma unroll 1
            for (int e = penalties.first + thread_index(); e < penalties.end; e += kSampleThreads) {
                const int32_t count = a.penalty_count[e], place = place_of(a.penalty_token[e], row, s);
                if (count < 0 || count > kMaxCount) atomic_or(&s.flags, kFlagBad);
                if (place < 0) continue;
                mark(place, s);
                float x = bits_to_float(z[place]);
                x = x > 0.0f ? x / repetition : x * repetition;
                if (count > 0) {
                    x = x - frequency * static_cast<float>(count);
                    x = x - presence;
                }
                z[place] = float_to_bits(x);
            }
            block_barrier();
        }
    }
    if (biases.end > biases.first) {
        clear_marks(row, s);
#pragma unroll 1
        for (int e = biases.first + thread_index(); e < biases.end; e += kSampleThreads) {
            const float addend = a.bias_value[e];
            const int32_t place = place_of(a.bias_token[e], row, s);
            if (!(fabsf(addend) <= kLargestAddend || addend == -kInf)) atomic_or(&s.flags, kFlagBad);
            if (place < 0) continue;
            mark(place, s);
            z[place] = float_to_bits(addend == -kInf ? -kInf : bits_to_float(z[place]) + addend);
        }
        block_barrier();
    }
    if (ends.end > ends.first) {
        const bool early = static_cast<int32_t>(row.noise.position) < a.end_position[row.index];
#pragma unroll 1
        for (int e = ends.first + thread_index(); e < ends.end; e += kSampleThreads) {
            const int32_t place = place_of(a.end_token[e], row, s);
            if (place >= 0 && early) z[place] = float_to_bits(-kInf);
        }
        block_barrier();
    }
}

// The words of the row's mask, or null.
ENGINE_DEVICE const uint32_t* mask_of(const SampleArgs& a, const Row& row) {
    return a.allowed == nullptr ? nullptr : a.allowed + row.index * ((row.vocab + 31) / 32);
}

// The mask and the temperature; z becomes ordered, without NaN (a row that has one draws nothing). The largest goes to shared memory. A
// barrier at its end.
ENGINE_DEVICE void divide(const uint32_t* allowed, const Row& row, Shared& s, uint32_t* z) {
    const float divisor = row.divisor;
    uint32_t largest = 0;
    for (int i = 4 * thread_index(); i < row.chunk; i += 4 * kSampleThreads) {
        const int token = row.first + i;
        const uint32_t bits = allowed != nullptr && token < row.vocab ? allowed[token / 32] >> (token % 32) : 15;
        Words four = *reinterpret_cast<const Words*>(z + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float x = (bits >> j & 1) != 0 ? bits_to_float(four.word[j]) : -kInf;
            if (divisor != 1.0f) x = x / divisor;
            four.word[j] = x == x ? ordered(x) : kOrderedNegInf;
            largest = larger(largest, four.word[j]);
        }
        *reinterpret_cast<Words*>(z + i) = four;
    }
    largest = warp_largest(largest);
    if (thread_index() % kWarp == 0) atomic_max(&s.largest, largest);
    block_barrier();
}

}  // namespace engine::cuda
