"""Peak memory of loading: a fresh process loads about 200 MB, reads every byte, and reports its high-water mark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ALLOWED = 1.15  # times the weights
CONSTANT = 16 << 20  # code first used on loading, RoPE tables

CHILD = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from engine.kernels import select
from engine.models import load

ops = select("cpu", "reference")

def peak():  # ru_maxrss would start at the parent's size; VmHWM belongs to this process's own memory
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = peak()
loaded = load(sys.argv[1], ops=ops, dtype=sys.argv[2] if len(sys.argv) > 2 else None)
weights = loaded.model.weights
tensors = {t.data_ptr(): t for t in (weights.embedding, weights.head, weights.final_norm)}
for layer in weights.layers:
    for value in vars(layer).values():
        for t in value if isinstance(value, tuple) else [value]:
            if t is not None:
                tensors[t.data_ptr()] = t
size = 0
for t in tensors.values():
    t.flatten()[::512].double().sum()  # every page
    size += t.nbytes
print(peak() - before, size)
"""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "float32", "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random model in three forms of folder."""
    from engine.models.families import FAMILIES
    from engine.models.weights import expected_shapes

    family = FAMILIES["llama"]
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(family.read_config(CONFIG), family.names).items()
    }
    names = sorted(state)
    root = tmp_path_factory.mktemp("memory")
    made = {}
    for kind in ("single", "sharded", "bin"):
        made[kind] = folder = root / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        if kind == "single":
            save_file(state, folder / "model.safetensors")
        elif kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            for i in range(2):
                save_file({name: state[name] for name in names[i::2]}, folder / f"model-{i}.safetensors")
            weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return made


def measure(*arguments: str) -> tuple[int, int]:
    run = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "loading" not in run.stderr  # no progress bar where stderr is no terminal
    peak, size = map(int, run.stdout.split())
    print(f"{arguments}: peak {peak / 1e6:.1f} MB for {size / 1e6:.1f} MB of weights, {peak / size:.3f} times")
    return peak, size


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")


@linux
@pytest.mark.parametrize("kind", ["single", "sharded", "bin"])
def test_peak_of_loading(kind: str, folders: dict[str, Path]) -> None:
    peak, size = measure(str(folders[kind]))
    assert size > 180 << 20
    assert peak <= ALLOWED * size


@linux
def test_peak_of_converting(folders: dict[str, Path]) -> None:
    """Half the bytes stay; while one tensor is converted its source is in memory too."""
    peak, size = measure(str(folders["sharded"]), "bfloat16")
    largest = 4 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    assert peak <= ALLOWED * size + largest + CONSTANT
