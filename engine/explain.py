"""Where the time of a step goes: real steps of decoding, timed part by part and held against the machine's limits."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import Ops, limits
from .kernels.packed import INTEGER_FORMATS
from .models.transformer import Transformer
from .plan import StepPlan

if TYPE_CHECKING:
    from .decoder import Decoder

# The parts of a step, in their order. Beside the kernels: the scheduler's plan; the step's tensors; what the layers cost between their
# kernels; the sampler's rows before its kernel and after; what is done with the tokens; the rest.
PARTS = (
    "plan", "batch", "embed", "norms", "qkv", "rope", "attention", "out", "gate_up", "activation", "down", "head", "layers", "sampling",
    "rows", "commit", "other",
)  # fmt: skip
PRODUCTS = ("qkv", "out", "gate_up", "down", "head")
_KERNELS = ("embed", "norms", "rope", "activation", "attention", "sampling", *PRODUCTS)


@dataclass(frozen=True)
class Part:
    """One part of a step, as the mean of the steps looked at."""

    name: str  # one of PARTS
    seconds: float
    calls: float  # of its kernel; 0 for a part without one
    num_bytes: float  # that its kernel must read and write
    operations: float  # floating-point operations that it must do
    # The least time that takes on this machine: its bytes at the read bandwidth or, of what multiplies in float32, its operations at the
    # FMA rate, whichever is more.
    limit_seconds: float

    @property
    def share(self) -> float | None:
        """``limit_seconds`` over ``seconds``: 1 is as fast as the machine; None where there is no limit."""
        return self.limit_seconds / self.seconds if self.limit_seconds and self.seconds else None


@dataclass(frozen=True)
class Explanation:
    """``Decoder.explain``: a step's parts, which add up to it. ``str`` of it is a table."""

    batch_size: int
    context: int
    steps: int  # that were run
    seconds: float  # of a step: the mean of the faster half of them
    parts: tuple[Part, ...]  # in the order of PARTS
    read_bandwidth: float  # bytes per second of a read as large as the step's
    flop_rate: float  # float32 operations per second
    advice: str  # the setting that is worth changing next, by these numbers

    @property
    def num_bytes(self) -> float:
        return sum(part.num_bytes for part in self.parts)

    @property
    def operations(self) -> float:
        return sum(part.operations for part in self.parts)

    @property
    def share(self) -> float:
        """The least time that the kernels' bytes and operations take, over the step's."""
        return sum(part.limit_seconds for part in self.parts) / self.seconds

    def __str__(self) -> str:
        plural = "s" if self.batch_size > 1 else ""
        limits = f"{self.read_bandwidth / 1e9:.1f} GB/s, {self.flop_rate / 1e9:.0f} GFLOP/s"
        lines = [
            f"a step of {self.batch_size} sequence{plural} with {self.context} tokens and more: {1e6 * self.seconds:.0f} us",
            f"{'part':<12}{'us':>10}{'of step':>9}{'calls':>7}{'MB':>10}{'MFLOP':>10}{'of limit':>10}",
        ]
        for part in self.parts:
            line = f"{part.name:<12}{1e6 * part.seconds:>10.1f}{part.seconds / self.seconds:>9.1%}"
            if part.share is not None:
                line += f"{part.calls:>7.0f}{part.num_bytes / 1e6:>10.2f}{part.operations / 1e6:>10.1f}{part.share:>10.0%}"
            lines.append(line)
        work = f"{self.num_bytes / 1e6:>10.2f}{self.operations / 1e6:>10.1f}{self.share:>10.0%} (limit: {limits})"
        lines.append(f"{'all':<12}{1e6 * self.seconds:>10.1f}{1:>9.1%}{'':>7}{work}")
        lines.append(f"next: {self.advice}")
        return "\n".join(lines)


