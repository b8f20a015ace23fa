"""Converts a value from YAML or the command line to the type of its setting, or says why it cannot.

OmegaConf's structured configurations would treat 1 and 1.0 as the same start, and an unquoted no as False.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, TypeVar, Union, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swaft.errors import ConfigError
from swaft.options import Option, docs_of, options_of, suggestion

SectionT = TypeVar("SectionT", bound=type)

Users = Mapping[str, Mapping[str, Collection[str]]]
"""Which values of a section's choice use its other settings. Maps a setting and a value of the choice to the texts
that the setting may then have (R-Drop has presets of its own); if none are listed, to any value."""

NULL_TEXTS = ("null", "None")
DELIMITERS = {"tab": "\t", "\\t": "\t"}
"""Names that `data.delimiter` accepts for a character that is hard to type."""
TYPE_NAMES = {bool: "true|false", int: "int", float: "float", str: "text", dict: "mapping"}
"""The types of settings, as written in help and messages."""


def sections(config_class: type) -> dict[str, type]:
    """List the sections of a configuration class: field name to the section's dataclass."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields(config_class)}


def settings(config_class: type) -> dict[str, Option]:
    """All settings of a configuration class, in order, by full name: section and name."""
    return {
        f"{section}.{name}": option
        for section, kind in sections(config_class).items()
        for name, option in options_of(kind).items()
    }


def type_name(option: Option) -> str:
    """The type of a setting as written in help and messages: `float`, `int or float`, `a|b|c`."""
    names = [name for kind, name in TYPE_NAMES.items() if kind in option.kinds]
    if option.choices:
        names = ["|".join(option.choices)]
    return " or ".join([*names, "null"] if option.optional else names)


