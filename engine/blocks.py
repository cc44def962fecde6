"""The block pool: which cache blocks belong to which sequence. Counts and ids only, no tensors.

A *block* holds ``block_size`` consecutive tokens of one sequence. A *block table* holds a sequence's block ids, in token order: an array of
int32, as kernels read it.
Several tables may share a block (fork, permute); a shared block is copied when one of them is about to write into it (copy-on-write),
which only ever concerns the last, partly filled block of a fork.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias

BlockTable: TypeAlias = "array[int]"
Write: TypeAlias = "tuple[BlockTable, int, int]"  # of tokens start..end-1 of a table


def new_table() -> BlockTable:
    return array("i")


class BlockPool:
    """``num_blocks`` reference-counted blocks of ``block_size`` tokens.

    Methods that take a ``table`` change it in place. Nothing is allocated unless everything asked for fits: callers ask
    ``new_blocks`` first and make room (preempt) themselves.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; the cache needs at least one block")
        if block_size < 16 or block_size % 16:
            raise ValueError(f"block_size is {block_size}; it must be a positive multiple of 16")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack whose top is the lowest id: a small working set stays in the same, warm memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def is_writable(self, table: BlockTable, start: int, end: int) -> bool:
        """Whether tokens ``start..end-1`` have blocks already, and all their own: a write takes nothing of the pool."""
        size, references = self.block_size, self._references
        for block in table[start // size : -(-end // size)]:
            if references[block] > 1:
                return False
        return end <= len(table) * size

    def _shared(self, table: BlockTable, start: int, end: int) -> list[int]:
        """Indices into ``table`` of the blocks that tokens ``start..end-1`` would write into while another table also holds them."""
        last = min(self.blocks_for(end), len(table))
        return [i for i in range(start // self.block_size, last) if self._references[table[i]] > 1]

    def new_blocks(self, writes: Iterable[Write]) -> int:
        """Blocks that must be taken from the pool before all ``writes`` can be made, one after the other."""
        needed = 0
        holders: dict[int, int] = {}  # of shared blocks, after the writes so far: the last table to write needs no copy
        for table, start, end in writes:
            needed += max(0, self.blocks_for(end) - len(table))
            for i in self._shared(table, start, end):
                left = holders.get(table[i], self._references[table[i]])
                if left > 1:
                    holders[table[i]] = left - 1
                    needed += 1
        return needed

    def prepare(self, table: BlockTable, start: int, end: int) -> list[tuple[int, int]]:
        """Make tokens ``start..end-1`` writable; returns the block copies ``(source, destination)`` to carry out before the write.

        Raises ``RuntimeError`` if the pool has too few free blocks; the table is then unchanged.
        """
        needed = self.new_blocks([(table, start, end)])
        if needed > self.num_free:
            raise RuntimeError(f"{needed} blocks are needed and {self.num_free} are free")
        copies = []
        for i in self._shared(table, start, end):
            source, table[i] = table[i], self._take()
            self._references[source] -= 1  # still held by the other table, so never free here
            copies.append((source, table[i]))
        while len(table) < self.blocks_for(end):
            table.append(self._take())
        return copies

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks."""
        for block in table:
            self._references[block] += 1
        return table[:]

    def permute(self, tables: list[BlockTable], parents: list[int]) -> list[BlockTable]:
        """Tables of which the i-th continues ``tables[parents[i]]``: shared by several, passed on to one, dropped by none of them.

        The given tables are used up. No block is taken or copied.
        """
        children = Counter(parents)
        for i, table in enumerate(tables):
            if not children[i]:
                self.release(table)
        result = []
        for parent in parents:
            children[parent] -= 1
            result.append(self.fork(tables[parent]) if children[parent] else tables[parent])
        return result

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Drop the blocks past the first ``num_tokens`` tokens."""
        keep = self.blocks_for(num_tokens)
        while len(table) > keep:
            self._drop(table.pop())

    def release(self, table: BlockTable) -> None:
        """Drop every block of a table."""
        self.truncate(table, 0)

    def _take(self) -> int:
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert every invariant, given all the tables alive: counts match the tables, and each block is either free or held."""
        held = Counter(block for table in tables for block in table)
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        for block, count in enumerate(self._references):
            assert count == held[block], f"block {block} has reference count {count} but {held[block]} tables hold it"
        assert len(self._free) + len(held) == self.num_blocks, "a block is neither free nor held"
        assert not held.keys() & set(self._free), "a held block is on the free list"
