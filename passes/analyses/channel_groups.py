"""Channels that can only be removed together: which elements of which axes of which tensors, over the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

from .axis_classes import ElementClasses, element_classes
from .axis_rules import ask_rules
from .axis_ties import Axis as Axis
from .axis_ties import Emit, Freeze
from .axis_ties import Layout as Layout
from .axis_ties import Side as Side
from .linear_layers import LinearLayer, linear_layers

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_MADE_BY_NOTHING = "no weight makes it: it is only read"
_ONLY_ONE = "there is no other channel like it, and one must stay"


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that go one by one, each with all that is tied to it.

    Attributes:
        name: What users call the group: the first layer that makes its channels.
        size: How many units there are; a unit is the least that can be removed.
        axes: For each axis with elements in the group, int64 [length of the axis]: the unit each element belongs to,
            -1 for an element of no unit of this group. Weights, biases and activations alike.
        writers: Linear layers whose outputs are channels of the group; none where only embeddings or recurrent layers
            make them.
        readers: Linear layers whose inputs are channels of the group.
        mixers: Nodes other than linear layers that mix what they read over the channels, such as normalizations: what
            is left changes when a channel goes.
    """

    name: str
    size: int
    axes: Mapping[Axis, Array]
    writers: Sequence[LinearLayer] = ()
    readers: Sequence[LinearLayer] = ()
    mixers: Sequence[ir.Node] = ()


@dataclass(frozen=True, eq=False)
class FrozenAxis:
    """Channels that must all stay.

    Attributes:
        name: What users call them: the first layer that makes or reads them.
        size: How many there are.
        reason: Why, in words.
        node: The node that holds them, where it is one.
    """

    name: str
    size: int
    reason: str
    node: ir.Node | None = None


@dataclass(frozen=True, eq=False)
class Groups:
    """All channels of a model.

    Attributes:
        groups: What can shrink, in graph order of the first layer that makes it.
        frozen: What cannot, and why.
    """

    groups: Sequence[ChannelGroup] = field(default_factory=list)
    frozen: Sequence[FrozenAxis] = field(default_factory=list)


def channel_groups(model: ir.Model, layout: Layout | None = None) -> Groups:
    """Return the channels of the main graph, divided into those that can be removed together and those that cannot.

    Units of one group have the same number of elements on the same axes, so that each costs the same. A group has two
    units or more, and a weight that makes them: that of a layer, an embedding or a recurrent layer. A constant that
    several nodes read ties what they do with it; that is right for weights, while vectors that happen to hold the same
    are better told apart before (`separate_vectors`).

    Args:
        model: A model with inferred shapes, in canonical form. Its weights are not read.
        layout: Which side is cut where an axis is two in one.
    """
    emit = ask_rules(model)
    layers = _Layers(model)
    groups: list[ChannelGroup] = []
    frozen: list[FrozenAxis] = []
    for component in element_classes(emit, layout or Layout()):
        if layers.touches(component):
            offered, held = _groups_of(component, layers, emit)
            groups += offered
            frozen += _frozen_of(held, layers)
    return Groups(_in_order(groups, layers), frozen)


class _Layers:
    """The nodes that hold weights, and the axes of their weights."""

    def __init__(self, model: ir.Model) -> None:
        self.order = {node: turn for turn, node in enumerate(walk.every_node(model))}
        self.outputs: dict[Axis, list[LinearLayer]] = {}
        self.inputs: dict[Axis, list[LinearLayer]] = {}
        layers = linear_layers(model)
        self.weights = {layer.weight for layer in layers}
        for layer in layers:
            self.outputs.setdefault(output_axis(layer), []).append(layer)
            self.inputs.setdefault(input_axis(layer), []).append(layer)

    def touches(self, component: ElementClasses) -> bool:
        """Return whether any weight has an axis among these."""
        return any(is_matrix(axis.value) for axis in component.axes)

    def make(self, axes: Mapping[Axis, Array]) -> bool:
        """Return whether a weight makes the channels on some axes: they lie along it, and along what its node gives."""
        values = {axis.value for axis in axes}
        return any(axis in self.outputs for axis in axes) or any(
            not values.isdisjoint(use.node.outputs) for value in values if is_matrix(value) for use in value.uses()
        )

    def holds_otherwise(self, value: ir.Value) -> bool:
        """Return whether a value is a weight of other nodes than linear layers: an embedding, a recurrent layer."""
        return value not in self.weights and is_matrix(value)

    def name(self, axes: Iterable[Axis], writers: Sequence[LinearLayer]) -> str:
        """Return the label of the first layer that makes the channels, else of the first node that holds a weight."""
        nodes = [layer.node for layer in writers] or [
            use.node for axis in axes if is_matrix(axis.value) for use in axis.value.uses()
        ]
        return walk.label(min(nodes, key=lambda node: self.order.get(node, len(self.order))))


def output_axis(layer: LinearLayer) -> Axis:
    """Return the axis of a layer's weight that runs over its output channels."""
    return Axis(layer.weight, layer.output_axis)


def input_axis(layer: LinearLayer) -> Axis:
    """Return the axis of a layer's weight that runs over its input channels, within a group."""
    if layer.node.op_type in ("Conv", "ConvTranspose"):
        return Axis(layer.weight, 1 - layer.output_axis)
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    last = len(tensor.shape) - 1
    return Axis(layer.weight, 2 * last - 1 - layer.output_axis)