@dataclass
class Step:
    """What was measured of one step, by part."""

    sequences: int = 0  # that each computed their last token, if nobody computed more; else 0
    seconds: dict[str, float] = field(default_factory=partial(defaultdict, float))
    calls: dict[str, float] = field(default_factory=partial(defaultdict, float))
    num_bytes: dict[str, float] = field(default_factory=partial(defaultdict, float))
    operations: dict[str, float] = field(default_factory=partial(defaultdict, float))

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Clock:
    """Gives every moment of a step to one part: that of the innermost call timed."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._part: str | None = None  # None: nobody's
        self._since = 0.0

    def timed(self, part: str | None, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time given to ``part`` (None: to nobody) but for what it calls that is timed itself."""

        def wrapped(*args: Any, **options: Any) -> Any:
            before = self._switch(part)
            try:
                return call(*args, **options)
            finally:
                self._switch(before)

        return wrapped

    def step(self, call: Callable[[], None]) -> Callable[[], None]:
        """The call that is a step; what nothing in it claims is "other"."""

        def wrapped() -> None:
            self.steps.append(Step())
            self.timed("other", call)()

        return wrapped

    def _switch(self, part: str | None) -> str | None:
        now, before = time.perf_counter(), self._part
        if before is not None:
            self.steps[-1].seconds[before] += now - self._since
        self._part, self._since = part, now
        return before


