"""Channel groups written out by hand: of each axis, a letter for each element, and a dot for one of no unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from graphopt import shapes
from graphopt.passes.analyses.channel_groups import ChannelGroup, Groups, Layout, Side, channel_groups

from .pass_runs import loaded
from .removed_channels import check_removal, feed_of, removed

Weights = Mapping[str, Sequence[int]]
Lettered = dict[str, str]
MAJOR, MINOR = Layout(splits=Side.MAJOR), Layout(splits=Side.MINOR)


def model_of(text: str, weights: Weights, opset: int = 21) -> ir.Model:
    """Return a model of a graph as text, with random weights of the given shapes, and shapes inferred."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "own" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.uniform(-1, 1, shape).astype(np.float32), name))
    model = loaded(proto)
    shapes.infer_shapes(model)
    return model


def groups_of(
    text: str, weights: Weights, layout: Layout | None = None, opset: int = 21, *, runs: bool = True
) -> list[Lettered]:
    """Return the groups of a model as letters, by ``name:axis``.

    Of each group, a unit is removed: what is left computes what zeros in its place would, unless something mixes the
    channels. With ``runs=False`` nothing is removed.
    """
    groups = channel_groups(model_of(text, weights, opset), layout).groups
    for index in range(len(groups)):
        if runs and not groups[index].mixers:
            remove_a_unit(model_of(text, weights, opset), layout, index)
    return [letters(group) for group in groups]


def remove_a_unit(model: ir.Model, layout: Layout | None, index: int) -> None:
    """Check that a model without a unit of one of its groups gives what it gives with zeros there."""
    group = channel_groups(model, layout).groups[index]
    check_removal(model, {group: removed(group.size, group.size - 1)}, feed_of(model, S=3))


def letters(group: ChannelGroup) -> Lettered:
    """Return the units of each axis of a group as letters, in the order in which they first occur."""
    axes = {f"{axis.value.name}:{axis.axis}": numbers for axis, numbers in group.axes.items()}
    named: dict[int, str] = {-1: "."}
    for name in sorted(axes):
        for unit in axes[name].tolist():
            named.setdefault(unit, chr(ord("a") + len(named) - 1))
    assert len(named) - 1 == group.size
    return {name: "".join(named[unit] for unit in axes[name].tolist()) for name in sorted(axes)}


def of_constants(groups: Sequence[Lettered], weights: Weights) -> list[Lettered]:
    """Return groups without the axes of activations."""
    return [{name: units for name, units in group.items() if name.split(":")[0] in weights} for group in groups]


def reasons(groups: Groups) -> set[str]:
    """Return why channels are frozen."""
    return {frozen.reason for frozen in groups.frozen}
