// Sums of the integer weights of the token law (fixed_weight in common/fixed_math.h), to the same bit, a vector at a time. Integers, so
// that neither the order of summation nor the width of a vector can show in a result.
#pragma once

#include "../../common/fixed_math.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

#if ENGINE_ISA_LEVEL >= 1

// exp(d) * 2^40, whose integer part is the weight; below 1 where d < kWeightFloor. For d <= 0, -inf too.
ENGINE_INLINE VecF scaled_exp(VecF d) {
    constexpr float c[] = ENGINE_EXP_COEFFICIENTS;
    d = max(d, set1(kWeightFloor));
    const VecF shifted = add(mul(d, set1(kLog2E)), set1(kRound));
    const VecF n = sub(shifted, set1(kRound));
    VecF r = sub(d, mul(n, set1(kLn2Hi)));
    r = sub(r, mul(n, set1(kLn2Lo)));
    VecF q = set1(c[kExpDegree]);
    for (int i = kExpDegree - 1; i >= 0; --i) q = add(mul(q, r), set1(c[i]));
    const VecF e = add(add(mul(mul(q, r), r), r), set1(1.0f));
    // The low bits of `shifted` hold n: shifted into the place of the exponent they multiply by 2^n.
#if ENGINE_ISA_LEVEL == 2
    const __m512i power = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23), _mm512_set1_epi32(kWeightBits << 23));
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(e.v), power))};
#else
    const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23), _mm256_set1_epi32(kWeightBits << 23));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e.v), power))};
#endif
}

#endif

#if ENGINE_ISA_LEVEL == 2

// A sum of weights of z - top over the tokens with z >= limit, at most kMaxAdds vectors.
class WeightSum {
  public:
    static constexpr int kMaxAdds = 1024;
    ENGINE_METHOD explicit WeightSum(float top) : top_(set1(top)), sum_(_mm512_setzero_si512()) {}
    ENGINE_METHOD void add_at_least(const float* z, VecF limit) {
        const VecF value = load(z);
        const VecF w = scaled_exp(sub(value, top_));
        add_masked(w, _mm512_cmp_ps_mask(value.v, limit.v, _CMP_GE_OQ));
    }
    ENGINE_METHOD int64_t total() const { return _mm512_reduce_add_epi64(sum_); }

  private:
    ENGINE_METHOD void add_masked(VecF w, __mmask16 mask) {
        const __m512 kept = _mm512_maskz_mov_ps(mask, w.v);
        sum_ = _mm512_add_epi64(sum_, _mm512_cvttps_epi64(_mm512_castps512_ps256(kept)));
        sum_ = _mm512_add_epi64(sum_, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(kept, 1)));
    }
    VecF top_;
    __m512i sum_;
};

#elif ENGINE_ISA_LEVEL == 1

// A 41-bit weight as high * 2^20 + low, each summed in its own 32-bit lane.
class WeightSum {
  public:
    static constexpr int kMaxAdds = 1024;  // of up to 2^20 each stay below 2^31
    ENGINE_METHOD explicit WeightSum(float top) : top_(set1(top)), high_(_mm256_setzero_si256()), low_(_mm256_setzero_si256()) {}
    ENGINE_METHOD void add_at_least(const float* z, VecF limit) {
        const VecF value = load(z);
        const __m256 w = _mm256_and_ps(scaled_exp(sub(value, top_)).v, _mm256_cmp_ps(value.v, limit.v, _CMP_GE_OQ));
        const __m256i high = _mm256_cvttps_epi32(_mm256_mul_ps(w, _mm256_set1_ps(0x1p-20f)));
        const __m256 rest = _mm256_sub_ps(w, _mm256_mul_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(0x1p20f)));  // both exact
        high_ = _mm256_add_epi32(high_, high);
        low_ = _mm256_add_epi32(low_, _mm256_cvttps_epi32(rest));
    }
    ENGINE_METHOD int64_t total() const { return (sum(high_) << 20) + sum(low_); }

  private:
    ENGINE_METHOD static int64_t sum(__m256i lanes) {
        alignas(32) int32_t t[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(t), lanes);
        int64_t total = 0;
        for (const int32_t lane : t) total += lane;
        return total;
    }
    VecF top_;
    __m256i high_, low_;
};

#else

class WeightSum {
  public:
    static constexpr int kMaxAdds = 1024;
    ENGINE_METHOD explicit WeightSum(float top) : top_(top) {}
    ENGINE_METHOD void add_at_least(const float* z, VecF limit) {
        float least[kLanes];
        store(least, limit);
        for (int i = 0; i < kLanes; ++i) sum_ += z[i] >= least[i] ? fixed_weight(z[i] - top_) : 0;
    }
    ENGINE_METHOD int64_t total() const { return sum_; }

  private:
    float top_;
    int64_t sum_ = 0;
};

#endif

// Numbers whose integer parts are the weights of z[i] - top.
ENGINE_INLINE void weights_of(const float* z, int64_t n, float top, float* out) {
    int64_t i = 0;
#if ENGINE_ISA_LEVEL >= 1
    for (; i + kLanes <= n; i += kLanes) store(out + i, scaled_exp(sub(load(z + i), set1(top))));
#endif
    for (; i < n; ++i) out[i] = static_cast<float>(fixed_weight(z[i] - top));  // 24 significant bits: exact
}

}  // namespace ENGINE_ISA
}  // namespace engine
