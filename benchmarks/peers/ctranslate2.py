"""CTranslate2 over a model that its own converter made. Greedy decoding reports each token; a beam search does not, so that the time of
one with a single token is subtracted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peers import Timing, converted, missing

COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8_float32"}


class Adapter:
    name = "ctranslate2"
    beams = True

    @property
    def dtypes(self) -> tuple[str, ...]:
        if self.unavailable():
            return ()
        import ctranslate2

        there = ctranslate2.get_supported_compute_types("cpu")
        return tuple(dtype for dtype, compute in COMPUTE.items() if compute in there)

    def unavailable(self) -> str | None:
        return missing("ctranslate2", "transformers", "torch")  # the last two for its converter

    def version(self) -> str:
        import ctranslate2

        return ctranslate2.__version__

    def load(self, folder: Path, dtype: str, num_threads: int) -> None:
        import ctranslate2

        def convert(target: Path) -> None:
            quantization = None if dtype == "fp32" else COMPUTE[dtype]
            converter = ctranslate2.converters.TransformersConverter(str(folder))
            converter.convert(str(target), quantization=quantization, force=True)

        self._generator: Any = None
        target = converted(folder, f"ctranslate2-{self.version()}-{dtype}", convert)
        self._generator = ctranslate2.Generator(
            str(target), device="cpu", compute_type=COMPUTE[dtype], inter_threads=1, intra_threads=num_threads
        )

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        if num_beams > 1:
            whole, tokens = self._generate(prompts, new_tokens, num_beams)
            first, _ = self._generate(prompts, 1, num_beams)
            return Timing(whole - first, whole, tokens)
        times: list[tuple[int, float]] = []

        def clock(result: Any) -> bool:
            times.append((result.step, time.perf_counter()))
            return False

        whole, tokens = self._generate(prompts, new_tokens, 1, callback=clock)
        first_step = min(step for step, _ in times)
        start = max(at for step, at in times if step == first_step)
        return Timing(times[-1][1] - start, whole, tokens)

    def prefill(self, tokens: list[int]) -> float:
        return self._generate([tokens], 1, 1)[0]

    def _generate(self, prompts: list[list[int]], new_tokens: int, num_beams: int, **options: Any) -> tuple[float, list[list[int]]]:
        words = [[f"t{token}" for token in prompt] for prompt in prompts]
        start = time.perf_counter()
        results = self._generator.generate_batch(
            words, beam_size=num_beams, max_length=new_tokens, min_length=new_tokens, sampling_topk=1, include_prompt_in_result=False,
            end_token=[0], **options,
        )  # fmt: skip
        return time.perf_counter() - start, [result.sequences_ids[0] for result in results]
