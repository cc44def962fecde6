"""The official client of OpenAI's API against the server, and the engine's own outputs beside it."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server.server_helpers import SECONDS, Running

from engine import Decoder

PROMPT = "def read_csv(path):"
CHAT = [{"role": "system", "content": "write Python"}, {"role": "user", "content": "def is_prime(n):"}]
CHAT_TEXT = "# system: write Python\n# user: def is_prime(n):\n"


def test_a_completion(client: OpenAI, alone: Decoder) -> None:
    reply = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=20, temperature=0)
    (output,) = alone.generate(PROMPT, max_new_tokens=20)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.index) == (output.text, "length", 0)
    assert (reply.object, reply.model) == ("text_completion", "bundled") and reply.id.startswith("cmpl-")
    assert reply.system_fingerprint.startswith("fp_")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(output.prompt_token_ids), 20)
    assert reply.usage.total_tokens == len(output.prompt_token_ids) + 20


def test_without_options_it_draws_sixteen_tokens(client: OpenAI, alone: Decoder) -> None:
    reply = client.completions.create(model="bundled", prompt=PROMPT, seed=5)
    (output,) = alone.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=5)
    assert reply.choices[0].text == output.text and reply.usage.completion_tokens == len(output.token_ids)


def test_all_forms_of_prompts(client: OpenAI, alone: Decoder) -> None:
    ids = [alone.tokenizer.encode(text) for text in (PROMPT, "import ")]
    texts = [output.text for output in alone.generate(ids, max_new_tokens=8)]
    for prompt, expected in ((ids[0], texts[:1]), (ids, texts), ([PROMPT, "import "], texts)):
        reply = client.completions.create(model="bundled", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in reply.choices] == expected


def test_every_option_reaches_the_engine(client: OpenAI, alone: Decoder) -> None:
    reply = client.completions.create(
        model="bundled", prompt=PROMPT, max_tokens=30, temperature=0.9, top_p=0.95, seed=11, n=2, stop=["zzz", "\n\n\n"],
        presence_penalty=0.3, frequency_penalty=0.2, logit_bias={"13": -100, "300": 2.5}, user="somebody",
        extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 3, "ignore_eos": True, "stop_token_ids": [7]},
    )  # fmt: skip
    outputs = alone.generate(
        PROMPT, max_new_tokens=30, temperature=0.9, top_p=0.95, seed=11, n=2, stop=["zzz", "\n\n\n"], presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias={13: -100, 300: 2.5}, top_k=50, min_p=0.01, repetition_penalty=1.1, min_new_tokens=3,
        ignore_eos=True, stop_token_ids=[7],
    )  # fmt: skip
    assert [(c.text, c.finish_reason) for c in reply.choices] == [(o.text, o.finish_reason) for o in outputs]
    assert reply.usage.prompt_tokens == len(outputs[0].prompt_token_ids)
    assert reply.usage.completion_tokens == sum(len(o.token_ids) for o in outputs)


def test_a_negative_seed_is_one(client: OpenAI, alone: Decoder) -> None:
    reply = client.completions.create(model="bundled", prompt=PROMPT, seed=-2)
    assert reply.choices[0].text == alone.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=2**64 - 2)[0].text


def test_best_of_returns_the_likeliest(client: OpenAI, alone: Decoder) -> None:
    reply = client.completions.create(model="bundled", prompt=["import ", PROMPT], max_tokens=12, seed=3, n=2, best_of=5)
    outputs = alone.generate(["import ", PROMPT], max_new_tokens=12, temperature=1.0, seed=3, n=5)
    expected = []
    for five in (outputs[:5], outputs[5:]):
        expected += [o.text for o in sorted(five, key=lambda o: -o.cumulative_logprob / len(o.token_ids))[:2]]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.completion_tokens == sum(len(o.token_ids) for o in outputs)


def test_beams(client: OpenAI, alone: Decoder) -> None:
    body = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": "never"}
    outputs = alone.generate(PROMPT, max_new_tokens=12, num_return_sequences=2, **body)
    reply = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=12, n=2, extra_body=body)
    assert [choice.text for choice in reply.choices] == [output.text for output in outputs]
    texts = ["", ""]
    for chunk in client.completions.create(model="bundled", prompt=PROMPT, max_tokens=12, n=2, stream=True, extra_body=body):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [output.text for output in outputs]


def test_echo(client: OpenAI, alone: Decoder) -> None:
    text = alone.generate(PROMPT, max_new_tokens=4)[0].text
    for prompt in (PROMPT, alone.tokenizer.encode(PROMPT)):
        options = {"model": "bundled", "prompt": prompt, "max_tokens": 4, "temperature": 0, "echo": True}
        assert client.completions.create(**options).choices[0].text == PROMPT + text
        assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == PROMPT + text


def test_logprobs_of_a_completion(client: OpenAI, alone: Decoder) -> None:
    regex = "a[а-я]{12}b"  # letters of two bytes, which are tokens of their own
    reply = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=40, seed=1, logprobs=3, extra_body={"regex": regex})
    (output,) = alone.generate(PROMPT, max_new_tokens=40, temperature=1.0, seed=1, logprobs=3, regex=regex)
    (choice,) = reply.choices
    got = choice.logprobs
    assert got.token_logprobs == output.logprobs
    for token, logprob, top, own in zip(output.token_ids, output.logprobs, got.top_logprobs, output.top_logprobs, strict=True):
        assert sorted(top.values()) == sorted({**own, token: logprob}.values())
    whole = [token for token in got.tokens if not token.startswith("bytes:")]
    assert 2 <= len(whole) < len(got.tokens), "this text is meant to have parts of characters"
    for token, offset in zip(got.tokens, got.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset : offset + len(token)] == token


def test_logprobs_0_gives_the_drawn_tokens_own(client: OpenAI) -> None:
    got = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=0).choices[0].logprobs
    assert [list(top.items()) for top in got.top_logprobs] == [[pair] for pair in zip(got.tokens, got.token_logprobs, strict=True)]


def test_a_chat_is_a_completion_of_its_template(client: OpenAI, alone: Decoder) -> None:
    reply = client.chat.completions.create(model="bundled", messages=CHAT, max_tokens=20, temperature=0)
    (output,) = alone.generate(CHAT_TEXT, max_new_tokens=20)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", output.text, "length")
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and choice.message.refusal is None
    assert reply.usage.prompt_tokens == len(output.prompt_token_ids)


def test_a_reply_can_be_sent_back(client: OpenAI, alone: Decoder) -> None:
    first = client.chat.completions.create(model="bundled", messages=CHAT, max_tokens=4, temperature=0).choices[0].message
    messages = [*CHAT, first, {"role": "user", "content": [{"type": "text", "text": "more"}, {"type": "text", "text": "lines"}]}]
    reply = client.chat.completions.create(model="bundled", messages=messages, max_completion_tokens=4, temperature=0)
    text = f"{CHAT_TEXT}# assistant: {first.content}\n# user: more\nlines\n"
    assert reply.choices[0].message.content == alone.generate(text, max_new_tokens=4)[0].text


def test_variables_of_the_template(client: OpenAI, alone: Decoder) -> None:
    reply = client.chat.completions.create(
        model="bundled", messages=CHAT, max_tokens=4, temperature=0, extra_body={"chat_template_kwargs": {"lead": "    return"}}
    )
    assert reply.choices[0].message.content == alone.generate(CHAT_TEXT + "    return", max_new_tokens=4)[0].text


def test_logprobs_of_a_chat(client: OpenAI, alone: Decoder) -> None:
    options = {"model": "bundled", "messages": CHAT, "max_tokens": 10, "temperature": 1, "seed": 2, "logprobs": True}
    (output,) = alone.generate(CHAT_TEXT, max_new_tokens=10, temperature=1.0, seed=2, logprobs=4)
    content = client.chat.completions.create(**options, top_logprobs=4).choices[0].logprobs.content
    assert [one.logprob for one in content] == output.logprobs
    assert b"".join(bytes(one.bytes) for one in content).decode() == output.text
    for one, top in zip(content, output.top_logprobs, strict=True):
        assert [likely.logprob for likely in one.top_logprobs] == list(top.values())
        assert one.token == bytes(one.bytes).decode("utf-8", "replace")
    plain = client.chat.completions.create(**options).choices[0].logprobs.content
    assert [(one.token, one.logprob, one.top_logprobs) for one in plain] == [(one.token, one.logprob, []) for one in content]
    streamed = [one for chunk in client.chat.completions.create(**options, top_logprobs=4, stream=True) for one in _content(chunk)]
    assert streamed == content


def _content(chunk):
    return [one for choice in chunk.choices if choice.logprobs for one in choice.logprobs.content]


def test_the_token_that_ends_is_not_among_the_logprobs(client: OpenAI, alone: Decoder) -> None:
    token = alone.generate(PROMPT, max_new_tokens=5)[0].token_ids[4]
    options = {"model": "bundled", "prompt": PROMPT, "temperature": 0, "logprobs": 1, "extra_body": {"stop_token_ids": [token]}}
    whole = client.completions.create(**options)
    (choice,) = whole.choices
    assert choice.finish_reason == "stop" and choice.stop_reason == token and "".join(choice.logprobs.tokens) == choice.text
    chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert [token for chunk in chunks for token in (chunk.logprobs.tokens if chunk.logprobs else [])] == choice.logprobs.tokens
    assert [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset] == choice.logprobs.text_offset


def test_streams_say_what_whole_replies_say(client: OpenAI) -> None:
    options = {"model": "bundled", "prompt": [PROMPT, "import "], "max_tokens": 24, "seed": 9, "n": 2, "stop": ["return"]}
    whole = client.completions.create(**options)
    texts, reasons, usages, ids = [""] * 4, [None] * 4, [], set()
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        ids.add(chunk.id)
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "something comes after the end"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and reasons == [choice.finish_reason for choice in whole.choices]
    assert usages[:-1] == [None] * (len(usages) - 1) and len(ids) == 1
    assert (usages[-1].prompt_tokens, usages[-1].completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_streamed_chat(client: OpenAI) -> None:
    options = {"model": "bundled", "messages": CHAT, "max_tokens": 20, "seed": 4, "n": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    for index, choice in enumerate(whole.choices):
        mine = [one for chunk in chunks for one in chunk.choices if one.index == index]
        assert mine[0].delta.role == "assistant" and all(one.delta.role is None for one in mine[1:])
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def test_json_of_a_schema(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    reply = client.chat.completions.create(model="bundled", messages=CHAT, seed=6, max_tokens=120, response_format=form)
    assert reply.choices[0].finish_reason == "stop"
    assert json.loads(reply.choices[0].message.content).keys() == {"name", "size"}


def test_any_json_object(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="bundled", messages=CHAT, seed=3, max_tokens=2, temperature=2, response_format={"type": "json_object"}
    )
    assert reply.choices[0].message.content.startswith("{")


def test_regex_and_grammar(client: OpenAI) -> None:
    for structure in ({"regex": "[0-9]{3}"}, {"grammar": "start: /[0-9]{3}/"}):
        reply = client.completions.create(model="bundled", prompt="n = ", extra_body=structure)
        assert reply.choices[0].text.isdigit() and reply.choices[0].finish_reason == "stop"


def test_models(client: OpenAI, server: Running) -> None:
    (model,) = client.models.list()
    assert model.id == "bundled" and client.models.retrieve("bundled") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model" and "'gpt'" in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="bundled", prompt="x", temperature=-1)
    assert bad.value.param == "temperature" and "temperature is -1" in bad.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="bundled", messages=CHAT, max_completion_tokens=4000)
    assert long.value.param == "max_completion_tokens" and long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools is given"):
        client.chat.completions.create(model="bundled", messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}])


def test_a_request_that_asks_for_the_impossible(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the search found only 1 of 4 sequences"):
        client.completions.create(model="bundled", prompt="x", max_tokens=4, n=4, extra_body={"num_beams": 4, "regex": "0"})


def test_many_at_once(server: Running, alone: Decoder) -> None:
    async def all_of_them():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:

            async def streamed(i: int) -> str:
                stream = await client.completions.create(model="bundled", prompt=f"x{i} = ", max_tokens=10 + i, seed=i, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(i: int) -> str:
                reply = await client.completions.create(model="bundled", prompt=f"x{i} = ", max_tokens=10 + i, seed=i)
                return reply.choices[0].text

            return await asyncio.gather(*(streamed(i) if i % 2 else whole(i) for i in range(40)))

    texts = asyncio.run(all_of_them())
    for i, text in enumerate(texts):
        assert text == alone.generate(f"x{i} = ", max_new_tokens=10 + i, temperature=1.0, seed=i)[0].text
    server.until_idle()


def test_logprobs_are_numbers_that_json_knows(client: OpenAI) -> None:
    # A token that the model rules out is drawn because nothing else may be: its log-probability may be very low, never infinite.
    got = client.completions.create(model="bundled", prompt="x", max_tokens=3, logprobs=2, logit_bias={"5": 1e6}).choices[0].logprobs
    assert all(math.isfinite(logprob) for logprob in got.token_logprobs)
