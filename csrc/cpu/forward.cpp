#include "forward.h"

#include <algorithm>
#include <cstring>

#include "bind.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace engine {
namespace {

// Activations of a step, float32 [rows, width] each, in memory that the calling thread keeps.
struct Activations {
    float* x;         // hidden size: the residual stream
    float* normed;    // hidden size
    float* wide;      // qkv, then gate and up
    float* narrow;    // queries, then SwiGLU's result
    float* attended;  // num_heads * head_dim

    Activations(const Model& m, int64_t rows) {
        const LayerWeights& layer = m.layers[0];
        const int64_t hidden = m.embedding.k;
        const int64_t widths[] = {hidden, hidden, std::max(layer.qkv.n, layer.gate_up.n), std::max(layer.out.k, layer.down.k), layer.out.k};
        float** parts[] = {&x, &normed, &wide, &narrow, &attended};
        constexpr int64_t kLine = 16;  // floats of a cache line
        int64_t floats = 0;
        for (const int64_t width : widths) floats += (rows * width + kLine - 1) / kLine * kLine;
        float* at = static_cast<float*>(scratch(kStepScratch, floats * static_cast<int64_t>(sizeof(float))));
        for (int i = 0; i < 5; ++i) {
            *parts[i] = at;
            at += (rows * widths[i] + kLine - 1) / kLine * kLine;
        }
    }
};

void rms_norm(const Model& m, const float* x, int64_t rows, const NormWeight& norm, float* out) {
    active().rms_norm(x, rows, m.embedding.k, norm.weight, norm.dtype, m.norm_eps, out);
}

void linear(const float* x, int64_t rows, const ProductWeights& weights, const float* residual, float* out, bool swiglu = false) {
    LinearArgs args = {};
    args.x = x;
    args.x_stride = weights.k;
    args.m = rows;
    args.k = weights.k;
    args.segments = weights.segments.data();
    args.num_segments = static_cast<int>(weights.segments.size());
    args.format = weights.format;
    args.residual = residual;
    args.out = out;
    args.swiglu = swiglu;
    engine::linear(args);
}

void rope_append(const Model& m, const LayerWeights& layer, const Cache& cache, size_t i, const Step& step, const float* qkv, float* q) {
    RopeArgs args = {};
    args.qkv = qkv;
    args.positions = step.positions;
    args.slots = step.slots;
    args.cos = m.cos;
    args.sin = m.sin;
    args.key_cache = cache.layers[i].keys;
    args.value_cache = cache.layers[i].values;
    args.q_norm = layer.q_norm.weight;
    args.k_norm = layer.k_norm.weight;
    args.out = q;
    args.cache_dtype = cache.dtype;
    args.norm_dtype = layer.q_norm.dtype;
    args.tokens = step.batch.tokens;
    args.num_heads = m.num_heads;
    args.num_kv_heads = m.num_kv_heads;
    args.head_dim = m.head_dim;
    args.half = m.half;
    args.block_size = cache.block_size;
    args.norm_eps = m.norm_eps;
    args.interleaved = m.interleaved;
    active().rope_append(args);
}

AttentionArgs attention_args(const Model& m, int64_t window, const Cache& cache, size_t i, const Step& step) {
    AttentionArgs args = {};
    args.key_cache = cache.layers[i].keys;
    args.value_cache = cache.layers[i].values;
    args.block_table = step.block_table;
    args.dtype = cache.dtype;
    args.max_blocks = step.max_blocks;
    args.num_heads = m.num_heads;
    args.num_kv_heads = m.num_kv_heads;
    args.head_dim = m.head_dim;
    args.block_size = cache.block_size;
    args.window = window;
    args.scale = m.attention_scale;
    return args;
}

void gather(const float* x, const int64_t* rows, int64_t count, int64_t width, float* out) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * width, x + rows[i] * width, static_cast<size_t>(width) * sizeof(float));
}

bool are_all(const int64_t* rows, int64_t count, int64_t tokens) {
    if (count != tokens) return false;
    for (int64_t i = 0; i < count; ++i)
        if (rows[i] != i) return false;
    return true;
}

void check(const Model& m, const Cache& cache, const Step& step) {
    const int64_t tokens = step.batch.tokens;
    check_range("tokens", step.tokens, tokens, 0, m.embedding.n);
    check_range("positions", step.positions, tokens, 0, m.max_position);
    check_range("slots", step.slots, tokens, -1, cache.num_blocks * cache.block_size);
    check_range("logit_rows", step.logit_rows, step.num_rows, 0, tokens);
    int64_t widest = m.layers[0].window;
    for (const LayerWeights& layer : m.layers) widest = widest == 0 || layer.window == 0 ? 0 : std::max(widest, layer.window);
    check_attention(attention_args(m, widest, cache, 0, step), step.batch, cache.num_blocks);
}

// All layers; afterwards x holds the residual stream of all tokens, or of logit_rows alone.
Activations run_layers(const Model& m, const Cache& cache, const Step& step, bool all) {
    int64_t rows = step.batch.tokens;
    Activations a(m, std::max(rows, step.num_rows));
    active().embed(step.tokens, rows, m.embedding.segments[0], m.embedding.format, m.embedding.k, a.x);
    for (size_t i = 0; i < m.layers.size(); ++i) {
        const LayerWeights& layer = m.layers[i];
        rms_norm(m, a.x, rows, layer.attention_norm, a.normed);
        linear(a.normed, rows, layer.qkv, nullptr, a.wide);
        rope_append(m, layer, cache, i, step, a.wide, a.narrow);
        const bool last = i + 1 == m.layers.size();
        if (last && !all && step.num_rows == 0) break;  // the cache has all it gets
        AttentionArgs attention = attention_args(m, layer.window, cache, i, step);
        attention.q = a.narrow;
        attention.out = a.attended;
        paged_attention(attention, step.batch);
        if (last && !all) {  // nobody sees the other rows any more
            gather(a.x, step.logit_rows, step.num_rows, m.embedding.k, a.normed);
            gather(a.attended, step.logit_rows, step.num_rows, layer.out.k, a.narrow);
            std::swap(a.x, a.normed);
            a.attended = a.narrow;
            rows = step.num_rows;
        }
        linear(a.attended, rows, layer.out, a.x, a.x);
        rms_norm(m, a.x, rows, layer.ffn_norm, a.normed);
        const auto& gate_up = layer.gate_up.segments;
        if (fuses_swiglu(gate_up.data(), static_cast<int>(gate_up.size()), layer.gate_up.format)) {
            linear(a.normed, rows, layer.gate_up, nullptr, a.narrow, true);
        } else {
            linear(a.normed, rows, layer.gate_up, nullptr, a.wide);
            active().silu_mul(a.wide, rows, layer.down.k, a.narrow);
        }
        linear(a.narrow, rows, layer.down, a.x, a.x);
    }
    return a;
}

}  // namespace

void logits(const Model& m, const Cache& cache, const Step& step, float* out) {
    check(m, cache, step);
    const Activations a = run_layers(m, cache, step, are_all(step.logit_rows, step.num_rows, step.batch.tokens));
    rms_norm(m, a.x, step.num_rows, m.final_norm, a.normed);
    linear(a.normed, step.num_rows, m.head, nullptr, out);
}

}  // namespace engine
