"""Models compared by layers: where they part, who did it, what is nobody's fault, and what is not compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry
from graphopt.authoring import Pass
from graphopt.backend import Session
from graphopt.commands.layer_tables import listing_of
from graphopt.comparing import layer_comparison
from graphopt.comparing.layer_comparison import LayerComparison, compare_layers
from graphopt.errors import BackendError, DataError, GraphoptError, UsageError

from .broken_passes import BROKEN, Broken, model, samples
from .command_line import run
from .pass_runs import loaded, run_passes

NETWORK = Path(__file__).resolve().parent.parent / "models"

WEIGHT = "{0.1, 0.2, -0.3, 0.4, 0.2, -0.2, 0.4, 0.2, -0.3, 0.3, 0.1, 0.2, 0.4, 0.1, -0.1, 0.3}"
HALVED = "{0.05, 0.1, -0.15, 0.2, 0.1, -0.1, 0.2, 0.1, -0.15, 0.15, 0.05, 0.1, 0.2, 0.05, -0.05, 0.15}"
CHAIN = f"""
<ir_version: 8, opset_import: ["" : 18]>
g (float[n,4] x) => (float[n,4] y) <float[4,4] w = {WEIGHT}, float two = {{2}}> {{
  [fc] a = MatMul (x, w)
  [scale] b = Mul (a, two)
  [tanh] c = Tanh (b)
  [sum] y = Add (c, x)
}}
"""


def chain(*changes: tuple[str, str]) -> ir.Model:
    text = CHAIN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return loaded(onnx.parser.parse_model(text))


def compare(a: Any, b: Any, **options: Any) -> LayerComparison:
    return compare_layers(a, b, threads=1, **options)


def broken(one: Pass) -> ir.Model:
    return run_passes(model(), one).model


# Faults


@pytest.mark.parametrize(("name", "one", "at"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_the_node_at_fault_is_named(name: str, one: Pass, at: str) -> None:
    found = compare(model(), broken(one), data=samples(2))
    assert found.suspect == at
    assert found.ok == (name == "silent-no-op")
    assert json.dumps(found.as_dict())


@pytest.mark.parametrize(("one", "at"), [entry[1:] for entry in BROKEN], ids=[name for name, *_ in BROKEN])
def test_the_node_at_fault_is_named_from_files_too(one: Pass, at: str, tmp_path: Path) -> None:
    files = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for file, state in zip(files, (model(), broken(one)), strict=True):
        graphopt.save(state, file)
    assert compare(*files, data=samples(1)).suspect == at


def test_an_honest_pass_is_not_blamed() -> None:
    found = compare(model(), broken(Broken()), data=samples(2))
    assert found.ok
    assert found.suspect is None
    assert found.first_diverging is None
    assert not found.identical
    assert found.left.unmatched == 0
    assert {one.other_op_type for one in found.layers if one.op_type == "Relu"} == {"Max"}


def test_the_same_model_is_said_to_be_the_same() -> None:
    found = compare(chain(), chain())
    assert found.identical
    assert found.ok
    assert all(one.error.equal for one in found.layers)
    assert [one.name for one in found.layers] == ["a", "b", "c", "y"]
    assert [one.depth for one in found.layers] == [0, 1, 2, 3]
    assert any("nothing was changed" in line for line in listing_of(found, 3).remarks)


def test_a_difference_that_is_made_up_for_is_no_fault() -> None:
    moved = chain(("two = {2}", "two = {4}"), (WEIGHT, HALVED))
    found = compare(chain(), moved)
    assert found.ok
    assert [one.name for one in found.made_up_for] == ["a"]
    assert found.suspect is None


def test_the_first_difference_is_told_from_those_that_follow() -> None:
    found = compare(chain(), chain(("two = {2}", "two = {3}")))
    first = found.first_diverging
    assert first is not None
    assert (first.origin, first.nodes, first.begins) == ("scale", ("scale",), True)
    assert first.changes == ("`scale` (Mul): input 1 (`two`) differs by up to 1",)
    assert [one.name for one in found.layers if one.on_the_way] == ["b", "c", "y"]
    assert [one.name for one in found.layers if one.begins] == ["b"]
    assert found.worst(1) == [first]
    assert first.own_sqnr_db == pytest.approx(20 * math.log10(2), abs=1e-3)


def test_a_large_value_beside_it_does_not_hide_where_an_error_comes_from() -> None:
    masked = (
        ("[sum] y = Add (c, x)", "[mask] d = Add (b, m) [soft] y = Softmax (d)"),
        ("float two", "float[4] m = {0, 0, 0, -10000000}, float two"),
    )
    found = compare(chain(*masked), chain(*masked, ("two = {2}", "two = {2.1}")))
    assert found.suspect == "scale"
    assert not next(one for one in found.layers if one.name == "d").differs


def test_another_shape_is_a_difference() -> None:
    found = compare(chain(), chain(("[tanh] c = Tanh (b)", "[tanh] t = Tanh (b) c = Unsqueeze (t, nought)"),
                                   ("float two", "int64[1] nought = {0}, float two")))  # fmt: skip
    first = found.first_diverging
    assert first is not None
    assert first.name == "c"
    assert first.has_other_shape
    assert first.sqnr_db == -math.inf


# Outputs and inputs


def test_outputs_that_are_lost_new_or_of_another_dtype() -> None:
    other = chain(
        ("(float[n,4] y)", "(double[n,4] y, float[n,4] c)"),
        ("y = Add (c, x)", "s = Add (c, x) y = Cast <to = 11> (s)"),
    )
    said = {one.what for one in compare(chain(), other).faults}
    assert said == {"output `y` is DOUBLE, was FLOAT", "output `c` is new"}
    lost = {one.what for one in compare(other, chain()).faults}
    assert "output `c` is lost" in lost


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y = CastLike (s, x)", "y = Constant <value = float[2] {4, 9}> ()"),  # not computed any more
        ("y = SplitToSequence (x)", "z = Neg (x) y = SplitToSequence (z)"),  # no array
    ],
)
def test_outputs_that_are_no_layers_are_compared_too(before: str, after: str) -> None:
    kind = "seq(float[N])" if "Sequence" in before else "float[2]"
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    g (float[2, 3] x) => (float[2, 3] r, {kind} y) <float[4, 5] c = {{{", ".join(["1"] * 20)}}}> {{
      r = Relu (x)
      s = Shape (c)
      {before}
    }}"""
    first, second = (loaded(onnx.parser.parse_model(one)) for one in (text, text.replace(before, after)))
    found = compare(first, second)
    assert not found.ok
    assert [(one.kind, one.where) for one in found.faults] == [("output", "y")]
    assert not found.outputs.outputs["y"].within()
    assert "no output differs" not in str(listing_of(found, 5).remarks)
    assert compare(first, first).ok


