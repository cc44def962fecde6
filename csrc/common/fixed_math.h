// Logarithms and exponential of the token law, fixed sequences of float32 operations that C++, CUDA, Triton and PyTorch compute to the same
// bit. Specification, source of the polynomials and accuracy: kernels/fixed_math.py and noise.py. Every multiplication and addition rounds
// by itself: build with -ffp-contract=off / --fmad=false, never with -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace engine {

// P of fixed_math.py, lowest power first.
#define ENGINE_LOG_COEFFICIENTS \
    {0x1.555554p-2f, -0x1.000226p-2f, 0x1.99a008p-3f, -0x1.547244p-3f, 0x1.22da1cp-3f, -0x1.0d8542p-3f, 0x1.055b6ap-3f, -0x1.38b58p-4f}
constexpr int kLogDegree = 7;
constexpr float kLn2Hi = 355.0f / 512.0f;
constexpr float kLn2Lo = -0x1.bd0106p-13f;
constexpr int32_t kSqrtHalfBits = 0x3F3504F3;
// Q, likewise.
#define ENGINE_EXP_COEFFICIENTS {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2434p-10f}
constexpr int kExpDegree = 4;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds a small float to an integer
constexpr int kWeightBits = 40;        // the weight of the largest token is 2^40
constexpr float kWeightFloor = -28.0f;
constexpr int kMassBits = 31;
constexpr uint32_t kSmallWords = 1u << 30;  // below: log1p at -u itself

// log((1 + f) * 2^exponent)
ENGINE_HD float fixed_log_core(float f, float exponent) {
    constexpr float c[] = ENGINE_LOG_COEFFICIENTS;
    const float square = f * f;
    float p = c[kLogDegree];
    for (int i = kLogDegree - 1; i >= 0; --i) p = p * f + c[i];
    const float y = p * f * square + exponent * kLn2Lo - square * 0.5f;
    return f + y + exponent * kLn2Hi;
}

// x = (1 + f) * 2^exponent with 1 + f in [sqrt(1/2), sqrt(2)), for positive normal x.
ENGINE_HD void fixed_split(float x, float* f, float* exponent) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    const int32_t e = (bits - kSqrtHalfBits) >> 23;
    bits -= e * (1 << 23);
    memcpy(&x, &bits, 4);
    *f = x - 1.0f;
    *exponent = static_cast<float>(e);
}

// Natural logarithm of a positive normal x.
ENGINE_HD float fixed_log(float x) {
    float f, exponent;
    fixed_split(x, &f, &exponent);
    return fixed_log_core(f, exponent);
}

// E = -log1p(-u) of a word and, where word < kTailWords, its 32 further bits.
ENGINE_HD float noise_exponential(uint32_t word, uint32_t low) {
    if (word >= kSmallWords) {
        float f, exponent;
        fixed_split(static_cast<float>(int64_t{~word} * 2 + 1) * 0x1p-33f, &f, &exponent);
        return -fixed_log_core(f, exponent);
    }
    const float u = word < kTailWords ? static_cast<float>(static_cast<int64_t>((uint64_t{word} << 32 | low) * 2 + 1)) * 0x1p-65f
                                      : static_cast<float>(int64_t{word} * 2 + 1) * 0x1p-33f;
    return -fixed_log_core(-u, 0.0f);
}

// floor(exp(d) * 2^40) for d <= 0.
ENGINE_HD int64_t fixed_weight(float d) {
    if (d < kWeightFloor) return 0;
    constexpr float c[] = ENGINE_EXP_COEFFICIENTS;
    const float n = (d * kLog2E + kRound) - kRound;
    float r = d - n * kLn2Hi;
    r = r - n * kLn2Lo;
    float q = c[kExpDegree];
    for (int i = kExpDegree - 1; i >= 0; --i) q = q * r + c[i];
    float e = q * r * r + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &e, 4);
    bits += (static_cast<int32_t>(n) + kWeightBits) * (1 << 23);
    memcpy(&e, &bits, 4);
    return static_cast<int64_t>(e);
}

// max(1, ceil(top_p * mass)), exact for top_p in [0, 1) cut to 31 bits and mass below 2^62.
ENGINE_HD int64_t mass_needed(int64_t mass, float top_p) {
    constexpr int64_t low_bits = (int64_t{1} << kMassBits) - 1;
    const int64_t p = static_cast<int64_t>(static_cast<double>(top_p) * (low_bits + 1));
    const int64_t needed = p * (mass >> kMassBits) + ((p * (mass & low_bits) + low_bits) >> kMassBits);
    return needed < 1 ? 1 : needed;
}

}  // namespace engine
