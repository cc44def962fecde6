#include <string>

#include "bind.h"
#include "thread_pool.h"

namespace engine {
namespace {

void rms_norm(uintptr_t x, int64_t rows, int64_t width, uintptr_t weight, int dtype, float eps, uintptr_t out) {
    const Computing computing;
    active().rms_norm(as<const float>(x), rows, width, as<const void>(weight), static_cast<DType>(dtype), eps, as<float>(out));
}

void silu_mul(uintptr_t x, int64_t rows, int64_t width, uintptr_t out) {
    const Computing computing;
    active().silu_mul(as<const float>(x), rows, width, as<float>(out));
}

void rope_append(uintptr_t qkv, uintptr_t positions, uintptr_t slots, uintptr_t cos, uintptr_t sin, uintptr_t key_cache,
                 uintptr_t value_cache, uintptr_t q_norm, uintptr_t k_norm, uintptr_t out, int cache_dtype, int norm_dtype, int64_t tokens,
                 int64_t max_position, int64_t num_blocks, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t half,
                 int64_t block_size, float norm_eps, bool interleaved) {
    const Computing computing;
    RopeArgs args{};
    args.qkv = as<const float>(qkv);
    args.positions = as<const int32_t>(positions);
    args.slots = as<const int32_t>(slots);
    args.cos = as<const float>(cos);
    args.sin = as<const float>(sin);
    args.key_cache = as<void>(key_cache);
    args.value_cache = as<void>(value_cache);
    args.q_norm = as<const void>(q_norm);
    args.k_norm = as<const void>(k_norm);
    args.out = as<float>(out);
    args.cache_dtype = static_cast<DType>(cache_dtype);
    args.norm_dtype = static_cast<DType>(norm_dtype);
    args.tokens = tokens;
    args.num_heads = num_heads;
    args.num_kv_heads = num_kv_heads;
    args.head_dim = head_dim;
    args.half = half;
    args.block_size = block_size;
    args.norm_eps = norm_eps;
    args.interleaved = interleaved;
    check_range("positions", args.positions, tokens, 0, max_position);
    check_range("slots", args.slots, tokens, -1, num_blocks * block_size);
    active().rope_append(args);
}

// One token's elements of a cache, and its scales in an int8 one, gathered to or scattered from a row. Elements lie `step` apart.
template <class T>
void copy_token(T* chunk, int64_t lane, int64_t heads, int64_t head_dim, int64_t head_stride, int64_t step, T* row, bool gather) {
    const auto copy = [gather](T* cached, T* kept) { gather ? * kept = *cached : * cached = *kept; };
    for (int64_t h = 0; h < heads; ++h, chunk += head_stride) {
        T* cached = chunk + (step == 1 ? lane * head_dim : lane);
        for (int64_t d = 0; d < head_dim; ++d) copy(cached + d * step, row++);
        if constexpr (sizeof(T) == 1)
            for (int64_t i = 0; i < int64_t{sizeof(float)}; ++i)
                copy(chunk + kSubBlock * head_dim + lane * int64_t{sizeof(float)} + i, row++);
    }
}

// The bytes are those of the tokens, some kilobytes each; the accepted nodes of a tree are few, so one thread does it.
template <class T>
void move_tokens_of(T* keys, T* values, const int32_t* source, const int32_t* target, int64_t count, int64_t layers, int64_t num_blocks,
                    int64_t heads, int64_t block_size, int64_t head_dim) {
    const int64_t sub_block = sub_block_elements(head_dim, sizeof(T)), width = heads * sub_block / kSubBlock;
    const int64_t head_stride = block_size / kSubBlock * sub_block, layer_stride = num_blocks * heads * head_stride;
    T* rows = static_cast<T*>(scratch(kCallScratch, 2 * count * width * static_cast<int64_t>(sizeof(T))));
    for (int64_t layer = 0; layer < layers; ++layer, keys += layer_stride, values += layer_stride) {
        for (const bool gather : {true, false}) {
            for (int64_t i = 0; i < count; ++i) {
                const int64_t slot = gather ? source[i] : target[i], block = slot / block_size, offset = slot % block_size;
                const int64_t first = block * heads * head_stride + offset / kSubBlock * sub_block, lane = offset % kSubBlock;
                copy_token(keys + first, lane, heads, head_dim, head_stride, kSubBlock, rows + 2 * i * width, gather);
                copy_token(values + first, lane, heads, head_dim, head_stride, 1, rows + (2 * i + 1) * width, gather);
            }
        }
    }
}

void move_tokens(uintptr_t keys, uintptr_t values, int64_t element_size, uintptr_t source, uintptr_t target, int64_t count, int64_t layers,
                 int64_t num_blocks, int64_t num_kv_heads, int64_t block_size, int64_t head_dim) {
    const auto* from = as<const int32_t>(source);
    const auto* to = as<const int32_t>(target);
    check_range("source", from, count, 0, num_blocks * block_size);
    check_range("target", to, count, 0, num_blocks * block_size);
    const Computing computing;
    if (element_size == 1)
        move_tokens_of(as<uint8_t>(keys), as<uint8_t>(values), from, to, count, layers, num_blocks, num_kv_heads, block_size, head_dim);
    else if (element_size == 4)
        move_tokens_of(as<uint32_t>(keys), as<uint32_t>(values), from, to, count, layers, num_blocks, num_kv_heads, block_size, head_dim);
    else
        move_tokens_of(as<uint16_t>(keys), as<uint16_t>(values), from, to, count, layers, num_blocks, num_kv_heads, block_size, head_dim);
}

}  // namespace

void bind_elementwise(py::module_& m) {
    m.def("rms_norm", &rms_norm);
    m.def("silu_mul", &silu_mul);
    m.def("rope_append", &rope_append);
    m.def("move_tokens", &move_tokens);
}

}  // namespace engine
