"""Models lowered to torch: they compute what ONNX Runtime computes, they train, and they say what they cannot do."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import provenance, registry, walk
from graphopt.backend import Array, Differentiable
from graphopt.data import open_data
from graphopt.errors import BackendError, UsageError
from graphopt.generated import generated_feeds

from .torch_models import assert_close, assert_same_as_onnxruntime, model_of, run_in

torch = pytest.importorskip("torch")

from graphopt.backends.torch_fx import backend as torch_backend  # noqa: E402
from graphopt.backends.torch_fx.lowering import lower  # noqa: E402
from graphopt.backends.torch_fx.session import in_float32  # noqa: E402
from graphopt.backends.torch_fx.tensors import to_numpy, to_torch  # noqa: E402

ASSETS = (
    "squeezenet",
    "mobilenet",
    "resnet20",
    "minilm",
    "gutenberg_lm",
    "stories_lm",
    "silero_vad",
    "magika",
    "yunet",
    "digits",
)
# Of noise these make nothing, or infinity.
REAL_INPUTS = ("silero_vad", "magika", "yunet")
DIGITS = Path(__file__).parents[1] / "models" / "digits_cnn.onnx"


def trained_step(model: ir.Model, feeds: Mapping[str, Any], rate: float = 1e-3) -> dict[str, torch.Tensor]:
    """Return the gradients of the mean square of all outputs, by initializer, and take a step against them."""
    module = lower(model, differentiable=True)
    lowered = module.meta["graphopt"]
    weights = {name: module.get_parameter(path) for name, path in lowered.parameters.items()}
    for weight in weights.values():
        weight.data = weight.data.clone()
        weight.requires_grad_(True)
    outputs = module(*(to_torch(np.array(feeds[name])) for name in lowered.inputs))
    sum(one.square().mean() for one in outputs if one.requires_grad).backward()
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for name, gradient in gradients.items():
        weights[name].data -= rate * gradient
    return gradients


REAL_MODELS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "real_models.py"))


@pytest.fixture(scope="module")
def scorer(shared: Path) -> ModuleType:
    found: ModuleType = REAL_MODELS["load_scorer"]()
    return found


@pytest.mark.parametrize("name", ASSETS)
def test_real_models_compute_the_same_and_learn(name: str, scorer: ModuleType) -> None:
    pytest.importorskip("onnxruntime")
    model = graphopt.load(scorer.HERE / "models" / scorer.ASSETS[name][0])
    feeds = generated_feeds(model, 0, sets=1)[0]
    if name in REAL_INPUTS:
        feeds = next(open_data(REAL_MODELS["calibration"](scorer, name, 2), model).batches(2)).feeds
    assert_same_as_onnxruntime(model, feeds)
    gradients = {name: one for name, one in trained_step(model, feeds).items() if one.ndim > 1}
    assert gradients
    for weight, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), weight
    moved = sum(bool(gradient.any()) for gradient in gradients.values())
    # A state that starts at zero gives no gradient to what multiplies it.
    assert moved >= 0.8 * len(gradients)


def test_one_module_takes_every_size() -> None:
    pytest.importorskip("onnxruntime")
    model = graphopt.load(DIGITS)
    with registry.backend("torch").open(model, threads=1) as session:
        for batch in (1, 3, 0):
            feeds = {"image": np.random.default_rng(batch).random((batch, 1, 8, 8), np.float32)}
            assert_close(session.run(feeds), run_in("onnxruntime", model, feeds))


def test_training_twice_is_the_same() -> None:
    model = graphopt.load(DIGITS)
    feeds = generated_feeds(model, 0, sets=1)[0]
    first, second = (trained_step(model, feeds) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def file_mapped_at(address: int) -> str | None:
    """Return the file that is mapped to a place in this process's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        first, last = (int(text, 16) for text in span.split("-"))
        if first <= address < last:
            return name[0] if name else None
    return None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped where")
