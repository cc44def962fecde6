"""The command line: ``python -m engine generate | serve | demo | info | verify``."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from . import __version__, verify
from . import kernels as kernels_module
from .decoder import Decoder
from .drafters.lookup import PromptLookup, SuffixLookup
from .kernels import cpu, limits
from .kv_cache import block_bytes
from .models.weights import WEIGHTS
from .outputs import RequestOutput
from .params import BeamParams, SamplingParams
from .server import command as server

DEMO_PROMPTS = (
    "def read_csv(path):",
    "def is_prime(n):\n    if n <",
    "    try:\n        with open(filename) as f:",
)
# The bundled model goes on with much of this, sampled too.
DEMO_REPETITIVE_PROMPT = "    @property\n    def width(self):\n        return self._width\n\n    @property\n    def "
DEMO_JSON_PROMPT = "# what this module exports, as JSON\nexport = "
DEMO_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{3,8}(_[a-z]{2,6})?$"},
        "kind": {"enum": ["function", "class", "constant"]},
        "arguments": {"type": "integer", "minimum": 0, "maximum": 9},
        "public": {"type": "boolean"},
    },
    "required": ["name", "kind", "arguments", "public"],
    "additionalProperties": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine", description="A decoding engine for PyTorch language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="complete prompts, streaming the text")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    _model_arguments(generate)
    _draft_arguments(generate)
    _sampling_arguments(generate)
    serve = commands.add_parser("serve", help="answer OpenAI's API over HTTP, with a page to try it at /")
    _model_arguments(serve)
    _draft_arguments(serve)
    server.add_arguments(serve)
    demo = commands.add_parser("demo", help="watch the bundled model write: greedy, beams, sampled, with drafts, and JSON of a schema")
    demo.add_argument("--max-new-tokens", type=int, default=60, metavar="N")
    info = commands.add_parser("info", help="backends and why any is absent, instruction sets, measured limits")
    info.add_argument("--no-measure", action="store_true", help="do not measure the machine's limits")
    verify.add_arguments(commands.add_parser("verify", help="check that every backend draws each token by the law, and print p-values"))
    arguments = parser.parse_args(argv)
    try:
        run = {"generate": _generate, "serve": _serve, "demo": _demo, "info": _info, "verify": verify.command}[arguments.command]
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face folder or an origin checkpoint; default: the bundled model")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or its folder; default: the model's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="convert the weights; default: as stored")
    parser.add_argument(
        "--weights",
        choices=tuple(dict.fromkeys((*WEIGHTS["cpu"], *WEIGHTS["cuda"]))),
        help="how matrices are kept: read in place, packed (CPU), or quantised (fp8: GPU); default: packed on a CPU, shared on a GPU",
    )
    parser.add_argument("--device", metavar="cpu|cuda", help="where the model goes; default: a GPU if there is one")
    parser.add_argument(
        "--deterministic", action="store_true", help="on a GPU: outputs that do not depend on what else is decoded, to the bit"
    )
    parser.add_argument("--kernels", default="auto", choices=("auto", *kernels_module.BACKENDS), help="which backend computes")


def _draft_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft",
        action="append",
        metavar="bundled|PATH|lookup|suffix",
        help="guess tokens and verify several at a time: by a smaller model, or by what stood before; repeatable, the first guess is taken",
    )


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Those options of ``BeamParams`` that make sense in a shell, each under its own name where the help names no other."""
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 256, or as many as the model's length allows")
    parser.add_argument("--min-new-tokens", type=int, metavar="N", help="no end before so many tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, the default")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw only from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw only from the most likely tokens of together this probability")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw only from tokens this many times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, metavar="P", help="above 1: tokens of prompt and output less likely")
    parser.add_argument("--presence-penalty", type=float, metavar="P", help="-2 to 2, against tokens of the output")
    parser.add_argument("--frequency-penalty", type=float, metavar="P", help="-2 to 2, likewise for each occurrence")
    parser.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="add to a token's logit (-inf: never drawn); repeatable",
    )
    parser.add_argument(
        "--suppress", dest="suppress_tokens", type=int, action="append", metavar="ID", help="never draw this token; repeatable"
    )
    parser.add_argument("--bad-word", dest="bad_words", action="append", metavar="TEXT", help="never write this; repeatable")
    parser.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="never write N tokens in a row twice")
    parser.add_argument("--num-beams", type=int, metavar="W", help="beam search of this width")
    parser.add_argument("--length-penalty", type=float, metavar="P", help="beams: the score is divided by length to this power")
    parser.add_argument("--early-stopping", type=_early_stopping, metavar="true|false|never", help="beams: when the search ends")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat a draw; the seed used is printed")
    parser.add_argument("--num-return-sequences", type=int, default=1, metavar="N")
    parser.add_argument("--num-assistant-tokens", type=int, metavar="N", help="draft so many tokens at a time; default: as many as pay")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    parser.add_argument("--logprobs", type=int, metavar="N", help="print each token's log-probability, and the N most likely tokens")
    parser.add_argument("--json-schema", metavar="FILE-or-TEXT", help="write JSON of this schema")
    parser.add_argument("--regex", metavar="TEXT", help="write text that matches")
    parser.add_argument("--grammar", metavar="FILE-or-TEXT", help="write text of this Lark grammar")


