"""Mappings to dataclasses and back: every key known, every value typed, every default written."""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from jaxprompt.schema.text import Given, KeyPath, Where, describe, dotted, plain, write_yaml
from jaxprompt.typing import UserError

T = TypeVar("T")

_VARIANTS: dict[type, tuple[str, Mapping[str, type]]] = {}


def variants(base: type, key: str, by_name: Mapping[str, type]) -> None:
    """Makes a mapping that is to become a `base` one of its subclasses, by what `key` says.

    Args:
      base: a dataclass.
      key: a field of it whose text names the subclass; its default names one as well.
      by_name: the subclasses; may grow afterwards.
    """
    _VARIANTS[base] = (key, by_name)


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: Where | str) -> T:
    """Builds a dataclass, and those nested in it, from a mapping, checking every key and value.

    Args:
      cls: a dataclass whose fields are bool, int, float, str, Literal, None, lists, tuples, dicts,
        dataclasses or unions of these.
      mapping: as `read_yaml` or `apply_overrides` gives it, or any other.
      where: named in errors.
    Raises: UserError for an unknown or missing key or a value of a wrong type.
    """
    place = Where(where) if isinstance(where, str) else where
    return _Reader(cls, place).read(mapping, cls, ())


def to_mapping(config: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars: the inverse of `from_mapping`."""
    if dataclasses.is_dataclass(config):
        fields = [field.name for field in dataclasses.fields(config) if field.init]
        return {name: to_mapping(getattr(config, name)) for name in fields}
    if isinstance(config, Mapping):
        return {str(key): to_mapping(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_mapping(value) for value in config]
    return config


def dump(config: Any) -> str:
    """The complete YAML of a dataclass, defaults included; reads back as the same values."""
    return write_yaml(to_mapping(config))


class _Reader:
    """Reads values against type hints; suggests for an unknown key from anywhere in `root`."""

    def __init__(self, root: type, where: Where):
        self.root = root
        self.where = where

    def read(self, value: Any, hint: Any, path: KeyPath) -> Any:
        origin = typing.get_origin(hint)
        if hint is Any:
            return plain(value)
        if origin in (Union, types.UnionType):
            return self._union(value, hint, path)
        if origin is Literal:
            return self._literal(value, hint, path)
        if _kind(hint) == "scalar":
            return self._scalar(value, hint, path)
        value = plain(value)
        if dataclasses.is_dataclass(hint):
            if type(value) is hint or (hint in _VARIANTS and isinstance(value, hint)):
                return value
            value = {} if value is None else value  # a section whose keys are all commented out
        if _shape(value) != _kind(hint):
            raise self._wrong_type(value, hint, path)
        if dataclasses.is_dataclass(hint):
            return self._dataclass(value, hint, path)
        if _kind(hint) == "mapping":
            return self._mapping(value, hint, path)
        return self._sequence(value, hint, path)

    def _scalar(self, value: Any, hint: Any, path: KeyPath) -> Any:
        found = plain(value)
        if hint is str and isinstance(value, Given) and not isinstance(found, str):
            return value.text
        if isinstance(found, int | float) and not isinstance(found, bool):
            if hint is float and math.isfinite(found):
                return float(found)
            if hint is int and float(found).is_integer():
                return int(found)
        elif type(found) is hint:
            return found
        elif hint is bool and isinstance(found, str) and found in _SWITCH:
            return _SWITCH[found]
        raise self._wrong_type(found, hint, path)

    def _literal(self, value: Any, hint: Any, path: KeyPath) -> Any:
        choices = typing.get_args(hint)
        for candidate in (plain(value), value.text if isinstance(value, Given) else None):
            for choice in choices:
                if type(candidate) is type(choice) and candidate == choice:
                    return choice
        near = difflib.get_close_matches(str(plain(value)), [str(choice) for choice in choices], 1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{self._wrong_type(plain(value), hint, path)}{hint_text}")

    def _union(self, value: Any, hint: Any, path: KeyPath) -> Any:
        found = plain(value)
        members = typing.get_args(hint)
        if found is None and types.NoneType in members:
            return None
        fitting = [
            member
            for member in members
            if member is not types.NoneType and _kind(member) == _shape(found)
        ]
        if len(fitting) == 1:
            return self.read(value, fitting[0], path)
        # What was typed for `float | str` is text only when no other member takes it.
        for member in sorted(fitting, key=lambda member: member is str):
            with contextlib.suppress(UserError):
                return self.read(value, member, path)
        if isinstance(value, Given) and str in members:
            return value.text
        raise self._wrong_type(found, hint, path)

    def _dataclass(self, value: Mapping[str, Any], hint: Any, path: KeyPath) -> Any:
        hint = self._variant(value, hint, path) if hint in _VARIANTS else hint
        hints = _field_hints(hint)
        for key in value:
            if key not in hints:
                raise self._unknown(str(key), hints, path)
        known = {key: self.read(item, hints[key], (*path, key)) for key, item in value.items()}
        for field in dataclasses.fields(hint):
            if field.init and field.name not in known and _required(field):
                raise UserError(
                    f"{self.where.at(path)}: {dotted((*path, field.name))!r} is missing; "
                    f"it must be {_expected(hints[field.name])}"
                )
        try:
            return hint(**known)
        except UserError as error:
            named = [key for key in value if re.search(rf"\b{re.escape(key)}\b", str(error))]
            raise UserError(f"{self.where.at((*path, *named[:1]))}: {error}") from error

    def _variant(self, value: Mapping[str, Any], hint: Any, path: KeyPath) -> type:
        key, by_name = _VARIANTS[hint]
        name = self.read(value.get(key, getattr(hint, key)), str, (*path, key))
        if name in by_name:
            return by_name[name]
        near = difflib.get_close_matches(name, by_name, 1)
        ending = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(by_name)}"
        raise UserError(
            f"{self.where.at((*path, key))}: {dotted((*path, key))} {name!r} is not known; {ending}"
        )

    def _mapping(self, value: Mapping[Any, Any], hint: Any, path: KeyPath) -> dict[Any, Any]:
        _, item_hint = typing.get_args(hint) or (str, Any)
        return {str(key): self.read(item, item_hint, (*path, key)) for key, item in value.items()}

    def _sequence(self, value: Sequence[Any], hint: Any, path: KeyPath) -> Any:
        arguments = typing.get_args(hint) or (Any, ...)
        is_tuple = (typing.get_origin(hint) or hint) is tuple
        if is_tuple and arguments[-1] is not ...:
            if len(value) != len(arguments):
                raise self._wrong_type(value, hint, path)
            hints = arguments
        else:
            hints = (arguments[0],) * len(value)
        items = [self.read(item, hints[i], (*path, i)) for i, item in enumerate(value)]
        return tuple(items) if is_tuple else items

    def _wrong_type(self, value: Any, hint: Any, path: KeyPath) -> UserError:
        return UserError(
            f"{self.where.at(path)}: {dotted(path)!r} must be {_expected(hint)}, "
            f"got {describe(value)}"
        )

    def _unknown(self, key: str, hints: Mapping[str, Any], path: KeyPath) -> UserError:
        near = [dotted((*path, name)) for name in difflib.get_close_matches(key, hints, 1)]
        if not near:
            everywhere = {dotted(known): str(known[-1]) for known in _key_paths(self.root)}
            best = difflib.get_close_matches(key, everywhere.values(), 1, 0.8)
            near = [name for name, last in everywhere.items() if last in best]
        ending = (
            f"did you mean {' or '.join(map(repr, near))}?" if near
            else f"valid here: {', '.join(hints)}"
        )  # fmt: skip
        return UserError(
            f"{self.where.at((*path, key))}: unknown key {dotted((*path, key))!r}; {ending}"
        )


@functools.cache
def _field_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _key_paths(hint: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key path of a dataclass, through those nested in it and in its unions."""
    _, by_name = _VARIANTS.get(hint, ("", {}))
    for member in (hint, *typing.get_args(hint), *by_name.values()):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            for name, below in _field_hints(member).items():
                yield (*path, name)
                yield from _key_paths(below, (*path, name))


def _kind(hint: Any) -> str:
    """Which shape of value a hint takes: "mapping", "sequence" or "scalar"."""
    origin = typing.get_origin(hint) or hint
    if not isinstance(origin, type) or origin in (str, types.NoneType):
        return "scalar"
    if dataclasses.is_dataclass(origin) or issubclass(origin, Mapping):
        return "mapping"
    return "sequence" if issubclass(origin, Sequence) else "scalar"


def _shape(value: Any) -> str:
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
        return "mapping"
    return "sequence" if isinstance(value, list | tuple) else "scalar"


_SWITCH = {"on": True, "off": False}  # words to YAML, and what people write for a truth value
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    types.NoneType: "null",
    Any: "anything",
}


def _expected(hint: Any) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if _kind(hint) == "mapping":
        return "a mapping (key: value)"
    if arguments and arguments[-1] is not ... and origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(map(_expected, arguments))
    return f"a list ([...]) of {_expected(arguments[0])}" if arguments else "a list ([...])"
