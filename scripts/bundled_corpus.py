"""The corpus of the bundled models: the Python standard library's own sources, split by file, and the tokenizer trained on them."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

END = "<|endoftext|>"  # between files; also bos, eos and pad; always id 0
END_ID = 0

# Tests are repetitive data; the rest are generated tables, files written for one machine, or other people's packages.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EXCLUDED |= {"ensurepip", "encodings", "pydoc_data", "lib2to3", "entities.py"}

# Where byte-pair merges may not cross. A word takes one leading mark along ("(self", ".get", "_name"), and a line break takes the blank
# lines before it and the indentation after it, so that a new line at any depth is one or two tokens and prompts may end in an indent.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Source:
    """One file: its path relative to the standard library (with forward slashes), its exact text, and its side of the split."""

    path: str
    text: str
    held_out: bool

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.text.encode())


def is_held_out(path: str) -> bool:
    """Whether the file at this relative path is held out: one in twenty, by a hash of the path alone, so that the side of a file does
    not depend on the Python version or on which other files there are."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 20 == 0


def read_sources(root: Path | None = None) -> list[Source]:
    """All UTF-8 ``.py`` files below ``root`` (default: this interpreter's standard library) that are not excluded, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    sources = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        if not EXCLUDED.isdisjoint(relative.parts) or file.name.startswith("_sysconfigdata"):
            continue
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            sources.append(Source(relative.as_posix(), text, is_held_out(relative.as_posix())))
    if not any(s.held_out for s in sources) or all(s.held_out for s in sources):
        raise FileNotFoundError(f"{root}: {len(sources)} Python sources found, too few to train and to hold out")
    return sorted(sources, key=lambda s: s.path)


def fingerprint(sources: list[Source]) -> str:
    """SHA-256 over paths and texts: two runs with the same value trained on the same bytes."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.path}\0{source.size}\0".encode() + source.text.encode())
    return digest.hexdigest()


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly ``vocab_size`` tokens, all 256 bytes and ``END`` among them. No normaliser and nothing added
    around the text, so every string of Unicode text comes back from ``decode(encode(s))`` unchanged."""
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size or tokenizer.token_to_id(END) != END_ID:
        raise ValueError(f"tokenizer has {tokenizer.get_vocab_size()} tokens, wanted {vocab_size}")
    return tokenizer


def encode_files(tokenizer: Tokenizer, sources: list[Source]) -> list[torch.Tensor]:
    """One int16 tensor per file: ``END``, then the file's tokens."""
    encodings = tokenizer.encode_batch([s.text for s in sources])
    return [torch.tensor([END_ID, *e.ids], dtype=torch.int16) for e in encodings]


def batches(files: list[torch.Tensor], rows: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 batches ``[rows, context + 1]``. Each epoch shuffles the files, joins them, cuts the stream at a random phase into
    windows (each shares one token with the next, as input there and target here) and shuffles these. Depends on ``seed`` alone."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(files), generator=rng).tolist()
        phase = int(torch.randint(context, (), generator=rng))
        windows = torch.cat([files[i] for i in order])[phase:].unfold(0, context + 1, context)
        for chosen in torch.randperm(len(windows), generator=rng).split(rows):
            if len(chosen) == rows:
                yield windows[chosen].long()
