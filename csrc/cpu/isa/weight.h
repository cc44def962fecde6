// The integer weights of the token law (fixed_weight in common/fixed_math.h), to the same bit, a vector at a time, and their sums.
// Integers, so that neither the order of summation nor the width of a vector can show in a result.
#pragma once

#include "../../common/fixed_math.h"
#include "exp.h"

namespace engine {
namespace ENGINE_ISA {

#if ENGINE_ISA_LEVEL >= 1

// Numbers whose integer parts are the weights of d <= 0 (also -inf).
ENGINE_INLINE VecF scaled_exp(VecF d) {
    constexpr float c[] = ENGINE_EXP_COEFFICIENTS;
    d = max(d, set1(kWeightFloor));  // where the weight is 0 already
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

#else

ENGINE_INLINE VecF scaled_exp(VecF d) {
    float t[kLanes];
    store(t, d);
    for (int i = 0; i < kLanes; ++i) t[i] = static_cast<float>(fixed_weight(t[i]));  // 24 significant bits: exact
    return load(t);
}

#endif

// The sum of the integer parts of at most kMaxAdds vectors of numbers from 0 to 2^40.
class WeightSum {
  public:
    static constexpr int kMaxAdds = 1024;

#if ENGINE_ISA_LEVEL == 2
    ENGINE_METHOD void add(VecF scaled) {
        sum_ = _mm512_add_epi64(sum_, _mm512_cvttps_epi64(_mm512_castps512_ps256(scaled.v)));
        sum_ = _mm512_add_epi64(sum_, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(scaled.v, 1)));
    }
    ENGINE_METHOD int64_t total() const { return _mm512_reduce_add_epi64(sum_); }

  private:
    __m512i sum_ = _mm512_setzero_si512();
#elif ENGINE_ISA_LEVEL == 1
    ENGINE_METHOD void add(VecF scaled) {  // as high * 2^20 + low, so many of which fit 32 bits
        const __m256i high = _mm256_cvttps_epi32(_mm256_mul_ps(scaled.v, _mm256_set1_ps(0x1p-20f)));
        const __m256 rest = _mm256_sub_ps(scaled.v, _mm256_mul_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(0x1p20f)));  // both exact
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
    __m256i high_ = _mm256_setzero_si256(), low_ = _mm256_setzero_si256();
#else
    ENGINE_METHOD void add(VecF scaled) {
        float t[kLanes];
        store(t, scaled);
        for (int i = 0; i < kLanes; ++i) sum_ += static_cast<int64_t>(t[i]);
    }
    ENGINE_METHOD int64_t total() const { return sum_; }

  private:
    int64_t sum_ = 0;
#endif
};

// Numbers whose integer parts are the weights of z[i] - top.
ENGINE_INLINE void weights_of(const float* z, int64_t n, float top, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, scaled_exp(sub(load(z + i), set1(top))));
    for (; i < n; ++i) out[i] = static_cast<float>(fixed_weight(z[i] - top));
}

// The sum of the integer parts of weights[i] over values[i] >= limit.
ENGINE_INLINE int64_t sum_of_weights(const float* values, const float* weights, int64_t n, float limit) {
    int64_t total = 0, i = 0;
    while (i + kLanes <= n) {
        WeightSum sum;
        for (int adds = 0; adds < WeightSum::kMaxAdds && i + kLanes <= n; ++adds, i += kLanes)
            sum.add(zero_where_less(load(weights + i), load(values + i), set1(limit)));
        total += sum.total();
    }
    for (; i < n; ++i) total += values[i] >= limit ? static_cast<int64_t>(weights[i]) : 0;
    return total;
}

}  // namespace ENGINE_ISA
}  // namespace engine
