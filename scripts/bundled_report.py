"""Measures the bundled pair as saved, samples from it with transformers, and writes ``metrics.json`` and ``README.md`` beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bundled_corpus import Source
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLE_PROMPTS = ('def read_lines(path, encoding="utf-8"):\n    ', "class Queue:\n    ")
POSITIONS = (256, 1024, 2048)


@torch.inference_mode()
def measure(models: dict[str, Any], files: list[Tensor], sources: list[Source], window: int) -> dict[str, Any]:
    """Held-out quality of ``models`` (``target`` and ``draft``: callables from tokens to logits), each file cut into windows of ``window``
    tokens that see nothing before them. Bits per byte = nats of all tokens of all files / ln 2 / bytes of all files."""
    nats = {name: torch.zeros(window, dtype=torch.float64) for name in models}
    count = torch.zeros(window, dtype=torch.float64)
    same = overlap = 0.0
    for file in files:
        for begin in range(0, len(file) - 1, window):
            tokens = file[begin : begin + window + 1].long()
            log_probs = {name: F.log_softmax(model(tokens[None, :-1])[0].float().cpu(), -1) for name, model in models.items()}
            count[: len(tokens) - 1] += 1
            for name, rows in log_probs.items():
                nats[name][: len(rows)] += -rows.gather(1, tokens[1:, None])[:, 0].double()
            target, draft = log_probs["target"], log_probs["draft"]
            same += (target.argmax(-1) == draft.argmax(-1)).sum().item()
            overlap += torch.minimum(target.exp(), draft.exp()).sum().item()
    size = sum(s.size for s in sources)
    result: dict[str, Any] = {"files": len(files), "bytes": size, "tokens": int(count.sum()), "window": window}
    for name, sums in nats.items():
        by_position, start = {}, 0
        for end in (p for p in POSITIONS if p <= window):
            by_position[f"{start}-{end}"] = round(float(sums[start:end].sum() / count[start:end].sum().clamp(min=1)), 4)
            start = end
        result[name] = {"bits_per_byte": round(float(sums.sum()) / math.log(2) / size, 4), "nats_per_token_by_position": by_position}
    result["draft_picks_the_targets_token"] = round(same / float(count.sum()), 4)
    result["overlap_of_distributions"] = round(overlap / float(count.sum()), 4)
    return result


def complete(folder: Path, prompt: str, new_tokens: int, seed: int | None = None) -> str:
    """The completion of ``prompt`` by the model in ``folder``, through transformers: greedy without a seed, otherwise at temperature 0.7,
    top-k 40."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed or 0)
    options: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.7, "top_k": 40}
    out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, **options)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_report(folder: Path, metrics: dict[str, Any], new_tokens: int) -> None:
    """``metrics.json`` and ``README.md`` in ``folder``; every number of the second is taken from the first."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    data, train, held, models = metrics["data"], metrics["training"], metrics["held_out"], metrics["models"]
    both = {key: data["train"][key] + data["held_out"][key] for key in ("files", "bytes")}
    sizes = {
        side: f"{data[side]['files']} files ({data[side]['bytes'] / 1e6:.2f} MB, {data[side]['tokens']:,} tokens)"
        for side in ("train", "held_out")
    }
    stages = ", then ".join(f"{s['context']} tokens from step {s['first_step']}" for s in train["stages"])
    length = f"{train['steps']} steps of {train['tokens_per_step']} tokens ({train['tokens'] / 1e6:.1f} M, {train['epochs']:.1f} epochs)"
    speed = f"{train['seconds'] / 60:.1f} minutes at {train['tokens_per_second']:,.0f} tokens per second on {train['device']}"
    soft = f"{train['soft_share']:.0%} the target's distribution and {1 - train['soft_share']:.0%} the text"
    rows = "".join(
        f"| {name} | {m['parameters']:,} | {m['hidden_size']} | {m['layers']} | {m['heads']} / {m['kv_heads']} | {m['ffn']} | "
        f"{m['folder_bytes'] / 1e6:.2f} MB | {held[name]['bits_per_byte']:.4f} |\n"
        for name, m in models.items()
    )
    columns = list(held["target"]["nats_per_token_by_position"])
    positions = "".join(
        f"| {name} | " + " | ".join(f"{v:.3f}" for v in held[name]["nats_per_token_by_position"].values()) + " |\n" for name in models
    )
    samples = "".join(
        f"\nSeed {seed}, temperature 0.7, top-k 40; the prompt ends at `▸`:\n\n"
        f"```python\n{prompt}▸{complete(folder / 'target', prompt, new_tokens, seed).rstrip()}\n```\n"
        for seed, prompt in enumerate(SAMPLE_PROMPTS, start=1)
    )
    text = f"""# The bundled pair

A target and a draft, small enough to ship, so that the engine's main job runs on real input with no download. Both are Hugging Face
folders (Llama layout, tied embeddings, bf16, one byte-level BPE tokenizer of {train["vocab_size"]} tokens) and open with transformers'
`AutoModelForCausalLM` and `AutoTokenizer`. They write Python, and only Python; they know little beyond its shapes.

| model | parameters | hidden | layers | heads / KV | FFN | folder | held-out bits per byte |
|---|---|---|---|---|---|---|---|
{rows}
`<|endoftext|>` (id 0) stands before every file and is bos, eos and pad; the tokenizer never adds it. Windows of up to
{train["positions"]} positions were trained.

## Data

The sources of the standard library of Python {data["python"]}: {both["files"]} files, {both["bytes"] / 1e6:.2f} MB, without tests,
generated tables and `lib2to3` (`scripts/bundled_corpus.py` has the list). The split is by file, about
one in twenty by a hash of the relative path:
{sizes["train"]} to train on, {data["train"]["bytes_per_token"]:.2f} bytes per token;
{sizes["held_out"]} held out. The tokenizer, too, saw the training files only. SHA-256 over paths and
texts of all: `{data["sha256"]}`.

The sources are © the Python Software Foundation and others, under the
[PSF licence, version 2](https://docs.python.org/3/license.html). The weights and the vocabulary are derived from them, and completions
may repeat short passages of them word for word.

## Training

    {train["command"]}

Seed {train["seed"]}, {length}, in windows of {stages}.
Muon for the matrices, AdamW for embeddings and norms; constant rate, then linear to zero over the last
{train["decay_fraction"]:.0%} of steps; fp32. The draft is distilled from the target during
the same run: its loss is the cross-entropy against a mixture of {soft}.
It took {speed}; allow an hour on two cores.
The same Python, seed and steps see the same batches in the same order; losses repeat up to the rounding of another machine's matrix
products.

## Held-out results

Every held-out file, in windows of {held["window"]} tokens that see nothing before them, bf16 weights, fp32 arithmetic:
target **{held["target"]["bits_per_byte"]:.4f}** and draft **{held["draft"]["bits_per_byte"]:.4f}** bits per byte.
The draft's most likely token is the target's for {held["draft_picks_the_targets_token"]:.1%} of positions, and the two distributions
overlap by {held["overlap_of_distributions"]:.1%} (the mean of Σ min(p, q), the highest acceptance that one sampled draft token can have).
Nats per token by position in the window:

| model | {" | ".join(columns)} |
|---|{"---|" * len(columns)}
{positions}
All numbers are in `metrics.json`.

## Samples
{samples}"""
    (folder / "README.md").write_text(text, encoding="utf-8")
