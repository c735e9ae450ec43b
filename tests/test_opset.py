"""Opset up-conversion: every change of meaning is known, and what is converted computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import PassError
from graphopt.passes.exact.opset import NEWEST, OLDEST
from graphopt.passes.exact.opset_adapters import ADAPTERS
from graphopt.passes.exact.opset_history import incompatible, types_lost, versions
from graphopt.verify import fingerprint, verify

from .node_cases import agrees, node_cases, run
from .pass_runs import loaded, outputs_of, run_passes, to_bytes

# The newest opset ONNX Runtime 1.31 runs.
RUNS = 26
# Versions of these that take fewer types than the one before: refused where the dtype is such a one.
LOSE_TYPES = {("Erf", 13), ("Dropout", 10), ("ReduceLogSum", 28), ("ReduceLogSumExp", 28)}
DRAWS = 12


def operators() -> list[str]:
    return sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""})


def every_version() -> dict[tuple[str, int], tuple[Any, Any]]:
    """Return every version of every operator from the oldest opset up to what the installed onnx has."""
    newest = onnx.defs.onnx_opset_version()
    return {
        (name, new.since_version): (old, new) for name in operators() for old, new in versions(name, OLDEST, newest)
    }


def test_every_incompatible_version_has_an_adapter() -> None:
    """A release of onnx with a new breaking change fails here, until someone writes its adapter."""
    breaking = {key: incompatible(*pair) for key, pair in every_version().items()}
    missing = {key: why for key, why in breaking.items() if why is not None and key not in ADAPTERS}
    assert not missing
    assert {key for key, pair in every_version().items() if any(types_lost(*pair))} == LOSE_TYPES


def test_every_adapter_is_of_a_version_there_is() -> None:
    assert {key for key in ADAPTERS if key[1] <= onnx.defs.onnx_opset_version()} <= every_version().keys()
    assert max(opset for _, opset in ADAPTERS) <= NEWEST


def test_comparison_of_schemas_sees_what_it_should() -> None:
    pairs = every_version()
    assert incompatible(*pairs["Clip", 12]) is None
    assert incompatible(*pairs["BatchNormalization", 15]) is None
    assert incompatible(*pairs["Attention", 24]) is None
    assert incompatible(*pairs["Resize", 11]) == "its inputs are others"
    assert incompatible(*pairs["Softmax", 13]) == "attribute `axis` has another default"
    assert incompatible(*pairs["Upsample", 10]) == "it is deprecated"


# Each adapter, on drawn attributes


@dataclass
class Draw:
    """A node of an old opset: its attributes, and its inputs, some of them constants."""

    op_type: str
    opset: int
    inputs: dict[str, np.ndarray]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    constants: Sequence[str] = ()
    dynamic: bool = False

    def model(self) -> onnx.ModelProto:
        names = [f"y{index}" for index in range(self.outputs)]
        given = {name: value for name, value in self.attributes.items() if value is not None}
        node = helper.make_node(self.op_type, list(self.inputs), names, name="node", **given)
        ports = [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(array.dtype),
                [f"{name}{axis}" if self.dynamic else size for axis, size in enumerate(array.shape)],
            )
            for name, array in self.inputs.items()
            if name not in self.constants
        ]
        held = [numpy_helper.from_array(self.inputs[name], name) for name in self.constants]
        dtypes = [helper.np_dtype_to_tensor_dtype(self.inputs["x"].dtype), TensorProto.INT64]
        if self.op_type == "Split":
            dtypes[1] = dtypes[0]
        results = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in zip(names, dtypes, strict=False)]
        graph = helper.make_graph([node], "drawn", ports, results, held)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def feed(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.inputs.items() if name not in self.constants}


Rng = np.random.Generator


def floats(rng: Rng, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def pick(rng: Rng, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def sizes(rng: Rng, rank: int) -> list[int]:
    return [int(size) for size in rng.integers(1, 5, rank)]


def some_axes(rng: Rng, rank: int) -> list[int]:
    return sorted(int(axis) for axis in rng.permutation(rank)[: rng.integers(1, rank + 1)])


def softmax(op_type: str) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        rank = int(rng.integers(1, 5))
        x = floats(rng, *(pick(rng, 1, size) for size in sizes(rng, rank)))
        axis = pick(rng, *range(rank), *([None] if rank > 1 else []), -1, -rank)
        opset = 11 if axis is not None and axis < 0 else pick(rng, 7, 11, 12)
        return Draw(op_type, opset, {"x": x}, {"axis": axis}, dynamic=pick(rng, True, False))

    return draw


def reduction(op_type: str, newest: int) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        rank = int(rng.integers(1, 5))
        x = np.abs(floats(rng, *sizes(rng, rank))) + np.float32(0.1)
        axes = pick(rng, None, some_axes(rng, rank), [-1])
        opset = pick(rng, 11, newest) if axes and axes[0] < 0 else pick(rng, 7, newest)
        return Draw(op_type, opset, {"x": x}, {"axes": axes, "keepdims": pick(rng, None, 0, 1)})

    return draw


def squeeze(rng: Rng) -> Draw:
    shape = [1, *sizes(rng, 2), 1, 1]
    axes = pick(rng, None, [0], [0, 3], [3, 4])
    return Draw("Squeeze", pick(rng, 7, 11, 12), {"x": floats(rng, *shape)}, {"axes": axes})


def unsqueeze(rng: Rng) -> Draw:
    return Draw("Unsqueeze", pick(rng, 7, 12), {"x": floats(rng, 2, 3)}, {"axes": pick(rng, [0], [1, 3], [0, 1, 2])})


def clip(rng: Rng) -> Draw:
    x = np.append(floats(rng, 9), [np.inf, -np.inf, np.nan, -0.0]).astype(np.float32)
    return Draw("Clip", pick(rng, 7, 10), {"x": x}, {"min": pick(rng, None, -0.5, 0.0), "max": pick(rng, None, 0.7)})


def pad(rng: Rng) -> Draw:
    mode = pick(rng, None, "constant", "edge", "reflect")
    pads = [int(one) for one in rng.integers(-1 if mode in (None, "constant") else 0, 2, 4)]
    value = pick(rng, None, 1.5, -0.0)
    dtype = pick(rng, np.float32, np.float64)
    return Draw(
        "Pad", pick(rng, 7, 10), {"x": floats(rng, 3, 4, dtype=dtype)}, {"mode": mode, "pads": pads, "value": value}
    )


def slices(rng: Rng) -> Draw:
    axes = pick(rng, None, [0, 1], [1, 0])
    starts, ends = ([int(one) for one in rng.integers(*span, 2)] for span in ((-4, 2), (1, 9)))
    return Draw("Slice", pick(rng, 7, 9), {"x": floats(rng, 4, 5)}, {"starts": starts, "ends": ends, "axes": axes})


def top_k(rng: Rng) -> Draw:
    attributes = {"k": int(rng.integers(1, 4)), "axis": pick(rng, None, 0, 1)}
    return Draw("TopK", pick(rng, 7, 9), {"x": floats(rng, 4, 5)}, attributes, outputs=2)


def dropout(rng: Rng) -> Draw:
    return Draw("Dropout", pick(rng, 7, 10, 11), {"x": floats(rng, 4)}, {"ratio": pick(rng, None, 0.3)})


def split(rng: Rng) -> Draw:
    opset = pick(rng, 7, 11, 13)
    parts = pick(rng, None, [1, 5]) if opset < 13 else None
    return Draw("Split", opset, {"x": floats(rng, 6, 2)}, {"axis": pick(rng, None, 0), "split": parts}, outputs=2)


def upsample(rng: Rng) -> Draw:
    scales = [1.0, 1.0, pick(rng, 1.0, 1.5, 2.0, 2.7), pick(rng, 1.0, 2.0, 3.3)]
    mode = pick(rng, None, "nearest", "linear")
    x = floats(rng, 1, 2, 3, 4)
    if rng.random() < 0.5:
        return Draw("Upsample", pick(rng, 7, 8), {"x": x}, {"scales": scales, "mode": mode})
    constants = pick(rng, ["scales"], [])
    return Draw("Upsample", 9, {"x": x, "scales": np.array(scales, np.float32)}, {"mode": mode}, constants=constants)


def resize_10(rng: Rng) -> Draw:
    factors = pick(rng, (1.0, 1.5, 2.0, 3.3), (0.3, 0.5, 0.8, 1.0))
    scales = np.array([1.0, 1.0, pick(rng, *factors), pick(rng, *factors)], np.float32)
    mode = pick(rng, None, "nearest", "linear")
    return Draw("Resize", 10, {"x": floats(rng, 1, 1, 5, 6), "scales": scales}, {"mode": mode}, constants=["scales"])


def resize_11(rng: Rng) -> Draw:
    inputs = {
        "x": floats(rng, 1, 1, 4, 5),
        "roi": np.zeros(0, np.float32),
        "scales": np.zeros(0, np.float32),
        "sizes": np.array([1, 1, pick(rng, 3, 7), pick(rng, 2, 9)], np.int64),
    }
    if rng.random() < 0.5:
        inputs["scales"] = np.array([1, 1, pick(rng, 0.6, 1.7), pick(rng, 0.5, 2)], np.float32)
        del inputs["sizes"]
    attributes = {
        "mode": pick(rng, None, "nearest", "linear", "cubic"),
        "coordinate_transformation_mode": pick(rng, None, "align_corners", "asymmetric", "pytorch_half_pixel"),
        "nearest_mode": pick(rng, None, "ceil", "floor"),
    }
    return Draw(
        "Resize", pick(rng, 11, 12), inputs, attributes, constants=["roi", "scales", "sizes"][: len(inputs) - 1]
    )


def roi_align(rng: Rng) -> Draw:
    inputs = {
        "x": floats(rng, 1, 2, 6, 6),
        "rois": np.array([[0, 0, 4, 4], [1, 1.5, 5, 3]], np.float32),
        "batch": np.zeros(2, np.int64),
    }
    return Draw("RoiAlign", 10, inputs, {"output_height": 2, "output_width": 3, "sampling_ratio": 2})


def dft(rng: Rng) -> Draw:
    attributes = {"axis": pick(rng, None, 1, 2), "onesided": pick(rng, None, 1)}
    return Draw("DFT", 17, {"x": floats(rng, 2, 4, 8, 1)}, attributes)


def grid_sample(rng: Rng) -> Draw:
    mode = pick(rng, None, "bilinear", "bicubic", "nearest")
    inputs = {"x": floats(rng, 1, 1, 4, 4), "grid": floats(rng, 1, 3, 2, 2)}
    return Draw("GridSample", 16, inputs, {"mode": mode, "align_corners": pick(rng, None, 1)})


def scatter(rng: Rng) -> Draw:
    inputs = {"x": floats(rng, 3, 3), "at": rng.permutation(3)[None, :].astype(np.int64), "to": floats(rng, 1, 3)}
    return Draw("Scatter", pick(rng, 9, 10), inputs, {"axis": pick(rng, None, 0, 1)})


def batch_normalization(rng: Rng) -> Draw:
    inputs = {"x": floats(rng, 2, 3, 4), **{name: np.abs(floats(rng, 3)) for name in ("s", "b", "m", "v")}}
    opset = pick(rng, 7, 9, 13)
    return Draw("BatchNormalization", opset, inputs, {"spatial": 1 if opset == 7 else None})


DRAWN: dict[str, Callable[[Rng], Draw]] = {
    **{op_type: softmax(op_type) for op_type in ("Softmax", "LogSoftmax", "Hardmax")},
    **{f"Reduce{kind}": reduction(f"Reduce{kind}", 17) for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean")},
    **{f"Reduce{kind}": reduction(f"Reduce{kind}", 17) for kind in ("Min", "Prod", "SumSquare")},
    "ReduceSum": reduction("ReduceSum", 12),
    "BatchNormalization": batch_normalization,
    "Clip": clip,
    "DFT": dft,
    "Dropout": dropout,
    "GridSample": grid_sample,
    "Pad": pad,
    "Resize": resize_10,
    "Resize of opset 11": resize_11,
    "RoiAlign": roi_align,
    "Scatter": scatter,
    "Slice": slices,
    "Split": split,
    "Squeeze": squeeze,
    "TopK": top_k,
    "Unsqueeze": unsqueeze,
    "Upsample": upsample,
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_nodes_compute_the_same_bits(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        drawn = DRAWN[name](rng)
        to = int(rng.choice([opset for opset in (10, 11, 13, 14, 18, 21) if opset > drawn.opset]))
        before = drawn.model()
        converted = run_passes(loaded(before), f"opset:to={to}")
        after = ir.to_proto(converted.model)
        assert after.opset_import[0].version == to
        assert len(converted.edits) == 1
        verify(converted.model)
        first, second = outputs_of(before, drawn.feed()), outputs_of(after, drawn.feed())
        for one, other in zip(first.values(), second.values(), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), drawn
            assert one.tobytes() == other.tobytes(), (drawn, one, other)


def test_every_adapter_is_drawn_or_refuses() -> None:
    """GroupNormalization of opset 18 runs nowhere, and Scan of opset 8 is refused; both have tests of their own."""
    drawn = {name.partition(" ")[0] for name in DRAWN}
    assert {name for name, _ in ADAPTERS} - drawn == {"GroupNormalization", "Scan"}


# Whole models


FUNCTION = """
<ir_version: 8, opset_import: ["" : 13, "own" : 1]>
main (float[2, 3, 4] x) => (float[2, 1, 4] y) { y = own.mean (x) }
<domain: "own", opset_import: ["" : 13]>
mean (a) => (b) { b = ReduceMean <axes = [1]> (a) }
"""
NESTED = """
<ir_version: 8, opset_import: ["" : 12]>
main (bool c, float[2, 3] x) => (float[N, M] y) {
    y = If (c) <
        then_branch = yes () => (float[N, M] a) {
            s = Unsqueeze <axes = [0]> (x)
            t = Squeeze <axes = [0]> (s)
            a = Relu (t)
        },
        else_branch = no () => (float[N, M] b) { b = Softmax <axis = 0> (x) }
    >
}
"""


@pytest.mark.parametrize("text", [FUNCTION, NESTED], ids=["function", "nested"])
def test_functions_and_nested_graphs_are_converted(text: str) -> None:
    before = onnx.parser.parse_model(text)
    converted = run_passes(loaded(before), "opset:to=20")
    after = ir.to_proto(converted.model)
    onnx.checker.check_model(after, full_check=True)
    assert [function.opset_import[0].version for function in after.functions] == [20] * len(before.functions)
    sizes_of_x = [dim.dim_value for dim in before.graph.input[-1].type.tensor_type.shape.dim]
    x = floats(np.random.default_rng(0), *sizes_of_x)
    for c in (True, False):
        feed = {"x": x, "c": np.array(c)}
        feed = {port.name: feed[port.name] for port in before.graph.input}
        assert outputs_of(before, feed)["y"].tobytes() == outputs_of(after, feed)["y"].tobytes()


def test_ir_version_rises_where_the_opset_asks_for_it() -> None:
    for to, ir_version in ((20, 9), (21, 10)):
        converted = run_passes(loaded(onnx.parser.parse_model(FUNCTION)), f"opset:to={to}")
        assert converted.model.ir_version == ir_version


def test_a_model_of_the_opset_is_left() -> None:
    model = loaded(onnx.parser.parse_model(FUNCTION))
    before = to_bytes(model)
    converted = run_passes(model, "opset:to=13")
    assert not converted.edits
    assert converted.remarks == ["nothing is older than opset 13"]
    assert to_bytes(converted.model) == before


def test_by_default_nothing_goes_down() -> None:
    text = FUNCTION.replace('"" : 13', '"" : 23').replace("ReduceMean <axes = [1]> (a)", "ReduceMean (a)")
    assert not run_passes(loaded(onnx.parser.parse_model(text)), "opset").edits


def test_custom_operators_and_domains_are_left() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 11, "com.microsoft" : 1]>
    main (float[2, 3] x) => (float[N, M] y) { s = com.microsoft.Gelu (x) y = Softmax <axis = -1> (s) }
    """
    after = run_passes(loaded(onnx.parser.parse_model(text)), "opset:to=18").model
    assert dict(after.opset_imports) == {"": 18, "com.microsoft": 1}
    assert [node.op_type for node in after.graph] == ["Gelu", "Softmax"]


