"""Random Llama models, the same weights for everybody who decodes them: seed 0, saved once as a Hugging Face folder.

The tokenizer that is saved beside a model knows token i as the word ``t<i>``: some engines do not load a model without one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()  # of loading and saving: they cut through the benchmark's own

SHAPES: dict[str, dict[str, Any]] = {
    "S": dict(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4
    ),  # 100 M parameters
    "M": dict(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),  # 0.5 B
}
POSITIONS = 2048


def config(shape: str, **changes: Any) -> LlamaConfig:
    """The configuration of a shape, with a tied head; ``changes`` replace fields."""
    fields = SHAPES[shape] | {"max_position_embeddings": POSITIONS, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    fields |= {"initializer_range": 0.05}  # at 0.02 the tied head just repeats a token; so engines that differ would agree
    return LlamaConfig(**(fields | {"pad_token_id": 0} | changes))


def random_llama(shape: str, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """The model with random weights, drawn in float32. It has no end-of-sequence token: everybody decodes as many tokens as asked for."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(shape, **changes)).eval()
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def saved(shape: str) -> Path:
    """The folder of that model in float32, under the system's folder of temporary files; written where it is not there yet.

    Peers keep what they make of it beside it (`peers.converted`).
    """
    key = hashlib.sha256(json.dumps(config(shape).to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / "decoding-engine-benchmarks" / f"{shape}-{key}" / "model"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            random_llama(shape).save_pretrained(temporary)
            _word_tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(temporary)
            os.chmod(temporary, 0o755)
            os.rename(temporary, folder)
            os.mkdir(temporary)  # for its removal
    return folder


def bare(shape: str) -> Path:
    """The same folder without the tokenizer: tokens in, tokens out."""
    folder = saved(shape)
    target = folder.parent / "bare"
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if not (target / name).exists():
            (target / name).symlink_to(folder / name)
    return target


def _word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, vocab_size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
