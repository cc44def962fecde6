"""Speculative decoding beside plain decoding, and beside transformers' assisted generation and prompt lookup, on the same weights and in
the same run.

Targets: the bundled model, and two of 98 M parameters (`constructed.py`). `wide` computes the bundled model's function, so that its draft
is many times cheaper; `copier` writes its prompt again with identifiers renamed. Rates are tokens per second after the first token, of one
request at a time unless it says otherwise. Every request has a text of its own, so that a store of outputs never holds the answer. Where
drafts are verified by replay the tokens must be those of plain decoding, or the run stops.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from constructed import copier, widened
from contenders import Ours, Transformers, compete
from measure import Setting, table
from texts import Texts
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import engine
from engine import Decoder, Draft, DraftModel, PromptLookup, SuffixLookup

BUNDLED = Path(engine.__file__).parent / "bundled"
TEMPERATURE = 0.8
SURPRISE = 0.02  # of the copier's tokens at that temperature
COPIED = 384  # tokens of a text that is copied
WIDTH = 2  # alternatives in trees
DRAFTED = (1, 2, 4, 6, 8, 12, 16, 32)  # fixed lengths of drafts
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 64)


def run(setting: Setting) -> dict[str, Any]:
    quick = setting.quick
    texts = Texts()
    models = Models(texts)
    results: dict[str, Any] = {"function": models.check(texts), "cost": cost(models, quick)}
    results["workloads"] = workloads(models, texts, quick)
    results["lengths"] = [] if quick else lengths(models, texts)
    results["batches"] = [] if quick else batches(models, texts)
    results["worst"] = [] if quick else worst(models, texts)
    results["aims"] = aims(results)
    return results


# ---- models ----


class Models:
    """Targets and draft, all in transformers' classes; decoders share their weights."""

    def __init__(self, texts: Texts) -> None:
        def load(name: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.float32).eval()

        self.renamed = texts.renamed(3)
        copied = texts.pieces(COPIED, 1)[0]
        self.targets: dict[str, Any] = {
            "bundled": load("target"),
            "wide": widened(load("target")),
            "copier": copier(copied, 4096, self.renamed, SURPRISE, TEMPERATURE),
        }
        self.draft = load("draft")
        for model in (*self.targets.values(), self.draft):
            model.generation_config.eos_token_id = None  # every request has as many tokens as it may

    def as_dtype(self, name: str, dtype: torch.dtype) -> Any:
        """A target and the draft, converted in place: one at a time is used."""
        self.draft.to(dtype)
        return self.targets[name].to(dtype)

    @torch.no_grad()
    def check(self, texts: Texts) -> dict[str, float]:
        """What the constructed targets are said to compute."""
        tokens = texts.pieces(512, 1)[0]
        small, wide = (self.targets[name](torch.tensor([tokens])).logits[0] for name in ("bundled", "wide"))
        difference = float((small - wide).abs().max())
        assert difference < 1e-3, f"the wide model's logits are off by {difference}"
        text = texts.pieces(COPIED, 1)[0]
        copy = [self.renamed.get(token, token) for token in text]
        (output,) = Decoder(self.targets["copier"], cache_tokens=2048).generate([text], max_new_tokens=COPIED, ignore_eos=True)
        assert output.token_ids == copy, "the copier does not copy"
        changed = sum(a != b for a, b in zip(text, copy, strict=True)) / len(text)
        parameters = sum(p.numel() for p in self.targets["wide"].parameters())
        print(
            f"\nwide: {parameters / 1e6:.1f} M parameters, logits within {difference:.1e} of the bundled model's; "
            f"copier: {changed:.1%} of the tokens of a text renamed"
        )
        return {"parameters": parameters, "largest_difference": difference, "renamed": changed}


def decoder_of(model: Any, draft: Any = None, batch: int = 1) -> Decoder:
    return Decoder(model, draft=draft, cache_tokens=1280 * batch, max_batch_size=max(batch, 4), prefix_cache=False)


