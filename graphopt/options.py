"""Options of passes and backends: the fields of a frozen dataclass, written as text, TOML or Python alike."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graphopt.errors import UsageError, did_you_mean

T = TypeVar("T")

LIST_SEPARATOR = "+"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class FunctionText(str):
    """A function that Python gave for an option, as the text that names it: ``package.module:function``.

    That of a script is ``script.py:function``. What no text leads to, such as a lambda, has one for people.

    Args:
        function: The function, or anything that can be called.

    Attributes:
        function: The function.
        is_found: Whether its text leads to it, in another process, too.
    """

    function: Callable[..., Any]
    is_found: bool

    def __new__(cls, function: Callable[..., Any]) -> FunctionText:
        """Name a function."""
        own = getattr(function, "__qualname__", None)
        place, name = (function if own else type(function)).__module__, own or f"<{type(function).__qualname__}>"
        module = sys.modules.get(place)
        is_found = getattr(module, name, None) is function
        if place == "__main__":
            file = getattr(module, "__file__", None)
            is_found = is_found and file is not None and Path(file).suffix == ".py"
            place = str(file) if is_found else place
        made = super().__new__(cls, f"{place}:{name}")
        made.function, made.is_found = function, is_found
        return made

    def __getnewargs__(self) -> tuple[Any]:
        """Copies are made of the function."""
        return (self.function,)


def opt(default: Any, *, help: str, low: float | None = None, high: float | None = None, function: bool = False) -> Any:
    """Declare an option: a dataclass field with a help text.

    Args:
        default: Its default.
        help: One line for people.
        low: The least number it may be.
        high: The largest.
        function: Whether its text may name a function, which Python may then give instead.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "function": function})


def fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the options of a pass or backend class by name; none for a plain class."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def build(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Make an object from option values given as text (CLI) or as typed values (TOML, Python).

    Args:
        cls: A frozen dataclass whose fields were declared with `opt`.
        values: Option name to value.
        where: How an error calls the place, for example ``pass `prune` ``.

    Raises:
        UsageError: An unknown option, or a value of the wrong type or out of range.
    """
    known = fields(cls)
    hints = typing.get_type_hints(cls) if known else {}
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{where} has no option `{name}`", hint=did_you_mean(name, known))
        arguments[name] = _convert(_named(value, known[name]), hints[name], f"{where}: option `{name}`")
    result = cls(**arguments)
    check(result, where=where)
    return result


def check(obj: Any, *, where: str) -> None:
    """Check every option of an object against its declared type and range, however it was made.

    A function in the place of text is named, which is what the object holds from then on.

    Raises:
        UsageError: The first value that does not fit.
    """
    hints = typing.get_type_hints(type(obj)) if fields(type(obj)) else {}
    for name, field in fields(type(obj)).items():
        value = _named(getattr(obj, name), field)
        if isinstance(value, FunctionText):
            object.__setattr__(obj, name, value)  # it is frozen for everybody else
        place = f"{where}: option `{name}`"
        if value is not None or not _allows_none(hints[name]):
            _convert(value, hints[name], place)
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if value is not None and (low is not None or high is not None):
            _check_range(value, low, high, place)


def to_text(obj: Any) -> str:
    """Return the options that differ from their defaults as ``name=value:name=value``."""
    return ":".join(f"{name}={_escape(_show(value), ':,')}" for name, value in changed(obj).items())


def changed(obj: Any) -> dict[str, Any]:
    """Return the options of an object that differ from their defaults."""
    return {
        name: getattr(obj, name) for name, field in fields(type(obj)).items() if getattr(obj, name) != field.default
    }


def from_text(text: str, *, where: str) -> dict[str, str]:
    """Split ``name=value:name=value`` into a mapping; a backslash keeps the next character as it is.

    Raises:
        UsageError: A part that is not ``name=value``, or a name given twice.
    """
    values: dict[str, str] = {}
    for part in split(text, ":"):
        name, equals, value = part.partition("=")
        if not equals or not name:
            hint = r"write options as `name=value`, joined by `:`; a colon within a value is `\:`"
            raise UsageError(f"{where}: `{part}` is not an option", hint=hint)
        name = name.strip().replace("-", "_")
        if name in values:
            raise UsageError(f"{where}: option `{name}` is given twice", hint="keep one of them")
        values[name] = _unescape(value)
    return values


def split(text: str, separator: str) -> list[str]:
    """Split text at a separator that no backslash escapes; empty text gives no parts."""
    if not text:
        return []
    parts = [""]
    for token in re.findall(r"\\.|.", text, flags=re.DOTALL):
        if token == separator:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def describe(cls: type) -> Iterator[tuple[str, str, str]]:
    """Yield (name, default as text, help) of every option of a class."""
    for name, field in fields(cls).items():
        yield name, _show(field.default), field.metadata.get("help", "")


def accepted(cls: type, name: str) -> str:
    """Return what an option accepts, as text: its choices, its range, or nothing where its help says it all."""
    hint = typing.get_type_hints(cls)[name]
    if _allows_none(hint):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if hint is bool:
        return "true|false"
    low, high = (fields(cls)[name].metadata.get(end) for end in ("low", "high"))
    return _span(low, high) if low is not None or high is not None else ""


def _named(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Return the value of an option, of a function the text that names it."""
    may_be_named = field.metadata.get("function") and callable(value)
    return FunctionText(value) if may_be_named else value


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return LIST_SEPARATOR.join(_escape(str(item), LIST_SEPARATOR) for item in value)
    return str(value)


