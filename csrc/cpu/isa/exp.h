// exp of a vector for softmax and SiLU, and SiLU: arguments of at most 0, relative error below 1e-7 (not the token law's, which is
// common/fixed_math.h).
#pragma once

#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

// 2^k where `t` is k + 127 + 1.5 * 2^23, that is, holds k + 127 in its low bits; -126 <= k <= 127.
ENGINE_INLINE VecF pow2_of_shifted(VecF t) {
#if ENGINE_ISA_LEVEL == 2
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23))};
#elif ENGINE_ISA_LEVEL == 1
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23))};
#else
    typedef uint32_t Bits4 __attribute__((vector_size(16)));
    return {reinterpret_cast<Float4>(reinterpret_cast<Bits4>(t.lo) << 23), reinterpret_cast<Float4>(reinterpret_cast<Bits4>(t.hi) << 23)};
#endif
}

// `other` in the lanes where x < limit, else `value`. A NaN in x keeps `value`.
ENGINE_INLINE VecF where_less(VecF other, VecF value, VecF x, VecF limit) {
#if ENGINE_ISA_LEVEL == 2
    return {_mm512_mask_mov_ps(value.v, _mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), other.v)};
#elif ENGINE_ISA_LEVEL == 1
    return {_mm256_blendv_ps(value.v, other.v, _mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ))};
#else
    return {x.lo < limit.lo ? other.lo : value.lo, x.hi < limit.hi ? other.hi : value.hi};
#endif
}

// `value`, or 0 in the lanes where x < limit. A NaN in x keeps `value`.
ENGINE_INLINE VecF zero_where_less(VecF value, VecF x, VecF limit) {
#if ENGINE_ISA_LEVEL == 1
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ), value.v)};
#else
    return where_less(zero(), value, x, limit);
#endif
}

// exp(x) for x <= 0. Below -86 (where exp(x) < 5e-38) exactly 0, also for -inf; NaN stays NaN.
//
// x = k ln 2 + r with |r| <= ln(2) / 2; ln 2 in two parts, the first short enough for k * part to be exact. The polynomial is this
// project's own minimax fit of (exp(r) - 1 - r) / r^2 in relative error (3e-9).
ENGINE_INLINE VecF exp_nonpositive(VecF x) {
    const VecF shift = set1(12583039.0f);  // 1.5 * 2^23 + 127: adding it rounds to an integer
    const VecF t = fma(x, set1(1.44269504f), shift);
    const VecF k = sub(t, shift);
    VecF r = fma(k, set1(-0.693359375f), x);
    r = fma(k, set1(2.12194440e-4f), r);
    VecF p = set1(0x1.6a2434p-10f);
    p = fma(p, r, set1(0x1.1239e2p-7f));
    p = fma(p, r, set1(0x1.5558f2p-5f));
    p = fma(p, r, set1(0x1.555492p-3f));
    p = fma(p, r, set1(0x1.fffffcp-2f));
    p = fma(mul(p, r), r, r);
    p = add(p, set1(1.0f));
    return zero_where_less(mul(p, pow2_of_shifted(t)), x, set1(-86.0f));
}

ENGINE_INLINE float exp_nonpositive(float x) {
    float lanes[kLanes];
    store(lanes, exp_nonpositive(set1(x)));
    return lanes[0];
}

// silu(g) = g / (1 + exp(-g)), written with exp of -|g| so that nothing overflows.
ENGINE_INLINE VecF silu(VecF g) {
    const VecF e = exp_nonpositive(min(sub(zero(), g), g));
    return div(fma(min(zero(), g), e, max(zero(), g)), add(set1(1.0f), e));
}

}  // namespace ENGINE_ISA
}  // namespace engine
