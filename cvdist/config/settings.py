"""What all jobs' settings have in common: a dataclass of groups, whose fields are flags with flat names.

Code reads a field below its group (`config.data.uri`), a person writes its flag (`--data`). `Flag` gives the
flag another name than the field's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from cvdist.config.bounds import Bounds, Pattern
from cvdist.errors import UserError

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Flag:
    """Names of a field's flag, with underscores for hyphens.

    Args:
        name: the flag's name.
        alias: another name that the flag may be given by; empty: none.
    """

    name: str
    alias: str = ""


@dataclass(frozen=True)
class Setting:
    """One field of one group.

    Args:
        group: name of the group in the job's settings.
        field: name of the field in the group.
        flag: the field's flat name, with underscores.
        alias: another name that the flag may be given by; empty: none.
        hint: the field's type, with its annotations.
    """

    group: str
    field: str
    flag: str
    alias: str
    hint: Any

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value but has a form with `--no-`."""
        return plain_type(self.hint) is bool

    @property
    def words(self) -> list[str]:
        """All names that a person may write on the command line for this setting, without the value."""
        names = [name for name in (self.flag, self.alias) if name]
        return [dashed(name) for name in names] + ([dashed(f"no_{self.flag}")] if self.is_switch else [])


def dashed(name: str) -> str:
    """Return a flag as it is written on the command line: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


def plain_type(hint: Any) -> Any:
    """Return a type without its annotations: `float` for `Annotated[float, ...]`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


@functools.cache
def _hints(cls: type[object]) -> dict[str, Any]:
    """Return the types of a dataclass's fields. They are strings in the source, which take time to evaluate."""
    return typing.get_type_hints(cls, include_extras=True)


def groups_of(kind: type[Any]) -> dict[str, type[Any]]:
    """Return name and class of each group of a job's settings; fields that are no groups are left out."""
    hints = _hints(kind)  # type: ignore[arg-type]  # to mypy, a class has no hash
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])}


def settings_of(kind: type[Any]) -> list[Setting]:
    """List all fields of all groups of a job's settings, in the order of their definition."""
    return [one for name, group in groups_of(kind).items() for one in fields_of(group, name)]


def fields_of(group: type[Any], name: str = "") -> list[Setting]:
    """List the fields of one group, which a job's settings call `name`."""
    hints = _hints(group)  # type: ignore[arg-type]
    found = []
    for field in dataclasses.fields(group):
        marks = [mark for mark in getattr(hints[field.name], "__metadata__", ()) if isinstance(mark, Flag)]
        mark = marks[-1] if marks else Flag(field.name)
        found.append(Setting(name, field.name, mark.name, mark.alias, hints[field.name]))
    return found


def replace(settings: Settings, **changes: Any) -> Settings:
    """Return a copy of a job's settings with fields changed by the names of their flags.

    For example `replace(config, lr=0.1, epochs=3)`.

    Raises:
        TypeError: for a name that is no flag of this job.
    """
    kind: Any = type(settings)
    changed: dict[str, dict[str, Any]] = {}
    for one in settings_of(kind):
        for name in (one.flag, one.alias):
            if name in changes:
                changed.setdefault(one.group, {})[one.field] = changes.pop(name)
    plain = {field.name for field in dataclasses.fields(kind)} - set(groups_of(kind))
    others = {name: changes.pop(name) for name in list(changes) if name in plain}
    if changes:
        raise TypeError(f"no such settings: {', '.join(changes)}")
    groups = {name: dataclasses.replace(getattr(settings, name), **mine) for name, mine in changed.items()}
    return dataclasses.replace(settings, **others, **groups)  # type: ignore[type-var]


def flat(settings: Any) -> Iterator[tuple[str, Any]]:
    """Yield each field as (`group.field`, value), in the order of their definition."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{name}", one) for name, one in vars(value).items())
        else:
            yield field.name, value


def to_dict(settings: Any) -> dict[str, Any]:
    """Return a job's settings as a plain nested dictionary, for JSON and for other processes."""
    return dataclasses.asdict(settings)


def from_dict(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Build settings of the class `kind` from the dictionary that `to_dict` made of them."""
    groups = groups_of(kind)

    def plain(group: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(one) if isinstance(one, list) else one for name, one in group.items()}  # from JSON

    return kind(**{name: groups[name](**plain(one)) if name in groups else one for name, one in values.items()})


def part_of(kind: type[Settings], whole: Any) -> Settings:
    """Return a group of the class `kind`, with its fields taken from a group that has all of them and more."""
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: getattr(whole, field.name) for field in fields})


def check_groups(settings: Any) -> None:
    """Refuse values that no job can work with; `settings` is a dataclass of groups.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    for name in groups_of(type(settings)):
        check_values(getattr(settings, name))


def check_values(group: Any) -> None:
    """Refuse values that no job can work with in one group, a dataclass of plain values.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    for one in fields_of(type(group)):
        value = getattr(group, one.field)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{dashed(one.flag)} is {value}: it takes a finite number")
        for bounds in getattr(one.hint, "__metadata__", ()):
            if isinstance(bounds, (Bounds, Pattern)) and value not in bounds:
                raise UserError(f"{dashed(one.flag)} is {value}: it takes {bounds}")
