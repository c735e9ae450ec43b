"""Every edit is a state of its own: runs can be ended at any, and the one that breaks a model can be found."""

from __future__ import annotations

import json
import math
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.data import open_data
from graphopt.errors import GraphoptError, PassError, UsageError
from graphopt.evaluation import compare_outputs
from graphopt.generated import generated_feeds
from graphopt.manager import PassManager, Setting
from graphopt.pipeline import Pipeline, schedule
from graphopt.rewriter import EditLimitReached, Journal, Rewriter
from graphopt.shapes import forget_inferred, infer_shapes
from graphopt.verify import Signature, problems_of, verify

from .command_line import optimize, run
from .pass_runs import (
    BACKEND,
    BRIEFLY,
    TARGET,
    kinds,
    loaded,
    outputs_of,
    to_bytes,
    weigh_by_noise,
    with_what_it_repairs,
)

# More than there is to lose.
ANY_NOISE_DB = 1e4

LAYERS = 300
CHAIN = (
    (
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2,3] x) => (float[2,3] y) {'
        + " ".join(f"[n{i}] v{i + 1} = {'Neg' if i % 2 else 'Identity'} (v{i})" for i in range(LAYERS))
        + "}"
    )
    .replace("(v0)", "(x)")
    .replace(f"v{LAYERS} =", "y =")
)


def chain() -> ir.Model:
    """Return a long chain of Identity and Neg."""
    return loaded(onnx.parser.parse_model(CHAIN))


def replacing(wrong: Sequence[int], *, op_type: str = "Abs", promise: Guarantee = Guarantee.EXACT) -> Pass:
    """Return a pass that makes every node anew, some of them as another operator."""

    @dataclass(frozen=True)
    class Replacing(Pass):
        name = "replacing"
        guarantee = promise

        def run(self, model: ir.Model, ctx: Context) -> None:
            for index, node in enumerate(list(model.graph)):
                made = ctx.rewriter.make(op_type if index in wrong else node.op_type, node.inputs, sources=[node])
                with ctx.rewriter.edit("remake", node):
                    ctx.rewriter.insert(made, before=node)
                    ctx.rewriter.replace(node.outputs[0], made.outputs[0])
                    ctx.rewriter.erase(node)

    return Replacing()


# The limit


def prefix(model: ir.Model, passes: Any, limit: int | None, data: Any = None) -> tuple[ir.Model, PassManager]:
    """Run passes over a clone, up to an edit."""
    clone = model.clone()
    dataset = open_data(data, clone) if data is not None else None
    weigh = weigh_by_noise(clone, dataset, ANY_NOISE_DB) if dataset is not None else None
    setting = Setting(registry.find("TARGETS", TARGET), registry.backend(BACKEND), threads=1, data=dataset, weigh=weigh)
    steps = schedule(Pipeline.of(passes), has_data=dataset is not None, has_budget=dataset is not None)
    manager = PassManager(steps, setting, edit_limit=limit)
    infer_shapes(clone)
    manager.run(clone)
    forget_inferred(clone)
    return clone, manager


def test_a_full_journal_lets_no_edit_in() -> None:
    model = chain()
    rewriter = Rewriter(model, Journal(limit=1))
    rewriter.set_attribute(model.graph[0], "a", 1)
    with pytest.raises(EditLimitReached):
        rewriter.set_attribute(model.graph[1], "a", 1)
    assert "a" not in model.graph[1].attributes
    assert rewriter.edits == 1


def test_no_pass_can_catch_the_end_of_a_run() -> None:
    @dataclass(frozen=True)
    class Stubborn(Pass):
        name = "stubborn"

        def run(self, model: ir.Model, ctx: Context) -> None:
            for node in model.graph:
                try:
                    ctx.rewriter.set_attribute(node, "a", 1)
                except Exception:
                    continue

    _, manager = prefix(chain(), Stubborn(), 3)
    assert len(manager.journal.edits) == 3
    assert manager.stopped


def test_the_end_of_a_run_skips_what_is_left_and_cleans_up() -> None:
    model, manager = prefix(chain(), [replacing(()), replacing(())], 7)
    assert [len(record.passes) for record in manager.records] == [1]
    assert len(manager.journal.edits) == 7
    verify(model, provenance_too=True)  # the node made and not inserted reads nothing


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    whole, manager = prefix(chain(), "simplify", None)
    same, other = prefix(chain(), "simplify", len(manager.journal.edits))
    assert to_bytes(whole) == to_bytes(same)
    assert other.journal.edits == manager.journal.edits


