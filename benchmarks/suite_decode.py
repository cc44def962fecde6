"""Decode tokens per second beside each model's own `generate`, in the same run on the same weights and tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Machine, interleaved, seconds_of, summary, table
from models.origin_model import OriginConfig
from models.origin_model import Transformer as OriginTransformer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StoppingCriteria

import engine
from engine import Decoder
from engine.kernels import limits
from engine.kv_cache import block_bytes

PROMPT = 128
CACHE_BYTES = 64 << 20  # more than any cache of the machines this runs on holds


class Clock(StoppingCriteria):
    """Notes when transformers has drawn each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def transformers_rate(model: Any, prompts: torch.Tensor, new: int) -> Callable[[], float]:
    """Tokens per second after the first token, whole batch."""

    def run() -> float:
        clock = Clock()
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, stopping_criteria=[clock],
        )  # fmt: skip
        return prompts.shape[0] * (new - 1) / (clock.times[-1] - clock.times[0])

    return run


def engine_rate(decoder: Decoder, prompts: torch.Tensor, new: int) -> Callable[[], float]:
    def run() -> float:
        outputs = decoder.generate(prompts, max_new_tokens=new, ignore_eos=True)
        first = max(o.metrics.time_to_first_token or 0.0 for o in outputs)
        last = max(o.metrics.total_time for o in outputs)
        return len(outputs) * (new - 1) / (last - first)

    return run


def step_bytes(decoder: Decoder, batch: int, context: float) -> float:
    """Bytes a decode step must read: the weights once, and each sequence's keys and values."""
    c = decoder.config
    return decoder.model.bytes_per_step + batch * context * block_bytes(c.num_layers, c.num_kv_heads, c.head_dim, 1, decoder.cache.dtype)


def shape_s(dtype: torch.dtype) -> LlamaForCausalLM:
    """The random 100 M model: hidden 768, 12 layers, 12 heads, 4 KV heads, FFN 2048, vocabulary 32000, tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def run(machine: Machine, quick: bool) -> dict[str, Any]:
    new = 32 if quick else 128
    rounds = 1 if quick else 2
    bundled = AutoModelForCausalLM.from_pretrained(Path(engine.__file__).parent / "bundled" / "target", dtype=torch.float32).eval()
    models: list[tuple[str, Callable[[], Any], tuple[int, ...]]] = [
        ("bundled float32", lambda: bundled, (1, 8)),
        ("bundled bfloat16", lambda: bundled.to(torch.bfloat16), (1, 8)),
        ("S float32", lambda: shape_s(torch.float32), (1, 8) if quick else (1, 8, 32)),
        ("S bfloat16", lambda: shape_s(torch.bfloat16), (1, 8)),
    ]
    results = []
    with tqdm(total=2 * rounds * sum(len(batches) for *_, batches in models), desc="decode", disable=None, leave=False) as progress:
        for name, make, batches in models:
            model = make()
            decoder = Decoder(model, cache_tokens=(PROMPT + new + 16) * max(batches), max_batch_tokens=512)
            for batch in batches:
                torch.manual_seed(1)
                prompts = torch.randint(3, decoder.config.vocab_size, (batch, PROMPT))
                contenders = {"ours": engine_rate(decoder, prompts, new), "transformers": transformers_rate(model, prompts, new)}
                rates = interleaved(contenders, rounds, progress)
                ours, theirs = summary(rates["ours"]), summary(rates["transformers"])
                needed = step_bytes(decoder, batch, PROMPT + new / 2)
                # What fits a cache is held against reading as many bytes from that cache.
                bandwidth = limits.read_bandwidth(int(needed)) if needed < CACHE_BYTES else machine.read_bandwidth
                results.append(
                    {
                        "model": name, "batch": batch, "tokens_per_second": ours, "transformers_tokens_per_second": theirs,
                        "ratio": ours["median"] / theirs["median"], "step_bytes": needed,
                        "bandwidth_share": needed * ours["median"] / batch / bandwidth,
                    }
                )  # fmt: skip
    table(
        f"decode: tokens/s, prompt {PROMPT}, {new} new tokens, greedy",
        ["model", "batch", "tokens/s", "of read limit", "transformers", "ratio"],
        [
            [
                r["model"],
                str(r["batch"]),
                f"{r['tokens_per_second']['median']:.1f}",
                f"{r['bandwidth_share']:.0%}",
                f"{r['transformers_tokens_per_second']['median']:.1f}",
                f"{r['ratio']:.2f}",
            ]
            for r in results
        ],
    )
    return {"transformers": results, "origin": origin(rounds, quick)}


def origin(rounds: int, quick: bool) -> dict[str, Any]:
    """The origin model in its published 215 M shape against its own `generate_super`, which rereads the whole sequence for each token."""
    torch.manual_seed(0)
    model = OriginTransformer(OriginConfig(dim=1024, n_layers=18)).eval()
    decoder = Decoder(model, cache_tokens=512)
    ids = torch.randint(3, 6144, (1, 64))
    new = 8 if quick else 64
    # Its own "greedy" draws at temperature 1; below 0.1 it takes the best, as it documents.
    theirs = lambda: new / seconds_of(lambda: model.generate_super(ids, max_new_tokens=new, temperature=0.05))  # noqa: E731
    ours = lambda: new / seconds_of(lambda: decoder.generate_super(ids, max_new_tokens=new))  # noqa: E731
    rates = interleaved({"ours": ours, "origin": theirs}, rounds)
    result = {"tokens_per_second": summary(rates["ours"]), "origin_tokens_per_second": summary(rates["origin"])}
    result["ratio"] = result["tokens_per_second"]["median"] / result["origin_tokens_per_second"]["median"]  # type: ignore[assignment]
    table(
        f"origin model, 215 M float32, prompt 64, {new} new tokens, prefill included",
        ["", "tokens/s", "ratio"],
        [
            ["ours", f"{result['tokens_per_second']['median']:.2f}", f"{result['ratio']:.1f}"],
            ["its generate_super", f"{result['origin_tokens_per_second']['median']:.2f}", "1"],
        ],
    )
    return result