def drafters(draft: Any) -> dict[str, Callable[[], Any]]:
    return {
        "draft": lambda: DraftModel(draft),
        "draft, tree": lambda: DraftModel(draft, width=WIDTH),
        "prompt lookup": PromptLookup,
        "suffix lookup": SuffixLookup,
        "lookup, then draft": lambda: [SuffixLookup(), DraftModel(draft)],
    }


# ---- workloads ----


def workloads(models: Models, texts: Texts, quick: bool) -> list[dict[str, Any]]:
    """Everything beside everything."""
    count, new = (1, 24) if quick else (4, 128)
    code, copies = texts.prompts(count + 1), texts.pieces(COPIED, count + 1)
    float32, bfloat16 = torch.float32, torch.bfloat16
    cases: list[tuple[str, str, torch.dtype, float, list[list[int]], int]] = [
        ("code", "wide", float32, 0.0, code, new),
        ("code", "wide", float32, TEMPERATURE, code, new),
        ("rename", "copier", float32, 0.0, copies, 2 * new),
        ("rename", "copier", float32, TEMPERATURE, copies, 2 * new),
        ("code", "wide", bfloat16, 0.0, code, new),
        ("rename", "copier", bfloat16, 0.0, copies, 2 * new),
        ("code", "bundled", float32, 0.0, code, new),
        ("code", "bundled", float32, TEMPERATURE, code, new),
    ]
    results = []
    for workload, target, dtype, temperature, prompts, tokens in cases[:1] if quick else cases:
        model = models.as_dtype(target, dtype)
        rest = [[prompt] for prompt in prompts[1:]]
        sampling = {"temperature": temperature, "seed": 5} if temperature else {}
        contenders: dict[str, Any] = {"plain": Ours(decoder_of(model), rest, tokens, **sampling)}
        for name, make in drafters(models.draft).items():
            contenders[name] = Ours(decoder_of(model, make()), rest, tokens, **sampling)
        if temperature:
            decoder = decoder_of(model, DraftModel(models.draft))
            contenders["draft, block"] = Ours(decoder, rest, tokens, verification="block", **sampling)
        contenders["transformers"] = Transformers(model, rest, tokens, temperature)
        contenders["its assisted"] = Transformers(model, rest, tokens, temperature, assistant_model=models.draft)
        contenders["its prompt lookup"] = Transformers(model, rest, tokens, temperature, prompt_lookup_num_tokens=10)
        name = f"{workload}, {target}, {'float32' if dtype == float32 else 'bfloat16'}, T {temperature:g}"
        measured = compete(contenders, prompts[:1], count, name, exact=list(drafters(None)))
        results.append(
            {
                "name": name, "workload": workload, "target": target, "dtype": str(dtype).removeprefix("torch."),
                "temperature": temperature, "new": tokens, "contenders": measured, "distinct": distinct(contenders["plain"].tally.outputs),
            }
        )  # fmt: skip
        rows = [row(contender, r, measured["plain"]["tokens_per_second"]) for contender, r in measured.items()]
        title = f"{name}: {tokens} tokens each, {results[-1]['distinct']:.0%} of their 4-grams new in their output"
        table(title, ["", "tokens/s", "x plain", "tokens/forward", "forwards saved", "drafted", "accepted"], rows)
    models.as_dtype("wide", torch.float32)
    models.as_dtype("copier", torch.float32)
    return results


def distinct(outputs: Sequence[list[int]]) -> float:
    """How much of the outputs is not repetition: different 4-grams of each, over all of them."""
    grams = [[tuple(o[i : i + 4]) for i in range(len(o) - 3)] for o in outputs]
    return sum(len(set(g)) for g in grams) / sum(map(len, grams))


def row(name: str, r: dict[str, Any], plain: float) -> list[str]:
    return [
        name, f"{r['tokens_per_second']:.1f}", f"{r['tokens_per_second'] / plain:.2f}", f"{r['tokens_per_forward']:.2f}",
        f"{r['forwards_saved']:.0%}", f"{r['drafted']:.0f}" if r["drafted"] else "-", f"{r['acceptance']:.0%}" if r["drafted"] else "-",
    ]  # fmt: skip


