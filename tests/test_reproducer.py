"""Failures leave a folder to see them again, whole or not at all; replaying it says whether it still fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry, reproducer
from graphopt.authoring import Context, Guarantee, Pass, RewritePass
from graphopt.errors import GraphoptError, PassCrash, UsageError, VerificationError
from graphopt.options import opt
from graphopt.pattern import Match

from .command_line import contents, fill, run
from .pass_runs import loaded, outputs_of

MODEL = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[n,4] x) => (float[n,4] y) <float[4] w = {1, -2, 3, -4}> {
  [same] a = Identity(x) [mul] b = Mul(a, w) [abs] c = Abs(b) [sqrt] y = Sqrt(c)
}
"""


@dataclass(frozen=True)
class AbsToRelu(RewritePass):
    """Put Relu in the place of Abs."""

    to: str = opt("Relu", help="what to put")

    name = "abs-to-relu"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Abs(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return getattr(op, self.to)(m.x)


@dataclass(frozen=True)
class Crash(Pass):
    """Fail, but only on a model without Identity."""

    name = "crash"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> None:
        ctx.rewriter.set_attribute(model.graph[-1], "nonsense", None)
        if not any(node.op_type == "Identity" for node in model.graph):
            raise KeyError("no Identity")


@dataclass(frozen=True)
class Scale(Pass):
    """Double a weight and say it is the same."""

    name = "scale"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> None:
        weight = model.graph.initializers["w"]
        ctx.rewriter.set_weight(weight, np.asarray(weight.const_value.numpy()) * 2)


@pytest.fixture(autouse=True)
def broken_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the broken passes known by name, as a plug-in would."""
    real = registry.table

    def table(kind: str) -> Any:
        own = {one.name: one for one in (AbsToRelu, Crash, Scale)}
        return {**real(kind), **own} if kind == "PASSES" else real(kind)

    monkeypatch.setattr(registry, "table", table)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


def only_folder(folder: Path) -> Path:
    (found,) = folder.glob("graphopt-reproducer-*")
    return found


def facts_of(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "reproducer.toml").read_text())


def test_a_refused_rewrite(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = graphopt.optimize(model, "identities,abs-to-relu", verify="rewrites", reproducers=tmp_path / "kept")
    folder = only_folder(tmp_path / "kept")
    assert folder.name == "graphopt-reproducer-abs-to-relu-1"
    assert contents(folder).keys() == {
        "README.md", "reproducer.toml", "recipe.toml", "before.onnx", "after.onnx", "inputs.npz",
    }  # fmt: skip
    assert result.report.steps[1].refused[0].reproducer == str(folder)
    with np.load(folder / "inputs.npz") as feed:
        sides = [outputs_of(onnx.load(folder / name), dict(feed))["out0"] for name in ("before.onnx", "after.onnx")]
    assert not np.array_equal(*sides)
    facts = facts_of(folder)
    assert facts["kind"] == "rewrite"
    assert facts["rule"] == "abs-to-relu"
    assert facts["versions"]["onnxruntime"]
    assert tomllib.loads((folder / "recipe.toml").read_text()) == {"pass": [{"name": "abs-to-relu"}]}

    replay = graphopt.replay(folder)
    assert replay.fails
    assert replay.text.startswith("what pass `abs-to-relu` makes of it is off by ")
    monkeypatch.setattr(AbsToRelu, "rewrite", lambda self, op, m: op.Max(m.x, op.Neg(m.x)))
    assert not graphopt.replay(folder).fails
    monkeypatch.setattr(AbsToRelu, "applies", lambda self, m: False)
    assert graphopt.replay(folder) == graphopt.Replay(False, "pass `abs-to-relu` leaves it as it is")


def test_a_refused_rewrite_of_a_pass_that_is_not_here_any_more(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphopt.optimize(model, AbsToRelu(), verify="rewrites", reproducers=tmp_path)
    monkeypatch.undo()
    replay = graphopt.replay(only_folder(tmp_path))
    assert replay.fails
    assert replay.text.startswith("unknown pass `abs-to-relu`; the two models kept is off by ")


@pytest.mark.parametrize(("name", "error"), [("crash", PassCrash), ("scale", VerificationError)])
def test_a_pass_that_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[GraphoptError]
) -> None:
    with pytest.raises(error) as caught:
        graphopt.optimize(model, f"identities,{name}", reproducers=tmp_path, seed=3, threads=1)
    folder = only_folder(tmp_path)
    assert f"`graphopt debug replay {folder}` repeats it" in str(caught.value.hint)
    facts = facts_of(folder)
    assert (facts["kind"], facts["pass"], facts["edits_before_the_pass"]) == ("run", name, 1)
    assert facts["options"] == {"seed": 3, "threads": 1}
    assert facts["message"] == caught.value.message
    assert ("KeyError" in (folder / "README.md").read_text()) == (name == "crash")
    assert graphopt.replay(folder) == graphopt.Replay(True, caught.value.message)

    monkeypatch.setattr(registry.find("PASSES", name), "run", lambda self, model, ctx: None)
    assert graphopt.replay(folder) == graphopt.Replay(False, "the run ends well")
    onnx.save(onnx.parser.parse_model(MODEL.replace("-4", "-5")), model)
    with pytest.raises(UsageError, match="is another one by now"):
        graphopt.replay(folder)
    model.unlink()
    with pytest.raises(UsageError, match="is gone"):
        graphopt.replay(folder)


def test_the_first_command_makes_the_model_the_pass_met(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PassCrash):
        graphopt.optimize(model, "identities,crash", reproducers=tmp_path, seed=7)
    folder = only_folder(tmp_path)
    commands = [
        line for line in (folder / "README.md").read_text().splitlines() if line.startswith("graphopt optimize")
    ]
    words = shlex.split(commands[0])
    assert words[-2:] == ["-o", "before_pass.onnx"]
    assert words[words.index("--seed") + 1] == "7"
    assert run(*words[1:-1], tmp_path / "before_pass.onnx").code == 0
    assert [node.op_type for node in onnx.load(tmp_path / "before_pass.onnx").graph.node] == ["Mul", "Abs", "Sqrt"]
    again = run("optimize", tmp_path / "before_pass.onnx", "--recipe", folder / "recipe.toml")
    assert again.code == 3
    assert "pass `crash` failed: KeyError" in again.err


def test_a_model_in_memory_is_kept(tmp_path: Path) -> None:
    given = loaded(onnx.parser.parse_model(MODEL))
    with pytest.raises(PassCrash):
        graphopt.optimize(given, "identities,crash", reproducers=tmp_path, verify="off")
    folder = only_folder(tmp_path)
    assert onnx.load(folder / "original.onnx").graph.node[0].op_type == "Identity"
    assert graphopt.replay(folder).fails


def test_nothing_is_left_unless_asked_and_never_by_halves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)
    with pytest.raises(PassCrash):
        graphopt.optimize(model, "identities,crash")
    assert contents(tmp_path) == before

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reproducer, "_readme", full)
    with pytest.raises(PassCrash) as caught:
        graphopt.optimize(model, "identities,crash", reproducers=tmp_path)
    assert contents(tmp_path) == before
    assert "replay" not in str(caught.value.hint)


def test_what_is_nobodys_mistake_leaves_nothing(tmp_path: Path) -> None:
    network = fill(tmp_path)
    args = ("--passes", "prune:sparsity=0.95", "--data", tmp_path / "data.npz", "--budget", "agreement=0.1%")
    assert run("optimize", network, *args).code == 1
    assert not list(tmp_path.glob("graphopt-reproducer-*"))


def test_a_machine_at_its_end_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Crash, "run", full)
    assert run("optimize", model, "--passes", "crash").code == 2
    assert not list(tmp_path.glob("graphopt-reproducer-*"))


def test_folders_are_numbered(model: Path, tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(PassCrash):
            graphopt.optimize(model, "identities,crash", reproducers=tmp_path)
    assert sorted(folder.name[-1] for folder in tmp_path.glob("graphopt-reproducer-crash-*")) == ["1", "2", "3"]


def test_command_line(model: Path, tmp_path: Path) -> None:
    outcome = run("optimize", model, "--passes", "identities,abs-to-relu", "--verify", "rewrites")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: 1 rewrite was refused for changing the outputs, and left out; `--strict`")
    folder = only_folder(tmp_path)
    assert " REFUSED: rule `abs-to-relu` of pass `abs-to-relu` changes the outputs by " in outcome.out
    assert f"at abs (from abs); see `{folder}`" in outcome.out
    assert [node.op_type for node in onnx.load(tmp_path / "model.opt.onnx").graph.node] == ["Mul", "Abs", "Sqrt"]

    replay = run("debug", "replay", folder)
    assert replay.err == ""
    assert (replay.code, replay.out.split(":")[0]) == (1, "still fails")

    (tmp_path / "model.opt.onnx").unlink()
    strict = ("optimize", model, "--passes", "identities,abs-to-relu", "--verify", "rewrites", "--strict")
    outcome = run(*strict, "--no-reproducers")
    assert outcome.code == 1
    assert "rule `abs-to-relu`" in outcome.error
    assert len(list(tmp_path.glob("graphopt-reproducer-*"))) == 1
    assert run(*strict, "--reproducers", tmp_path / "elsewhere").code == 1
    assert only_folder(tmp_path / "elsewhere")
    assert not (tmp_path / "model.opt.onnx").exists()


@pytest.mark.parametrize("content", [None, "", "kind = 3", 'kind = "other"'])
def test_what_is_no_reproducer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "reproducer.toml").write_text(content)
    outcome = run("debug", "replay", tmp_path)
    assert outcome.code == 2
    assert "is no reproducer" in outcome.error


def test_a_file_where_folders_are_to_go(model: Path) -> None:
    outcome = run("optimize", model, "--passes", "identities", "--reproducers", model)
    assert outcome.code == 2
    assert "it is no folder" in outcome.error


# What is not asked for is not run


def test_structure_runs_no_model_and_loads_no_runtime(model: Path, tmp_path: Path) -> None:
    code = f"""
import sys, graphopt
result = graphopt.optimize({str(model)!r}, 'identities', verify='structure', output={str(tmp_path / "out.onnx")!r})
loaded = [name for name in ('onnxruntime', 'sklearn', 'torch') if name in sys.modules]
report, after = result.report, result.report.after
print(loaded, report.scored, report.deployed, after.latency_ms, after.metrics, after.macs)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[] not run None None {} None"


@pytest.mark.parametrize("mode", ["off", "structure"])
def test_what_was_not_run_is_said(model: Path, mode: str) -> None:
    outcome = run("optimize", model, "--passes", "identities", "--verify", mode)
    assert outcome.code == 0, outcome.err
    rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.split()}
    assert rows["1/1"].endswith("not run")
    assert rows["latency"].split() == ["latency", "not", "run", "not", "run"]
    assert not {"nonzero", "sqnr_db"} & rows.keys()


