"""Beam search: the selection kernel beside the eager chain and a plain read; the whole search beside the peers that have beams, and the
origin's own beams; and the cache blocks that beams share, all in the same run.

A search is timed from the prompt to its end; tokens/s counts the tokens of the sequences returned, not of all beams.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Setting, interleaved, rates, seconds_of, summary, table
from models.origin_model import OriginConfig
from models.origin_model import Transformer as OriginTransformer
from ours import Engine
from random_models import bare, saved
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import engine
from engine import Decoder
from engine.kernels import cpu, select

SELECTIONS = ((1, 4, 32_000), (8, 4, 32_000), (1, 16, 32_000), (1, 4, 151_936), (8, 4, 151_936), (16, 4, 128_256))  # groups, beams, V
SEARCHES = ((1, 4), (8, 4), (1, 16), (8, 16))  # batch, beams
PROMPT, NEW = 128, 32
LONG_PROMPT, WIDE = 1000, 16
BUNDLED = Path(engine.__file__).parent / "bundled" / "target"


def run(setting: Setting) -> dict[str, Any]:
    results: dict[str, Any] = {"selection": selection(3 if setting.quick else 9)}
    results |= {"search": search(setting), "origin": origin(setting.quick), "blocks": blocks()}
    results["aims"] = aims(results)
    return results


# ---- the kernel ----


def selection(rounds: int) -> list[dict[str, Any]]:
    ops = select("cpu")
    results = []
    for groups, beams, vocab in tqdm(SELECTIONS, desc="selection", disable=None, leave=False):
        rows = groups * beams
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3
        scores = torch.linspace(-9, 0, rows)
        start = torch.arange(0, rows + 1, beams, dtype=torch.int32)
        ones, zeros = torch.ones(rows), torch.zeros(rows, dtype=torch.int32)

        def ours(logits: torch.Tensor = logits, scores: torch.Tensor = scores, start: torch.Tensor = start, beams: int = beams) -> object:
            return ops.beam_select(logits, scores, start, 2 * beams, ones, zeros, zeros)  # noqa: B023

        def eager(logits: torch.Tensor = logits, scores: torch.Tensor = scores, groups: int = groups, beams: int = beams) -> object:
            return (logits.log_softmax(dim=-1) + scores[:, None]).view(groups, -1).topk(2 * beams)

        def read(logits: torch.Tensor = logits) -> object:
            return cpu._cpu.read_floats(logits.data_ptr(), logits.numel())

        def repeated(one: Callable[[], object]) -> Callable[[], float]:
            inner = max(1, min(200, round(0.01 / seconds_of(one))))
            return lambda: seconds_of(one, inner)

        times = interleaved({"ours": repeated(ours), "eager": repeated(eager), "read": repeated(read)}, rounds)
        mine, chain, limit = (summary(times[name]) for name in ("ours", "eager", "read"))
        results.append(
            {
                "groups": groups, "beams": beams, "vocab": vocab, "seconds": mine, "eager_seconds": chain, "read_seconds": limit,
                "over_read": mine["median"] / limit["median"], "ratio": chain["median"] / mine["median"],
            }
        )  # fmt: skip
    table(
        "beam_select, float32, 2 W candidates (logits in the cache; so is the plain read)",
        ["groups x beams x V", "ms", "/ read", "eager chain / ours"],
        [
            [f"{r['groups']} x {r['beams']} x {r['vocab']}", f"{mine * 1e3:.3f}", f"{r['over_read']:.1f}", f"{r['ratio']:.1f}"]
            for r in results
            for mine in (r["seconds"]["median"],)
        ],
    )
    return results


# ---- the whole search ----


def search(setting: Setting) -> list[dict[str, Any]]:
    """Whole searches of the bundled model, beside transformers, and of S, beside all peers that have beams (the quick run spares itself
    loading them); float32."""
    quick = setting.quick
    new, rounds = (8, 1) if quick else (NEW, 2)
    able = [peer for peer in setting.peers if peer.beams]
    results = []
    for name in ("bundled", "S"):
        # Peers that convert would write beside the bundled model.
        peers = able if name == "S" and not quick else [peer for peer in able if peer.name == "transformers"]
        model = bare("S") if name == "S" else AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
        ours = Engine(model, "fp32", max_batch=128, cache_tokens=(PROMPT + 16 * (NEW + 32)) * 8)
        for peer in peers:
            peer.load(saved("S") if name == "S" else BUNDLED, "fp32")
        for batch, beams in tqdm(SEARCHES[:2] if quick else SEARCHES, desc=f"beams, {name}", disable=None, leave=False):
            vocab = ours.decoder.config.vocab_size
            prompts = torch.randint(3, vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()

            def timed(contender: Any, prompts: list[list[int]] = prompts, beams: int = beams) -> Callable[[], float]:
                contender.decode(prompts, 3, beams)  # the first run of each shape pays for what later ones find warm
                return lambda: contender.decode(prompts, new, beams).total_seconds

            contenders = {"ours": timed(ours)} | {peer.name: timed(peer) for peer in peers}
            rate = {who: rates(seconds, batch * new) for who, seconds in interleaved(contenders, rounds).items()}
            mine = rate["ours"]["median"]
            ratios = {peer: mine / values["median"] for peer, values in rate.items() if peer != "ours"}
            results.append({"model": name, "batch": batch, "beams": beams, "new": new, "tokens_per_second": rate, "ratio": ratios})
    names = list(dict.fromkeys(peer for r in results for peer in r["ratio"]))
    table(
        f"beam search, float32, prompt {PROMPT}, {new} new tokens, prompt included: tokens/s of the returned sequences",
        ["model", "batch", "beams", "tokens/s", *(f"x {peer}" for peer in names)],
        [
            [r["model"], str(r["batch"]), str(r["beams"]), f"{r['tokens_per_second']['ours']['median']:.1f}"]
            + [f"{r['ratio'][peer]:.2f}" if peer in r["ratio"] else "-" for peer in names]
            for r in results
        ],
    )
    return results


def origin(quick: bool) -> dict[str, Any]:
    """The origin model in its published 215 M shape: three beams of its own `generate_super`, which rereads everything for each token."""
    torch.manual_seed(0)
    model = OriginTransformer(OriginConfig(dim=1024, n_layers=18)).eval()
    decoder = Decoder(model, cache_tokens=1024)
    ids = torch.randint(3, 6144, (1, 64))
    new = 2 if quick else 16
    rates = interleaved(
        {
            "ours": lambda: new / seconds_of(lambda: decoder.generate_super(ids, max_new_tokens=new, num_beams=3)),
            "origin": lambda: new / seconds_of(lambda: model.generate_super(ids, max_new_tokens=new, num_beams=3)),
        },
        1 if quick else 2,
    )
    result: dict[str, Any] = {"tokens_per_second": summary(rates["ours"]), "origin_tokens_per_second": summary(rates["origin"])}
    result["ratio"] = result["tokens_per_second"]["median"] / result["origin_tokens_per_second"]["median"]
    print(
        f"\norigin model, 215 M float32, 3 beams, prompt 64, {new} new tokens: {result['tokens_per_second']['median']:.2f} tokens/s, "
        f"{result['ratio']:.1f} x its own {result['origin_tokens_per_second']['median']:.2f}"
    )
    return result


def blocks() -> dict[str, Any]:
    """Cache blocks of 16 beams behind one long prompt, over those of a single sequence."""
    decoder = Decoder.bundled(cache_tokens=8192)
    prompt = torch.randint(3, decoder.config.vocab_size, (1, LONG_PROMPT), generator=torch.Generator().manual_seed(2))
    one, many = (
        decoder.generate(prompt, max_new_tokens=NEW, ignore_eos=True, **options)[0].metrics.peak_blocks
        for options in ({}, {"num_beams": WIDE})
    )
    print(
        f"\ncache blocks, prompt {LONG_PROMPT}, {NEW} new tokens: {many} for {WIDE} beams, {one} for one sequence, ratio {many / one:.2f}"
    )
    return {"prompt": LONG_PROMPT, "beams": WIDE, "single": one, "search": many, "ratio": many / one}


# ---- aims ----


def aims(results: dict[str, Any]) -> list[dict[str, Any]]:
    searches = {(r["model"], r["batch"], r["beams"]): r for r in results["search"]}
    rows: list[tuple[str, str, float, float]] = []
    for model in ("S", "bundled"):
        for batch, bound in ((1, 4.0), (8, 6.0)):
            if ratio := searches[model, batch, 4]["ratio"].get("transformers"):
                rows.append((f"{model}, batch {batch}, 4 beams: ours / transformers", ">=", bound, ratio))
    for (model, batch, beams), r in searches.items():
        if "ctranslate2" in r["ratio"] and beams == 4:
            rows.append((f"{model}, batch {batch}, 4 beams: ours / ctranslate2", ">=", 1.3, r["ratio"]["ctranslate2"]))
    s = searches["S", 1, 4]
    kernel = next(r for r in results["selection"] if (r["groups"], r["beams"], r["vocab"]) == (1, 4, 32_000))
    step = s["new"] / s["tokens_per_second"]["ours"]["median"] / s["new"]
    rows += [
        ("S, batch 1, 4 beams: selection / step", "<=", 0.05, kernel["seconds"]["median"] / step),
        ("origin 215 M, 3 beams: ours / its own", ">=", 30.0, results["origin"]["ratio"]),
        (f"blocks of {WIDE} beams over a prompt of {LONG_PROMPT}: search / single", "<=", 1.3, results["blocks"]["ratio"]),
    ]
    judged = [
        {"aim": name, "bound": f"{sign} {bound:g}", "reached": value, "met": value <= bound if sign == "<=" else value >= bound}
        for name, sign, bound, value in rows
    ]
    table("aims", ["", "aim", "reached", ""], [[a["aim"], a["bound"], f"{a['reached']:.3g}", "yes" if a["met"] else "no"] for a in judged])
    return judged


def plot(results: dict[str, Any], out: Path) -> list[Path]:
    """Tokens/s of every search, beside its peers."""
    import matplotlib.pyplot as plt

    searches = results["search"]
    peers = list(dict.fromkeys(peer for r in searches for peer in r["tokens_per_second"]))
    width = 0.8 / len(peers)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, model in zip(axes, ("bundled", "S"), strict=True):
        mine = [r for r in searches if r["model"] == model]
        for i, peer in enumerate(peers):
            there = [(x, r["tokens_per_second"][peer]["median"]) for x, r in enumerate(mine) if peer in r["tokens_per_second"]]
            if there:
                x, y = zip(*there, strict=True)
                bars = axis.bar([v + (i - (len(peers) - 1) / 2) * width for v in x], y, 0.93 * width, label=peer)
                axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(mine)), [f"batch {r['batch']}\n{r['beams']} beams" for r in mine])
        axis.set_title({"bundled": "bundled model, 5 M", "S": "random Llama S, 100 M"}[model])
        axis.set_ylabel("tokens/s of returned sequences")
        axis.set_yscale("log")
        axis.margins(y=0.12)
        axis.legend()
    figure.suptitle(f"Beam search, float32, prompt {PROMPT}, {searches[0]['new']} new tokens, prompt included")
    file = out.with_name(f"{out.stem}-search.png")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return [file]
