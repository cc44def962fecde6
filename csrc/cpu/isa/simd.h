// A thin vector of floats per instruction set. Everything is in namespace engine::<isa> (ENGINE_ISA is given by the build) with internal
// inlining only, so that no wide code can be picked by the linker for a narrow instruction set: isa files use no std:: templates.
#pragma once

#include <cstdint>
#include <cstring>

#define ENGINE_ISA_LEVEL_portable 0
#define ENGINE_ISA_LEVEL_avx2 1
#define ENGINE_ISA_LEVEL_avx512 2
#define ENGINE_ISA_LEVEL_avx512vnni 2
#define ENGINE_ISA_PASTE(a, b) a##b
#define ENGINE_ISA_LEVEL_OF(isa) ENGINE_ISA_PASTE(ENGINE_ISA_LEVEL_, isa)
#define ENGINE_ISA_LEVEL ENGINE_ISA_LEVEL_OF(ENGINE_ISA)  // 0 portable, 1 avx2, 2 avx512

#define ENGINE_INLINE static inline __attribute__((always_inline))
#define ENGINE_METHOD inline __attribute__((always_inline))

#if ENGINE_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

namespace engine {
namespace ENGINE_ISA {

// ---- scalars ----

ENGINE_INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
ENGINE_INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
ENGINE_INLINE float from_bf16(uint16_t h) { return float_of_bits(uint32_t{h} << 16); }
// Round to nearest even; NaN stays NaN (quiet).
ENGINE_INLINE uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
ENGINE_INLINE float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);       // inf, nan
    if (rest >= 0x0400) return float_of_bits(sign | ((rest << 13) + (uint32_t{112} << 23)));  // normal
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;                // subnormal: rest * 2^-24
    return float_of_bits(sign | bits_of_float(magnitude));
}

// ---- vectors ----
// kLanes floats. load/store take unaligned addresses; the *_n forms touch only the first n (0..kLanes) elements, the others read as 0.

#if ENGINE_ISA_LEVEL == 2

