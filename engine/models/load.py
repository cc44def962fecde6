"""``load``: a live model, a folder, a checkpoint file or a hub id becomes a Transformer over that source's own tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.registry import Ops, backends, select
from ..parallel import Parallel
from . import origin
from .checkpoint import PICKLED, open_tensors, read_json, weight_files
from .config import ModelConfig
from .families import FAMILIES, find_family
from .readers import read_token_id, read_token_ids, weight_dtype
from .shard import Shard
from .transformer import Transformer
from .weights import WEIGHTS, Assembler, Names, clean_name

logger = logging.getLogger("engine.models")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, and where its tokenizer lies."""

    model: Transformer
    config: ModelConfig  # of the whole model, also where ``model`` is a rank's part of it
    tokenizer_path: Path | None  # a folder with a tokenizer.json
    name: str


def load(
    source: Any,
    *,
    ops: Ops | Callable[[str], Ops] | None = None,
    dtype: torch.dtype | str | None = None,
    max_position: int | None = None,
    origin_config: Any = None,
    weights: str | None = None,
    device: torch.device | str | None = None,
    parallel: Parallel | None = None,
) -> LoadedModel:
    """Make a Transformer of a model.

    Args:
        source: one of

            * a live model of transformers or of the origin's class, on one device: parameters are shared, so changes in place are seen;
            * a folder with ``config.json`` and safetensors or ``pytorch_model.bin``, whole or in shards: memory-mapped;
            * a checkpoint file (.pth, .pt, .bin, .safetensors) of the origin model: memory-mapped;
            * the id of a model on the Hugging Face hub.

            A mapped file must not be overwritten while it is in use (replacing it by a rename is safe).
        ops: the kernels, or what gives them for a type of device; default: the fastest for the device.
        dtype: convert the weights, tensor by tensor, to float32, bfloat16 or float16; default: as stored.
        max_position: shorten the RoPE tables, and so the longest sequence; default: the model's own.
        origin_config: for a bare origin checkpoint, what its shapes do not tell (``n_heads``, ``max_seq_len``, ``norm_eps``), as a
            mapping or the origin's config object.
        weights: how matrices are kept:

            * "shared": as they are, read where they lie: in the live model, in the mapped file, or on the GPU that it was loaded to;
            * "packed" (CPU only): an own copy in the order in which the C++ kernels stream them, which makes batches cheaper;
            * "int8", "int4": an own copy, quantised per output channel and per group of 32 inputs (``kernels.pack``,
              ``kernels.quantize``);
            * "fp8" (GPU only): likewise in float8_e4m3fn, per output channel.

            Default: "shared" for a live model, on a GPU, and where the C++ kernels cannot run; else "packed". A mapped file is read once
            for a copy and its memory given back; a live model's own tensors stay alive beside the copy for as long as their owner keeps
            them.
        device: "cpu" or "cuda" (with a number or without), where a model given by path or id goes, tensor by tensor; default: a GPU if
            there is one that Triton's kernels run on, else the CPU. A live model's own device is the only one that it may name.
        parallel: the ranks that share the model; each loads its part (``shard.Shard``) of a source that all have.

    Raises:
        ValueError: a model, config, dtype or checkpoint that is not supported or contradicts itself, by name.
        FileNotFoundError: a path or a part of a folder that is not there.
        TypeError: a source of another kind.
    """
    target = None if dtype is None else weight_dtype("dtype", dtype)
    wanted = None if device is None else _device(device)
    tokenizer_path: Path | None = None
    if isinstance(source, nn.Module):
        config, names, tensors, name = _live(source)
        place = _live_device(tensors, name, wanted)
        tokenizer_path = _tokenizer_folder(getattr(getattr(source, "config", None), "_name_or_path", "") or "")
        if target is not None and any(tensor.dtype != target for tensor in tensors.values()):
            logger.warning("%s: converted to %s, so its weights are a copy; later changes to the model are not seen", name, target)
    elif isinstance(source, (str, os.PathLike)):
        place = wanted or _device("cpu" if backends("cuda")["triton"] is not None else "cuda")
        path = Path(source).expanduser()
        name = path.resolve().name if path.is_dir() else path.stem
        if not path.exists():
            name = os.fspath(source)
            path = _from_hub(name)
        mapped = place.type == "cpu"
        config, names, tensors = _folder(path, target, mapped) if path.is_dir() else _file(path, target, mapped, origin_config)
        tokenizer_path = _tokenizer_folder(path if path.is_dir() else path.parent)
    else:
        raise TypeError(f"model is a {type(source).__name__}; it must be a torch.nn.Module, a path or a hub id")

    if weights is not None and weights not in WEIGHTS[place.type]:
        raise ValueError(f"weights is {weights!r}; on {place.type} it must be None or one of {', '.join(WEIGHTS[place.type])}")
    if max_position is not None:
        if not 1 <= max_position <= config.max_position:
            raise ValueError(f"max_position is {max_position}; it must lie between 1 and the model's {config.max_position}")
        config = replace(config, max_position=max_position)
    if not isinstance(ops, Ops):
        ops = (ops or select)(place.type)
    if weights is None:
        weights = "shared" if isinstance(source, nn.Module) or ops.chosen["linear"] != "cpu" else "packed"
    shard = None if parallel is None else Shard(parallel.rank, parallel.size)
    if shard is not None:
        shard.config(config)  # may refuse, before anything is read
        if isinstance(source, nn.Module) and weights == "shared":
            logger.warning("%s: some matrices of this rank's part are copies, so later changes to the model are not seen in all", name)
    built = Assembler(config, names, tensors, name, target, place, weights, shard).build()
    stored = tensors[f"{names.embedding}.weight"].dtype
    config = replace(config, tied_head=built.head is built.embedding, dtype=target or stored)
    own = config if shard is None else shard.config(config)
    return LoadedModel(Transformer(own, built, ops, parallel), config, tokenizer_path, name)


