"""The tensors of one step, as one frozen value: what the runner hands to a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """T query tokens of S sequences, flattened in sequence order.

    Sequence s owns tokens ``query_start[s]:query_start[s+1]``, the last of its ``context_len[s]`` tokens so far.
    """

    tokens: Tensor  # int32 [T]
    positions: Tensor  # int32 [T], absolute position of each token in its sequence
    slots: Tensor  # int32 [T], cache slot (block * block_size + offset) where the token's key and value go
    query_start: Tensor  # int32 [S + 1]
    context_len: Tensor  # int32 [S], tokens in the cache after this step
    block_table: Tensor  # int32 [S, max_blocks]
    logit_rows: Tensor  # int64 [R], which of the T tokens need a row of logits
    tree_start: Tensor | None = None  # int32 [S] and int64 [T] of kernels.paged_attention, where a sequence ends in a tree of drafts
    ancestors: Tensor | None = None