def is_matrix(value: ir.Value) -> bool:
    """Return whether a value is a constant that is longer than 1 along two axes or more: a weight, not a bias.

    Numbers of elements are none, however they lie.
    """
    tensor = walk.constant_tensor(value)
    return tensor is not None and tensor.dtype in _FLOATS and sum(size > 1 for size in walk.dims(tensor)) > 1


def _groups_of(component: ElementClasses, layers: _Layers, emit: Emit) -> tuple[list[ChannelGroup], ElementClasses]:
    """Return the classes that may go, divided by how many elements they have on which axes, and what all others are."""
    free = np.array([freeze is None for freeze in component.frozen])
    groups: list[ChannelGroup] = []
    held = list(component.frozen)
    for members in _alike(component, free, emit):
        axes = _units_on_axes(component, members)
        mixers = list(dict.fromkeys(node for node, axis in emit.mixers if axis in axes))
        axes = {axis: own for axis, own in axes.items() if axis.value not in emit.made_up}
        if not any(is_matrix(axis.value) for axis in axes):
            continue
        size = int(members.sum())
        reason = _why_to_keep(size, axes, layers)
        if reason is not None:
            freeze = Freeze(next(iter(axes)), reason, None, None, 0)
            for number in np.flatnonzero(members).tolist():
                held[number] = freeze
            continue
        writers = _ordered(layers.outputs, axes, layers)
        readers = _ordered(layers.inputs, axes, layers)
        groups.append(ChannelGroup(layers.name(axes, writers), size, axes, writers, readers, mixers))
    return groups, replace(component, frozen=held)


def _units_on_axes(component: ElementClasses, members: Array) -> dict[Axis, Array]:
    """Return the unit of each element of the axes that have any, of classes numbered one after the other."""
    unit_of = np.append(np.where(members, np.cumsum(members) - 1, -1), -1)
    units: dict[int, Array] = {}  # axes that share their numbers share their units
    axes: dict[Axis, Array] = {}
    for axis in component.axes:
        numbers = component.numbers[axis]
        if id(numbers) not in units:
            units[id(numbers)] = unit_of[numbers]
        if (units[id(numbers)] >= 0).any():
            axes[axis] = units[id(numbers)]
    return axes


def _why_to_keep(size: int, axes: Mapping[Axis, Array], layers: _Layers) -> str | None:
    """Return why channels that nothing holds are no group all the same, or None."""
    if not layers.make(axes):
        return _MADE_BY_NOTHING
    return _ONLY_ONE if size == 1 else None


def _alike(component: ElementClasses, free: Array, emit: Emit) -> list[Array]:
    """Return masks of classes with the same number of elements on each axis of a tensor."""
    real = [axis for axis in component.axes if axis.value not in emit.made_up]
    distinct = {id(component.numbers[axis]): component.numbers[axis] for axis in real}
    counts = np.stack([np.bincount(numbers, minlength=len(free)) for numbers in distinct.values()], axis=1)
    open_ones = np.flatnonzero(free)
    if not open_ones.size:
        return []
    _, kinds = np.unique(counts[open_ones], axis=0, return_inverse=True)
    masks = []
    for kind in dict.fromkeys(kinds.reshape(-1).tolist()):
        mask = np.zeros(len(free), bool)
        mask[open_ones[kinds.reshape(-1) == kind]] = True
        masks.append(mask)
    return masks


def _ordered(found: Mapping[Axis, Sequence[LinearLayer]], axes: Iterable[Axis], layers: _Layers) -> list[LinearLayer]:
    own = [layer for axis in axes for layer in found.get(axis, ())]
    return sorted(own, key=lambda layer: layers.order[layer.node])


def _frozen_of(component: ElementClasses, layers: _Layers) -> list[FrozenAxis]:
    """Return the classes that stay, each under the first layer that makes it, else the first that reads it."""
    reported = np.array([freeze is None for freeze in component.frozen])
    makers = [(layer.node, axis) for axis in component.axes for layer in layers.outputs.get(axis, ())]
    users = [(layer.node, axis) for axis in component.axes for layer in layers.inputs.get(axis, ())]
    stored = [axis for axis in component.axes if layers.holds_otherwise(axis.value)]
    others = [(node, axis) for axis in stored for node in axis.value.consumers()[:1]]
    frozen = []
    for holder, axis in (*makers, *users, *others):
        numbers = component.numbers[axis]
        by_reason: dict[tuple[str, ir.Node | None], set[int]] = {}
        for number in np.unique(numbers[~reported[numbers]]).tolist():
            freeze = component.frozen[number]
            assert freeze is not None, "what was not reported is frozen"
            by_reason.setdefault((freeze.reason, freeze.node), set()).add(number)
        if len(numbers) > 1:
            for (reason, node), members in by_reason.items():
                size = int(np.isin(numbers, list(members)).sum())
                frozen.append(FrozenAxis(walk.label(holder), size, reason, node))
        reported[numbers] = True
    return frozen


def _in_order(groups: Iterable[ChannelGroup], layers: _Layers) -> list[ChannelGroup]:
    """Return groups in graph order of what names them, with names that differ."""
    turns = {walk.label(node): turn for node, turn in reversed(layers.order.items())}
    ordered = sorted(groups, key=lambda group: turns[group.name])
    seen: Counter[str] = Counter()
    named = []
    for group in ordered:
        seen[group.name] += 1
        count = seen[group.name]
        named.append(group if count == 1 else replace(group, name=f"{group.name}#{count}"))
    return named
