"""onnxruntime-genai over a model that its own builder made, with the builder's defaults for the CPU; int8 and int4 are blocks of 32."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peers import Timing, converted, missing, version_of


class Adapter:
    name = "onnxruntime_genai"
    dtypes: tuple[str, ...] = ("fp32", "int8", "int4")
    beams = True

    def unavailable(self) -> str | None:
        return missing("onnxruntime_genai", "onnx", "onnx_ir", "transformers", "torch")  # the last four for its builder

    def version(self) -> str:
        return version_of("onnxruntime-genai")

    def load(self, folder: Path, dtype: str, num_threads: int) -> None:
        import onnxruntime_genai as og

        def build(target: Path) -> None:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", target, "-p", dtype, "-e", "cpu"]
            subprocess.run([*command, "-c", target / "cache"], check=True)

        self._model: Any = None
        target = converted(folder, f"onnxruntime_genai-{self.version()}-{dtype}", build)
        config = og.Config(str(target))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": num_threads}}}}))
        self._model = og.Model(config)

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        length = len(prompts[0]) + new_tokens
        begin = time.perf_counter()
        generator = self._generator(len(prompts), length, num_beams)
        generator.append_tokens(self._array(prompts))
        generator.generate_next_token()
        start, steps = time.perf_counter(), 1
        while not generator.is_done():
            generator.generate_next_token()
            steps += 1
        end = time.perf_counter()
        if steps != new_tokens:
            raise RuntimeError(f"onnxruntime-genai took {steps} steps for {new_tokens} tokens")
        found = [generator.get_sequence(i) for i in range(len(prompts))]
        return Timing(end - start, end - begin, [sequence[len(prompts[0]) :].tolist() for sequence in found])

    def prefill(self, tokens: list[int]) -> float:
        generator = self._generator(1, len(tokens) + 1, 1)
        ids = self._array([tokens])
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return time.perf_counter() - start

    def _generator(self, batch: int, length: int, num_beams: int) -> Any:
        import onnxruntime_genai as og

        params = og.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=batch, max_length=length, min_length=length, num_beams=num_beams, do_sample=False, repetition_penalty=1.0,
        )  # fmt: skip
        return og.Generator(self._model, params)

    def _array(self, prompts: list[list[int]]) -> Any:
        import numpy as np

        return np.array(prompts, dtype=np.int32)
