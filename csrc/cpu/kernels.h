// The kernels of one instruction set as a table of plain C functions. Each file under isa/ is compiled once per instruction set into
// namespace engine::<isa>; dispatch.cpp picks a table at run time.
#pragma once

#include <cstdint>

namespace engine {

enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3 };  // the same numbers as in kernels/cpu.py; kI8 only of a cache

constexpr int32_t kOk = 0, kNan = 1, kNothingAllowed = 2;  // STATUS_* of kernels/api.py

// ---- linear (isa/linear.cpp for rows, isa/linear_panels.cpp, isa/linear_int.cpp) ----
// How the weights of a product lie in memory: rows [n, k] in their owner's storage, or panels (kernels/packed.py has their order). The
// numbers are those of kernels/cpu.py.
enum WeightFormat : int {
    kRowsF32 = 0,
    kRowsBF16 = 1,
    kRowsF16 = 2,
    kPanelsF32 = 3,
    kPanelsBF16 = 4,
    kPanelsF16 = 5,
    kPanelsInt8 = 6,
    kPanelsInt4 = 7,
};
constexpr int64_t kPanel = 32;             // outputs per panel
constexpr int64_t kActivationGroup = 128;  // elements of a row of x that share a scale, beside int8 and int4 weights
constexpr int64_t kInt4Group = 32;         // elements along K of int4 weights that share a scale
constexpr int64_t kInt4GroupBytes = 576;   // of a panel: 512 of nibbles, 32 float16 scales
struct LinearSegment {
    const void* weight;  // [n, k] of LinearArgs::format
    const float* scale;  // [panels * kPanel], kPanelsInt8 only
    const void* bias;    // [n] of bias_dtype, or null
    int64_t n;
    DType bias_dtype;
};
struct LinearArgs {
    const float* x;  // [m, k], rows x_stride floats apart
    int64_t x_stride, m, k;
    const LinearSegment* segments;
    int num_segments;
    WeightFormat format;
    const float* residual;  // [m, sum n] contiguous, or null; may be `out`
    float* out;             // [m, sum n] contiguous
    // Instead of its outputs, which are a gate and as many more, out gets silu(gate) * those: [m, sum n / 2]. Without residual, and only
    // where `fuses_swiglu`.
    bool swiglu;
};
// Whether panels of the gate and of what it gates lie apart.
inline bool fuses_swiglu(const LinearSegment* segments, int num_segments, WeightFormat format) {
    if (format < kPanelsF32) return false;
    return num_segments == 2 ? segments[0].n == segments[1].n : num_segments == 1 && segments[0].n % (2 * kPanel) == 0;
}

// ---- attention (isa/attention.cpp; planned in bind_attention.cpp) ----
constexpr int kSubBlock = 16;          // tokens that lie side by side in the key cache
constexpr int kAttentionSplit = 512;   // tokens whose softmax is taken on its own; a multiple of kSubBlock
constexpr int kAttentionMaxRows = 64;  // of a work item
constexpr int kMaxTreeTokens = 64;     // as many as a row of `ancestors` has bits
// Elements of the cache that a sub-block takes, be it of keys [head_dim][16] or of values [16][head_dim]; those of int8 are followed by the
// scales of the 16 tokens.
inline __attribute__((always_inline)) int64_t sub_block_elements(int64_t head_dim, int64_t element_size) {
    return kSubBlock * (head_dim + (element_size == 1 ? int64_t{sizeof(float)} : 0));
}
struct AttentionArgs {
    const float* q;           // [T, num_heads, head_dim]
    const void* key_cache;    // sub-blocks [num_blocks, num_kv_heads, block_size / 16] of dtype
    const void* value_cache;  // likewise
    const int32_t* block_table;
    float* out;       // [T, num_heads, head_dim]
    float* partials;  // scratch for tiles whose splits are several items
    DType dtype;
    int64_t max_blocks, num_heads, num_kv_heads, head_dim, block_size, window;
    float scale;
};
// Some rows of one sequence and KV head over some splits. Row r is query r / group, head kv_head * group + r % group.
struct AttentionItem {
    int64_t sequence, kv_head;
    int64_t first_token, queries, context;  // the sequence's query tokens are rows first_token.. of q, the last of `context` tokens
    const uint64_t* ancestors;              // of each query token, when the tokens from tree_start on are a tree; null: causal
    int64_t tree_start;
    int64_t row_begin, row_end;  // at most kAttentionMaxRows rows
    int64_t split_begin, split_end;
    // -1: finish the rows. Else where in AttentionArgs::partials this tile's splits are left for attention_merge:
    // [split - partial_split][row - row_begin][head_dim + 2], each a weighted sum of values, its maximum score and its weight.
    int64_t partial_offset, partial_split;
};
// The positions [begin, end) that a row sees. From tree_start on they are not those of the cache: they count the nodes of the row's path.
struct AttentionRange {
    int64_t begin, end;
};
inline __attribute__((always_inline)) AttentionRange attention_range(const AttentionItem& item, int64_t group, int64_t window,
                                                                     int64_t row) {
    const int64_t query = row / group;
    const int64_t end =
        item.ancestors == nullptr ? item.context - item.queries + query + 1 : item.tree_start + __builtin_popcountll(item.ancestors[query]);
    return {window > 0 && end > window ? end - window : 0, end};
}

