// What lies between the products: RMS norm, rotary embedding with the cache write, SwiGLU. Each row on its own, in one
// order of operations; many rows are shared out over the threads, few are done at once by the caller.
#include "../kernels.h"
#include "../thread_pool.h"
#include "exp.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kChunk = 16 * 1024;  // elements worth handing to a thread (several microseconds of work)

// Run f(begin, end) over rows of `width` elements, inline when there is little to do; chunks are multiples of `multiple` rows.
template <class F>
ENGINE_INLINE void over_rows(int64_t rows, int64_t width, int64_t multiple, const F& f) {
    const int64_t grain = (kChunk / (width + 1) + multiple) / multiple * multiple;
    if (rows * width < 2 * kChunk || rows <= grain) {
        f(0, rows);
    } else {
        parallel_for(rows, grain, f);
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight. Squares go to four vectors by position modulo 4 * kLanes, which are then added in one order.
template <class W>
ENGINE_INLINE void normalise(const float* x, const W* weight, int64_t width, float eps, float* out) {
    VecF sum[4] = {zero(), zero(), zero(), zero()};
    int64_t c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) {
            const VecF v = load(x + c + i * kLanes);
            sum[i] = fma(v, v, sum[i]);
        }
    }
    for (int i = 0; c < width; c += kLanes, ++i) {
        const VecF v = c + kLanes <= width ? load(x + c) : load(x + c, static_cast<int>(width - c));
        sum[i] = fma(v, v, sum[i]);
    }
    const float squares = reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
    const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);
    for (c = 0; c + kLanes <= width; c += kLanes) store(out + c, mul(mul(load(x + c), set1(factor)), load_as_float(weight + c)));
    for (; c < width; ++c) out[c] = x[c] * factor * as_float(weight[c]);
}

void normalise(const float* x, const void* weight, DType dtype, int64_t width, float eps, float* out) {
    if (dtype == kF32) {
        normalise(x, static_cast<const float*>(weight), width, eps, out);
    } else if (dtype == kBF16) {
        normalise(x, static_cast<const BF16*>(weight), width, eps, out);
    } else {
        normalise(x, static_cast<const F16*>(weight), width, eps, out);
    }
}

// Turn pair i of a head by the angle of column i; components past 2 * half pass. Plain loops: the compiler vectorises them, and every
// result is one fixed expression whatever its lane.
void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half, int64_t head_dim,
            bool interleaved, float* __restrict out) {
    if (interleaved) {
        for (int64_t i = 0; i < half; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1];
            out[2 * i] = a * cos[i] - b * sin[i];
            out[2 * i + 1] = b * cos[i] + a * sin[i];
        }
    } else {
        for (int64_t i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            out[i] = a * cos[i] - b * sin[i];
            out[i + half] = b * cos[i] + a * sin[i];
        }
    }
    for (int64_t i = 2 * half; i < head_dim; ++i) out[i] = x[i];
}

// One head of a token into the cache, elements `step` apart; `scale` only where the cache is int8.
ENGINE_INLINE void put(const float* x, int64_t head_dim, float* target, int64_t step, float*) {
    for (int64_t d = 0; d < head_dim; ++d) target[d * step] = x[d];
}
ENGINE_INLINE void put(const float* x, int64_t head_dim, BF16* target, int64_t step, float*) {
    for (int64_t d = 0; d < head_dim; ++d) target[d * step].bits = to_bf16(x[d]);
}