def test_weights_stay_where_they_are_mapped(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).random((256, 64), np.float32)
    model = model_of("g (float[n,64] x, float[256,64] w) => (float[n,256] y) { t = Transpose(w) y = MatMul(x, t) }")
    stored = model.graph.inputs.pop()
    stored.const_value = ir.tensor(weight, name="w")
    model.graph.initializers["w"] = stored
    graphopt.save(model, tmp_path / "mapped.onnx")
    loaded = graphopt.load(tmp_path / "mapped.onnx")
    module = lower(loaded)
    assert file_mapped_at(module.w.data_ptr()) == str(tmp_path / "mapped.onnx")
    assert not module.w.requires_grad
    twin = copy.deepcopy(module)
    x = torch.ones(2, 64)
    assert torch.equal(twin(x)[0], module(x)[0])
    before = (tmp_path / "mapped.onnx").read_bytes()
    module.w.zero_()
    assert not module(x)[0].any()
    assert twin(x)[0].all()
    assert lower(loaded)(x)[0].all()
    assert (tmp_path / "mapped.onnx").read_bytes() == before


NAMES = (
    "forward",
    "training",
    "a",
    "a.b",
    "a.b.c",
    "0.weight",
    "x/y:0",
    'quo"ted',
    "graph",
    "meta",
    "_code",
    "class",
    "_parameters",
    ".",
)


def test_initializers_of_any_name_become_parameters() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [2])
    weights = [
        ir.Value(name=name, const_value=ir.tensor(np.full(2, i + 1, np.float32))) for i, name in enumerate(NAMES)
    ]
    nodes, total = [], x
    for index, weight in enumerate(weights):
        nodes.append(ir.node("Add", [total, weight], name=f"add {index}"))
        total = nodes[-1].outputs[0]
        total.name = f"sum.{index}"
    total.dtype, total.shape = ir.DataType.FLOAT, ir.Shape([2])
    graph = ir.Graph([x], [total], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="names")
    model = ir.Model(graph, ir_version=10)
    module = lower(model, observe=["sum.0", "a.b"])
    lowered = module.meta["graphopt"]
    assert set(lowered.parameters) == set(NAMES)
    assert lowered.observed == ("sum.0", "a.b")
    values = module(torch.zeros(2))
    assert [one[0].item() for one in values] == [sum(range(1, len(NAMES) + 1)), 1, NAMES.index("a.b") + 1]
    for index, name in enumerate(NAMES):
        assert module.get_parameter(lowered.parameters[name])[0] == index + 1
    assert next(node.meta["onnx"] for node in module.graph.nodes if "operator" in node.meta) == "add 0"
    assert lowered.values["sum.0"].meta["onnx"] == "add 0"


@pytest.mark.parametrize("name", ["self", "torch", "device", "inf", "print", "graphopt"])
def test_an_input_hides_nothing_that_the_code_reads(name: str) -> None:
    model = model_of(f"""g (float[a,b] {name}) => (float[n] y) <int64 zero = {{0}}, int64 one = {{1}}> {{
        size = Size({name}) ramp = Range(zero, size, one) f = Cast<to = 1>(ramp) flat = Constant<value_ints = [-1]>()
        row = Reshape({name}, flat) y = Add(f, row) }}""")
    assert_same_as_onnxruntime(model, {name: np.ones((2, 3), np.float32)})


def test_of_equal_names_the_outermost_is_the_parameter() -> None:
    model = model_of("""g (float[2] x, bool c) => (float[2] y) <float[2] w = {3, 4}> {
        z = If (c) <then_branch = t () => (float[2] a) <float[2] v = {1, 2}> { a = Mul(x, v) },
                    else_branch = e () => (float[2] b) <float[2] v = {5, 6}> { b = Mul(x, v) }>
        y = Add(z, w) }""")
    for graph in walk.graphs_within(model.graph):  # as exporters of old named them
        if graph is not model.graph:
            graph.initializers["v"].name = "w"
    module = lower(model)
    assert module.get_parameter(module.meta["graphopt"].parameters["w"]).tolist() == [3, 4]
    for choice, factor in ((True, np.array([1, 2])), (False, np.array([5, 6]))):
        (y,) = module(torch.ones(2), torch.tensor(choice))
        np.testing.assert_array_equal(y, factor + np.array([3, 4]))


def test_a_shared_weight_is_one_parameter() -> None:
    model = model_of("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Add(x, w) y = Mul(a, w) }")
    assert [name for name, _ in lower(model).named_parameters()] == ["w"]


