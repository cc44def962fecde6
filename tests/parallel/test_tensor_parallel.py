"""A model in parts, in processes of its own over gloo, against the same model in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models.model_helpers import hf_model
from models.real_configs import LLAMA_31_8B, QWEN3_06B, small
from parallel import cases

from engine import Decoder, Parallel
from engine.models.config import ModelConfig
from engine.models.rope import RopeConfig
from engine.models.shard import Shard

SIZE = 3  # processes; two of them share models, so that a group is not all there is
FOLDERS = {
    "llama biases": small(LLAMA_31_8B, num_attention_heads=4, attention_bias=True, mlp_bias=True),
    "qwen3": small(QWEN3_06B, num_hidden_layers=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for seed, (name, raw) in enumerate(FOLDERS.items()):
        hf_model(raw, seed).save_pretrained(path / name)
    return path


def run_ranks(size: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What each process of ``ranks.py`` has found."""
    environment = {**os.environ, "ENGINE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    processes = [
        subprocess.Popen([*program, str(rank), str(size), str(folder), *arguments], env=environment, stdout=-1, stderr=-1, text=True)
        for rank in range(size)
    ]
    try:
        ends = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ends, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ends]


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(SIZE, folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """What one process makes of the same."""
    return cases.run_cases(folder, lambda: None)


KINDS = [f"{name}, {case}" for name in cases.MODELS for case in (*cases.CASES, "drafts, replay", "drafts, block", "drafts")]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_one_process(ranks: list[dict[str, Any]], whole: dict[str, Any], kind: str) -> None:
    assert ranks[0]["cases"].keys() == whole.keys() == {*KINDS, *cases.INTEGERS}
    assert ranks[0]["cases"][kind] == whole[kind]


@pytest.mark.parametrize("weights", cases.INTEGERS)
def test_quantised_parts_are_near_the_whole(ranks: list[dict[str, Any]], whole: dict[str, Any], weights: str) -> None:
    """Not equal: a scale of int8 is that of a part's inputs, and a group of activations ends where a part does."""
    for found, expected in zip(ranks[0]["cases"][weights], whole[weights], strict=True):
        both = found.keys() & expected.keys()
        assert len(both) > 4
        assert all(found[token] == pytest.approx(expected[token], abs=0.3) for token in both)


def test_sums_are_in_order_whatever_is_summed_beside(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["sums"]["sums"] == [True, True, True]
        assert found["sums"]["about"]
        assert found["sums"]["columns"]
        assert found["sums"]["all"] == [[0, 0], [1, -1], [2, -2]]
    assert ranks[2]["not of the group"].startswith("ValueError: group does not hold this process")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each process, and there are not two")
def test_sums_over_nccl_also_in_a_graph(tmp_path: Path) -> None:
    for found in run_ranks(2, tmp_path, "gpu"):
        assert found["right"] == [True] * 18


def test_what_cannot_be_is_refused_in_every_process(ranks: list[dict[str, Any]]) -> None:
    for found in ranks[:2]:
        assert found["other blocks"] == "ValueError: rank 1 has block_size 32 and rank 0 16; all ranks must have the same"
        assert found["taken"].startswith("ValueError: parallel is rank")
        assert found["explain"].startswith("RuntimeError: explain() times a model that is whole")
    assert ranks[0]["wrong rank"] == "RuntimeError: follow() is for ranks above 0 of a Decoder(parallel=...); this is rank 0 of 2"
    assert ranks[1]["wrong rank"].startswith("RuntimeError: generate() is for rank 0 of the parallel decoder; this is rank 1 of 2")


def test_a_failure_ends_the_work_of_all_and_nobody_hangs(ranks: list[dict[str, Any]]) -> None:
    leader, follower = ranks[:2]
    for case, at_first in (
        ("follower fails", "ConnectionError"),
        ("leader fails", "ArithmeticError"),
        ("follower dies", "ConnectionError"),
    ):
        *during, after = leader[case]
        assert all(f"a step with this request failed with {at_first}" in error for error in during), during
        assert "all must be started anew" in after
    assert follower["follower fails"] == "ArithmeticError: as planned"
    lost = "ConnectionError: rank 1 of 2 waited in vain for another rank, which has failed, gone, or is late"
    assert follower["leader fails"] == lost
    assert "follower dies" not in follower
    assert leader["collected"] == 2
    assert follower["collected"] == "nothing"


def _config(**sizes: int) -> ModelConfig:
    standard: dict[str, Any] = {
        "family": "llama", "vocab_size": 211, "hidden_size": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8,
        "ffn_size": 88, "norm_eps": 1e-5, "max_position": 64, "rope": RopeConfig(10000.0, 8), "windows": (0, 0),
    }  # fmt: skip
    return ModelConfig(**{**standard, **sizes})


@pytest.mark.parametrize(
    ("size", "sizes", "message"),
    [
        (3, {}, "parallel has 3 ranks; they must divide the model's num_kv_heads, which is 4"),
        (4, {"ffn_size": 90}, "parallel has 4 ranks; they must divide the model's ffn_size, which is 90"),
        (4, {"vocab_size": 15}, "parallel has 4 ranks; a vocabulary of 15 can be cut for at most 3"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(size: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard(0, size).config(_config(**sizes))


@pytest.mark.parametrize("vocab_size", [8, 9, 211, 128256])
def test_parts_of_the_vocabulary_are_all_of_it(vocab_size: int) -> None:
    for size in (1, 2):
        parts = [Shard(rank, size).vocabulary(vocab_size) for rank in range(size)]
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(vocab_size))
        assert all(part.start % 4 == 0 and part.stop > part.start for part in parts)


def test_a_fused_matrix_is_cut_part_by_part() -> None:
    rows = list(range(8 + 4 + 4))
    assert [[rows[part] for _, part in Shard(rank, 2).parts((8, 4, 4), 1)] for rank in range(2)] == [
        [[0, 1, 2, 3], [8, 9], [12, 13]],
        [[4, 5, 6, 7], [10, 11], [14, 15]],
    ]
    assert list(Shard(1, 2).parts((8, 4), 2)) == [(0, slice(4, 8)), (1, slice(2, 4))]


def test_parallel_wants_its_processes_first() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        Parallel()
    with pytest.raises(TypeError, match="parallel is a int; it must be a Parallel or None"):
        Decoder("nowhere", parallel=2)  # type: ignore[arg-type]
