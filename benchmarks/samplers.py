"""Who samples in `suite_sampling.py`: the engine and its peers, each as a function of logits [R, V] for one set of controls."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import kernels

TEMPERATURE = 0.8
Sample = Callable[[Tensor], object]


@dataclass(frozen=True)
class Controls:
    """Of every row; temperature 0 is greedy."""

    temperature: float = TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def ours(controls: Controls, rows: int, device: torch.device, backend: str = "auto", **more: Any) -> Sample:
    """The engine's op; each call draws for the next position. On a GPU its memory is kept between calls, as the engine keeps it."""
    ops = kernels.select(device.type, backend)
    workspace: Any = None

    def floats(value: float) -> Tensor:
        return torch.full((rows,), value, device=device)

    position = torch.zeros(rows, dtype=torch.int32, device=device)
    stream = torch.arange(rows, dtype=torch.int32, device=device)
    top_k = torch.full_like(position, controls.top_k)
    given = (floats(controls.temperature), top_k, floats(controls.top_p), floats(controls.min_p), torch.full_like(stream, 7).long())

    def sample(logits: Tensor) -> object:
        nonlocal workspace
        if workspace is None and logits.is_cuda:
            module = importlib.import_module(f"engine.kernels.{ops.chosen['sample']}")
            workspace = module.Workspace(rows, logits.shape[1], device, more.get("logprobs") or 0)
        position.add_(1)
        return ops.sample(logits, *given, position, stream, workspace=workspace, **more)

    return sample


def usual_chain(controls: Controls) -> Sample:
    """What most PyTorch code does: every filter writes a row of -inf, then softmax and multinomial over the whole vocabulary."""

    def sample(logits: Tensor) -> object:
        z = logits.float() / controls.temperature
        if controls.top_k:
            z = z.masked_fill(z < z.topk(controls.top_k, dim=1).values[:, -1:], -torch.inf)
        if controls.top_p < 1:
            ordered, index = z.sort(dim=1, descending=True)
            mass = ordered.softmax(dim=1)
            drop = mass.cumsum(dim=1) - mass >= controls.top_p
            z = z.scatter(1, index, ordered.masked_fill(drop, -torch.inf))
        if controls.min_p > 0:
            p = z.softmax(dim=1)
            z = z.masked_fill(p < controls.min_p * p.amax(dim=1, keepdim=True), -torch.inf)
        return z.softmax(dim=1).multinomial(1)

    return sample


def top_k_first(controls: Controls) -> Sample | None:
    """The honest baseline: everything after top-k sees k values only. None without top-k."""
    if not controls.top_k:
        return None

    def sample(logits: Tensor) -> object:
        z, index = logits.float().topk(controls.top_k, dim=1)
        p = (z / controls.temperature).softmax(dim=1)
        if controls.top_p < 1:
            p = p.masked_fill(p.cumsum(dim=1) - p >= controls.top_p, 0)
        if controls.min_p > 0:
            p = p.masked_fill(p < controls.min_p * p[:, :1], 0)
        return index.gather(1, p.multinomial(1))

    return sample


def transformers_warpers(controls: Controls) -> Sample:
    from transformers.generation import logits_process as hf

    warpers = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(controls.temperature)])
    if controls.top_k:
        warpers.append(hf.TopKLogitsWarper(controls.top_k))
    if controls.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(controls.top_p))
    if controls.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(controls.min_p))

    def sample(logits: Tensor) -> object:
        return warpers(None, logits.float()).softmax(dim=1).multinomial(1)

    return sample


def llama_cpp(controls: Controls, rows: int, vocab: int) -> Sample | None:
    """llama.cpp's chain of samplers in its own order, a row at a time in each of as many threads as torch has. None where llama-cpp-python
    is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    from llama_cpp import llama_cpp as lib

    def chain() -> Any:
        made = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if controls.top_k:
            lib.llama_sampler_chain_add(made, lib.llama_sampler_init_top_k(controls.top_k))
        if controls.top_p < 1:
            lib.llama_sampler_chain_add(made, lib.llama_sampler_init_top_p(controls.top_p, 1))
        if controls.min_p > 0:
            lib.llama_sampler_chain_add(made, lib.llama_sampler_init_min_p(controls.min_p, 1))
        lib.llama_sampler_chain_add(made, lib.llama_sampler_init_temp(controls.temperature))
        lib.llama_sampler_chain_add(made, lib.llama_sampler_init_dist(7))
        return made

    threads = min(torch.get_num_threads(), rows)
    entry = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    workers = []
    for _ in range(threads):
        data = np.zeros(vocab, entry)
        pointer = ctypes.cast(data.ctypes.data, lib.llama_token_data_p)
        workers.append((chain(), data, pointer, np.arange(vocab, dtype=np.int32)))
    pool = ThreadPoolExecutor(threads)

    def part(worker: int, logits: np.ndarray) -> list[int]:
        sampler, data, pointer, ids = workers[worker]
        tokens = []
        for row in logits[worker::threads]:
            data["id"], data["logit"] = ids, row  # the chain sorts the entries where they are
            candidates = lib.llama_token_data_array(pointer, vocab, -1, False)
            lib.llama_sampler_apply(sampler, ctypes.byref(candidates))
            tokens.append(candidates.data[candidates.selected].id)
        return tokens

    def sample(logits: Tensor) -> object:
        return list(pool.map(part, range(threads), [logits.numpy()] * threads))

    return sample


def flashinfer(controls: Controls) -> Sample | None:
    """FlashInfer's kernels for these controls, on a GPU. None where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer import sampling

    def sample(logits: Tensor) -> object:
        z = logits.float() / controls.temperature
        if controls.top_k and controls.top_p < 1:
            return sampling.top_k_top_p_sampling_from_logits(z, controls.top_k, controls.top_p)
        if not controls.top_k and controls.top_p == 1 and controls.min_p == 0:
            return sampling.sampling_from_logits(z)
        p = z.softmax(dim=1)
        if controls.top_k:
            return sampling.top_k_sampling_from_probs(p, controls.top_k)
        if controls.top_p < 1:
            return sampling.top_p_sampling_from_probs(p, controls.top_p)
        return sampling.min_p_sampling_from_probs(p, controls.min_p)

    return sample


def peers(controls: Controls, rows: int, vocab: int, device: torch.device) -> dict[str, Sample]:
    """Those that are there."""
    if controls.temperature == 0:
        return {"argmax of torch": lambda logits: logits.argmax(dim=1)}
    found: dict[str, Sample | None] = {
        "top-k first": top_k_first(controls),
        "llama.cpp": llama_cpp(controls, rows, vocab) if device.type == "cpu" else None,
        "FlashInfer": flashinfer(controls) if device.type == "cuda" else None,
        "usual chain": usual_chain(controls),
        "transformers": transformers_warpers(controls),
    }
    return {name: sample for name, sample in found.items() if sample is not None}
