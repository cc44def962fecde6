"""The command line: ``python -m engine generate | demo | info``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from . import kernels as kernels_module
from .decoder import Decoder
from .kernels import cpu, limits
from .kv_cache import block_bytes
from .outputs import RequestOutput

DEMO_PROMPTS = (
    "def read_csv(path):",
    "def is_prime(n):\n    if n <",
    "    try:\n        with open(filename) as f:",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine", description="A decoding engine for PyTorch language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="complete prompts, streaming the text")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    _model_arguments(generate)
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 256, or as many as the model's length allows")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, the default")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw only from the K most likely tokens")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P")
    generate.add_argument("--seed", type=int, metavar="S", help="repeat a draw; the seed used is printed")
    generate.add_argument("--num-return-sequences", type=int, default=1, metavar="N")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    demo = commands.add_parser("demo", help="watch the bundled model write, greedy and sampled")
    demo.add_argument("--max-new-tokens", type=int, default=60, metavar="N")
    info = commands.add_parser("info", help="backends and why any is absent, instruction sets, measured limits")
    info.add_argument("--no-measure", action="store_true", help="do not measure the machine's limits")
    arguments = parser.parse_args(argv)
    try:
        return {"generate": _generate, "demo": _demo, "info": _info}[arguments.command](arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face folder or an origin checkpoint; default: the bundled model")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or its folder; default: the model's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="convert the weights; default: as stored")
    parser.add_argument("--kernels", default="auto", choices=("auto", *kernels_module.BACKENDS), help="which backend computes")


def _decoder(arguments: argparse.Namespace) -> Decoder:
    options: dict[str, Any] = {"tokenizer": arguments.tokenizer, "kernels": arguments.kernels}
    if arguments.dtype:
        options["dtype"] = getattr(torch, arguments.dtype)
    return Decoder(arguments.model, **options) if arguments.model else Decoder.bundled(**options)


def _generate(arguments: argparse.Namespace) -> int:
    decoder = _decoder(arguments)
    options = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_k", "repetition_penalty", "seed", "num_return_sequences", "stop", "ignore_eos")
    }
    outputs = _write(decoder, arguments.prompts, options)
    return 1 if any(output.finish_reason == "error" for output in outputs) else 0


def _demo(arguments: argparse.Namespace) -> int:
    decoder = Decoder.bundled()
    sampled: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "seed": 7}
    for title, options in (("greedy", {}), ("sampled: temperature 0.8, top-k 40, seed 7", sampled)):
        for prompt in DEMO_PROMPTS:
            print(f"--- {title} ---")
            _write(decoder, [prompt], {"max_new_tokens": arguments.max_new_tokens, **options})
    return 0


def _write(decoder: Decoder, prompts: list[str], options: dict[str, Any]) -> list[RequestOutput]:
    """Print completions, a single one as it comes and several each when it is whole, then the speed on stderr."""
    alone = len(prompts) * options.get("num_return_sequences", 1) == 1
    outputs: list[RequestOutput] = []
    begun: tuple[float, int] | None = None  # time and step of the first token, from where on decoding is measured
    new_tokens = context = 0
    for event in decoder.stream(prompts, **options):
        if begun is None:
            begun = time.perf_counter(), decoder.num_steps
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
            print(f"--- prompt {event.prompt_index}, sequence {event.index} (seed {event.output.seed}, stream {event.output.stream}) ---")
            print(prompts[event.prompt_index] + (event.output.text or ""))
        if event.output.error:
            print(f"\nerror: {event.output.error}", file=sys.stderr)
    print(flush=True)
    if begun is not None and decoder.num_steps > begun[1]:
        _report(decoder, time.perf_counter() - begun[0], decoder.num_steps - begun[1], new_tokens, context)
    if alone and options.get("temperature"):
        print(f"seed {outputs[0].seed}", file=sys.stderr)
    return outputs


def _report(decoder: Decoder, seconds: float, steps: int, new_tokens: int, context: int) -> None:
    """Speed after the first token, beside the speed at which this machine can read the bytes a step must read."""
    weights = decoder.model.bytes_per_step
    config = decoder.config
    keys_and_values = context * block_bytes(config.num_layers, config.num_kv_heads, config.head_dim, 1, decoder.cache.dtype)
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
    print(f"cuda module: {'loads, but no op uses it yet' if reason is None else f'absent: {reason}'}")
    if cpu.unavailable("cpu") is None:
        print(cpu.describe())
    if not arguments.no_measure:
        print(f"read bandwidth {limits.read_bandwidth() / 1e9:.1f} GB/s, multiply-adds {limits.flop_rate() / 1e9:.0f} GFLOP/s in float32")
    return 0
