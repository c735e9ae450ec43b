"""Shrinking: what is left of a model computes what the model does with the removed channels zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import shapes, walk
from graphopt.errors import PassCrash
from graphopt.passes.lossy.cuts import Cuts
from graphopt.passes.lossy.shrinking import shrink
from graphopt.passes.lossy.shrunk_attributes import mend_attributes
from graphopt.passes.lossy.shrunk_shapes import Mending

pytest.importorskip("onnxruntime")

from .removed_channels import by_hand, check_removal, context, feed_of, parsed, removed, values_of

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g '


def model_of(body: str, opset: int = 17) -> ir.Model:
    return parsed(HEAD.format(opset=opset) + body)


def dims(model: ir.Model, name: str) -> list[int | None]:
    shapes.infer_shapes(model)
    found = shapes.dims_of(values_of(model)[name])
    assert found is not None
    return [dim if isinstance(dim, int) else None for dim in found]


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in walk.every_node(model) if node.op_type == op_type)


def numbers(value: ir.Value | None) -> list[int]:
    tensor = walk.constant_tensor(value)
    assert tensor is not None
    return [int(number) for number in tensor.numpy().reshape(-1)]


def test_residual_with_batch_norm_and_squeeze_excite() -> None:
    model = model_of("""(float[N,3,6,6] x) => (float[N,4,3,3] y)
    <float[8,3,3,3] w0, float[8] b0, float[8] s, float[8] t, float[8] m, float[8] var,
     float[8,8,3,3] w1, float[2,8,1,1] d0, float[8,2,1,1] u0, float[4,8,1,1] w2> {
      a = Conv<pads=[1,1,1,1]>(x, w0, b0)
      b = Conv<pads=[1,1,1,1]>(a, w1)
      c = BatchNormalization(b, s, t, m, var)
      p = GlobalAveragePool(c)
      d = Conv(p, d0)
      r = Relu(d)
      u = Conv(r, u0)
      e = Sigmoid(u)
      f = Mul(c, e)
      h = Add(a, f)
      q = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)
      y = Conv(q, w2)
    }""")
    on_0 = ["w0", "b0", "s", "t", "m", "var", "w1", "u0"]
    on_1 = ["a", "w1", "b", "c", "p", "d0", "u", "e", "f", "h", "q", "w2"]
    axes = {(name, 0): None for name in on_0} | {(name, 1): None for name in on_1}
    inner = by_hand(model, 2, {("d0", 0): None, ("d", 1): None, ("r", 1): None, ("u0", 1): None})
    stream = by_hand(model, 8, axes)
    feed = feed_of(model)
    check_removal(model, {stream: removed(8, 1, 4, 5), inner: removed(2, 0)}, feed)
    assert dims(model, "w1") == [5, 5, 3, 3]
    assert dims(model, "d0") == [1, 5, 1, 1]


def test_depthwise_then_flatten_then_gemm() -> None:
    model = model_of("""(float[N,3,6,6] x) => (float[N,5] y)
    <float[6,3,3,3] w0, float[6] b0, float[12,1,3,3] w1, float[12] b1, float[5,48] w2, float[5] b2,
     int64[2] shape = {-1, 48}> {
      a = Conv(x, w0, b0)
      b = Relu(a)
      c = Conv<group=6>(b, w1, b1)
      f = Reshape(c, shape)
      y = Gemm<transB=1>(f, w2, b2)
    }""")
    group = by_hand(
        model,
        6,
        {("w0", 0): None, ("b0", 0): None, ("a", 1): None, ("b", 1): None}
        | {(name, axis): np.repeat(np.arange(6), 2) for name, axis in (("w1", 0), ("b1", 0), ("c", 1))}
        | {("f", 1): np.repeat(np.arange(6), 8), ("w2", 1): np.repeat(np.arange(6), 8)},
    )
    check_removal(model, {group: removed(6, 0, 3)}, feed_of(model))
    assert node_of(model, "Gemm").inputs[0] is values_of(model)["f"]
    conv = next(node for node in model.graph if "group" in node.attributes)
    assert conv.attributes["group"].as_int() == 4
    assert dims(model, "w2") == [5, 32]


@pytest.mark.parametrize(
    ("op", "side"), [(op, side) for op in ("Conv", "ConvTranspose") for side in ("major", "minor")]
)
def test_grouped_convolutions(op: str, side: str) -> None:
    weight = "float[6,4,3,3] w1" if op == "ConvTranspose" else "float[8,3,3,3] w1"
    model = model_of(f"""(float[N,3,6,6] x) => (float[N,5,?,?] y)
    <float[6,3,1,1] w0, {weight}, float[8] b1, float[5,8,1,1] w2> {{
      a = Conv(x, w0)
      b = {op}<group=2>(a, w1, b1)
      y = Conv(b, w2)
    }}""")
    transposed = op == "ConvTranspose"
    if side == "major":
        inputs, outputs = np.repeat([0, 1], 3), np.repeat([0, 1], 4)
        both = {("w0", 0): inputs, ("a", 1): inputs, ("b", 1): outputs, ("b1", 0): outputs, ("w2", 1): outputs}
        both[("w1", 0)] = inputs if transposed else outputs
        kept = {by_hand(model, 2, both): removed(2, 0)}
    else:
        inputs, outputs = np.tile(np.arange(3), 2), np.tile(np.arange(4), 2)
        first = {("w0", 0): inputs, ("a", 1): inputs, ("w1", 0 if transposed else 1): inputs if transposed else None}
        second = {("b", 1): outputs, ("b1", 0): outputs, ("w2", 1): outputs}
        second[("w1", 1 if transposed else 0)] = None if transposed else outputs
        kept = {by_hand(model, 3, first): removed(3, 1), by_hand(model, 4, second): removed(4, 0, 2)}
    check_removal(model, kept, feed_of(model))
    conv = next(node for node in model.graph if "group" in node.attributes)
    assert conv.attributes["group"].as_int() == (1 if side == "major" else 2)


def test_concat_and_split_and_shuffle() -> None:
    model = model_of("""(float[N,3,6,6] x) => (float[N,4,6,6] y)
    <float[4,3,1,1] w0, float[4,3,1,1] w1, float[4,4,1,1] w2, float[4,8,1,1] w3,
     int64[5] apart = {0,2,4,6,6}, int64[4] together = {0,8,6,6}> {
      a = Conv(x, w0)
      b = Conv(x, w1)
      c = Concat<axis=1>(a, b)
      r = Reshape(c, apart)
      t = Transpose<perm=[0,2,1,3,4]>(r)
      s = Reshape(t, together)
      p, q = Split<axis=1>(s)
      u = Conv(p, w2)
      v = Concat<axis=1>(u, q)
      y = Conv(v, w3)
    }""")
    # The shuffle takes channel i of `a` and of `b` side by side: 0 0 1 1 | 2 2 3 3. `u` is a group of its own.
    pairs = np.repeat(np.arange(4), 2)
    group = by_hand(
        model,
        4,
        {("w0", 0): None, ("w1", 0): None, ("a", 1): None, ("b", 1): None, ("c", 1): np.tile(np.arange(4), 2)}
        | {("r", 2): None, ("t", 1): None, ("s", 1): pairs, ("p", 1): pairs[:4], ("q", 1): pairs[4:]}
        | {("w2", 1): pairs[:4], ("v", 1): [-1] * 4 + list(pairs[4:]), ("w3", 1): [-1] * 4 + list(pairs[4:])},
    )
    own = by_hand(
        model,
        4,
        {("w2", 0): None, ("u", 1): None, ("v", 1): [0, 1, 2, 3] + [-1] * 4, ("w3", 1): [0, 1, 2, 3] + [-1] * 4},
    )
    check_removal(model, {group: removed(4, 1), own: removed(4, 0, 3)}, feed_of(model))
    assert dims(model, "p") == [None, 2, 6, 6]
    assert dims(model, "q") == [None, 4, 6, 6]
    assert dims(model, "w3") == [4, 6, 1, 1]


MHA = """(float[B,S,8] x) => (float[B,S,8] y)
    <float[8,12] wq, float[12] bq, float[8,12] wk, float[8,12] wv, float[12,8] wo, float scale,
     {shapes}> {{
      q0 = MatMul(x, wq)
      q1 = Add(q0, bq)
      {apart}
      q = Transpose<perm=[0,2,1,3]>(q2)
      k = Transpose<perm=[0,2,3,1]>(k2)
      v = Transpose<perm=[0,2,1,3]>(v2)
      a0 = MatMul(q, k)
      a1 = Mul(a0, scale)
      a = Softmax<axis=-1>(a1)
      o0 = MatMul(a, v)
      o1 = Transpose<perm=[0,2,1,3]>(o0)
      {together}
      y = MatMul(o2, wo)
    }}"""
STATED = MHA.format(
    shapes="int64[4] apart = {0,0,3,4}, int64[3] together = {0,0,12}",
    apart="""q2 = Reshape(q1, apart)
      k1 = MatMul(x, wk)
      k2 = Reshape(k1, apart)
      v1 = MatMul(x, wv)
      v2 = Reshape(v1, apart)""",
    together="o2 = Reshape(o1, together)",
)
COMPUTED = MHA.format(
    shapes="int64[2] heads = {3,4}, int64[1] all = {-1}",
    apart="""s = Shape<end=2>(x)
      apart = Concat<axis=0>(s, heads)
      q2 = Reshape(q1, apart)
      k1 = MatMul(x, wk)
      k2 = Reshape(k1, apart)
      v1 = MatMul(x, wv)
      v2 = Reshape(v1, apart)""",
    together="""w = Shape(q1)
      o2 = Reshape(o1, w)""",
)


@pytest.mark.parametrize("body", [STATED, COMPUTED], ids=["stated", "computed"])
def test_whole_heads(body: str) -> None:
    model = model_of(body)
    heads = np.repeat(np.arange(3), 4)
    wide = [
        ("wq", 1),
        ("bq", 0),
        ("q0", 2),
        ("q1", 2),
        ("wk", 1),
        ("k1", 2),
        ("wv", 1),
        ("v1", 2),
        ("o2", 2),
        ("wo", 0),
    ]
    apart = [("q2", 2), ("k2", 2), ("v2", 2), ("q", 1), ("k", 1), ("v", 1), ("a0", 1), ("a1", 1), ("a", 1), ("o0", 1)]
    axes = dict.fromkeys(wide, heads) | dict.fromkeys([*apart, ("o1", 2)])
    group = by_hand(model, 3, axes)
    model = check_removal(model, {group: removed(3, 1)}, feed_of(model, B=2, S=5))
    assert dims(model, "wo") == [8, 8]
    if body is STATED:  # one constant for all three that read it, and none left behind
        assert sorted(len(value.uses()) for name, value in values_of(model).items() if "apart" in name) == [3]


@pytest.mark.parametrize("body", [STATED, COMPUTED], ids=["stated", "computed"])
def test_the_same_places_in_all_heads(body: str) -> None:
    model = model_of(body)
    places = np.tile(np.arange(4), 3)
    keys = dict.fromkeys([("wq", 1), ("bq", 0), ("q0", 2), ("q1", 2), ("wk", 1), ("k1", 2)], places)
    keys |= dict.fromkeys([("q2", 3), ("k2", 3), ("q", 3), ("k", 2)])
    values = dict.fromkeys([("wv", 1), ("v1", 2), ("o2", 2), ("wo", 0)], places)
    values |= dict.fromkeys([("v2", 3), ("v", 3), ("o0", 3), ("o1", 3)])
    kept = {by_hand(model, 4, keys): removed(4, 0, 2), by_hand(model, 4, values): removed(4, 3)}
    check_removal(model, kept, feed_of(model, B=2, S=5))
    assert dims(model, "wk") == [8, 6]
    assert dims(model, "wo") == [9, 8]


def test_a_computed_shape_is_overwritten_once_for_all_that_read_it() -> None:
    """Heads go, then places in those that are left: one Where says both to three Reshapes."""
    model = model_of(COMPUTED)
    wide = [
        ("wq", 1),
        ("bq", 0),
        ("q0", 2),
        ("q1", 2),
        ("wk", 1),
        ("k1", 2),
        ("wv", 1),
        ("v1", 2),
        ("o2", 2),
        ("wo", 0),
    ]
    apart = [("q2", 2), ("k2", 2), ("v2", 2), ("q", 1), ("k", 1), ("v", 1), ("a0", 1), ("a1", 1), ("a", 1), ("o0", 1)]
    heads = by_hand(model, 3, dict.fromkeys(wide, np.repeat(np.arange(3), 4)) | dict.fromkeys([*apart, ("o1", 2)]))
    model = check_removal(model, {heads: removed(3, 1)}, feed_of(model, B=2, S=5))
    shapes.infer_shapes(model)
    places = np.tile(np.arange(4), 2)
    inside = [("q2", 3), ("k2", 3), ("v2", 3), ("q", 3), ("k", 2), ("v", 3), ("o0", 3), ("o1", 3)]
    both = by_hand(model, 4, dict.fromkeys(wide, places) | dict.fromkeys(inside))
    check_removal(model, {both: removed(4, 0)}, feed_of(model, B=2, S=5))
    readers = [[use.node.op_type for use in node.outputs[0].uses()] for node in model.graph if node.op_type == "Where"]
    assert ["Reshape"] * 3 in readers
    assert all("Where" not in read for read in readers)


@pytest.mark.parametrize("side", ["major", "minor"])
def test_attention_operator_keeps_its_scale(side: str) -> None:
    """Two heads of keys serve four of queries; the scale would follow the width of a head."""
    model = parsed("""<ir_version: 11, opset_import: ["": 23]> g (float[B,S,8] x) => (float[B,S,8] y)
    <float[8,16] wq, float[8,8] wk, float[8,8] wv, float[16,8] wo> {
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      a = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)
      y = MatMul(a, wo)
    }""")
    if side == "major":
        units = {axis: np.repeat([0, 1], 8) for axis in [("wq", 1), ("q", 2), ("a", 2), ("wo", 0)]}
        units |= {axis: np.repeat([0, 1], 4) for axis in [("wk", 1), ("k", 2), ("wv", 1), ("v", 2)]}
        kept = {by_hand(model, 2, units): removed(2, 1)}
    else:
        units = {("wq", 1): np.tile(np.arange(4), 4), ("q", 2): np.tile(np.arange(4), 4)}
        units |= {axis: np.tile(np.arange(4), 2) for axis in [("wk", 1), ("k", 2)]}
        kept = {by_hand(model, 4, units): removed(4, 2)}
    check_removal(model, kept, feed_of(model, B=2, S=5))
    attention = node_of(model, "Attention")
    assert attention.attributes["q_num_heads"].as_int() == (2 if side == "major" else 4)
    assert attention.attributes["kv_num_heads"].as_int() == (1 if side == "major" else 2)
    assert ("scale" in attention.attributes) == (side == "minor")


def test_gated_units_from_one_matrix() -> None:
    """SwiGLU with both halves in one weight, divided by slices that say "to the end" in two ways."""
    model = model_of("""(float[N,4] x) => (float[N,3] y)
    <float[4,12] w, float[6,3] w2, int64[1] zero = {0}, int64[1] six = {6}, int64[1] end = {9223372036854775807},
     int64[1] last = {-6}, int64[1] axis = {-1}> {
      h = MatMul(x, w)
      g = Slice(h, zero, last, axis)
      u = Slice(h, six, end, axis)
      s = Sigmoid(g)
      t = Mul(g, s)
      z = Mul(t, u)
      y = MatMul(z, w2)
    }""")
    both = np.tile(np.arange(6), 2)
    group = by_hand(model, 6, {("w", 1): both, ("h", 1): both} | {(n, 1): None for n in "gustz"} | {("w2", 0): None})
    check_removal(model, {group: removed(6, 0, 5)}, feed_of(model))
    first, second = (node for node in model.graph if node.op_type == "Slice")
    assert [numbers(value) for value in first.inputs[1:3]] == [[0], [4]]
    assert [numbers(value) for value in second.inputs[1:3]] == [[4], [2**63 - 1]]


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_both_ways(op: str, gates: int) -> None:
    model = model_of(f"""(float[T,B,5] x) => (float[T,B,3] y)
    <float[2,{gates * 6},5] w, float[2,{gates * 6},6] r, float[2,{gates * 12}] b, float[12,3] wo,
     int64[3] shape = {{0,0,-1}}> {{
      h = {op}<hidden_size=6, direction="bidirectional">(x, w, r, b)
      t = Transpose<perm=[0,2,1,3]>(h)
      f = Reshape(t, shape)
      y = MatMul(f, wo)
    }}""")
    units = {("w", 1): np.tile(np.arange(6), gates), ("r", 1): np.tile(np.arange(6), gates), ("r", 2): None}
    units |= {("b", 1): np.tile(np.arange(6), 2 * gates), ("h", 3): None, ("t", 3): None}
    units |= {("f", 2): np.tile(np.arange(6), 2), ("wo", 0): np.tile(np.arange(6), 2)}
    group = by_hand(model, 6, units)
    check_removal(model, {group: removed(6, 1, 2)}, feed_of(model, T=4))
    assert node_of(model, op).attributes["hidden_size"].as_int() == 4


def test_u_net_with_resized_and_padded_channels() -> None:
    model = model_of("""(float[1,2,8,8] x) => (float[1,2,8,8] y)
    <float[4,2,3,3] w0, float[6,4,3,3] w1, float[6,4,2,2] w2, float[2,14,1,1] w3, float[4,6,1,1] w4,
     int64[4] sizes = {1,4,8,8}, int64[8] pads = {0,1,0,0,0,1,0,0}> {
      a = Conv<pads=[1,1,1,1]>(x, w0)
      b = Conv<pads=[1,1,1,1], strides=[2,2]>(a, w1)
      c = ConvTranspose<strides=[2,2]>(b, w2)
      d = Conv(b, w4)
      e = Resize<mode="nearest">(d, , , sizes)
      p = Pad(a, pads)
      q = Concat<axis=1>(c, e, p)
      y = Conv(q, w3)
    }""")
    none = [-1] * 4
    # The channels that padding adds are units of their own, 4 and 5, which only that axis holds.
    first = {("w0", 0): None, ("a", 1): None, ("w1", 1): None}
    first = {axis: np.arange(4) for axis in first} | {("p", 1): [4, 0, 1, 2, 3, 5]}
    first |= {(name, 1): none + none + [4, 0, 1, 2, 3, 5] for name in ("q", "w3")}
    second = {("w2", 1): None, ("c", 1): None} | {(name, 1): [0, 1, 2, 3] + [-1] * 10 for name in ("q", "w3")}
    third = {("w4", 0): None, ("d", 1): None, ("e", 1): None}
    third |= {(name, 1): none + [0, 1, 2, 3] + [-1] * 6 for name in ("q", "w3")}
    bottom = {("w1", 0): None, ("b", 1): None, ("w2", 0): None, ("w4", 1): None}
    kept = {
        by_hand(model, 6, first): removed(6, 0, 4),
        by_hand(model, 4, second): removed(4, 3),
        by_hand(model, 4, third): removed(4, 1, 2),
        by_hand(model, 6, bottom): removed(6, 2),
    }
    check_removal(model, kept, feed_of(model))
    assert numbers(node_of(model, "Resize").inputs[3]) == [1, 2, 8, 8]
    assert numbers(node_of(model, "Pad").inputs[1]) == [0, 0, 0, 0, 0, 1, 0, 0]
    assert dims(model, "w3") == [2, 9, 1, 1]


def sliced(start: int, end: int, step: int, gone: list[int]) -> ir.Model:
    """Slice ten channels, check, and return the model."""
    model = model_of(f"""(float[N,3] x) => (float[N,2] y)
    <float[3,10] w, float[{len(range(10)[start:end:step])},2] w2, int64[2] starts = {{0,{start}}},
     int64[2] ends = {{9,{end}}}, int64[2] axes = {{0,1}}, int64[2] steps = {{1,{step}}}> {{
      a = MatMul(x, w)
      b = Slice(a, starts, ends, axes, steps)
      y = MatMul(b, w2)
    }}""")
    chosen = np.arange(10)[start:end:step]
    group = by_hand(model, 10, {("w", 1): None, ("a", 1): None, ("b", 1): chosen, ("w2", 0): chosen})
    return check_removal(model, {group: removed(10, *gone)}, feed_of(model))


@pytest.mark.parametrize("gone", [[0], [9], [1, 2], [0, 3, 6, 9], [2, 3, 4, 5, 6, 7, 8], [0, 1, 4, 5, 8]])
@pytest.mark.parametrize(
    "bounds", [(0, 10, 1), (2, 7, 1), (-4, -1, 1), (0, 10, 2), (1, 10, 3), (9, -11, -1), (8, 1, -2)]
)
def test_slices_choose_what_is_left(bounds: tuple[int, int, int], gone: list[int]) -> None:
    left = set(range(10)[slice(*bounds)]) - set(gone)
    if left:
        sliced(*bounds, gone)


def test_a_slice_that_still_fits_is_left_alone() -> None:
    model = sliced(0, 4, 1, [5])
    assert [numbers(value) for value in node_of(model, "Slice").inputs[1:3]] == [[0, 0], [9, 4]]


def test_uneven_steps_become_a_gather() -> None:
    model = sliced(0, 10, 3, [1, 4, 5, 7])
    assert [node.op_type for node in model.graph] == ["MatMul", "Gather", "Slice", "MatMul"]


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 18])
def test_split_slice_pad_of_every_age(opset: int) -> None:
    """Sizes are attributes in old operator sets and inputs in new ones."""
    sizes = "" if opset < 13 else "int64[2] sizes = {4,6}, "
    bounds = "" if opset < 10 else "int64[1] one = {1}, int64[1] five = {5}, "
    width = "" if opset < 11 else "int64[4] pads = {0,1,0,0}, "
    split = "Split<axis=1, split=[4,6]>(a)" if opset < 13 else "Split<axis=1>(a, sizes)"
    slice_ = "Slice<axes=[1], starts=[1], ends=[5]>(c)" if opset < 10 else "Slice(c, one, five, one)"
    pad = "Pad<pads=[0,1,0,0]>(d)" if opset < 11 else "Pad(d, pads)"
    model = parsed(f"""<ir_version: 6, opset_import: ["": {opset}]> g (float[N,3] x) => (float[N,2] y)
    <{sizes}{bounds}{width}float[3,10] w, float[4,2] v, float[5,2] w2> {{
      a = MatMul(x, w)
      b, c = {split}
      d = {slice_}
      e = {pad}
      f = MatMul(b, v)
      h = MatMul(e, w2)
      y = Add(f, h)
    }}""")
    axes = {("w", 1): None, ("a", 1): None, ("b", 1): range(4), ("v", 0): range(4), ("c", 1): range(4, 10)}
    axes |= {("d", 1): range(5, 9), ("e", 1): [-1, 5, 6, 7, 8], ("w2", 0): [-1, 5, 6, 7, 8]}
    check_removal(model, {by_hand(model, 10, axes): removed(10, 0, 1, 6, 7)}, feed_of(model))


def test_split_in_parts_that_become_uneven() -> None:
    for opset, text in ((11, "Split<axis=1>"), (13, "Split<axis=1>"), (18, "Split<axis=1, num_outputs=3>")):
        model = model_of(
            f"""(float[N,3] x) => (float[N,2] y) <float[3,6] w, float[4,2] v> {{
          a = MatMul(x, w)
          b, c, d = {text}(a)
          e = Concat<axis=1>(d, b)
          y = MatMul(e, v)
        }}""",
            opset,
        )
        axes = {("w", 1): None, ("a", 1): None, ("b", 1): [0, 1], ("c", 1): [2, 3], ("d", 1): [4, 5]}
        axes |= {("e", 1): [4, 5, 0, 1], ("v", 0): [4, 5, 0, 1]}
        check_removal(model, {by_hand(model, 6, axes): removed(6, 0)}, feed_of(model))


def test_gathered_channels_are_renumbered_and_shared_indices_copied() -> None:
    model = model_of("""(float[N,3] x) => (float[N,3,2] y)
    <float[3,6] w, float[3,6] other, float[3,2] w2, int64[3,3] chosen = {5,0,1, 1,-4,3, 4,4,-6}> {
      a = MatMul(x, w)
      b = Gather<axis=1>(a, chosen)
      o = MatMul(x, other)
      p = Gather<axis=1>(o, chosen)
      q = Add(b, p)
      y = MatMul(q, w2)
    }""")
    # Only what nothing asks for may go alone; the others would need a rectangle.
    group = by_hand(model, 6, {("w", 1): None, ("a", 1): None, ("b", 1): [-1] * 3})
    with pytest.raises(PassCrash, match="axis 1 is still asked for"):
        check_removal(model, {group: removed(6, 2)}, feed_of(model))
    model = model_of("""(float[N,3] x) => (float[N,3] y)
    <float[3,6] w, float[3,6] other, float[4,3] w2, int64[4] chosen = {5,0,1,-4}> {
      a = MatMul(x, w)
      b = Gather<axis=1>(a, chosen)
      o = MatMul(x, other)
      p = Gather<axis=1>(o, chosen)
      q = Add(b, p)
      y = MatMul(q, w2)
    }""")
    order = [5, 0, 1, 2]
    units = {("w", 1): None, ("a", 1): None, ("other", 1): [0, 1, 2, -1, -1, 5], ("o", 1): [0, 1, 2, -1, -1, 5]}
    units |= {(name, 1): order for name in "bpq"} | {("w2", 0): order}
    check_removal(model, {by_hand(model, 6, units): removed(6, 1, 3)}, feed_of(model))
    first, second = (node for node in model.graph if node.op_type == "Gather")
    assert numbers(first.inputs[1]) == [3, 0, 1]
    assert numbers(second.inputs[1]) == [4, 0, 1]
    assert "chosen" not in values_of(model)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_tile_expand_and_filled_constants(ir_version: int) -> None:
    """Sizes that are stated, copied and computed; before IR version 4 constants are nodes."""
    model = parsed(f"""<ir_version: {ir_version}, opset_import: ["": 11]> g
    (float[N,4] x, float[N,1] z) => (float[N,2] y) <float[4,6] w, float[1,6] s, float[12,2] w2,
     int64[2] twice = {{1,2}}, int64[2] six = {{1,6}}> {{
      a = MatMul(x, w)
      zeros = ConstantOfShape(six)
      b = Add(a, zeros)
      zt = Tile(z, six)
      c = Mul(b, zt)
      n = Shape(a)
      st = Expand(s, n)
      ze = Expand(z, n)
      zz = Expand(z, six)
      d = Add(c, st)
      e = Add(d, ze)
      f = Add(e, zz)
      t = Tile(f, twice)
      y = MatMul(t, w2)
    }}""")
    names = ["w", "s", "a", "zeros", "b", "zt", "c", "st", "ze", "zz", "d", "e", "f"]
    units = {(name, 1): None for name in names}
    units |= {("t", 1): np.tile(np.arange(6), 2), ("w2", 0): np.tile(np.arange(6), 2)}
    check_removal(model, {by_hand(model, 6, units): removed(6, 0, 4)}, feed_of(model))


def test_windows_keep_their_channels_last() -> None:
    model = model_of("""(float[B,4,4,5] x) => (float[B,4,4,3] y)
    <float[5,6] w, float[6,6] v, float[6,3] u, int64[6] apart = {-1,2,2,2,2,6}, int64[3] rows = {-1,4,6},
     int64[4] back = {-1,4,4,6}> {
      a = MatMul(x, w)
      b = Reshape(a, apart)
      c = Transpose<perm=[0,1,3,2,4,5]>(b)
      d = Reshape(c, rows)
      e = MatMul(d, v)
      f = Reshape(e, apart)
      h = Transpose<perm=[0,1,3,2,4,5]>(f)
      i = Reshape(h, back)
      y = MatMul(i, u)
    }""")
    inner = by_hand(
        model, 6, {("w", 1): None, ("a", 3): None, ("b", 5): None, ("c", 5): None, ("d", 2): None, ("v", 0): None}
    )
    outer = by_hand(
        model, 6, {("v", 1): None, ("e", 2): None, ("f", 5): None, ("h", 5): None, ("i", 3): None, ("u", 0): None}
    )
    check_removal(model, {inner: removed(6, 0), outer: removed(6, 1, 2, 3)}, feed_of(model, B=3))


def test_squeeze_that_names_no_axis_takes_no_other_than_before() -> None:
    for opset in (11, 13):
        model = model_of(
            """(float[3,1,4] x) => (float[3,5] y) <float[4,2] w, float[2,5] v> {
          a = MatMul(x, w)
          b = Squeeze(a)
          y = MatMul(b, v)
        }""",
            opset,
        )
        group = by_hand(model, 2, {("w", 1): None, ("a", 2): None, ("b", 1): None, ("v", 0): None})
        check_removal(model, {group: removed(2, 0)}, feed_of(model))


def test_constants_inside_branches() -> None:
    model = model_of("""(float[N,4] x, bool c) => (float[N,3] y) <float[4,6] w, float[6,3] v, int64[2] shape = {-1,6}> {
      a = MatMul(x, w)
      b = If (c) <
        then_branch = t () => (float[N,6] p) {
          k = Constant<value = float[6] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}>()
          p = Mul(a, k)
        },
        else_branch = e () => (float[N,6] q) { q = Reshape(a, shape) }
      >
      y = MatMul(b, v)
    }""")
    units = {
        ("w", 1): None,
        ("a", 1): None,
        ("k", 0): None,
        ("p", 1): None,
        ("q", 1): None,
        ("b", 1): None,
        ("v", 0): None,
    }
    group = by_hand(model, 6, units)
    feed = feed_of(model) | {"c": np.array(False)}
    check_removal(model, {group: removed(6, 0, 5)}, feed)
    assert dims(model, "k") == [4]


def test_operators_of_a_runtime() -> None:
    """Attention, its fused forms and group normalization as ONNX Runtime has them."""
    model = parsed("""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g
    (float[B,S,8] x) => (float[B,S,3] y, float[B,S,3] z)
    <float[8,48] w, float[48] bias, float[8,16] wq, float[8,16] wk, float[16,3] wo, float[8,3] wv, float[8,8] wz,
     float[B,S,16] a> {
      a = com.microsoft.Attention<num_heads=4>(x, w, bias)
      y = MatMul(a, wo)
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wz)
      m = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)
      z = MatMul(m, wv)
    }""")
    heads = np.repeat(np.arange(4), 4)
    whole = {("w", 1): np.tile(heads, 3), ("bias", 0): np.tile(heads, 3), ("a", 2): heads, ("wo", 0): heads}
    places = np.tile(np.arange(4), 4)
    keys = dict.fromkeys([("wq", 1), ("q", 2), ("wk", 1), ("k", 2)], places)
    kept = {by_hand(model, 4, whole): removed(4, 0), by_hand(model, 4, keys): removed(4, 3)}
    model = check_removal(model, kept, feed_of(model, B=2, S=5))
    own, given = node_of(model, "Attention"), node_of(model, "MultiHeadAttention")
    assert own.attributes["num_heads"].as_int() == 3
    assert "scale" not in own.attributes
    assert given.attributes["num_heads"].as_int() == 4
    assert given.attributes["scale"].as_float() == 0.5


@pytest.mark.parametrize(
    ("node", "sizes", "axis"),
    [
        ("y = com.microsoft.MultiHeadAttention<num_heads=4>(x)", [2, 5, 4, 3, 2], 2),
        (
            "y = com.microsoft.RotaryEmbedding<num_heads=4, rotary_embedding_dim=2>(x, at, cosines, cosines)",
            [2, 4, 5, 8],
            1,
        ),
    ],
)
def test_heads_on_an_axis_are_counted_where_an_attribute_says_how_many(node: str, sizes: list[int], axis: int) -> None:
    """ONNX Runtime's CPU has no kernel for packed heads."""
    told = f"float[{','.join(map(str, sizes))}] x"
    model = parsed(f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g
    (float[1] z, int64[1] at) => (float[?,?,?] out) <{told}, float[9,1] cosines> {{
      {node}
      out = Add(y, z)
    }}""")
    group = by_hand(model, 4, {("x", axis): None})
    mending = Mending(Cuts({group: removed(4, 1)}), context(model))
    (heads,) = [node for node in model.graph if "num_heads" in node.attributes]
    mend_attributes(heads, mending)
    assert heads.attributes["num_heads"].as_int() == 3


def test_groups_of_a_normalization_go_whole() -> None:
    model = parsed("""<ir_version: 10, opset_import: ["": 21]> g (float[N,3,4,4] x) => (float[N,2,4,4] y)
    <float[6,3,1,1] w, float[6] s, float[6] t, float[2,6,1,1] v> {
      a = Conv(x, w)
      b = GroupNormalization<num_groups=3>(a, s, t)
      y = Conv(b, v)
    }""")
    pairs = np.repeat(np.arange(3), 2)
    units = {("w", 0): pairs, ("a", 1): pairs, ("s", 0): pairs, ("t", 0): pairs, ("b", 1): pairs, ("v", 1): pairs}
    check_removal(model, {by_hand(model, 3, units): removed(3, 1)}, feed_of(model))
    assert node_of(model, "GroupNormalization").attributes["num_groups"].as_int() == 2


PLAIN = """(float[N,3] x) => (float[N,2] y) <float[3,4] w, float[4,2] v> {
      a = MatMul(x, w)
      b = Relu(a)
      y = MatMul(b, v)
    }"""
HIDDEN = {("w", 1): None, ("a", 1): None, ("b", 1): None, ("v", 0): None}


def test_nothing_to_remove_is_no_edit() -> None:
    model = model_of(PLAIN)
    ctx = context(model)
    shrink(ctx, {by_hand(model, 4, HIDDEN): np.ones(4, bool)})
    shrink(ctx, {})
    assert ctx.rewriter.edits == 0


def test_it_is_one_edit_that_names_what_it_touched() -> None:
    model = model_of(PLAIN)
    ctx = context(model)
    shrink(ctx, {by_hand(model, 4, HIDDEN): removed(4, 0)})
    assert [edit.rule for edit in ctx.rewriter.journal.edits] == ["shrink"]
    assert ctx.rewriter.journal.edits[0].origins


@pytest.mark.parametrize(
    ("size", "axes", "gone", "message"),
    [
        (4, HIDDEN, [0, 1, 2, 3], "cannot be left with 0"),
        (3, {axis: [0, 1, 2] for axis in HIDDEN}, [0], "3 elements on axis 1 of `w`"),
        (3, {("x", 1): None, ("w", 0): None}, [1], "`x` is an input or output of the model"),
        (2, {("v", 1): None, ("y", 1): None}, [1], "`y` is an input or output of the model"),
        (4, {("w", 1): None, ("a", 1): None, ("b", 1): None}, [0], "MatMul"),
        (4, {("w", 1): None, ("v", 0): None}, [0], "axis 1 of `a` is 3, and 4 are kept"),
        (4, {("a", 1): None, ("b", 1): None, ("v", 0): None}, [0], "MatMul"),
    ],
)
def test_groups_that_are_wrong_are_seen(size: int, axes: dict, gone: list[int], message: str) -> None:
    model = model_of(PLAIN)
    with pytest.raises(PassCrash, match=message) as caught:
        shrink(context(model), {by_hand(model, size, axes): removed(size, *gone)})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("body", "axes", "gone", "message"),
    [
        # One channel of the first group alone.
        (
            """(float[N,4,5,5] x) => (float[N,2,3,3] y) <float[4,4,1,1] u, float[4,2,3,3] w, float[2,4,1,1] v> {
              a = Conv(x, u)
              b = Conv<group=2>(a, w)
              y = Conv(b, v)
            }""",
            {("u", 0): None, ("a", 1): None},
            [0],
            "of 2 groups of channels, 1, 2 are left",
        ),
        # Half of one head.
        (
            """(float[N,S,4] x) => (float[N,S,4] y) <float[4,4] w> {
              q = MatMul(x, w)
              a = Attention<q_num_heads=2, kv_num_heads=2>(q, x, x)
              y = Relu(a)
            }""",
            {("w", 1): None, ("q", 2): None},
            [3],
            "of 2 groups of channels, 2, 1 are left",
        ),
        # What reflects its own channels.
        (
            """(float[N,4] x) => (float[N,2] y) <float[4,4] w, float[6,2] v, int64[4] pads = {0,1,0,1}> {
              a = MatMul(x, w)
              p = Pad<mode="reflect">(a, pads)
              y = MatMul(p, v)
            }""",
            {("w", 1): None, ("a", 1): None, ("p", 1): [1, 0, 1, 2, 3, 2], ("v", 0): [1, 0, 1, 2, 3, 2]},
            [3],
            "continued by its own elements",
        ),
        # Two parts that do not keep what is left of the whole.
        (
            """(float[N,4] x) => (float[N,2] y, float[N,2] z) <float[4,4] w, float[2,2] u, float[2,2] v> {
              a = MatMul(x, w)
              b, c = Split<axis=1>(a)
              y = MatMul(b, u)
              z = MatMul(c, v)
            }""",
            {("w", 1): None, ("a", 1): None, ("b", 1): [1, 2], ("u", 0): [1, 2], ("c", 1): [2, 3], ("v", 0): [2, 3]},
            [0],
            "`b` keeps other elements",
        ),
        # Bounds that are only known when it runs.
        (
            """(float[N,4] x, int64[1] s) => (float[N,?] y) <float[4,4] w, int64[1] e = {4}, int64[1] one = {1}> {
              a = MatMul(x, w)
              b = Slice(a, s, e, one)
              y = Relu(b)
            }""",
            {("w", 1): None, ("a", 1): None},
            [0],
            "only known at run time",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_mended_is_named(body: str, axes: dict, gone: list[int], message: str) -> None:
    model = model_of(body, 23)
    with pytest.raises(PassCrash, match=message):
        shrink(context(model), {by_hand(model, 4, axes): removed(4, *gone)})


def test_weights_in_a_file_are_cut_when_they_are_written(tmp_path: Path) -> None:
    """Nothing of a large weight is read before, and what is written is what numpy takes."""
    model = model_of(PLAIN)
    path = tmp_path / "plain.onnx"
    before = {name: numbers_of_weight(model, name) for name in ("w", "v")}
    onnx.save(ir.to_proto(model), path, save_as_external_data=True, size_threshold=0, location="plain.data")
    model = graphopt.load(path)
    shrink(context(model), {by_hand(model, 4, HIDDEN): removed(4, 1, 2)})
    assert {type(value.const_value).__name__ for value in walk.initializers(model)} == {"_Thinned"}
    assert [value.const_value.name for value in walk.initializers(model)] == ["w", "v"]  # type: ignore[union-attr]
    graphopt.save(model, tmp_path / "small.onnx")
    saved = graphopt.load(tmp_path / "small.onnx")
    assert np.array_equal(numbers_of_weight(saved, "w"), before["w"][:, [0, 3]])
    assert np.array_equal(numbers_of_weight(saved, "v"), before["v"][[0, 3]])


def numbers_of_weight(model: ir.Model, name: str) -> np.ndarray:
    tensor = walk.constant_tensor(values_of(model)[name])
    assert tensor is not None
    return np.array(tensor.numpy())
