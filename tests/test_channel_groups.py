"""Channel groups of convolutional networks, against groups written out by hand (see `lettered_groups`)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NoReturn

import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

import graphopt
from graphopt import shapes
from graphopt.passes.analyses.channel_groups import Layout, Side, channel_groups
from graphopt.passes.lossy.removable_channels import find_channels
from graphopt.passes.lossy.separate_vectors import separate_vectors
from graphopt.rewriter import Rewriter

from .command_line import run
from .graph_generator import build, feeds, random_recipe
from .lettered_groups import groups_of, model_of, of_constants, reasons
from .pass_runs import loaded
from .removed_channels import check_removal, context, removed

# Twelve topologies: those with convolutions here, the others in test_channel_groups_sequence.py.


RESIDUAL = """
residual (float[N,3,4,4] x) => (float[N,5] out) {
  a = Conv<pads = [1,1,1,1]>(x, w0, b0)
  r = Relu(a)
  b = Conv<pads = [1,1,1,1]>(r, w1, b1)
  rb = Relu(b)
  c = Conv<pads = [1,1,1,1]>(rb, w2)
  s = Add(c, r)
  p = GlobalAveragePool(s)
  f = Flatten(p)
  out = Gemm<transB = 1>(f, w3, b3)
}
"""
RESIDUAL_WEIGHTS = {
    "w0": (4, 3, 3, 3),
    "b0": (4,),
    "w1": (6, 4, 3, 3),
    "b1": (6,),
    "w2": (4, 6, 3, 3),
    "w3": (5, 4),
    "b3": (5,),
}


def test_residual_streams_shrink_as_one() -> None:
    stream, inner = groups_of(RESIDUAL, RESIDUAL_WEIGHTS)
    on_weights = {"w0:0": "abcd", "b0:0": "abcd", "w1:1": "abcd", "w2:0": "abcd", "w3:1": "abcd"}
    assert stream == on_weights | {f"{name}:1": "abcd" for name in "arcspf"}
    assert inner == {"w1:0": "abcdef", "b1:0": "abcdef", "b:1": "abcdef", "rb:1": "abcdef", "w2:1": "abcdef"}


def test_groups_know_their_layers_and_frozen_channels_their_reasons() -> None:
    model = model_of(RESIDUAL, RESIDUAL_WEIGHTS)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    found = channel_groups(model)
    stream, inner = found.groups
    assert [group.name for group in found.groups] == ["Conv_0", "Conv_2"]
    assert [layer.node.name for layer in stream.writers] == ["Conv_0", "Conv_4"]
    assert [layer.node.name for layer in stream.readers] == ["Conv_2", "Gemm_8"]
    assert [layer.node.name for layer in inner.writers] == ["Conv_2"]
    assert [layer.node.name for layer in inner.readers] == ["Conv_4"]
    assert not stream.mixers
    assert [(axis.name, axis.size) for axis in found.frozen] == [("Conv_0", 3), ("Gemm_8", 5)]
    assert {axis.name: axis.reason for axis in found.frozen} == {
        "Conv_0": "`x` is an input of the model",
        "Gemm_8": "`out` is an output of the model",
    }


def test_shortcuts_padded_with_zeros() -> None:
    # ResNets for CIFAR: the shortcut of a wider stage is the narrower one, every other pixel, with zeros around.
    text = """
    padded (float[1,3,4,4] x) => (float[1,2,2,2] out)
    <int64[8] pads = {0, 1, 0, 0, 0, 1, 0, 0}, int64[2] starts = {0, 0}, int64[2] ends = {99, 99},
     int64[2] axes = {2, 3}, int64[2] steps = {2, 2}> {
      a = Conv(x, w0)
      b = Conv<strides = [2,2]>(a, w1)
      half = Slice(a, starts, ends, axes, steps)
      wide = Pad(half, pads)
      s = Add(b, wide)
      out = Conv(s, w2)
    }
    """
    weights = {"w0": (2, 3, 1, 1), "w1": (4, 2, 1, 1), "w2": (2, 4, 1, 1)}
    narrow, wider = groups_of(text, weights)
    assert narrow == {
        "w0:0": "ab",
        "w1:1": "ab",
        "a:1": "ab",
        "half:1": "ab",
        **dict.fromkeys(("w1:0", "b:1", "wide:1", "s:1", "w2:1"), ".ab."),
    }
    assert wider == dict.fromkeys(("w1:0", "b:1", "wide:1", "s:1", "w2:1"), "a..b")


def test_what_is_concatenated_shrinks_apart() -> None:
    text = """
    dense (float[N,3,2,2] x) => (float[N,2,2,2] out) {
      a = Conv(x, w0)
      b = Conv(a, w1)
      ab = Concat<axis = 1>(a, b)
      c = Conv(ab, w2)
      abc = Concat<axis = -3>(ab, c)
      n = BatchNormalization(abc, scale, shift, mean, var)
      out = Conv(n, w3)
    }
    """
    weights = {"w0": (2, 3, 1, 1), "w1": (3, 2, 1, 1), "w2": (2, 5, 1, 1), "w3": (2, 7, 1, 1)}
    weights |= dict.fromkeys(("scale", "shift", "mean", "var"), (7,))
    a, b, c = groups_of(text, weights, runs=False)
    on_all = {"abc:1", "n:1", "scale:0", "shift:0", "mean:0", "var:0", "w3:1"}
    assert a == {
        "w0:0": "ab",
        "a:1": "ab",
        "w1:1": "ab",
        "ab:1": "ab...",
        "w2:1": "ab...",
        **dict.fromkeys(on_all, "ab....."),
    }
    assert b == {"w1:0": "abc", "b:1": "abc", "ab:1": "..abc", "w2:1": "..abc", **dict.fromkeys(on_all, "..abc..")}
    assert c == {"w2:0": "ab", "c:1": "ab", **dict.fromkeys(on_all, ".....ab")}


GROUPED = """
grouped (float[N,3,2,2] x) => (float[N,2,2,2] out) {
  a = Conv(x, w0)
  b = Conv<group = 2>(a, w1, b1)
  out = Conv(b, w2)
}
"""
GROUPED_WEIGHTS = {"w0": (4, 3, 1, 1), "w1": (6, 2, 1, 1), "b1": (6,), "w2": (2, 6, 1, 1)}


def test_grouped_convolutions_lose_the_same_channels_of_each_group() -> None:
    inputs, outputs = groups_of(GROUPED, GROUPED_WEIGHTS)
    assert inputs == {"w0:0": "abab", "a:1": "abab", "w1:1": "ab"}
    assert outputs == dict.fromkeys(("w1:0", "b1:0", "b:1", "w2:1"), "abcabc")
    reader = channel_groups(model_of(GROUPED, GROUPED_WEIGHTS)).groups[0].readers[0]
    assert reader.weight.name == "w1"


def test_grouped_convolutions_lose_whole_groups() -> None:
    (both,) = groups_of(GROUPED, GROUPED_WEIGHTS, Layout(convolutions=Side.MAJOR))
    inputs, outputs = ("w0:0", "a:1"), ("w1:0", "b1:0", "b:1", "w2:1")
    assert both == {**dict.fromkeys(inputs, "aabb"), **dict.fromkeys(outputs, "aaabbb")}


def test_transposed_convolutions_in_groups() -> None:
    text = GROUPED.replace("Conv<group", "ConvTranspose<group")
    weights = {**GROUPED_WEIGHTS, "w1": (4, 3, 1, 1)}
    inputs, outputs = groups_of(text, weights)
    assert inputs == {"w0:0": "abab", "a:1": "abab", "w1:0": "abab"}
    assert outputs == {"w1:1": "abc", **dict.fromkeys(("b1:0", "b:1", "w2:1"), "abcabc")}
    (both,) = groups_of(text, weights, Layout(convolutions=Side.MAJOR))
    assert both["w1:0"] == both["a:1"] == "aabb"
    assert both["b:1"] == "aaabbb"
    assert "w1:1" not in both


@pytest.mark.parametrize("side", list(Side))
def test_depthwise_convolutions_go_with_what_they_read(side: Side) -> None:
    text = """
    depthwise (float[N,3,4,4] x) => (float[N,2,2,2] out) {
      a = Conv(x, w0)
      b = Conv<group = 3, pads = [1,1,1,1]>(a, w1, b1)
      c = Conv<group = 3>(b, w2)
      out = Conv(c, w3)
    }
    """
    weights = {"w0": (3, 3, 1, 1), "w1": (3, 1, 3, 3), "b1": (3,), "w2": (6, 1, 3, 3), "w3": (2, 6, 1, 1)}
    (channels,) = groups_of(text, weights, Layout(convolutions=side))
    single, double = ("w0:0", "a:1", "w1:0", "b1:0", "b:1"), ("w2:0", "c:1", "w3:1")
    assert channels == {**dict.fromkeys(single, "abc"), **dict.fromkeys(double, "aabbcc")}


def test_a_depthwise_convolution_of_the_input_is_frozen() -> None:
    text = "depthwise (float[N,3,2,2] x) => (float[N,2,2,2] out) { a = Conv<group = 3>(x, w0) out = Conv(a, w1) }"
    assert not groups_of(text, {"w0": (3, 1, 1, 1), "w1": (2, 3, 1, 1)})


def test_squeeze_and_excite() -> None:
    text = """
    excite (float[N,3,4,4] x) => (float[N,2,4,4] out) {
      a = Conv(x, w0)
      p = GlobalAveragePool(a)
      d = Conv(p, w1)
      r = Relu(d)
      u = Conv(r, w2)
      g = Sigmoid(u)
      s = Mul(a, g)
      out = Conv(s, w3)
    }
    """
    weights = {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1), "w2": (4, 2, 1, 1), "w3": (2, 4, 1, 1)}
    channels, squeezed = of_constants(groups_of(text, weights), weights)
    assert channels == {"w0:0": "abcd", "w1:1": "abcd", "w2:0": "abcd", "w3:1": "abcd"}
    assert squeezed == {"w1:0": "ab", "w2:1": "ab"}


@pytest.mark.parametrize("view", ["Flatten(p)", "Reshape(p, shape)"])
def test_flattened_channels_take_all_their_pixels(view: str) -> None:
    text = f"""
    flatten (float[1,3,4,4] x) => (float[1,2] out) <int64[2] shape = {{1, 12}}> {{
      a = Conv(x, w0)
      p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(a)
      f = {view}
      h = Gemm(f, w1, b1)
      out = MatMul(h, w2)
    }}
    """
    weights = {"w0": (3, 3, 1, 1), "w1": (12, 4), "b1": (1, 4), "w2": (4, 2)}
    channels, hidden = groups_of(text, weights)
    assert channels == {"w0:0": "abc", "a:1": "abc", "p:1": "abc", "f:1": "aaaabbbbcccc", "w1:0": "aaaabbbbcccc"}
    assert hidden == {"w1:1": "abcd", "b1:1": "abcd", "h:1": "abcd", "w2:0": "abcd"}


def test_u_net() -> None:
    text = """
    unet (float[1,3,4,4] x) => (float[1,1,4,4] out) <float[4] twice = {1, 1, 2, 2}> {
      a = Conv<pads = [1,1,1,1]>(x, w0)
      d = AveragePool<kernel_shape = [2,2], strides = [2,2]>(a)
      b = Conv(d, w1)
      dd = MaxPool<kernel_shape = [2,2], strides = [2,2]>(b)
      c = Conv(dd, w2)
      up = ConvTranspose<strides = [2,2]>(c, w3)
      joined = Concat<axis = 1>(up, b)
      e = Conv(joined, w4)
      large = Resize<mode = "nearest">(e, , twice)
      both = Concat<axis = 1>(a, large)
      out = Conv(both, w5)
    }
    """
    weights = {"w0": (2, 3, 3, 3), "w1": (3, 2, 1, 1), "w2": (4, 3, 1, 1), "w3": (4, 2, 2, 2), "w4": (3, 5, 1, 1)}
    a, b, c, up, e = groups_of(text, weights | {"w5": (1, 5, 1, 1)})
    assert a == {"w0:0": "ab", "a:1": "ab", "d:1": "ab", "w1:1": "ab", "both:1": "ab...", "w5:1": "ab..."}
    assert b["w4:1"] == "..abc"
    assert b["w1:0"] == b["b:1"] == b["dd:1"] == b["w2:1"] == "abc"
    assert c == {"w2:0": "abcd", "c:1": "abcd", "w3:0": "abcd"}
    assert up == {"w3:1": "ab", "up:1": "ab", "joined:1": "ab...", "w4:1": "ab..."}
    assert e == {"w4:0": "abc", "e:1": "abc", "large:1": "abc", "both:1": "..abc", "w5:1": "..abc"}


# What holds channels from outside


def test_shared_weights_shrink_once() -> None:
    text = """
    shared (float[1,5,4] x) => (float[1,5,4] out) {
      a = MatMul(x, w0)
      b = MatMul(a, w1)
      c = Relu(b)
      d = MatMul(c, w1)
      out = MatMul(d, w2)
    }
    """
    (group,) = groups_of(text, {"w0": (4, 3), "w1": (3, 3), "w2": (3, 4)})
    assert group == dict.fromkeys(("w0:1", "w1:0", "w1:1", "w2:0", "a:2", "b:2", "c:2", "d:2"), "abc")


def test_layers_with_equal_biases_are_told_apart() -> None:
    text = """
    biases (float[1,3,2,2] x) => (float[1,2,2,2] out) {
      a = Conv(x, w0, zeros)
      b = Conv(a, w1, zeros)
      c = Conv(b, w2, zeros)
      d = Add(a, c)
      out = Conv(d, w3)
    }
    """
    weights = {"w0": (4, 3, 1, 1), "w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "w3": (2, 4, 1, 1), "zeros": (4,)}
    model = model_of(text, weights)
    assert len(channel_groups(model).groups) == 1
    rewriter = Rewriter(model)
    assert separate_vectors(model, rewriter) == 2
    assert [len(group.writers) for group in channel_groups(model).groups] == [2, 1]
    assert separate_vectors(model, rewriter) == 0
    assert rewriter.edits == 1


@pytest.mark.parametrize(
    ("nodes", "read", "sizes"),
    [("b = Conv(a, w1, zeros)", 4, [4, 4]), ("c = Conv(x, w1, zeros) b = Add(a, c)", 3, [4])],
)
def test_what_is_shared_is_told_apart_only_where_it_matters(nodes: str, read: int, sizes: list[int]) -> None:
    """Channels of two layers that go together anyway may share a bias."""
    text = f"biases (float[1,3,2,2] x) => (float[1,2,2,2] out) {{ a = Conv(x, w0, zeros) {nodes} out = Conv(b, w2) }}"
    weights = {"w0": (4, 3, 1, 1), "w1": (4, read, 1, 1), "w2": (2, 4, 1, 1), "zeros": (4,)}
    ctx = context(model_of(text, weights))
    assert [group.size for group in find_channels(ctx).groups] == sizes
    assert ctx.rewriter.edits == len(sizes) - 1


def test_channels_that_no_weight_makes_are_frozen() -> None:
    """Numbers compared with a list of numbers: each row of the weight is looked up by one of them."""
    text = """
    one_hot (float[1,5,1] x) => (float[1,5,2] out) <float[6] list = {0, 1, 2, 3, 4, 5}> {
      same = Equal(x, list)
      codes = Cast<to = 1>(same)
      a = MatMul(codes, w0)
      out = MatMul(a, w1)
    }
    """
    found = channel_groups(model_of(text, {"w0": (6, 4), "w1": (4, 2)}))
    assert [group.size for group in found.groups] == [4]
    assert "no weight makes it: it is only read" in reasons(found)


def test_channels_that_only_an_embedding_or_a_recurrent_layer_makes_may_go() -> None:
    text = """
    recurrent (int64[5,2] x) => (float[?,?,?] out) <int64[1] one = {1}> {
      a = Gather(table, x)
      b, last = LSTM<hidden_size = 3>(a, w, r)
      c = Squeeze(b, one)
      out = MatMul(c, w1)
    }
    """
    weights = {"table": (7, 4), "w": (1, 12, 4), "r": (1, 12, 3), "w1": (3, 2)}
    found = channel_groups(model_of(text, weights)).groups
    assert [(group.size, len(group.writers)) for group in found] == [(4, 0), (3, 0)]
    assert len(groups_of(text, weights)) == 2


def test_the_only_channel_of_its_kind_is_frozen() -> None:
    text = """
    picked (float[1,3,2,2] x) => (float[1,2,2,2] out) <int64[4] places = {0, 1, 2, 2}> {
      a = Conv(x, w0)
      b = Gather<axis = 1>(a, places)
      out = Conv(b, w1)
    }
    """
    found = channel_groups(model_of(text, {"w0": (3, 3, 1, 1), "w1": (2, 4, 1, 1)}))
    assert [group.size for group in found.groups] == [2]
    alone = [axis for axis in found.frozen if "no other channel like it" in axis.reason]
    assert [(axis.name, axis.size) for axis in alone] == [("Conv->a", 1)]


def test_what_callers_can_give_is_frozen() -> None:
    text = (
        "defaults (float[1,3,2,2] x, float[4,3,1,1] w0) => (float[1,2,2,2] out) { a = Conv(x, w0) out = Conv(a, w1) }"
    )
    model = model_of(text, {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1)})
    found = channel_groups(model)
    assert not found.groups
    assert "`w0` is an input of the model" in {axis.reason for axis in found.frozen}


def test_a_weight_that_is_an_output_is_frozen() -> None:
    text = "given (float[1,3] x) => (float[1,4] y, float[3,4] w, float[2,5] table) { y = MatMul(x, w) }"
    model = model_of(text, {"w": (3, 4), "table": (2, 5)})
    found = channel_groups(model)
    assert not found.groups
    assert {axis.reason for axis in found.frozen} == {"`x` is an input of the model", "`y` is an output of the model"}


def test_calls_of_functions_are_frozen() -> None:
    text = """
    called (float[1,3,2,2] x) => (float[1,2,2,2] out) {
      a = Conv(x, w0)
      b = own.square(a)
      out = Conv(b, w1)
    }
    <domain: "own", opset_import: ["" : 21]> square (v) => (r) { r = Mul(v, v) }
    """
    found = channel_groups(model_of(text, {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1)}))
    assert not found.groups
    assert "it calls the function square" in {axis.reason for axis in found.frozen}


def test_channels_read_inside_a_branch_shrink_too() -> None:
    text = """
    captured (float[1,3,2,2] x, bool c) => (float[1,2,2,2] out) {
      a = Conv(x, w0)
      out = If(c) <
        then_branch = then () => (float[1,2,2,2] y) { y = Conv(a, w1) },
        else_branch = other () => (float[1,2,2,2] z) { r = Relu(a) z = Conv(r, w2) }
      >
    }
    """
    weights = {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1), "w2": (2, 4, 1, 1)}
    (group,) = groups_of(text, weights)
    assert group == dict.fromkeys(("w0:0", "a:1", "w1:1", "r:1", "w2:1"), "abcd")


def test_symbolic_sizes_hold_nothing_else() -> None:
    text = """
    symbolic (float[N,3,H,W] x) => (float[N,2,H,W] out) {
      a = Conv(x, w0)
      s = Shape(a)
      b = Expand(a, s)
      c = Conv(x, w1)
      d = Mul(b, c)
      out = Conv(d, w2)
    }
    """
    weights = {"w0": (4, 3, 1, 1), "w1": (4, 3, 1, 1), "w2": (2, 4, 1, 1)}
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == {"w0:0": "abcd", "w1:0": "abcd", "w2:1": "abcd"}


def test_channels_that_go_with_an_unknown_size_are_frozen() -> None:
    text = """
    unknown (float[1,3,2,2] x, float[1,C,2,2] m) => (float[1,2,2,2] out) {
      a = Conv(x, w0)
      b = Mul(a, m)
      out = Conv(b, w1)
    }
    """
    found = channel_groups(model_of(text, {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1)}))
    assert not found.groups


def test_no_weight_is_read() -> None:
    def refuse() -> NoReturn:
        raise AssertionError("a weight is read")

    model = model_of(RESIDUAL, RESIDUAL_WEIGHTS)
    for value in model.graph.initializers.values():
        value.const_value = ir.LazyTensor(refuse, dtype=value.dtype, shape=value.shape, name=value.name)  # type: ignore[arg-type]
    assert len(channel_groups(model).groups) == 2


# Models nobody wrote a truth for: what is left computes what zeros in place of the channels would


@pytest.mark.parametrize("seed", range(12))
def test_groups_of_random_models(seed: int) -> None:
    proto = build(random_recipe(seed))
    flags = {entry.key for entry in proto.metadata_props}
    if flags & {"nondeterministic", "nonfinite"}:
        pytest.skip("zeros cannot be told from what it computes")
    for layout in (Layout(), Layout(Side.MAJOR, Side.MAJOR)):
        for index, group in enumerate(channel_groups(with_shapes(proto), layout).groups):
            if group.size > 1 and not group.mixers:
                model = with_shapes(proto)
                twin = channel_groups(model, layout).groups[index]
                check_removal(model, {twin: removed(twin.size, 0)}, feeds(proto, seed))


def with_shapes(proto: onnx.ModelProto) -> ir.Model:
    model = loaded(proto)
    shapes.infer_shapes(model)
    return model


@pytest.mark.parametrize(
    ("name", "sizes", "writers"),
    [
        # The first stage is in the middle of the second stream, and that in the middle of the third.
        ("resnet20_cifar10", {16: 5, 32: 4, 64: 3}, 10),
        ("mobilenet_v1_0.5_160_imagenet", {16: 1, 32: 1, 64: 2, 128: 2, 256: 6, 512: 2}, 2),
        # Two residual streams of 64 channels, which the pyramid ties, and heads that read three levels.
        ("yunet_n_dynamic", {16: 3, 64: 13}, 1),
    ],
)
def test_groups_of_real_models(shared: Path, name: str, sizes: dict[int, int], writers: int) -> None:
    model = graphopt.optimize(shared / "assets" / "models" / f"{name}.onnx", "simplify", verify="off").model
    shapes.infer_shapes(model)
    groups = channel_groups(model).groups
    assert Counter(group.size for group in groups) == sizes
    assert len(groups[0].writers) == writers


# What users see


def test_inspect_shows_groups(tmp_path: Path) -> None:
    path = tmp_path / "residual.onnx"
    model = model_of(RESIDUAL, RESIDUAL_WEIGHTS)
    shapes.forget_inferred(model)
    ir.save(model, path)
    outcome = run("inspect", path, "--groups")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == ["group", "channels", "weights", "each", "made", "by", "read", "by", "tied", "by", "mixed", "by"]
    assert lines[1][:3] == ["Conv->a", "4", str(27 + 1 + 54 + 54 + 5)]
    assert "1 Add" in outcome.out
    assert "`x` is an input of the model" in outcome.out
    found = json.loads(run("inspect", path, "--groups", "--json").out)
    assert [group["channels"] for group in found["groups"]] == [4, 6]
    assert found["groups"][0]["tied_by"] == {"Add": 1}
    assert [axis["channels"] for axis in found["frozen"]] == [3, 5]
