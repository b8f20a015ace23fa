"""Builds a text classification task from the docstrings of the running interpreter's standard library.

In goes what a class, function or module says of itself, out comes the area of the library it belongs to. The
rows are the same for everyone with the same Python and need no download. Names that give the area away are
masked, which makes the task hard enough to tell a good classifier from a poor one.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from swaft.errors import DataError
from swaft.training.demo.areas import AREAS

MAX_ROWS_PER_AREA = 180
MIN_ROWS_PER_AREA = 60
MIN_WORDS = 6
MAX_WORDS = 60
MASK = "..."

# Shares of the members: 70 % train, 10 % validation, 20 % test.
SPLIT_BOUNDS = (("train", 0.7), ("validation", 0.8), ("test", 1.0))


@dataclass(frozen=True)
class Member:
    """A documented module, class or function."""

    name: str
    """Its qualified name: `email.message.Message.get`."""
    area: str
    """The area of the library it belongs to."""
    text: str
    """Its docstring on one line, masked."""

    def draw(self, purpose: str) -> float:
        """Draw a number in [0, 1) that depends on name and purpose alone, whatever the interpreter."""
        digest = hashlib.sha256(f"{purpose}:{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def docstring_splits(stdlib: Path | None = None) -> dict[str, Dataset]:
    """Build the task `python_docstrings`: columns `text`, `label` (the area) and `member`; about 2,000 rows.

    Args:
        stdlib: folder of the standard library's source; None: the running interpreter's.

    Returns:
        `train`, `validation` and `test`. A member's split depends on its name alone.

    Raises:
        DataError: the library's source is not there, or has too few docstrings.
    """
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    chosen = _choose(_distinct(_members(folder)))
    areas = sorted({member.area for member in chosen})
    if len(areas) < 2:
        raise DataError(
            f"{folder} holds too few docstrings for python_docstrings (an interpreter without its library's "
            "source?); set data.train_file or another data.task_name"
        )
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=areas), "member": Value("string")}
    )
    return {
        split: Dataset.from_list(
            [_row(member) for member in chosen if _split_of(member) == split], features=features
        )
        for split, _ in SPLIT_BOUNDS
    }


def _row(member: Member) -> dict[str, str]:
    return {"text": member.text, "label": member.area, "member": member.name}


def _split_of(member: Member) -> str:
    place = member.draw("split")
    return next(split for split, bound in SPLIT_BOUNDS if place < bound)


def _choose(members: list[Member]) -> list[Member]:
    """At most so many members of each area, areas with too few left out, in an order that mixes the areas."""
    sizes = Counter(member.area for member in members)
    taken: Counter[str] = Counter()
    chosen = []
    for member in sorted(members, key=lambda member: (member.draw("choice"), member.name)):
        if sizes[member.area] >= MIN_ROWS_PER_AREA and taken[member.area] < MAX_ROWS_PER_AREA:
            taken[member.area] += 1
            chosen.append(member)
    return chosen


def _distinct(members: Iterator[Member]) -> list[Member]:
    """One member a text; none where areas share a text, for then it has no right answer."""
    by_text: dict[str, list[Member]] = {}
    for member in members:
        by_text.setdefault(member.text.lower(), []).append(member)
    return [same[0] for same in by_text.values() if len({member.area for member in same}) == 1]


def _members(folder: Path) -> Iterator[Member]:
    """Every documented member of the areas' modules. The source is parsed, never imported."""
    for area, modules in AREAS.items():
        given_away = _given_away(modules)
        for module in modules:
            for path in sorted([folder / f"{module}.py", *(folder / module).rglob("*.py")]):
                parts = path.relative_to(folder).with_suffix("").parts
                if path.is_file() and not {"test", "tests"} & set(parts):
                    yield from _members_of(path, ".".join(parts), area, given_away)


def _members_of(path: Path, module: str, area: str, given_away: re.Pattern[str]) -> Iterator[Member]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not the user's business
        tree = ast.parse(path.read_bytes())
    for name, node in _documented(tree, module.removesuffix(".__init__")):
        text = _mask(ast.get_docstring(node) or "", name, given_away)
        if len(text.replace(MASK, "").split()) >= MIN_WORDS:
            yield Member(name, area, text)


Documentable = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: Documentable, name: str) -> Iterator[tuple[str, Documentable]]:
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")


def _mask(docstring: str, name: str, given_away: re.Pattern[str]) -> str:
    """Keep the first words of a docstring on one line, without the names that give its area away."""
    own = {part.lower() for part in name.split(".")}
    words = docstring.split()[:MAX_WORDS]
    text = re.sub(r"[\w.]*\w", lambda found: MASK if found[0].lower() in own else found[0], " ".join(words))
    return given_away.sub(MASK, text)


def _given_away(modules: tuple[str, ...]) -> re.Pattern[str]:
    """Match words that are, or hold, the name of a module; names of up to three letters only as words."""
    names = {part for module in modules for part in module.strip("_").split("_")} | {
        module.strip("_") for module in modules
    }
    long = "|".join(sorted(re.escape(name) for name in names if len(name) > 3))
    short = "|".join(sorted(re.escape(name) for name in names if len(name) <= 3))
    patterns = [rf"[\w.]*(?:{long})[\w.]*"] * bool(long) + [rf"\b(?:{short})s?\b"] * bool(short)
    return re.compile("|".join(patterns), re.IGNORECASE)