def test_codes_that_stand_for_an_output_do_not_hide_what_comes_behind_them() -> None:
    before = chain(("[sum] y = Add (c, x)", "[sum] d = Neg (c) [relu] y = Relu (d)"))
    codes = "cd = QuantizeLinear (d, s, z) e = DequantizeLinear (cd, s, z) y = Mul (e, two)"
    after = chain(
        ("float two = {2}", "float two = {2}, float s = {0.01}, uint8 z = {0}"),
        ("[sum] y = Add (c, x)", f"[sum] d = Neg (c) {codes}"),
    )
    found = compare(before, after, tolerance=0.05)
    assert not found.ok
    assert found.outputs.outputs["y"].max_abs > 0.05


def test_other_sizes_and_another_order_are_told() -> None:
    fixed = compare(chain(), chain(("float[n,4] x", "float[1,4] x")))
    assert not fixed.identical
    assert [(one.kind, one.what) for one in fixed.differences] == [("shape", "input `x` is of [1, 4], was of [n, 4]")]
    two = ("(float[n,4] y)", "(float[n,4] y, float[n,4] c)")
    swapped = compare(chain(two), chain((two[0], "(float[n,4] c, float[n,4] y)")))
    assert swapped.ok
    assert [one.kind for one in swapped.differences] == ["order"]


def test_models_of_other_inputs_are_not_run() -> None:
    found = compare(chain(), chain(("[n,4] x)", "[n,4] z)"), ("MatMul (x", "MatMul (z"), ("(c, x)", "(c, z)")))
    assert found.cannot_run == "input `x` is now called `z`"
    assert not found.ok
    assert found.layers == []