# ---- what verification costs ----


class Random:
    """Drafts that are nothing, and say they are certain."""

    def __init__(self, vocab_size: int = 4096) -> None:
        self._random, self._vocab_size = random.Random(0), vocab_size

    def draft(self, requests: Sequence[Any], limits: Sequence[int]) -> list[Draft]:
        return [Draft.chain([self._random.randrange(self._vocab_size) for _ in range(n)], [0.99] * n) for n in limits]

    def release(self, request: Any) -> None:
        pass


def cost(models: Models, quick: bool) -> dict[str, Any]:
    """The time of a step, sampling and verification included, by its rows: one certain token, and drafts that are all refused."""
    rounds, new, sizes = (1, 8, (1, 2, 8, 9)) if quick else (5, 24, ROWS)
    results: dict[str, Any] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = models.as_dtype("wide", dtype)
        prompts = torch.randint(1, 4096, (1, 256), generator=torch.Generator().manual_seed(3)).tolist()
        decoder = decoder_of(model, Random())
        steps = {
            str(n): Ours(decoder, [prompts] * rounds, new + n, speculative=n > 1, num_assistant_tokens=n - 1 if n > 1 else None)
            for n in sizes
        }
        compete(steps, prompts, rounds, f"rows of a step, {name}")
        results[name] = {n: s.tally.seconds / s.tally.forwards for n, s in steps.items()}
    models.as_dtype("wide", torch.float32)
    rows = [[name, *(f"{seconds / times['1']:.2f}" for seconds in times.values())] for name, times in results.items()]
    table("time of a step / of one with one row, by its rows", ["wide", *map(str, sizes)], rows)
    return results


# ---- lengths of drafts, batches ----


def lengths(models: Models, texts: Texts) -> list[dict[str, Any]]:
    """Drafts of fixed lengths, and governed ones."""
    count, new = 3, 96
    results = []
    code, copies = texts.prompts(count + 1), texts.pieces(COPIED, count + 1)
    for workload, target, prompts, temperatures in (
        ("code", "wide", code, (0.0, TEMPERATURE)), ("rename", "copier", copies, (0.0,)),
    ):  # fmt: skip
        names = ("draft", "draft, tree", "lookup, then draft") if workload == "code" else ("prompt lookup", "suffix lookup")
        for temperature in temperatures:
            sampling = {"temperature": temperature, "seed": 5} if temperature else {}
            rest = [[prompt] for prompt in prompts[1:]]
            made = drafters(models.draft)
            contenders: dict[str, Any] = {}
            for name in names:
                for n in (*DRAFTED, None):
                    decoder = decoder_of(models.targets[target], made[name]())
                    contenders[f"{name} {n or 'governed'}"] = Ours(decoder, rest, new, num_assistant_tokens=n, **sampling)
            contenders["plain"] = Ours(decoder_of(models.targets[target]), rest, new, **sampling)
            measured = compete(contenders, prompts[:1], count, f"lengths, {workload}, T {temperature:g}", exact=list(contenders))
            results.append({"workload": workload, "temperature": temperature, "drafters": list(names), "contenders": measured})
            plain = measured["plain"]["tokens_per_second"]
            table(
                f"lengths of drafts: {workload}, {target}, T {temperature:g}",
                ["", "tokens/s", "x plain", "tokens/forward", "forwards saved", "drafted", "accepted"],
                [row(contender, r, plain) for contender, r in measured.items()],
            )
    return results


