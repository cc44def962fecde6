"""What of a model each rank has under tensor parallelism (Shoeybi et al. 2019): of every matrix a part, of vectors along the width all.

``qkv`` and ``gate_up`` are cut by outputs (whole KV heads with the query heads that read them), ``out`` and ``down`` by the inputs that
follow from these; so a layer's parts meet in two sums of ``[T, hidden]``. Embedding and head are cut by rows of the vocabulary, at
multiples of 4 where a counter of the token law's noise begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .config import ModelConfig

_IDS = 4  # the vocabulary is cut at multiples of it


@dataclass(frozen=True)
class Shard:
    """The part of rank ``rank`` of ``size``."""

    rank: int
    size: int

    def config(self, config: ModelConfig) -> ModelConfig:
        """The sizes of this part; the vocabulary's stays whole. ``ValueError`` for a model that cannot be cut so."""
        for name in ("num_kv_heads", "ffn_size"):
            if getattr(config, name) % self.size:
                raise ValueError(f"parallel has {self.size} ranks; they must divide the model's {name}, which is {getattr(config, name)}")
        if config.vocab_size < _IDS * self.size:
            raise ValueError(
                f"parallel has {self.size} ranks; a vocabulary of {config.vocab_size} can be cut for at most {config.vocab_size // _IDS}"
            )
        heads, kv_heads, ffn = (n // self.size for n in (config.num_heads, config.num_kv_heads, config.ffn_size))
        return replace(config, num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn)

    def part(self, n: int, offset: int = 0) -> slice:
        """Of ``n`` that all ranks have in equal parts, from ``offset`` on."""
        return slice(offset + n // self.size * self.rank, offset + n // self.size * (self.rank + 1))

    def parts(self, sizes: Sequence[int], num_matrices: int) -> Iterator[tuple[int, slice]]:
        """Of rows in parts of ``sizes``, in one matrix or in one for each: which matrix, and which of its rows."""
        offset = 0
        for i, n in enumerate(sizes):
            if num_matrices == 1:
                yield 0, self.part(n, offset)
                offset += n
            else:
                yield i, self.part(n)

    def vocabulary(self, vocab_size: int) -> slice:
        """The tokens whose rows of embedding and head this part has."""
        first, end = (vocab_size * r // self.size // _IDS * _IDS for r in (self.rank, self.rank + 1))
        return slice(first, vocab_size if self.rank == self.size - 1 else end)