CONTROL = {
    "if": """g (float[2] x, bool c) => (float[2] y) <float[2] w = {3, 4}> {
        y = If (c) <then_branch = t () => (float[2] a) { a = Mul(x, w) },
                    else_branch = e () => (float[2] b) { k = Constant<value_float = 2.0>() b = Add(x, k) }>
    }""",
    "loop": """g (float[2] x, int64 n) => (float[2] y, float[k,2] rows) <float[2] w = {3, 4}, bool on = {1}> {
        y, rows = Loop (n, on, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t, float[2] r) {
            d = Identity(c) f = Cast<to = 1>(i) u = Mul(s, w) t = Add(u, f) r = Sub(t, x) }>
    }""",
    "nested": """g (float[2] x, int64 n) => (float[2] y) <float[2] w = {3, 4}, bool on = {1}> {
        y = Loop (n, on, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
            two = Constant<value_int = 2>() odd = Mod(i, two) o = Cast<to = 9>(odd) d = Identity(c)
            t = If (o) <then_branch = h () => (float[2] p) { p = Mul(s, w) },
                        else_branch = e () => (float[2] q) { q = Add(s, x) }> }>
    }""",
    "scan": """g (float[2] s, float[5,2] x) => (float[2] y, float[5,2] z) {
        y, z = Scan <num_scan_inputs = 1, scan_output_directions = [1],
            body = b (float[2] a, float[2] e) => (float[2] c, float[2] d) { c = Add(a, e) d = Mul(a, e) }> (s, x)
    }""",
}


@pytest.mark.parametrize("case", CONTROL)
def test_control_flow(case: str) -> None:
    pytest.importorskip("onnxruntime")
    model = model_of(CONTROL[case])
    rng = np.random.default_rng(0)
    shapes = {"x": (5, 2) if case == "scan" else (2,), "s": (2,)}
    for turn in (0, 3):
        numbers = {"c": np.array(bool(turn)), "n": np.array(turn, np.int64)}
        given = {v.name: numbers.get(v.name or "") for v in model.graph.inputs}
        feeds = {k: v if v is not None else rng.random(shapes[k], np.float32) for k, v in given.items() if k}
        assert_same_as_onnxruntime(model, feeds)
    if "w" in model.graph.initializers:
        feeds = {k: np.array(3) if k == "n" else np.array(True) if k == "c" else v for k, v in feeds.items()}
        assert trained_step(model, feeds)["w"].any()


def test_strings_go_round_a_loop() -> None:
    model = model_of("""g (string[2] words, int64 n) => (string[2] last, string[k] rows) <bool on = {1}> {
        last, rows = Loop (n, on, words) <body = b (int64 i, bool c, string[2] s) => (bool d, string[2] t, string r) {
            d = Identity(c) t = Identity(s) r = Gather(words, i) }>
    }""")
    for turns in (0, 2):
        found = run_in("torch", model, {"words": np.array(["a", "b"], object), "n": np.array(turns)})
        assert (found["last"].tolist(), found["rows"].tolist()) == (["a", "b"], ["a", "b"][:turns])


def test_functions_are_computed_in_place_with_what_their_callers_give() -> None:
    pytest.importorskip("onnxruntime")
    import onnx

    text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
    g (float[2] x) => (float[2] y) { a = own.scaled <by = 3.0> (x) y = own.scaled (a) }
    <domain: "own", opset_import: ["" : 21]>
    scaled <by: float = 2.0> (x) => (y) { k = Constant <value_float: float = @by> () y = Mul(x, k) }"""
    proto = onnx.parser.parse_model(text)
    model = ir.from_proto(proto)
    feeds = {"x": np.array([1, 2], np.float32)}
    np.testing.assert_array_equal(run_in("torch", model, feeds)["y"], [6, 12])
    assert_same_as_onnxruntime(model, feeds)
    for node in model.graph:
        node.name = "the same"
    np.testing.assert_array_equal(run_in("torch", model, feeds)["y"], [6, 12])


def test_sizes_stay_on_the_host() -> None:
    """On torch's device `meta` there are no values: reading one as a number fails, and so does mixing devices."""
    model = model_of("""g (float[b,n,4] x, float[m] z) => (float[b,k] y, float[r] w)
    <int64[1] last = {-1}, int64[1] one = {1}> {
        s = Shape<start = 0, end = 1>(x) all = Concat<axis = 0>(s, last) flat = Reshape(x, all)
        size = Size(z) twice = Add(size, size) zero = Constant<value_int = 0>() step = Constant<value_int = 1>()
        ramp = Range(zero, twice, step) f = Cast<to = 1>(ramp) g = Cast<to = 1>(size) w = Mul(f, g)
        mean = ReduceMean(x, last) r = ReduceSum<keepdims = 0>(mean, one) y = Add(flat, r)
    }""")
    module = lower(model).to("meta")
    x, z = torch.empty(3, 5, 4, device="meta"), torch.empty(7, device="meta")
    y, w = module(x, z)
    assert (y.shape, y.device.type) == ((3, 20), "meta")
    assert (w.shape, w.device.type) == ((14,), "meta")
    assert module.meta["graphopt"].buffers == {}
    feeds = generated_feeds(model, 0, sets=1)[0]
    assert_same_as_onnxruntime(model, {**feeds, "x": np.ones((3, 1, 4), np.float32)})


