"""What an operator is to the lowering: a function on tensors, since which version, and what it reads as numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Operator:
    """How torch computes one ONNX operator, from one version of it on.

    The function takes the inputs by position, in ONNX's order: tensors, None where one is left out, lists for
    sequences, arrays of objects for strings. It takes the attributes as keyword-only arguments of ONNX's names with
    ONNX's defaults (None where there is none): numbers, text, lists, tensors. A graph is a pair of its module and the
    tuple of what it captures. Further keywords it may have, and is given then:

    * ``outputs: int``: how many outputs are wanted, trailing ones that nobody reads left out;
    * ``input_types: Sequence[int]``: ONNX's codes of the inputs' element types, 0 where one is unknown or absent;
    * ``device: torch.device``: where to put what is made of numbers alone, such as the result of Range.

    It returns its output. One whose return annotation is a ``tuple[...]`` always returns a tuple of its outputs,
    also where one of them is wanted; it may hold more than are.

    Attributes:
        function: The function, defined at the top level of its module so that torch.fx can name it.
        since: The first version of the operator set it is right for.
        sizes: Inputs it reads as numbers (`tolist`), such as shapes and axes: these stay on the host.
    """

    function: Callable[..., Any]
    since: int = 1
    sizes: tuple[int, ...] = ()

    @cached_property
    def returns_tuple(self) -> bool:
        """Whether the function returns a tuple of outputs, by its annotation."""
        return str(self.function.__annotations__.get("return", "")).startswith("tuple[")

    @cached_property
    def keywords(self) -> frozenset[str]:
        """The keyword-only arguments of the function."""
        parameters = inspect.signature(self.function).parameters.values()
        return frozenset(one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY)


Table: TypeAlias = Mapping[str, Operator | tuple[Operator, ...]]
"""Operators by type: one, or one for each version that differs, oldest first."""
