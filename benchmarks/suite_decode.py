"""Decode and prefill beside other engines, in the same run, on the same weights and tokens: random models of 100 M parameters (S) and
0.5 B (M), with weights in every format; the bundled model; and the origin model beside its own decoding.

Rates are tokens per second of the whole batch after each sequence's first token, greedy, or of the best sequence of a beam search. The
limit is the larger of the time to read a step's weights, keys and values, and, in float32, of its multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Machine, Setting, interleaved, rates, seconds_of, summary, table
from models.origin_model import OriginConfig
from models.origin_model import Transformer as OriginTransformer
from ours import Engine
from peers.remote import PeerError, Remote
from random_models import SHAPES, bare, random_llama, saved
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import engine
from engine import Decoder
from engine.kernels import limits
from engine.kv_cache import block_bytes

PROMPT = 128
NEW, ROUNDS = {"S": 64, "M": 24}, {"S": 3, "M": 2}
CACHE_BYTES = 64 << 20  # more than any cache of the machines this runs on holds
BUNDLED = Path(engine.__file__).parent / "bundled" / "target"
# A column group of the table -> the weight formats that compete in it, and the bytes of a weight (int4: with a 16-bit scale for every 32).
GROUPS = {"fp32": ("fp32",), "16-bit": ("bf16", "fp16"), "int8": ("int8",), "int4": ("int4",)}
BYTES = {"fp32": 4.0, "16-bit": 2.0, "int8": 1.0, "int4": 0.5625}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    beams: int = 1
    prefill: int = 0  # tokens of a prompt that is only computed


B1, B8, B32 = (Case(f"b{batch}", batch) for batch in (1, 8, 32))
BEAMS = (Case("beams 4, b1", 1, 4), Case("beams 4, b4", 4, 4))
PREFILL = Case("prefill 512", 1, prefill=512)
CASES = {"fp32": (B1, B8, B32, *BEAMS, PREFILL), "16-bit": (B1, B8, B32, PREFILL), "int8": (B1, B8, B32, PREFILL), "int4": (B1, B8)}
# Group -> case -> how many times the best peer of the group.
AIMS = {
    "fp32": {"b1": 1.0, "b8": 1.25, "b32": 1.25, "beams 4, b1": 1.3, "beams 4, b4": 2.0, "prefill 512": 1.0},
    "16-bit": {"b1": 1.05, "b8": 1.7, "prefill 512": 1.0},
    "int8": {"b1": 1.3, "b8": 1.5, "b32": 1.2, "prefill 512": 0.9},
    "int4": {"b1": 1.05, "b8": 1.2},
}


def run(setting: Setting) -> dict[str, Any]:
    machine, quick, peers = setting.machine, setting.quick, setting.peers
    cells: list[dict[str, Any]] = []
    for shape in setting.models:
        reference: dict[str, list[list[int]]] = {}
        for group in GROUPS:
            # The quick run has the peers for float32 alone: loading them takes most of the time.
            cells += measure_group(machine, shape, group, peers if group == "fp32" or not quick else [], quick, reference)
        shape_tables([cell for cell in cells if cell["model"] == shape], shape)
    return {"cells": cells, "aims": aims(cells), "bundled": bundled(setting), "origin": origin(quick)}


# ---- the random models ----


@dataclass
class Contender:
    """Somebody who has the model loaded. A peer that fails is out."""

    name: str
    format: str
    engine: Any
    beams: bool = True
    failed: bool = False

    def attempt(self, run: Callable[[], float]) -> float:
        """Seconds; NaN where it failed, now or before."""
        if self.failed:
            return math.nan
        try:
            return run()
        except PeerError as error:
            self.failed = True
            tqdm.write(f"{self.name} drops out: {error}")
            return math.nan


def measure_group(
    machine: Machine, shape: str, group: str, peers: list[Remote], quick: bool, reference: dict[str, list[list[int]]]
) -> list[dict[str, Any]]:
    """All contenders that hold the weights in a format of this group, in all of its cases; one entry for each. ``reference``: each case's
    tokens in float32, which the first group leaves there."""
    cases = CASES[group][:2] if quick else CASES[group]
    new, rounds = (16, 1) if quick else (NEW[shape], ROUNDS[shape])
    contenders: list[Contender] = []
    tokens_of_cache = max(c.batch * c.beams * (PROMPT + new + 16) + c.prefill for c in cases) + 64
    for i, dtype in enumerate(GROUPS[group]):
        ours = Engine(bare(shape), dtype, max_batch=64, cache_tokens=tokens_of_cache)
        contenders.append(Contender(f"ours, {dtype}" if i else "ours", dtype, ours))
    if shape == "S" and group in ("fp32", "16-bit") and not quick:
        dtype = GROUPS[group][0]
        ours = Engine(random_llama(shape), dtype, max_batch=64, cache_tokens=tokens_of_cache, shared=True)
        contenders.append(Contender("ours, shared", dtype, ours))
    more: list[Remote] = []  # a process has one model, and a peer may have two formats
    for peer in peers:
        for i, dtype in enumerate(dtype for dtype in GROUPS[group] if dtype in peer.dtypes):
            name = f"{peer.name}, {dtype}" if i else peer.name
            try:
                if i:
                    more.append(peer.another())
                loaded = more[-1] if i else peer
                loaded.load(saved(shape), dtype)
            except PeerError as error:
                tqdm.write(f"left out: {error}")
                continue
            contenders.append(Contender(name, dtype, loaded, peer.beams))
    entries: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * rounds * (len(contenders) + 1), desc=f"decode, {shape} {group}", disable=None, leave=False) as progress:
        for case in cases:
            entries += measure_case(machine, shape, group, case, contenders, new, rounds, progress, reference)
    for peer in more:
        peer.close()
    return entries


def measure_case(
    machine: Machine, shape: str, group: str, case: Case, contenders: list[Contender], new: int, rounds: int, progress: tqdm,
    reference: dict[str, list[list[int]]],
) -> list[dict[str, Any]]:  # fmt: skip
    prompts = random_prompts(shape, case.batch, case.prefill or PROMPT)
    tokens: dict[str, list[list[int]]] = {}

    def timed(contender: Contender, new: int) -> Callable[[], float]:
        def once() -> float:
            if case.prefill:
                return contender.engine.prefill(prompts[0])
            timing = contender.engine.decode(prompts, new, case.beams)
            tokens[contender.name] = timing.tokens
            return timing.seconds

        return lambda: contender.attempt(once)

    able = [contender for contender in contenders if case.beams == 1 or contender.beams]
    interleaved({c.name: timed(c, 3) for c in able}, 1)  # the first call of each shape pays for what later ones find warm
    times = interleaved({c.name: timed(c, new) for c in able} | {"read": machine.reader()}, rounds, progress)
    machine = machine.during(times.pop("read"))
    progress.update((len(contenders) - len(able)) * rounds)
    work = case.prefill or case.batch * (new - 1)
    limit = limit_rate(machine, shape, group, case, new)
    if group == "fp32" and not case.prefill:
        reference[case.name] = tokens.get("transformers") or tokens["ours"]
    entries = []
    for contender in able:
        seconds = times[contender.name]
        if any(map(math.isnan, seconds)):
            continue
        rate = rates(seconds, work)
        entries.append(
            {
                "model": shape, "weights": group, "case": case.name, "contender": contender.name, "format": contender.format,
                "tokens_per_second": rate, "limit": limit, "limit_share": rate["median"] / limit if limit else None,
            }
        )  # fmt: skip
        if contender.name in tokens:
            mine, its = tokens[contender.name], reference[case.name]
            entries[-1] |= {"agreement": agreement(mine, its), "first_agreement": agreement([t[:1] for t in mine], [t[:1] for t in its])}
    return entries


def random_prompts(shape: str, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SHAPES[shape]["vocab_size"], (batch, length), generator=generator).tolist()


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """How much of the sequences is the reference's, up to the first token of each that is not."""
    same = 0
    for mine, its in zip(tokens, reference, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b), len(its))
    return same / sum(map(len, reference))