def test_a_second_model_that_does_not_run_is_a_result() -> None:
    other = chain(("[tanh] c = Tanh (b)", "d = Cast <to = 11> (b) [erf] e = Erf (d) [tanh] c = Cast <to = 1> (e)"))
    found = compare(chain(), other)
    assert found.cannot_run is not None
    assert "the second model does not run" in found.cannot_run
    assert not found.ok


def test_a_first_model_that_does_not_run_on_made_up_inputs_asks_for_real_ones() -> None:
    other = chain(("[tanh] c = Tanh (b)", "d = Cast <to = 11> (b) [erf] e = Erf (d) [tanh] c = Cast <to = 1> (e)"))
    with pytest.raises(BackendError, match="does not run on made-up inputs") as caught:
        compare(other, chain())
    assert "--data" in (caught.value.hint or "")


# Numbers


def test_codes_are_compared_as_what_they_mean() -> None:
    data = {"image": np.load(NETWORK / "digits.npz")["image"][:32]}
    original = graphopt.load(NETWORK / "digits_cnn.onnx")
    result = graphopt.optimize(original, "quant:mode=static:solver=rtn", data=data, verify="structure")
    found = compare(original, result.model, data=data, samples=8)
    read = [one for one in found.layers if one.error.dtype.startswith("float") and not one.error.equal]
    assert len(read) > 3
    # A wrong pair would have about 0 dB.
    assert min(one.sqnr_db for one in read) > 15
    assert any(one.other != one.name for one in read)
    lowest = {depth.depth: depth.lowest_db for depth in found.by_depth()}
    assert lowest[max(lowest)] == min(one.sqnr_db for one in read if one.depth == max(lowest))


