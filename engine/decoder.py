"""The face of the engine: ``Decoder(model).generate(...)``, and the loop plan -> run -> decide -> commit behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import kernels as kernels_module
from .admission import DEFAULT_NEW_TOKENS, build_requests
from .blocks import BlockPool
from .decode import beam_request, speculate
from .decode.beam_rows import choose
from .decode.grammar import GrammarError, Grammars
from .decode.sample import Sampler
from .drafters.speculator import Speculator, make_drafters
from .explain import Explanation, explain
from .kv_cache import KVCache, block_bytes, size_cache
from .models.load import load
from .outputs import FinishReason, RequestOutput, StreamEvent
from .params import SamplingParams
from .prompts import Prompts, to_token_lists
from .request import Drawn, Request
from .runner import Runner
from .scheduler import Scheduler, StepPlan
from .tokenizer import Tokenizer


class Decoder:
    """Decodes many requests at once with one model over a paged KV cache.

    Args:
        model: a live PyTorch model, or a path: a Hugging Face folder or a checkpoint of the origin model.
        tokenizer: a path, a ``tokenizers.Tokenizer`` or a fast transformers tokenizer; default: the one in the model's folder, if any.
            Without one, prompts are token ids and outputs have no text.
        max_position: shorten the model's length, and with it the RoPE tables; default: the model's own.
        origin_config: for a bare checkpoint file of the origin model, what its shapes do not tell, e.g. ``{"n_heads": 12}``.
        dtype: convert the weights of a folder to this on loading; default: as stored.
        weights: "shared": read where they lie (a live model's changes are seen by the next step, nothing is copied); "packed": an own copy
            in the kernels' order, faster with several rows a step; "int8" or "int4": that copy quantised, per output channel or in groups
            of 32 inputs, with activations in int8. Default: "shared" for a live model, "packed" for a path.
        kv_dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.int8`` (a quarter of the memory and reading of float32, for a small
            error of the logits); default: bfloat16 for bfloat16 weights, else float32.
        kernels: a backend's name, or "auto" for the fastest present.
        max_batch_size: most sequences decoded in one step.
        max_batch_tokens: most query tokens in one step, prompts included.
        prefill_chunk: most tokens of one prompt in one step; default: ``max_batch_tokens``.
        cache_tokens: tokens the KV cache holds in all; default: what ``max_batch_size`` full-length sequences need, but at most a quarter
            of the free memory.
        block_size: tokens per cache block, a positive multiple of 16.
        draft: guesses tokens that the model then verifies several at a time, which changes no output and saves steps (speculative
            decoding): a smaller model of the same vocabulary (live, or a path; "bundled" for the one that comes with the package), a
            drafter (``DraftModel``, ``PromptLookup``, ``SuffixLookup``), or a list of them, of which the first that has a guess is taken.
            How much is drafted for a request follows what pays; see ``speculative``, ``num_assistant_tokens`` and ``verification`` of
            ``SamplingParams``.

    Not thread-safe: one thread at a time may use a decoder. Several ``stream`` iterators of one decoder may be interleaved; their requests
    share its steps.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        max_position: int | None = None,
        origin_config: Any = None,
        dtype: torch.dtype | None = None,
        weights: str | None = None,
        kv_dtype: torch.dtype | None = None,
        kernels: str = "auto",
        max_batch_size: int = 64,
        max_batch_tokens: int = 512,
        prefill_chunk: int | None = None,
        cache_tokens: int | None = None,
        block_size: int = 16,
        draft: Any = None,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size), ("max_batch_tokens", max_batch_tokens), ("block_size", block_size),
            ("prefill_chunk", prefill_chunk), ("cache_tokens", cache_tokens), ("max_position", max_position),
        ):  # fmt: skip
            required = name in ("max_batch_size", "max_batch_tokens", "block_size")
            if (value is None and required) or not isinstance(value, (int, type(None))) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be an integer{'' if required else ' or None'}")
        if kv_dtype is not None and not isinstance(kv_dtype, torch.dtype):
            raise TypeError(f"kv_dtype is {kv_dtype!r}; it must be torch.float32, torch.bfloat16 or torch.int8")
        self.ops = kernels_module.select("cpu", kernels)
        loaded = load(model, ops=self.ops, dtype=dtype, max_position=max_position, origin_config=origin_config, weights=weights)
        self.model = loaded.model
        self.config = config = loaded.config
        self.name = loaded.name
        source = tokenizer if tokenizer is not None else loaded.tokenizer_path
        self.tokenizer = None if source is None else Tokenizer(source)
        self.grammars = Grammars(self.tokenizer, config.vocab_size, config.eos_token_ids)
        if kv_dtype is None:
            kv_dtype = torch.bfloat16 if self.model.dtype == torch.bfloat16 else torch.float32
        bytes_per_block = block_bytes(config.num_layers, config.num_kv_heads, config.head_dim, block_size, kv_dtype)
        num_blocks = size_cache(cache_tokens, max_batch_size * config.max_position, block_size, bytes_per_block)
        self.pool = BlockPool(num_blocks, block_size)
        self.cache = KVCache(
            config.num_layers, config.num_kv_heads, config.head_dim, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype
        )
        self.scheduler = Scheduler(
            self.pool,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            prefill_chunk=max_batch_tokens if prefill_chunk is None else prefill_chunk,
        )
        self.runner = Runner(self.model, self.cache, block_size)
        self.sampler = Sampler(self.ops)
        self.speculator: Speculator | None = None
        if draft is not None:
            self.speculator = Speculator(make_drafters(draft), config, self.tokenizer, max_batch_size=max_batch_size, block_size=block_size)
            self.scheduler.on_preemption = self.speculator.release
        self.num_steps = 0  # steps run so far
        self._stepping = False

    @classmethod
    def bundled(cls, **options: Any) -> Decoder:
        """A decoder over the small model that comes with the package; options as for ``Decoder`` (``draft="bundled"``: its smaller one)."""
        return cls(Path(__file__).parent / "bundled" / "target", **options)

    def generate(
        self,
        prompts: Prompts,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Decode to the end.

        Args:
            prompts: a string, a list of strings, token ids, lists of them, or an integer tensor ``[B, T]``. Lengths may differ.
            params: one ``SamplingParams`` for all prompts or a list with one each.
            attention_mask: ``[B, T]`` beside a tensor of prompts; 0 marks padding.
            **options: the fields of ``SamplingParams`` (or their usual other names) instead of ``params``.

        Returns:
            One output per prompt and returned sequence, in order: ``num_return_sequences`` of the first prompt, then of the second, ...

        Raises:
            ValueError, TypeError: bad input, named in one sentence, before any work is done. A request that fails later (NaN in its
                logits, no token left to draw, a processor that raises) does not raise: its output has ``finish_reason`` "error".
            ImportError: a grammar is asked for and llguidance is not installed.
        """
        requests = self._requests("generate()", prompts, attention_mask, params, options)
        total = sum(request.num_outputs for request in requests)
        for request in requests:
            request.streams = False
        with tqdm(total=total, desc="decoding", unit="request", disable=None, delay=2, leave=False) as finished:
            for _ in self._run(requests):
                finished.update()
        return [output for request in requests for output in request.outputs]

    def stream(
        self,
        prompts: Prompts,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Iterator[StreamEvent]:
        """Like ``generate``, but yields tokens and text as they come; bad input raises here, before the first event.

        Leaving the iterator early aborts what is unfinished.
        """
        return self._run(self._requests("stream()", prompts, attention_mask, params, options))

    def generate_super(
        self,
        idx: Tensor,
        stop_id: int | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 1.0,
        top_k: int | None = None,
        do_sample: bool = False,
        num_beams: int = 1,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        *,
        compat: str | None = None,
    ) -> Tensor:
        """The origin model's ``generate_super`` call, unchanged: new tokens ``[B, n]`` int64 for ``idx [B, T]``.

        It repairs the original where that is wrong: ``do_sample=False`` is greedy at every temperature (the original samples from 0.1 on);
        temperature 0 or below is greedy; batches work with and without padding on either side; every row runs to its own stop token,
        which is included, and is then filled with ``pad_token_id`` (default: ``stop_id``, else the model's, else 0). Prompt and new tokens
        must fit the model's length (the original drops the oldest tokens). Draws follow ``torch.manual_seed``.

        ``num_beams`` below 1 is 1, as in the original. Above 1 it gives the best sequence by the plain sum of its log-probabilities, which
        temperature and ``top_k`` shape in each beam. Repaired: beams that end are kept and go on no more (the original writes past the
        stop token and may lose a better sequence); temperature 0 or below leaves log-probabilities as they are (the original divides by
        0.001, which makes beams greedy); with ``do_sample`` the sequence is drawn, the first of stochastic beams. ``compat="origin"``
        decides as the original does: nothing is retired, a search ends when its best beam has just ended, temperature 0 is 0.001, and
        ``do_sample`` ignores beams.
        """
        if isinstance(num_beams, bool) or not isinstance(num_beams, int):
            raise TypeError(f"num_beams is {num_beams!r}; it must be an integer")
        if compat not in (None, "origin"):
            raise ValueError(f"compat is {compat!r}; it must be None or 'origin'")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"temperature is {temperature!r}; it must be a number")
        if stop_id is not None and (not isinstance(stop_id, int) or not 0 <= stop_id < self.config.vocab_size):
            raise ValueError(f"stop_id is {stop_id!r}; it must be None or a token id from 0 to {self.config.vocab_size - 1}")
        for name, value in (("top_k", top_k), ("pad_token_id", pad_token_id)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} is {value!r}; it must be an integer or None")
        if top_k is not None and top_k < 1:
            top_k = None  # as the original does
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": max(temperature, 0.0),
            "top_k": top_k,
            "do_sample": do_sample,
            "ignore_eos": True,  # the original knows only stop_id
            "stop_token_ids": () if stop_id is None else (stop_id,),
        }
        as_origin = compat == "origin"
        if num_beams > 1 and not (as_origin and do_sample):
            options["num_beams"] = num_beams
            if not do_sample:
                options["length_penalty"] = 0.0
            if temperature <= 0:
                options["temperature"] = 0.001 if as_origin else None
        requests = self._requests("generate_super()", idx, attention_mask, None, options, beams_as_origin=as_origin)
        for request in requests:
            request.streams = False
        for _ in self._run(requests):
            pass
        outputs = [output for request in requests for output in request.outputs]
        for output in outputs:
            if output.error:
                raise RuntimeError(f"row {output.prompt_index}: {output.error}")
        pad = next(p for p in (pad_token_id, stop_id, self.config.pad_token_id, 0) if p is not None)
        rows = [torch.tensor(output.token_ids) for output in outputs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    def explain(self, batch_size: int = 1, context: int = 128, steps: int = 32) -> Explanation:
        """Where the time of a step of decoding goes: runs some, of made-up prompts, and times their parts.

        Its kernels are called one by one, each timed, which costs the whole some microseconds for each of them; ``num_bytes`` and
        ``operations`` are what each must move and do, and its limit the least time that takes this machine, whose read bandwidth and
        multiply-add rate are measured in the same call.

        Args:
            batch_size: sequences, from 1 to ``max_batch_size``.
            context: tokens that each has before the first step that is timed.
            steps: of decoding.

        Raises:
            ValueError, TypeError: an argument cannot be, or the cache does not hold such sequences.
            RuntimeError: the decoder has unfinished requests, or a step failed.
        """
        return explain(self, batch_size, context, steps)

    def _requests(
        self,
        caller: str,
        prompts: Prompts,
        attention_mask: Tensor | None,
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: dict[str, Any],
        *,
        beams_as_origin: bool = False,
    ) -> list[Request]:
        token_lists = to_token_lists(prompts, attention_mask, self.tokenizer, self.config.vocab_size)
        return build_requests(
            caller, token_lists, params, options, self.config, self.tokenizer, self.scheduler, self.grammars,
            can_draft=self.speculator is not None, beams_as_origin=beams_as_origin,
        )  # fmt: skip

    def _run(self, requests: list[Request]) -> Iterator[StreamEvent]:
        """Queue the requests and step until all have finished, yielding their events; whatever is unfinished on leaving is aborted."""
        inbox: deque[StreamEvent] = deque()
        for request in requests:
            request.events = inbox
        try:
            self._enqueue(requests)
            unfinished = sum(request.num_outputs for request in requests)
            while unfinished:
                if not inbox:
                    self.step()
                while inbox:
                    event = inbox.popleft()
                    unfinished -= event.output is not None
                    yield event
        finally:
            for request in requests:
                if not request.finished:
                    self._finish(request, "abort")

    def _enqueue(self, requests: list[Request]) -> None:
        """Queue requests; samples of one prompt go together, the first with the others as followers, in groups that fit a batch."""
        leader: Request | None = None
        for request in requests:
            same_prompt = leader is not None and request.prompt_index == leader.prompt_index
            if leader is not None and same_prompt and not leader.searches and 1 + len(leader.followers) < self.scheduler.max_batch_size:
                leader.followers.append(request)
            else:
                leader = request
                self.scheduler.add(leader)

    def step(self) -> None:
        """One step of the loop: plan, run, commit, decide. Progress arrives as events of the requests."""
        if self._stepping:
            raise RuntimeError("this decoder is in the middle of a step; a logits_processor must not call its own decoder")
        self._stepping = True
        try:
            self._step()
        finally:
            self._stepping = False

    def _step(self) -> None:
        start = time.perf_counter()
        if self.speculator is not None:
            self.speculator.propose(self.scheduler.running)
        plan = self.scheduler.plan()
        if not plan.sequences:
            assert not self.scheduler.has_work, "requests wait, yet none can be scheduled"
            return
        try:
            self._execute(plan)
        except BaseException:
            # What of this step is in the cache, and who has had a token, is not certain: all running requests start over from the
            # tokens they have, and by the token law draw what they would have drawn.
            self.scheduler.preempt_running()
            raise
        if self.speculator is not None and all(scheduled.num_tokens == 1 for scheduled in plan.sequences):
            rows = sum(1 + len(scheduled.draft) for scheduled in plan.sequences)
            self.speculator.note_step(len(plan.sequences), rows, time.perf_counter() - start)

    def _execute(self, plan: StepPlan) -> None:
        logits = self.runner.run(plan)
        self.num_steps += 1
        self.scheduler.commit(plan)
        if logits is None:
            return
        if plan.drawing:
            drawn = self.sampler.draw(logits[: len(plan.drawing)] if plan.beams else logits, plan.drawing)
            for verdict in speculate.verdicts(self.ops, plan, logits, drawn):
                self._carry_out(verdict)
        if plan.beams:
            for choice in choose(self.ops, logits[len(plan.drawing) :] if plan.drawing else logits, plan.beams):
                if choice.error is not None:
                    self._finish(choice.request, "error", error=choice.error)
                    continue
                beam_request.go_on(choice, self.pool)
                if choice.request.finished:
                    self._remove(choice.request)

    def _carry_out(self, verdict: speculate.Verdict) -> None:
        """Give a request its next tokens, as far as it goes on, and keep of its draft in the cache what holds."""
        request = verdict.request
        request.num_forwards += 1
        if self.speculator is not None and verdict.draft:
            self.speculator.learn(verdict)
        end = request.num_tokens
        for drawn in verdict.drawn:
            if drawn.error is not None:
                self._finish(request, "error", error=drawn.error)
            else:
                self._advance(request, drawn)
            if request.finished:
                return
        if verdict.draft:
            # The root is the token before `end`; node n of the draft was written n slots after it.
            moved = [(end - 1 + node, end - 1 + depth) for depth, node in enumerate(verdict.path) if node != depth]
            if moved:
                table, size = request.block_table, self.pool.block_size
                sources, targets = ([table[i // size] * size + i % size for i in places] for places in zip(*moved, strict=True))
                self.cache.move_tokens(self.ops, sources, targets)
            self.scheduler.accept(request, verdict.num_accepted)

    def _advance(self, request: Request, drawn: Drawn) -> None:
        """Append a drawn token, settle its text, and end the request where it ends."""
        request.append(drawn)
        token = drawn.token
        if token in request.end_token_ids:
            self._finish(request, "stop", stop_reason=token, drawn=drawn)
            return
        text, matched, complete = "", None, False
        if request.text_state is not None:
            try:
                text, matched = request.text_state.feed(token)
            except Exception as error:  # a tokenizer may raise anything; it is this request's alone
                self._finish(request, "error", error=f"the tokenizer cannot decode token {token}: {error}", drawn=drawn)
                return
        if request.matcher is not None:
            try:
                request.matcher.advance(request.tokens, len(request.prompt))
            except GrammarError as error:
                self._finish(request, "error", error=f"the grammar cannot go on after token {token}: {error}", drawn=drawn, text=text)
                return
            complete = request.matcher.complete and request.num_new_tokens >= request.params.min_new_tokens
        if matched is not None or complete:
            self._finish(request, "stop", stop_reason=matched, drawn=drawn, text=text)
        elif request.num_new_tokens == request.max_new_tokens:
            self._finish(request, "length", drawn=drawn, text=text)
        elif request.streams:
            request.events.append(self._event(request, drawn, text))

    def _event(self, request: Request, drawn: Drawn | None, text: str, output: RequestOutput | None = None) -> StreamEvent:
        """Progress by one drawn token, or by none."""
        tokens = [] if drawn is None else [drawn.token]
        logprobs = [] if drawn is None else [drawn.logprob]
        top = None if request.params.logprobs == 0 else [] if drawn is None else [drawn.top or {}]
        return StreamEvent(request.prompt_index, request.index, tokens, text, output, logprobs, top)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop_reason: int | str | None = None,
        error: str | None = None,
        drawn: Drawn | None = None,
        text: str = "",
    ) -> None:
        if request.searches:
            beam_request.fail(request, reason, error=error)
            self._remove(request)
            return
        whole = None
        if request.text_state is not None:
            if not isinstance(stop_reason, str) and error is None:  # after a stop string no text may follow
                rest, matched = request.text_state.flush()
                text += rest
                if matched is not None and stop_reason is None and reason != "abort":
                    reason, stop_reason = "stop", matched
            whole = request.text_state.text
        output = request.finish(reason, text=whole, stop_reason=stop_reason, error=error)
        request.events.append(self._event(request, drawn, text, output))
        self._remove(request)

    def _remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        if self.speculator is not None:
            self.speculator.release(request)
