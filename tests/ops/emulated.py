"""The CUDA kernels' own source on an emulated grid (``grid_emulated.h``), built with the C++ compiler: for tests without a GPU."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.kernels import BeamResult, SampleResult, checks_sample, cuda

ROOT = Path(__file__).resolve().parents[2]
FORWARD, BACKWARD, SHUFFLED = range(3)  # Grid::Order


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(folder: Path, *flags: str, source_root: Path = ROOT / "csrc") -> ctypes.CDLL:
    """Compile ``emulated_kernels.cpp`` against the kernels' source."""
    library = folder / "emulated_kernels.so"
    here = Path(__file__).parent
    command = [
        *str(compiler()).split(), "-O2", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wall", "-Wextra",
        "-Wno-unknown-pragmas", *flags, f"-I{source_root}", f"-I{here}", str(here / "emulated_kernels.cpp"), "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return ctypes.CDLL(str(library))


@functools.cache
def library() -> ctypes.CDLL:
    """Built once for all tests of a run."""
    with tempfile.TemporaryDirectory() as folder:
        return build(Path(folder))


class Emulated:
    """The ops by the emulated kernels, ``members`` blocks to a row and ``groups`` rows at a time, threads taken in ``order``."""

    def __init__(self, library: ctypes.CDLL, members: int = 2, groups: int = 1, order: int = SHUFFLED) -> None:
        self.library, self.members, self.groups, self.order = library, members, groups, order
        self.seed = 0

    def plan(self, rows: int, vocab_size: int, device: torch.device) -> cuda.Plan:
        chunk = math.ceil(vocab_size / self.members / 128) * 128
        return cuda.Plan(math.ceil(vocab_size / chunk), chunk, min(self.groups, rows))

    def workspace(self, max_rows: int, vocab_size: int, device: str = "cpu", max_logprobs: int = 0) -> cuda.Workspace:
        return cuda.Workspace(max_rows, vocab_size, device, max_logprobs, plan=self.plan)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        position: Tensor,
        stream: Tensor,
        *,
        penalties: Any = None,
        bias: Any = None,
        end_tokens: Any = None,
        allowed: Any = None,
        logprobs: int | None = None,
        workspace: cuda.Workspace | None = None,
    ) -> SampleResult:
        given = (temperature, top_k, top_p, min_p, seed, position, stream)
        checks_sample.sample(logits, *given, penalties, bias, end_tokens, allowed, logprobs)
        rows, vocab = logits.shape
        if workspace is None:
            workspace = self.workspace(rows, vocab, max_logprobs=logprobs or 0)
        for result in (workspace.tokens, workspace.status, *workspace.chosen, *workspace.top_tokens, *workspace.top):
            result.fill_(77)  # what the kernel does not write would show
        workspace.top_keys.fill_(-1)
        if rows:
            self.run("sample", cuda.words(workspace, logits, given, penalties, bias, end_tokens, allowed, logprobs), workspace.groups)
        return workspace.results(rows, logprobs)

    def run(self, op: str, words: list[int], groups: Tensor) -> None:
        """The kernel; it leaves its memory as it found it, for the next call, but for the generation of the barrier."""
        self.seed += 1
        hung = getattr(self.library, f"emulated_{op}")((ctypes.c_int64 * len(words))(*words), self.order, self.seed)
        assert not hung, "every thread waits"
        left = groups.view(torch.int32).reshape(len(groups), cuda.ROW_GROUP_BYTES // 4).clone()
        left[:, 1] = 0
        left[:, 12 : 12 + 2 * 512 + 4 * 256] = 0  # candidates and the members' best, which are written before they are read
        assert not left.any(), "the row's memory is not clean"

    def beam_workspace(
        self, max_rows: int, vocab_size: int, max_groups: int, max_candidates: int, device: str = "cpu"
    ) -> cuda.BeamWorkspace:
        return cuda.BeamWorkspace(max_rows, vocab_size, max_groups, max_candidates, device, plan=self.plan)

    def beam_select(
        self,
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
        penalties: Any = None,
        bias: Any = None,
        end_tokens: Any = None,
        allowed: Any = None,
        workspace: cuda.BeamWorkspace | None = None,
    ) -> BeamResult:
        given = (
            logits,
            scores,
            group_start,
            num_candidates,
            temperature,
            top_k,
            position,
            seed,
            stream,
            penalties,
            bias,
            end_tokens,
            allowed,
        )
        checks_sample.beam_select(*given)
        rows, groups = len(logits), len(group_start) - 1
        if workspace is None:
            workspace = self.beam_workspace(rows, logits.shape[1], groups, num_candidates)
        w = workspace
        for t in (w.keys, w.key_logprobs, w.row_keys, w.row_logprobs, w.scores, w.tokens, w.parents, w.logprobs, w.status):
            t.fill_(77)  # what the kernel does not write would show
        w.groups.zero_()  # a test fills it with rubbish, against its contract
        w.rows_done.zero_()
        self.run("beam_select", cuda.beam_words(w, *given), w.groups)
        assert not w.rows_done.any(), "the groups' memory is not clean"
        return w.results(rows, groups, num_candidates)
