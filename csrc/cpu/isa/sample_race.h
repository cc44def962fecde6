// The race: argmax of z - log(E) over the tokens with z >= tau, lowest id on ties (Gumbel-max). Nearly all tokens are ruled out by one
// integer comparison of their word (word_limit in noise.h); only the others get their logarithms.
#pragma once

#include "../thread_pool.h"
#include "sample_filter.h"

namespace engine {
namespace ENGINE_ISA {

template <class T>
struct Race {
    const Row& row;
    const Logits<T>& logits;
    float tau;
    RowNoise noise;

    // Let a token with its z and word compete with `best`; true if it is the new best.
    ENGINE_METHOD bool compete(int64_t token, float z, uint32_t word, Best* best) const {
        const uint32_t tail = word < kTailWords ? noise_words(row.key, static_cast<uint32_t>(token / 4), kDomainTail).word[token & 3] : 0;
        const Best mine = {z - fixed_log(noise_exponential(word, tail)), token};
        if (!better(mine, *best)) return false;
        *best = mine;
        return true;
    }

    // Some kTokens tokens anywhere; none of them has a z above `top`.
    ENGINE_METHOD void run_tokens(const float* z, const int32_t* tokens, int n, float top, Best* best) const {
        uint32_t words[kTokens], limit;
        if (!word_limit(top, best->score, &limit)) return;
        token_words(noise, tokens, words);
        for (int i = 0; i < n; ++i) {
            uint32_t own_limit;
            if (words[i] > limit || !word_limit(z[i], best->score, &own_limit) || words[i] > own_limit) continue;
            compete(tokens[i], z[i], words[i], best);
        }
    }

    ENGINE_METHOD void run_block(int64_t b, Best* best) const {
        const float top = row.block_z[b];
        uint32_t limit;
        if (top < tau || top == -kInf || !word_limit(top, best->score, &limit)) return;
        alignas(64) float z[kBlock];
        if (tau > -kInf) {
            logits.block(b, z);
            int kept = 0;
            for (int i = 0; i < kBlock; i += kLanes) kept += __builtin_popcount(at_least(z + i, tau));
            if (kept <= kTokens) {  // fewer words to make than the block has
                float listed[kTokens + kLanes];
                int32_t tokens[kTokens + kLanes] = {};
                int n = 0;
                for (int i = 0; i < kBlock; i += kLanes) {
                    const uint32_t bits = at_least(z + i, tau);
                    if (bits == 0) continue;
                    compress_indices(static_cast<int32_t>(b * kBlock + i), bits, tokens + n);
                    n += compress(z + i, bits, listed + n);
                }
                run_tokens(listed, tokens, n, top, best);
                return;
            }
        }
        alignas(64) uint32_t words[kBlock];
        block_words(noise, static_cast<uint32_t>(b * kBlock), words);
        if (!any_at_most(words, limit)) return;
        for (int i = 0; i < kBlock; i += kLanes)
            for (uint32_t bits = at_most(words + i, limit); bits != 0; bits &= bits - 1) {
                const int at = i + __builtin_ctz(bits);
                const int64_t token = b * kBlock + at;
                if (token >= row.vocab) break;
                const float value = logits.at(token);
                uint32_t own_limit;
                if (value < tau || value == -kInf || !word_limit(value, best->score, &own_limit) || words[at] > own_limit) continue;
                if (compete(token, value, words[at], best)) word_limit(top, best->score, &limit);
            }
    }

    // The blocks of a chunk, while the next one is fetched.
    ENGINE_METHOD void run_chunk(int64_t chunk, Best* best) const {
        const int64_t end = smaller(row.blocks(), (chunk + 1) * (kChunk / kBlock));
        for (int64_t b = chunk * (kChunk / kBlock); b < end; ++b) {
            const char* ahead = reinterpret_cast<const char*>(logits.data + b * kBlock + kChunk);
            for (int64_t line = 0; line < kBlock * static_cast<int64_t>(sizeof(T)); line += 64) __builtin_prefetch(ahead + line, 0, 2);
            run_block(b, best);
        }
    }

    // All blocks; that of the largest z first, so that nearly all others are ruled out at once.
    ENGINE_METHOD int64_t run_row(int64_t first_block, bool split) const {
        Best best = {-kInf, row.vocab};
        run_block(first_block, &best);
        if (!split) {
            for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) run_chunk(chunk, &best);
            return best.token;
        }
        parallel_for(row.chunks(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                row.best[chunk] = best;
                run_chunk(chunk, &row.best[chunk]);
            }
        });
        for (int64_t chunk = 0; chunk < row.chunks(); ++chunk)
            if (better(row.best[chunk], best)) best = row.best[chunk];
        return best.token;
    }
};

template <class T>
ENGINE_INLINE int64_t race(const Row& row, const Logits<T>& logits, Kept kept, int64_t first_block, bool split) {
    const Race<T> race = {row, logits, kept.tau, row_noise(row.key)};
    if (kept.count < 0 || kept.count > row.vocab / 8) return race.run_row(first_block, split);  // whole blocks are cheaper by the token
    Best best = {-kInf, row.vocab};
    float z[kTokens];
    int32_t tokens[kTokens] = {};
    int n = 0;
    for (int64_t i = 0; i < kept.count; ++i) {
        if (row.candidates[i] < kept.tau) continue;
        z[n] = row.candidates[i];
        tokens[n++] = row.tokens[i];
        if (n < kTokens) continue;
        race.run_tokens(z, tokens, n, row.block_z[first_block], &best);
        n = 0;
    }
    if (n > 0) race.run_tokens(z, tokens, n, row.block_z[first_block], &best);
    return best.token;
}

}  // namespace ENGINE_ISA
}  // namespace engine
