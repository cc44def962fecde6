// ForwardModel: a model described once, then run step by step. ForwardCache, ForwardStep: what it runs over, described likewise. Shapes and
// dtypes are checked in kernels/forward.py, which also keeps the tensors alive.
#include <pybind11/stl.h>

#include "bind.h"
#include "forward.h"

namespace engine {
namespace {

NormWeight norm_of(const py::handle& described) {  // (address, dtype)
    const auto [weight, dtype] = described.cast<std::pair<uintptr_t, int>>();
    return {as<const void>(weight), static_cast<DType>(dtype)};
}

ProductWeights product_of(const py::handle& described) {  // (segments as of linear, format, k)
    const auto [segments, format, k] = described.cast<std::tuple<py::tuple, int, int64_t>>();
    ProductWeights product;
    product.format = static_cast<WeightFormat>(format);
    product.k = k;
    for (size_t i = 0; i < segments.size() / kSegmentFields; ++i) {
        product.segments.push_back(segment_of(segments, i));
        product.n += product.segments.back().n;
    }
    return product;
}

// (attention_norm, qkv, q_norm, k_norm, out, ffn_norm, gate_up, down, window)
LayerWeights layer_of(const py::handle& described) {
    const auto parts = described.cast<py::tuple>();
    LayerWeights layer;
    layer.attention_norm = norm_of(parts[0]);
    layer.qkv = product_of(parts[1]);
    layer.q_norm = norm_of(parts[2]);
    layer.k_norm = norm_of(parts[3]);
    layer.out = product_of(parts[4]);
    layer.ffn_norm = norm_of(parts[5]);
    layer.gate_up = product_of(parts[6]);
    layer.down = product_of(parts[7]);
    layer.window = parts[8].cast<int64_t>();
    return layer;
}

Model model_of(const py::tuple& embedding, const py::list& layers, const py::tuple& final_norm, const py::tuple& head, uintptr_t cos,
               uintptr_t sin, int64_t max_position, int64_t half, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float norm_eps,
               float attention_scale, bool interleaved) {
    Model m;
    m.embedding = product_of(embedding);
    for (const py::handle& layer : layers) m.layers.push_back(layer_of(layer));
    m.final_norm = norm_of(final_norm);
    m.head = product_of(head);
    m.cos = as<const float>(cos);
    m.sin = as<const float>(sin);
    m.max_position = max_position;
    m.half = half;
    m.num_heads = num_heads;
    m.num_kv_heads = num_kv_heads;
    m.head_dim = head_dim;
    m.norm_eps = norm_eps;
    m.attention_scale = attention_scale;
    m.interleaved = interleaved;
    return m;
}

Cache cache_of(const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values, int dtype, int64_t num_blocks,
               int64_t block_size) {
    Cache cache;
    for (size_t i = 0; i < keys.size(); ++i) cache.layers.push_back({as<void>(keys[i]), as<void>(values[i])});
    cache.dtype = static_cast<DType>(dtype);
    cache.num_blocks = num_blocks;
    cache.block_size = block_size;
    return cache;
}

// The addresses of StepBatch's tensors (tree_start and ancestors 0 where there are none), then the sizes T, S, max_blocks and R.
Step step_of(uintptr_t tokens, uintptr_t positions, uintptr_t slots, uintptr_t query_start, uintptr_t context_len, uintptr_t block_table,
             uintptr_t logit_rows, uintptr_t tree_start, uintptr_t ancestors, int64_t count, int64_t sequences, int64_t max_blocks,
             int64_t num_rows) {
    Step step = {};
    step.tokens = as<const int32_t>(tokens);
    step.positions = as<const int32_t>(positions);
    step.slots = as<const int32_t>(slots);
    step.batch.query_start = as<const int32_t>(query_start);
    step.batch.context_len = as<const int32_t>(context_len);
    step.batch.tree_start = as<const int32_t>(tree_start);
    step.batch.ancestors = as<const uint64_t>(ancestors);
    step.batch.tokens = count;
    step.batch.sequences = sequences;
    step.block_table = as<const int32_t>(block_table);
    step.max_blocks = max_blocks;
    step.logit_rows = as<const int64_t>(logit_rows);
    step.num_rows = num_rows;
    return step;
}

void logits_of(const Model& model, const Cache& cache, const Step& step, uintptr_t out) {
    const Computing computing;
    logits(model, cache, step, as<float>(out));
}

}  // namespace

void bind_forward(py::module_& m) {
    py::class_<Cache>(m, "ForwardCache").def(py::init(&cache_of));
    py::class_<Step>(m, "ForwardStep").def(py::init(&step_of));
    py::class_<Model>(m, "ForwardModel")
        .def(py::init(&model_of), py::kw_only(), py::arg("embedding"), py::arg("layers"), py::arg("final_norm"), py::arg("head"),
             py::arg("cos"), py::arg("sin"), py::arg("max_position"), py::arg("half"), py::arg("num_heads"), py::arg("num_kv_heads"),
             py::arg("head_dim"), py::arg("norm_eps"), py::arg("attention_scale"), py::arg("interleaved"))
        .def("logits", &logits_of);
}

}  // namespace engine
