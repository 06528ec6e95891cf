"""YAML files and `key.sub=value` strings to plain mappings that know where each key was written."""

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxprompt.typing import UserError

KeyPath = tuple[str | int, ...]

# The scalars of YAML 1.2: 1e-3 is a number, and yes, no, on, off are words (they are labels here).
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
}


class _Loader(yaml.SafeLoader):
    """Reads scalars by YAML 1.2."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML version would not read back as text."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Text; escaped where PyYAML would write a line break of Unicode's and lose it on reading."""
    style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _firsts = ["" if letter == "\0" else letter for letter in _first]
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _firsts
        )


@dataclasses.dataclass(frozen=True)
class Where:
    """Where the values of a mapping were written, to be named in errors.

    Attributes:
      source: the file, or what else the mapping is.
      places: key path to "file:line" or to the override that set it.
    """

    source: str
    places: Mapping[KeyPath, str] = dataclasses.field(default_factory=dict)

    def at(self, path: KeyPath) -> str:
        """The place of a key, or of the nearest key around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.source)


@dataclasses.dataclass(frozen=True)
class Given:
    """A value of the command line: what YAML makes of it, and its text for keys that want text."""

    value: Any
    text: str


def configs_directory() -> Path:
    """Where the configs that ship are: inside the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Where]:
    """Reads a YAML file that holds one mapping; keys are always text.

    Returns: the mapping, and where each of its keys stands.
    Raises: UserError if the file is missing, not YAML, not a mapping, or gives a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    places: dict[KeyPath, str] = {}
    value = _parse(text, str(path), places)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold `key: value` lines, not {describe(value)}")
    return value, Where(str(path), places)


def read_extended(
    path: Path, find: Callable[[str], Path], above: Sequence[Path] = ()
) -> tuple[dict[str, Any], Where]:
    """Reads a YAML file; `extends: NAME` puts it over another one, see `overlay`.

    Args:
      find: the file of a name that is no path beside this one.
      above: files that extend this one.
    Returns and raises: as `read_yaml`, for all of them, and for files that extend one another.
    """
    mapping, where = read_yaml(path)
    if "extends" not in mapping:
        return mapping, where
    name, place = mapping.pop("extends"), where.at(("extends",))
    if not isinstance(name, str):
        raise UserError(f"{place}: extends must be a config's name or path, got {describe(name)}")
    beside, above = path.parent / name, (*above, path.resolve())
    try:
        below = beside if beside.is_file() else find(name)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    if below.resolve() in above:
        raise UserError(f"{place}: {name} extends this config itself")
    return overlay(*read_extended(below, find, above), mapping, where)


def apply_overrides(
    mapping: Mapping[str, Any], where: Where, overrides: Sequence[str]
) -> tuple[dict[str, Any], Where]:
    """Sets `key.sub=value` strings on top of a mapping; values are read as YAML.

    A number in the path indexes a list. A key that wants text takes the value as it was typed.

    Returns: a new mapping and its `Where`; the ones given stay as they are.
    Raises: UserError for a string that is not key=value, or a path through a value without keys.
    """
    settings = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise UserError(f"override {override!r} is not of the form key.sub=value")
        place = f"override {override!r}"
        try:
            value = _parse(text, place, {})
        except UserError:
            value = text
        settings.append((name.strip(), Given(value, text), place))
    return set_values(mapping, where, settings)


def set_values(
    mapping: Mapping[str, Any], where: Where, settings: Sequence[tuple[str, Any, str]]
) -> tuple[dict[str, Any], Where]:
    """Sets values on top of a mapping: (key.sub, value, where that was written).

    Returns and raises: as `apply_overrides`.
    """
    result, places = _copy(mapping), dict(where.places)
    for name, value, place in settings:
        path = _set(result, name.split("."), value, place)
        for known in [key for key in places if key[: len(path)] == path]:
            del places[known]
        for depth in range(1, len(path) + 1):
            places.setdefault(path[:depth], place)
    return result, Where(where.source, places)


def overlay(
    below: Mapping[str, Any], below_where: Where, above: Mapping[str, Any], above_where: Where
) -> tuple[dict[str, Any], Where]:
    """Two mappings in one: joined key by key at every depth, and above all else what is `above`.

    Lists are not joined: a list above is the whole list.

    Returns: a new mapping and its `Where`; what it lacks is said of the source of `above`.
    """
    result, places = _copy(below), dict(below_where.places)

    def put(container: dict[str, Any], values: Mapping[str, Any], path: KeyPath) -> None:
        for key, value in values.items():
            here = (*path, key)
            if isinstance(value, Mapping) and isinstance(container.get(key), dict):
                put(container[key], value, here)
                continue
            container[key] = _copy(value)
            for known in [known for known in places if known[: len(here)] == here]:
                del places[known]

    put(result, above, ())
    return result, Where(above_where.source, {**places, **above_where.places})


def leaves(
    options: Mapping[str, Any], dotted: tuple[str, ...] = (), path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(dotted key, value, path) of what nested mappings hold; keys may hold dots themselves."""
    for key, value in options.items():
        plainly = plain(value)
        here, there = (*dotted, str(key)), (*path, str(key))
        if isinstance(plainly, Mapping) and plainly:
            yield from leaves(plainly, here, there)
        else:
            yield ".".join(here), value, there


