"""How large the house is: what of it is held. `python tests/test_house.py` prints the figures."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[1]
UNCOUNTED = ("integrations/", "report/", "cli/report.py", "cli/sweep.py")
"""What came in beside the two parts."""
KERNELS = ("rows_triton.py", "philox_triton.py")
"""What Triton compiles takes its pointers and strides one by one."""


@cache
def trees() -> dict[Path, ast.Module]:
    """Every file of the package, parsed."""
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "swaft").rglob("*.py"))}


def length(path: Path) -> int:
    return path.read_text().count("\n")


def counted_lines() -> int:
    inside = {path: path.relative_to(ROOT / "swaft").as_posix() for path in trees()}
    return sum(length(path) for path, name in inside.items() if not name.startswith(UNCOUNTED))


def reached_from(script: Path) -> list[Path]:
    """Files of `swaft` that a script imports, directly or through others, inside functions as well."""
    waiting, found = [script], set()
    while waiting:
        for module in imported(waiting.pop()):
            for file in files_of(module):
                if file not in found:
                    found.add(file)
                    waiting.append(file)
    return sorted(found)


def imported(path: Path) -> Iterator[str]:
    """Dotted names of `swaft` that a file imports; those for type checkers alone are not run."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "swaft")
            if any(alias.name == "swaft" for alias in node.names) and path.parent == ROOT / "recipes":
                yield from ("swaft.averaging", "swaft.noise")  # what recipes take from the top level
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "swaft":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(module: str) -> Iterator[Path]:
    """The file of a dotted name, and those of the packages around it."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        place = ROOT.joinpath(*parts[:end])
        yield from (file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file())


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


if __name__ == "__main__":
    print(f"lines of swaft/, without {', '.join(UNCOUNTED)}: {counted_lines():,}")
    for recipe in sorted((ROOT / "recipes").glob("*.py")):
        files = reached_from(recipe)
        print(
            f"{recipe.name}: {length(recipe)} lines; reaches {len(files)} files, {sum(map(length, files)):,} lines"
        )
    print("8 parameters or more:", *with_many_parameters(), sep="\n  ")
    print("over 80 lines:", *long_functions(), sep="\n  ")
