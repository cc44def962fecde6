"""Calls that cannot be: each gets a 4xx and one sentence, and what clients send beside what matters is no error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server.server_helpers import Running, is_error, running

MESSAGES = [{"role": "user", "content": "x"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def body(path: str, **fields: Any) -> dict[str, Any]:
    return {**({"messages": MESSAGES} if path == CHAT else {"prompt": "x"}), "max_tokens": 2, **fields}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": "4"}, "max_tokens", ["max_tokens is '4'", "valid integer"]),
        ({"max_tokens": True}, "max_tokens", ["max_tokens is True"]),
        ({"max_tokens": 0}, "max_tokens", ["max_tokens is 0"]),
        ({"max_tokens": 2**70}, "max_tokens", []),
        ({"max_tokens": 4000}, "max_tokens", ["allows"]),
        ({"temperature": "hot"}, "temperature", ["temperature is 'hot'"]),
        ({"temperature": float("nan")}, "temperature", ["temperature is nan"]),
        ({"temperature": 1e300}, "temperature", []),
        ({"top_p": 1.5}, "top_p", ["top_p is 1.5"]),
        ({"top_p": [1]}, "top_p", []),
        ({"top_k": -2}, "top_k", ["top_k is -2"]),
        ({"min_p": -0.1}, "min_p", []),
        ({"n": 0}, "n", ["n is 0"]),
        ({"n": 257}, "n", ["at most 256 sequences"]),
        ({"n": 2**65}, "n", []),
        ({"presence_penalty": 2.1}, "presence_penalty", []),
        ({"repetition_penalty": 0}, "repetition_penalty", []),
        ({"min_tokens": 3}, "min_tokens", ["min_tokens is 3", "max_tokens, which is 2"]),
        ({"seed": 2**64}, "seed", ["64 bits"]),
        ({"seed": 1.5}, "seed", []),
        ({"stop": [1]}, "stop", ["stop must be"]),
        ({"stop": [""]}, "stop", []),
        ({"stop": ["x"] * 5000}, "stop", ["5000", "at most 16"]),
        ({"stop": "x" * 1001}, "stop", ["1001", "at most 1000"]),
        ({"stop_token_ids": [4096]}, "stop_token_ids", ["ids 0 to 4095"]),
        ({"stop_token_ids": [-1]}, "stop_token_ids", []),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'"]),
        ({"logit_bias": {"-1": 1}}, "logit_bias", ["'-1'"]),
        ({"logit_bias": {"4096": 1}}, "logit_bias", ["ids 0 to 4095"]),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias", []),
        ({"logit_bias": {"5": "much"}}, "logit_bias.5", []),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", ["2000", "at most 1024"]),
        ({"logit_bias": [1]}, "logit_bias", []),
        ({"stream": "yes"}, "stream", []),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream to be true"]),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages", ["did you mean include_usage?"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", []),
        ({"response_format": {"type": "json_schema"}}, "response_format", ["json_schema must be given"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "response_format", []),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "response_format", ["regex", "at most one"]),
        ({"regex": "("}, "regex", []),
        ({"regex": ""}, "regex", []),
        ({"num_beams": 0}, "num_beams", []),
        ({"num_beams": 65}, None, ["num_beams"]),
        ({"num_beams": 4, "top_p": 0.5}, "top_p", ["num_beams above 1"]),
        ({"num_beams": 2, "n": 3}, "n", ["at most num_beams"]),
        ({"num_beams": 2, "early_stopping": "soon"}, None, ["early_stopping"]),
        ({"priority": 10**9}, "priority", []),
        ({"timeout": 0}, "timeout", ["seconds above 0"]),
        ({"cache_salt": 3}, "cache_salt", []),
        ({"model": 3}, "model", []),
        ({"max_token": 3}, "max_token", ["did you mean max_tokens?"]),
        ({"tempreature": 3}, "tempreature", ["did you mean temperature?"]),
        ({"xyzzy": None}, "xyzzy", ["not a known field"]),
        ({"x" * 10_000: 1}, None, ["not a known field"]),
        ({"tools": [{"type": "function"}]}, "tools", ["tools is given", "does not support"]),
        ({"tool_choice": "required"}, "tool_choice", []),
        ({"reasoning_effort": "high"}, "reasoning_effort", []),
        ({"modalities": ["text", "audio"]}, "modalities", []),
        ({"suffix": "after"}, "suffix", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_field_that_cannot_be(server: Running, path: str, fields: dict[str, Any], param: str | None, words: list[str]) -> None:
    reply = server.http.post(path, content=json.dumps(body(path, **fields)), headers={"content-type": "application/json"})
    is_error(reply, 400, *words, param=param)
    assert len(reply.json()["error"]["message"]) < 500


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, -1]}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], "x"]}, "prompt"),
        (COMPLETIONS, {"prompt": {"x": 1}}, "prompt"),
        (COMPLETIONS, {"prompt": 5}, "prompt"),
        (COMPLETIONS, {"prompt": [4096]}, "prompt"),
        (COMPLETIONS, {"prompt": [2**80]}, "prompt"),
        (COMPLETIONS, {"prompt": [2**80], "echo": True}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 65}, "prompt"),
        (COMPLETIONS, {"prompt": "x " * 3000}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 40, "n": 10}, "n"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"logprobs": 1, "echo": True}, "logprobs"),
        (COMPLETIONS, {"best_of": 1, "n": 2}, "best_of"),
        (COMPLETIONS, {"best_of": 3, "stream": True}, "best_of"),
        (COMPLETIONS, {"best_of": 300}, "best_of"),
        (COMPLETIONS, {"best_of": 2, "num_beams": 2}, "best_of"),
        (COMPLETIONS, {"num_beams": 2, "logprobs": 1}, "logprobs"),
        (COMPLETIONS, {"messages": MESSAGES}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "x"}, "messages"),
        (CHAT, {"messages": [1]}, "messages.0"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages.0.contents"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"best_of": 2}, "best_of"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("/tokenize", {}, "max_tokens"),
        ("/detokenize", {"tokens": [-1], "prompt": None, "max_tokens": None}, None),
    ],
)  # fmt: skip
def test_a_prompt_or_message_that_cannot_be(server: Running, path: str, fields: dict[str, Any], param: str | None) -> None:
    is_error(server.post(path, **body(path, **fields)), 400, param=param)


def test_what_is_refused_is_refused_in_a_stream_too(server: Running) -> None:
    for fields in ({"temperature": -1}, {"prompt": [4096]}, {"max_tokens": 4000}, {"regex": "("}):
        is_error(server.post(**body(COMPLETIONS, **fields, stream=True)), 400)


def test_what_clients_send_beside_is_no_error(server: Running) -> None:
    fields = {
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k",
        "prediction": {"type": "content", "content": "x"}, "parallel_tool_calls": True, "tools": [], "tool_choice": "none",
        "modalities": ["text"], "audio": None, "stop": None, "logit_bias": None, "seed": None, "suffix": None, "response_format": None,
        "stream_options": None, "temperature": None, "top_p": None, "n": None, "presence_penalty": None, "stream": None,
    }  # fmt: skip
    for path in (COMPLETIONS, CHAT):
        assert server.post(path, **body(path, **fields)).status_code == 200


def test_tokens_there_and_back(server: Running) -> None:
    text = "def f(é):\n    return 'ж'"
    reply = server.post("/tokenize", prompt=text).json()
    assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == 2048
    assert server.post("/detokenize", tokens=reply["tokens"]).json() == {"prompt": text}
    chat = server.post("/tokenize", messages=MESSAGES).json()["tokens"]
    assert server.post("/detokenize", tokens=chat).json() == {"prompt": "# user: x\n"}
    is_error(server.post("/tokenize", prompt="x", messages=MESSAGES), 400)
    is_error(server.post("/detokenize", tokens=[4096]), 400, "ids 0 to 4095", param="tokens")


def test_limits_are_the_servers(alone) -> None:
    with running(
        max_prompt_tokens=5, max_prompts=2, max_sequences=3, max_logprobs=1, model=("small", "tiny"), request_timeout=30
    ) as server:
        is_error(server.post(prompt="one two three four five six"), 400, "at most 5", param="prompt")
        is_error(server.post(CHAT, messages=[{"role": "user", "content": "one two three"}]), 400, "at most 5", param="messages")
        is_error(server.post(prompt=["a"] * 3), 400, "at most 2", param="prompt")
        is_error(server.post(prompt=["a"] * 2, n=2), 400, "n is 2 for each of 2 prompts", "at most 3")
        is_error(server.post(prompt="a", logprobs=2), 400, "at most 1")
        is_error(server.post(prompt="a", model="bundled"), 404, "small, tiny")
        for name in ("small", "tiny"):
            reply = server.post(prompt="one two", model=name, max_tokens=3, temperature=0).json()
            assert reply["model"] == "small" and reply["choices"][0]["text"] == alone.generate("one two", max_new_tokens=3)[0].text
        assert [one["id"] for one in server.http.get("/v1/models").json()["data"]] == ["small", "tiny"]


def test_a_model_without_a_template(alone) -> None:
    with running(chat_template=None) as server:
        is_error(server.post(CHAT, messages=MESSAGES), 400, "no chat template", "--chat-template")
        assert server.post(prompt="x", max_tokens=2).status_code == 200


def test_a_timeout_ends_a_request_with_what_it_has(server: Running) -> None:
    with server.slow_steps(0.02):
        reply = server.post(prompt="x", max_tokens=2000, timeout=0.3)
        assert reply.status_code == 200
        assert reply.json()["choices"][0]["finish_reason"] == "abort" and reply.json()["usage"]["completion_tokens"] < 100
    server.until_idle()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def values_of(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a schema of the OpenAPI document, small ones above all."""
    if "$ref" in schema:
        return values_of(components[schema["$ref"].rsplit("/", 1)[1]], components)
    if "anyOf" in schema:
        return st.one_of([values_of(one, components) for one in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        each = {name: values_of(one, components) for name, one in schema["properties"].items()}
        required = set(schema.get("required", ()))
        return st.fixed_dictionaries(
            {name: one for name, one in each.items() if name in required}, optional={n: o for n, o in each.items() if n not in required}
        )
    if kind == "object":
        inner = values_of(schema["additionalProperties"], components) if isinstance(schema.get("additionalProperties"), dict) else JSON
        return st.dictionaries(st.sampled_from(["0", "7", "4095", "4096", "x", "type"]), inner, max_size=3)
    if kind == "array":
        return st.lists(values_of(schema["items"], components), max_size=3)
    return {
        "integer": st.sampled_from([0, 1, 2, 3, -1, 5, 2**31, 2**63, -(2**70)]),
        "number": st.sampled_from([0, 0.5, 1, 1.5, -1, 2, 1e30, -1e-9]),
        "string": st.sampled_from(["x", "bundled", "[a-c]{2}", "", "\u00e9\ud800", 'start: "a"', "never"]),
        "boolean": st.booleans(),
        "null": st.none(),
    }.get(kind, JSON)


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    return server.http.get("/openapi.json").json()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_nothing_that_the_document_allows_or_not_is_a_500(server: Running, document: dict[str, Any], path: str) -> None:
    components = document["components"]["schemas"]
    operation = document["paths"][path]["post"]
    assert "422" not in operation["responses"]
    calls = values_of(operation["requestBody"]["content"]["application/json"]["schema"], components)
    statuses = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(calls, st.dictionaries(st.text(max_size=5) | st.sampled_from(["prompt", "messages", "stop", "tokens", "n"]), JSON, max_size=1))
    def call(fields: dict[str, Any], others: dict[str, Any]) -> None:
        content = json.dumps({**fields, **others})
        reply = server.http.post(path, content=content, headers={"content-type": "application/json"})
        statuses.add(reply.status_code)
        if reply.status_code != 200:
            is_error(reply, reply.status_code)
            assert 400 <= reply.status_code < 500, (content, reply.text)

    call()
    assert statuses >= {200, 400} if path != CHAT else 400 in statuses
    server.until_idle()


def test_the_document_has_every_route(document: dict[str, Any]) -> None:
    routes = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics", "/stats"}
    assert document["paths"].keys() == routes | {"/tokenize", "/detokenize"}
    assert all("default" in operation["responses"] for path in document["paths"].values() for operation in path.values())