def batches(models: Models, texts: Texts) -> list[dict[str, Any]]:
    """Several requests at once, where verifying competes with decoding; transformers' assisted generation takes one."""
    results = []
    new, count = 96, 2
    for batch in (4, 16):
        pieces = texts.pieces(128, batch * (count + 1))
        groups = [pieces[i : i + batch] for i in range(0, len(pieces), batch)]
        for temperature in (0.0, TEMPERATURE):
            sampling = {"temperature": temperature, "seed": 5} if temperature else {}
            target = models.targets["wide"]
            contenders: dict[str, Any] = {"plain": Ours(decoder_of(target, None, batch), groups[1:], new, **sampling)}
            for name, make in drafters(models.draft).items():
                contenders[name] = Ours(decoder_of(target, make(), batch), groups[1:], new, **sampling)
            contenders["transformers"] = Transformers(target, groups[1:], new, temperature)
            measured = compete(contenders, groups[0], count, f"batch {batch}, T {temperature:g}", exact=list(drafters(None)))
            results.append({"batch": batch, "temperature": temperature, "contenders": measured})
            plain = measured["plain"]["tokens_per_second"]
            table(
                f"batch {batch}: code, wide, float32, T {temperature:g}",
                ["", "tokens/s", "x plain", "tokens/forward", "forwards saved", "drafted", "accepted"],
                [row(name, r, plain) for name, r in measured.items()],
            )
    return results


# ---- the worst case ----


def worst(models: Models, texts: Texts) -> list[dict[str, Any]]:
    """Drafts that are always wrong, and text on which lookups find and fail: governed, against plain decoding of the same request at about
    the same time. The ratio is the median of all requests: what is looked for is smaller than the noise of a single one."""
    count, new = 10, 160
    torch.manual_seed(4)
    useless = LlamaForCausalLM(LlamaConfig(**models.draft.config.to_dict())).eval()
    few = texts.names[:6]  # with six tokens at random every n-gram has occurred before, and was followed by something else
    noise = {"temperature": 100.0, "seed": 6, "allowed_token_ids": few}
    cases: list[tuple[str, dict[str, Any], dict[str, Callable[[], Any]]]] = [
        (
            "code, T 0.8",
            {"temperature": TEMPERATURE, "seed": 6},
            {"random drafts": Random, "random model": lambda: DraftModel(useless), "suffix lookup": SuffixLookup},
        ),
        ("six tokens at random", noise, {"prompt lookup": PromptLookup, "suffix lookup": SuffixLookup}),
    ]
    results = []
    for target in ("wide", "bundled"):
        model = models.targets[target]
        prompts = texts.prompts(count + 1)
        rest = [[prompt] for prompt in prompts[1:]]
        for name, options, made in cases:
            contenders: dict[str, Any] = {"plain": Ours(decoder_of(model), rest, new, **options)}
            contenders |= {drafter: Ours(decoder_of(model, make()), rest, new, **options) for drafter, make in made.items()}
            measured = compete(contenders, prompts[:1], count, f"worst case, {target}, {name}", exact=list(made))
            plain = measured.pop("plain")
            for drafter, r in measured.items():
                ratio = statistics.median(mine / its for mine, its in zip(r["rates"], plain["rates"], strict=True))
                results.append({"target": target, "text": name, "drafter": drafter, "ratio": ratio, "plain": plain["rates"], **r})
    table(
        "worst cases, governed: x plain decoding",
        ["target", "text", "drafter", "x plain", "drafted", "accepted"],
        [[r["target"], r["text"], r["drafter"], f"{r['ratio']:.3f}", str(r["drafted"]), str(r["accepted"])] for r in results],
    )
    return results


# ---- aims, figures ----


