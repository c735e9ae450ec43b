"""The history of ONNX's operators: where a new version of one means something else than the version before it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import onnx
from onnx.defs import OpSchema

_OPTIONAL_INPUTS = (OpSchema.FormalParameterOption.Optional, OpSchema.FormalParameterOption.Variadic)


@functools.lru_cache(maxsize=4096)
def schema_at(op_type: str, version: int) -> OpSchema | None:
    """Return what an operator of the ONNX domain is in an opset, or None where the opset does not have it."""
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def versions(op_type: str, start: int, stop: int) -> Iterator[tuple[OpSchema, OpSchema]]:
    """Yield each (version of an operator, next one) on the way from one opset up to another."""
    old = schema_at(op_type, start)
    for opset in range(start + 1, stop + 1):
        new = schema_at(op_type, opset)
        if old is not None and new is not None and new.since_version == opset:
            yield old, new
        old = new


@functools.lru_cache(maxsize=4096)
def incompatible(old: OpSchema, new: OpSchema) -> str | None:
    """Return how a node that fits one version fails to fit, or means something else in, the next; None if neither.

    Types that a version no longer takes are told by `types_lost`; what only the text of the standard changed, no
    schema shows.
    """
    if new.deprecated and not old.deprecated:
        return "it is deprecated"
    gone = sorted(set(old.attributes) - set(new.attributes))
    if gone:
        return f"attribute `{gone[0]}` is gone"
    for name, attribute in new.attributes.items():
        before = old.attributes.get(name)
        if attribute.required and (before is None or not before.required):
            return f"attribute `{name}` became mandatory"
        if before is not None and attribute.type != before.type:
            return f"attribute `{name}` is of another type"
        if before is not None and _default(attribute) != _default(before):
            return f"attribute `{name}` has another default"
    if _ports_changed(list(old.inputs), list(new.inputs)):
        return "its inputs are others"
    if len(old.outputs) > len(new.outputs) or (_is_variadic(old.outputs) and not _is_variadic(new.outputs)):
        return "its outputs are others"
    return None


def _default(attribute: OpSchema.Attribute) -> Any:
    return onnx.helper.get_attribute_value(attribute.default_value) if attribute.default_value.name else None


def _is_variadic(ports: Any) -> bool:
    return bool(ports) and ports[-1].option == OpSchema.FormalParameterOption.Variadic


def _ports_changed(old: list[Any], new: list[Any]) -> bool:
    """Return whether inputs moved, went, or became mandatory; a new name alone is none of these."""
    if len(old) > len(new):
        return True
    names = {port.name for port in old}
    for before, after in zip(old, new, strict=False):
        became_mandatory = before.option in _OPTIONAL_INPUTS and after.option not in _OPTIONAL_INPUTS
        moved = before.name != after.name and (after.name in names or before.name in {port.name for port in new})
        inserted = before.name != after.name and len(new) > len(old)
        if became_mandatory or moved or inserted or before.option == _OPTIONAL_INPUTS[1] != after.option:
            return True
    return any(port.option not in _OPTIONAL_INPUTS for port in new[len(old) :])


def types_lost(old: OpSchema, new: OpSchema) -> Iterator[tuple[str, int, frozenset[str]]]:
    """Yield (``input`` or ``output``, index, types a version took there and the next one does not)."""
    for side, before, after in (("input", old.inputs, new.inputs), ("output", old.outputs, new.outputs)):
        for index, (a, b) in enumerate(zip(before, after, strict=False)):
            lost = _types(old, a) - _types(new, b)
            if lost:
                yield side, index, frozenset(lost)


def _types(schema: OpSchema, port: Any) -> set[str]:
    constraints = {one.type_param_str: set(one.allowed_type_strs) for one in schema.type_constraints}
    return constraints.get(port.type_str, {port.type_str})
