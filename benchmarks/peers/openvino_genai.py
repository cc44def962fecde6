"""OpenVINO GenAI: its continuous batching pipeline, step by step. Exported by optimum-intel, which calls NNCF for int8 (per channel) and
int4 (groups of 32, the embedding included)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peers import Timing, converted, missing, version_of

EXPORTS = {
    "fp32": ("fp32",), "bf16": ("fp16",), "fp16": ("fp16",), "int8": ("int8",),
    "int4": ("int4", "--group-size", "32", "--ratio", "1.0", "--sym", "--all-layers"),
}  # fmt: skip


class Adapter:
    name = "openvino_genai"
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16", "int8", "int4")
    beams = True

    def unavailable(self) -> str | None:
        return missing("openvino_genai", "optimum", "nncf", "openvino_tokenizers", "torch")

    def version(self) -> str:
        return version_of("openvino-genai")

    def load(self, folder: Path, dtype: str, num_threads: int) -> None:
        import openvino_genai as og

        def export(target: Path) -> None:
            command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", folder]
            options = ["--task", "text-generation-with-past", "--weight-format", *EXPORTS[dtype]]
            subprocess.run([*command, *options, target], check=True)

        self._pipeline: Any = None
        target = converted(folder, f"openvino_genai-{self.version()}-{EXPORTS[dtype][0]}", export)
        scheduler = og.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 8192  # all prompts in one step
        scheduler.cache_size = 1  # GiB
        properties = {"INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" else "f32"}
        if dtype == "fp32":
            properties["KV_CACHE_PRECISION"] = "f32"  # the default is 8 bits
        self._pipeline = og.ContinuousBatchingPipeline(str(target), scheduler, "CPU", properties)

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        begin = time.perf_counter()
        handles = self._add(prompts, new_tokens, num_beams)
        self._pipeline.step()
        start, steps = time.perf_counter(), 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            steps += 1
        end = time.perf_counter()
        if steps != new_tokens:
            raise RuntimeError(f"OpenVINO took {steps} steps for {new_tokens} tokens")
        return Timing(end - start, end - begin, [list(handle.read_all()[0].generated_ids) for handle in handles])

    def prefill(self, tokens: list[int]) -> float:
        handles = self._add([tokens], 1, 1)
        start = time.perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        seconds = time.perf_counter() - start
        handles[0].read_all()
        return seconds

    def _add(self, prompts: list[list[int]], new_tokens: int, num_beams: int) -> list[Any]:
        import numpy as np
        import openvino
        import openvino_genai as og

        config = og.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        if num_beams > 1:
            config.num_beams, config.num_return_sequences = num_beams, 1
        return [
            self._pipeline.add_request(i, openvino.Tensor(np.array([prompt], dtype=np.int64)), config) for i, prompt in enumerate(prompts)
        ]