def _device(device: torch.device | str) -> torch.device:
    """A device to load to; of CUDA's the current one if it names none."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in WEIGHTS:
        raise ValueError(f"device is {str(device)!r}; it must be one of {', '.join(WEIGHTS)}, with a number or without, or None")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {str(device)!r}, and torch finds no CUDA GPU")
        return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    return torch.device("cpu")


def _live_device(tensors: Mapping[str, Tensor], name: str, wanted: torch.device | None) -> torch.device:
    """The one device of a live model; ``ValueError`` if it has several, one that no kernel runs on, or another than wanted."""
    first, tensor = next(iter(tensors.items()))
    for other, parameter in tensors.items():
        if parameter.device != tensor.device:
            raise ValueError(
                f"model {name} must lie on one device, and {first} is on {tensor.device} while {other} is on {parameter.device}"
            )
    if tensor.device.type not in WEIGHTS:
        raise ValueError(f"model {name} is on device {tensor.device}; it must be on one of {', '.join(WEIGHTS)}")
    if wanted is not None and wanted != tensor.device:
        raise ValueError(f"device is {wanted} and model {name} is on {tensor.device}; move the model there, or give no device")
    return tensor.device


def _live(model: nn.Module) -> tuple[ModelConfig, Names, Mapping[str, Tensor], str]:
    """Config, names, parameters and class name of a live model. Parameters themselves, not detached views: an optimiser or ``.to()`` that
    gives one new storage is then followed."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    name = type(model).__name__
    if origin.is_origin_model(model):
        config, names = origin.config_from_model(model), origin.NAMES
    else:
        settings: Any = getattr(model, "config", None)
        if not hasattr(settings, "model_type"):
            families = ", ".join(FAMILIES)
            raise ValueError(f"model is a {name}, which has no config.model_type and not the origin's parts; known families: {families}")
        family = find_family(settings.model_type, tuple(cls.__name__ for cls in type(model).__mro__))
        generation = getattr(model, "generation_config", None)
        config = _with_generation(family.read_config(settings.to_dict()), {} if generation is None else generation.to_dict())
        names = family.names
    tensors = {clean_name(key): parameter for key, parameter in model.named_parameters(remove_duplicate=False)}
    return config, names, tensors, name


def _folder(path: Path, dtype: torch.dtype | None, mapped: bool) -> tuple[ModelConfig, Names, Mapping[str, Tensor]]:
    if not (path / "config.json").is_file():
        files = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED)
        hint = f"; to load an origin checkpoint pass the file itself, e.g. {path / files[0]}" if files else ""
        raise FileNotFoundError(f"{path} has no config.json{hint}")
    raw = read_json(path / "config.json")
    family = find_family(raw.get("model_type"), tuple(raw.get("architectures") or ()))
    config = family.read_config(raw)
    if (path / "generation_config.json").is_file():
        config = _with_generation(config, read_json(path / "generation_config.json"))
    return config, family.names, open_tensors(weight_files(path), keep=mapped and dtype in (None, config.dtype))


def _file(path: Path, dtype: torch.dtype | None, mapped: bool, origin_config: Any) -> tuple[ModelConfig, Names, Mapping[str, Tensor]]:
    if path.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"{path} is no checkpoint: expected a folder, or a file ending in .safetensors, {', '.join(PICKLED)}")
    tensors = open_tensors([path], keep=mapped and dtype is None)
    if not origin.is_origin_state(tensors):
        shown = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"{path} is not a checkpoint of the origin model (it holds {shown} ...); pass the folder that holds its config.json"
        )
    config = origin.config_from_tensors(tensors, origin_config)
    if origin_config is None:
        logger.warning(
            "%s: its shapes do not tell n_heads, max_seq_len and norm_eps; taken to be %d, %d and %g (origin_config= says otherwise)",
            path.name, config.num_heads, config.max_position, config.norm_eps,
        )  # fmt: skip
    return config, origin.NAMES, tensors


def _with_generation(config: ModelConfig, generation: Mapping[str, Any]) -> ModelConfig:
    """The special tokens of ``generation_config.json`` where it gives them: for chat models it lists more ends than ``config.json``."""
    changes: dict[str, Any] = {}
    if eos := read_token_ids(generation, "eos_token_id"):
        changes["eos_token_ids"] = eos
    for key in ("bos_token_id", "pad_token_id"):
        if (token := read_token_id(generation, key)) is not None:
            changes[key] = token
    return replace(config, **changes)


def _tokenizer_folder(folder: str | Path) -> Path | None:
    return Path(folder) if str(folder) and (Path(folder) / "tokenizer.json").is_file() else None


def _from_hub(source: str) -> Path:
    """The local snapshot of a hub id, fetched if need be; ``FileNotFoundError`` if that is not what ``source`` is."""
    owner, slash, repository = source.partition("/")
    if not (slash and owner.strip(".~") and repository and "/" not in repository and not source.endswith((*PICKLED, ".safetensors"))):
        raise FileNotFoundError(f"{source!r} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{source!r} does not exist; to fetch it from the Hugging Face hub, install huggingface_hub") from None
    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["*.json", "*.bin"])
    except Exception as error:  # network, permissions, unknown ids: each its own type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{source!r} does not exist, and the Hugging Face hub did not give it: {reason}") from error
    return folder
