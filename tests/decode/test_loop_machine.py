"""Any interleaving of submit, abort, step, timeout, preemption and failure with a real model: results as alone, one end for each output,
tokens in their order, and the pool at its baseline."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
from decode.fake_device import on_fake_device
from decode.small_models import small_llama
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from engine import BeamParams, Decoder, DraftModel, SamplingParams
from engine.request import Submission

SHARED = [(5 * i * i + i) % 7 + 5 for i in range(60)]
PROMPTS = [SHARED[:n] + end for n in (1, 15, 16, 33, 60) for end in ([], [3, 4])]
PARAMS = [
    SamplingParams(max_new_tokens=6, ignore_eos=True),
    SamplingParams(max_new_tokens=30, temperature=1.0, seed=1, ignore_eos=True),
    SamplingParams(max_new_tokens=18, temperature=0.7, top_k=5, seed=2, num_return_sequences=3, frequency_penalty=0.5),
    SamplingParams(max_new_tokens=1),
    BeamParams(max_new_tokens=9, num_beams=3, num_return_sequences=2),
    BeamParams(max_new_tokens=5, num_beams=4, num_beam_groups=2, diversity_penalty=0.4),
    SamplingParams(max_new_tokens=20, temperature=1.0, top_p=0.9, seed=3, num_return_sequences=2),
    SamplingParams(max_new_tokens=40, temperature=2.0, seed=4, stop_token_ids=list(range(20))),
]

_model = small_llama()
_reference = Decoder(_model, cache_tokens=1024)
_alone: dict[tuple[int, int], list[tuple]] = {}


def alone(prompt: int, params: int) -> list[tuple]:
    """Tokens, log-probabilities and reason of each output of a request by itself."""
    if (prompt, params) not in _alone:
        outputs = _reference.generate(PROMPTS[prompt], params=PARAMS[params])
        _alone[prompt, params] = [(o.token_ids, o.logprobs, o.finish_reason) for o in outputs]
    return _alone[prompt, params]


class Machine(RuleBasedStateMachine):
    forward = "forward_logits"  # what of the model a step calls
    params: Sequence[int] = range(len(PARAMS))

    def settle_on_device(self) -> None:
        """Where this decoder's steps run."""

    def same(self, logprobs: list[float], expected: list[float]) -> bool:
        return logprobs == expected

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        cache_tokens=st.sampled_from([192, 320, 1024]),
        size=st.sampled_from([4, 6, 16]),
        chunk=st.sampled_from([None, 7]),
        drafts=st.booleans(),
    )
    def begin(self, seed: int, cache_tokens: int, size: int, chunk: int | None, drafts: bool) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.decoder = Decoder(
            _model, cache_tokens=cache_tokens, max_batch_size=size, max_batch_tokens=40, prefill_chunk=chunk, prefix_cache=True,
            draft=DraftModel(_model) if drafts else None,
        )  # fmt: skip
        self.settle_on_device()
        self.decoder.loop.scheduler.clock = lambda: self.now
        self.submissions: list[tuple[Submission, int, int]] = []

    @rule()
    def submit(self) -> None:
        prompt, params = self.rng.randrange(len(PROMPTS)), self.rng.choice(self.params)
        terms = {"priority": self.rng.choice([0, 0, -1, 1]), "timeout": self.rng.choice([None, None, 2.0]), "cache_salt": None}
        submission = self.decoder.submit(PROMPTS[prompt], params=PARAMS[params], **terms)
        self.submissions.append((submission, prompt, params))

    @rule(times=st.integers(1, 9))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.decoder.step()
            self.decoder.loop.scheduler.check()

    @rule()
    def abort(self) -> None:
        unfinished = [submission for submission, *_ in self.submissions if not submission.finished]
        if unfinished:
            self.decoder.abort(self.rng.choice(unfinished))
            self.decoder.loop.scheduler.check()

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(reset=st.booleans())
    def preempt(self, reset: bool) -> None:
        if reset:
            self.decoder.reset_prefix_cache()
        else:
            self.decoder.loop.scheduler.preempt_running()
        self.decoder.loop.scheduler.check()

    @rule(error=st.sampled_from([RuntimeError, KeyboardInterrupt]), after=st.booleans())
    def fail(self, error: type[BaseException], after: bool) -> None:
        model = self.decoder.loop.runner.model
        forward = getattr(model, self.forward)

        def failing(*step):
            if after:
                forward(*step)
            raise error("planted")

        setattr(model, self.forward, failing)
        try:
            self.decoder.step()
        except KeyboardInterrupt:
            assert error is KeyboardInterrupt
        finally:
            delattr(model, self.forward)
        self.decoder.loop.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "decoder"):
            return
        for _ in range(3000):
            if not self.decoder.has_work:
                break
            self.decoder.step()
        assert not self.decoder.has_work, "somebody never ends"
        reasons: dict[str, int] = defaultdict(int)
        for submission, prompt, params in self.submissions:
            self._check(submission, alone(prompt, params))
            for output in submission.outputs:
                reasons[output.finish_reason] += 1
        stats = self.decoder.stats()
        assert stats.num_finished == reasons and stats.num_running == stats.num_waiting == 0
        pool = self.decoder.loop.pool
        pool.check([])
        assert stats.num_free_blocks == pool.num_free == pool.num_blocks

    def _check(self, submission: Submission, expected: list[tuple]) -> None:
        """Events and outputs of a submission that has ended."""
        outputs = {output.index: output for output in submission.outputs}
        assert len(outputs) == len(submission.outputs) == submission.num_outputs == len(expected)
        events = defaultdict(list)
        for event in submission.events:
            events[event.index].append(event)
        for index, output in outputs.items():
            ends = [event.output is not None for event in events[index]]
            assert ends.count(True) == 1 and ends[-1], "an output ends once, and last"
            assert [token for event in events[index] for token in event.token_ids] == output.token_ids
            tokens, logprobs, reason = expected[index]
            if output.finish_reason in ("abort", "error"):
                assert output.finish_reason == "abort" or "planted" in output.error
                if not submission.requests[0].searches:
                    assert output.token_ids == tokens[: len(output.token_ids)]
                    assert self.same(output.logprobs, logprobs[: len(output.token_ids)])
            else:
                assert (output.token_ids, output.finish_reason) == (tokens, reason)
                assert self.same(output.logprobs, logprobs)


class MachineOnDevice(Machine):
    """Steps as on a GPU: graphs of padded sizes, the host one step behind, rows drawn by the LM head."""

    forward = "hidden"

    def settle_on_device(self) -> None:
        self.device = on_fake_device(self.decoder, self.rng.randrange(1 << 30))
        # Steps run ahead of their tokens where all rows are such as the device draws for, and nobody drafts.
        if self.decoder.loop.speculator is None:
            self.params = self.rng.choice([(0, 1, 3, 6, 7), self.params])

    @rule()
    def run_on(self) -> None:
        for _ in range(30):
            self.decoder.step()
        self.decoder.loop.scheduler.check()

    def same(self, logprobs: list[float], expected: list[float]) -> bool:
        return logprobs == pytest.approx(expected, abs=1e-5)  # sums in another order


TestMachine = Machine.TestCase
TestMachineOnDevice = MachineOnDevice.TestCase
TestMachine.settings = TestMachineOnDevice.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
