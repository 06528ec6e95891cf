"""The template language of tasks and layouts: `str.format` fields and nothing else.

`{name}` stands for a field of the row, `{a.b}` for b inside a, `{{` and `}}` for braces.
"""

import dataclasses
import difflib
import string
from collections.abc import Mapping
from typing import Any

from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class Hole:
    """A field of a template: its name and what follows the colon, if anything does."""

    name: str
    spec: str = ""


Piece = str | Hole


def parse_template(template: str) -> tuple[Piece, ...]:
    """Literal texts and holes, in order.

    Raises: UserError for unbalanced braces, an empty name or a conversion such as `!r`.
    """
    pieces: list[Piece] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            if literal:
                pieces.append(literal)
            if name is None:
                continue
            if not name.strip() or conversion:
                raise ValueError("a field is a plain name in braces")
            pieces.append(Hole(name.strip(), spec or ""))
    except ValueError as error:
        raise UserError(
            f"the template {template!r} cannot be read: {error}; fields are written {{name}},"
            " a brace itself {{ or }}"
        ) from error
    return tuple(pieces)


def hole_names(pieces: tuple[Piece, ...]) -> list[str]:
    """The names of the holes, in order, each once."""
    return list(dict.fromkeys(piece.name for piece in pieces if isinstance(piece, Hole)))


def fill(pieces: tuple[Piece, ...], fields: Mapping[str, Any], where: str) -> str:
    """The text of a template for one row.

    Raises: UserError, with `where`, for a field that is missing or is not text, number or truth
      value.
    """
    return "".join(
        piece
        if isinstance(piece, str)
        else as_text(lookup(fields, piece.name, where), piece, where)
        for piece in pieces
    )


def lookup(fields: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a field: the key itself, or a path of keys with dots between.

    Raises: UserError that names the fields there are.
    """
    if name in fields:
        return fields[name]
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise UserError(_no_field(fields, name, where))
        value = value[key]
    return value


def as_text(value: Any, hole: Hole, where: str) -> str:
    """A field's value as text: numbers in decimal, truth values as `true` and `false`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    kind = "null" if value is None else f"a {type(value).__name__}"
    raise UserError(f"{where}: field {hole.name!r} is {kind}; a template takes text or numbers")


def _no_field(fields: Mapping[str, Any], name: str, where: str) -> str:
    known = [str(key) for key in fields]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where} has no field {name!r}, it has {', '.join(map(repr, known)) or 'none'}{hint}"
