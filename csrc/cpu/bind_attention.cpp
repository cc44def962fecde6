#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "attention_call.h"
#include "bind.h"
#include "thread_pool.h"

namespace engine {
namespace {

constexpr int64_t kPrefillRows = 48;          // of a tile when a sequence has more rows than fit one item
constexpr int64_t kItemsPerThread = 4;        // items are cut until the largest is about this fraction of a thread's share
constexpr int64_t kFixedRows = 4;             // reading a token costs about as much as this many rows
constexpr int64_t kInlineWork = 64 * 1024;    // row-elements below which waking threads costs more than it saves
constexpr int64_t kInlineMerge = 256 * 1024;  // partial elements, likewise

[[noreturn]] void bad(const std::string& message) { throw py::value_error(message); }

std::string entry(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

void check_tree(const AttentionItem& item) {
    const int64_t lowest = std::max<int64_t>(0, item.context - kMaxTreeTokens), first_query = item.context - item.queries;
    if (item.tree_start < lowest || item.tree_start > first_query)
        bad(entry("tree_start", item.sequence) + " must be -1 or in [" + std::to_string(lowest) + ", " + std::to_string(first_query) +
            "] (a tree has at most " + std::to_string(kMaxTreeTokens) + " tokens, all queries among them), got " +
            std::to_string(item.tree_start));
    for (int64_t i = 0; i < item.queries; ++i) {
        const int64_t node = first_query + i - item.tree_start;
        const uint64_t bits = item.ancestors[i];
        if (bits >> node != 1) {
            char hex[24];
            std::snprintf(hex, sizeof hex, "0x%llx", static_cast<unsigned long long>(bits));
            bad(entry("ancestors", item.first_token + i) + " must have its own bit " + std::to_string(node) + " as its highest, got " +
                hex);
        }
        if (i > 0 && __builtin_popcountll(bits) < __builtin_popcountll(item.ancestors[i - 1]))
            bad(entry("ancestors", item.first_token + i) + " must be at least as deep as the row before it, got " +
                std::to_string(__builtin_popcountll(bits)) + " nodes after " + std::to_string(__builtin_popcountll(item.ancestors[i - 1])));
    }
}

}  // namespace

void check_attention(const AttentionArgs& a, const AttentionBatch& batch, int64_t num_blocks) {
    const int32_t* query_start = batch.query_start;
    const int64_t tokens = batch.tokens, sequences = batch.sequences, group = a.num_heads / a.num_kv_heads;
    if (query_start[0] != 0 || query_start[sequences] != tokens)
        bad("query_start must run from 0 to the " + std::to_string(tokens) + " rows of q, got " + std::to_string(query_start[0]) + " to " +
            std::to_string(query_start[sequences]));
    for (int64_t s = 0; s < sequences; ++s)
        if (query_start[s + 1] < query_start[s])
            bad("query_start must not decrease, got " + std::to_string(query_start[s]) + " then " + std::to_string(query_start[s + 1]) +
                " at sequence " + std::to_string(s));
    for (int64_t s = 0; s < sequences; ++s) {
        const AttentionItem item = batch.sequence(s, group);
        const int64_t queries = item.queries, context = item.context;
        if (context < queries || context > a.max_blocks * a.block_size)
            bad(entry("context_len", s) + " must be in [" + std::to_string(queries) + " queries, " +
                std::to_string(a.max_blocks * a.block_size) + " slots of block_table], got " + std::to_string(context));
        if (queries == 0) continue;
        const int32_t* table = a.block_table + s * a.max_blocks;
        if (item.ancestors != nullptr) check_tree(item);
        int64_t oldest = attention_range(item, group, a.window, 0).begin;
        if (item.ancestors != nullptr) oldest = std::min(oldest, item.tree_start);  // all nodes are read, also out of the window
        for (int64_t b = oldest / a.block_size; b < (context + a.block_size - 1) / a.block_size; ++b) {
            if (table[b] < 0 || table[b] >= num_blocks)
                bad("block_table[" + std::to_string(s) + ", " + std::to_string(b) + "] must be in [0, " + std::to_string(num_blocks) +
                    "), got " + std::to_string(table[b]));
        }
    }
}

namespace {

// The work items of one call; its memory is kept between calls.
struct Plan {
    std::vector<AttentionItem> items;   // run first
    std::vector<AttentionItem> merges;  // then these, one for each tile whose splits went to several items
    int64_t work = 0;                   // row-elements of all items
    int64_t partial_floats = 0;
};

int64_t tile_tokens(const AttentionItem& tile, int64_t group, int64_t window) {
    return attention_range(tile, group, window, tile.row_end - 1).end - attention_range(tile, group, window, tile.row_begin).begin;
}

void make_plan(const AttentionArgs& a, const AttentionBatch& batch, Plan* plan) {
    plan->items.clear();
    plan->merges.clear();
    plan->work = plan->partial_floats = 0;
    const int64_t group = a.num_heads / a.num_kv_heads;

    // Tiles: a few rows of a sequence, whole contexts. The last rows of a prompt see most, so they come first.
    static thread_local std::vector<AttentionItem> tiles;
    tiles.clear();
    int64_t cost = 0;
    for (int64_t s = 0; s < batch.sequences; ++s) {
        AttentionItem tile = batch.sequence(s, group);
        const int64_t rows = tile.row_end, height = rows <= kAttentionMaxRows ? rows : kPrefillRows;
        for (int64_t end = rows; end > 0;) {
            tile.row_begin = (end - 1) / height * height;
            tile.row_end = end;
            tile.split_begin = attention_range(tile, group, a.window, tile.row_begin).begin / kAttentionSplit;
            tile.split_end = (attention_range(tile, group, a.window, end - 1).end - 1) / kAttentionSplit + 1;
            const int64_t tokens = tile_tokens(tile, group, a.window), height_now = end - tile.row_begin;
            cost += tokens * (height_now + kFixedRows);
            plan->work += tokens * height_now * a.head_dim * a.num_kv_heads;
            end = tile.row_begin;
            tiles.push_back(tile);
        }
    }
    const int64_t share = cost * a.num_kv_heads / (num_threads() * kItemsPerThread);
    for (AttentionItem& tile : tiles) {
        const int64_t rows = tile.row_end - tile.row_begin, splits = tile.split_end - tile.split_begin;
        const int64_t chunk = std::max<int64_t>(1, share / (kAttentionSplit * (rows + kFixedRows)));
        const bool cut = plan->work > kInlineWork && chunk < splits;
        for (tile.kv_head = 0; tile.kv_head < a.num_kv_heads; ++tile.kv_head) {
            if (!cut) {
                plan->items.push_back(tile);
                continue;
            }
            AttentionItem part = tile;
            part.partial_split = tile.split_begin;
            part.partial_offset = plan->partial_floats;
            plan->merges.push_back(part);
            plan->partial_floats += splits * rows * (a.head_dim + 2);
            for (int64_t begin = tile.split_begin; begin < tile.split_end; begin += chunk) {
                part.split_begin = begin;
                part.split_end = std::min(begin + chunk, tile.split_end);
                plan->items.push_back(part);
            }
        }
    }
}

}  // namespace

void paged_attention(AttentionArgs args, const AttentionBatch& batch) {
    static thread_local Plan plan;
    Plan& mine = plan;  // the lambdas run on other threads, which have a `plan` of their own
    make_plan(args, batch, &mine);
    if (mine.partial_floats > 0)
        args.partials = static_cast<float*>(scratch(kCallScratch, mine.partial_floats * static_cast<int64_t>(sizeof(float))));
    const Kernels& kernels = active();
    const int64_t count = static_cast<int64_t>(mine.items.size()), merges = static_cast<int64_t>(mine.merges.size());
    parallel_for(count, mine.work <= kInlineWork ? count : 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.attention_item(args, mine.items[static_cast<size_t>(i)]);
    });
    parallel_for(merges, mine.partial_floats <= kInlineMerge ? merges : 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.attention_merge(args, mine.merges[static_cast<size_t>(i)]);
    });
}

