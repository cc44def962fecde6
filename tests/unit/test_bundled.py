"""The bundled pair as shipped: size, tokenizer, and that transformers opens and runs it. Nothing here trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[2] / "engine" / "bundled"
NAMES = ("target", "draft")
END = "<|endoftext|>"
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\t\tx = 1\n\t",
    "  two\n\n\n    four\n \n",
    "line\r\nline\rline\n\r\n",
    "a\0b\x01\x7f",
    "naïve café 日本語 😀👩\u200d👩\u200d👧 e\u0301 \ufeff\u2028",
    "ﬁ Ⅷ ½ İ ß",  # a normaliser would change these
    "1234567890 0xFFFF 1_000",
    "def f(self, *args):\n    return self._x.get('y')  # \\n\n",
)


def complete(name: str, prompt: str, new_tokens: int) -> str:
    """Prompt and greedy completion in the dtype as saved, through transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER / name)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))


def test_both_folders_together_are_at_most_16_mb() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 16_000_000


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_complete_and_bf16(name: str) -> None:
    config = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert (FOLDER / name / "model.safetensors").is_file()
    assert (FOLDER / name / "generation_config.json").is_file()


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_round_trips(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert Tokenizer.from_file(str(FOLDER / "target" / "tokenizer.json")).encode(text).ids == ids


def test_tokenizer_covers_every_byte_and_is_the_same_for_both() -> None:
    files = [(FOLDER / name / "tokenizer.json").read_bytes() for name in NAMES]
    assert files[0] == files[1]
    tokenizer = Tokenizer.from_str(files[0].decode())
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.token_to_id(END) == 0
    every = "".join(map(chr, range(0x250))) + "\u4e00\U0001f600"
    assert tokenizer.decode(tokenizer.encode(every).ids) == every


def test_indentation_is_cheap() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "target" / "tokenizer.json"))
    for depth in (4, 8, 12, 16):
        assert len(tokenizer.encode("\n" + " " * depth).ids) == 1


@pytest.mark.parametrize(("name", "least", "most"), [("target", 4_000_000, 6_000_000), ("draft", 100_000, 999_999)])
def test_transformers_opens_and_completes(name: str, least: int, most: int, metrics: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    assert model.dtype == torch.bfloat16
    assert least <= model.num_parameters() <= most
    assert model.num_parameters() == metrics["models"][name]["parameters"]
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id == 0

    text = complete(name, "def ", 40)
    assert text.startswith("def ") and len(text.split()) > 1, text
    assert "\ufffd" not in text


def test_target_writes_functions() -> None:
    """A greedy completion is recognisably Python: a method gets a name, parentheses and ``self``."""
    text = complete("target", "class Reader:\n    def", 16)
    assert re.search(r"\n    def \w+\(self\b", text), text


@pytest.mark.parametrize(("name", "worst"), [("target", 2.0), ("draft", 2.5)])
def test_readme_states_the_measured_bits_per_byte(name: str, worst: float, metrics: dict) -> None:
    measured = metrics["held_out"][name]["bits_per_byte"]
    assert 0.5 < measured < worst
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"{name} \*\*{measured:.4f}\*\*", readme)
    row = next(line for line in readme.splitlines() if line.startswith(f"| {name} |"))
    assert row.rstrip(" |").endswith(f"{measured:.4f}")
