"""Imports run one way: no module of either package imports, directly or not, one that imports it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"flashvlm": ROOT / "runtime", "flashvlm_export": ROOT / "export"}
HEAVY = ("torch", "transformers", "onnx_ir", "onnxscript", "safetensors", "flashvlm_export")


def modules() -> dict[str, Path]:
    """Both packages' modules by name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path], everywhere: bool) -> set[str]:
    """What a module imports when it is loaded; ``everywhere``: in its functions as well. Imports for types are none."""
    found: set[str] = set()
    pending: list[ast.AST] = [*ast.parse(path.read_text(encoding="utf-8")).body]
    while pending:
        node = pending.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pending += node.orelse
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module)):
                names = {f"{module}.{alias.name}" for alias in node.names}
                found |= {name if name in known else module for name in names}
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not everywhere:
                pass
            case _:
                pending += ast.iter_child_nodes(node)
    return found


def test_no_circles() -> None:
    known = modules()
    graph = {name: imported(path, known, False) & known.keys() - {name} for name, path in known.items()}
    try:
        order = [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert len(order) == len(known)


def test_the_runtime_imports_nothing_of_the_exporter() -> None:
    known = modules()
    for name, path in known.items():
        if name.partition(".")[0] == "flashvlm" and name != "flashvlm.cli.entry":  # which names modules as text
            heavy = [each for each in imported(path, known, True) if each.split(".")[0] in HEAVY]
            assert not heavy, f"{name} imports {heavy[0]}"


def test_no_file_is_long() -> None:
    for path in [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
