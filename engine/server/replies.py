"""What calls get back, in the two shapes of OpenAI's API: whole, or in chunks."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import Any

from ..outputs import RequestOutput, StreamEvent
from .schema import ChatCall, CompletionCall
from .token_text import TokenText

Json = dict[str, Any]


def usage(outputs: Sequence[RequestOutput]) -> Json:
    """Tokens of a call: each prompt counted once, all tokens that were generated for it."""
    firsts = {output.prompt_index: output.metrics for output in reversed(outputs)}
    prompt = sum(metrics.num_prompt_tokens for metrics in firsts.values())
    completion = sum(len(output.token_ids) for output in outputs)
    cached = sum(metrics.num_cached_tokens for metrics in firsts.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Reply:
    """What one call gets back.

    Args:
        call: what was asked for.
        request_id: goes into the reply.
        model: the name in the reply.
        fingerprint: of the model and how it is computed.
        token_text: text of tokens, for log-probabilities.
        num_sequences: of each prompt, as the engine decodes it: ``n``, or ``best_of``.
    """

    kind: str
    chunk_kind: str

    def __init__(
        self, call: CompletionCall | ChatCall, request_id: str, model: str, fingerprint: str, token_text: TokenText, num_sequences: int
    ) -> None:
        self._call = call
        self._head = {"id": request_id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._token_text = token_text
        self._num_sequences = num_sequences

    def whole(self, outputs: list[RequestOutput]) -> Json:
        choices = [self._choice(index, output) for index, output in enumerate(self._chosen(outputs))]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage(outputs)}

    @property
    def wants_usage(self) -> bool:
        """Whether the chunks of a stream end with its usage."""
        return self._call.stream_options is not None and self._call.stream_options.include_usage

    def first_chunks(self, event: StreamEvent) -> list[Json]:
        """Before the first event of a choice."""
        return []

    def chunks(self, event: StreamEvent) -> list[Json]:
        """The progress of a choice; none where there is nothing to show yet."""
        raise NotImplementedError

    def usage_chunk(self, outputs: list[RequestOutput]) -> Json:
        return {**self._chunk(), "choices": [], "usage": usage(outputs)}

    def _choice(self, index: int, output: RequestOutput) -> Json:
        raise NotImplementedError

    def _chunk(self, *choices: Json) -> Json:
        chunk = {**self._head, "object": self.chunk_kind, "choices": list(choices)}
        if self.wants_usage:
            chunk["usage"] = None
        return chunk

    def _chosen(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Of each prompt's sequences those that are returned: of ``best_of`` the ``n`` that are likeliest by token."""
        n, many = self._call.n, self._num_sequences
        if n == many:
            return outputs
        chosen = []
        for start in range(0, len(outputs), many):
            ranked = sorted(outputs[start : start + many], key=lambda o: -o.cumulative_logprob / max(len(o.token_ids), 1))
            chosen += ranked[:n]
        return chosen

    def _index(self, event: StreamEvent) -> int:
        return event.prompt_index * self._num_sequences + event.index


def _end(output: RequestOutput | None) -> Json:
    if output is None:
        return {"finish_reason": None}
    return {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}


def _shown(token_ids: list[int], output: RequestOutput | None) -> int:
    """How many of the tokens have text: all but the one that ended the request."""
    ended = output is not None and isinstance(output.stop_reason, int) and bool(token_ids)
    return len(token_ids) - ended


class CompletionReply(Reply):
    """Args:
    prompts: the text of each, which goes before its completions where ``echo`` asks for it.
    """

    kind = chunk_kind = "text_completion"

    def __init__(self, *arguments: Any, prompts: Sequence[str]) -> None:
        super().__init__(*arguments)
        self._prompts = prompts
        self._offsets: dict[int, _Offsets] = {}  # of the choices of a stream

    def _choice(self, index: int, output: RequestOutput) -> Json:
        start = self._prompts[output.prompt_index] if self._call.echo else ""  # type: ignore[union-attr]
        logprobs = self._logprobs(output.token_ids, output.logprobs, output.top_logprobs, output, _Offsets())
        return {"index": index, "text": start + (output.text or ""), "logprobs": logprobs, **_end(output)}

    def first_chunks(self, event: StreamEvent) -> list[Json]:
        if not self._call.echo:  # type: ignore[union-attr]
            return []
        text = self._prompts[event.prompt_index]
        return [self._chunk({"index": self._index(event), "text": text, "logprobs": None, "finish_reason": None})]

    def chunks(self, event: StreamEvent) -> list[Json]:
        index = self._index(event)
        offsets = self._offsets.setdefault(index, _Offsets())
        logprobs = self._logprobs(event.token_ids, event.logprobs, event.top_logprobs, event.output, offsets)
        if not event.text and event.output is None and not logprobs:
            return []
        return [self._chunk({"index": index, "text": event.text, "logprobs": logprobs, **_end(event.output)})]

    def _logprobs(
        self,
        token_ids: list[int],
        logprobs: list[float],
        top: list[dict[int, float]] | None,
        output: RequestOutput | None,
        offsets: _Offsets,
    ) -> Json | None:
        if self._call.logprobs is None:
            return None
        name = self._token_text.legacy
        n = _shown(token_ids, output)
        tops = [{**({} if top is None else top[i]), token_ids[i]: logprobs[i]} for i in range(n)]
        return {
            "tokens": [name(token) for token in token_ids[:n]],
            "token_logprobs": [_finite(logprob) for logprob in logprobs[:n]],
            "top_logprobs": [{name(token): _finite(logprob) for token, logprob in one.items()} for one in tops],
            "text_offset": [offsets.take(self._token_text.bytes(token)) for token in token_ids[:n]],
        }


class _Offsets:
    """Where in the text, in characters, each token begins."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def take(self, raw: bytes) -> int:
        start = self._length
        self._length += len(self._decoder.decode(raw))
        return start


class ChatReply(Reply):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def _choice(self, index: int, output: RequestOutput) -> Json:
        message = {"role": "assistant", "content": output.text or "", "refusal": None}
        logprobs = self._logprobs(output.token_ids, output.logprobs, output.top_logprobs, output)
        return {"index": index, "message": message, "logprobs": logprobs, **_end(output)}

    def first_chunks(self, event: StreamEvent) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk({"index": self._index(event), "delta": delta, "logprobs": None, "finish_reason": None})]

    def chunks(self, event: StreamEvent) -> list[Json]:
        index = self._index(event)
        chunks = []
        logprobs = self._logprobs(event.token_ids, event.logprobs, event.top_logprobs, event.output)
        if event.text or (logprobs and logprobs["content"]):
            choice = {"index": index, "delta": {"content": event.text}, "logprobs": logprobs, "finish_reason": None}
            chunks.append(self._chunk(choice))
        if event.output is not None:
            chunks.append(self._chunk({"index": index, "delta": {}, "logprobs": None, **_end(event.output)}))
        return chunks

    def _logprobs(
        self, token_ids: list[int], logprobs: list[float], top: list[dict[int, float]] | None, output: RequestOutput | None
    ) -> Json | None:
        if not self._call.logprobs:
            return None
        content = []
        for i in range(_shown(token_ids, output)):
            likely = [] if top is None else [self._token(token, logprob) for token, logprob in top[i].items()]
            content.append({**self._token(token_ids[i], logprobs[i]), "top_logprobs": likely})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        raw = self._token_text.bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    """JSON knows no infinities; OpenAI's API has this number for what is as good as impossible."""
    return max(logprob, -9999.0)