def write_yaml(value: Any) -> str:
    """The YAML of nested dicts, lists and scalars; `read_yaml` gives the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def plain(value: Any) -> Any:
    """A value of an overridden mapping without the memory of how it was typed."""
    return value.value if isinstance(value, Given) else value


def dotted(path: KeyPath) -> str:
    """A key path as a user writes it."""
    return ".".join(map(str, path)) or "the whole"


def describe(value: Any) -> str:
    """What a value is, for "got ..." in an error."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, value))}" if value else "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"the text {value!r}" if isinstance(value, str) else str(value)


def _parse(text: str, source: str, places: dict[KeyPath, str]) -> Any:
    """The value of a YAML text; fills `places` with the line of every key and list item."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, (), source, places)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML ({str(error).splitlines()[0]})") from error


def _construct(
    loader: _Loader, node: yaml.Node, path: KeyPath, source: str, places: dict[KeyPath, str]
) -> Any:
    if isinstance(node, yaml.MappingNode):
        result = {}
        for key_node, value_node in node.value:
            key = key_node.value
            place = f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise UserError(f"{place}: a key must be a word, not a list or a mapping")
            if key in result:
                raise UserError(f"{place}: key {dotted((*path, key))!r} is given twice")
            places[(*path, key)] = place
            result[key] = _construct(loader, value_node, (*path, key), source, places)
        return result
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            places[(*path, i)] = f"{source}:{item.start_mark.line + 1}"
            items.append(_construct(loader, item, (*path, i), source, places))
        return items
    return loader.construct_object(node)


def _set(
    container: Any, names: Sequence[str], value: Any, place: str, path: KeyPath = ()
) -> KeyPath:
    """Sets a value deep in nested dicts and lists, making the dicts that are not there yet.

    Args:
      container: what `path` leads to; `names` go on from there.
    Returns: the whole path, its list positions as integers.
    """
    key: Any = names[0]
    if isinstance(container, list):
        if not key.isdecimal() or int(key) >= len(container):
            raise UserError(
                f"{place}: {dotted(path)!r} is a list of {len(container)}, "
                f"so {key!r} must be a number below that"
            )
        key = int(key)
    elif not isinstance(container, dict):
        raise UserError(f"{place}: {dotted(path)!r} is {describe(container)}, not a mapping")
    path = (*path, key)
    if len(names) == 1:
        container[key] = value
        return path
    below = plain(container[key] if isinstance(container, list) else container.get(key))
    container[key] = {} if below is None else below
    return _set(container[key], names[1:], value, place, path)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value
