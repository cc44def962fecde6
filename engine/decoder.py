"""The face of the engine: ``Decoder(model).generate(...)``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import kernels as kernels_module
from . import parallel_runner
from .admission import DEFAULT_NEW_TOKENS, build_requests, check_terms
from .blocks import BlockPool
from .choose_runner import choose_runner
from .decode.grammar import Grammars
from .drafters.speculator import Speculator, make_drafters
from .explain import Explanation, explain
from .kv_cache import KVCache, block_bytes, size_cache
from .loop import StepLoop
from .models.load import load
from .outputs import RequestOutput, StreamEvent
from .parallel import Parallel
from .params import SamplingParams
from .prompts import Prompts, to_token_lists
from .request import Submission
from .scheduler import Scheduler
from .stats import Stats
from .tokenizer import Tokenizer

MAX_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}


class Decoder:
    """Decodes many requests at once with one model over a paged KV cache.

    Args:
        model: a live PyTorch model, or a path: a Hugging Face folder or a checkpoint of the origin model.
        tokenizer: a path, a ``tokenizers.Tokenizer`` or a fast transformers tokenizer; default: the one in the model's folder, if any.
            Without one, prompts are token ids and outputs have no text.
        max_position: shorten the model's length, and with it the RoPE tables; default: the model's own.
        origin_config: for a bare checkpoint file of the origin model, what its shapes do not tell, e.g. ``{"n_heads": 12}``.
        dtype: convert the weights of a folder to this on loading; default: as stored.
        device: where a model given by path goes, "cpu" or "cuda" (with a number or without); default: a GPU if there is one, else the CPU.
            A live model stays where it is.
        weights: "shared": read where they lie (a live model's changes are seen by the next step, nothing is copied); "packed" (CPU only):
            an own copy in the kernels' order, faster with several rows a step; "int8" or "int4": a copy quantised, per output channel or
            in groups of 32 inputs, on a CPU with activations in int8; "fp8" (GPU only): in float8_e4m3fn, per output channel. Default:
            "shared" for a live model and on a GPU, "packed" for a path.
        kv_dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.int8`` (a quarter of the memory and reading of float32, for a small
            error of the logits), or on a GPU ``torch.float8_e4m3fn`` (likewise); default: bfloat16 for bfloat16 weights, else float32.
        kernels: a backend's name, or "auto" for the fastest present.
        deterministic: on a GPU compute every row by the same operations in the same order whatever else a step holds, so that outputs do
            not depend on the batch, on chunks of prompts or on drafts, to the bit. Costs speed there; a CPU always does.
        max_batch_size: most sequences decoded in one step.
        max_batch_tokens: most query tokens in one step, prompts included; default: 512, on a GPU 2048.
        prefill_chunk: most tokens of one prompt in one step; default: ``max_batch_tokens``.
        cache_tokens: tokens the KV cache holds in all; default: what ``max_batch_size`` full-length sequences need, but at most a quarter
            of the free memory, on a GPU 85 % of it.
        block_size: tokens per cache block, a positive multiple of 16.
        prefix_cache: keep computed blocks for requests that begin with the same tokens, until their memory is wanted (see
            ``reset_prefix_cache``); results have the same bits. None: unless ``model`` is a live one, whose weights may change.
        draft: guesses tokens that the model then verifies several at a time, which changes no output and saves steps (speculative
            decoding): a smaller model of the same vocabulary (live, or a path; "bundled" for the one that comes with the package), a
            drafter (``DraftModel``, ``PromptLookup``, ``SuffixLookup``), or a list of them, of which the first that has a guess is taken.
            How much is drafted for a request follows what pays; see ``speculative``, ``num_assistant_tokens`` and ``verification`` of
            ``SamplingParams``.
        parallel: the processes that share the model, each with a part of it (tensor parallelism; ``docs/parallel.md``). Each makes a
            ``Decoder`` of the same model and options; that of rank 0 is used like any other, the others call ``follow``.

    Not thread-safe: one thread at a time may use a decoder (any may ask for its ``stats``); ``AsyncDecoder`` is for more. Several
    ``stream`` iterators of one decoder may be interleaved; their requests share its steps.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        max_position: int | None = None,
        origin_config: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        weights: str | None = None,
        kv_dtype: torch.dtype | None = None,
        kernels: str = "auto",
        deterministic: bool = False,
        max_batch_size: int = 64,
        max_batch_tokens: int | None = None,
        prefill_chunk: int | None = None,
        cache_tokens: int | None = None,
        block_size: int = 16,
        prefix_cache: bool | None = None,
        draft: Any = None,
        parallel: Parallel | None = None,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size), ("max_batch_tokens", max_batch_tokens), ("block_size", block_size),
            ("prefill_chunk", prefill_chunk), ("cache_tokens", cache_tokens), ("max_position", max_position),
        ):  # fmt: skip
            required = name in ("max_batch_size", "block_size")
            if (value is None and required) or not isinstance(value, (int, type(None))) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be an integer{'' if required else ' or None'}")
        if kv_dtype is not None and not isinstance(kv_dtype, torch.dtype):
            raise TypeError(f"kv_dtype is {kv_dtype!r}; it must be torch.float32, torch.bfloat16, torch.int8 or torch.float8_e4m3fn")
        if prefix_cache is not None and not isinstance(prefix_cache, bool):
            raise TypeError(f"prefix_cache is {prefix_cache!r}; it must be True, False or None")
        if not isinstance(deterministic, bool):
            raise TypeError(f"deterministic is {deterministic!r}; it must be True or False")
        if not isinstance(parallel, (Parallel, type(None))):
            raise TypeError(f"parallel is a {type(parallel).__name__}; it must be a Parallel or None")
        if parallel is not None and parallel.taken:
            raise ValueError(f"parallel is {parallel!r} of another Decoder; every Decoder needs a Parallel() of its own")
        if parallel is not None:
            parallel.taken = True
        self.parallel = parallel
        with nullcontext() if parallel is None else parallel.together():
            loaded = load(
                model, ops=lambda device_type: kernels_module.select(device_type, kernels, deterministic), dtype=dtype,
                max_position=max_position, origin_config=origin_config, weights=weights, device=device, parallel=parallel,
            )  # fmt: skip
            self.model = loaded.model
            self.ops = self.model.ops
            self.config = config = loaded.config
            on = self.model.device
            if max_batch_tokens is None:
                max_batch_tokens = max(MAX_BATCH_TOKENS[on.type], max_batch_size)
            if kv_dtype is None:
                kv_dtype = torch.bfloat16 if self.model.dtype == torch.bfloat16 else torch.float32
            own = self.model.config
            bytes_per_block = block_bytes(own.num_layers, own.num_kv_heads, own.head_dim, block_size, kv_dtype)
            num_blocks = size_cache(cache_tokens, max_batch_size * config.max_position, block_size, bytes_per_block, on)
            if parallel is not None:
                num_blocks = parallel_runner.agree(
                    parallel, config, num_blocks, kv_dtype=kv_dtype, block_size=block_size, max_batch_size=max_batch_size,
                    max_batch_tokens=max_batch_tokens, kernels=self.ops.chosen, weights=weights,
                )  # fmt: skip
                weakref.finalize(self, parallel_runner.leave, parallel)  # also when the interpreter ends
        self.name = loaded.name
        source = tokenizer if tokenizer is not None else loaded.tokenizer_path
        self.tokenizer = None if source is None else Tokenizer(source)
        self.grammars = Grammars(self.tokenizer, config.vocab_size, config.eos_token_ids)
        cache = KVCache(
            own.num_layers, own.num_kv_heads, own.head_dim, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype, device=on
        )
        scheduler = Scheduler(
            BlockPool(num_blocks, block_size),
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            prefill_chunk=max_batch_tokens if prefill_chunk is None else prefill_chunk,
            prefix_cache=not isinstance(model, torch.nn.Module) if prefix_cache is None else prefix_cache,
        )
        speculator = None
        if draft is not None and not self._follows:
            speculator = Speculator(make_drafters(draft), config, self.tokenizer, max_batch_size=max_batch_size, block_size=block_size)
        runner = choose_runner(self.model, cache, scheduler, config.max_position, parallel)
        self.loop = StepLoop(self.ops, scheduler, cache, runner, speculator)

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
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Decode to the end.

        Args:
            prompts: a string, a list of strings, token ids, lists of them, or an integer tensor ``[B, T]``. Lengths may differ.
            params: one ``SamplingParams`` for all prompts or a list with one each.
            attention_mask: ``[B, T]`` beside a tensor of prompts; 0 marks padding.
            priority: lower ones first; each step up counts as a minute of coming later (``scheduler.PRIORITY_SECONDS``), so nobody starves.
            timeout: seconds, from this call on, after which what is unfinished ends with ``finish_reason`` "abort" and an ``error``.
            cache_salt: a string; cached blocks of the prefix cache are shared by calls of the same salt only. None: by all without one.
            **options: the fields of ``SamplingParams`` (or their usual other names) instead of ``params``.

        Returns:
            One output per prompt and returned sequence, in order: ``num_return_sequences`` of the first prompt, then of the second, ...

        Raises:
            ValueError, TypeError: bad input, named in one sentence, before any work is done. A request that fails later (NaN in its
                logits, no token left to draw, a processor that raises, a step that fails) does not raise: its output has
                ``finish_reason`` "error".
            ImportError: a grammar is asked for and llguidance is not installed.
        """
        submission = self.prepare(
            "generate()", prompts, params, attention_mask, options, priority=priority, timeout=timeout, cache_salt=cache_salt, streams=False
        )
        total = submission.num_outputs
        with tqdm(total=total, desc="decoding", unit="request", disable=None, delay=2, leave=False) as finished:
            for _ in self._run(submission):
                finished.update()
        return submission.outputs

    def stream(
        self,
        prompts: Prompts,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        attention_mask: Tensor | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        **options: Any,
    ) -> Iterator[StreamEvent]:
        """Like ``generate``, but yields tokens and text as they come; bad input raises here, before the first event.

        Leaving the iterator early aborts what is unfinished.
        """
        submission = self.prepare(
            "stream()", prompts, params, attention_mask, options, priority=priority, timeout=timeout, cache_salt=cache_salt
        )
        return self._run(submission)

    def submit(
        self,
        prompts: Prompts,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        attention_mask: Tensor | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        **options: Any,
    ) -> Submission:
        """Queue what ``stream`` would run, for a loop of the caller's own: call ``step`` while ``has_work``, and take the submission's
        ``events`` as they come. ``abort`` ends it early."""
        submission = self.prepare(
            "submit()", prompts, params, attention_mask, options, priority=priority, timeout=timeout, cache_salt=cache_salt
        )
        self.loop.enqueue(submission.requests)
        return submission

    @property
    def has_work(self) -> bool:
        """Whether any submission is unfinished."""
        return self.loop.has_work

    def step(self) -> None:
        """Run one step of all unfinished submissions together."""
        self.loop.step()

    def abort(self, submission: Submission) -> None:
        """End a submission with the tokens it has: its unfinished outputs have ``finish_reason`` "abort"; its blocks are free at once."""
        self.loop.abort(submission.requests)

    def stats(self) -> Stats:
        """What is running and waiting now, and what has been counted since the decoder was made. Any thread may ask at any time."""
        return self.loop.stats()

    def reset_prefix_cache(self) -> None:
        """Forget all computed blocks, as after a change of the model's weights; running requests are computed anew from their tokens."""
        self.loop.reset_prefix_cache()

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
        submission = self.prepare("generate_super()", idx, None, attention_mask, options, streams=False, beams_as_origin=as_origin)
        for _ in self._run(submission):
            pass
        outputs = submission.outputs
        for output in outputs:
            if output.error:
                raise RuntimeError(f"row {output.prompt_index}: {output.error}")
        pad = next(p for p in (pad_token_id, stop_id, self.config.pad_token_id, 0) if p is not None)
        rows = [torch.tensor(output.token_ids) for output in outputs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    @property
    def _follows(self) -> bool:
        return self.parallel is not None and self.parallel.rank > 0

    def follow(self) -> None:
        """On ranks above 0 of ``parallel``: compute this rank's part of every step that the decoder of rank 0 runs, until that is closed.

        Raises ``RuntimeError`` where there is nobody to follow, and ``ConnectionError`` if another rank has failed or gone; after what goes
        wrong here the others cannot go on either.
        """
        if self.parallel is None or not self._follows:
            raise RuntimeError(f"follow() is for ranks above 0 of a Decoder(parallel=...); this is {self.parallel or 'not parallel'}")
        runner = self.loop.runner
        assert isinstance(runner, parallel_runner.FollowingRunner)
        runner.follow()

    def close(self) -> None:
        """Of a ``parallel`` decoder: let the other ranks go; no further step can be run. Also happens when it is collected, and at the
        interpreter's end. Any other decoder has nothing to close."""
        if self.parallel is not None:
            parallel_runner.leave(self.parallel)

    def explain(self, batch_size: int = 1, context: int | None = None, steps: int | None = None) -> Explanation:
        """Where the time of a step of decoding goes: runs some, of made-up prompts, and times their parts.

        Its kernels are called one by one, each timed, which costs the whole some microseconds for each of them; ``num_bytes`` and
        ``operations`` are what each must move and do, and its limit the least time that takes this machine, whose read bandwidth and
        multiply-add rate are measured in the same call.

        Args:
            batch_size: sequences, from 1 to ``max_batch_size``.
            context: tokens that each has before the first step that is timed; None: 128, or half of what model and cache hold.
            steps: of decoding; None: 32, or as many as there is room for.

        Raises:
            ValueError, TypeError: an argument cannot be, or the cache does not hold such sequences.
            RuntimeError: the decoder has unfinished requests, a step failed, or the model is in parts (``parallel``).
        """
        return explain(self, batch_size, context, steps)

    def prepare(
        self,
        caller: str,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None,
        attention_mask: Tensor | None,
        options: dict[str, Any],
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        submitted_at: float | None = None,
        streams: bool = True,
        beams_as_origin: bool = False,
    ) -> Submission:
        """A call's requests, not queued yet; raises what ``generate`` raises, in the name of ``caller``.

        ``submitted_at``: when the call was made, by ``time.perf_counter``; None: now. Order, timeout and times count from then.
        """
        if self._follows:
            raise RuntimeError(f"{caller} is for rank 0 of the parallel decoder; this is {self.parallel!r}, which can only follow()")
        check_terms(priority, timeout, cache_salt)
        clock = self.loop.scheduler.clock
        if submitted_at is None:
            submitted_at = clock()
        token_lists = to_token_lists(prompts, attention_mask, self.tokenizer, self.config.vocab_size)
        requests = build_requests(
            caller, token_lists, params, options, self.config, self.tokenizer, self.loop.scheduler, self.grammars,
            can_draft=self.loop.speculator is not None, beams_as_origin=beams_as_origin,
        )  # fmt: skip
        for request in requests:
            request.clock, request.submitted_at = clock, submitted_at
            request.priority, request.timeout, request.cache_salt = priority, timeout, cache_salt
        return Submission(requests, streams)

    def _run(self, submission: Submission) -> Iterator[StreamEvent]:
        """Queue a submission and step until it has finished, yielding its events; whatever is unfinished on leaving is aborted."""
        try:
            self.loop.enqueue(submission.requests)
            while not submission.finished or submission.events:
                if not submission.events:
                    self.loop.step()
                while submission.events:
                    yield submission.events.popleft()
        finally:
            self.loop.abort(submission.requests)