def aims(results: dict[str, Any]) -> list[dict[str, Any]]:
    found = {r["name"]: r["contenders"] for r in results["workloads"]}
    rows: list[tuple[str, str, float, float]] = []
    for temperature in ("0", "0.8"):
        if code := found.get(f"code, wide, float32, T {temperature}"):
            drafts = {name: r for name, r in code.items() if name in ("draft", "draft, tree", "lookup, then draft")}
            if temperature == "0":
                rows += [(f"code, T 0, {name}: tokens per forward", ">=", 3.0, r["tokens_per_forward"]) for name, r in drafts.items()]
            fastest = max(drafts, key=lambda name: drafts[name]["tokens_per_second"])
            speed = drafts[fastest]["tokens_per_second"]
            rows += [
                (f"code, T {temperature}, {fastest}: x plain", ">=", 2.0, speed / code["plain"]["tokens_per_second"]),
                (f"code, T {temperature}, {fastest}: x assisted generation", ">=", 3.0, speed / code["its assisted"]["tokens_per_second"]),
            ]
    for name in (n for n in found if n.startswith("rename") and "float32" in n):
        for drafter in ("prompt lookup", "suffix lookup"):
            rows.append((f"{name}, {drafter}: forwards saved", ">=", 0.9, found[name][drafter]["forwards_saved"]))
    for dtype, times in results["cost"].items():
        rows += [(f"{dtype}: step of {n} rows / of one", "<=", 1.3, times[str(n)] / times["1"]) for n in (8, 9)]
    if results["worst"]:
        slowest = min(results["worst"], key=lambda r: r["ratio"])
        rows.append((f"worst case ({slowest['target']}, {slowest['text']}, {slowest['drafter']}): x plain", ">=", 0.97, slowest["ratio"]))
    judged = [
        {"aim": name, "bound": f"{sign} {bound:g}", "reached": value, "met": value <= bound if sign == "<=" else value >= bound}
        for name, sign, bound, value in rows
    ]
    table("aims", ["", "aim", "reached", ""], [[a["aim"], a["bound"], f"{a['reached']:.3g}", "yes" if a["met"] else "no"] for a in judged])
    return judged


def plot(results: dict[str, Any], out: Path) -> list[Path]:
    """Tokens/s of every contender; what longer drafts bring; what verifying them costs."""
    import matplotlib.pyplot as plt

    shown = results["workloads"]
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.7 * rows), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, r in zip(axes.flat, shown, strict=False):
        names = list(r["contenders"])[::-1]
        rates = [r["contenders"][name]["tokens_per_second"] for name in names]
        colors = ["tab:gray" if name in ("transformers", "its assisted", "its prompt lookup") else "tab:blue" for name in names]
        bars = axis.barh(names, rates, color=colors)
        per_forward = [r["contenders"][name]["tokens_per_forward"] for name in names]
        labels = [f"{rate:.0f}  ({n:.1f}/forward)" for rate, n in zip(rates, per_forward, strict=True)]
        axis.bar_label(bars, labels, fontsize=7, padding=2)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.3)
        axis.set_title(r["name"], fontsize=9)
    figure.suptitle("Speculative decoding: tokens/s after the first token, one request at a time (gray: transformers)")
    files = [out.with_name(f"{out.stem}-rates.png")]
    figure.savefig(files[0], dpi=120)
    plt.close(figure)

    figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for r in results["lengths"]:
        for drafter in r["drafters"]:
            points = [
                (n, c["tokens_per_forward"], c["tokens_per_second"] / r["contenders"]["plain"]["tokens_per_second"])
                for n in DRAFTED
                if (c := r["contenders"].get(f"{drafter} {n}"))
            ]
            x, per_forward, speed = zip(*points, strict=True)
            label = f"{r['workload']}, T {r['temperature']:g}, {drafter}"
            (line,) = first.plot(x, per_forward, marker="o", ms=3, label=label)
            second.plot(x, speed, marker="o", ms=3, color=line.get_color(), label=label)
            governed = r["contenders"][f"{drafter} governed"]["tokens_per_second"] / r["contenders"]["plain"]["tokens_per_second"]
            second.axhline(governed, color=line.get_color(), lw=0.8, ls=":")
    first.set_ylabel("tokens per forward")
    second.set_ylabel("x plain decoding (dotted: governed)")
    for axis in (first, second):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens drafted at a time")
    first.set_yscale("log", base=2)
    if results["lengths"]:
        first.legend(fontsize=7)
    for dtype, times in results["cost"].items():
        third.plot([int(n) for n in times], [seconds / times["1"] for seconds in times.values()], marker="o", ms=3, label=dtype)
    third.axhline(1.3, color="gray", lw=0.8, ls=":")
    third.set_xlabel("rows of a step")
    third.set_ylabel("time / time with one row")
    third.legend()
    files.append(out.with_name(f"{out.stem}-lengths.png"))
    figure.savefig(files[1], dpi=120)
    plt.close(figure)
    return files
