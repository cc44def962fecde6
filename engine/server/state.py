"""What the routes of one server share."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..async_decoder import AsyncDecoder
from ..option_checks import check_text
from ..tokenizer import Tokenizer
from .chat import ChatError, ChatTemplate, load_template
from .convert import split_prompt
from .errors import ApiError, shutting_down
from .metrics import Metrics
from .schema import ChatCall, CompletionCall, Message, TokenizeCall
from .settings import Settings
from .token_text import TokenText

if TYPE_CHECKING:
    from ..stats import Stats


VERSION = importlib.metadata.version("decoding-engine")


@dataclass(frozen=True)
class Served:
    """The model of a server, once it is loaded."""

    decoder: AsyncDecoder
    tokenizer: Tokenizer
    template: ChatTemplate | None
    token_text: TokenText
    fingerprint: str


class ServerState:
    """Attributes:
    created: Unix time.
    draining: no more calls are taken; those that are there go on.
    failed: why the decoder's loop has stopped for ever; None: it has not.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.draining = False
        self.failed: str | None = None
        self._served: Served | None = None
        self.metrics = Metrics(self.stats)
        # Templates and tokenising take their time; one thread, so that they never take more than one core from decoding.
        self.prompts = ThreadPoolExecutor(1, "engine-prompts")
        self.num_preparing = 0  # calls that wait for it, or are there

    def serve(self, decoder: AsyncDecoder) -> None:
        """Begin to serve a decoder. Raises ``ValueError`` where it has no tokenizer, or its chat template is none."""
        tokenizer = decoder.decoder.tokenizer
        if tokenizer is None:
            raise ValueError(f"the model {decoder.decoder.name} has no tokenizer, which a server needs: give it one (--tokenizer PATH)")
        template = load_template(tokenizer.folder, self.settings.chat_template)
        config = decoder.decoder.config
        known = f"{VERSION} {decoder.decoder.name} {config} {decoder.decoder.model.bytes_per_step}"
        fingerprint = f"fp_{hashlib.sha256(known.encode()).hexdigest()[:10]}"
        self._served = Served(decoder, tokenizer, template, TokenText(tokenizer), fingerprint)

    @property
    def condition(self) -> str:
        """In a word."""
        if self.failed is not None:
            return "failed"
        return "draining" if self.draining else "loading" if self._served is None else "ready"

    @property
    def served(self) -> Served:
        """Raises ``ApiError`` 503 where no call can be taken."""
        if self.failed is not None:
            raise ApiError(503, self.failed)
        if self.draining:
            raise shutting_down()
        if self._served is None:
            raise ApiError(503, "the model is being loaded; try again in a moment", code="loading", retry_after=2)
        return self._served

    def stats(self) -> Stats | None:
        return None if self._served is None else self._served.decoder.stats()

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.settings.model:
            message = f"the model {name!r:.100} is not here; this server has {', '.join(self.settings.model)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def prompts_of(self, call: CompletionCall | ChatCall | TokenizeCall) -> tuple[list[list[int]], list[str]]:
        """The prompts of a call as token ids and as text; text only where it is asked for. Takes its time: not for the event loop."""
        served = self.served
        if isinstance(call, CompletionCall):
            return self._completion_prompts(call, served.tokenizer)
        if call.messages is None:
            assert isinstance(call, TokenizeCall) and call.prompt is not None
            return [served.tokenizer.encode(self._text(call.prompt, "prompt"))], []
        options = call.chat_template_kwargs if isinstance(call, ChatCall) else {}
        text = self._text(_render(served.template, call.messages, options), "messages")
        return self._limited([served.tokenizer.encode_piece(text)], "messages"), []

    def _completion_prompts(self, call: CompletionCall, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
        given = split_prompt(call.prompt)
        ids = [tokenizer.encode(self._text(one, "prompt")) if isinstance(one, str) else one for one in given]
        ids = self._limited(ids, "prompt")
        if not call.echo:
            return ids, []
        # Ids that cannot be are refused with the call, in a moment; they have no text.
        vocab_size = self.served.decoder.decoder.config.vocab_size
        return ids, [one if isinstance(one, str) else tokenizer.decode([t for t in one if 0 <= t < vocab_size]) for one in given]

    def _text(self, text: str, param: str) -> str:
        """The text; ``ApiError`` for what JSON can write and UTF-8 cannot, and for one that is too long whatever its tokens are, which to
        find out would take long."""
        try:
            check_text(param, text)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from None
        served = self.served
        most = (self.settings.max_prompt_tokens or served.decoder.decoder.config.max_position) * served.token_text.longest
        if len(text) > most:
            message = f"{param} has {len(text)} characters; no prompt that this server takes has more than {most}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return text

    def _limited(self, prompts: list[list[int]], param: str) -> list[list[int]]:
        limit = self.settings.max_prompt_tokens
        longest = max(map(len, prompts))
        if limit is not None and longest > limit:
            message = f"{param} has {longest} tokens; this server takes at most {limit}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return prompts


def _render(template: ChatTemplate | None, messages: list[Message], options: dict[str, object]) -> str:
    if template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE")
    if not messages:
        raise ApiError(400, "messages is empty; it must hold at least one message", param="messages")
    for name in ("messages", "add_generation_prompt"):
        if name in options:
            raise ApiError(400, f"chat_template_kwargs holds {name}, which is not a variable of the caller's", param="chat_template_kwargs")
    # Templates know no developer; that role is what used to be called system.
    given = [{**one.model_dump(exclude_none=True), "role": "system" if one.role == "developer" else one.role} for one in messages]
    try:
        return template.render(given, options)
    except ChatError as error:
        raise ApiError(400, str(error), param="messages") from None