def _bias(text: str) -> tuple[int, float]:
    """``ID=BIAS``."""
    try:
        token, _, bias = text.partition("=")
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=BIAS, as in 198=-2.5") from None


def _early_stopping(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _file_or_text(value: str) -> str:
    """What the file of this name holds if there is one, else the value itself."""
    try:
        is_file = Path(value).is_file()
    except (OSError, ValueError):  # text that can be no name
        is_file = False
    if not is_file:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{value} is not a text file in UTF-8") from None


def _decoder(arguments: argparse.Namespace, **options: Any) -> Decoder:
    options |= {"tokenizer": arguments.tokenizer, "kernels": arguments.kernels, "weights": arguments.weights}
    options |= {"device": arguments.device, "deterministic": arguments.deterministic}
    if arguments.dtype:
        options["dtype"] = getattr(torch, arguments.dtype)
    if arguments.draft:
        lookups = {"lookup": PromptLookup, "suffix": SuffixLookup}
        options["draft"] = [lookups[name]() if name in lookups else name for name in arguments.draft]
    return Decoder(arguments.model, **options) if arguments.model else Decoder.bundled(**options)


def _serve(arguments: argparse.Namespace) -> int:
    return server.run(arguments, _decoder)


def _generate(arguments: argparse.Namespace) -> int:
    decoder = _decoder(arguments)
    options = {f.name: getattr(arguments, f.name) for f in fields(BeamParams) if getattr(arguments, f.name, None) is not None}
    options["logit_bias"] = dict(arguments.logit_bias)
    for name in ("json_schema", "grammar"):
        if name in options:
            options[name] = _file_or_text(options[name])
    outputs = _write(decoder, arguments.prompts, options)
    if arguments.logprobs is not None:
        for output in outputs:
            _print_logprobs(decoder, output)
    return 1 if any(output.finish_reason == "error" for output in outputs) else 0


def _print_logprobs(decoder: Decoder, output: RequestOutput) -> None:
    """One line per token: position, id and text, log-probability under the model and as drawn, and the most likely under the model."""

    def name(token: int) -> str:
        return f"{token} {decoder.tokenizer.decode([token])!r}" if decoder.tokenizer else str(token)

    print(f"--- logprobs of prompt {output.prompt_index}, sequence {output.index}: position, token, raw, processed; most likely, raw ---")
    tops = output.top_logprobs or [{}] * len(output.token_ids)
    for i, (token, raw, processed, top) in enumerate(
        zip(output.token_ids, output.logprobs, output.processed_logprobs, tops, strict=True), len(output.prompt_token_ids)
    ):
        likely = ", ".join(f"{name(t)} {logprob:.3f}" for t, logprob in top.items())
        print(f"{i:>5}  {name(token):<20} {raw:8.3f} {processed:8.3f}{'  | ' if likely else ''}{likely}")


def _demo(arguments: argparse.Namespace) -> int:
    decoder = Decoder.bundled()
    length: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    print("--- greedy ---")
    greedy = _write(decoder, [DEMO_PROMPTS[0]], length)[0]
    print(f"--- beam search of width 4 beside it: the best two; greedy has a log-probability of {greedy.cumulative_logprob:.3f} ---")
    _write(decoder, [DEMO_PROMPTS[0]], {**length, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0})

    sampled: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02}
    title = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in sampled.items())
    print(f"--- sampled: {title}, seed 7 ---")
    first = _write(decoder, [DEMO_PROMPTS[1]], {**length, **sampled, "seed": 7})[0]
    print("--- the same once more, now in a batch with two other prompts ---")
    params = [SamplingParams(**length, **sampled, seed=seed) for seed in (6, 7, 8)]
    second = decoder.generate(DEMO_PROMPTS, params=params)[1]
    print(f"{DEMO_PROMPTS[1]}{second.text}\n")
    same = (first.token_ids, first.logprobs) == (second.token_ids, second.logprobs)
    print(f"The two samples are {'identical' if same else 'DIFFERENT'}, tokens and log-probabilities.\n")

    same = _demo_drafts(decoder, {**length, **sampled, "seed": 11}) and same

    print("--- JSON of a schema, seed 3 ---")
    try:
        output = _write(decoder, [DEMO_JSON_PROMPT], {"json_schema": DEMO_SCHEMA, "temperature": 0.8, "seed": 3, "max_new_tokens": 120})[0]
        print(f"json.loads gives {json.loads(output.text or '')}")
    except ImportError as error:
        print(f"Left out: {error}")
    return 0 if same else 1


