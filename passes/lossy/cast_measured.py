"""What each node would lose in a half format, measured: its output from rounded inputs against its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context

from ..analyses.float_risks import format_limits
from ..analyses.narrow_constants import ENDLESS
from ..analyses.number_formats import Ports

# Activations of other inputs may be larger than those seen: what comes this near the end of the range stays in float32.
HEADROOM = 4.0
# Where comes with this version of the ONNX domain.
FIRST_OPSET = 9
# What only moves numbers loses what is lost of them where they are made, and no more.
_MOVING_OPS = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Relu",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclass(frozen=True)
class Loss:
    """What was measured of one node.

    Attributes:
        peak: The largest magnitude of its outputs; what stands for minus infinity aside.
        sqnr: Signal to noise of its outputs in dB, where its inputs and outputs are rounded to the half format.
    """

    peak: float
    sqnr: float


def measure(ctx: Context, ports: Mapping[ir.Node, Ports], dtype: ir.DataType) -> dict[ir.Node, Loss]:
    """Return what nodes of the main graph lose each by itself, over the calibration samples.

    A copy of the model is run in which each node has a twin that reads rounded inputs, and what is compared is summed
    up inside: memory does not grow with the samples. Like kernels that add up in float32, a twin computes in float32.

    Args:
        ctx: Data and runtime.
        ports: Nodes, each with the inputs and outputs that would be rounded.
        dtype: The half format.
    """
    copy = ctx.model.clone()
    twins = dict(zip(ctx.model.graph, copy.graph, strict=True))
    meter = _Meter(copy, dtype)
    gauges = {
        node: meter.gauge(twins[node], one)
        for node, one in ports.items()
        if node in twins and _first_output(node, one) is not None and not walk.is_onnx_op(node, *_MOVING_OPS)
    }
    wanted = [value for gauge in gauges.values() for value in gauge]
    sums = np.zeros((len(wanted) // 3, 2))
    peaks = np.zeros(len(wanted) // 3)
    with ctx.walkthrough(copy) as walkthrough, np.errstate(over="ignore", invalid="ignore"):
        for arrays in walkthrough.batches(*wanted):
            found = np.array([float(array) for array in arrays]).reshape(-1, 3)
            sums += found[:, :2]
            peaks = np.fmax(peaks, found[:, 2])
    return {node: Loss(float(peak), _sqnr(*pair)) for node, pair, peak in zip(gauges, sums, peaks, strict=True)}


def reasons(losses: Mapping[ir.Node, Loss], dtype: ir.DataType, least_sqnr: float) -> dict[ir.Node, str]:
    """Return the nodes that must stay in float32 by what was measured, and why."""
    limit = float(format_limits(dtype).max) / HEADROOM
    found = {}
    for node, loss in losses.items():
        if not loss.peak <= limit:
            found[node] = "measured: near the end of the range"
        elif not loss.sqnr >= least_sqnr:
            found[node] = f"measured: SQNR below {least_sqnr:g} dB"
    return found


def _sqnr(signal: float, noise: float) -> float:
    """Return signal to noise in dB; NaN, where something became infinite, is no signal."""
    if noise == 0:
        return float("inf")
    if not np.isfinite(noise):
        return float("-inf")
    return 10 * float(np.log10(max(signal, 1e-300) / noise))


class _Meter:
    """Puts twins, and what compares them, into a copy of a model."""

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self._model, self._dtype = model, dtype
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._count = 0
        self._endless = self._number(-ENDLESS)
        self._zero = self._number(0.0)

    def gauge(self, node: ir.Node, ports: Ports) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return (signal, noise, peak) of the first output of a node that changes and is not left out."""
        inputs = list(node.inputs)
        for index in ports.inputs:
            value = inputs[index]
            assert value is not None, "a port that changes is there"
            inputs[index] = self._round(value)
        twin = self._add(node.op_type, inputs, list(node.attributes.values()), node.domain, len(node.outputs))
        for one, its_twin in zip(node.outputs, twin.outputs, strict=True):
            if one.name == "":  # left out: some kernels count the names
                its_twin.name = ""
        place = _first_output(node, ports)
        assert place is not None, "only nodes that have one are measured"
        own, other = node.outputs[place], self._round(twin.outputs[place])
        counts = self._add("Greater", [own, self._endless]).outputs[0]
        signal = self._kept(counts, own)
        noise = self._kept(counts, self._add("Sub", [own, other]).outputs[0])
        peak = self._add("ReduceMax", [self._add("Abs", [signal]).outputs[0]], [_no_dims()])
        return self._energy(signal), self._energy(noise), peak.outputs[0]

    def _energy(self, value: ir.Value) -> ir.Value:
        return self._add("ReduceSumSquare", [value], [_no_dims()]).outputs[0]

    def _kept(self, counts: ir.Value, value: ir.Value) -> ir.Value:
        return self._add("Where", [counts, value, self._zero]).outputs[0]

    def _round(self, value: ir.Value) -> ir.Value:
        if value not in self._rounded:
            narrow = self._add("Cast", [value], [ir.AttrInt64("to", int(self._dtype))])
            wide = self._add("Cast", [narrow.outputs[0]], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
            self._rounded[value] = wide.outputs[0]
        return self._rounded[value]

    def _number(self, number: float) -> ir.Value:
        content = ir.tensor(np.array(number, np.float32))
        return self._add("Constant", [], [ir.AttrTensor("value", content)]).outputs[0]

    def _add(
        self,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        attributes: list[ir.Attr] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        self._count += 1
        name = f"graphopt/gauge/{self._count}"
        node = ir.Node(domain, op_type, inputs, attributes or [], num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}/{index}"
        self._model.graph.append(node)
        return node


def _first_output(node: ir.Node, ports: Ports) -> int | None:
    """Return the first output that changes, or None; one that is left out has no name, but may have a type."""
    return next((index for index in ports.outputs if node.outputs[index].name), None)


def _no_dims() -> ir.Attr:
    return ir.AttrInt64("keepdims", 0)
