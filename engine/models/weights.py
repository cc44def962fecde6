"""The tensors of a Transformer, and fitting a checkpoint's tensors to a config: names, shapes, dtypes, packing."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels import HugePages, PackedWeight, QuantizedWeight, pack, quantize
from .config import ModelConfig
from .readers import WEIGHT_DTYPES
from .shard import Shard

logger = logging.getLogger("engine.models")

SHOWN = 5  # tensor names listed per kind of mismatch
# How matrices are kept, by type of device: as they are (read where their owner has them, if that is the device), or as an own copy in the
# kernels' order, as they are or quantised.
WEIGHTS = {"cpu": ("shared", "packed", "int8", "int4"), "cuda": ("shared", "int8", "int4", "fp8")}

Matrix = Tensor | PackedWeight | QuantizedWeight  # [out, in]


@dataclass(frozen=True)
class LayerWeights:
    """One layer. ``qkv`` and ``gate_up`` hold one matrix (a fused checkpoint) or one per part, in that order."""

    attention_norm: Tensor  # [H]
    qkv: tuple[Matrix, ...]  # rows: num_heads * D, num_kv_heads * D, num_kv_heads * D
    qkv_bias: tuple[Tensor, ...] | None
    out: tuple[Matrix, ...]  # one, [H, num_heads * D]
    out_bias: tuple[Tensor, ...] | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    ffn_norm: Tensor  # [H]
    gate_up: tuple[Matrix, ...]  # rows: F, F
    gate_up_bias: tuple[Tensor, ...] | None
    down: tuple[Matrix, ...]  # one, [H, F]
    down_bias: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class ModelWeights:
    """All tensors of a model. ``head is embedding`` where the head is tied; an embedding of its own is never packed."""

    embedding: Matrix  # [V, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    head: Matrix  # [V, H]


@dataclass(frozen=True)
class Names:
    """How a checkpoint calls its tensors, without ``.weight`` and ``.bias``; ``{i}`` stands for the layer."""

    embedding: str
    final_norm: str
    head: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    ffn_norm: str
    gate_up: tuple[str, ...]
    down: str
    q_norm: str = ""
    k_norm: str = ""
    ignored: str = r"(?!)"  # regular expression of tensors that hold nothing to load: tables, masks


def expected_shapes(config: ModelConfig, names: Names) -> dict[str, tuple[int, ...]]:
    """Full name and shape of every tensor a checkpoint of this config holds."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def matrix(stem: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{stem}.weight"] = (rows, columns)
        if bias:
            shapes[f"{stem}.bias"] = (rows,)

    matrix(names.embedding, config.vocab_size, hidden, False)
    for i in range(config.num_layers):
        shapes[names.attention_norm.format(i=i) + ".weight"] = (hidden,)
        rows = [queries, keys, keys] if len(names.qkv) == 3 else [queries + 2 * keys]
        for stem, n in zip(names.qkv, rows, strict=True):
            matrix(stem.format(i=i), n, hidden, config.qkv_bias)
        if config.qk_norm:
            shapes[names.q_norm.format(i=i) + ".weight"] = (config.head_dim,)
            shapes[names.k_norm.format(i=i) + ".weight"] = (config.head_dim,)
        matrix(names.out.format(i=i), hidden, queries, config.out_bias)
        shapes[names.ffn_norm.format(i=i) + ".weight"] = (hidden,)
        for stem in names.gate_up:
            matrix(stem.format(i=i), 2 * ffn // len(names.gate_up), hidden, config.mlp_bias)
        matrix(names.down.format(i=i), hidden, ffn, config.mlp_bias)
    shapes[f"{names.final_norm}.weight"] = (hidden,)
    matrix(names.head, config.vocab_size, hidden, False)
    return shapes


class Assembler:
    """Takes the tensors of one checkpoint, checks each, and builds ``ModelWeights``.

    Args:
        config, names: what to expect.
        tensors: by clean name (``clean_name``); only looked up by name, so a lazy mapping reads nothing too early.
        where: words for messages, e.g. the path.
        dtype: convert every tensor to it, one at a time; None keeps each as it is, in its owner's storage.
        device: where they go, one at a time; those that are there already stay in their owner's storage.
        weights: of ``WEIGHTS``, what becomes of the matrices.
        shard: which part of the model to build; None: all of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        names: Names,
        tensors: Mapping[str, Tensor],
        where: str,
        dtype: torch.dtype | None,
        device: torch.device,
        weights: str,
        shard: Shard | None = None,
    ) -> None:
        self._config, self._names, self._tensors, self._where, self._dtype = config, names, tensors, where, dtype
        self._device, self._weights, self._shard = device, weights, shard
        self._memory = HugePages()
        self._progress: tqdm[object] | None = None

    def build(self) -> ModelWeights:
        """The weights. ``ValueError`` lists missing, unknown and misshapen tensors, or names one whose dtype cannot be read."""
        shapes = expected_shapes(self._config, self._names)
        head = f"{self._names.head}.weight"
        if self._config.tied_head and head not in self._tensors:
            del shapes[head]
        self._check(shapes)
        # Nothing is read yet from a memory-mapped file, so a bar appears only where a conversion takes its time.
        with tqdm(total=len(shapes), desc=f"loading {self._where}", unit="tensor", delay=1.0, disable=None, leave=False) as self._progress:
            vocabulary = None if self._shard is None else self._shard.vocabulary(self._config.vocab_size)
            embedding = self._weight(self._names.embedding, vocabulary)
            tied = self._head_is_embedding()
            packed = self._pack(embedding if tied else self._weight(self._names.head, vocabulary), self._names.head)
            layers = tuple(self._layer(i) for i in range(self._config.num_layers))
            return ModelWeights(packed if tied else embedding, layers, self._weight(self._names.final_norm), packed)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in shapes:
            if name in self._tensors:
                self._check_readable(name, self._tensors[name])
        found = {name: tuple(self._tensors[name].shape) for name in shapes if name in self._tensors}
        problems = [
            *_listed("missing", (f"{name} {list(shapes[name])}" for name in shapes if name not in found)),
            *_listed(
                "of another shape",
                (f"{name} expected {list(shapes[name])}, found {list(found[name])}" for name in found if found[name] != shapes[name]),
            ),
            *_listed(
                "unknown",
                (
                    f"{name} {list(self._tensors[name].shape)}"
                    for name in self._tensors
                    if name not in shapes and not re.fullmatch(self._names.ignored, name)
                ),
            ),
        ]
        if problems:
            raise ValueError(f"{self._where} does not hold a {self._config.family} model of its config: " + "; ".join(problems))

    def _check_readable(self, name: str, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise ValueError(f"{self._where}: {name} is a {type(tensor).__name__} ({tensor.layout}); only plain dense tensors can be read")
        convertible = self._dtype is not None and tensor.dtype == torch.float64
        if tensor.dtype not in WEIGHT_DTYPES.values() and not convertible:
            remedy = "pass dtype= to convert it" if tensor.dtype == torch.float64 else "quantised weights are not supported"
            raise ValueError(f"{self._where}: {name} has dtype {tensor.dtype}; allowed are {', '.join(WEIGHT_DTYPES)}; {remedy}")

    def _layer(self, i: int) -> LayerWeights:
        config, names, shard = self._config, self._names, self._shard
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        outputs = {names.qkv: (queries, keys, keys), names.gate_up: (config.ffn_size, config.ffn_size)}

        def cut(stems: tuple[str, ...]) -> list[tuple[str, slice | None]]:
            """The matrices of which a layer has outputs, and the rows that it has."""
            if shard is None:
                return [(stem.format(i=i), None) for stem in stems]
            return [(stems[m].format(i=i), rows) for m, rows in shard.parts(outputs[stems], len(stems))]

        def weights(stems: tuple[str, ...]) -> tuple[Matrix, ...]:
            parts = [(name, self._weight(name, rows)) for name, rows in cut(stems)]
            if len({part.dtype for _, part in parts}) > 1:
                found = ", ".join(f"{name} {part.dtype}" for name, part in parts)
                raise ValueError(f"{self._where}: these must have one dtype: {found}; pass dtype= to convert them")
            return tuple(self._pack(part, name) for name, part in parts)

        def biases(wanted: bool, stems: tuple[str, ...]) -> tuple[Tensor, ...] | None:
            return tuple(self._take(f"{name}.bias", rows) for name, rows in cut(stems)) if wanted else None

        def summed(stem: str, inputs: int) -> tuple[Matrix, ...]:
            """A matrix whose product all parts are summed to."""
            name = stem.format(i=i)
            return (self._pack(self._weight(name, columns=None if shard is None else shard.part(inputs)), name),)

        def added_once(wanted: bool, stem: str) -> tuple[Tensor, ...] | None:
            return (self._take(f"{stem.format(i=i)}.bias"),) if wanted and (shard is None or shard.rank == 0) else None

        return LayerWeights(
            attention_norm=self._weight(names.attention_norm.format(i=i)),
            qkv=weights(names.qkv),
            qkv_bias=biases(config.qkv_bias, names.qkv),
            out=summed(names.out, queries),
            out_bias=added_once(config.out_bias, names.out),
            q_norm=self._weight(names.q_norm.format(i=i)) if config.qk_norm else None,
            k_norm=self._weight(names.k_norm.format(i=i)) if config.qk_norm else None,
            ffn_norm=self._weight(names.ffn_norm.format(i=i)),
            gate_up=weights(names.gate_up),
            gate_up_bias=biases(config.mlp_bias, names.gate_up),
            down=summed(names.down, config.ffn_size),
            down_bias=added_once(config.mlp_bias, names.down),
        )

    def _head_is_embedding(self) -> bool:
        """Where the two are one tensor, or equal in a checkpoint that declares them tied and stores both."""
        name = f"{self._names.head}.weight"
        if name not in self._tensors:
            return True
        head, source = self._tensors[name], self._tensors[f"{self._names.embedding}.weight"]
        if head.data_ptr() == source.data_ptr() and head.dtype == source.dtype:  # both where the checkpoint has them
            return True
        if self._config.tied_head:
            if torch.equal(head, source):
                return True
            logger.warning("%s: its config ties the head to the embedding but the two tensors differ; both are used", self._where)
        return False

    def _pack(self, matrix: Tensor, stem: str) -> Matrix:
        if self._weights == "shared":
            return matrix
        try:
            if self._device.type != "cpu":
                return quantize(matrix, self._weights)
            return pack(matrix, None if self._weights == "packed" else self._weights, self._memory)
        except ValueError as error:
            raise ValueError(f"{self._where}: {stem}: {error}") from None

    def _weight(self, stem: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        return self._take(f"{stem}.weight", rows, columns)

    def _take(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """A tensor, or of it what a shard has: rows where they lie, columns as a copy."""
        tensor = self._tensors[name]
        if rows is not None:
            tensor = tensor.detach()[rows]
        if columns is not None:
            tensor = tensor.detach()[:, columns].contiguous()
        if tensor.device != self._device:
            tensor = tensor.detach().to(self._device)
        if self._dtype is not None and tensor.dtype != self._dtype:
            tensor = tensor.detach().to(self._dtype).contiguous()
        elif not tensor.is_contiguous():
            logger.warning("%s: %s is not contiguous and is copied; later changes to the original are not seen", self._where, name)
            tensor = tensor.detach().contiguous()
        if self._weights != "shared":  # norms and biases belong to the copy; an embedding of its own stays in its owner's storage
            tensor = tensor.detach().clone() if tensor.dim() == 1 else tensor.detach()
        if self._progress is not None:
            self._progress.update()
        return tensor


def _listed(kind: str, entries: Iterator[str]) -> list[str]:
    """One phrase counting the entries and showing the first few, or nothing."""
    found = list(entries)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"{len(found)} {kind}: {', '.join(found[:SHOWN])}{more}"] if found else []


def clean_name(name: str) -> str:
    """A tensor's name without what torch.compile (``_orig_mod.``) and data-parallel wrappers (leading ``module.``) add."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
