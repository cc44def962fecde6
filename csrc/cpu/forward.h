// The forward of a decoder-only transformer over a paged cache as one call: engine/models/transformer.py op by op, with the same kernels in
// the same order, so the same bits, without Python between them. The words are that file's and kernels/api.py's.
#pragma once

#include <vector>

#include "attention_call.h"
#include "kernels.h"

namespace engine {

struct NormWeight {
    const void* weight = nullptr;  // of dtype; null: there is no such norm
    DType dtype = kF32;
};

// The weights of one product, and so its sizes.
struct ProductWeights {
    std::vector<LinearSegment> segments;
    WeightFormat format = kRowsF32;
    int64_t k = 0, n = 0;  // n: outputs of all segments together
};

struct LayerWeights {
    NormWeight attention_norm, q_norm, k_norm, ffn_norm;
    ProductWeights qkv, out, gate_up, down;
    int64_t window = 0;
};

struct Model {
    ProductWeights embedding, head;  // one segment each
    NormWeight final_norm;
    std::vector<LayerWeights> layers;
    const float* cos = nullptr;  // [max_position, half]
    const float* sin = nullptr;
    int64_t max_position = 0, half = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
    float norm_eps = 0, attention_scale = 0;
    bool interleaved = false;
};

struct LayerCache {
    void* keys;
    void* values;
};

struct Cache {
    std::vector<LayerCache> layers;
    DType dtype = kF32;
    int64_t num_blocks = 0, block_size = 0;
};

// The tensors of engine/models/batch.py.
struct Step {
    const int32_t* tokens;
    const int32_t* positions;
    const int32_t* slots;
    AttentionBatch batch;
    const int32_t* block_table;  // [batch.sequences, max_blocks]
    int64_t max_blocks;
    const int64_t* logit_rows;
    int64_t num_rows;
};

// Run the tokens of a step, write their keys and values into the cache, and run the LM head on logit_rows: float32 [num_rows, vocabulary].
// What those do not need is computed as far as the cache needs it. Before anything is computed, ValueError is thrown where a token,
// position, slot, block or row is out of range or a tree is malformed.
void logits(const Model& model, const Cache& cache, const Step& step, float* out);

}  // namespace engine
