"""transformers' beam search beside ours: one batch of prompts of one length, and every returned sequence compared."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from engine import Decoder

NEAR = 1e-5  # two scores no further apart may come in either order: two orders of the same float32 sums differ so much


def theirs(model: Any, prompts: list[list[int]], *, eos: list[int], **options: Any) -> list[list[tuple[list[int], float]]]:
    """For each prompt (all of one length) transformers' sequences with their scores, best first."""
    ids = torch.tensor(prompts)
    # Without end tokens it would take the model's own.
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", None)
        patch.setattr(model.config, "eos_token_id", None)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=eos or None, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
    width = len(out.sequences) // len(prompts)
    found = []
    for tokens, score in zip(out.sequences[:, ids.shape[1] :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))  # what follows is padding
        found.append((tokens[:end], score))
    return [found[i : i + width] for i in range(0, len(found), width)]


def differences(decoder: Decoder, model: Any, prompts: list[list[int]], eos: list[int], returned: int, **options: Any) -> list[str]:
    """Where the first ``returned`` sequences of a prompt differ from transformers', one line each; near-ties are marked as such."""
    expected = theirs(model, prompts, eos=eos, num_return_sequences=options["num_beams"], **options)
    outputs = decoder.generate(prompts, eos_token_id=eos, num_return_sequences=returned, **options)
    lines = []
    for p, prompt in enumerate(prompts):
        ours = [(o.token_ids, o.score) for o in outputs[p * returned : (p + 1) * returned]]
        for place, ((tokens, score), (other, other_score)) in enumerate(zip(ours, expected[p], strict=False)):
            assert score is not None, outputs[p * returned + place].error
            apart = abs(score - other_score)
            kind = "near" if apart <= NEAR else "DIFFERENT"
            if tokens != other or apart > NEAR * max(1.0, abs(score)):
                lines.append(
                    f"{kind}: {options} eos {eos} prompt {prompt} place {place}: ours {tokens} {score}, theirs {other} {other_score}"
                )
                break
    return lines


def frequent_tokens(decoder: Decoder, prompts: list[list[int]], count: int) -> list[int]:
    """Tokens that beams write often, so that as end tokens they end many."""
    outputs = decoder.generate(prompts, num_beams=4, num_return_sequences=4, max_new_tokens=12, ignore_eos=True)
    # The very first tokens would end everything at once.
    return [token for token, _ in Counter(t for o in outputs for t in o.token_ids[3:]).most_common(count)]