def written(value: Any) -> str:
    """A value as YAML would write it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_scalar(text: str) -> Any:
    """Read a text as a YAML file would (`1e-5` is a number); return the text itself if it is not YAML."""
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        return text
    return value["value"]  # type: ignore[index, call-overload]


def coerce(value: Any, option: Option) -> Any:
    """Convert a value to the type of its setting.

    Text is kept for a text setting and parsed as YAML for any other, so that the command line (all text)
    and files agree, and a whole number stays distinct from a fraction (`1` from `1.0`).

    Args:
        value: the value read from YAML, or the text after `=` on the command line.
        option: the setting.

    Raises:
        ValueError: with a message that follows the setting's name: "expected float, got the text 'x'".
    """
    null = value is None or (value in NULL_TEXTS and str(value).lower() not in option.choices)
    if option.optional and null:
        return None
    is_text, advice = {*option.kinds} == {str}, ""
    if is_text and value is False:
        # YAML 1.1 reads an unquoted no or off as false: if "no" or "none" is a choice, that is what was meant.
        meant = {*option.choices, option.default}
        value = next((word for word in ("no", "none") if word in meant), value)
    elif isinstance(value, str) and not is_text:
        value = parse_scalar(value)
    is_other = type(value) not in option.kinds and not isinstance(value, bool)
    if is_other and isinstance(value, int | float):
        if float in option.kinds:
            value = float(value)
        # 1e3 is shorthand for a whole number; 2.5 rows make no sense.
        elif int in option.kinds and math.isfinite(value) and value == int(value):
            value = int(value)
    if type(value) not in option.kinds:
        if is_text and isinstance(value, bool):
            advice = " (unquoted yes, no, on and off are true and false in YAML; put text in quotes)"
        elif is_text and isinstance(value, list):
            advice = "; write names in one text, with commas between them"
        elif is_text and value is not None:
            advice = "; put text in quotes"
        raise ValueError(f"expected {type_name(option)}, got {_named(value)}{advice}")
    if fault := option.fault(value):
        raise ValueError(fault)
    return value


def split_words(line: Sequence[str]) -> Iterator[tuple[list[str], str, str | None]]:
    """Yield the words of a line one by one, or two that give a setting; the setting's name; and its value, if any.

    The forms are `a.b=c`, `--a.b=c` and `--a.b c`.
    """
    words = list(line)
    while words:
        given = [words.pop(0)]
        name, equals, text = given[0].removeprefix("--").partition("=")
        if not equals and given[0].startswith("--") and words and not words[0].startswith("--"):
            text = words.pop(0)
            given.append(text)
        yield given, name, text if equals or given[1:] else None


def split_names(text: str) -> list[str]:
    """Split the text of a setting that holds several names: `de, fr` into `de` and `fr`."""
    return [name.strip() for name in text.split(",")]


def literal_breaks(section: Any, *names: str) -> Iterator[tuple[str, str]]:
    r"""Yield texts with a backslash and an n, which is what a shell and unquoted YAML make of \n."""
    for name in names:
        if r"\n" in getattr(section, name):
            found = f"{getattr(section, name)!r} has a backslash and an n, not a line break"
            yield name, f"{found}; write \\n in double quotes in YAML, or $'\\n' in a shell"


def not_allowed(value: str, choices: Sequence[str]) -> str:
    """Say that a value is not one of the choices, and which one was probably meant."""
    return f"'{value}' is not one of {', '.join(choices)}.{suggestion(value, choices)}"


def borrows(
    kinds: Mapping[str, type], *, after: str, but: Collection[str] = ()
) -> Callable[[SectionT], SectionT]:
    """Return a decorator that gives a section, not yet a dataclass, the options of the classes it describes.

    They are null by default, which leaves the choice to the class. Options that the section declares itself are
    not added, and neither are types that no setting can have (a sequence, say). The section's ``users`` records
    which classes have each option, with the texts that each accepts.

    Args:
        kinds: the classes, by their name in the section.
        after: the section's setting after which the borrowed ones are inserted.
        but: options that other sections set.
    """

    def decorate(section: SectionT) -> SectionT:
        own = list(section.__annotations__.items())
        place = [name for name, _ in own].index(after) + 1
        borrowed, docs = dict[str, Any](), dict[str, str]()
        all_users = dict[str, Mapping[str, Collection[str]]]()
        for name in dict.fromkeys(name for kind in kinds.values() for name in options_of(kind)):
            users = {called: kind for called, kind in kinds.items() if name in options_of(kind)}
            all_users[name] = {called: options_of(kind)[name].choices for called, kind in users.items()}
            types = [each for kind in users.values() for each in _setting_types(kind, name)]
            if types and name not in {*dict(own), *but}:
                borrowed[name] = Union[(*types, None)]
                docs[name] = _borrowed_doc(name, users, is_special=len(users) < len(kinds))
                setattr(section, name, None)
        section.__annotations__ = dict([*own[:place], *borrowed.items(), *own[place:]])
        section.borrowed_docs = docs  # type: ignore[attr-defined]
        known = {**section.users, **all_users}  # type: ignore[attr-defined]
        section.users = {name: users for name, users in known.items() if name in section.__annotations__}  # type: ignore[attr-defined]
        return section

    return decorate


def chosen_options(section: Any, kind: type | None) -> dict[str, Any]:
    """Return the options that a section with `borrows` sets for the class it chooses.

    Args:
        section: an instance; null leaves the choice to the class.
        kind: the class; None: no class is chosen, so no borrowed option may be set.

    Raises:
        ConfigError: options are set that clash or that the class would not use, or one that it needs is missing.
    """
    options = {name: value for name in section.borrowed_docs if (value := getattr(section, name)) is not None}
    prefix, _, leaf = section.choice.partition(".")
    problems = [f"{prefix}.{name}: {fault}" for name, fault in section.conflicts()]
    needed = {} if kind is None else options_of(kind)
    problems += [
        f"{prefix}.{name} is null, which {section.choice}={getattr(section, leaf)} needs; set it"
        for name, option in needed.items()
        if option.required and name in section.borrowed_docs and name not in options
    ]
    if problems:
        raise ConfigError(problems)
    return options


@contextmanager
def settings_of(section: str) -> Iterator[None]:
    """Put the name of a section before the problems of a rule or objective, whose arguments are its settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"section {section}: {problem}" for problem in error.problems]) from error


def _setting_types(kind: type, name: str) -> list[Any]:
    """The types an option may have as a setting."""
    hint = get_type_hints(kind, include_extras=True)[name]
    members = get_args(hint) if len(Option.of(hint).kinds) + Option.of(hint).optional > 1 else (hint,)
    return [each for each in members if {*Option.of(each).kinds} & {*TYPE_NAMES}]


def _borrowed_doc(name: str, users: Mapping[str, type], *, is_special: bool) -> str:
    """Describe an option: its doc, which classes have it if not all do, and what null means."""
    kind = next(iter(users.values()))
    default, doc = options_of(kind)[name].default, docs_of(kind)[name].replace("None", "null")
    remarks = [f"{', '.join(users)} only"] if is_special else []
    if default is MISSING:
        remarks.append("required")
    elif default is not None:
        remarks.append(f"null: {written(default)}")
    return f"{doc} ({'; '.join(remarks)})" if remarks else doc


def _named(value: Any) -> str:
    """Describe a value with its kind, for a message: "the number 2.5"."""
    kinds = {int: "the number", float: "the number", str: "the text", list: "the list", dict: "the mapping"}
    if value is None or isinstance(value, bool):
        return written(value)
    return f"{kinds.get(type(value), 'the value')} {value!r}"
