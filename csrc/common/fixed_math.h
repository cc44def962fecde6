// The logarithms of the token law, one fixed sequence of float32 operations that C++, CUDA, Triton and PyTorch compute to the same bit.
// Specification, source of the polynomial and accuracy: kernels/noise.py. Every multiplication and addition rounds by itself: build with
// -ffp-contract=off / --fmad=false, never with -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace engine {

// P of noise.py, lowest power first.
#define ENGINE_LOG_COEFFICIENTS \
    {0x1.555554p-2f, -0x1.000226p-2f, 0x1.99a008p-3f, -0x1.547244p-3f, 0x1.22da1cp-3f, -0x1.0d8542p-3f, 0x1.055b6ap-3f, -0x1.38b58p-4f}
constexpr int kLogDegree = 7;
constexpr float kLn2Hi = 355.0f / 512.0f;
constexpr float kLn2Lo = -0x1.bd0106p-13f;
constexpr int32_t kSqrtHalfBits = 0x3F3504F3;
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

}  // namespace engine
