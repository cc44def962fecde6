"""The command line, run as a person would."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "engine", *arguments], capture_output=True, text=True, timeout=120)


def test_generate_streams_and_reports():
    result = run("generate", "def read_csv(path):", "--temperature", "0.8", "--top-k", "40", "--seed", "7", "--max-new-tokens", "20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def read_csv(path):") and len(result.stdout) > len("def read_csv(path):") + 10
    assert "tokens/s" in result.stderr and "of what this machine reads" in result.stderr and "seed 7" in result.stderr
    assert (
        run("generate", "def read_csv(path):", "--temperature", "0.8", "--top-k", "40", "--seed", "7", "--max-new-tokens", "20").stdout
        == result.stdout
    )


def test_several_sequences():
    result = run("generate", "import os", "class A", "--temperature", "1", "--num-return-sequences", "2", "--max-new-tokens", "5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--- prompt") == 4


def test_info_names_every_backend():
    result = run("info", "--no-measure")
    assert result.returncode == 0, result.stderr
    assert "cpu: " in result.stdout and "reference: ready" in result.stdout and "cuda module: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--temperature", "-1"], "error: temperature is -1.0; it must be a finite number of at least 0"),
        (["generate", "x", "--model", "nowhere.pth"], "error: 'nowhere.pth' does not exist"),
        (["generate", ""], "error: prompt 0 is empty"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(words) and result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m engine generate 'import os' --max-new-tokens 200 --ignore-eos | head -c 5"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "error" not in result.stderr and "Traceback" not in result.stderr