def limit_rate(machine: Machine, shape: str, group: str, case: Case, new: int) -> float | None:
    """Tokens per second that the machine's limits allow; None where only a rate of multiply-adds that is not measured limits."""
    s = SHAPES[shape]
    head_dim = s["hidden_size"] // s["num_attention_heads"]
    kv_width = head_dim * s["num_key_value_heads"]
    layer = s["hidden_size"] * (2 * s["hidden_size"] + 2 * kv_width + 3 * s["intermediate_size"])
    weights = s["num_hidden_layers"] * layer
    head = s["vocab_size"] * s["hidden_size"]
    if case.prefill:
        return None if group != "fp32" else case.prefill / machine.seconds(0, 2 * (case.prefill * weights + head))
    rows = case.batch * case.beams
    cached = rows * (PROMPT + new / 2) * 2 * s["num_hidden_layers"] * kv_width * min(BYTES[group], 4) if group in ("fp32", "16-bit") else 0
    operations = 2 * rows * (weights + head) if group == "fp32" else 0
    return case.batch / machine.seconds((weights + head) * BYTES[group] + cached, operations)


def shape_tables(cells: list[dict[str, Any]], shape: str) -> None:
    """Of one model, a table for each group: every contender's rate, its share of the limit, and how many times that rate ours is."""
    for group in dict.fromkeys(cell["weights"] for cell in cells):
        here = {(cell["case"], cell["contender"]): cell for cell in cells if cell["weights"] == group}
        cases, names = (list(dict.fromkeys(key[i] for key in here)) for i in (0, 1))

        def show(case: str, name: str, here: dict[tuple[str, str], dict[str, Any]] = here) -> str:
            cell, mine = here.get((case, name)), here.get((case, "ours"))
            if cell is None:
                return "-"
            rate = cell["tokens_per_second"]["median"]
            share = f" {cell['limit_share']:.0%}" if cell["limit_share"] else ""
            ratio = f" {mine['tokens_per_second']['median'] / rate:5.2f}x" if mine and name != "ours" else 7 * " "
            return f"{rate:.0f}{share}{ratio}"

        title = f"random Llama {shape}, prompt {PROMPT}, {group}: tokens/s, share of the limit, ours / it"
        table(title, ["", *cases], [[name, *(show(case, name) for case in cases)] for name in names])
        agreements = [
            f"{name} {cell['first_agreement']:.0%} {cell['agreement']:.0%}" for (case, name), cell in here.items() if case == "b8"
        ]
        print(f"  b8, first tokens and all tokens as in float32: {', '.join(agreements)}")


