"""Builds a text classification task from the docstrings of the running interpreter's standard library.

The input is the docstring of a class, function or module; the label is the area of the library it belongs to. The
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

MAX_ROWS_PER_AREA = 180
MIN_ROWS_PER_AREA = 60
MIN_WORDS = 6
MAX_WORDS = 60
MASK = "..."

AREAS = {
    "asyncio": "asyncio",
    "dates": "datetime _pydatetime calendar _strptime zoneinfo",
    "debugging": "ast bdb cProfile code codeop dis doctest inspect pdb profile pstats pyclbr symtable timeit "
    "tokenize trace traceback tracemalloc unittest",
    "email": "email imaplib mailbox mailcap nntplib poplib quopri smtplib",
    "files": "_compression _pyio bz2 filecmp fileinput genericpath glob gzip lzma ntpath pathlib posixpath "
    "shutil tarfile tempfile zipfile",
    "imports": "imp importlib modulefinder pkgutil runpy site zipimport",
    "logging": "logging",
    "numbers": "_pydecimal _pylong fractions numbers random statistics",
    "processes": "_threading_local concurrent multiprocessing queue signal subprocess threading",
    "text": "argparse codecs configparser csv difflib encodings gettext json locale optparse pprint re shlex "
    "string textwrap",
    "web": "cgi ftplib http ipaddress socket socketserver ssl telnetlib urllib webbrowser wsgiref",
    "xml": "html plistlib xml xmlrpc",
}
"""Area to top-level modules and whole packages; those that this Python lacks are skipped."""

# Shares of the members: 70 % train, 10 % validation, 20 % test.
SPLIT_BOUNDS = (("train", 0.7), ("validation", 0.8), ("test", 1.0))


@dataclass(frozen=True)
class Documented:
    """A documented module, class or function."""

    name: str
    """Its qualified name: `email.message.Message.get`."""
    area: str
    """Its area of the library."""
    text: str
    """Its docstring on one line, masked."""

    def draw(self, purpose: str) -> float:
        """Draw a number in [0, 1) that depends only on name and purpose, not on the interpreter."""
        digest = hashlib.sha256(f"{purpose}:{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def docstring_splits(stdlib: Path | None = None) -> dict[str, Dataset]:
    """Build the task `python_docstrings`: columns `text`, `label` (the area) and `member`; about 2,000 rows.

    Args:
        stdlib: folder of the standard library's source; None: the running interpreter's.

    Returns:
        `train`, `validation` and `test`. A member's split depends only on its name.

    Raises:
        DataError: the library's source is missing, or has too few docstrings.
    """
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    by_text: dict[str, list[Documented]] = {}
    for member in _members(folder):
        by_text.setdefault(member.text.lower(), []).append(member)
    # One member per text; none if areas share the text, because then it has no right answer.
    distinct = [same[0] for same in by_text.values() if len({member.area for member in same}) == 1]
    sizes, taken, chosen = Counter(member.area for member in distinct), Counter[str](), list[Documented]()
    for member in sorted(distinct, key=lambda member: (member.draw("choice"), member.name)):
        if sizes[member.area] >= MIN_ROWS_PER_AREA and taken[member.area] < MAX_ROWS_PER_AREA:
            taken[member.area] += 1
            chosen.append(member)
    areas = sorted({member.area for member in chosen})
    if len(areas) < 2:
        raise DataError(
            f"{folder} holds too few docstrings for python_docstrings (an interpreter without its library's "
            "source?); set data.train_file or another data.task_name"
        )
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=areas), "member": Value("string")}
    )
    rows: dict[str, list[dict[str, str]]] = {split: [] for split, _ in SPLIT_BOUNDS}
    for member in chosen:
        split = next(split for split, bound in SPLIT_BOUNDS if member.draw("split") < bound)
        rows[split].append({"text": member.text, "label": member.area, "member": member.name})
    return {split: Dataset.from_list(listed, features=features) for split, listed in rows.items()}


def _members(folder: Path) -> Iterator[Documented]:
    """Yield every documented member of the areas' modules. The source is parsed, never imported."""
    for area, listed in AREAS.items():
        modules = listed.split()
        given_away = _given_away(modules)
        for path in (path for module in modules for path in _files(folder, module)):
            with warnings.catch_warnings():
                # The user cannot do anything about invalid escapes in the library.
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
            module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            for name, node in _documented(tree, module):
                text = _mask(ast.get_docstring(node) or "", name, given_away)
                if len(text.replace(MASK, "").split()) >= MIN_WORDS:
                    yield Documented(name, area, text)


def _files(folder: Path, module: str) -> Iterator[Path]:
    """Yield the files of a module or package, except its tests."""
    for path in sorted([folder / f"{module}.py", *(folder / module).rglob("*.py")]):
        parts = path.relative_to(folder).with_suffix("").parts
        if path.is_file() and not {"test", "tests"} & {*parts}:
            yield path


Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: Node, name: str) -> Iterator[tuple[str, Node]]:
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


def _given_away(modules: list[str]) -> re.Pattern[str]:
    """Match words that are or contain the name of a module; names of up to three letters only as whole words."""
    whole = {module.strip("_") for module in modules}
    names = whole | {part for name in whole for part in name.split("_")}
    patterns = []
    if long := "|".join(sorted(re.escape(name) for name in names if len(name) > 3)):
        patterns.append(rf"[\w.]*(?:{long})[\w.]*")
    if short := "|".join(sorted(re.escape(name) for name in names if len(name) <= 3)):
        patterns.append(rf"\b(?:{short})s?\b")
    return re.compile("|".join(patterns), re.IGNORECASE)
