"""A smaller model as a drafter: the same tokenizer, its own paged cache, the same noise and filters as the model it drafts for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import kernels as kernels_module
from ..blocks import BlockPool, new_table
from ..decode.sample import Sampler
from ..decode.speculate import certain_end, go_on, masses
from ..device import upload
from ..kv_cache import KVCache, block_bytes, size_cache
from ..models.batch import StepBatch
from ..models.config import ModelConfig
from ..models.load import load
from ..option_checks import check_int
from ..params import draft_seed
from ..plan import ScheduledSequence, StepPlan
from ..request import Lookahead, Request, TokenSequence
from ..runner import Runner
from ..tokenizer import Tokenizer
from .draft import MAX_DRAFT, Draft, signed
from .governor import Costs
from .tree import Tree, alternatives

# Whether one more token is worth drafting for the i-th request, after drafted ones of such confidence.
Worth = Callable[[int, Sequence[float]], bool]

_GPU_SHARE = 0.4  # of the memory that the model's own cache has left, at most; the rest is for activations and graphs
_PREFILL = 512  # most tokens of one step
_MANY = 64  # tokens of a step whose time tells what each takes
_USUAL = 8  # tokens of one sequence, of a step that catches up on what has just been verified


class _Copy(TokenSequence):
    """A request's tokens as the draft model has them: true ones, and those drafted last, of which some may be wrong."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.num_computed = 0
        self.block_table = new_table()
        self.num_true = 0

    def follow(self, tokens: list[int]) -> int:
        """Take over the request's ``tokens``; returns how many of those computed are still right. The last is always to be computed."""
        at, end = self.num_true, min(len(self.tokens), len(tokens))
        while at < end and self.tokens[at] == tokens[at]:
            at += 1
        self.tokens[at:] = tokens[at:]
        self.num_true = len(tokens)
        self.num_computed = min(self.num_computed, at, len(tokens) - 1)
        return self.num_computed


@dataclass
class _Line:
    """A chain that is being drafted."""

    index: int
    limit: int
    copy: _Copy
    last: Lookahead
    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    sequences: list[Lookahead] = field(default_factory=list)
    proposal: list[Any] = field(default_factory=list)


