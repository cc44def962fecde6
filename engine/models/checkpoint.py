"""Tensors of checkpoint files by name, memory-mapped where the format allows: opening reads nothing, and pages are shared and evictable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .weights import clean_name

# Where a folder's weights may lie, the preferred first; an index names the shards.
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
PICKLED = (".bin", ".pth", ".pt")


class SafetensorsTensors(Mapping[str, Tensor]):
    """Tensors of safetensors files by clean name, as views of the memory-mapped files.

    Args:
        files: the shards.
        keep: False opens a file anew for each tensor, so that its pages leave memory with the tensor: for callers that convert each.
    """

    def __init__(self, files: list[Path], *, keep: bool) -> None:
        self._place: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            _check_file(file)
            handle = _open_safetensors(file)
            for name in handle.keys():  # noqa: SIM118 - a safe_open handle is no dict
                clean = clean_name(name)
                if clean in self._place:
                    raise ValueError(f"tensor {clean} is in {self._place[clean][0].name} and again in {file.name} as {name}")
                self._place[clean] = (file, name)
            if keep:
                self._open[file] = handle

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._place[name]
        handle = self._open.get(file)
        return (_open_safetensors(file) if handle is None else handle).get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def open_tensors(files: list[Path], *, keep: bool = True) -> Mapping[str, Tensor]:
    """Tensors of the shards ``files`` by clean name; all safetensors, or all written by ``torch.save``.

    Raises ``ValueError`` for a file that is empty, broken, of another kind, or holds something else than named tensors.
    """
    if files[0].suffix == ".safetensors":
        return SafetensorsTensors(files, keep=keep)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _load_pickled(file).items():
            clean = clean_name(name)
            if clean in tensors:
                raise ValueError(f"tensor {clean} is in {file.name} as {name} and already known under another name")
            tensors[clean] = tensor
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights. ``FileNotFoundError`` where there are none or a shard is absent."""
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return _shards(path) if name.endswith(".json") else [path]
    others = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLED) and p.is_file())
    if len(others) == 1:
        return others
    found = f"; it holds {', '.join(p.name for p in others)}" if others else ""
    raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}{found}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file name")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards in {index.name}: {', '.join(missing[:5])}"
        )
    return [index.parent / shard for shard in shards]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ``ValueError`` if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _check_file(path: Path) -> None:
    """Name the two broken downloads that otherwise end in a format error."""
    with path.open("rb") as f:
        start = f.read(32)
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself; fetch it with git lfs pull")


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """What ``torch.save`` wrote, without running anything from the file."""
    _check_file(path)
    # Only the zip format can be mapped; it starts like any zip.
    with path.open("rb") as f:
        mappable = f.read(2) == b"PK"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # pickle, zip and torch each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a readable state dict: {reason}") from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f" with keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) and state else ""
        raise ValueError(f"{path} holds a {type(state).__name__}{keys}, not named tensors; save model.state_dict() itself")
    return state
