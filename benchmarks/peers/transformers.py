"""transformers' own ``generate`` with its default cache and attention; int8 is torch's dynamic quantisation of the linear layers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peers import Timing, missing, version_of


def make_clock() -> Any:
    """A stopping criterion that stops nothing, and notes in ``marks`` when there are how many tokens, prompt included. transformers asks it
    once for each forward."""
    import torch
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.marks: list[tuple[float, int]] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), input_ids.shape[1]))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return Clock()


class Adapter:
    name = "transformers"
    dtypes: tuple[str, ...] = ("fp32", "bf16", "int8")
    beams = True

    def unavailable(self) -> str | None:
        return missing("transformers", "torch")

    def version(self) -> str:
        return version_of("transformers")

    def load(self, folder: Path, dtype: str, num_threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._model: Any = None  # the one before goes first
        weights = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights).eval()
        if dtype == "int8":
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        model.generation_config.eos_token_id = None
        self._model = model

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        import torch

        clock = make_clock()
        begin = time.perf_counter()
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, num_beams=num_beams, do_sample=False, pad_token_id=0,
            stopping_criteria=[clock],
        )  # fmt: skip
        return Timing(clock.marks[-1][0] - clock.marks[0][0], time.perf_counter() - begin, out[:, ids.shape[1] :].tolist())

    def prefill(self, tokens: list[int]) -> float:
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            self._model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start
