"""Operators that only move elements about, for elements torch has no kernels for.

Torch can hold uint16, uint32, uint64 and the floats of 8 bits, but has few kernels that move them, and it holds no
strings at all. What only moves elements need not know what they are: it is run on integers of the same width, or on
the places of strings in a list of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

# Dtypes that are moved as integers of their width, which torch moves everywhere.
CARRIERS: Mapping[torch.dtype, torch.dtype] = MappingProxyType(
    {
        torch.uint16: torch.int16,
        torch.uint32: torch.int32,
        torch.uint64: torch.int64,
        torch.float8_e4m3fn: torch.uint8,
        torch.float8_e4m3fnuz: torch.uint8,
        torch.float8_e5m2: torch.uint8,
        torch.float8_e5m2fnuz: torch.uint8,
        torch.float8_e8m0fnu: torch.uint8,
    }
)


def moving(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that only moves the elements of its inputs take elements of any dtype, strings too.

    The function's data inputs have one dtype, and so have its outputs; other inputs are integers.
    """

    @functools.wraps(function)
    def move(*inputs: Any, **attributes: Any) -> Any:
        given = [item for entry in inputs for item in (entry if isinstance(entry, list) else [entry])]
        if any(isinstance(item, np.ndarray) for item in given):
            return _move_strings(function, inputs, attributes)
        odd = next((item.dtype for item in given if isinstance(item, torch.Tensor) and item.dtype in CARRIERS), None)
        if odd is None:
            return function(*inputs, **attributes)
        carrier = CARRIERS[odd]
        carried = _each(inputs, lambda item: item.view(carrier) if item.dtype == odd else item)
        return _each(function(*carried, **attributes), lambda item: item.view(odd))

    return move


def _move_strings(function: Callable[..., Any], inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    """Move the places of strings in a list of all of them; 0 stands for the empty string, with which ONNX fills."""
    strings: list[Any] = [""]

    def places_of(item: Any) -> Any:
        if not isinstance(item, np.ndarray):
            return item.cpu()  # where strings are, and their places
        first = len(strings)
        strings.extend(item.reshape(-1).tolist())
        return torch.arange(first, len(strings)).reshape(item.shape)

    moved = function(*_each(inputs, places_of), **attributes)
    return _each(moved, lambda places: taken(strings, places))


def taken(strings: list[Any], places: torch.Tensor) -> np.ndarray:
    """Return the strings at these places, as an array of objects of the places' shape."""
    found = np.empty(places.numel(), dtype=object)
    found[:] = [strings[place] for place in places.reshape(-1).tolist()]
    return found.reshape(tuple(places.shape))


def _each(given: Any, change: Callable[[Any], Any]) -> Any:
    """Change each tensor or array of a value, a tuple or a list."""
    if isinstance(given, tuple | list):
        return type(given)(_each(item, change) for item in given)
    return change(given) if isinstance(given, torch.Tensor | np.ndarray) else given
