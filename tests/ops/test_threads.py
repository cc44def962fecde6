"""The C++ thread pool: called from several Python threads, after a fork, resized, idle; and its size from the environment."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(autouse=True)
def pool_as_before() -> Iterator[None]:
    before = cpu._cpu.num_threads()
    yield
    cpu._cpu.set_num_threads(before)


def case(seed: int) -> tuple[Tensor, list[Tensor]]:
    """Large enough to be shared out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 512, generator=generator), [torch.randn(700, 512, generator=generator)]


def run_python(code: str) -> str:
    """Standard output of a Python process; fails with its errors, or when it hangs."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_set_num_threads() -> None:
    x, w = case(0)
    expected = cpu.linear(x, w)
    for n in (1, 3, 2, 8, 1, 4):
        cpu._cpu.set_num_threads(n)
        assert cpu._cpu.num_threads() == n
        for _ in range(20):
            assert torch.equal(cpu.linear(x, w), expected)
    for n in (0, -1, 5000):
        with pytest.raises(ValueError, match="n is"):
            cpu._cpu.set_num_threads(n)


def test_several_python_threads_at_once() -> None:
    cpu._cpu.set_num_threads(3)
    cases = [case(seed) for seed in range(4)]
    expected = [cpu.linear(*c) for c in cases]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(150):
            if not torch.equal(cpu.linear(*cases[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for n in (1, 4, 2, 3):  # resizing waits for its turn
        cpu._cpu.set_num_threads(n)
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong


def test_wakes_after_sleeping() -> None:
    """Idle workers stop spinning; a later call finds them asleep, at every stage of falling asleep."""
    cpu._cpu.set_num_threads(4)
    x, w = case(1)
    expected = cpu.linear(x, w)
    for i in range(200):
        time.sleep(i % 20 * 2e-5)
        assert torch.equal(cpu.linear(x, w), expected)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # asleep, not spinning


def test_after_fork() -> None:
    """The child has none of the parent's workers; parent and child both go on, also when other threads compute during the fork."""
    code = """
import os, threading, warnings
import torch
from engine.kernels import cpu
warnings.simplefilter("ignore")
torch.set_num_threads(1)
cpu._cpu.set_num_threads(3)
x, w = torch.randn(5, 512), [torch.randn(700, 512)]
expected = cpu.linear(x, w)
stop = False
def busy():
    while not stop:
        cpu.linear(x, w)
other = threading.Thread(target=busy)
other.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        same = all(torch.equal(cpu.linear(x, w), expected) for _ in range(5))
        cpu._cpu.set_num_threads(2)
        os._exit(0 if same and torch.equal(cpu.linear(x, w), expected) else 1)
    assert torch.equal(cpu.linear(x, w), expected)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
print("fine")
"""
    assert run_python(code) == "fine"


def test_size_from_the_environment() -> None:
    """One process, whose children set the environment before the pool exists; at last it starts workers itself and must exit with them."""
    code = """
import os
import torch
from engine.kernels import cpu
cpus = os.sched_getaffinity(0)
def child(number, affinity=cpus):
    process = os.fork()
    if process == 0:
        os.environ["ENGINE_NUM_THREADS"] = number
        os.sched_setaffinity(0, affinity)
        os._exit(cpu._cpu.num_threads())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(child("3"), 1 <= child("") == child("junk") == child("-2") <= len(cpus), child("", {min(cpus)}))
cpu._cpu.set_num_threads(4)
cpu.linear(torch.ones(4, 512), [torch.ones(900, 512)])
"""
    assert run_python(code) == "3 True 1"