def aims(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim with what the run reached: ours over the best peer."""
    judged = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        for group, bounds in AIMS.items():
            for case, bound in bounds.items():
                here = {
                    c["contender"]: c["tokens_per_second"]["median"]
                    for c in cells
                    if (c["model"], c["weights"], c["case"]) == (model, group, case)
                }
                mine = max((rate for name, rate in here.items() if name.startswith("ours")), default=None)
                theirs = {name: rate for name, rate in here.items() if not name.startswith("ours")}
                if mine is None or not theirs:
                    continue
                best = max(theirs, key=lambda name: theirs[name])
                value = mine / theirs[best]
                judged.append(
                    {"model": model, "weights": group, "case": case, "peer": best, "bound": bound, "reached": value, "met": value >= bound}
                )
    if judged:
        table(
            "aims: ours / the best peer",
            ["", "best peer", "aim", "reached", ""],
            [
                [
                    f"{a['model']} {a['weights']} {a['case']}", a["peer"], f">= {a['bound']:g}", f"{a['reached']:.2f}",
                    "yes" if a["met"] else "no",
                ]
                for a in judged
            ],
        )  # fmt: skip
    return judged


# ---- the bundled model, the origin model ----


def bundled(setting: Setting) -> list[dict[str, Any]]:
    """5 M parameters, which fit a cache: held against reading as many bytes from that cache; beside transformers where it takes part."""
    new, rounds = (64, 2) if setting.quick else (128, 3)
    peer = next((peer for peer in setting.peers if peer.name == "transformers"), None)
    results = []
    for dtype in ("fp32", "bf16"):
        model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
        ours = Engine(model, dtype, max_batch=8, cache_tokens=8 * (PROMPT + new + 16))
        contenders: dict[str, Any] = {"ours": ours}
        if peer is not None:
            peer.load(BUNDLED, dtype)
            contenders["transformers"] = peer
        c = ours.decoder.config
        for batch in (1, 8):
            prompts = torch.randint(3, c.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
            for contender in contenders.values():
                contender.decode(prompts, 3)
            times = interleaved({n: lambda who=who: who.decode(prompts, new).seconds for n, who in contenders.items()}, rounds)  # noqa: B023
            cached = batch * (PROMPT + new / 2) * block_bytes(c.num_layers, c.num_kv_heads, c.head_dim, 1, ours.decoder.loop.cache.dtype)
            needed = ours.decoder.model.bytes_per_step + cached
            bandwidth = limits.read_bandwidth(int(needed)) if needed < CACHE_BYTES else setting.machine.read_bandwidth
            rate = {name: rates(seconds, batch * (new - 1)) for name, seconds in times.items()}
            entry = {"dtype": dtype, "batch": batch, "tokens_per_second": rate, "limit": batch * bandwidth / needed}
            if "transformers" in rate:
                entry["ratio"] = rate["ours"]["median"] / rate["transformers"]["median"]
            results.append(entry)
    table(
        f"bundled model, prompt {PROMPT}",
        ["", "tokens/s", "of read limit", "x transformers"],
        [
            [f"{r['dtype']} b{r['batch']}", f"{rate:.0f}", f"{rate / r['limit']:.0%}", f"{r['ratio']:.1f}" if "ratio" in r else "-"]
            for r in results
            for rate in (r["tokens_per_second"]["ours"]["median"],)
        ],
    )
    return results


def origin(quick: bool) -> dict[str, Any]:
    """The origin model in its published 215 M shape against its own `generate_super`, which rereads the whole sequence for each token."""
    torch.manual_seed(0)
    model = OriginTransformer(OriginConfig(dim=1024, n_layers=18)).eval()
    decoder = Decoder(model, cache_tokens=512)
    ids = torch.randint(3, 6144, (1, 64))
    new = 4 if quick else 64
    contenders = {
        "ours": lambda: new / seconds_of(lambda: decoder.generate_super(ids, max_new_tokens=new)),
        # Its own "greedy" draws at temperature 1; below 0.1 it takes the best, as it documents.
        "its generate_super": lambda: new / seconds_of(lambda: model.generate_super(ids, max_new_tokens=new, temperature=0.05)),
    }
    rate = {name: summary(values) for name, values in interleaved(contenders, 1 if quick else 2).items()}
    ratio = rate["ours"]["median"] / rate["its generate_super"]["median"]
    table(
        f"origin model, 215 M float32, prompt 64, {new} new tokens, prefill included",
        ["", "tokens/s", "ours / its"],
        [[name, f"{rate[name]['median']:.2f}", "" if name == "ours" else f"{ratio:.1f}"] for name in contenders],
    )
    return {"tokens_per_second": rate, "ratio": ratio}


# ---- plot ----


def plot(results: dict[str, Any], out: Path) -> list[Path]:
    """One figure for each random model: every contender's tokens/s in every case, with the limit."""
    import matplotlib.pyplot as plt

    files = []
    for shape in dict.fromkeys(cell["model"] for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if cell["model"] == shape]
        groups = list(dict.fromkeys(cell["weights"] for cell in cells))
        colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(c["contender"].partition(",")[0] for c in cells))}
        figure, axes = plt.subplots(len(groups), 1, figsize=(11, 3 * len(groups)), constrained_layout=True, squeeze=False)
        for axis, group in zip(axes[:, 0], groups, strict=True):
            here = [cell for cell in cells if cell["weights"] == group]
            cases, names = (list(dict.fromkeys(cell[key] for cell in here)) for key in ("case", "contender"))
            width = 0.85 / len(names)
            for i, name in enumerate(names):
                mine = [cell for cell in here if cell["contender"] == name]
                x = [cases.index(cell["case"]) + (i - (len(names) - 1) / 2) * width for cell in mine]
                engine_name, _, variant = name.partition(", ")
                bars = axis.bar(
                    x, [cell["tokens_per_second"]["median"] for cell in mine], width, label=name, color=colours[engine_name],
                    alpha=0.5 if variant else 1,
                )  # fmt: skip
                axis.bar_label(bars, fmt="%.0f", fontsize=6)
            for i, case in enumerate(cases):
                if limit := next(cell["limit"] for cell in here if cell["case"] == case):
                    axis.hlines(limit, i - 0.45, i + 0.45, color="black", lw=1, ls=":", label="limit" if i == 0 else None)
            axis.set_xticks(range(len(cases)), cases)
            axis.set_yscale("log")
            axis.set_ylabel(f"{group}: tokens/s")
            axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(f"Random Llama {shape}, prompt {PROMPT}")
        files.append(out.with_name(f"{out.stem}-decode-{shape}.png"))
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files