def test_wrong_codes_are_found_where_they_are_read() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    g (float[n,4] x) => (float[n,4] y) <float s = {0.05}, uint8 z = {128}, float t = {0.05}> {
      [abs] a = Abs (x)
      [q] q = QuantizeLinear (a, s, z)
      [dq] d = DequantizeLinear (q, t, z)
      [tanh] y = Tanh (d)
    }
    """
    models = [loaded(onnx.parser.parse_model(one)) for one in (text, text.replace("t = {0.05}", "t = {0.07}"))]
    found = compare(*models)
    first = found.first_diverging
    assert first is not None
    assert (first.name, first.other) == ("a", "q")
    assert first.sqnr_db == pytest.approx(20 * math.log10(5 / 2), abs=1e-3)


def test_half_precision_is_judged_by_its_own_rounding() -> None:
    result = graphopt.optimize(chain(), "cast:compute=half:keep=none", verify="structure")
    found = compare(chain(), result.model)
    coarse = [one for one in found.layers if not one.error.equal]
    assert coarse
    assert not any(one.error.mismatch for one in coarse)
    assert {"b", "y"} <= {one.name for one in found.layers}
    assert found.ok


def test_pieces_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    other = chain(("two = {2}", "two = {3}"))
    whole = compare(chain(), other)
    monkeypatch.setattr(layer_comparison, "_GROUP_BYTES", 1)
    monkeypatch.setattr(layer_comparison, "_CHUNK_ELEMENTS", 5)
    pieces = compare(chain(), other)
    # The runtime may put other operators together, which rounds otherwise.
    for one, two in zip(whole.layers, pieces.layers, strict=True):
        assert one.name == two.name
        assert one.max_abs_error == pytest.approx(two.max_abs_error, rel=1e-4, abs=1e-6)
        assert one.sqnr_db == pytest.approx(two.sqnr_db, abs=0.01)
    assert pieces.suspect == whole.suspect == "scale"


def test_only_as_many_samples_as_asked() -> None:
    assert compare(chain(), chain(), data=[{"x": np.ones((1, 4), np.float32)}] * 5, samples=3).samples == 3


# Judges


@dataclass(frozen=True)
class Sloppy:
    """A runtime whose every result is a little too large, or which is never twice the same."""

    factor: float = 1.01
    unsteady: bool = False
    count: list[int] = field(default_factory=list, compare=False)

    name = "sloppy"
    help = "rounds carelessly"

    def missing(self) -> None:
        return None

    def describe(self) -> str:
        return "sloppy"

    def open(self, model: ir.Model | Path, **options: Any) -> Session:
        session = registry.backend("onnxruntime").open(model, **options)
        exact = session.run

        def run(feeds: Any) -> Any:
            self.count.append(1)
            factor = 1 + (self.factor - 1) * (len(self.count) if self.unsteady else 1)
            return {name: (value * factor).astype(value.dtype) for name, value in exact(feeds).items()}

        session.run = run  # type: ignore[method-assign]
        return session


def test_judges_that_disagree_on_the_original_blame_nobody() -> None:
    doubled = chain(("Mul (a, two)", "Add (a, a)"))
    found = compare(chain(), doubled, other_backend=Sloppy())
    assert found.judges_disagree
    assert not found.ok
    assert found.suspect is None
    assert found.judges == ("onnxruntime cpu", "sloppy")
    assert any(line.startswith("nobody is blamed") for line in listing_of(found, 3).remarks)


def test_judges_that_disagree_a_little_do_not_excuse_a_fault() -> None:
    found = compare(chain(), chain(("two = {2}", "two = {3}")), other_backend=Sloppy(1.00001))
    assert not found.judges_disagree
    assert found.suspect == "scale"


def test_a_model_that_differs_from_run_to_run_is_unsteady() -> None:
    found = compare(chain(), chain(), other_backend=Sloppy(unsteady=True))
    assert "unsteady" in {one.kind for one in found.faults}


# What is asked for


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: compare(chain(), chain(), samples=0), UsageError, "0 samples"),
        (lambda: compare(chain(), chain(), data={"y": np.ones((2, 4))}), DataError, "x"),
        (lambda: compare("nowhere.onnx", chain()), GraphoptError, "nowhere.onnx"),
        (lambda: compare(chain(("Tanh (b)", "Nonsense (b)")), chain()), GraphoptError, "Nonsense"),
        (lambda: compare(chain(), chain(), other_backend="nonsense"), UsageError, "nonsense"),
    ],
    ids=["samples", "data", "file", "first-model", "backend"],
)  # fmt: skip
def test_mistakes(call: Callable[[], Any], error: type[GraphoptError], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        call()
    assert caught.value.hint


def test_neither_model_is_changed() -> None:
    models = model(), broken(Broken())
    before = [graphopt.summarize(one) for one in models]
    texts = [[str(node) for node in one.graph] for one in models]
    compare(*models, data=samples(1))
    assert [graphopt.summarize(one) for one in models] == before
    assert [[str(node) for node in one.graph] for one in models] == texts


# The command


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for path, one in zip(paths, (chain(), chain(("two = {2}", "two = {3}"))), strict=True):
        graphopt.save(one, path)
    return paths


def test_command(files: tuple[Path, Path]) -> None:
    outcome = run("compare", *files, "--layers")
    assert outcome.code == 1
    assert "first diverging: `b` (Mul, depth 1)" in outcome.out
    assert "look first at `scale`" in outcome.out
    assert run("compare", files[0], files[0], "--layers").code == 0
    assert run("compare", *files, "--layers", "--tolerance", 1e6).code == 0


def test_command_lists_every_value(files: tuple[Path, Path]) -> None:
    lines = [line.split() for line in run("compare", *files, "--layers", "-v").out.splitlines()]
    assert {"a", "b", "c", "y"} <= {line[0] for line in lines if line}


def test_command_as_json(files: tuple[Path, Path]) -> None:
    found = json.loads(run("compare", *files, "--layers", "--json").out)
    assert found["suspect"] == "scale"
    assert found["first_diverging"]["sqnr_db"] == pytest.approx(6.02, abs=0.01)
    assert [one["name"] for one in found["layers"]] == ["a", "b", "c", "y"]


def test_command_on_two_backends(files: tuple[Path, Path]) -> None:
    assert run("compare", files[0], files[0], "--other-backend", "reference").code == 0
    assert run("compare", files[0], files[0], "--layers", "--other-backend", "reference").code == 0


@pytest.mark.parametrize("option", ["--metric", "--labels"])
def test_command_scores_no_layers(files: tuple[Path, Path], option: str) -> None:
    outcome = run("compare", *files, "--layers", option, "top1")
    assert outcome.code == 2
    assert "metrics are of outputs, not of layers" in outcome.err