def _demo_drafts(decoder: Decoder, options: dict[str, Any]) -> bool:
    """Show a sample without drafts and with; whether they are the same."""
    print("--- sampled likewise, seed 11: without drafts | with drafts, copied from what stood before or by the smaller bundled model ---")
    drafting = Decoder.bundled(draft=[PromptLookup(), "bundled"])
    pairs = []
    for _ in range(3):  # what drafts and steps cost has to be seen first
        pairs.append([one.generate(DEMO_REPETITIVE_PROMPT, **options)[0] for one in (decoder, drafting)])
    texts = (f"{DEMO_REPETITIVE_PROMPT}{output.text}".splitlines() for output in pairs[0])
    for lines in itertools.zip_longest(*texts, fillvalue=""):
        print(" | ".join(f"{line:<56.56}" for line in lines).rstrip())
    same = all((output.token_ids, output.logprobs) == (plain.token_ids, plain.logprobs) for plain, output in pairs)
    print(f"\nThe two are {'identical' if same else 'DIFFERENT'}, tokens and log-probabilities; each three times, of which the fastest:")
    for title, outputs in zip(("without", "with"), zip(*pairs, strict=True), strict=True):
        best = max(outputs, key=_speed)
        print(f"  {title:<7} {_speed(best):6.0f} tokens/s, {_forwards([best])}")
    print()
    return same


def _speed(output: RequestOutput) -> float:
    """Tokens per second after the first."""
    metrics = output.metrics
    seconds = metrics.total_time - (metrics.time_to_first_token or 0.0)
    return (metrics.num_new_tokens - 1) / seconds


def _forwards(outputs: Sequence[RequestOutput]) -> str:
    """What drafts have saved."""
    forwards, new, drafted, accepted = (
        sum(getattr(output.metrics, name) for output in outputs)
        for name in ("num_forwards", "num_new_tokens", "num_drafted", "num_accepted")
    )
    saved = sum(output.metrics.forwards_saved for output in outputs)
    return f"{forwards} forwards for {new} tokens ({saved / max(new, 1):.0%} saved); {accepted} of {drafted} drafted tokens accepted"


def _write(decoder: Decoder, prompts: list[str], options: dict[str, Any]) -> list[RequestOutput]:
    """Print completions, a single one as it comes and several each when it is whole, then the speed on stderr."""
    alone = len(prompts) * options.get("num_return_sequences", 1) == 1
    outputs: list[RequestOutput] = []
    begun: tuple[float, int] | None = None  # time and step of the first token, from where on decoding is measured
    new_tokens = context = 0
    for event in decoder.stream(prompts, **options):
        if begun is None:
            begun = time.perf_counter(), decoder.loop.num_steps
            if alone:
                print(prompts[0], end="", flush=True)
        else:
            new_tokens += len(event.token_ids)
        if alone:
            print(event.text, end="", flush=True)
        if event.output is None:
            continue
        outputs.append(event.output)
        context += event.output.metrics.num_prompt_tokens + event.output.metrics.num_new_tokens // 2
        if not alone:
            output = event.output
            drawn = f"seed {output.seed}, stream {output.stream}" if output.score is None else f"score {output.score:.3f}"
            print(f"--- prompt {event.prompt_index}, sequence {event.index} ({drawn}) ---")
            print(prompts[event.prompt_index] + (event.output.text or ""))
        if event.output.error:
            print(f"\nerror: {event.output.error}", file=sys.stderr)
    print(flush=True)
    if begun is not None and decoder.loop.num_steps > begun[1]:
        _report(decoder, time.perf_counter() - begun[0], decoder.loop.num_steps - begun[1], new_tokens, context)
        if decoder.loop.speculator is not None:
            print(_forwards(outputs), file=sys.stderr)
    if alone and options.get("temperature"):
        print(f"seed {outputs[0].seed}", file=sys.stderr)
    return outputs


def _report(decoder: Decoder, seconds: float, steps: int, new_tokens: int, context: int) -> None:
    """Speed after the first token, beside the speed at which this machine can read the bytes a step must read."""
    weights = decoder.model.bytes_per_step
    config = decoder.config
    keys_and_values = context * block_bytes(config.num_layers, config.num_kv_heads, config.head_dim, 1, decoder.loop.cache.dtype)
    step_bytes = weights + keys_and_values
    share = step_bytes * steps / seconds / limits.read_bandwidth(step_bytes, repeats=3)
    print(
        f"{new_tokens / seconds:.0f} tokens/s; {step_bytes / 1e6:.1f} MB per step at {step_bytes * steps / seconds / 1e9:.1f} GB/s, "
        f"{share:.0%} of what this machine reads over so many bytes",
        file=sys.stderr,
    )


def _info(arguments: argparse.Namespace) -> int:
    print(f"decoding-engine {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print("backends on cpu, fastest first:")
    for name, reason in kernels_module.backends("cpu").items():
        print(f"  {name}: {'ready' if reason is None else f'absent: {reason}'}")
    reason = kernels_module.cuda_reason()
    print(f"cuda module: {'ready' if reason is None else f'absent: {reason}'}")
    if cpu.unavailable("cpu") is None:
        print(cpu.describe())
    if not arguments.no_measure:
        print(f"read bandwidth {limits.read_bandwidth() / 1e9:.1f} GB/s, multiply-adds {limits.flop_rate() / 1e9:.0f} GFLOP/s in float32")
    return 0
