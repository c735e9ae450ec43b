"""Rules of the channel analysis, one operator at a time: which channels go together, and which are held."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxruntime")

from graphopt.passes.analyses.channel_groups import Layout, Side, channel_groups

from .lettered_groups import Lettered, groups_of, letters, model_of, of_constants

# What is between a layer of four channels and one that reads them.


def between(nodes: str, weights: dict[str, tuple[int, ...]] | None = None, read: int = 4) -> list[Lettered]:
    """Return the groups of weights around nodes that make ``b`` of ``a``, of [1, 4, 4, 4]."""
    text = f"""
    between (float[1,3,4,4] x) => (float[1,2,?,?] out)
    <int64[1] one = {{1}}, int64[4] order = {{2, 0, 3, 1}}, int64[1] two = {{2}}, int64[1] last = {{-1}},
     int64[1] far = {{-99}}, int64[1] behind = {{-2}}, float half = {{0.5}}, int64[1] four = {{4}}> {{
      a = Conv(x, w0)
      {nodes}
      out = Conv(b, w1)
    }}
    """
    all_weights = {"w0": (4, 3, 1, 1), "w1": (2, read, 1, 1)} | (weights or {})
    return of_constants(groups_of(text, all_weights), all_weights)


BOTH = {"w0:0": "abcd", "w1:1": "abcd"}


@pytest.mark.parametrize(
    "nodes",
    [
        "c = Sigmoid(a) b = HardSwish(c)",
        "c = Clip(a, half) b = Identity(c)",
        "b = Mul(a, half)",
        "c = Cast<to = 11>(a) b = Cast<to = 1>(c)",
        "b = Dropout(a)",
        "c = Greater(a, half) b = Where(c, a, half)",
        "b = Transpose<perm = [0, 1, 3, 2]>(a)",
        "c = Transpose<perm = [2, 3, 0, 1]>(a) d = Relu(c) b = Transpose<perm = [2, 3, 0, 1]>(d)",
        "c = Transpose<perm = [0, 2, 3, 1]>(a) d = Softplus(c) b = Transpose<perm = [0, 3, 1, 2]>(d)",
        "c = Softmax<axis = -1>(a) b = Sqrt(c)",
        "b = LpPool<kernel_shape = [2,2]>(a)",
        "b = GlobalMaxPool(a)",
        "c = ReduceMean<keepdims = 1>(a, two) b = Relu(c)",
        "c = ReduceMax<keepdims = 0>(a, last) b = Unsqueeze(c, last)",
        "c = ArgMax<axis = 2>(a) b = Cast<to = 1>(c)",
        "b, n = TopK<axis = -1>(a, two)",
        "b = Slice(a, one, last, two)",
        "c = Squeeze(a) b = Unsqueeze(c, zero)",
        "b = CumSum(a, dim)",
        "b = Trilu(a)",
        "c = Transpose<perm = [0, 2, 3, 1]>(a) d = ScatterND(c, place, update) b = Transpose<perm = [0, 3, 1, 2]>(d)",
        "c = Transpose<perm = [0, 2, 3, 1]>(a) d = GatherND(c, places) b = Unsqueeze(d, ends)",
        "c = Transpose<perm = [2, 0, 1, 3]>(a) d = ReverseSequence(c, four) b = Transpose<perm = [1, 2, 0, 3]>(d)",
    ],
)
def test_channels_stay_apart(nodes: str) -> None:
    nodes = nodes.replace("zero)", "none)").replace("dim)", "column)")
    constants = "none = Constant<value = int64[1] {0}>() column = Constant<value = int64 {3}>() "
    constants += "place = Constant<value = int64[1,3] {0, 1, 2}>() places = Constant<value = int64[1,3] {0, 1, 2}>() "
    constants += "ends = Constant<value = int64[2] {2, 3}>() "
    found = between(constants + nodes, {"update": (1, 4)} if "update" in nodes else None)
    assert found == [BOTH | ({"update:1": "abcd"} if "update" in nodes else {})]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("b = Softmax<axis = 1>(a)", "Softmax goes over it"),
        ("b, n = TopK<axis = 1>(a, four)", "TopK counts its elements"),
        ("c = ArgMax<axis = 1>(a) d = Cast<to = 1>(c) b = Add(a, d)", "ArgMax counts its elements"),
        ("c = Shape(a) d = Cast<to = 1>(c) e = ReduceMean<keepdims = 0>(d) b = Mul(a, e)", "its size is read by Shape"),
        ("c = Size(a) d = Cast<to = 1>(c) b = Mul(a, d)", "how many elements it has is read by Size"),
        ("b, n = MaxPool<kernel_shape = [1,1]>(a) f = Cast<to = 1>(n) c = Add(a, f)", "numbers of maxima"),
        ("b = own.Mystery(a)", "unknown operator Mystery"),
        ("b = CumSum(a, one)", "CumSum goes along it"),
        ("c = DynamicQuantizeLinear(a) b = Cast<to = 1>(c)", "it is quantized"),
        ("c = NonZero(a) d = Cast<to = 1>(c) e = ReduceMean<keepdims = 0>(d) b = Mul(a, e)", "NonZero counts"),
    ],
)
def test_channels_are_frozen(nodes: str, reason: str) -> None:
    text = f"""
    frozen (float[1,3,4,4] x) => (float[?,?,?,?] out) <int64[1] four = {{4}}, int64 one = {{1}}> {{
      a = Conv(x, w0)
      {nodes}
      out = Conv(b, w1)
    }}
    """
    model = model_of(text, {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1)})
    model.graph.node(0).name = "first"
    found = channel_groups(model)
    assert not found.groups
    (held,) = [axis for axis in found.frozen if axis.name == "first" and axis.size == 4]
    assert reason in held.reason
    assert held.node is not None


def test_a_table_of_indices_is_no_weight() -> None:
    nodes = (
        "i = Constant<value = int64[2,2] {0, 1, 2, 3}>() c = Gather<axis = 1>(a, i) b = ReduceSum<keepdims = 0>(c, one)"
    )
    assert between(nodes, read=2) == []


def test_a_slope_for_all_channels_is_none_of_one() -> None:
    """Before opset 7, a slope of one axis is for channels."""
    nodes = "c = PRelu(a, slope) b = Identity(c)"
    weights = {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1)}
    text = f"slopes (float[1,3,4,4] x) => (float[1,2,4,4] out) {{ a = Conv(x, w0) {nodes} out = Conv(b, w1) }}"
    for slope, held in (((1,), {}), ((4,), {"slope:0": "abcd"})):
        (group,) = channel_groups(model_of(text, weights | {"slope": slope}, opset=6)).groups
        assert of_constants([letters(group)], weights | {"slope": slope}) == [BOTH | held]


def test_sizes_of_other_axes_may_be_read() -> None:
    nodes = "s = Shape(a) n = Gather(s, two) d = Cast<to = 1>(n) b = Mul(a, d)"
    assert between(nodes) == [BOTH]
    nodes = "s = Shape<start = 2>(a) d = Cast<to = 1>(s) e = ReduceMean<keepdims = 0>(d) b = Mul(a, e)"
    assert between(nodes) == [BOTH]


def test_a_tensor_of_the_same_shape_shrinks_along() -> None:
    assert between("s = Shape(a) z = ConstantOfShape(s) b = Add(a, z)") == [BOTH]


@pytest.mark.parametrize(
    ("shape", "letters_of_it"),
    [((4, 1, 1), {"p:0": "abcd"}), ((1, 4, 1, 4), {"p:1": "abcd"}), ((4, 4), {}), ((1,), {}), ((1, 1, 4, 4), {})],
)
def test_constants_broadcast_from_the_right(shape: tuple[int, ...], letters_of_it: dict[str, str]) -> None:
    assert between("b = Sub(p, a)", {"p": shape}) == [BOTH | letters_of_it]
    assert between("b = PRelu(a, p)", {"p": shape}) == [BOTH | letters_of_it]


def test_one_channel_that_is_broadcast_is_no_tie() -> None:
    assert between("c = Conv(x, w2) b = Mul(a, c)", {"w2": (1, 3, 1, 1)}) == [BOTH]


@pytest.mark.parametrize(
    ("nodes", "read", "in_order"),
    [
        ("b = Gather<axis = 1>(a, order)", 4, "cadb"),
        ("b = Slice(a, last, far, one, last)", 4, "dcba"),
        ("b = Concat<axis = 1>(a, a)", 8, "abcdabcd"),
        ("c, d = Split<axis = 1, num_outputs = 2>(a) b = Concat<axis = 1>(d, c)", 4, "cdab"),
        ("c = Concat<axis = 0>(a, a) d = DepthToSpace<blocksize = 1>(c) b = Slice(d, none, one, none)", 4, "abcd"),
        ("b = SpaceToDepth<blocksize = 2>(a)", 16, "abcdabcdabcdabcd"),
        ("c = Tile(a, repeats) b = Relu(c)", 8, "abcdabcd"),
    ],
)
def test_channels_are_followed_by_number(nodes: str, read: int, in_order: str) -> None:
    constants = "none = Constant<value = int64[1] {0}>() repeats = Constant<value = int64[4] {1, 2, 1, 1}>() "
    found = between(constants + nodes, read=read)
    assert [channel_of(found, "w1:1", place) for place in range(read)] == [
        channel_of(found, "w0:0", "abcd".index(channel)) for channel in in_order
    ]


def channel_of(groups: list[Lettered], axis: str, place: int) -> tuple[int, str]:
    """Return the one group that holds an element of an axis, and its letter there."""
    held = [(index, group[axis][place]) for index, group in enumerate(groups) if axis in group]
    (found,) = [one for one in held if one[1] != "."]
    return found


@pytest.mark.parametrize(("mode", "units"), [("DCR", "abab"), ("CRD", "aabb")])
def test_pixels_made_of_channels(mode: str, units: str) -> None:
    text = f"""
    shuffle (float[1,3,4,4] x) => (float[1,2,8,8] out) {{
      a = Conv(x, w0)
      b = DepthToSpace<blocksize = 2, mode = "{mode}">(a)
      out = Conv(b, w1)
    }}
    """
    (group,) = groups_of(text, {"w0": (8, 3, 1, 1), "w1": (2, 2, 1, 1)})
    assert group["b:1"] == "ab"
    assert group["w0:0"] == {"DCR": "abababab", "CRD": "aaaabbbb"}[mode]


def test_channels_picked_once_are_groups_of_their_own() -> None:
    # The first two channels are read once more, so that they cost more than the others.
    found = between("c, d = Split<axis = 1, num_outputs = 2>(a) e = Conv(c, w2) b = Add(a, e)", {"w2": (4, 2, 1, 1)})
    assert found == [
        {"w0:0": "ab..", "w1:1": "ab..", "w2:0": "ab..", "w2:1": "ab"},
        {"w0:0": "..ab", "w1:1": "..ab", "w2:0": "..ab"},
    ]


@pytest.mark.parametrize(("mode", "frozen"), [("constant", False), ("edge", True)])
def test_padded_channels(mode: str, frozen: bool) -> None:
    pads = "pads = Constant<value = int64[8] {0, 1, 0, 0, 0, -1, 0, 0}>() "
    found = between(f'{pads} b = Pad<mode = "{mode}">(a, pads)')
    # The channel that is cut off is the only one of its kind, and nothing makes the one of zeros.
    assert found == ([] if frozen else [{"w0:0": "abc.", "w1:1": ".abc"}])


# Mixers


def test_normalizations_mix_and_are_reported() -> None:
    text = """
    mixed (float[N,5,6] x) => (float[N,5,2] out) {
      a = MatMul(x, w0)
      n = LayerNormalization(a, scale, shift)
      h = MatMul(n, w1)
      m = ReduceMean<keepdims = 1>(h, axes)
      c = Sub(h, m)
      out = MatMul(c, w2)
    }
    """.replace("out) {", "out) <int64[1] axes = {-1}> {")
    weights = {"w0": (6, 4), "scale": (4,), "shift": (4,), "w1": (4, 3), "w2": (3, 2)}
    first, second = channel_groups(model_of(text, weights)).groups
    assert [node.op_type for node in first.mixers] == ["LayerNormalization"]
    assert [node.op_type for node in second.mixers] == ["ReduceMean"]
    assert {"scale:0": "abcd", "shift:0": "abcd"}.items() <= letters(first).items()


@pytest.mark.parametrize(("opset", "scales"), [(21, 4), (18, 2)])
def test_group_normalization(opset: int, scales: int) -> None:
    text = """
    normed (float[1,3,2,2] x) => (float[1,2,2,2] out) {
      a = Conv(x, w0)
      n = GroupNormalization<num_groups = 2>(a, scale, shift)
      out = Conv(n, w1)
    }
    """
    weights = {"w0": (4, 3, 1, 1), "scale": (scales,), "shift": (scales,), "w1": (2, 4, 1, 1)}
    (minor,) = channel_groups(model_of(text, weights, opset)).groups
    (major,) = channel_groups(model_of(text, weights, opset), Layout(splits=Side.MAJOR)).groups
    assert [node.op_type for node in minor.mixers] == ["GroupNormalization"]
    assert not major.mixers
    on_scales = ("scale:0", "shift:0")
    assert letters(minor) == {
        **dict.fromkeys(("w0:0", "a:1", "n:1", "w1:1"), "abab"),
        **(dict.fromkeys(on_scales, "abab") if scales == 4 else {}),
    }
    assert letters(major) == {
        **dict.fromkeys(("w0:0", "a:1", "n:1", "w1:1"), "aabb"),
        **dict.fromkeys(on_scales, "aabb" if scales == 4 else "ab"),
    }


# Products


@pytest.mark.parametrize(("across", "rows", "columns"), [(0, 0, 1), (1, 1, 0)])
def test_products_of_either_orientation(across: int, rows: int, columns: int) -> None:
    text = f"""
    products (float[5,3] x) => (float[5,2] out) {{
      a = Gemm<transB = {across}>(x, w0, b0)
      out = Gemm<transB = {across}>(a, w1)
    }}
    """
    first, second = ((4, 3), (2, 4)) if across else ((3, 4), (4, 2))
    (hidden,) = groups_of(text, {"w0": first, "b0": (4,), "w1": second})
    assert hidden == {f"w0:{columns}": "abcd", "b0:0": "abcd", "a:1": "abcd", f"w1:{rows}": "abcd"}


def test_products_with_the_weight_on_the_left_and_in_batches() -> None:
    text = """
    products (float[2,3,5] x) => (float[2,2,5] out) {
      a = MatMul(w0, x)
      out = MatMul(w1, a)
    }
    """
    weights = {"w0": (4, 3), "w1": (2, 2, 4)}
    (hidden,) = groups_of(text, weights)
    assert hidden == {"w0:0": "abcd", "a:1": "abcd", "w1:2": "abcd"}
    (group,) = channel_groups(model_of(text, weights)).groups
    assert [layer.weight.name for layer in (*group.writers, *group.readers)] == ["w0", "w1"]


@pytest.mark.parametrize("product", ["MatMul(a, t)", 'Einsum<equation = "bik, bkj -> bij">(a, t)'])
def test_products_of_activations_share_what_they_sum_over(product: str) -> None:
    text = f"""
    products (float[1,5,3] x) => (float[1,5,5] out) {{
      a = MatMul(x, w0)
      b = MatMul(x, w1)
      t = Transpose<perm = [0, 2, 1]>(b)
      out = {product}
    }}
    """
    (group,) = groups_of(text, {"w0": (3, 4), "w1": (3, 4)})
    assert group == {"w0:1": "abcd", "a:2": "abcd", "w1:1": "abcd", "b:2": "abcd", "t:1": "abcd"}


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_any_rank(rank: int) -> None:
    sizes, kernel = ",".join(["4"] * rank), (2,) * rank
    text = f"""
    rank (float[1,3,{sizes}] x) => (float[1,2,{sizes.replace("4", "2")}] out) {{ a = Conv(x, w0) out = Conv(a, w1) }}
    """
    (group,) = groups_of(text, {"w0": (4, 3, *kernel), "w1": (2, 4, *kernel)})
    assert group == {"w0:0": "abcd", "a:1": "abcd", "w1:1": "abcd"}
