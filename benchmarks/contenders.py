"""Those that decode the same prompts in turn, and what is counted of each: the engine, and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import interleaved
from peers.transformers import make_clock
from tqdm import tqdm

from engine import Decoder, RequestOutput


@dataclass
class Tally:
    """What a contender has done: sums over its requests, first tokens not counted."""

    tokens: int = 0
    seconds: float = 0.0
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    outputs: list[list[int]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # of each call

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.rates.append(tokens / seconds)

    def json(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.tokens / self.seconds, "tokens_per_forward": self.tokens / self.forwards,
            "forwards_saved": 1 - self.forwards / self.tokens, "drafted": self.drafted, "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else 0.0, "tokens": self.tokens, "seconds": self.seconds,
            "rates": self.rates,
        }  # fmt: skip


class Ours:
    """Decodes one batch of prompts after the other; each call is the next."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[list[int]]], new: int, **options: Any) -> None:
        self.decoder, self.tally = decoder, Tally()
        self._options = options | {"max_new_tokens": new, "ignore_eos": True}
        self._prompts = iter(prompts)

    def warm(self, prompts: Sequence[list[int]]) -> None:
        self.decoder.generate(list(prompts), **self._options)

    def __call__(self) -> float:
        outputs = self.decoder.generate(list(next(self._prompts)), **self._options)
        return self._count(outputs)

    def _count(self, outputs: Sequence[RequestOutput]) -> float:
        t = self.tally
        metrics = [output.metrics for output in outputs]
        # The first token comes with the prompt.
        seconds = max(m.total_time for m in metrics) - max(m.time_to_first_token or 0.0 for m in metrics)
        t.add(sum(m.num_new_tokens - 1 for m in metrics), seconds)
        for output, m in zip(outputs, metrics, strict=True):
            assert output.error is None, output.error
            t.forwards += m.num_forwards - 1
            t.drafted += m.num_drafted
            t.accepted += m.num_accepted
            t.outputs.append(output.token_ids)
        return seconds


class Transformers:
    """The same through transformers' ``generate``."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[list[int]]], new: int, temperature: float, **options: Any) -> None:
        self.model, self.tally, self._new = model, Tally(), new
        self._options = options | ({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False})
        self._prompts = iter(prompts)

    def warm(self, prompts: Sequence[list[int]]) -> None:
        self._generate(prompts)

    def __call__(self) -> float:
        marks, outputs = self._generate(next(self._prompts))
        (start, before), (end, after) = marks[0], marks[-1]
        t = self.tally
        t.add((after - before) * len(outputs), end - start)
        t.forwards += (len(marks) - 1) * len(outputs)
        t.outputs += outputs
        return end - start

    def _generate(self, prompts: Sequence[list[int]]) -> tuple[list[tuple[float, int]], list[list[int]]]:
        ids = torch.tensor(prompts)
        clock = make_clock()
        torch.manual_seed(7)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._new, pad_token_id=0, stopping_criteria=[clock], **self._options
        )
        return clock.marks, out[:, ids.shape[1] :].tolist()


def compete(
    contenders: dict[str, Any], warm: Sequence[list[int]], rounds: int, what: str, exact: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """All contenders on all prompts, in turn; those that are ``exact`` must have the tokens of "plain"."""
    for contender in contenders.values():
        contender.warm(warm)
    with tqdm(total=rounds * len(contenders), desc=what, disable=None, leave=False) as progress:
        interleaved(contenders, rounds, progress)
    for name in exact:
        if contenders[name].tally.outputs != contenders["plain"].tally.outputs:
            raise AssertionError(f"{what}: with {name} the tokens are not those of plain decoding")
    return {name: contender.tally.json() for name, contender in contenders.items()}