def _nbytes(*tensors: Any) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _profiled(ops: Ops, weights: Any, clock: Clock) -> Ops:
    """The ops of a model with these ``weights`` and of its sampler, timed by ``clock``."""
    products = {id(weights.head): "head"}
    for layer in weights.layers:
        products |= {id(getattr(layer, name)[0]): name for name in PRODUCTS[:-1]}

    def count(part: str, num_bytes: float, operations: float) -> None:
        step = clock.steps[-1]
        step.calls[part] += 1
        step.num_bytes[part] += num_bytes
        step.operations[part] += operations

    note = clock.timed(None, count)

    def kernel(part: str, op: Callable[..., Any], work: Callable[..., tuple[float, float]]) -> Callable[..., Any]:
        timed = clock.timed(part, op)

        def wrapped(*args: Any, **options: Any) -> Any:
            result = timed(*args, **options)
            note(part, *work(result, *args, **options))
            return result

        return wrapped

    def linear(x: Tensor, weights: Any, biases: Any = None, **options: Any) -> Tensor:
        def work(result: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
            return _nbytes(x, result, *weights, *(biases or ()), options.get("residual")), 2.0 * result.numel() * x.shape[1]

        return kernel(products[id(weights[0])], ops.linear, work)(x, weights, biases, **options)

    def attention_work(result: Tensor, q: Tensor, keys: Tensor, *args: Any, **options: Any) -> tuple[float, float]:
        """Of the keys and values of each context, every query of the sequence with each: as in decoding, where there is one."""
        _, query_start, context_len = args[1:4]
        tokens, heads, width = q.shape
        read = 2 * int(context_len.sum()) * keys.shape[1] * width * keys.element_size()
        pairs = int((context_len * query_start.diff()).sum())
        return read + _nbytes(q, result), 4.0 * pairs * heads * width

    def streamed(factor: float) -> Callable[..., tuple[float, float]]:
        """The work of an op that reads its first argument and writes its result, with so many operations for each number of it."""
        return lambda result, x, *_, **__: (_nbytes(x, result), factor * result.numel())

    def sampled(result: Any, logits: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
        return logits.nbytes, 0.0

    return dataclasses.replace(
        ops,
        embed=kernel("embed", ops.embed, lambda result, *_: (2 * result.nbytes, 0.0)),
        linear=linear,
        rms_norm=kernel("norms", ops.rms_norm, streamed(4)),
        rope_append=kernel("rope", ops.rope_append, streamed(6)),
        paged_attention=kernel("attention", ops.paged_attention, attention_work),
        silu_mul=kernel("activation", ops.silu_mul, streamed(5)),
        sample=kernel("sampling", ops.sample, sampled),
    )


@contextmanager
def _watched(decoder: Decoder, clock: Clock) -> Iterator[None]:
    """While it lasts the decoder's steps are timed; its model runs op by op over the same weights and cache."""
    loop = decoder.loop
    ops = _profiled(decoder.ops, decoder.model.weights, clock)
    model = Transformer(decoder.model.config, decoder.model.weights, ops)
    execute = clock.timed("commit", loop._execute)

    def look_and_execute(plan: StepPlan) -> None:
        decodes = all(scheduled.num_tokens == 1 and scheduled.rows for scheduled in plan.sequences)
        clock.steps[-1].sequences = len(plan.sequences) if decodes else 0
        execute(plan)

    replaced: list[tuple[Any, str, Any]] = [
        (loop.runner, "model", model),
        (loop.sampler, "ops", ops),
        (loop.runner, "run", clock.timed("layers", loop.runner.run)),
        (loop.runner, "_prepare", clock.timed("batch", loop.runner._prepare)),
        (loop.scheduler, "plan", clock.timed("plan", loop.scheduler.plan)),
        (loop.sampler, "draw", clock.timed("rows", loop.sampler.draw)),
        (loop, "_execute", look_and_execute),
        (loop, "step", clock.step(loop.step)),
    ]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            if value is None:  # a method of its class
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)


@dataclass(frozen=True)
class Setting:
    """What of a decoder advice may change."""

    weights: str  # a format of kernels.packed or kernels.quantized, or "shared": rows where they lie
    kv_dtype: torch.dtype
    batch_size: int
    max_batch_size: int
    drafts: bool

    @property
    def in_float32(self) -> bool:
        """Whether products multiply in float32, whose rate is measured; packed bfloat16 and integers have instructions of their own."""
        return self.weights in ("shared", "float32", "float16")

    @property
    def larger_batches(self) -> str:
        if self.batch_size < self.max_batch_size:
            return f"decode more sequences at once (this was {self.batch_size}; max_batch_size allows {self.max_batch_size})"
        return f"a larger max_batch_size (it is {self.max_batch_size})"


def advise(parts: Sequence[Part], setting: Setting, read_bandwidth: float, flop_rate: float) -> str:
    """The setting worth changing next, in a sentence: that of the largest share of the step which has one."""
    seconds = sum(part.seconds for part in parts)
    shares = {part.name: part.seconds / seconds for part in parts}
    products = [part for part in parts if part.name in PRODUCTS]
    shares = {
        "products": sum(shares[part.name] for part in products),
        "attention": shares["attention"],
        "overhead": sum(share for name, share in shares.items() if name not in _KERNELS),
    }
    largest = max(shares, key=lambda name: shares[name])
    much = f"{shares[largest]:.0%} of the step"
    if largest == "overhead":
        return f"{much} is spent around the kernels, which sequences share: {setting.larger_batches}"
    if largest == "attention":
        if setting.kv_dtype != torch.int8:
            return (
                f"{much} is attention over keys and values: kv_dtype=torch.int8 reads a part of the bytes, for a small error of the logits"
            )
        return f"{much} is attention over keys and values, which are int8 already: only shorter contexts make it less"
    reading = sum(part.num_bytes for part in products) / read_bandwidth
    if setting.in_float32:
        arithmetic = sum(part.operations for part in products) / flop_rate > reading
    else:
        arithmetic = sum(part.seconds for part in products) > 2 * reading
    if arithmetic:
        if setting.weights in INTEGER_FORMATS:
            return f"{much} is arithmetic of products: nothing but more cores (engine.set_num_threads) makes it less"
        return f"{much} is arithmetic of products: weights='int8' multiplies integers, for a small error of the logits"
    reads = f"{much} is reading weights"
    if setting.batch_size > 1 and setting.weights == "shared":
        return f"{reads}, which rows of a step share better in the kernels' order: weights='packed'"
    if setting.batch_size == 1 and not setting.drafts:
        return f"{reads} for a single row: draft=... verifies several tokens in one read, or {setting.larger_batches}"
    if setting.weights == "int4":
        return f"{reads}, which are int4 already: {setting.larger_batches}"
    smaller = "int4" if setting.weights in ("int8", "fp8") else "int8"
    return f"{reads}: weights='{smaller}' makes them fewer bytes, for an error of the logits; {setting.larger_batches} costs none"


def explain(decoder: Decoder, batch_size: int, context: int | None, steps: int | None) -> Explanation:
    """See ``Decoder.explain``."""
    if decoder.parallel is not None:
        raise RuntimeError(f"explain() times a model that is whole; of this one there is {decoder.parallel!r} here")
    loop = decoder.loop
    if isinstance(batch_size, int) and batch_size > 0:
        room = min(decoder.config.max_position, loop.pool.num_blocks // batch_size * loop.pool.block_size)
        if context is None:
            context = min(128, max(1, room // 2))
        if steps is None and isinstance(context, int):
            steps = min(32, max(1, room - 1 - context))
    for name, value, most in (
        ("batch_size", batch_size, loop.scheduler.max_batch_size),
        ("context", context, decoder.config.max_position - 2),
        ("steps", steps, decoder.config.max_position - 1 - context if isinstance(context, int) else 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an integer")
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; here it must be from 1 to {most}")
    if decoder.model.device.type != "cpu":
        raise RuntimeError("explain() times the kernels of a CPU; benchmarks/run.py --device cuda holds those of a GPU against its limits")
    if decoder.has_work:
        raise RuntimeError("explain() times steps of its own, and this decoder has unfinished requests; finish or abort them first")
    assert context is not None and steps is not None
    prompts = [[(31 * row + 7 * place) % decoder.config.vocab_size for place in range(context)] for row in range(batch_size)]
    clock = Clock()
    with _watched(decoder, clock):
        outputs = decoder.generate(prompts, max_new_tokens=steps + 1, ignore_eos=True, do_sample=False, seed=0)
    for output in outputs:
        if output.error:
            raise RuntimeError(f"a step that explain() has run failed: {output.error}")
    decoding = sorted((step for step in clock.steps if step.sequences == batch_size), key=lambda step: step.total)
    if not decoding:
        raise RuntimeError(f"no step had all {batch_size} sequences; steps is {steps}, and prompts or cache may take more than one")
    head = decoder.model.weights.head
    setting = Setting(
        "shared" if isinstance(head, torch.Tensor) else head.format,
        loop.cache.dtype,
        batch_size,
        loop.scheduler.max_batch_size,
        loop.speculator is not None,
    )
    return _summary(decoding[: (len(decoding) + 1) // 2], setting, context, len(decoding))


def _summary(chosen: list[Step], setting: Setting, context: int, steps: int) -> Explanation:
    """The mean of some of the ``steps`` that were run."""
    n = len(chosen)
    bandwidth = limits.read_bandwidth(int(sum(sum(step.num_bytes.values()) for step in chosen) / n))
    rate = limits.flop_rate()
    parts = []
    for name in PARTS:
        num_bytes, operations = sum(step.num_bytes[name] for step in chosen) / n, sum(step.operations[name] for step in chosen) / n
        limit = num_bytes / bandwidth
        if setting.in_float32 or name not in PRODUCTS:
            limit = max(limit, operations / rate)
        seconds, calls = sum(step.seconds[name] for step in chosen) / n, sum(step.calls[name] for step in chosen) / n
        parts.append(Part(name, seconds, calls, num_bytes, operations, limit))
    advice = advise(parts, setting, bandwidth, rate)
    return Explanation(setting.batch_size, context, steps, sum(part.seconds for part in parts), tuple(parts), bandwidth, rate, advice)
