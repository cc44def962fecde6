"""Every op of the engine: its signature and its contract, written once.

A backend is a module (``reference``, ``cpu``) with functions of exactly these names and signatures; ``registry`` chooses one per op.
The functions here check nothing themselves: each backend validates its own arguments and raises ``ValueError``/``TypeError``.

Words used throughout:

* ``T`` query tokens of one step, all sequences flattened; ``S`` sequences; ``R`` rows of logits; ``V`` vocabulary size.
* A *block* holds ``block_size`` (a multiple of 16) consecutive tokens of one sequence; a *slot* is ``block * block_size + offset``.
* ``key_cache [num_blocks, num_kv_heads, block_size // 16, head_dim, 16]``: within a sub-block of 16 tokens the tokens are contiguous,
  so that scores of 16 keys come from vector loads without horizontal sums.
* ``value_cache [num_blocks, num_kv_heads, block_size, head_dim]``.
* An int8 or float8_e4m3fn cache holds a token's keys (values) of a KV head as numbers of at most ``limit`` in size (127, and 448) times
  one float32 scale. Both caches are ``[num_blocks, num_kv_heads, block_size // 16, head_dim + 4, 16]``: after the ``16 * head_dim`` bytes
  of a sub-block, ordered as above, lie the 16 scales of its tokens, so that they come in the same stream. A scale is the largest
  magnitude / limit; the numbers are the elements / scale, within the limit, rounded to the nearest (ties to even). Where an element is not
  finite the scale is NaN; where it is NaN or 0 (also by underflow) the numbers are 0. float8_e4m3fn is for GPUs (compute capability 8.9
  and later) and for the oracle.
* *Activations* are float32; on a GPU (and for the oracle) they may also be bf16 or fp16. A result has its input's dtype unless its op says
  otherwise. What flows past the layers, the residual, is float32 everywhere.
* Row-invariance: every op computes a row of its result with the same operations in the same order whatever other rows are in the call
  and however many threads run it. Only the backend ``fast``, which ``select(deterministic=True)`` leaves out, does not promise it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packed import PackedWeight
from .quantized import QuantizedWeight
from .registry import default_ops

GREEDY_BELOW = 1e-5  # temperatures of ``sample`` below this are greedy

# What became of a row of logits.
STATUS_OK = 0
STATUS_NAN = 1  # a NaN somewhere in the row
STATUS_NOTHING_ALLOWED = 2  # every logit is -inf or forbidden
STATUS_BAD_PARAMETER = 3  # on a GPU, where values are not read before the launch: a parameter of the row is out of range


class Penalties(NamedTuple):
    """What ``sample`` holds against tokens that have occurred. Row r owns entries ``start[r]:start[r + 1]``, its distinct ids.

    ``repetition`` (CTRL, Keskar et al. 2019) divides positive and multiplies other logits of every listed id; ``frequency`` times its
    count, and ``presence``, are subtracted from the logits of those with a count above 0 (OpenAI's: occurrences in the output).
    """

    repetition: Tensor  # float32 [R], finite and > 0; 1 is off
    presence: Tensor  # float32 [R], at most 1e30 in size; 0 is off
    frequency: Tensor  # float32 [R], likewise
    token: Tensor  # int32 [N]
    counts: Tensor  # int32 [N], 0 to 2^24: how often the id occurs in the output; 0: only in the prompt
    start: Tensor  # int32 [R + 1]


class LogitBias(NamedTuple):
    """Added to the logits of single tokens. Row r owns entries ``start[r]:start[r + 1]``, distinct ids."""

    token: Tensor  # int32 [N]
    bias: Tensor  # float32 [N], at most 1e30 in size, or -inf: never drawn
    start: Tensor  # int32 [R + 1]


class EndTokens(NamedTuple):
    """Tokens that may not be drawn too early. Row r owns entries ``start[r]:start[r + 1]``."""

    token: Tensor  # int32 [N]
    min_position: Tensor  # int32 [R]: below this position they are never drawn
    start: Tensor  # int32 [R + 1]


class SampleResult(NamedTuple):
    """What ``sample`` returns, one entry per row of logits.

    The raw log-probabilities are those of the row as given; the processed ones are those the token was drawn from: after penalties, bias,
    masks, temperature and filters (a greedy row has neither temperature nor filters).
    """

    tokens: Tensor  # int64 [R]; -1 where status is not STATUS_OK
    status: Tensor  # int32 [R]; STATUS_*
    # With `logprobs` given, else None; natural logarithms.
    logprobs: Tensor | None = None  # float32 [R], raw, of the chosen token; NaN where there is none
    processed_logprobs: Tensor | None = None  # float32 [R]
    # With `logprobs` n >= 1, else None: the n most likely tokens of either distribution, best first, lowest id first on ties. Where fewer
    # are possible (all of them above -inf), the rest is -1 and -inf; likewise in a row without a token.
    top_tokens: Tensor | None = None  # int64 [R, n]
    top_logprobs: Tensor | None = None  # float32 [R, n]
    processed_top_tokens: Tensor | None = None  # int64 [R, n]
    processed_top_logprobs: Tensor | None = None  # float32 [R, n]


class HeadDraw(NamedTuple):
    """What ``sample_head`` returns: what one *shard*, a range of the vocabulary, says of each row. ``merge_draws`` makes the row of all.

    ``[2, R]``: for the raw logits, and for the processed ones, those divided by the temperature. ``mass`` beside ``largest`` instead of
    one logarithm of a sum: so logits of any size keep all their digits, and +inf, which share the probability, can be counted.
    """

    tokens: Tensor  # int64 [R]: the shard's token with the best score; -1 where status is not STATUS_OK
    status: Tensor  # int32 [R]; STATUS_*, of the shard alone
    scores: Tensor  # float32 [R]: logit / temperature - log(E), or the logit where greedy; -inf where there is no token
    logprobs: Tensor  # float32 [2, R]: of the token, were the shard the whole vocabulary; NaN where there is none
    largest: Tensor  # float32 [2, R]: the largest logit; -inf where there is no token
    mass: Tensor  # float32 [2, R]: the sum of exp(logit - largest), +inf counted as 1 each; 0 where there is no token


class BeamResult(NamedTuple):
    """What ``beam_select`` returns: the best continuations of each group, best first."""

    scores: Tensor  # float32 [G, C]: score of the beam plus `logprobs`; -inf where there are fewer continuations
    tokens: Tensor  # int64 [G, C]; -1 there
    parents: Tensor  # int32 [G, C]: the row of logits that is continued; -1 there
    logprobs: Tensor  # float32 [G, C]: of the token in its beam
    status: Tensor  # int32 [R]: STATUS_OK, or what makes a row contribute nothing (STATUS_NOTHING_ALLOWED also where its score is -inf)


class VerifyResult(NamedTuple):
    """What ``verify_drafts`` and ``verify_block`` return. A *node* is a row counted from the first of its sequence."""

    num_accepted: Tensor  # int32 [S]: drafted tokens kept
    path: Tensor  # int32 [R]: path[start[s] + d] is the node at depth d of what is kept (the root at 0), -1 past its end
    # Of `verify_block` only: the token that follows the last node of the path, or -1 where `status` is not STATUS_OK.
    tokens: Tensor | None = None  # int64 [S]
    status: Tensor | None = None  # int32 [S]


def embed(tokens: Tensor, table: Tensor | PackedWeight | QuantizedWeight) -> Tensor:
    """Rows of ``table [V, H]`` (fp32, bf16, fp16, or packed or quantised, dequantised) at ``tokens [T]`` (int32) as float32 ``[T, H]``.

    Token ids are the caller's promise (validated at admission); an id outside ``[0, V)`` raises ``ValueError``, on a GPU, where values are
    not read before the launch, it gives a row of NaN.
    """
    return default_ops("tokens", tokens).embed(tokens, table)


def linear(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight | QuantizedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``concat_i(x @ weights[i].T + biases[i]) + residual``, of the dtype of x; with ``residual`` float32; with ``out`` that of ``out``.

    ``x [M, K]`` activations, unit stride in K, any row stride. ``weights[i] [N_i, K]``, all of one kind: contiguous tensors of one dtype
    (fp32, bf16 or fp16), read in the model's own storage; or, of one format, ``PackedWeight`` (for a CPU) or ``QuantizedWeight`` (for a
    GPU). ``biases[i] [N_i]`` of the weights' dtype or fp32 (beside packed and quantised weights any of the three). ``residual`` and ``out``
    are ``[M, sum N_i]`` contiguous and float32 (without ``residual``, ``out`` may have the dtype of x too); ``out`` may be ``residual``.

    Floats accumulate in float32. Each output is a function of its own x row and weight row only (row-invariance): in rows, K is cut at
    fixed absolute places and lanes and partial sums are added in one fixed order; in panels, an output is one chain of fused multiply-adds
    over K, so that it does not depend on the width of the machine's vectors either (only the portable build, which has no such
    instruction, rounds twice). Beside panels of bf16, x is rounded to bf16 (to nearest even), and of two neighbours along K the second is
    added first: the arithmetic of x86's vdpbf16ps, which is used where the machine has it (and takes subnormal numbers for zeros).

    With packed int8 and int4 weights a row of x is quantised too, to int8 with one scale per group along K (``ACTIVATION_GROUP``: as
    LLM.int8 and its successors do per row, Dettmers et al. 2022); sums within a group are exact integers, groups are added in order in
    float32. The result is the same to the bit on every machine. A row with NaN or an infinity gives NaN throughout.

    Beside ``QuantizedWeight`` x stays as it is, and the weights take its dtype: the integers of int8 and the numbers of fp8 without any
    rounding (their scale multiplies the sum), of int4 their products with the scales, rounded.
    """
    return default_ops("x", x).linear(x, weights, biases, residual=residual, out=out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` per row (Zhang and Sennrich 2019), in float32, rounded to ``dtype``: an activation's.

    ``x [M, H]`` float32; ``weight [H]`` fp32, bf16 or fp16.
    """
    return default_ops("x", x).rms_norm(x, weight, eps, dtype)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    num_heads: int,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Rotate queries and keys, write keys and values into the cache, return the rotated queries ``[T, num_heads, D]``, rounded to the dtype
    of ``qkv``.

    ``qkv [T, (num_heads + 2 * num_kv_heads) * D]`` activations: queries, then keys, then values of each token. ``positions``, ``slots``:
    int32 ``[T]``. ``cos``, ``sin``: float32 ``[max_position, rot / 2]`` with ``rot <= D`` even; components past ``rot`` pass unrotated
    (RoPE, Su et al. 2021). ``interleaved`` pairs components (0,1),(2,3)...; otherwise (i, i + rot/2), each pair turned by table column i.
    ``q_norm`` and ``k_norm [D]`` (both or neither): RMS normalisation of each head before the rotation (Qwen3). Caches are fp32, bf16
    (round to nearest even), int8 or float8_e4m3fn. A slot of -1 writes nothing. Positions and slots out of range raise ``ValueError``, on
    a GPU, where values are not read before the launch, they neither turn nor write.
    """
    return default_ops("qkv", qkv).rope_append(
        qkv, positions, slots, cos, sin, key_cache, value_cache,
        num_heads=num_heads, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps,
    )  # fmt: skip


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    *,
    scale: float,
    window: int = 0,
    tree_start: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Causal attention of a ragged batch over the paged cache; ``[T, num_heads, D]``.

    ``q [T, num_heads, D]`` activations, contiguous, D a multiple of 8 in 8..256, num_heads a multiple of num_kv_heads. Sequence s owns
    query rows ``query_start[s]:query_start[s+1]`` (int32 ``[S+1]``, ``query_start[S] == T``), which are the last of its ``context_len[s]``
    (int32 ``[S]``) tokens, whose keys and values are already in the cache; its blocks are ``block_table[s, :]`` (int32 ``[S,
    max_blocks]``). Query row i attends keys ``0..p`` with ``p = context_len - num_queries + i``, or the last ``window`` of those if
    ``window > 0``. Cache slots no row may see are never read into a result, whatever they hold. Keys are walked in fixed absolute splits of
    512, merged in order (FlashDecoding, Dao et al. 2023), so decode, verification and chunked prefill give the same bits. Arithmetic is in
    float32, whatever the cache holds; on a GPU products are of operands in the dtype of q, with sums in float32.

    Trees of drafts (tree attention, Miao et al. 2024): ``tree_start`` int32 ``[S]`` and ``ancestors`` int64 ``[T]``, both or neither. A
    sequence with ``tree_start[s] >= 0`` ends in a tree: its tokens from there on, at most 64 and all of its query rows among them, are
    nodes in the order of their depth, each after its parent. Row t sees the tokens before ``tree_start[s]`` and the nodes j (counted from
    there) whose bit j is set in ``ancestors[t]``: its own, which is the highest, and those above it. It counts them as positions
    ``tree_start[s]``, ``tree_start[s] + 1``, ..., ``window`` included, and so gets the bits that its path would get as a sequence without
    the other nodes. A sequence with ``tree_start[s]`` -1 is causal as above, and its ``ancestors`` are not looked at.
    """
    return default_ops("q", q).paged_attention(
        q, key_cache, value_cache, block_table, query_start, context_len, scale=scale, window=window, tree_start=tree_start,
        ancestors=ancestors,
    )  # fmt: skip


def move_tokens(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy the keys and values of single tokens between slots, in all layers; all are read before any is written.

    ``key_cache [num_layers, num_blocks, num_kv_heads, block_size // 16, head_dim, 16]`` and ``value_cache [num_layers, num_blocks,
    num_kv_heads, block_size, head_dim]``, contiguous; with scales likewise the caches of all layers, whose scales move too. ``source``,
    ``target``: slots, int32 ``[N]``; the targets distinct. Slots out of range raise ``ValueError``; on a GPU, where values are not read
    before the launch, their entry moves nothing.
    """
    default_ops("key_cache", key_cache).move_tokens(key_cache, value_cache, source, target)


def copy_blocks(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks, in all layers; in no order, so that no block may be read that the same call writes.

    Caches as of ``move_tokens``. ``source``, ``target``: blocks, int32 ``[N]``; the targets distinct and none of them among the sources,
    else ``ValueError`` (on a GPU: the caller's promise). Blocks out of range raise ``ValueError``; on a GPU their entry copies nothing.
    """
    default_ops("key_cache", key_cache).copy_blocks(key_cache, value_cache, source, target)


def feed_tokens(tokens: Tensor, source: Tensor, drawn: Tensor) -> None:
    """In place ``tokens[i] = drawn[source[i]]`` where ``source[i] >= 0``: tokens go from the step that drew them to the next one.

    ``tokens``, ``source``: int32 ``[T]``; ``drawn``: int64 ``[R]``, as ``sample`` returns them. A source of -1 leaves its token; others
    outside ``[0, R)`` raise ``ValueError``; on a GPU, where values are not read before the launch, they leave it too.
    """
    default_ops("tokens", tokens).feed_tokens(tokens, source, drawn)


def silu_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :F]) * x[:, F:]`` for ``x [M, 2F]``, activations, contiguous; ``[M, F]``, in float32 rounded to the dtype of x (SwiGLU,
    Shazeer 2020)."""
    return default_ops("x", x).silu_mul(x)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    logprobs: int | None = None,
    workspace: Any = None,
) -> SampleResult:
    """One token per row of ``logits [R, V]`` (fp32, bf16 or fp16, V <= 2^22, unit stride in V, any row stride), by the token law.

    Per row (``[R]``, contiguous): ``temperature`` float32 (below 1e-5: greedy); ``top_k`` int32 (0 or less, or V and more: off); ``top_p``
    float32 in [0, 1] (1: off); ``min_p`` float32 in [0, 1] (0: off); ``seed`` int64 (the bits of a 64-bit key); ``position`` int32 (the
    absolute position of the token drawn); ``stream`` int32. ``allowed`` int32 ``[R, ceil(V / 32)]``: bit ``i & 31`` of word ``i >> 5``
    says whether token i may be drawn (the form that xgrammar and llguidance fill). ``logits`` is unchanged on return.

    The order, every step in float32 with each operation rounded by itself:

    1. penalties: ``x / repetition`` or ``x * repetition``, then ``- frequency * count``, then ``- presence``;
    2. ``+ bias``; early end tokens and tokens that are not ``allowed`` become -inf;
    3. ``z = x / temperature``;
    4. top-k keeps ``z >= `` the k-th largest z, ties included;
    5. top-p, on what top-k kept: a token stays while the mass of the tokens with larger z is below ``top_p`` of the whole, so the token
       that crosses stays, with its ties. Masses are the integers of ``fixed_math.weight``;
    6. min-p keeps ``z >= max z + log(min_p)``;
    7. the token is ``argmax(z - log(E))`` over what is kept, lowest id on ties, with the noise E of ``noise`` (Gumbel-max). A greedy row
       takes the argmax of step 2, whatever its filters.

    +inf wins over everything finite, the lowest id among several, greedy or not; -inf is never drawn. A NaN anywhere in the row as given
    is STATUS_NAN, a row of only -inf after step 2 STATUS_NOTHING_ALLOWED.

    ``logprobs``: None computes none, 0 those of the chosen token, n also of the n most likely (at most V). ``workspace``: what a caller
    keeps between its calls, so that they allocate nothing: scratch memory, and the results, which the next call with it overwrites
    (``cpu.SampleWorkspace``, ``triton.Workspace``; the oracle keeps nothing).
    """
    return default_ops("logits", logits).sample(
        logits, temperature, top_k, top_p, min_p, seed, position, stream, penalties=penalties, bias=bias, end_tokens=end_tokens,
        allowed=allowed, logprobs=logprobs, workspace=workspace,
    )  # fmt: skip


def sample_head(
    x: Tensor,
    head: Tensor | PackedWeight | QuantizedWeight,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    first_token: int = 0,
) -> HeadDraw:
    """The LM head and the draw from its logits in one, for rows without filters, lists and masks (FlashSampling, arXiv 2603.15854).

    ``x [R, K]`` and ``head [V, K]`` as in ``linear``, whose float32 result are the logits. They are those of the tokens ``first_token`` to
    ``first_token + V - 1`` (at most 2^22) of the vocabulary: noise belongs to these ids. ``temperature``, ``seed``, ``position`` and
    ``stream`` as in ``sample``, whose steps 3 and 7 the draw is, with its rules for NaN, infinities and ties. So ``merge_draws`` of the
    draws of one shard or several is what ``sample`` gives for the whole row of logits with its filters off, to the bit in the tokens where
    the logits have the same bits.
    """
    return default_ops("x", x).sample_head(x, head, temperature, seed, position, stream, first_token=first_token)


def beam_select(
    logits: Tensor,
    scores: Tensor,
    group_start: Tensor,
    num_candidates: int,
    temperature: Tensor,
    top_k: Tensor,
    position: Tensor,
    *,
    seed: Tensor | None = None,
    stream: Tensor | None = None,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    workspace: Any = None,
) -> BeamResult:
    """The ``num_candidates`` best continuations of each group of beams, by the sum of log-probabilities.

    ``logits [R, V]`` as for ``sample``: one row for each beam. ``scores`` float32 ``[R]``: what the beams have so far, at most 1e30 in
    size, or -inf for a beam that is out. ``group_start`` int32 ``[G + 1]``, from 0 to R: group g has the rows
    ``group_start[g]:group_start[g + 1]``. ``num_candidates``: C >= 1. ``temperature`` float32 ``[R]`` finite and > 0, ``top_k`` and
    ``position`` int32 ``[R]``, and the lists: as for ``sample``.

    In every row, each step in float32 with each operation rounded by itself:

    1. ``z = x / temperature``; top-k keeps ``z >=`` the k-th largest, ties included;
    2. ``l = (z - max z) - log(m)`` for what is kept, -inf for the rest: the log-softmax, where m is the mass of what is kept, a sum of
       integers (``fixed_math.weight``) rounded to float32 and scaled to 1 for the largest, and ``log`` is ``fixed_math.log``. With +inf
       entries those share the probability evenly;
    3. penalties, bias, end tokens and mask change ``l``, in the order and by the arithmetic of ``sample``'s steps 1 and 2;
    4. the score of the continuation is ``l`` plus that of the beam. With ``seed`` (int64 ``[R]``) and ``stream`` (int32 ``[R]``; both or
       neither) it is that minus ``log(E)``, the noise of ``sample``: the best C of one row are then a sample without replacement (Gumbel
       top-k; Kool et al. 2019).

    Temperature and top-k thus renormalise (the origin's beams), what comes after does not (transformers' order: processors see
    log-probabilities). Continuations of -inf are none. Ties go to the lower row, then to the lower token.
    """
    return default_ops("logits", logits).beam_select(
        logits, scores, group_start, num_candidates, temperature, top_k, position, seed=seed, stream=stream, penalties=penalties, bias=bias,
        end_tokens=end_tokens, allowed=allowed, workspace=workspace,
    )  # fmt: skip


def verify_drafts(tokens: Tensor, status: Tensor, draft: Tensor, parent: Tensor, start: Tensor) -> VerifyResult:
    """Of each sequence's drafted tokens, those that the token law draws as well (replay verification).

    Sequence s has the rows ``start[s]:start[s + 1]`` (int32 ``[S + 1]``, from 0 to R, 1 to 64 each): a tree of drafts whose first row is
    the root, the last token that is certain. A node r past the root stands for the token ``draft[r]`` (int32 ``[R]``, any value) after
    its parent ``parent[r]`` (int32 ``[R]``: a node of the same sequence before it; not looked at for the root). ``tokens`` int64 ``[R]``
    and ``status`` int32 ``[R]`` are what ``sample`` gave for each row.

    From the root the walk goes on to the first child that stands for the token that was drawn after the node, as long as there is one and
    the node's status is STATUS_OK. The tokens drawn after the nodes of the path are those that decoding without drafts would have drawn:
    ``num_accepted[s]`` that were drafted, and one more (or the failure that the last node's status tells).
    """
    return default_ops("tokens", tokens).verify_drafts(tokens, status, draft, parent, start)


def masses(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    position: Tensor,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What each row of ``sample`` is drawn from, as integer masses: int64 ``[R, V]``, and its status, int32 ``[R]``.

    Arguments as of ``sample``. A token kept by steps 1 to 6 has the mass ``fixed_math.weight(z - max z)``, the others 0; its probability is
    its share of the row's sum. A greedy row has all of its mass, 2^40, on the token that ``sample`` takes. With +inf entries each of those
    has 2^40 and the others 0. A row without a token has none.
    """
    return default_ops("logits", logits).masses(
        logits, temperature, top_k, top_p, min_p, position, penalties=penalties, bias=bias, end_tokens=end_tokens, allowed=allowed
    )


def verify_block(
    target: Tensor, status: Tensor, proposal: Tensor, draft: Tensor, start: Tensor, seed: Tensor, position: Tensor, stream: Tensor
) -> VerifyResult:
    """Lossless rejection of stochastic drafts, a whole chain at once (block verification, Sun et al. 2024, "Block Verification Accelerates
    Speculative Decoding", Algorithm 2).

    Sequence s has the rows ``start[s]:start[s + 1]`` (int32 ``[S + 1]``, 1 to 64 each), a chain: row i > 0 of it stands for ``draft[r]``
    (int32 ``[R]``) after row i - 1. ``target`` int64 ``[R, V]`` and ``status`` int32 ``[R]``: ``masses`` of the model's logits at each
    row, what follows it. ``proposal`` int64 ``[R, V]``: masses of what ``draft[r]`` was drawn from, at most 2^62 in all (any for the
    first rows); a certain draft has all of its mass on one token. ``seed`` int64, ``position`` int32 (of the token after the first row)
    and ``stream`` int32: ``[S]``.

    With the shares p_i of row i of the target and q_i of row i of the proposal (what x_i was drawn from), in float64, for a chain of n:

        w_0 = 1,   w_i = min(w_(i-1) p_(i-1)(x_i) / q_i(x_i), 1)
        Z_i = sum_x max(w_i p_i(x) - q_(i+1)(x), 0)    for i < n
        h_i = Z_i / (Z_i + 1 - w_i)    for i < n,   h_n = w_n        (0 / 0 is 1)

    x_1 .. x_tau is kept, tau the largest i >= 1 with ``u_i <= h_i``, or 0; the token after it is drawn from ``max(w_tau p_tau - q_(tau+1),
    0)`` (from p_n if tau is n), or from p_tau where that is nothing but rounding. The coin u_i is ``(X 2^32 + L + 1/2) / 2^64`` with X and
    L the words of token i at ``position`` in the domains ``noise.DOMAIN_COIN`` and its tail; the last draw is ``argmax(log(share) -
    log(E))`` with the noise of ``position`` in ``noise.DOMAIN_RESIDUAL``. Both belong to ``position``, where the chain begins, and not to
    where its tokens stand: a later chain over the same places must not meet the same coins. For the same reason the drafts must come from
    noise that no other chain of the request was drawn with. Then the tokens kept and the one after them have the law of the target; they
    are not those that ``sample`` draws. A chain ends with the first row whose status is not STATUS_OK: n is its place, and where tau is n,
    its status is the sequence's and no token is drawn. A draft without mass in its proposal is not kept.
    """
    return default_ops("target", target).verify_block(target, status, proposal, draft, start, seed, position, stream)