def test_sizes_that_are_tensors_too_stay_on_the_host() -> None:
    model = model_of("""g (float[b,4] x, bool c) => (float[r] y, int64[2] all)
    <int64[1] zero = {0}, int64[1] last = {-1}> {
        rows = SplitToSequence<keepdims = 0>(x) n = SequenceLength(rows) u = Unsqueeze(n, zero)
        all = Concat<axis = 0>(u, last) same = Reshape(x, all) f = Cast<to = 1>(u) scaled = Mul(same, f)
        z = If (c) <
            then_branch = t () => (float[k] p) { wide = Reshape(scaled, all) p = ReduceSum<keepdims = 0>(wide, zero) },
            else_branch = e () => (float[k] q) {
                g = Cast<to = 1>(all) s = ReduceSum(g) h = Mul(scaled, s) q = ReduceMax<keepdims = 0>(h, zero) }>
        y = Identity(z)
    }""")
    for choice in (True, False):
        y, sizes = lower(model).to("meta")(torch.empty(3, 4, device="meta"), torch.tensor(choice))
        assert (y.shape, y.device.type, sizes.device.type) == ((4,), "meta", "meta")
        assert_same_as_onnxruntime(model, {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "c": np.array(choice)})


def test_a_real_language_model_reads_nothing_from_its_device(scorer: ModuleType) -> None:
    model = graphopt.load(scorer.HERE / "models" / scorer.ASSETS["stories_lm"][0])
    (logits,) = lower(model).to("meta")(torch.zeros(2, 9, dtype=torch.int64, device="meta"))
    assert logits.shape[:2] == (2, 9)


def test_every_dtype_goes_there_and_back() -> None:
    for dtype in ir.DataType:
        if dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING) or "FLOAT6" in dtype.name:
            continue
        # The one type without a zero is made of powers of two.
        array = np.array([[1, 1], [1, dtype is ir.DataType.FLOAT8E8M0]]).astype(dtype.numpy())
        back = to_numpy(to_torch(array), dtype)
        assert back.dtype == array.dtype, dtype
        np.testing.assert_array_equal(back, array, err_msg=dtype.name)
    assert to_torch(np.arange(3, dtype=ml_dtypes.bfloat16)).dtype is torch.bfloat16
    assert to_torch(np.arange(6.0)[::-2]).tolist() == [5, 3, 1]
    assert to_torch(np.arange(3, dtype=">f4")).tolist() == [0, 1, 2]
    assert to_torch(np.array(["a", "bc"])).tolist() == ["a", "bc"]


def test_session_of_other_dtypes() -> None:
    model = model_of("""g (bfloat16[2] x, string[2] t, uint16[2] u)
        => (bfloat16[2] y, string[2] s, uint16[2] v, int4[2] w) {
            y = Add(x, x) s = Identity(t) v = Identity(u) w = Cast<to = 22>(u) }""")
    x = np.array([1, 2], ml_dtypes.bfloat16)
    found = run_in("torch", model, {"x": x, "t": np.array(["a", "b"], object), "u": np.array([3, 60000], np.uint16)})
    assert found["y"].tolist() == [2, 4]
    assert [found[name].dtype.name for name in ("y", "v", "w")] == ["bfloat16", "uint16", "int4"]
    assert found["s"].tolist() == ["a", "b"]
    assert found["v"].tolist() == [3, 60000]
    assert found["w"].astype(int).tolist() == [3, 0]


UNKNOWN = (
    "g (float[2] x) => (float[2] y) { a = own.Strange(x) b = own.Strange(a) c = own.Odder(b) y = Relu <slope = 1>(c) }"
)


