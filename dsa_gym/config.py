"""Configuration files: YAML to nested, frozen dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def read_config(path: Path, kind: type[T]) -> T:
    """Read a YAML file into a dataclass.

    Raises:
        ValueError: If the file is missing or no YAML mapping, or holds a key or value that ``kind`` does not take.
    """
    return from_mapping(kind, read_mapping(path), where=str(path))


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Read a YAML file as a mapping of settings.

    Raises:
        ValueError: If the file is missing or no YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config={str(path)!r}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML ({error})") from error
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings ``values`` over ``defaults``, nested mappings merged key by key."""
    merged = dict(defaults)
    for name, value in values.items():
        below = merged.get(name)
        merged[name] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def from_mapping(kind: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """Build a dataclass from a mapping, nested dataclasses from nested mappings.

    Raises:
        ValueError: Naming the key that is unknown or whose value is of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - fields, key=str)
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; expected one of {', '.join(sorted(fields))}")
    arguments = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    required = {
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(arguments))
    if missing:
        raise ValueError(f"{where}: setting {missing[0]!r} is missing")
    return kind(**arguments)


def parse_value(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, the value as YAML.

    Raises:
        ValueError: If it is not of that form.
    """
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"{text!r}: expected NAME=VALUE")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r}: the value is not readable as YAML") from error
    return name, float(parsed) if isinstance(parsed, str) and _is_number(parsed) else parsed


def parse_setting(text: str, defaults: Mapping[str, Any]) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, the value as YAML of the type of the default of that name.

    Raises:
        ValueError: If it is not of that form, the name is unknown or the value is of another type.
    """
    name, value = parse_value(text)
    if name not in defaults:
        raise ValueError(f"unknown setting {name!r}; expected one of {', '.join(sorted(defaults)) or 'none'}")
    return name, _convert(type(defaults[name]), value, name)


def _is_number(value: Any) -> bool:
    """Whether a value is meant as a number; YAML 1.1 takes ``1e-3``, without a dot, for a string."""
    if isinstance(value, str):
        return re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is Any:
            return value
        origin = typing.get_origin(option) or option
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_mapping(typing.cast(Any, option), value, where=where)
        if origin is tuple and isinstance(value, list | tuple):
            kind = (typing.get_args(option) or (Any,))[0]  # tuple[X, ...]
            return tuple(_convert(kind, item, f"{where}[{i}]") for i, item in enumerate(value))
        if origin is Mapping and isinstance(value, Mapping):
            kind = (typing.get_args(option) or (Any, Any))[1]
            return {str(key): _convert(kind, item, f"{where}: {key}") for key, item in value.items()}
        if origin is float and _is_number(value):
            return float(value)
        if origin is int and isinstance(value, bool):
            continue
        if origin is typing.Literal and value in typing.get_args(option):
            return value
        if isinstance(origin, type) and isinstance(value, origin):
            return value
    raise ValueError(f"{where}={value!r}: expected {hint if not isinstance(hint, type) else hint.__name__}")