@pytest.mark.parametrize("name", sorted(registry.table("PASSES")))
def test_the_model_is_whole_after_every_edit(name: str) -> None:
    cls = registry.find("PASSES", name)
    spec = with_what_it_repairs(name)
    exact = cls.guarantee is not Guarantee.LOSSY
    seen = 0
    for model in _models():
        feeds = generated_feeds(model, 0)
        data = feeds if not exact else None
        try:
            _, manager = prefix(model, spec, None, data)
        except PassError:  # of a model without weights nothing is trained
            assert name in BRIEFLY
            continue
        seen += len(manager.journal.edits)
        signature, known = Signature.of(model), problems_of(model)
        expected = [outputs_of(model, feed) for feed in feeds]
        for limit in range(len(manager.journal.edits)):
            state, part = prefix(model, spec, limit, data)
            assert part.journal.edits == manager.journal.edits[:limit]
            verify(state, signature, provenance_too=True, known=known)
            found = [outputs_of(state, feed) for feed in feeds]
            if exact:
                assert compare_outputs(expected, found).within(), f"after edit {limit} of {name}"
            else:
                assert kinds(found[0]) == kinds(expected[0])
    assert seen or name not in ("identities", "dead-code", "fold-constants", "prune", "quant")


def _models() -> list[ir.Model]:
    """Return a few small models on which most passes find something to do."""
    return [loaded(onnx.parser.parse_model(text)) for text in (CLASSIFIER, SHAPES)]


CLASSIFIER = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n,1,8,8] x) => (float[n,4] y, float[n,4] z)
  <float[2,1,3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -2, -3, -4, -5, -6, -7, -8, -9}, float[2] s = {1, 2},
   float[2] b = {0.5, 1}, float[2] m = {0, 1}, float[2] v = {1, 2}, int64[2] flat = {0, -1}, float one = {1},
   float[2,4] f = {1, 2, 3, 4, -4, -3, -2, -1}, float[4] c = {1, 2, 3, 4}, float zero = {0}> {
  [conv] a = Conv <pads = [1, 1, 1, 1]> (x, w)
  [bn] d = BatchNormalization (a, s, b, m, v)
  [relu] e = Relu (d)
  [twice] e2 = Relu (e)
  [pool] p = GlobalAveragePool (e2)
  [flatten] q = Reshape (p, flat)
  [one] r = Mul (q, one)
  [two] r2 = Mul (q, one)
  [first] h = MatMul (r, f)
  [second] h2 = MatMul (r2, f)
  [bias] k = Add (h, c)
  [bias2] k2 = Add (h2, c)
  [same] y = Identity (k)
  [plus] t = Add (k2, zero)
  [there] t1 = Transpose <perm = [1, 0]> (t)
  [back] t2 = Transpose <perm = [1, 0]> (t1)
  [dead] u = Neg (t1)
  [end] z = Sigmoid (t2)
}
"""
SHAPES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x, bool cond) => (float[n,4] y) <int64 i = {0}, int64[1] four = {4}, int64[1] axes = {0}> {
  s = Shape (x)
  n0 = Gather (s, i)
  n1 = Unsqueeze (n0, axes)
  to = Concat <axis = 0> (n1, four)
  r = Reshape (x, to)
  l = Cast <to = 1> (r)
  two = Add (four, four)
  f = Cast <to = 1> (two)
  k = Mul (l, f)
  y = If (cond) <
    then_branch = t () => (float[n,4] p) { a = Neg (k) b = Neg (a) p = Identity (b) },
    else_branch = e () => (float[n,4] q) { c = Relu (k) d = Relu (c) q = Abs (d) }
  >
}
"""


# The search


def test_the_one_wrong_edit_is_found_in_few_checks(tmp_path: Path) -> None:
    at = 171  # a Neg
    told: list[str] = []
    found = graphopt.bisect(
        chain(), replacing([at]), output=tmp_path / "found", on_judged=lambda one: told.append(one.verdict)
    )
    assert found.edit is not None
    assert (found.edit.number, found.edit.pass_name, found.edit.rule) == (at + 1, "replacing", "remake")
    assert found.edit.nodes == (f"n{at}",)
    assert found.edit.origins == {f"n{at}"}
    assert found.total == LAYERS
    assert len(found.judged) <= 2 + math.ceil(math.log2(LAYERS))
    assert told == [one.verdict for one in found.judged]
    assert [line for line in found.before if "Neg" in line and f"[n{at}]" in line]
    assert [line for line in found.after if "Abs" in line]
    assert len(found.before) + len(found.after) < 10
    assert f"--stop-after-edits {at + 1} " in found.repeat
    good, bad = (onnx.load(file) for file in found.files or ())
    x = {"x": np.array([[1, -2, 3], [-4, 5, -6]], np.float32)}
    assert not np.array_equal(outputs_of(good, x)["y"], outputs_of(bad, x)["y"])
    np.testing.assert_array_equal(outputs_of(good, x)["y"], outputs_of(chain(), x)["y"])


def test_a_check_of_ones_own_decides() -> None:
    """The number of operators says nothing of outputs, but a check may say anything of a file."""
    found = graphopt.bisect(chain(), replacing(range(40, LAYERS)), check=lambda file: made_in(file) == 0)
    assert found.edit is not None
    assert found.edit.number == 41


def made_in(file: Path) -> int:
    return sum(node.op_type == "Abs" for node in onnx.load(file).graph.node)