constexpr int kLanes = 16;
struct VecF {
    __m512 v;
};
ENGINE_INLINE VecF zero() { return {_mm512_setzero_ps()}; }
ENGINE_INLINE VecF set1(float a) { return {_mm512_set1_ps(a)}; }
ENGINE_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
ENGINE_INLINE VecF load(const float* p, int n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)}; }
ENGINE_INLINE void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
ENGINE_INLINE void store(float* p, VecF a, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v); }
ENGINE_INLINE VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
ENGINE_INLINE VecF sub(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
ENGINE_INLINE VecF mul(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
ENGINE_INLINE VecF div(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
ENGINE_INLINE VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }                 // b where either is NaN
ENGINE_INLINE VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }                 // b where either is NaN
ENGINE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
ENGINE_INLINE VecF load_bf16(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
ENGINE_INLINE VecF load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
struct NanSeen {  // whether any lane of what was noted is NaN
    __mmask16 lanes = 0;
    ENGINE_METHOD void note(VecF a, VecF b) { lanes |= _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
    ENGINE_METHOD bool any() const { return lanes != 0; }
};

#elif ENGINE_ISA_LEVEL == 1

constexpr int kLanes = 8;
struct VecF {
    __m256 v;
};
ENGINE_INLINE __m256i lane_mask(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
ENGINE_INLINE VecF zero() { return {_mm256_setzero_ps()}; }
ENGINE_INLINE VecF set1(float a) { return {_mm256_set1_ps(a)}; }
ENGINE_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
ENGINE_INLINE VecF load(const float* p, int n) { return {_mm256_maskload_ps(p, lane_mask(n))}; }
ENGINE_INLINE void store(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
ENGINE_INLINE void store(float* p, VecF a, int n) { _mm256_maskstore_ps(p, lane_mask(n), a.v); }
ENGINE_INLINE VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
ENGINE_INLINE VecF sub(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
ENGINE_INLINE VecF mul(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
ENGINE_INLINE VecF div(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
ENGINE_INLINE VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }                 // b where either is NaN
ENGINE_INLINE VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }                 // b where either is NaN
ENGINE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
ENGINE_INLINE VecF load_bf16(const uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
ENGINE_INLINE VecF load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
struct NanSeen {  // whether any lane of what was noted is NaN
    __m256 lanes = _mm256_setzero_ps();
    ENGINE_METHOD void note(VecF a, VecF b) { lanes = _mm256_or_ps(lanes, _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)); }
    ENGINE_METHOD bool any() const { return _mm256_movemask_ps(lanes) != 0; }
};

#else

// Two 16-byte vectors of the compiler's own vector extension: SSE2 on x86-64, NEON on AArch64, plain code elsewhere.
constexpr int kLanes = 8;
typedef float Float4 __attribute__((vector_size(16)));
struct VecF {
    Float4 lo, hi;
};
ENGINE_INLINE VecF zero() { return {Float4{}, Float4{}}; }
ENGINE_INLINE VecF set1(float a) { return {Float4{a, a, a, a}, Float4{a, a, a, a}}; }
ENGINE_INLINE VecF load(const float* p) {
    VecF a;
    memcpy(&a.lo, p, 16);
    memcpy(&a.hi, p + 4, 16);
    return a;
}
ENGINE_INLINE void store(float* p, VecF a) {
    memcpy(p, &a.lo, 16);
    memcpy(p + 4, &a.hi, 16);
}
ENGINE_INLINE VecF load(const float* p, int n) {
    float t[kLanes] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
}
ENGINE_INLINE void store(float* p, VecF a, int n) {
    float t[kLanes];
    store(t, a);
    for (int i = 0; i < n; ++i) p[i] = t[i];
}
ENGINE_INLINE VecF add(VecF a, VecF b) { return {a.lo + b.lo, a.hi + b.hi}; }
ENGINE_INLINE VecF sub(VecF a, VecF b) { return {a.lo - b.lo, a.hi - b.hi}; }
ENGINE_INLINE VecF mul(VecF a, VecF b) { return {a.lo * b.lo, a.hi * b.hi}; }
ENGINE_INLINE VecF div(VecF a, VecF b) { return {a.lo / b.lo, a.hi / b.hi}; }
ENGINE_INLINE VecF max(VecF a, VecF b) { return {a.lo > b.lo ? a.lo : b.lo, a.hi > b.hi ? a.hi : b.hi}; }  // b where either is NaN
ENGINE_INLINE VecF min(VecF a, VecF b) { return {a.lo < b.lo ? a.lo : b.lo, a.hi < b.hi ? a.hi : b.hi}; }  // b where either is NaN
ENGINE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {a.lo * b.lo + c.lo, a.hi * b.hi + c.hi}; }  // two roundings: no fused unit assumed
ENGINE_INLINE VecF load_bf16(const uint16_t* p) {
    float t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = from_bf16(p[i]);
    return load(t);
}
ENGINE_INLINE VecF load_f16(const uint16_t* p) {
    float t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = from_f16(p[i]);
    return load(t);
}
struct NanSeen {  // whether any lane of what was noted is NaN
    typedef int32_t Int4 __attribute__((vector_size(16)));
    Int4 lanes = {};
    ENGINE_METHOD void note(VecF a, VecF b) { lanes |= (a.lo != a.lo) | (a.hi != a.hi) | (b.lo != b.lo) | (b.hi != b.hi); }
    ENGINE_METHOD bool any() const { return (lanes[0] | lanes[1] | lanes[2] | lanes[3]) != 0; }
};

#endif

// ---- common to all ----

ENGINE_INLINE VecF load_bf16(const uint16_t* p, int n) {
    uint16_t t[kLanes] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load_bf16(t);
}
ENGINE_INLINE VecF load_f16(const uint16_t* p, int n) {
    uint16_t t[kLanes] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load_f16(t);
}
ENGINE_INLINE void store_bf16(uint16_t* p, VecF a) {  // round to nearest even
    float t[kLanes];
    store(t, a);
    for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(t[i]);
}

// ---- masks ----
// at_least: bit i set where values[i] >= limit, for kLanes values. compress: the values whose bits are set, side by side at `out`, which
// must have room for kLanes; returns how many they are. compress_indices: the same for first + i.

#if ENGINE_ISA_LEVEL == 2
ENGINE_INLINE uint32_t at_least(const float* values, float limit) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(limit), _CMP_GE_OQ);
}
ENGINE_INLINE int compress(const float* values, uint32_t bits, float* out) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(values)));
    return __builtin_popcount(bits);
}
ENGINE_INLINE void compress_indices(int32_t first, uint32_t bits, int32_t* out) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i indices = _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), indices));
}
#elif ENGINE_ISA_LEVEL == 1
ENGINE_INLINE uint32_t at_least(const float* values, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values), _mm256_set1_ps(limit), _CMP_GE_OQ)));
}
// The positions of the set bits of `bits`, in order.
ENGINE_INLINE __m256i set_positions(uint32_t bits) {
    struct Table {
        uint64_t row[256];
        constexpr Table() : row() {
            for (uint32_t b = 0; b < 256; ++b) {
                int at = 0;
                for (uint64_t i = 0; i < 8; ++i)
                    if (b >> i & 1) row[b] |= i << 8 * at++;
            }
        }
    };
    static constexpr Table table;
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(table.row[bits])));
}
ENGINE_INLINE int compress(const float* values, uint32_t bits, float* out) {
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), set_positions(bits)));
    return __builtin_popcount(bits);
}
ENGINE_INLINE void compress_indices(int32_t first, uint32_t bits, int32_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_add_epi32(_mm256_set1_epi32(first), set_positions(bits)));
}
#else
ENGINE_INLINE uint32_t at_least(const float* values, float limit) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(values[i] >= limit) << i;
    return bits;
}
ENGINE_INLINE int compress(const float* values, uint32_t bits, float* out) {
    int count = 0;
    for (int i = 0; i < kLanes; ++i) {
        out[count] = values[i];  // `out` may be `values` or before it
        count += static_cast<int>(bits >> i & 1);
    }
    return count;
}
ENGINE_INLINE void compress_indices(int32_t first, uint32_t bits, int32_t* out) {
    int count = 0;
    for (int i = 0; i < kLanes; ++i) {
        out[count] = first + i;
        count += static_cast<int>(bits >> i & 1);
    }
}
#endif