namespace {

void bound_attention(uintptr_t q, uintptr_t key_cache, uintptr_t value_cache, int dtype, uintptr_t block_table, uintptr_t query_start,
                     uintptr_t context_len, uintptr_t tree_start, uintptr_t ancestors, uintptr_t out, int64_t tokens, int64_t sequences,
                     int64_t max_blocks, int64_t num_blocks, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                     float scale, int64_t window) {
    const Computing computing;
    AttentionArgs args{};
    args.q = as<const float>(q);
    args.key_cache = as<const void>(key_cache);
    args.value_cache = as<const void>(value_cache);
    args.block_table = as<const int32_t>(block_table);
    args.out = as<float>(out);
    args.dtype = static_cast<DType>(dtype);
    args.max_blocks = max_blocks;
    args.num_heads = num_heads;
    args.num_kv_heads = num_kv_heads;
    args.head_dim = head_dim;
    args.block_size = block_size;
    args.window = window;
    args.scale = scale;
    AttentionBatch batch{};
    batch.query_start = as<const int32_t>(query_start);
    batch.context_len = as<const int32_t>(context_len);
    batch.tree_start = as<const int32_t>(tree_start);
    batch.ancestors = as<const uint64_t>(ancestors);
    batch.tokens = tokens;
    batch.sequences = sequences;
    check_attention(args, batch, num_blocks);
    paged_attention(args, batch);
}

}  // namespace

void bind_attention(py::module_& m) { m.def("paged_attention", &bound_attention); }

}  // namespace engine
