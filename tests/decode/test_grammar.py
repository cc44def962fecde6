"""Structured output: every finished text is of its grammar, whatever the request shares its steps with and however it ends."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from decode.small_models import small_llama

pytest.importorskip("llguidance")

from engine import Decoder, SamplingParams  # noqa: E402

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["int", "str", None, 4]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
LARK = """
start: sum
sum: NUMBER ("+" NUMBER)~1..3
NUMBER: /[1-9][0-9]?/
"""
STRUCTURES: dict[str, dict[str, Any]] = {
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": r"[a-z]{2,6}(, [a-z]{2,6}){0,3}\.?"},
    "grammar": {"grammar": LARK},
}


def conforms(name: str, text: str) -> bool:
    if name == "regex":
        return re.fullmatch(STRUCTURES["regex"]["regex"], text) is not None
    if name == "grammar":
        return re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?){1,3}", text) is not None
    value = json.loads(text)
    spaces = re.findall(r"\s+", re.sub(r'"(\\.|[^"\\])*"', "x", text))
    assert all(re.fullmatch(r" |\n[ \t]{0,40}", run) for run in spaces)
    return (
        list(value) == ["name", "kind", "sizes"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and value["kind"] in SCHEMA["properties"]["kind"]["enum"]
        and 1 <= len(value["sizes"]) <= 3
        and all(type(size) is int and 0 <= size <= 99 for size in value["sizes"])
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_finished_texts_are_of_their_grammar(bundled, name: str):
    # The bundled model seldom ends by itself.
    options = {"temperature": 1.0, "max_new_tokens": 100, "logit_bias": {0: 6.0}, **STRUCTURES[name]}
    outputs = [o for seed in range(4) for o in bundled.generate("config = ", seed=seed, num_return_sequences=8, **options)]
    finished = [o for o in outputs if o.finish_reason == "stop"]
    assert len(finished) >= 24 and all(o.finish_reason == "length" for o in outputs if o not in finished)
    assert all(conforms(name, o.text) for o in finished)
    assert len({o.text for o in finished}) > 20
    for output in finished:
        # Where nothing may follow the request has ended by itself, elsewhere by drawing the model's end-of-sequence token.
        assert output.stop_reason == (0 if output.token_ids[-1] == 0 else None)
        assert output.token_ids.count(0) <= 1 and bundled.tokenizer.decode(output.token_ids) == output.text
    assert {o.stop_reason for o in finished} == ({None} if name == "json_schema" else {None, 0})


def test_greedy_and_filters_stay_within(bundled):
    for more in ({}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "min_p": 0.9}):
        output = bundled.generate("x = ", max_new_tokens=200, seed=1, **STRUCTURES["json_schema"], **more)[0]
        assert output.finish_reason == "stop" and conforms("json_schema", output.text)


def test_any_json(bundled):
    for schema in (True, {}, "{}", "true"):
        options = {"temperature": 1.0, "seed": 5, "num_return_sequences": 8, "max_new_tokens": 60, "logit_bias": {0: 9.0}}
        finished = [o.text for o in bundled.generate("x = ", json_schema=schema, **options) if o.finish_reason == "stop"]
        assert len(finished) > 4
        for text in finished:
            json.loads(text)


def test_guidance_in_the_schema_is_heard(bundled):
    compact = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}
    for output in bundled.generate("x = ", json_schema=compact, temperature=1.0, seed=2, num_return_sequences=6, max_new_tokens=100):
        assert output.finish_reason == "stop" and conforms("json_schema", output.text)
        assert output.text == json.dumps(json.loads(output.text), separators=(",", ":"), ensure_ascii=False) or "\\" in output.text


def test_ends_of_the_request_end_the_grammar(bundled):
    options = {"regex": "[0-9]+", "temperature": 1.0, "max_new_tokens": 20, "num_return_sequences": 4, "seed": 1}
    end, stop = bundled.tokenizer.encode(" the")[0], bundled.tokenizer.encode("\n")[0]
    for more, ends in (
        ({}, {0}),
        ({"eos_token_id": end}, {end}),
        ({"eos_token_id": [end, 0], "stop_token_ids": [stop]}, {end, 0, stop}),
        ({"ignore_eos": True, "stop_token_ids": [stop]}, {stop}),
    ):
        for favoured in (end, stop, 0):
            outputs = bundled.generate("x = ", logit_bias={favoured: 12.0}, **options, **more)
            assert all(re.fullmatch("[0-9]+", o.text) for o in outputs)
            reasons = {o.stop_reason for o in outputs}
            assert favoured in reasons if favoured in ends else reasons <= {None, *ends}
    for output in bundled.generate("x = ", ignore_eos=True, logit_bias={0: 12.0}, **options):
        assert output.finish_reason == "length" and re.fullmatch("[0-9]+", output.text)


def test_the_other_controls_go_on_top(bundled):
    encode = bundled.tokenizer.encode
    options = {"regex": "(yes|no|maybe)!?", "temperature": 1.0, "num_return_sequences": 16, "seed": 1, "max_new_tokens": 12}
    pieces = {t for text in "yesno!" for t in encode(text)} | set(encode("yes")) | set(encode("no"))
    texts = {o.text for o in bundled.generate("x = ", allowed_token_ids=[*pieces, 0], **options)}
    assert texts <= {"yes", "yes!", "no", "no!"} and len(texts) > 1
    outputs = bundled.generate("x = ", suppress_tokens=[0], **options)
    texts = {o.text for o in outputs}
    assert texts <= {"yes!", "no!", "maybe!"} and len(texts) > 1 and all(o.finish_reason == "stop" for o in outputs)
    output = bundled.generate("x = ", regex="(yes|no)!", stop="!", max_new_tokens=12)[0]
    assert output.text in ("yes", "no") and output.stop_reason == "!"


def test_an_end_that_may_not_come_yet(bundled):
    """A grammar that must end before min_new_tokens leaves nothing to draw, which is said; one that can go on does."""
    output = bundled.generate("x = ", regex="[0-9]{3}", min_new_tokens=10, max_new_tokens=20)[0]
    assert output.finish_reason == "error" and re.fullmatch("[0-9]{3}", output.text)
    position = len(output.prompt_token_ids) + len(output.token_ids)
    assert output.error == f"no token can be drawn at position {position}: min_new_tokens and regex leave none with a logit above -inf"
    for output in bundled.generate("x = ", regex="[0-9]+", min_new_tokens=10, max_new_tokens=30, temperature=1.0, num_return_sequences=4):
        assert output.error is None and len(output.token_ids) >= 10 and re.fullmatch("[0-9]+", output.text)


def test_a_grammar_of_the_empty_text_alone(bundled):
    output = bundled.generate("x = ", regex="(a){0}", max_new_tokens=5)[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("", [0], "stop")


def mixed() -> tuple[list[str], list[SamplingParams]]:
    """Requests with and without grammars."""
    prompts, params = [], []
    for i in range(16):
        structure = [{}, *STRUCTURES.values()][i % 4]
        more: dict[str, Any] = [{}, {"frequency_penalty": 0.5}, {"top_p": 0.9, "logprobs": 2}][i % 3]
        prompts.append("import sys\n" * (i % 5) + "x = ")
        params.append(SamplingParams(temperature=1.0, seed=i, max_new_tokens=30 + i, **structure, **more))
    return prompts, params


@pytest.fixture(scope="module")
def alone(bundled) -> list[tuple]:
    return [drawn(bundled.generate(prompt, params=p)[0]) for prompt, p in zip(*mixed(), strict=True)]


def drawn(output) -> tuple:
    return output.token_ids, output.text, output.finish_reason, output.logprobs, output.processed_logprobs, output.processed_top_logprobs


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk": 3}, {"cache_tokens": 240}, {"max_batch_size": 3, "max_batch_tokens": 5}], ids=lambda o: str(o)
)
def test_in_a_batch_in_chunks_and_across_preemptions(alone, options: dict):
    decoder = Decoder.bundled(**{"cache_tokens": 4096, **options})
    prompts, params = mixed()
    outputs = decoder.generate(prompts, params=params)
    assert [drawn(o) for o in outputs] == alone
    if "cache_tokens" in options:
        assert sum(o.metrics.num_preemptions for o in outputs if o.prompt_index % 4) > 3
    decoder.loop.scheduler.check()
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


@pytest.mark.parametrize("where", ["sample", "advance"])
def test_a_step_that_failed_and_is_run_again_advances_no_grammar_twice(monkeypatch, where: str):
    decoder = Decoder.bundled(cache_tokens=2048)
    params = [SamplingParams(temperature=1.0, seed=3, max_new_tokens=60, **structure) for structure in STRUCTURES.values()]
    expected = [decoder.generate("x = ", params=p)[0] for p in params]
    streams = [decoder.stream("x = ", params=p) for p in params]
    events = [[next(stream)] for stream in streams]
    calls = 0

    def failing(original):
        def wrapped(*args, **more):
            nonlocal calls
            calls += 1
            if calls in (2, 7):
                raise KeyboardInterrupt
            return original(*args, **more)

        return wrapped

    if where == "sample":
        monkeypatch.setattr(decoder.loop.sampler, "draw", failing(decoder.loop.sampler.draw))
    else:
        monkeypatch.setattr(decoder.loop, "_advance", failing(decoder.loop._advance))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            for _ in range(8):
                decoder.step()
    for stream, seen, whole in zip(streams, events, expected, strict=True):
        seen += list(stream)
        assert [t for e in seen for t in e.token_ids] == whole.token_ids and seen[-1].output.text == whole.text
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


def test_samples_of_one_prompt_have_each_their_own_place(bundled):
    options = {"temperature": 1.0, "max_new_tokens": 60, **STRUCTURES["json_schema"]}
    outputs = bundled.generate("x = ", num_return_sequences=5, seed=8, **options)
    for output in outputs:
        assert drawn(bundled.generate("x = ", seed=8, stream=output.stream, **options)[0]) == drawn(output)


def test_a_grammar_is_compiled_once(bundled, monkeypatch):
    import llguidance

    made = []
    original = llguidance.LLMatcher
    monkeypatch.setattr(llguidance, "LLMatcher", type("Counting", (), {
        "__new__": lambda cls, *args, **more: made.append(1) or original(*args, **more),
        "grammar_from_regex": staticmethod(original.grammar_from_regex),
    }))  # fmt: skip
    params = [SamplingParams(regex="[a-c]{4}", max_new_tokens=8, seed=i, temperature=1.0) for i in range(6)]
    assert len(bundled.generate(["x = "] * 6, params=params)) == 6
    assert len(made) == 1


def test_a_library_that_fails_on_the_way_ends_its_request_alone(bundled, monkeypatch):
    from engine.decode.grammar import GrammarError, Matcher

    plain = bundled.generate("import os", max_new_tokens=10)[0]
    advance = Matcher.advance

    def failing(self, tokens, num_prompt_tokens):
        if len(tokens) - num_prompt_tokens == 3:
            raise GrammarError("too complex")
        advance(self, tokens, num_prompt_tokens)

    monkeypatch.setattr(Matcher, "advance", failing)
    params = [SamplingParams(max_new_tokens=10, regex="[a-z ]{9}[a-z ]*"), SamplingParams(max_new_tokens=10)]
    bad, good = bundled.generate(["import os", "import os"], params=params)
    assert bad.finish_reason == "error" and len(bad.token_ids) == 3
    assert bad.error == f"the grammar cannot go on after token {bad.token_ids[-1]}: too complex"
    assert good.token_ids == plain.token_ids and good.error is None


def test_without_the_library_one_sentence_says_so(bundled, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match="regex needs the package llguidance, which cannot be imported .*; pip install llguidance"):
        bundled.generate("x", regex="a")
    assert bundled.generate("x", max_new_tokens=1)[0].error is None


def test_a_tokenizer_the_library_cannot_use(llama):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    decoder = Decoder(llama, cache_tokens=512, tokenizer=words)
    with pytest.raises(ValueError, match="regex is 'w5', which cannot be used: llguidance cannot use this decoder's tokenizer: "):
        decoder.generate("w5", regex="w5", max_new_tokens=4)
    assert decoder.generate("w5 w6", max_new_tokens=2)[0].text


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": None}, {"vocab_size": 60}, {"vocab_size": 97}], ids=str)
def test_byte_fallback_and_vocabularies_of_other_sizes(changes: dict):
    """A tokenizer as of Llama 2; models with no end-of-sequence token, with fewer ids than the tokenizer and with more."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(0x30, 0x7F)), "\u2581a", "b", "\u2581", "c"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    decoder = Decoder(small_llama(**changes), cache_tokens=512, tokenizer=tokenizer)
    outputs = decoder.generate([5], regex="[0-9b ]{2,5}", max_new_tokens=12, temperature=1.0, seed=1, num_return_sequences=12)
    for output in outputs:
        assert output.finish_reason == "stop" and max(output.token_ids) < len(pieces)
        assert re.fullmatch("[0-9b ]{1,5}", output.text)  # the decoder strips a leading space
    assert len({o.text for o in outputs}) > 6