def test_figures_asked_for_are_measured_whatever_the_mode(tmp_path: Path) -> None:
    network = fill(tmp_path)
    outcome = run(
        "optimize", network, "--passes", "identities", "--verify", "structure", "--data", tmp_path / "data.npz"
    )
    assert outcome.code == 0, outcome.err
    rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.split()}
    assert "100.0 %" in rows["top1"]
    assert "ms" in rows["latency"]


def test_what_weights_hold_is_read_where_a_step_is_lossy_or_somebody_asks(model: Path) -> None:
    exact = graphopt.optimize(model, "identities", verify="structure").report
    assert (exact.before.nonzero, exact.before.bytes_gzip) == (None, None)
    asked = graphopt.optimize(model, "identities", verify="structure", detailed=True).report
    assert asked.before.nonzero == 4
    assert asked.before.bytes_gzip
    lossy = graphopt.optimize(model, "prune", verify="structure").report
    assert lossy.before.nonzero == 4


def test_structure_is_still_checked(model: Path) -> None:
    @dataclass(frozen=True)
    class Rename(Pass):
        name = "rename"
        guarantee = Guarantee.EXACT

        def run(self, model: ir.Model, ctx: Context) -> None:
            ctx.rewriter.set_attribute(model.graph[-1], "nonsense", None)
            model.graph.outputs[0].name = "other"

    with pytest.raises(VerificationError, match="outputs changed"):
        graphopt.optimize(model, Rename(), verify="structure")
    graphopt.optimize(model, Rename(), verify="off")