// Overloads by element type, for kernels templated on it: bf16 and fp16 are wrapped so that they differ.
struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};
ENGINE_INLINE VecF load_as_float(const float* p) { return load(p); }
ENGINE_INLINE VecF load_as_float(const BF16* p) { return load_bf16(&p->bits); }
ENGINE_INLINE VecF load_as_float(const F16* p) { return load_f16(&p->bits); }
ENGINE_INLINE VecF load_as_float(const float* p, int n) { return load(p, n); }
ENGINE_INLINE VecF load_as_float(const BF16* p, int n) { return load_bf16(&p->bits, n); }
ENGINE_INLINE VecF load_as_float(const F16* p, int n) { return load_f16(&p->bits, n); }
ENGINE_INLINE float as_float(float a) { return a; }
ENGINE_INLINE float as_float(BF16 a) { return from_bf16(a.bits); }
ENGINE_INLINE float as_float(F16 a) { return from_f16(a.bits); }

// Horizontal sum and maximum in one fixed order: halves folded onto each other until one lane is left (lane i with lane i + half).
ENGINE_INLINE float reduce_add(VecF a) {
    float t[kLanes];
    store(t, a);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
}
ENGINE_INLINE float reduce_max(VecF a) {
    float t[kLanes];
    store(t, a);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) t[i] = t[i] > t[i + half] ? t[i] : t[i + half];
    return t[0];
}

}  // namespace ENGINE_ISA
}  // namespace engine
