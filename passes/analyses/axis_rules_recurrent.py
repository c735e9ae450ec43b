"""Rules of the channel analysis for LSTM, GRU and RNN: the hidden size, once for each gate."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .axis_ties import Axis, AxisRule, Emit, NodeAxes, length_of

# Blocks of hidden_size rows in W and R, one for each gate; a bias has as many for W and again for R.
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_PEEPHOLES = 3
_DIRECTIONS = "a recurrent layer keeps its directions"

# Places of inputs.
_X, _W, _R, _BIAS, _LENGTHS, _HIDDEN, _CELL, _PEEPHOLE = range(8)


def recurrent(node: NodeAxes, emit: Emit) -> None:
    """Channels of the input are columns of W; a hidden unit is a row in each gate, a column of R and a state.

    Both directions of a layer have one hidden size: a unit is the one of that number in each.
    """
    gates = _GATES[node.node.op_type]
    units = node.input(_R, 2)
    emit.tie(node.input(_X, 2), node.input(_W, 2))
    for index, blocks in ((_W, gates), (_R, gates), (_BIAS, 2 * gates), (_PEEPHOLE, _PEEPHOLES)):
        if node.has(index):
            _tie_blocks(node.input(index, 1), units, blocks, emit)
            emit.freeze(node.input(index, 0), _DIRECTIONS)
    # [directions, batch, hidden], or [batch, directions, hidden]
    directions = 1 if node.integer("layout") else 0
    batch, steps = node.input(_X, 1 - directions), node.input(_X, directions)
    if node.has(_LENGTHS):
        emit.tie(node.input(_LENGTHS, 0), batch)
    for index in (_HIDDEN, _CELL):
        if node.has(index):
            emit.tie(node.input(index, 2), units)
            emit.tie(node.input(index, 1 - directions), batch)
            emit.freeze(node.input(index, directions), _DIRECTIONS)
    for index, rank in ((0, 4), (1, 3), (2, 3)):
        if node.gives(index):
            emit.tie(node.output(index, rank - 1), units)
            # Y is [steps, directions, batch, hidden], or [batch, steps, directions, hidden].
            emit.freeze(node.output(index, 1 + directions if rank == 4 else directions), _DIRECTIONS)
            emit.tie(node.output(index, 0 if directions else rank - 2), batch)
    if node.gives(0):
        emit.tie(node.output(0, directions), steps)


def _tie_blocks(axis: Axis, units: Axis, blocks: int, emit: Emit) -> None:
    """Tie an axis on which the units lie several times, one block behind the other."""
    length, count = length_of(axis), length_of(units)
    if length is None or count is None or length != blocks * count:
        raise ValueError(f"{length} rows are not {blocks} for each of {count} hidden units")
    emit.tie(axis, units, None, np.arange(length) % count)


RECURRENT_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {("", "LSTM"): recurrent, ("", "GRU"): recurrent, ("", "RNN"): recurrent}
)