class DraftModel:
    """Drafts with a model of the same vocabulary: for each request what this model would draw next, by the same noise, filters and
    penalties, so that it often is what the larger model draws.

    Args:
        model: as of ``Decoder``: a live model or a path.
        width: alternatives at each place: 1 drafts chains, more trees, of which more holds and which take more rows to verify.
        dtype, device, weights, kernels: likewise.

    It serves one decoder, which calls ``bind``.
    """

    def __init__(
        self,
        model: Any,
        *,
        width: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        weights: str | None = None,
        kernels: str = "auto",
    ) -> None:
        check_int("width", width, 1, MAX_DRAFT)
        self.width = width
        self.nodes = 1 if width == 1 else 2  # drafted at each depth, about: the least likely alternatives stay out
        loaded = load(
            model, ops=lambda device_type: kernels_module.select(device_type, kernels), dtype=dtype, weights=weights, device=device
        )
        self.model, self.config, self.name = loaded.model, loaded.config, loaded.name
        self.ops = self.model.ops
        self._tokenizer = None if loaded.tokenizer_path is None else Tokenizer(loaded.tokenizer_path)
        self.costs = Costs()  # of one depth, by the requests that are drafted for
        self._token_seconds = 0.0  # of each token of a long run of them, such as a prompt; 0: not known yet
        self._copies: dict[Request, _Copy] = {}
        self._pool: BlockPool | None = None

    def check(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """Raise ``ValueError`` unless this can draft for such a model."""
        if self._pool is not None:
            raise ValueError(f"draft model {self.name} drafts for another decoder already; make a DraftModel for each")
        if self.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"draft model {self.name} has a vocabulary of {self.config.vocab_size} tokens; it must have the model's {config.vocab_size}"
            )
        if tokenizer is not None and self._tokenizer is not None and tokenizer.vocabulary != self._tokenizer.vocabulary:
            raise ValueError(f"draft model {self.name} has another tokenizer than the model; the same ids must mean the same text")
        if self.config.max_position < config.max_position:
            raise ValueError(
                f"draft model {self.name} has a length of {self.config.max_position} tokens; it must have at least the model's "
                f"{config.max_position}, or use Decoder(max_position={self.config.max_position})"
            )

    def bind(self, config: ModelConfig, *, max_batch_size: int, block_size: int) -> None:
        """Become the drafter of a decoder, whose model it has been checked for."""
        c = self.config
        dtype = torch.bfloat16 if self.model.dtype == torch.bfloat16 else torch.float32
        bytes_per_block = block_bytes(c.num_layers, c.num_kv_heads, c.head_dim, block_size, dtype)
        longest = config.max_position + MAX_DRAFT + 1
        device = self.model.device
        share = _GPU_SHARE if device.type == "cuda" else None
        num_blocks = size_cache(None, max_batch_size * longest, block_size, bytes_per_block, device, share)
        self._pool = BlockPool(num_blocks, block_size)
        cache = KVCache(c.num_layers, c.num_kv_heads, c.head_dim, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device)
        self._runner = Runner(self.model, cache, block_size)
        self._sampler = Sampler(self.ops)

    @property
    def pool(self) -> BlockPool:
        if self._pool is None:
            raise RuntimeError(f"draft model {self.name} belongs to no decoder yet; give it to Decoder(draft=...)")
        return self._pool

    def release(self, request: Request) -> None:
        copy = self._copies.pop(request, None)
        if copy is not None:
            self.pool.release(copy.block_table)

    def catching_up(self, request: Request) -> float:
        """Seconds that what this model has not computed of a request will take."""
        copy = self._copies.get(request)
        return (request.num_tokens - (0 if copy is None else copy.num_computed)) * self._token_seconds

    def draft(self, requests: Sequence[Request], limits: Sequence[int], worth: Worth | None = None) -> list[Draft]:
        """See ``Drafter.draft``. ``worth`` is asked before every depth but the first; where it says no, the draft goes no deeper."""
        drafts = [Draft() for _ in requests]
        lines: list[_Line] = []
        for i, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            copy = self._follow(request)
            if self._compute_old(copy):
                lines.append(_Line(i, limit, copy, Lookahead(request)))
        trees = [] if self.width == 1 else [line for line in lines if line.last.params.verification != "block"]
        chains = [line for line in lines if line not in trees]
        if chains:
            self._draft_chains(chains, drafts, worth)
        if trees:
            self._draft_trees(trees, drafts, worth)
        return drafts

    def _draft_chains(self, active: list[_Line], drafts: list[Draft], worth: Worth | None) -> None:
        lines = active
        for line in lines:
            if line.last.params.verification == "block":
                line.last.seed = draft_seed(line.last.seed, line.last.num_tokens)
        while active := [line for line in active if self._fits(line.copy, len(line.copy.tokens))]:
            begun = time.perf_counter()
            rows, usual = len(active), max(line.copy.num_missing for line in active) <= _USUAL
            logits = self._compute(active)
            block = [line.last.params.verification == "block" for line in active]
            proposal = masses(self.ops, logits, [line.last for line in active])[0] if any(block) else None
            going_on = []
            for r, (line, drawn) in enumerate(zip(active, self._sampler.draw(logits, [line.last for line in active]), strict=True)):
                if drawn.error is not None:
                    continue
                after = go_on(line.last, drawn.token)
                ends = after is None
                if after is None:
                    if not block[r]:
                        continue
                    after = certain_end(line.last, drawn.token)
                line.last = after
                line.tokens.append(drawn.token)
                line.confidence.append(math.exp(min(drawn.processed_logprob, 0.0)))
                line.sequences.append(after)
                if block[r] and proposal is not None:
                    line.proposal.append(proposal[r])
                if not ends and len(line.tokens) < line.limit and (worth is None or worth(line.index, line.confidence)):
                    line.copy.tokens.append(drawn.token)
                    going_on.append(line)
            active = going_on
            if usual:
                self.costs.note(rows, time.perf_counter() - begun)
        for line in lines:
            chain = tuple(range(len(line.tokens)))
            drafts[line.index] = Draft(tuple(line.tokens), chain, tuple(line.confidence), tuple(line.sequences), tuple(line.proposal))

    def _draft_trees(self, lines: list[_Line], drafts: list[Draft], worth: Worth | None) -> None:
        active = [(line, Tree(line.last, line.limit)) for line in lines if self._fits(line.copy, len(line.copy.tokens))]
        trees = active
        begun = time.perf_counter()
        rows = len(active)
        usual = rows > 0 and max(line.copy.num_missing for line, _ in active) <= _USUAL
        logits = self._compute([line for line, _ in active]) if active else None
        while active and logits is not None:
            asked = [(tree, node) for _, tree in active for node in tree.frontier]
            found = iter(alternatives(self.ops, logits, [tree.after(node) for tree, node in asked], self.width))
            for _, tree in active:
                tree.grow([next(found) for _ in tree.frontier])
            active = [
                (line, tree)
                for line, tree in active
                if tree.frontier
                and (worth is None or worth(line.index, tree.likeliest()))
                and self._fits(line.copy, len(line.copy.tokens) + len(tree.computed))
            ]
            now = time.perf_counter()
            if usual:
                self.costs.note(rows, now - begun)
            begun, rows, usual = now, len(active), True
            logits = self._compute_nodes(active) if active else None
        for line, tree in trees:
            drafts[line.index] = tree.draft()

    def _follow(self, request: Request) -> _Copy:
        copy = self._copies.setdefault(request, _Copy(request))
        self.pool.truncate(copy.block_table, copy.follow(request.tokens))
        return copy

    def _fits(self, copy: _Copy, end: int) -> bool:
        """Make room for the tokens up to ``end``; False if there is none."""
        write = (copy.block_table, copy.num_computed, end)
        if self.pool.new_blocks([write]) > self.pool.num_free:
            return False
        self.pool.prepare(*write)
        return True

    def _compute_old(self, copy: _Copy) -> bool:
        """Compute all but the last ``_PREFILL`` tokens of a request that is far behind; False if the cache has no room for it."""
        while copy.num_missing > _PREFILL:
            if not self._fits(copy, copy.num_computed + _PREFILL):
                return False
            self._run([(copy, _PREFILL, False)])
        return True

    def _compute(self, lines: Sequence[_Line]) -> torch.Tensor:
        """Everything that is missing of some lines, in as many steps as that takes; the logits of the last token of each."""
        parts = []
        start = 0
        while start < len(lines):
            end, size = start, 0
            while end < len(lines) and (end == start or size + lines[end].copy.num_missing <= _PREFILL):
                size += lines[end].copy.num_missing
                end += 1
            parts.append(self._run([(line.copy, line.copy.num_missing, True) for line in lines[start:end]]))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compute_nodes(self, active: Sequence[tuple[_Line, Tree]]) -> torch.Tensor:
        """The frontiers of some trees, whose nodes follow the true tokens in the cache in the order in which they are computed; the logits
        of each."""
        size = self.pool.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start, context_len, tree_start = [0], [], []
        ancestors: list[int] = []
        tables: list[list[int]] = []
        width = max(len(line.copy.block_table) for line, _ in active)
        for line, tree in active:
            table, end = line.copy.block_table, len(line.copy.tokens)
            context = end + len(tree.computed)
            tokens += (tree.tokens[node - 1] for node in tree.frontier)
            positions += (end - 1 + tree.depths[node] for node in tree.frontier)
            slots += [table[i // size] * size + i % size for i in range(context - len(tree.frontier), context)]
            ancestors += (signed(tree.seen[node]) for node in tree.frontier)
            query_start.append(len(tokens))
            context_len.append(context)
            tree_start.append(end)
            tables.append([*table, *[0] * (width - len(table))])
        i32 = torch.int32
        batch = StepBatch(
            tokens=torch.tensor(tokens, dtype=i32),
            positions=torch.tensor(positions, dtype=i32),
            slots=torch.tensor(slots, dtype=i32),
            query_start=torch.tensor(query_start, dtype=i32),
            context_len=torch.tensor(context_len, dtype=i32),
            block_table=torch.tensor(tables, dtype=i32),
            logit_rows=torch.arange(len(tokens)),
            tree_start=torch.tensor(tree_start, dtype=i32),
            ancestors=torch.tensor(ancestors),
        )
        return self.model.forward_logits(upload(batch, self.model.device), self._runner.cache)

    def _run(self, shares: Sequence[tuple[_Copy, int, bool]]) -> Any:
        plan = StepPlan([ScheduledSequence(copy.request, copy, copy.num_computed, n, (copy,) if last else ()) for copy, n, last in shares])
        plan.add_rows()
        begun = time.perf_counter()
        logits = self._runner.run(plan)
        tokens = sum(n for _, n, _ in shares)
        if tokens >= _MANY:
            seconds = (time.perf_counter() - begun) / tokens
            self._token_seconds += (seconds - self._token_seconds) * (0.2 if self._token_seconds else 1.0)
        for copy, n, _ in shares:
            copy.num_computed += n
        return logits