def _escape(text: str, separators: str) -> str:
    return re.sub(rf"([\\{re.escape(separators)}])", r"\\\1", text)


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _allows_none(hint: Any) -> bool:
    # `Literal[...] | None` is a typing.Union, `int | None` a types.UnionType.
    return typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in typing.get_args(hint)


def _convert(value: Any, hint: Any, place: str) -> Any:
    """Turn a text or TOML value into the annotated type, or raise a UsageError that names the place."""
    if _allows_none(hint):
        if value is None or value == "none":
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UsageError(f"{place} cannot be `{value}`", hint=f"one of: {', '.join(map(str, choices))}")
        return value
    if typing.get_origin(hint) is tuple:
        if value == "none":  # as help texts show that nothing is in it
            return ()
        items = [_unescape(item) for item in split(value, LIST_SEPARATOR)] if isinstance(value, str) else value
        (item_hint, *_) = typing.get_args(hint)
        return tuple(_convert(item, item_hint, place) for item in items if item != "")
    return _convert_scalar(value, hint, place)


def _convert_scalar(value: Any, hint: Any, place: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _TRUE + _FALSE:
            return str(value).lower() in _TRUE
        raise UsageError(f"{place} cannot be `{value}`", hint="true or false")
    if hint in (int, float):
        if isinstance(value, bool):
            raise UsageError(f"{place} cannot be `{value}`", hint=_number_hint(hint))
        try:
            # Cutting 2.5 to 2 would be another option than was asked for.
            if hint is int and isinstance(value, float):
                raise ValueError
            return value if isinstance(value, hint) else hint(value)
        except (TypeError, ValueError):
            raise UsageError(f"{place} cannot be `{value}`", hint=_number_hint(hint)) from None
    # A word may be a number, `group=32`, which TOML and Python then write as one.
    if hint is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return value if isinstance(value, str) else str(value)
    raise UsageError(f"{place} cannot be `{value}`", hint=f"a value of type {getattr(hint, '__name__', hint)}")


def _number_hint(hint: type) -> str:
    return "a whole number" if hint is int else "a number"


def _check_range(value: float, low: float | None, high: float | None, place: str) -> None:
    # Written as `not inside` so that NaN fails too.
    if not ((low is None or value >= low) and (high is None or value <= high)):
        raise UsageError(f"{place} is out of range: `{value}`", hint=_span(low, high))


def _span(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low:g}"
    return f"at most {high:g}" if low is None else f"from {low:g} to {high:g}"