def test_group_normalization_gets_its_scale_per_channel() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    main (float[N, C, W] x, float[2] scale, float[2] bias) => (float[N, C, W] y) {
        y = GroupNormalization <num_groups = 2> (x, scale, bias)
    }
    """
    after = ir.to_proto(run_passes(loaded(onnx.parser.parse_model(text)), "opset:to=21").model)
    onnx.checker.check_model(after, full_check=True)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    scale, bias = rng.standard_normal((2, 2)).astype(np.float32)
    groups = x.reshape(3, 2, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    expected = (normal * scale[:, None] + bias[:, None]).reshape(x.shape)
    assert np.allclose(outputs_of(after, {"x": x, "scale": scale, "bias": bias})["y"], expected, atol=1e-5)


# What is refused, with the model as it was


REFUSED = {
    "down": (
        '<ir_version: 8, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu (x) }',
        13,
        "upwards",
    ),
    "before 7": (
        '<ir_version: 3, opset_import: ["" : 6]> g (float[2] x) => (float[2] y) { y = Add (x, x) }',
        13,
        "Add of opset 6 cannot become that of opset 7: changes up to opset 7 are not known",
    ),
    "unknown opset": (
        '<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y) { y = Relu (x) }',
        99,
        "not known",
    ),
    "spatial": (
        """<ir_version: 8, opset_import: ["" : 7]> g (float[2, 3] x, float[3] s) => (float[2, 3] y)
        { r = Relu (x) y = BatchNormalization <spatial = 0> (r, s, s, s, s) }""",
        13,
        r"BatchNormalization of opset 7 cannot become that of opset 9: it normalizes each element",
    ),
    "training": (
        """<ir_version: 8, opset_import: ["" : 9]> g (float[2, 3] x, float[3] s) => (float[2, 3] y)
        { y, m, v, a, b = BatchNormalization (x, s, s, s, s) }""",
        14,
        "training mode",
    ),
    "mask": (
        """<ir_version: 8, opset_import: ["" : 10]> g (float[2] x) => (float[2] y, bool[2] m)
        { y, m = Dropout (x) }""",
        13,
        "its mask is read",
    ),
    "mixed scales": (
        """<ir_version: 8, opset_import: ["" : 10]> g (float[1, 1, 4, 4] x) => (float[N, C, H, W] y)
        <float[4] s = {1, 1, 0.5, 2}> { y = Resize (x, s) }""",
        13,
        "shrinks some axes",
    ),
    "varying scales": (
        """<ir_version: 8, opset_import: ["" : 10]> g (float[1, 1, 4, 4] x, float[4] s) => (float[N, C, H, W] y)
        { y = Resize (x, s) }""",
        13,
        "scales vary",
    ),
    "coordinates": (
        """<ir_version: 8, opset_import: ["" : 11]> g (float[1, 1, 4, 4] x, float[0] r) => (float[N, C, H, W] y)
        <float[4] s = {1, 1, 2, 2}>
        { y = Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn"> (x, r, s) }""",
        13,
        "tf_half_pixel_for_nn",
    ),
    "integers": (
        '<ir_version: 8, opset_import: ["" : 9]> g (int32[2] x) => (int32[2] y) { y = Erf (x) }',
        13,
        "takes no int32",
    ),
    "reference": (
        """<ir_version: 8, opset_import: ["" : 12, "own" : 1]>
        g (float[2, 3] x) => (float[N, M] y) { y = own.f <axis = 1> (x) }
        <domain: "own", opset_import: ["" : 12]> f <axis> (a) => (b) { b = Softmax <axis: int = @axis> (a) }""",
        13,
        "`axis` is one of a function",
    ),
    "no operator": (
        '<ir_version: 8, opset_import: ["" : 9]> g (float[2] x) => (float[2] y) { y = Affine (x) }',
        13,
        "no operator `Affine`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_node_and_leave_the_model(name: str) -> None:
    text, to, message = REFUSED[name]
    model = loaded(onnx.parser.parse_model(text))
    before = fingerprint(model)
    with pytest.raises(PassError, match=message) as refused:
        run_passes(model, f"opset:to={to}")
    assert refused.value.hint
    assert fingerprint(model) == before


def test_change_without_an_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.exact.opset.ADAPTERS", {})
    model = loaded(onnx.parser.parse_model(NESTED))
    before = fingerprint(model)
    with pytest.raises(PassError, match="attribute `axes` is gone, and no adapter is known") as refused:
        run_passes(model, "opset:to=13")
    assert "opset:to=12" in (refused.value.hint or "")
    assert fingerprint(model) == before


def test_models_before_opset_7_are_converted_where_nothing_changed_since() -> None:
    text = '<ir_version: 3, opset_import: ["" : 6]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    assert run_passes(loaded(onnx.parser.parse_model(text)), "opset:to=13").model.opset_imports[""] == 13


# ONNX's own cases


def test_node_cases_of_older_opsets_are_right_in_the_newest() -> None:
    """Each case is said to be of each older opset it is valid in; ONNX Runtime's result before must be that after.

    AveragePool has another kernel there from opset 19 on, which rounds otherwise.
    """
    wrong, ran = [], 0
    for case in node_cases()[::10]:
        for before in _older(case.model):
            if not agrees(run(before, case.inputs), case):
                continue
            after = ir.to_proto(run_passes(loaded(before), "opset:to=21").model)
            ran += 1
            if not agrees(run(after, case.inputs), case):
                wrong.append((case.name, before.opset_import[0].version))
    assert not wrong
    assert ran > 50


def _older(model: onnx.ModelProto) -> list[onnx.ModelProto]:
    """Return the model as one of opset 7 and of the first opset with each version of its operators."""
    ops = {node.op_type for node in model.graph.node}
    current = model.opset_import[0].version
    opsets = {OLDEST, *(old.since_version for op in ops for old, _ in versions(op, OLDEST, current))}
    found = []
    for opset in sorted(one for one in opsets if OLDEST <= one < min(current, 21)):
        older = onnx.ModelProto()
        older.CopyFrom(model)
        older.opset_import[0].version = opset
        try:
            onnx.checker.check_model(older, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            continue
        found.append(older)
    return found
