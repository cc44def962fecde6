"""Other engines behind one interface, so that all of them decode the same prompts with the same weights.

Each module of this package that is named in ``NAMES`` has a class ``Adapter``. An adapter lives in a process of its own (`worker.py`), so
that no two OpenMP runtimes meet and a peer may have its own versions of everything; `remote.py` is the other end of its pipe. The
interpreter is the running one, or what the variable ``ENGINE_PEERS_<NAME>`` (such as ``ENGINE_PEERS_LLAMA_CPP``) names: the path of a
Python in whose environment the peer is installed. Nothing here needs torch, nor the engine.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

NAMES = ("transformers", "llama_cpp", "ctranslate2", "openvino_genai", "onnxruntime_genai")
# In the serving suite: an adapter of this package, and the servers of `servers.py`.
BATCHING = ("transformers_batching",)
SERVERS = ("llama_cpp", "vllm")
ALL = tuple(dict.fromkeys(NAMES + BATCHING + SERVERS))
# What the weights are held in. int8 and int4 are the peer's own formats of that many bits; what it computes in is its own affair, but for
# fp32: there everything is float32.
DTYPES = ("fp32", "bf16", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Timing:
    """One call of ``decode``: ``seconds`` from the first new token (of all sequences) to the last, ``total_seconds`` of the whole call, the
    prompts included, and the new ``tokens [batch][new_tokens]``."""

    seconds: float
    total_seconds: float
    tokens: list[list[int]]


class Peer(Protocol):
    """An engine that can be installed, and loads one model at a time."""

    name: str
    dtypes: tuple[str, ...]
    beams: bool

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        ...

    def version(self) -> str:
        """Of the package that does the work."""
        ...

    def load(self, folder: Path, dtype: str, num_threads: int) -> None:
        """Convert the float32 Hugging Face model in ``folder`` (once: `converted`), and load it."""
        ...

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        """Greedy, or the best of a beam search, for prompts of one length, batched; exactly ``new_tokens`` each, with no penalty."""
        ...

    def prefill(self, tokens: list[int]) -> float:
        """Seconds to compute a prompt, with the logits after its last token."""
        ...


def missing(*modules: str) -> str | None:
    """Which of these modules are not installed, as one sentence, or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def converted(folder: Path, label: str, build: Callable[[Path], None]) -> Path:
    """A folder beside ``folder`` named ``label``, which ``build`` fills if it is not there; one that fails leaves nothing behind."""
    target = folder.parent / label
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unfinished = Path(temporary) / "unfinished"
            unfinished.mkdir()
            build(unfinished)
            if not target.exists():
                os.replace(unfinished, target)
    return target


def make(name: str) -> Peer:
    """The adapter of that name."""
    if name not in NAMES + BATCHING:
        raise ValueError(f"peer {name!r}: must be one of {', '.join(NAMES + BATCHING)}")
    return importlib.import_module(f"{__name__}.{name}").Adapter()
