"""Converts frozen dataclasses to JSON and back. Values that are read are checked against the annotations."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints


def json_text(data: Any, indent: int | None) -> str:
    """Returns data as JSON text in which letters outside ASCII are not escaped.

    They are escaped only if a path in the data holds bytes that are not UTF-8. Raises ValueError for NaN and
    infinity.
    """
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent, allow_nan=False)
    return text


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """Returns a parsed JSON value as an instance of `kind`.

    A kind is a dataclass, tuple[X, ...], Mapping[str, X], X | None, an Enum of strings, a plain type, or Any.
    `where` is the place of the value in the file (`stages.0.file`), for error texts.

    Raises ValueError with the place of a value that is missing, unknown or of another type. Errors that a
    dataclass's own checks raise are passed on.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        return dataclass_from_json(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        plain = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else from_json(plain, value, where)
    if origin is tuple:
        items = expect(list, value, where)
        return tuple(from_json(arguments[0], item, inside(where, i)) for i, item in enumerate(items))
    if origin is Mapping:
        items = expect(dict, value, where)
        return {key: from_json(arguments[1], item, inside(where, key)) for key, item in items.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.value for member in kind]
        if value not in names:
            raise ValueError(f"{where or 'it'} is {value!r}, and must be one of {', '.join(names)}")
        return kind(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")
    return expect(kind, value, where)


def dataclass_from_json(kind: Any, value: Any, where: str) -> Any:
    """Returns a parsed JSON object as an instance of a dataclass. Raises ValueError as from_json does."""
    given = expect(dict, value, where)
    known = {field.name: field for field in fields(kind)}
    for name in given:
        if name not in known:
            raise ValueError(f"{inside(where, name)} is unknown")
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{inside(where, name)} is missing")
    kinds = get_type_hints(kind)
    return kind(**{name: from_json(kinds[name], item, inside(where, name)) for name, item in given.items()})


def expect(kind: type, value: Any, where: str) -> Any:
    """Returns the value if its type is exactly `kind`; raises ValueError otherwise."""
    if type(value) is not kind:  # isinstance would let True pass as an int, for example as a number of pixels
        raise ValueError(f"{where or 'it'} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def inside(where: str, name: object) -> str:
    """Returns the place of the field or item `name` of the value at `where`."""
    return f"{where}.{name}" if where else str(name)
