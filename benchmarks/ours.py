"""The engine behind the interface of the peers (`peers.Peer`), in this process."""

from __future__ import annotations

import time
from typing import Any

import torch
from peers import Timing

from engine import Decoder

# What weights are held in -> the model's dtype, and how the decoder keeps them.
WEIGHTS = {
    "fp32": (torch.float32, "packed"),
    "bf16": (torch.bfloat16, "packed"),
    "fp16": (torch.float16, "packed"),
    "int8": (torch.float32, "int8"),
    "int4": (torch.float32, "int4"),
}


class Engine:
    """A decoder of one model, a folder or live, for prompts of one length at a time. ``shared``: over a live model's own tensors, where
    they lie; else the weights are packed."""

    def __init__(self, model: Any, dtype: str, *, max_batch: int, cache_tokens: int, shared: bool = False) -> None:
        torch_dtype, kept = WEIGHTS[dtype]
        if isinstance(model, torch.nn.Module):
            model.to(torch_dtype)
        self.decoder = Decoder(
            model, dtype=torch_dtype, weights="shared" if shared else kept, cache_tokens=cache_tokens, max_batch_size=max_batch,
            max_batch_tokens=8192,  # all prompts in one step, so that all sequences begin to decode together
            prefix_cache=False,  # every round computes its prompts
        )  # fmt: skip

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        begin = time.perf_counter()
        outputs = self.decoder.generate(prompts, max_new_tokens=new_tokens, num_beams=num_beams, ignore_eos=True)
        total = time.perf_counter() - begin
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"the engine failed: {output.error}")
        metrics = [output.metrics for output in outputs]
        # The first token comes with the prompt; a batch has begun to decode when the last of its prompts is computed.
        seconds = max(m.total_time for m in metrics) - max(m.time_to_first_token or 0.0 for m in metrics)
        return Timing(seconds, total, [output.token_ids for output in outputs])

    def prefill(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        self.decoder.generate([tokens], max_new_tokens=1, ignore_eos=True)
        return time.perf_counter() - start
