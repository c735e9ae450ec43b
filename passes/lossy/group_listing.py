"""What `graphopt inspect --groups` shows of the channels of a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.listing import Listing, Sheet
from graphopt.report import show_count
from graphopt.rewriter import Rewriter

from ..analyses.channel_groups import ChannelGroup, FrozenAxis, Groups, channel_groups
from .removable_channels import tell_apart

# So many layers are named before it says how many more there are.
_NAMED = 2


def list_groups(model: ir.Model) -> Listing:
    """Return the channels of a model as tables.

    Args:
        model: A model with inferred shapes, in canonical form; what its layers only seem to share is told apart.
    """
    tell_apart(model, Rewriter(model))
    found = channel_groups(model)
    sheets = [_groups_sheet(found.groups)] if found.groups else []
    sheets += [_frozen_sheet(found.frozen)] if found.frozen else []
    remarks = [_sum_of(found)]
    values = {
        "groups": [_group_values(group) for group in found.groups],
        "frozen": [_frozen_values(axis) for axis in found.frozen],
    }
    return Listing(sheets, values, remarks)


def _groups_sheet(groups: Sequence[ChannelGroup]) -> Sheet:
    columns = ("group", "channels", "weights each", "made by", "read by", "tied by", "mixed by")
    rows = [
        (
            group.name,
            str(group.size),
            show_count(weights_of_a_unit(group)),
            _names([layer.node for layer in group.writers]),
            _names([layer.node for layer in group.readers]),
            _counted(tying_operators(group)),
            _counted(Counter(node.op_type for node in group.mixers)),
        )
        for group in groups
    ]
    return Sheet(columns, rows, numbers=("channels", "weights each"))


def _frozen_sheet(frozen: Sequence[FrozenAxis]) -> Sheet:
    rows = [(axis.name, str(axis.size), axis.reason, _label(axis.node)) for axis in frozen]
    return Sheet(("frozen", "channels", "why", "at"), rows, numbers=("channels",))


def _sum_of(found: Groups) -> str:
    channels, frozen = (sum(one.size for one in some) for some in (found.groups, found.frozen))
    count = len(found.groups)
    return f"{channels} channels in {count} group{'s' if count != 1 else ''} can go, {frozen} cannot"


def weights_of_a_unit(group: ChannelGroup) -> int:
    """Return how many elements of constants go with one unit of a group."""
    cut: dict[ir.Value, list[float]] = {}
    for (value, _), units in group.axes.items():
        cut.setdefault(value, []).append(1 - float((units == 0).mean()))
    total = 0
    for value, left in cut.items():
        tensor = walk.constant_tensor(value)
        if tensor is not None:
            total += round(tensor.size * (1 - math.prod(left)))
    return total


def tying_operators(group: ChannelGroup) -> Counter[str]:
    """Return the operators that make channels of several tensors into one, and how many of each."""
    found: Counter[str] = Counter()
    writers = {layer.node for layer in group.writers}
    held = {axis.value for axis in group.axes if walk.constant_tensor(axis.value) is None}
    for node in dict.fromkeys(value.producer() for value in held):
        if node is None:
            continue
        joined = {value for value in node.inputs if value in held}
        if node in writers and joined and _has_groups(node):
            found["depthwise Conv"] += 1
        elif node not in writers and len(joined) > 1:
            found[node.op_type] += 1
    return found


def _has_groups(node: ir.Node) -> bool:
    return node.attributes.get_int("group", 1) > 1


def _counted(operators: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in operators.most_common()) or "–"


def _names(nodes: Sequence[ir.Node]) -> str:
    names = [walk.label(node) for node in nodes]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more or "–"


def _label(node: ir.Node | None) -> str:
    return walk.label(node) if node is not None else ""


def _group_values(group: ChannelGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "channels": group.size,
        "weights_of_each": weights_of_a_unit(group),
        "made_by": [walk.label(layer.node) for layer in group.writers],
        "read_by": [walk.label(layer.node) for layer in group.readers],
        "tied_by": dict(tying_operators(group)),
        "mixed_by": [walk.label(node) for node in group.mixers],
        "axes": [[axis.value.name, axis.axis] for axis in group.axes],
    }


def _frozen_values(axis: FrozenAxis) -> dict[str, Any]:
    return {
        "name": axis.name,
        "channels": axis.size,
        "reason": axis.reason,
        "node": _label(axis.node) or None,
    }
