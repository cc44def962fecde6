// Paged attention as a call over plain addresses. Checked and planned in bind_attention.cpp, computed by the kernels of isa/attention.cpp.
#pragma once

#include "kernels.h"

namespace engine {

// The ragged batch: which query rows and tokens each sequence has, and which end in a tree of drafts.
struct AttentionBatch {
    const int32_t* query_start;  // [sequences + 1]
    const int32_t* context_len;  // [sequences]
    const int32_t* tree_start;   // [sequences], or null with ancestors: no trees
    const uint64_t* ancestors;   // [tokens]
    int64_t tokens, sequences;

    // Sequence s; whole, as one tile.
    AttentionItem sequence(int64_t s, int64_t group) const {
        AttentionItem item{};
        item.sequence = s;
        item.first_token = query_start[s];
        item.queries = int64_t{query_start[s + 1]} - query_start[s];
        item.context = context_len[s];
        if (tree_start != nullptr && tree_start[s] != -1) {
            item.ancestors = ancestors + item.first_token;
            item.tree_start = tree_start[s];
        }
        item.row_end = item.queries * group;
        item.partial_offset = -1;
        return item;
    }
};

// The values inside the tensors: every block that will be read must exist. ValueError if one does not.
void check_attention(const AttentionArgs& args, const AttentionBatch& batch, int64_t num_blocks);

// All rows of a checked batch. `args` lacks nothing but `partials`.
void paged_attention(AttentionArgs args, const AttentionBatch& batch);

}  // namespace engine
