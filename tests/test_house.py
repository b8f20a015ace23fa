"""How large files and functions may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[1]
KERNELS = ("rows_triton.py", "philox_triton.py")
"""What Triton compiles takes its pointers and strides one by one."""


@cache
def trees() -> dict[Path, ast.Module]:
    """Every file of the package, parsed."""
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "swaft").rglob("*.py"))}


def length(path: Path) -> int:
    return path.read_text().count("\n")


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}: {node.name}", node


def with_many_parameters() -> list[str]:
    """Functions with 8 parameters or more, self apart."""
    found = []
    for name, node in functions():
        given = node.args
        every = [
            *given.posonlyargs,
            *given.args,
            *given.kwonlyargs,
            *filter(None, (given.vararg, given.kwarg)),
        ]
        if len([each for each in every if each.arg not in ("self", "cls")]) >= 8:
            found.append(name)
    return found


def long_functions() -> list[str]:
    return [name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= 80]


def doubled_classes() -> dict[str, list[str]]:
    where: dict[str, list[str]] = {}
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    return {name: paths for name, paths in where.items() if len(paths) > 1}


def test_no_file_is_longer_than_450_lines():
    assert not [str(path) for path in trees() if length(path) > 450]


def test_no_function_is_longer_than_80_lines_but_for_a_kernel():
    assert not [name for name in long_functions() if not any(kernel in name for kernel in KERNELS)]


def test_few_functions_take_eight_parameters_or_more():
    assert (
        len([name for name in with_many_parameters() if not any(kernel in name for kernel in KERNELS)]) <= 8
    )


def test_no_two_public_classes_have_one_name():
    assert not doubled_classes()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_shows_its_loop_in_few_lines(recipe):
    text = recipe.read_text()
    for call in ("objective(", "averager.step()", "swapped_in", "backward("):
        assert call in text, call
    assert length(recipe) <= 230
