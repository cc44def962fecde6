"""The kernel of ``verify_drafts``: one program of a warp for each sequence, two rows a thread.

Each node first learns whether its edge can be walked: whether its parent succeeded and drew what the node stands for. From the root the
walk then goes to the first node whose edge leads up to where it is, a minimum over the warp for each token that is kept. It moves 24 bytes
a row and waits for memory twice, for the nodes and for what was drawn after their parents.

Values out of range are never followed: a sequence whose rows do not lie in the call, or are not 1 to 64, has -1 drafts accepted and no
path; a node whose parent is none before it is nobody's child.
"""

from __future__ import annotations

import triton.language as tl

from .. import checks_verify
from ..api import STATUS_OK
from .sample_row import kernel

_NODES = tl.constexpr(checks_verify.MAX_NODES)
_OK = tl.constexpr(STATUS_OK)


@kernel
def verify_walk(tokens, status, draft, parent, start, num_accepted, path, rows):
    """The walk down one tree."""
    sequence = tl.program_id(0)
    first = tl.load(start + sequence).to(tl.int64)
    size = tl.load(start + sequence + 1).to(tl.int64) - first
    if (first >= 0) & (size >= 1) & (size <= _NODES) & (first + size <= rows):
        node = tl.arange(0, _NODES)
        there = node < size
        above = tl.load(parent + first + node, mask=there, other=-1)
        has_parent = there & (above >= 0) & (above < node)  # the root has none before it
        drafted = tl.load(draft + first + node, mask=there, other=0)
        drawn = tl.load(tokens + first + above, mask=has_parent, other=0)
        succeeded = tl.load(status + first + above, mask=has_parent, other=_OK) == _OK
        edge = tl.where(has_parent & succeeded & (drawn == drafted.to(tl.int64)), above, -1)
        kept = tl.where(node == 0, 0, -1)
        depth = 0
        child = tl.min(tl.where(edge == 0, node, _NODES), axis=0)
        while child < _NODES:
            depth += 1
            kept = tl.where(node == depth, child, kept)
            child = tl.min(tl.where(edge == child, node, _NODES), axis=0)  # later than its parent, so the walk ends
        tl.store(path + first + node, kept, mask=there)
        tl.store(num_accepted + sequence, depth)
    else:
        tl.store(num_accepted + sequence, -1)