def test_states_that_cannot_be_judged_are_passed_by() -> None:
    wrong = range(LAYERS)

    def check(file: Path) -> bool | None:
        made = made_in(file)
        return None if made in (150, 149, 151, 75) else made < 100

    found = graphopt.bisect(chain(), replacing(wrong), check=check)
    assert found.edit is not None
    assert found.edit.number == 100
    assert "skip" in [one.verdict for one in found.judged]


def test_several_suspects_are_left_where_nothing_between_can_be_judged() -> None:
    def check(file: Path) -> bool | None:
        made = made_in(file)
        return None if 97 < made < 103 else made < 100

    found = graphopt.bisect(chain(), replacing(range(LAYERS)), check=check)
    assert found.edit is None
    assert [edit.number for edit in found.suspects] == [98, 99, 100, 101, 102, 103]


def test_a_result_that_is_malformed_or_does_not_run_is_bad() -> None:
    found = graphopt.bisect(chain(), replacing([5], op_type="Nonsense"))
    assert found.edit is not None
    assert found.edit.number == 6
    assert any("does not exist in opset" in one.why for one in found.judged)


@pytest.mark.parametrize(
    ("passes", "check", "message"),
    [
        (replacing(()), None, "the result is good, with 300 of 300 edits made, none of them idle"),
        ("dead-code", None, "the passes make no edit"),
        (replacing([1]), lambda file: False, "the original is not good itself: by the check"),
        (replacing([1]), lambda file: None, "the original is not good itself: the check cannot tell"),
        (replacing([1]), "true", "check `true` does not say where the model goes"),
        (replacing([1]), "graphopt-no-such-program {model}", "cannot run: No such file"),
        (replacing([1]), "'{model}", "is no command: No closing quotation"),
    ],
)
def test_what_cannot_be_searched_is_refused(passes: Any, check: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        graphopt.bisect(chain(), passes, check=check)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_folder_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    graphopt.save(chain(), tmp_path / "first_bad.onnx")
    for output, message in (
        ("file", "is no folder"),
        ("file/found", "cannot be written"),
        ("", "would be overwritten"),
    ):
        with pytest.raises(UsageError, match=message):
            graphopt.bisect(tmp_path / "first_bad.onnx", "no-pass-is-run", output=tmp_path / output)


def test_an_exit_code_from_128_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="exits with 130"):
        graphopt.bisect(chain(), replacing([1]), check=f"{script(tmp_path, 'sys.exit(130)')} {{model}}")


def script(folder: Path, body: str) -> Path:
    """Write a program that knows, without loading much, how many nodes of a model are an `Identity`."""
    file = folder / "check with a space.py"
    head = f"#!{sys.executable}\nimport sys\ncount = open(sys.argv[1], 'rb').read().count(b'Identity')"
    file.write_text(f"{head}\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
    return Path(f"'{file}'")


# The command line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "chain.onnx"
    onnx.save(onnx.parser.parse_model(CHAIN), path)
    return path


def test_stop_after_edits(model: Path, tmp_path: Path) -> None:
    outcome, report = optimize(model, "--passes", "identities", "--stop-after-edits", 3, "--verify", "structure")
    assert outcome.code == 0, outcome.err
    assert "stopped after 3 edits, as asked" in outcome.out
    assert report["stopped_after_edits"] == 3
    assert report["steps"][0]["edits"] == 3


def test_bisect_command(model: Path, tmp_path: Path) -> None:
    # Bad once fewer than 100 of the 150 are left.
    check = script(tmp_path, "sys.exit(125 if count in (75, 94) else 0 if count >= 100 else 1)")
    args = (
        "debug",
        "bisect",
        model,
        "--passes",
        "identities",
        "--check",
        f"{check} {{model}}",
        "-o",
        tmp_path / "found",
    )
    outcome = run(*args)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    words = [line.split()[0] for line in lines]
    assert words[:5] == ["edit", "pass", "rule", "nodes", "origins"]
    assert {"before", "wrote", "repeat:"} <= set(words)
    for name, count in (("first_bad", 99), ("last_good", 100)):
        nodes = onnx.load(tmp_path / "found" / f"{name}.onnx").graph.node
        assert sum(node.op_type == "Identity" for node in nodes) == count
    assert all(" edits: " in line for line in outcome.err.splitlines())
    shown = json.loads(run(*args[:-2], "--json").out)
    assert shown["found"] is True
    assert f"edit     {shown['suspects'][0]['number']} of {shown['edits']}" in outcome.out


def test_bisect_command_refuses_with_one_line(model: Path) -> None:
    outcome = run("debug", "bisect", model, "--passes", "identities")
    assert outcome.code == 2
    assert "error: the result is good" in outcome.err
    assert run("debug", "bisect", model).code == 2


def test_bisect_leaves_the_model_alone() -> None:
    model = chain()
    before = to_bytes(model)
    graphopt.bisect(model, replacing([3]))
    assert to_bytes(model) == before
    assert sum(1 for _ in walk.every_node(model)) == LAYERS
