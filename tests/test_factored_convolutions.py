"""Convolutions in two or three pieces: at full rank they give what the one gave, whatever its attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import Context, Guarantee, Pass, shapes
from graphopt.errors import PassError
from graphopt.passes.analyses.linear_layers import LinearLayer, linear_layers
from graphopt.passes.lossy.convolution_forms import Division, Shape, Way, forms_of
from graphopt.passes.lossy.factored_convolutions import Convolution, candidate_of, put
from graphopt.passes.lossy.prune_aims import Aims
from graphopt.summary import count_macs, count_parameters, node_macs
from tests.pass_runs import PassRun, loaded, outputs_of, run_passes

SEEDS = range(24)
# Rows enough for moments to be believed.
MANY = 10**9


def on_first(proto: onnx.ModelProto, work: Any, data: Sequence[Mapping[str, Any]] | None = None) -> PassRun:
    """Do something with the first layer of a model, in a pass."""

    @dataclass(frozen=True)
    class Rewrite(Pass):
        name = "rewrite"
        guarantee = Guarantee.LOSSY

        def run(self, model: ir.Model, ctx: Context) -> None:
            shapes.infer_shapes(model)
            work(linear_layers(model)[0], ctx)

    return run_passes(loaded(proto), [Rewrite()], data=data)


def model_of(
    weight: np.ndarray, sizes: Sequence[int], *, op: str = "Conv", bias: bool = True, **attributes: Any
) -> onnx.ModelProto:
    """A model of one convolution, batch not fixed, with a Relu behind it."""
    groups = attributes.get("group", 1)
    channels = weight.shape[0] if op == "ConvTranspose" else weight.shape[1] * groups
    outputs = weight.shape[1] if op == "ConvTranspose" else weight.shape[0]
    tensors = [numpy_helper.from_array(weight, "w")]
    if bias:
        values = np.random.default_rng(9).standard_normal(outputs).astype(weight.dtype)
        tensors.append(numpy_helper.from_array(values, "b"))
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    inputs = ["x", "w", *(["b"] if bias else [])]
    nodes = [
        helper.make_node(op, inputs, ["made"], name="conv", **attributes),
        helper.make_node("Relu", ["made"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", channels, *sizes])],
        [helper.make_tensor_value_info("y", kind, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def drawn(seed: int) -> tuple[onnx.ModelProto, np.ndarray]:
    """A convolution with attributes at random, and something to feed it."""
    rng = np.random.default_rng(seed)
    rank, groups = 1 + seed % 3, int(rng.choice([1, 1, 2, 3]))
    outputs, inputs = groups * int(rng.integers(1, 5)), int(rng.integers(2, 5))
    kernel = [int(rng.integers(1, 4)) for _ in range(rank)]
    weight = rng.standard_normal((outputs, inputs, *kernel)).astype(np.float32)
    attributes: dict[str, Any] = {"group": groups} if groups > 1 or rng.random() < 0.3 else {}
    if rng.random() < 0.5:
        attributes["kernel_shape"] = kernel
    if rng.random() < 0.7:
        attributes["strides"] = [int(rng.integers(1, 4)) for _ in range(rank)]
    padding = rng.choice(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if padding == "pads":
        attributes["pads"] = [int(rng.integers(0, 3)) for _ in range(2 * rank)]
    elif padding != "none":
        attributes["auto_pad"] = str(padding)
    if rng.random() < 0.5 and not str(padding).startswith("SAME"):  # the runtime refuses both together
        attributes["dilations"] = [int(rng.integers(1, 3)) for _ in range(rank)]
    sizes = [int(rng.integers(7, 12)) for _ in range(rank)]
    proto = model_of(weight, sizes, bias=bool(rng.random() < 0.5), **attributes)
    return proto, rng.standard_normal((2, inputs * groups, *sizes)).astype(np.float32)


def full_way(form: Any, first: tuple[int, ...], shape: Shape) -> Way:
    """A form with ranks at which nothing is lost."""
    before = shape.inputs * int(np.prod([shape.kernel[axis] for axis in first]))
    behind = shape.outputs * int(np.prod([size for axis, size in enumerate(shape.kernel) if axis not in first]))
    return Way(form, (shape.inputs, shape.outputs) if form == "tucker" else (min(before, behind),), first)


def written(way: Way) -> Any:
    """What writes a layer in a way, judged plainly."""

    def work(layer: LinearLayer, ctx: Context) -> None:
        shape = Shape.of(layer)
        division = Division(shape, way.first, layer.matrix(), None)
        with ctx.rewriter.edit("factorize", layer.node):
            put(layer, way, division.solve(way), ctx)

    return work


def shape_in(proto: onnx.ModelProto) -> Shape:
    found: list[Shape] = []
    on_first(proto, lambda layer, _: found.append(Shape.of(layer)))
    return found[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_at_full_rank_every_form_gives_what_the_convolution_gave(seed: int) -> None:
    proto, x = drawn(seed)
    wanted = outputs_of(proto, {"x": x})["y"]
    shape = shape_in(proto)
    forms = forms_of(shape, "auto")
    assert forms
    for form, first in forms:
        way = full_way(form, first, shape)
        run = on_first(proto, written(way))
        found = outputs_of(run.model, {"x": x})["y"]
        assert found.shape == wanted.shape, (form, first)
        np.testing.assert_allclose(
            found, wanted, atol=2e-4 * np.abs(wanted).max(initial=1e-3), err_msg=f"{form} {first}"
        )
        nodes = list(run.model.graph)
        assert [node.op_type for node in nodes] == ["Conv"] * (3 if form == "tucker" else 2) + ["Relu"]
        # The operator itself is the last of them.
        assert nodes[-2].name == "conv"
        assert nodes[-2].outputs[0].name == "made"
        assert "w" not in run.model.graph.initializers
        assert ("b" in run.model.graph.initializers) == (len(proto.graph.initializer) == 2)
        assert nodes[0].name != "conv"


@pytest.mark.parametrize("seed", range(6))
def test_costs_are_those_of_the_written_model(seed: int) -> None:
    proto, _ = drawn(seed)
    shape = shape_in(proto)
    for form, first in forms_of(shape, "auto"):
        ranks = (2, 1) if form == "tucker" else (1,)
        way = Way(form, ranks, first)
        run = on_first(proto, written(way))
        pieces = way.pieces(shape)
        biases = proto.graph.initializer[1].dims[0] if len(proto.graph.initializer) == 2 else 0
        assert count_parameters(run.model) - biases == shape.parameters(pieces)
        assert count_macs(run.model) == shape.macs(pieces)


@pytest.mark.parametrize("attributes", [{}, {"strides": [2, 2], "output_padding": [1, 0], "pads": [1, 0, 0, 1]}])
def test_a_transposed_convolution_reads_fewer_channels(attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 6, 3, 2)).astype(np.float32)
    proto = model_of(weight, (5, 6), op="ConvTranspose", **attributes)
    x = rng.standard_normal((2, 4, 5, 6)).astype(np.float32)
    wanted = outputs_of(proto, {"x": x})["y"]
    run = on_first(proto, written(Way("input", (4,), ())))
    assert [node.op_type for node in run.model.graph] == ["Conv", "ConvTranspose", "Relu"]
    np.testing.assert_allclose(outputs_of(run.model, {"x": x})["y"], wanted, atol=1e-4)
    narrow = on_first(proto, written(Way("input", (2,), ()))).model
    assert outputs_of(narrow, {"x": x})["y"].shape == wanted.shape


def test_half_precision_stays() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float16)
    run = on_first(model_of(weight, (6, 6)), written(Way("spatial", (2,), (0,))))
    dtypes = {value.dtype for value in run.model.graph.initializers.values()}
    assert dtypes == {ir.DataType.FLOAT16}


def low_rank_model(seed: int) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """A 3×3 convolution whose weight is nearly spatial, and samples in which channels go together."""
    rng = np.random.default_rng(seed)
    weight = np.einsum("oqj,qci->ocij", rng.standard_normal((16, 6, 3)), rng.standard_normal((6, 16, 3)))
    weight = (weight + 0.2 * rng.standard_normal(weight.shape)).astype(np.float32)
    mix = rng.standard_normal((16, 16)) * np.logspace(0, -1, 16)[:, None]
    samples = [{"x": np.einsum("nchw,cd->ndhw", rng.standard_normal((1, 16, 9, 9)), mix).astype(np.float32)}]
    samples += [{"x": np.roll(samples[0]["x"], at, -1)} for at in range(3)]
    return model_of(weight, (9, 9), pads=[1, 1, 1, 1]), samples


def test_levels_lose_what_the_written_model_loses() -> None:
    proto, samples = low_rank_model(0)
    x = np.concatenate([sample["x"] for sample in samples])
    before = outputs_of(without_relu(proto), {"x": x})["made"]
    spread = before - before.mean(axis=(0, 2, 3), keepdims=True)

    def work(layer: LinearLayer, ctx: Context) -> None:
        candidate = candidate_of(layer, "auto", "whitened", ctx)
        assert isinstance(candidate, Convolution)
        with Aims(ctx) as aims:
            target = aims.of(layer).target  # type: ignore[union-attr]
            moments = _Seen(target.second, target.covariance, target.mean, MANY)
            curve = candidate.curve(giving(moments), ctx)
            assert curve.levels[0].form == "whole"
            assert curve.levels[0].macs == node_macs(layer.node)
            level = next(one for one in curve.levels if one.form == form)
            place = list(curve.levels).index(level)
            near = curve.approximate(place)
            assert set(near) == {"w", "b"}
            assert near["w"].shape == layer.dims
            lost.append((level, candidate.apply(level, aims, ctx)))

    for form in ("channel", "input", "spatial", "tucker"):
        lost: list[Any] = []
        run = on_first(without_relu(proto), work, data=samples)
        after = outputs_of(run.model, {"x": x})["made"]
        measured = np.square(after - before).mean() / np.square(spread).mean()
        level, share = lost[0]
        assert count_macs(run.model) == level.macs
        assert share == pytest.approx(measured, rel=0.5), form  # steadied, as there are few samples
        assert level.error == pytest.approx(measured, rel=0.25), form
        # The bias takes what the mean has lost.
        np.testing.assert_allclose(after.mean(axis=(0, 2, 3)), before.mean(axis=(0, 2, 3)), atol=1e-3)


@dataclass(frozen=True)
class _Seen:
    second: np.ndarray
    covariance: np.ndarray
    mean: np.ndarray
    rows: int


def giving(moments: _Seen) -> Any:
    """What tells of any layer that this is what it reads."""
    return lambda _: moments


def without_relu(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with what the convolution gives as its output."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    del found.graph.node[1:]
    found.graph.output[0].CopyFrom(helper.make_tensor_value_info("made", TensorProto.FLOAT, ["batch", 16, 9, 9]))
    return found


def reason(proto: onnx.ModelProto, form: str = "auto") -> str:
    found: list[Any] = []
    on_first(proto, lambda layer, ctx: found.append(candidate_of(layer, form, "svd", ctx)))
    return found[0] if isinstance(found[0], str) else ""


def test_what_is_left_says_why() -> None:
    def ones(*dims: int) -> np.ndarray:
        return np.ones(dims, np.float32)

    assert "depthwise" in reason(model_of(ones(8, 1, 3, 3), (6, 6), group=8))
    assert "in groups" in reason(model_of(ones(4, 4, 3, 3), (6, 6), op="ConvTranspose", bias=False, group=2))
    assert "form `spatial`" in reason(model_of(ones(32, 32, 1, 1), (6, 6)), "spatial")
    assert "no smaller" in reason(model_of(ones(2, 1, 1, 1), (6, 6)))
    shared = model_of(ones(16, 16, 3, 3), (6, 6), bias=False, pads=[1, 1, 1, 1])
    shared.graph.node.append(helper.make_node("Conv", ["y", "w"], ["z"], name="again"))
    shared.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    assert "share their weight" in reason(shared)
    assert not reason(model_of(ones(16, 16, 3, 3), (6, 6)))


def test_few_rows_do_not_make_a_layer_seem_of_low_rank() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 40))
    second = (rows.T @ rows / 6)[None].astype(np.float32)
    proto = model_of(rng.standard_normal((32, 40, 1, 1)).astype(np.float32), (1, 1))
    lost: dict[int, float] = {}

    def work(layer: LinearLayer, ctx: Context) -> None:
        for count in (6, MANY):
            candidate = candidate_of(layer, "auto", "whitened", ctx)
            assert isinstance(candidate, Convolution)
            moments = _Seen(second, second, np.zeros((1, 40)), count)
            levels = candidate.curve(giving(moments), ctx).levels
            lost[count] = next(level.error for level in levels if level.ranks == (8,))

    on_first(proto, work)
    assert lost[MANY] < 1e-6
    assert lost[6] > 0.1


def test_nan_is_refused() -> None:
    weight = np.full((16, 16, 3, 3), np.nan, np.float32)

    def work(layer: LinearLayer, ctx: Context) -> None:
        candidate = candidate_of(layer, "auto", "svd", ctx)
        assert isinstance(candidate, Convolution)
        candidate.curve(lambda _: None, ctx)

    with pytest.raises(PassError, match="weight `w` holds NaN"):
        on_first(model_of(weight, (6, 6)), work)


@pytest.mark.parametrize("form", ["auto", "channel", "spatial", "tucker"])
def test_factorize_takes_convolutions(form: str) -> None:
    proto, samples = low_rank_model(1)
    # 16 columns by rows are two thirds of the weights, and hold all but noise of this one; other forms lose some.
    run = run_passes(loaded(proto), f"factorize:params=0.67:form={form}", data=samples)
    assert count_parameters(run.model) - 16 <= 0.67 * 16 * 16 * 9
    convolutions = [node for node in run.model.graph if node.op_type == "Conv"]
    assert len(convolutions) in (2, 3)
    wanted, found = (outputs_of(model, samples[0])["y"] for model in (proto, run.model))
    lost = np.square(found - wanted).mean() / np.square(wanted).mean()
    assert lost < (0.01 if form in ("auto", "spatial") else 0.2)