// x = scale * integers in [-127, 127], as near as they come, with scale = max |x| / 127. What is not finite makes the scale NaN.
void put(const float* x, int64_t head_dim, int8_t* target, int64_t step, float* scale) {
    VecF most = zero();
    NanSeen nan;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const VecF v = load(x + d, static_cast<int>(head_dim - d < kLanes ? head_dim - d : kLanes));
        most = max(max(v, sub(zero(), v)), most);
        nan.note(v, v);
    }
    const float largest = reduce_max(most), unit = largest / 127.0f;
    const bool finite = !nan.any() && largest <= __FLT_MAX__;
    *scale = finite ? unit : __builtin_nanf("");
    int8_t rounded[kMaxHeadDim];
    if (!finite || unit == 0.0f) {
        memset(rounded, 0, static_cast<size_t>(head_dim));
    } else {
        const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
        for (int64_t d = 0; d < head_dim; ++d) {
            float q = x[d] / unit;  // a subnormal unit is coarse: past 127
            q = q > 127.0f ? 127.0f : q;
            q = q < -127.0f ? -127.0f : q;
            rounded[d] = static_cast<int8_t>(static_cast<int32_t>(q + shift - shift));
        }
    }
    for (int64_t d = 0; d < head_dim; ++d) target[d * step] = rounded[d];
}

template <class T>
void rope_token(const RopeArgs& a, int64_t token) {
    const int64_t head_dim = a.head_dim;
    const float* x = a.qkv + token * (a.num_heads + 2 * a.num_kv_heads) * head_dim;
    const float* cos = a.cos + a.positions[token] * a.half;
    const float* sin = a.sin + a.positions[token] * a.half;
    float normal[kMaxHeadDim], turned[kMaxHeadDim];
    const auto turn = [&](const void* norm, float* out) {
        const float* source = x;
        if (norm != nullptr) {
            normalise(x, norm, a.norm_dtype, head_dim, a.norm_eps, normal);
            source = normal;
        }
        rotate(source, cos, sin, a.half, head_dim, a.interleaved, out);
        x += head_dim;
    };
    for (int64_t head = 0; head < a.num_heads; ++head) turn(a.q_norm, a.out + (token * a.num_heads + head) * head_dim);
    if (a.slots[token] < 0) return;
    const int64_t block = a.slots[token] / a.block_size, offset = a.slots[token] % a.block_size, lane = offset % kSubBlock;
    const int64_t sub_block = sub_block_elements(head_dim, sizeof(T)), head_stride = a.block_size / kSubBlock * sub_block;
    const int64_t first = block * a.num_kv_heads * head_stride + offset / kSubBlock * sub_block;
    T* keys = static_cast<T*>(a.key_cache) + first;
    T* values = static_cast<T*>(a.value_cache) + first;
    const auto scale = [&](T* chunk) { return reinterpret_cast<float*>(chunk + kSubBlock * head_dim) + lane; };
    for (int64_t head = 0; head < a.num_kv_heads; ++head, keys += head_stride) {
        turn(a.k_norm, turned);
        put(turned, head_dim, keys + lane, kSubBlock, scale(keys));
    }
    for (int64_t head = 0; head < a.num_kv_heads; ++head, values += head_stride, x += head_dim)
        put(x, head_dim, values + lane * head_dim, 1, scale(values));
}

}  // namespace

void rms_norm(const float* x, int64_t rows, int64_t width, const void* weight, DType dtype, float eps, float* out) {
    over_rows(rows, width, 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) normalise(x + row * width, weight, dtype, width, eps, out + row * width);
    });
}

void silu_mul(const float* x, int64_t rows, int64_t width, float* out) {
    over_rows(rows, width, 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* gate = x + row * 2 * width;
            const float* up = gate + width;
            float* y = out + row * width;
            int64_t c = 0;
            for (; c + kLanes <= width; c += kLanes) store(y + c, mul(silu(load(gate + c)), load(up + c)));
            if (c < width) {
                const int n = static_cast<int>(width - c);
                store(y + c, mul(silu(load(gate + c, n)), load(up + c, n)), n);
            }
        }
    });
}

void rope_append(const RopeArgs& args) {
    // Whole sub-blocks of a prompt to a thread, as the keys of 16 tokens share cache lines.
    over_rows(args.tokens, (args.num_heads + 2 * args.num_kv_heads) * args.head_dim, kSubBlock, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            if (args.cache_dtype == kF32) {
                rope_token<float>(args, token);
            } else if (args.cache_dtype == kBF16) {
                rope_token<BF16>(args, token);
            } else {
                rope_token<int8_t>(args, token);
            }
        }
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
