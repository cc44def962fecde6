"""The C++ thread pool: called from several Python threads, after a fork, resized, idle; and its size from the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import engine
from engine import kernels
from engine.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(autouse=True)
def pool_as_before() -> Iterator[None]:
    before, pinned = engine.get_num_threads(), kernels.threads_pinned()
    yield
    engine.set_num_threads(before, pin=pinned)


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
    for n in (1, 3, 2, 16, 1, 64, 4):
        engine.set_num_threads(n)
        assert engine.get_num_threads() == n
        for _ in range(20):
            assert torch.equal(cpu.linear(x, w), expected)
    for n in (0, -1, 1025):
        with pytest.raises(ValueError, match=f"n is {n}; it must be a whole number from 1 to 1024"):
            engine.set_num_threads(n)
    for wrong in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match="n is .*; it must be a whole number from 1 to 1024"):
            engine.set_num_threads(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pin is 1; it must be True, False or None"):
        engine.set_num_threads(2, pin=1)  # type: ignore[arg-type]
    assert engine.get_num_threads() == 4


def affinities() -> list[set[int]]:
    """The CPUs that each thread of this process may run on."""
    return [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin threads")
def test_pinned() -> None:
    """Helper i runs on the i-th CPU allowed and the caller anywhere; nothing else changes, and it can be undone."""
    x, w = case(2)
    expected = cpu.linear(x, w)
    cpus = sorted(os.sched_getaffinity(0))
    engine.set_num_threads(1, pin=False)
    assert torch.equal(cpu.linear(x, w), expected)
    others = sorted(map(sorted, affinities()))  # PyTorch's and this one
    for pin, n in ((True, 4), (True, 3), (False, 3), (True, 3)):
        engine.set_num_threads(n, pin=pin)
        engine.set_num_threads(n)
        assert kernels.threads_pinned() == pin
        for _ in range(10):
            assert torch.equal(cpu.linear(x, w), expected)
        helpers = [[cpus[i % len(cpus)]] if pin else cpus for i in range(1, n)]
        assert sorted(map(sorted, affinities())) == sorted(others + helpers)
    assert sorted(os.sched_getaffinity(0)) == cpus


def test_several_python_threads_at_once() -> None:
    engine.set_num_threads(3)
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
        engine.set_num_threads(n)
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong


def test_wakes_after_sleeping() -> None:
    """Idle workers stop spinning; a later call finds them asleep, at every stage of falling asleep."""
    engine.set_num_threads(4)
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
import engine
from engine import kernels
from engine.kernels import cpu
cpus = os.sched_getaffinity(0)
def child(number, affinity=cpus):
    process = os.fork()
    if process == 0:
        os.environ["ENGINE_NUM_THREADS"] = number
        os.sched_setaffinity(0, affinity)
        os._exit(engine.get_num_threads())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(child("3"), 1 <= child("") <= len(cpus), child("", {min(cpus)}), kernels.threads_pinned())
engine.set_num_threads(4)
cpu.linear(torch.ones(4, 512), [torch.ones(900, 512)])
"""
    assert run_python(code) == "3 True 1 False"


def test_bad_environment() -> None:
    """One sentence, where a decoder or a kernel is asked for; an op that was called first says the same and can be called again."""
    code = """
import os
import torch
import engine
from engine import kernels
from engine.kernels import cpu
def said(act):
    try:
        return act() or "nothing"
    except ValueError as error:
        return str(error)
def product():
    cpu.linear(torch.ones(4, 512), [torch.ones(900, 512)])
for name, number in [*(("NUM", n) for n in ("x", "0", "-2", "2.5", "1025", "9" * 30)), ("PIN", "2"), ("PIN", "yes")]:
    process = os.fork()
    if process == 0:
        os.environ[f"ENGINE_{name}_THREADS"] = number
        limits = "1 to 1024" if name == "NUM" else "0 to 1"
        sentence = f"ENGINE_{name}_THREADS is '{number}'; it must be a whole number from {limits}"
        asked = engine.get_num_threads if name == "NUM" else kernels.threads_pinned
        acts = [product, lambda: kernels.select("cpu"), lambda: kernels.select("cpu", "cpu"), asked]
        os._exit(0 if [said(act) for act in acts] == [sentence] * 4 else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), end="")
os.environ["ENGINE_PIN_THREADS"], os.environ["ENGINE_NUM_THREADS"] = "1", "2"
print("", kernels.threads_pinned(), cpu.describe().split(";")[0])
"""
    assert run_python(code) == "00000000 True 2 threads, pinned"
