"""transformers' continuous batching: ``generate_batch``, over its paged cache. No server: prompts are handed over all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers import Timing, transformers

PAGE = 256  # tokens


class Adapter(transformers.Adapter):
    name = "transformers_batching"
    dtypes = ("fp32", "bf16")
    beams = False

    def load(self, folder: Path, dtype: str, num_threads: int) -> None:
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of what a CPU lacks
        super().load(folder, dtype, num_threads)

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        """Timed by its own clock, from the moment the first prompt is queued: that it sets up a cache for each call is left out."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        assert num_beams == 1
        pages = sum(-(-(len(prompt) + new_tokens) // PAGE) for prompt in prompts)
        # A cache of its own choosing takes most of the memory, and fills it with zeros. All prompts fit one step.
        batching = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages + 8, max_batch_tokens=max(512, sum(map(len, prompts))), allow_block_sharing=False
        )
        options = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        done: dict[str, Any] = self._model.generate_batch(
            prompts, generation_config=options, continuous_batching_config=batching, record_timestamps=True
        )
        outputs = list(done.values())
        tokens = [list(output.generated_tokens) for output in outputs]
        if [len(ids) for ids in tokens] != [new_tokens] * len(prompts):
            raise RuntimeError(f"generate_batch gave {[len(ids) for ids in tokens]} tokens, not {new_tokens} for each of {len(prompts)}")
        end = max(output.timestamps[-1] for output in outputs)
        first = max(output.timestamps[0] for output in outputs)
        return Timing(end - first, end - min(output.created_time for output in outputs), tokens)
