"""What a loaded model must still say: the check that reading a file into the IR has lost nothing.

The file and the IR written back are compared field by field, so a field that the IR does not know, now or in a later
version, is refused instead of dropped. Only this may change:

* value_info and quantization_annotation of names that their graph does not have, or that its inputs or outputs
  describe themselves, are dropped;
* the order of value_info, quantization_annotation and metadata_props;
* trailing outputs without a name, and fields set to what they mean when absent;
* the layout of external data: checksum, basepath and runtimes' prepacked copies describe bytes that are rewritten.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from typing import Any

import onnx
from google.protobuf.unknown_fields import UnknownFieldSet

EXTERNAL_KEYS_READ = frozenset({"location", "offset", "length"})
_EXTERNAL_KEYS_DROPPED = ("checksum", "basepath", "prepacked")

# The field that names an entry, for repeated fields in which order means nothing and stale entries may go.
_KEYED = {"value_info": "name", "quantization_annotation": "tensor_name"}

# Where two entries with one name are the likely reason that one is missing.
_NAMED: dict[str, Callable[[Any], str]] = {
    "initializer": lambda entry: entry.name,
    "attribute": lambda entry: entry if isinstance(entry, str) else entry.name,
    "attribute_proto": lambda entry: entry.name,
    "opset_import": lambda entry: entry.domain,
    "functions": lambda entry: f"{entry.domain}::{entry.name}:{entry.overload}",
    "metadata_props": lambda entry: entry.key,
}


def unknown_field(proto: Any, where: str = "") -> str | None:
    """Return the place of the first field that the installed onnx does not know, None if it knows all."""
    unknown = UnknownFieldSet(proto)
    if len(unknown) > 0:
        return f"{where or 'model'}, field number {unknown[0].field_number}"
    for field, value in proto.ListFields():
        if field.message_type is None:
            continue
        repeated = _is_repeated(value)
        for index, message in enumerate(value if repeated else [value]):
            found = unknown_field(message, _join(where, field, index if repeated else None))
            if found is not None:
                return found
    return None


def first_loss(before: Any, after: Any, where: str = "") -> str | None:
    """Return what is in `before` and not in `after`, in words, None if nothing is lost.

    Args:
        before: A message as read from the file.
        after: The same message as the IR would write it; it may say more.
        where: The path to both from the model.
    """
    if before == after:
        return None
    for field, value in before.ListFields():
        if _is_repeated(value):
            loss = _loss_in_list(before, after, field, where)
        elif field.message_type is not None:
            loss = _loss_in_message(value, after, field, where)
        else:
            loss = _loss_in_scalar(value, after, field, where)
        if loss is not None:
            return loss
    return None


def _loss_in_message(value: Any, after: Any, field: Any, where: str) -> str | None:
    path = _join(where, field)
    if after.HasField(field.name):
        return first_loss(value, getattr(after, field.name), path)
    # An empty message means the same as none, but an empty shape is a scalar's, and one of several kinds of type says
    # something by being set at all.
    if field.name == "shape" or field.containing_oneof is not None:
        return path
    return first_loss(value, type(value)(), path)


def _loss_in_scalar(value: Any, after: Any, field: Any, where: str) -> str | None:
    kept = getattr(after, field.name)
    same = value == kept or (isinstance(value, float) and math.isnan(value) and math.isnan(kept))
    # One of several alternatives says something by being set at all: a dimension of 0 is not an unknown dimension.
    must_be_set = field.containing_oneof is not None
    if same and (after.HasField(field.name) or not must_be_set):
        return None
    return f"{_join(where, field)} (`{_short(value)}`)"


def _loss_in_list(before: Any, after: Any, field: Any, where: str) -> str | None:
    values, kept = getattr(before, field.name), getattr(after, field.name)
    path = _join(where, field)
    if field.name in _KEYED:
        return _loss_by_name(before, values, kept, _KEYED[field.name], path)
    if field.name in ("metadata_props", "quant_parameter_tensor_names"):
        return _loss_in_pairs(values, kept, path)
    if field.name == "external_data":
        return _loss_in_external_data(values, path)
    if field.name == "output" and field.message_type is None:
        values = _without_trailing_blanks(values)
    if len(values) != len(kept):
        return _doubled(field.name, values) or f"{path}: {len(values)} entries, of which {len(kept)} would be kept"
    for index, (value, other) in enumerate(zip(values, kept, strict=True)):
        if field.message_type is not None:
            loss = first_loss(value, other, _join(where, field, index))
            if loss is not None:
                return loss
        elif value != other and not (isinstance(value, float) and math.isnan(value)):
            return f"{_join(where, field, index)} (`{_short(value)}`)"
    return None


def _loss_by_name(graph: Any, values: Iterable[Any], kept: Iterable[Any], key: str, path: str) -> str | None:
    found = {getattr(entry, key): entry for entry in kept}
    described: dict[str, Any] | None = None
    for value in values:
        name = getattr(value, key)
        if name in found:
            loss = first_loss(value, found[name], f"{path}[{name}]")
            if loss is not None:
                return loss
            continue
        described = _names_needing_info(graph) if described is None else described
        if name in described and not _says_only(value, key, described[name]):
            return f"{path}[{name}]"
    return None


def _names_needing_info(graph: Any) -> dict[str, Any]:
    """Return the names in a graph or function that only value_info describes, and the initializers among them."""
    names: dict[str, Any] = {name: None for node in graph.node for name in node.output if name}
    names.update((tensor.name, tensor) for tensor in getattr(graph, "initializer", ()))
    for entry in (*graph.input, *graph.output):
        if not isinstance(entry, str):  # those of a function are plain strings, without a type of their own
            names.pop(entry.name, None)
    return names


def _says_only(entry: Any, key: str, tensor: Any) -> bool:
    """Return whether an entry says nothing, or only what the initializer of its name says of itself."""
    if first_loss(entry, type(entry)(**{key: getattr(entry, key)})) is None:
        return True
    if tensor is None or key != "name":
        return False
    return first_loss(entry, onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)) is None


def _loss_in_pairs(values: Sequence[Any], kept: Sequence[Any], path: str) -> str | None:
    before = sorted((pair.key, pair.value) for pair in values)
    if before == sorted((pair.key, pair.value) for pair in kept):
        return None
    return _doubled("metadata_props", values) or path


def _loss_in_external_data(entries: Iterable[Any], path: str) -> str | None:
    for entry in entries:
        if entry.key not in EXTERNAL_KEYS_READ and not entry.key.startswith(_EXTERNAL_KEYS_DROPPED):
            return f"{path} (`{_short(entry.key)}`)"
    return None


def _doubled(field: str, values: Sequence[Any]) -> str | None:
    name_of = _NAMED.get(field)
    if name_of is None:
        return None
    names = Counter(name_of(value) for value in values)
    if field == "initializer" and "" in names:
        return "an initializer without a name"
    name, count = names.most_common(1)[0]
    return f"{count} entries of {field} with the same name `{_short(name)}`" if count > 1 else None


def _without_trailing_blanks(names: Sequence[str]) -> list[str]:
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _is_repeated(value: object) -> bool:
    # The field descriptor says so too, but under a name that changed between the protobuf versions onnx allows.
    return isinstance(value, MutableSequence)


def _join(where: str, field: Any, index: int | None = None) -> str:
    step = field.name if index is None else f"{field.name}[{index}]"
    return f"{where}.{step}" if where else str(step)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
