"""Which room may import which: the arrows of docs/architecture.md, kept by an AST walk over engine/ and kernels/.

Only imports that happen at run time count: those under ``if TYPE_CHECKING:`` draw no arrow.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the top down; a room (a module, or a package with all that is in it) imports rooms of its own line and below.
LAYERS = (
    ("engine.__main__", "engine.cli"),
    ("engine.server",),
    ("engine.async_decoder",),
    ("engine.step_threads",),
    ("engine.decoder",),
    ("engine.loop",),
    ("engine.choose_runner",),
    ("engine.parallel_runner",),
    (
        "engine.admission",
        "engine.decode",
        "engine.drafters",
        "engine.explain",
        "engine.graph_runner",
        "engine.pace",
        "engine.plan",
        "engine.runner",
        "engine.scheduler",
    ),
    ("engine.kv_cache", "engine.models"),
    (
        "engine.blocks",
        "engine.outputs",
        "engine.params",
        "engine.prompts",
        "engine.request",
        "engine.stats",
        "engine.tokenizer",
        "engine.verify",
    ),
    ("engine.columns", "engine.device", "engine.option_checks", "engine.parallel"),
    ("engine.kernels",),
)
# room -> packages it reaches neither itself nor through another room
NEVER = {
    **dict.fromkeys(
        (
            "engine.blocks",
            "engine.option_checks",
            "engine.outputs",
            "engine.pace",
            "engine.params",
            "engine.request",
            "engine.plan",
            "engine.scheduler",
            "engine.stats",
        ),
        ("torch",),
    ),
    "engine.kernels": ("engine",),  # but for itself
    "engine.models": ("engine.decoder", "engine.runner", "engine.scheduler"),
}


def _is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def _layer(module: str) -> int | None:
    """Its line in LAYERS; the package ``engine`` itself is part of the face."""
    if module == "engine":
        return 0
    return next((i for i, rooms in enumerate(LAYERS) if any(_is_in(module, room) for room in rooms)), None)


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _run_time_nodes(other)
        else:
            yield child
            yield from _run_time_nodes(child)


def imports(name: str, source: str, is_package: bool, known: set[str]) -> set[str]:
    """Full names of the modules that ``source``, the text of module ``name``, imports anywhere. ``known`` tells submodules from names."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found: set[str] = set()
    for node in _run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return found


def violations(modules: dict[str, tuple[str, bool]]) -> list[str]:
    """One sentence per forbidden import; ``modules`` maps a full name to its source and whether it is a package."""
    known = set(modules)
    graph = {name: imports(name, source, is_package, known) for name, (source, is_package) in modules.items()}
    sentences = []
    for name, direct in graph.items():
        layer = _layer(name)
        if layer is None:
            sentences.append(f"{name} is in no room: add it to LAYERS")
            continue
        for target in direct:
            target_layer = _layer(target) if _is_in(target, "engine") else None
            if target_layer is not None and target_layer < layer:
                sentences.append(f"{name} imports {target}, which is above it")
        forbidden = [package for room, packages in NEVER.items() if _is_in(name, room) for package in packages]
        reached, frontier = {name}, [name]
        while frontier and forbidden:
            at = frontier.pop()
            for target in graph.get(at, set()):
                own = _is_in(target, "engine.kernels") and _is_in(name, "engine.kernels")
                sentences += [f"{name} reaches {target} (through {at})" for bad in forbidden if _is_in(target, bad) and not own]
                if target not in reached:
                    reached.add(target)
                    frontier.append(target)
    return sorted(set(sentences))


def _tree() -> dict[str, tuple[str, bool]]:
    found = {}
    for folder, package in (("engine", "engine"), ("kernels", "engine.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            found[".".join(parts[:-1] if is_package else parts)] = (path.read_text(), is_package)
    return found


def test_arrows_point_down() -> None:
    tree = _tree()
    assert len(tree) > 10
    assert not violations(tree), "\n".join(violations(tree))


def test_engine_holds_no_kernels_folder() -> None:
    assert not (ROOT / "engine" / "kernels").exists(), "kernels/ is mapped to engine.kernels by setup.py; a real folder would hide it"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("engine.kernels.bad", "from engine.params import SamplingParams"),
        ("engine.kernels.bad", "from ..params import SamplingParams"),
        ("engine.kernels.bad", "import engine.blocks"),
        ("engine.request", "import torch"),
        ("engine.plan", "def f():\n    from torch import Tensor"),
        ("engine.scheduler", "from .kv_cache import KVCache"),
        ("engine.scheduler", "from engine import kv_cache"),
        ("engine.models.bad", "from ..decoder import Decoder"),
        ("engine.models.bad", "from engine.runner import Runner"),
        ("engine.kv_cache", "from . import decoder"),
        ("engine.decode.sample", "from ..decoder import Decoder"),
        ("engine.decoder", "from .cli import main"),
        ("engine.new_room", ""),
    ],
)
def test_a_planted_wrong_import_is_found(name: str, line: str) -> None:
    planted = {**{room: ("", False) for room in ("engine.params", "engine.blocks", "engine.decoder", "engine.cli", "engine.runner")}}
    planted |= {"engine": ("", True), "engine.kv_cache": ("import torch", False), name: (line, False)}
    assert violations(planted)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("engine.kernels.good", "import torch\nfrom . import reference\nfrom engine.kernels import api"),
        ("engine.scheduler", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("engine.decoder", "from .runner import Runner\nfrom . import kv_cache\nfrom engine.kernels import api"),
        ("engine.cli", "from .decoder import Decoder"),
    ],
)
def test_a_right_import_is_let_be(name: str, line: str) -> None:
    planted = {"engine": ("from .decoder import Decoder", True), "engine.runner": ("", False), "engine.kv_cache": ("import torch", False)}
    assert not violations({**planted, name: (line, False)})
