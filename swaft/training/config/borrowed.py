"""Settings that a section takes over from the classes it describes, which declare each option once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar, Union, get_args, get_type_hints

from swaft.options import Option, docs_of, options_of
from swaft.training.config.values import TYPE_NAMES, written

SectionT = TypeVar("SectionT", bound=type)


def borrows(
    kinds: Mapping[str, type], *, after: str, but: Collection[str] = ()
) -> Callable[[SectionT], SectionT]:
    """Return a decorator that gives a section, not yet a dataclass, the options of other classes.

    They are null by default, which leaves the choice to the class. What the section declares itself is not taken
    over, nor what no setting can be (a sequence, say).

    Args:
        kinds: the classes, by what the section calls them.
        after: the setting of the section behind which theirs come.
        but: options that other sections set.
    """

    def decorate(section: SectionT) -> SectionT:
        own = list(section.__annotations__.items())
        place = [name for name, _ in own].index(after) + 1
        borrowed, section.borrowed_docs = dict[str, Any](), dict[str, str]()  # type: ignore[attr-defined]
        for name in dict.fromkeys(name for kind in kinds.values() for name in options_of(kind)):
            users = {called: kind for called, kind in kinds.items() if name in options_of(kind)}
            types = [each for kind in users.values() for each in _setting_types(kind, name)]
            if types and name not in {*dict(own), *but}:
                borrowed[name] = Union[(*types, None)]
                section.borrowed_docs[name] = _doc(name, users, len(users) < len(kinds))  # type: ignore[attr-defined]
                setattr(section, name, None)
        section.__annotations__ = dict([*own[:place], *borrowed.items(), *own[place:]])
        return section

    return decorate


def _setting_types(kind: type, name: str) -> list[Any]:
    """The types an option may have as a setting."""
    hint = get_type_hints(kind, include_extras=True)[name]
    members = get_args(hint) if len(Option.of(hint).kinds) + Option.of(hint).optional > 1 else (hint,)
    return [each for each in members if {*Option.of(each).kinds} & {*TYPE_NAMES}]


def _doc(name: str, users: Mapping[str, type], is_special: bool) -> str:
    """Say what an option is for, who has it if not all have, and what null means."""
    kind = next(iter(users.values()))
    default, doc = options_of(kind)[name].default, docs_of(kind)[name].replace("None", "null")
    remarks = [f"{', '.join(users)} only"] * is_special
    if default is MISSING:
        remarks.append("has to be given")
    elif default is not None:
        remarks.append(f"null: {written(default)}")
    return f"{doc} ({'; '.join(remarks)})" if remarks else doc