// ---- sample (isa/sample.cpp; the names are those of kernels/api.py) ----
// Entries start[r] .. start[r + 1] - 1 belong to row r.
struct RaggedTokens {
    const int32_t* token;
    const int32_t* start;  // [rows + 1]; null: the call has no such list
    int64_t size;          // of token
};
// Penalties, bias, end tokens and mask of a call.
struct TokenLists {
    RaggedTokens penalised;
    const int32_t* count;     // beside penalised.token
    const float* repetition;  // [rows]
    const float* presence;
    const float* frequency;
    RaggedTokens biased;
    const float* bias;  // beside biased.token
    RaggedTokens ends;
    const int32_t* min_position;  // [rows]
    const uint32_t* allowed;      // [rows, ceil(vocab / 32)], or null
};
// Of masses too, which has no seed and stream, and of the results only the status.
struct SampleArgs {
    const void* logits;  // [rows, vocab] of dtype, rows row_stride elements apart
    DType dtype;
    int64_t row_stride, rows, vocab;
    const float* temperature;  // this and the following: one entry per row
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seed;
    const int32_t* position;
    const int32_t* stream;
    TokenLists lists;
    int64_t* tokens;
    int32_t* status;
    float* logprobs;            // null: no log-probabilities at all
    float* processed_logprobs;  // [rows]
    int64_t top;                // entries per row of the following four
    int64_t* top_tokens;
    float* top_logprobs;
    int64_t* processed_top_tokens;
    float* processed_top_logprobs;
};

// ---- verify_block (isa/verify.cpp; likewise) ----
struct VerifyBlockArgs {
    const int64_t* target;  // [rows, vocab]
    const int32_t* status;  // [rows]
    const int64_t* proposal;
    const int32_t* draft;  // [rows], within [0, vocab) where they are looked at
    const int32_t* start;  // [sequences + 1]
    int64_t rows, sequences, vocab;
    const int64_t* seed;  // [sequences]
    const int32_t* position;
    const int32_t* stream;
    int32_t* num_accepted;  // [sequences]
    int32_t* path;          // [rows]
    int64_t* tokens;        // [sequences]
    int32_t* outcome;       // [sequences]: status of the result
};

// ---- beam_select (isa/beam.cpp; likewise) ----
struct BeamArgs {
    const void* logits;  // as in SampleArgs
    DType dtype;
    int64_t row_stride, rows, vocab, groups, candidates;
    const float* scores;         // [rows]
    const int32_t* group_start;  // [groups + 1]
    const float* temperature;    // [rows]
    const int32_t* top_k;        // [rows]
    const int32_t* position;     // [rows]
    const int64_t* seed;         // [rows], or null: no noise
    const int32_t* stream;       // [rows], or null with seed
    TokenLists lists;
    float* best;       // [groups, candidates]
    int64_t* tokens;   // likewise
    int32_t* parents;  // likewise
    float* logprobs;   // likewise
    int32_t* status;   // [rows]
};

// ---- elementwise (isa/elementwise.cpp) ----
struct RopeArgs {
    const float* qkv;  // [tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    const int32_t* positions;
    const int32_t* slots;
    const float* cos;  // [max_position, half]
    const float* sin;
    void* key_cache;  // as in AttentionArgs
    void* value_cache;
    const void* q_norm;  // [head_dim] of norm_dtype, or null with k_norm
    const void* k_norm;
    float* out;  // [tokens, num_heads, head_dim]
    DType cache_dtype, norm_dtype;
    int64_t tokens, num_heads, num_kv_heads, head_dim, half, block_size;
    float norm_eps;
    bool interleaved;
};

struct Kernels {
    // ---- linear ----
    void (*linear_rows)(const LinearArgs& args);    // formats kRows*
    void (*linear_panels)(const LinearArgs& args);  // kPanelsF32 to kPanelsF16
    void (*linear_int)(const LinearArgs& args);     // kPanelsInt8, kPanelsInt4
    // Rows `tokens` of a matrix of k columns as float32 [count, k].
    void (*embed)(const int32_t* tokens, int64_t count, const LinearSegment& table, WeightFormat format, int64_t k, float* out);

    // ---- attention ----
    void (*attention_item)(const AttentionArgs& args, const AttentionItem& item);
    void (*attention_merge)(const AttentionArgs& args, const AttentionItem& item);  // finish the rows from the partials of all their splits

    // ---- elementwise ----
    void (*rms_norm)(const float* x, int64_t rows, int64_t width, const void* weight, DType dtype, float eps, float* out);
    void (*silu_mul)(const float* x, int64_t rows, int64_t width, float* out);  // width: of out, half of x's
    void (*rope_append)(const RopeArgs& args);

    // ---- limits ----
    float (*read_floats)(const float* data, int64_t count);
    int64_t (*multiply_adds)(int64_t tasks, int64_t rounds);

    // ---- sample, beam_select, verify_block ----
    void (*sample)(const SampleArgs& args);
    void (*beam_select)(const BeamArgs& args);
    void (*masses)(const SampleArgs& args, int64_t* masses);  // [rows, vocab]
    void (*verify_block)(const VerifyBlockArgs& args);
    // The words of a row's tokens and, where a word is below kTailWords, their tails (else 0).
    void (*noise_of_row)(int64_t seed, int32_t position, int32_t stream, int64_t vocab, uint32_t* words, uint32_t* lows);
    // E and log(E) of n words.
    void (*noise_of_words)(const uint32_t* words, const uint32_t* lows, int64_t n, float* exponential, float* log_exponential);
    // floor(exp(d) * 2^40) of n values d <= 0.
    void (*weights_of_values)(const float* values, int64_t n, int64_t* weights);
};

namespace portable {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512vnni {
void linear_int(const LinearArgs& args);
}
namespace avx512bf16 {
void linear_panels(const LinearArgs& args);
}
#endif

}  // namespace engine