def test_what_torch_cannot_compute_is_named_all_at_once() -> None:
    with pytest.raises(BackendError) as caught:
        lower(model_of(UNKNOWN))
    told = caught.value.message
    assert "`own::Strange` of version 1 (" in told
    assert "`own::Odder` of version 1 (" in told
    assert "`Relu` with `slope`" in told
    assert caught.value.hint


def opened(text: str = "g (float[2,3] x) => (float[2,3] y) <float[2] w = {1, 2}> { y = Add(x, w) }") -> Any:
    return registry.backend("torch").open(model_of(text))


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "input `x` is not fed"),
        ({"x": np.ones((2, 3), np.float64)}, "input `x` is float32, and was given float64"),
        ({"x": np.ones((2, 3), np.float32), "z": np.ones(1)}, "no input `z`"),
        ({"x": np.ones((2, 3), np.float32)}, "torch fails at node `Add->y`"),
    ],
)
def test_what_is_wrong_with_a_feed_is_said_in_one_line(feeds: dict[str, Array], words: str) -> None:
    with pytest.raises(BackendError, match=words) as caught, opened() as session:
        session.run(feeds)
    assert caught.value.hint


def test_a_default_is_a_constant() -> None:
    model = model_of("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    with registry.backend("torch").open(model) as session:
        assert session.input_names == ["x"]
        assert session.run({"x": np.zeros(2, np.float32)})["y"].tolist() == [1, 2]
        with pytest.raises(BackendError, match="takes `w` for a constant"):
            session.run({"x": np.zeros(2, np.float32), "w": np.zeros(2, np.float32)})


def test_options_and_places_that_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`gpu` is no device"):
        registry.backend("torch:device=gpu")
    with pytest.raises(BackendError, match="no value `nowhere` to observe"):
        lower(graphopt.load(DIGITS), observe=["nowhere"])
    with pytest.raises(BackendError, match="writes no profile"):
        registry.backend("torch").open(graphopt.load(DIGITS), profile=tmp_path / "p")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="finds no GPU"):
            registry.backend("torch:device=cuda").open(graphopt.load(DIGITS))
    monkeypatch.setattr(torch_backend, "_version", lambda: None)
    with pytest.raises(BackendError, match="PyTorch is not installed") as caught:
        registry.backend("torch").lower(graphopt.load(DIGITS))
    assert caught.value.hint == "`pip install 'graphopt[torch]'`"


def test_what_comes_out_is_the_callers_own() -> None:
    model = model_of(
        "g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}> { y = Identity(x) z = Identity(w) }"
    )
    x = np.zeros(2, np.float32)
    with registry.backend("torch").open(model) as session:
        first = session.run({"x": x})
        x[:] = 7
        first["z"][:] = 7
        assert first["y"].tolist() == [0, 0]
        assert session.run({"x": x})["z"].tolist() == [1, 2]


def test_float32_means_float32_for_as_long_as_a_session_runs() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    with in_float32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert torch.backends.cudnn.allow_tf32 is (before == "tf32")  # torch minds where its older settings disagree


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    model = graphopt.load(DIGITS)
    with registry.backend("torch").open(model, threads=before + 1) as session:
        session.run(generated_feeds(model, 0, sets=1)[0])
    assert torch.get_num_threads() == before


def test_it_is_a_backend_like_any_other(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    backend = registry.backend("torch")
    assert isinstance(backend, Differentiable)
    assert backend.describe() == "torch cpu"
    found = graphopt.compare(DIGITS, DIGITS, backend="torch", threads=1)
    assert found.equal
    result = graphopt.optimize(DIGITS, "simplify", backend="torch", output=tmp_path / "out.onnx", threads=1)
    assert result.report.ok
    assert result.report.backend == "torch cpu"


def test_a_bound_feed_may_change_afterwards() -> None:
    model = graphopt.load(DIGITS)
    feeds = generated_feeds(model, 0, sets=1)[0]
    with registry.backend("torch").open(model, threads=1) as session:
        call = session.bind(feeds)
        feeds["image"][:] = np.nan
        call()
        call()


def test_the_module_is_one_call_a_node() -> None:
    model = graphopt.load(DIGITS)
    provenance.stamp(model)
    module = lower(model)
    named: Sequence[str] = [node.meta["onnx"] for node in module.graph.nodes if "operator" in node.meta]
    kept = [node.name for node in model.graph if node.op_type != "Constant"]
    assert named == kept
    assert all(node.meta["origins"] for node in module.graph.nodes if "operator" in node.meta)
