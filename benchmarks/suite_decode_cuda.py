"""Steps of decoding on a GPU: a random model of the shape of Llama 3 8B and one of 200 M parameters, in bfloat16, made on the device; ours
as it comes, deterministic, over quantised weights and over a cache of 8 bits, beside transformers' ``generate``, all in the same run.

A step is timed when all sequences decode and its graph has been captured. The limit is the time to read the weights once and the keys and
values of all sequences. This suite has never run. ``--quick`` has fewer layers and rounds, and not all variants.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from clock import Limits
from measure import Setting, summary, table
from peers.transformers import make_clock
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from engine import Decoder
from engine.kv_cache import block_bytes


@dataclass(frozen=True)
class Shape:
    name: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    batches: tuple[int, ...]

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, tie_word_embeddings=self.tied,
            max_position_embeddings=8192, rope_theta=500_000.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.02,
        )  # fmt: skip


LARGE = Shape("8B", 128_256, 4096, 14_336, 32, 32, 8, False, (1, 64))
SMALL = Shape("200M", 32_000, 1024, 2816, 16, 16, 4, True, (1,))
CONTEXT = 1024
OURS = "ours"
# What is decoded with -> options of the decoder; the first is what the others are compared with.
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {},
    "ours, deterministic": {"deterministic": True},
    "ours, int8 weights": {"weights": "int8"},
    "ours, int4 weights": {"weights": "int4"},
    "ours, fp8 weights": {"weights": "fp8"},
    "ours, fp8 cache": {"kv_dtype": torch.float8_e4m3fn},
}
QUICK = (OURS, "ours, deterministic", "ours, fp8 weights")
NEEDS_GPU = ("ours, fp8 weights", "ours, fp8 cache")


@dataclass(frozen=True)
class Length:
    """Of a measurement."""

    steps: int  # timed together
    rounds: int
    warm: int = 5  # steps before them, in which graphs are captured
    peer_steps: int = 12


def run(setting: Setting, shapes: tuple[Shape, ...] = (LARGE, SMALL), context: int = CONTEXT) -> dict[str, Any]:
    device, limits = torch.device(setting.device), setting.machine
    length = Length(16, 3) if setting.quick else Length(32, 5)
    names = [name for name in VARIANTS if (name in QUICK or not setting.quick) and (device.type == "cuda" or name not in NEEDS_GPU)]
    entries: list[dict[str, Any]] = []
    for shape in shapes:
        if setting.quick:
            shape = replace(shape, layers=min(shape.layers, 8))
        with on_device(shape, device) as model:
            for batch in shape.batches:
                entries += measure_case(model, shape, batch, context, names, length, limits)
    show(entries)
    judged = aims(entries)
    failed = [f"{e['model']}, batch {e['batch']}, {e['contender']}: {e['error']}" for e in entries if "error" in e]
    return {"entries": entries, "aims": judged, "errors": failed}


@contextlib.contextmanager
def on_device(shape: Shape, device: torch.device) -> Iterator[LlamaForCausalLM]:
    """The model with random weights, which is gone afterwards."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(shape.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    yield model
    del model
    tidy(device)


def tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_case(
    model: LlamaForCausalLM, shape: Shape, batch: int, context: int, names: list[str], length: Length, limits: Limits
) -> list[dict[str, Any]]:
    """An entry for each variant and for transformers; one that fails has the error."""
    prompts = torch.randint(3, shape.vocab, (batch, context), generator=torch.Generator().manual_seed(1)).tolist()
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda name=name: ours(model, prompts, VARIANTS[name], length, limits) for name in names
    }
    contenders["transformers"] = lambda: transformers(model, prompts, length)
    entries = []
    for name, one in tqdm(contenders.items(), desc=f"decode, {shape.name}, batch {batch}", disable=None, leave=False):
        entry: dict[str, Any] = {
            "model": shape.name, "layers": shape.layers, "batch": batch, "context": context, "contender": name,
        }  # fmt: skip
        try:
            entry |= one()
            entry["tokens_per_second"] = batch / entry["step_seconds"]["median"]
        except Exception as error:  # the others go on
            entry["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            tqdm.write(f"{shape.name}, batch {batch}, {name} fails: {entry['error']}")
        tidy(model.device)
        entries.append(entry)
    theirs = entries[-1].get("tokens", [])
    for entry in entries:
        tokens = entry.pop("tokens", [])
        if tokens and theirs:
            entry["agreement"] = agreement(tokens, theirs)
    return entries


def ours(model: LlamaForCausalLM, prompts: list[list[int]], options: dict[str, Any], length: Length, limits: Limits) -> dict[str, Any]:
    """Times of steps, and what they are held against."""
    batch, context = len(prompts), len(prompts[0])
    room = context + 64 + length.warm + length.steps * length.rounds
    decoder = Decoder(model, cache_tokens=batch * -(-room // 16) * 16, max_batch_size=batch, max_batch_tokens=8192, **options)
    device = decoder.model.device
    decoder.generate(prompts[:1], max_new_tokens=4, ignore_eos=True)  # compiles
    begin = time.perf_counter()
    # As of `generate`: no stream whose next token must not wait for prompts.
    submission = decoder.prepare(
        "generate()", prompts, None, None, {"max_new_tokens": room - context, "ignore_eos": True}, priority=0, timeout=None,
        cache_salt=None, streams=False,
    )  # fmt: skip
    decoder.loop.enqueue(submission.requests)
    while any(request.num_new_tokens < 1 for request in submission.requests):
        _step(decoder, submission)
    prompt_seconds = time.perf_counter() - begin
    for _ in range(length.warm):
        _step(decoder, submission)
    seconds, moved = [], []
    config, size = decoder.model.config, decoder.loop.cache.dtype
    of_token = block_bytes(config.num_layers, config.num_kv_heads, config.head_dim, 16, size) / 16
    for _ in range(length.rounds):
        wait(device)
        start = time.perf_counter()
        for _ in range(length.steps):
            _step(decoder, submission)
        wait(device)
        seconds.append((time.perf_counter() - start) / length.steps)
        moved.append(decoder.model.bytes_per_step + of_token * (sum(r.num_tokens for r in submission.requests) - batch * length.steps / 2))
    decoder.abort(submission)
    median = sorted(moved)[len(moved) // 2]
    found = summary(seconds)
    return {
        "step_seconds": found, "limit_share": limits.seconds(median) / found["median"], "bytes": median, "prompt_seconds": prompt_seconds,
        "runner": type(decoder.loop.runner).__name__, "chosen": decoder.ops.chosen,
        "tokens": [request.tokens[context:] for request in submission.requests],
    }  # fmt: skip


def _step(decoder: Decoder, submission: Any) -> None:
    decoder.step()
    for request in submission.requests:
        if request.finished:
            raise RuntimeError(f"a request has ended while it was timed: {request.outputs[0].error or request.outputs[0].finish_reason}")


def transformers(model: LlamaForCausalLM, prompts: list[list[int]], length: Length) -> dict[str, Any]:
    """The same through ``generate``."""
    ids = torch.tensor(prompts, device=model.device)

    def generate() -> tuple[list[tuple[float, int]], float, list[list[int]]]:
        clock, begin = make_clock(), time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length.peer_steps + 1, do_sample=False, pad_token_id=0,
            stopping_criteria=[clock],
        )  # fmt: skip
        return clock.marks, clock.marks[0][0] - begin, out[:, ids.shape[1] :].tolist()

    generate()  # what the first call pays for
    seconds: list[float] = []
    for _ in range(2):
        marks, prompt_seconds, tokens = generate()
        seconds += [(marks[-1][0] - marks[0][0]) / (len(marks) - 1)]
    return {"step_seconds": summary(seconds), "prompt_seconds": prompt_seconds, "tokens": tokens}


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """How much of the shorter of the two is the same, up to the first token of each sequence that is not."""
    same = total = 0
    for mine, its in zip(tokens, reference, strict=True):
        n = min(len(mine), len(its))
        same += next((i for i in range(n) if mine[i] != its[i]), n)
        total += n
    return same / total if total else 0.0


def show(entries: list[dict[str, Any]]) -> None:
    first = {(e["model"], e["batch"]): e for e in entries if e["contender"] == OURS and "step_seconds" in e}

    def cells(e: dict[str, Any]) -> list[str]:
        if "error" in e:
            return ["fails"] + 5 * ["-"]
        median, mine = e["step_seconds"]["median"], first.get((e["model"], e["batch"]))
        return [
            f"{median * 1e3:.3f}", f"{e['tokens_per_second']:.0f}", f"{e['limit_share']:.0%}" if "limit_share" in e else "-",
            f"{median / mine['step_seconds']['median']:.2f}" if mine else "-", f"{e['prompt_seconds']:.2f}",
            f"{e['agreement']:.0%}" if "agreement" in e else "-",
        ]  # fmt: skip

    table(
        "steps of decoding, bfloat16 (limit: reading weights, keys and values)",
        ["model", "batch x context", "", "ms", "tokens/s", "of limit", "x ours", "prompts s", "tokens as transformers'"],
        [[f"{e['model']}, {e['layers']} layers", f"{e['batch']} x {e['context']}", e["contender"], *cells(e)] for e in entries],
    )


def aims(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim with what the run reached; None where it has no number."""
    at = {(e["model"], e["batch"], e["contender"]): e for e in entries if "step_seconds" in e}

    def share(model: str, batch: int) -> float | None:
        entry = at.get((model, batch, OURS))
        return None if entry is None else entry["limit_share"]

    def ratio(model: str, batch: int, slower: str, faster: str = OURS) -> float | None:
        a, b = at.get((model, batch, slower)), at.get((model, batch, faster))
        return None if a is None or b is None else a["step_seconds"]["median"] / b["step_seconds"]["median"]

    wanted: list[tuple[str, str, float, float | None]] = []
    for batch, least, times in ((1, 0.85, 5.0), (64, 0.75, 10.0)):
        wanted.append((f"8B, batch {batch}: of the limit", ">=", least, share("8B", batch)))
        wanted.append((f"8B, batch {batch}: transformers / ours", ">=", times, ratio("8B", batch, "transformers")))
        wanted.append((f"8B, batch {batch}: deterministic / fast", "<=", 1.25, ratio("8B", batch, "ours, deterministic")))
    wanted.append(("200M, batch 1: transformers / ours", ">=", 10.0, ratio("200M", 1, "transformers")))
    judged = [
        {
            "aim": name, "bound": f"{sign} {bound:g}", "reached": value,
            "met": None if value is None else (value >= bound if sign == ">=" else value <= bound),
        }
        for name, sign, bound, value in wanted
    ]  # fmt: skip
    met = {None: "not measured", True: "yes", False: "no"}
    rows = [[a["aim"], a["bound"], "-" if a["reached"] is None else f"{a['reached']:.2f}", met[a["met"]]] for a in judged]
    table("aims (with the layers that the model has)", ["", "aim", "reached", ""], rows)
    return judged


def plot(results: dict[str, Any], out: Path) -> list[Path]:
    """Milliseconds of a step of every contender, with the limit of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((e["model"], e["batch"]) for e in results["entries"]))
    figure, axes = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4), layout="constrained", squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        entries = [e for e in results["entries"] if (e["model"], e["batch"]) == case and "step_seconds" in e]
        bars = axis.barh(range(len(entries)), [e["step_seconds"]["median"] * 1e3 for e in entries])
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
        for i, e in enumerate(entries):
            if "limit_share" in e:
                limit = e["limit_share"] * e["step_seconds"]["median"] * 1e3
                axis.plot([limit, limit], [i - 0.4, i + 0.4], color="black", lw=2, label="limit" if i == 0 else None)
        axis.set_yticks(range(len(entries)), [e["contender"] for e in entries], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel("ms per step")
        axis.set_title(f"{case[0]}, batch {case[1]}")
        axis.legend(fontsize=8)
    file = out.with_name(f"{out.stem}-steps.png")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return [file]
