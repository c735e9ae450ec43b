"""A model that fails is reduced to the few nodes that fail, each candidate a valid model that fails the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphopt
from graphopt import registry, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.debugging.failures import telling
from graphopt.debugging.isolation import Died, Isolation
from graphopt.debugging.reduction_search import fewest
from graphopt.errors import GraphoptError, UsageError

from .broken_passes import Broken, model, samples
from .command_line import contents, run
from .pass_runs import loaded, outputs_of

BLOCKS = 125
# Eight nodes; the tangent of doubles, which ONNX Runtime has no kernel for, is put into the middle of one.
BLOCK = """
  [scale_{i}] s{i} = Mul (h{i}, weight) [shift_{i}] t{i} = Add (s{i}, bias) [relu_{i}] r{i} = Relu (t{i})
  [half_{i}] a{i} = Sigmoid (r{i}) [other_{i}] b{i} = Tanh (t{i}) [both_{i}] c{i} = Mul (a{i}, b{i}) {odd}
  [norm_{i}] n{i} = LayerNormalization ({last}, weight) [sum_{i}] h{next} = Add (h{i}, n{i})
"""
ODD = "[down] d = Cast <to = 11> (c{i}) [odd] e = Tan (d) [up] f = Cast <to = 1> (e)"
HIDDEN_AT = 71


def refused_model(blocks: int = BLOCKS, hidden_at: int = HIDDEN_AT) -> ir.Model:
    """Return a model of eight nodes a block, one of which ONNX Runtime refuses."""
    text = "".join(
        BLOCK.format(
            i=i,
            next=i + 1,
            odd=ODD.format(i=i) if i == hidden_at else "",
            last="f" if i == hidden_at else f"c{i}",
        )
        for i in range(blocks)
    )
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        deep (float[n,64] x) => (float[n,64] y) {{ [start] h0 = Identity (x) {text} [end] y = Neg (h{blocks}) }}"""
    )
    for name in ("weight", "bias"):
        array = np.linspace(0.5, 1.5, 64, dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return loaded(proto)


def ops(found: graphopt.Reduction) -> list[str]:
    return [node.op_type for node in walk.every_node(found.model)]


# The search


@given(st.integers(1, 200), st.data())
def test_fewest_finds_what_is_needed(count: int, data: Any) -> None:
    needed = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=4))
    assert fewest(range(count), lambda some: needed <= set(some)) == sorted(needed)


def test_fewest_asks_little() -> None:
    asked: list[int] = []

    def fails(some: Any) -> bool:
        asked.append(len(some))
        return 613 in some

    assert fewest(range(1000), fails) == [613]
    assert len(asked) < 30


@given(st.integers(1, 60), st.integers(0, 1000))
def test_what_does_not_fail_monotonously_still_ends(count: int, seed: int) -> None:
    def fails(some: Any) -> bool:
        return len(some) == count or (sum(some) * 7919 + seed) % 3 == 0

    found = fewest(range(count), fails)
    assert found
    assert fails(found)


# Failures of a runtime


def test_a_thousand_nodes_that_a_runtime_refuses(tmp_path: Path) -> None:
    big = refused_model()
    assert sum(1 for _ in big.graph) > 1000
    found = graphopt.reduce(big, output=tmp_path / "found", threads=1)
    assert ops(found) == ["Tan"]
    assert found.nodes == (1005, 1)
    assert found.bytes[1] < 200
    assert found.tried < 60
    assert "Tan" in found.failure.text
    assert contents(tmp_path / "found").keys() == {"reduced.onnx", "inputs.npz", "reproducer.toml", "README.md"}
    onnx.checker.check_model(str(tmp_path / "found" / "reduced.onnx"), full_check=True)
    replay = graphopt.replay(tmp_path / "found")
    assert replay.fails
    assert "Tan" in replay.text


@dataclass(frozen=True)
class Bent:
    """ONNX Runtime, but wrong about every Tanh behind a Relu."""

    name: ClassVar[str] = "bent"
    help: ClassVar[str] = "wrong on purpose"
    only_optimized: bool = False

    def missing(self) -> None:
        return None

    def describe(self) -> str:
        return "bent"

    def open(self, model: Any, *, threads: int = 0, optimize: bool = True, profile: Path | None = None) -> Any:
        model = graphopt.load(model) if isinstance(model, Path) else model.clone()
        for node in list(model.graph) if optimize or not self.only_optimized else ():
            source = node.inputs[0].producer() if node.inputs else None
            if node.op_type == "Tanh" and source is not None and source.op_type == "Relu":
                node.op_type = "Sigmoid"
        return registry.backend("onnxruntime").open(model, threads=threads, optimize=optimize)


@pytest.fixture
def bent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.table

    def table(kind: str) -> Any:
        return {**real(kind), "bent": Bent} if kind == "BACKENDS" else real(kind)

    monkeypatch.setattr(registry, "table", table)


MIXED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n,12,8] x, bool c) => (float[m,k] y, float[n,12,8] z) <float[8,8] w = {WEIGHTS}, int64[2] to = {-1, 24}> {
  [mul] a = MatMul (x, w)
  [split] parts = SplitToSequence <axis = 1> (a)
  [at] first = Constant <value_int = 0> ()
  [pick] p = SequenceAt (parts, first)
  [which] q = If (c) <
    then_branch = t () => (float[n,12,8] tq) { [in_relu] tr = Relu (a) [in_tanh] tq = Tanh (tr) },
    else_branch = e () => (float[n,12,8] eq) { [in_neg] eq = Neg (a) }
  >
  [sum] s = Add (q, p)
  [flat] f = Reshape (s, to)
  [relu] r = Relu (f)
  [tanh] t1 = Tanh (r)
  [out] y = Exp (t1)
  [side] z = Sqrt (a)
}
""".replace("WEIGHTS", ", ".join(f"{i % 7}" for i in range(64)))


def mixed() -> ir.Model:
    return loaded(onnx.parser.parse_model(MIXED))


def test_two_backends_that_differ(bent: None, tmp_path: Path) -> None:
    found = graphopt.reduce(mixed(), backend="onnxruntime", other_backend="bent", output=tmp_path / "found", threads=1)
    assert ops(found) == ["Relu", "Tanh"]
    assert sum(array.size for array in found.feed.values()) == 1
    assert "bent and onnxruntime cpu differ" in found.failure.text
    assert graphopt.replay(tmp_path / "found").fails


def test_a_runtime_whose_optimizations_are_wrong(bent: None) -> None:
    found = graphopt.reduce(mixed(), backend="bent:only_optimized=true", threads=1)
    assert ops(found) == ["Relu", "Tanh"]
    assert "the optimizations of bent change the outputs: output `" in found.failure.text


def test_what_is_in_a_branch_is_taken_out_of_it() -> None:
    def check(file: Path) -> bool:
        nodes = list(walk.every_node(graphopt.load(file)))
        return not any(node.name == "in_tanh" for node in nodes)

    found = graphopt.reduce(mixed(), check=check, threads=1)
    assert [node.name for node in found.model.graph] == ["in_tanh"]


def test_branches_that_share_names_are_entered_one_after_the_other() -> None:
    branches = "then_branch = {0} () => (float[2] o_{0}) <float[2] k = {{1, {1}}}> {{ s = {2} (x, k) o_{0} = {3} (s) }}"
    branches += ", else_branch = e{0} () => (float[2] q_{0}) <float[2] k = {{1, 2}}> {{ q_{0} = Sub (x, k) }}"
    first, second = branches.format("t1", 3, "Add", "Tanh"), branches.format("t2", 4, "Mul", "Sin")
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y, float[2] z) {{
      y = If (c) <{first}> z = If (c) <{second}>
    }}"""

    def check(file: Path) -> bool:
        kinds = {node.op_type for node in walk.every_node(graphopt.load(file))}
        return not kinds >= {"Add", "Tanh", "Mul", "Sin"}

    found = graphopt.reduce(loaded(onnx.parser.parse_model(text)), check=check, threads=1)
    assert sorted(ops(found)) == ["Add", "Mul", "Sin", "Tanh"]
    assert outputs_of(found.model, found.feed)


def test_what_exporters_say_of_a_model_goes() -> None:
    big = mixed()
    for node in big.graph:
        node.metadata_props["trace"] = "x" * 10_000
        node.doc_string = "y" * 10_000
    found = graphopt.reduce(big, check=lambda file: b"Sqrt" not in file.read_bytes(), threads=1)
    assert ops(found) == ["Sqrt"]
    assert found.bytes[1] < 200


def test_every_candidate_is_valid_and_runs() -> None:
    faults: list[str] = []
    tried = 0

    def check(file: Path) -> bool:
        nonlocal tried
        proto = onnx.load(file)
        tried += 1
        try:
            onnx.checker.check_model(proto, full_check=True)
        except Exception as error:
            faults.append(str(error))
        return not {"Exp", "SequenceAt"} <= {node.op_type for node in proto.graph.node}

    found = graphopt.reduce(mixed(), check=check, threads=1)
    assert tried > 10
    assert not faults
    # What makes a sequence cannot be an input, so that it stays.
    assert sorted(ops(found)) == ["Exp", "SequenceAt", "SplitToSequence"]
    assert outputs_of(found.model, found.feed)


# Failures of passes


@pytest.mark.parametrize(("fault", "left"), [("wrong-zero-point", "dq_11"), ("wrong-dtype", "norm_5")])
def test_a_pass_that_is_wrong_about_one_node(fault: str, left: str) -> None:
    found = graphopt.reduce(model(), Broken(fault=fault), data=samples(), threads=1)
    assert left in [node.name for node in walk.every_node(found.model)]
    assert found.nodes[1] <= 2
    assert found.bytes[1] < 1000
    assert found.failure.kind == found.original.kind


@dataclass(frozen=True)
class Hostile(Pass):
    """End the process, or never end, where there is a Sqrt behind a MatMul."""

    hangs: bool = False

    name = "hostile"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> None:
        for node in walk.every_node(model):
            source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            if node.op_type == "Sqrt" and source is not None and source.op_type == "MatMul":
                if self.hangs:
                    time.sleep(60)
                sys.stderr.write("about to go\n")
                sys.stderr.flush()
                os.abort()


def test_a_process_that_dies_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = graphopt.reduce(mixed(), Hostile(), isolate=True, threads=1)
    assert ops(found) == ["MatMul", "Sqrt"]
    assert found.failure.text == "the process that runs it is ended by SIGABRT: about to go"
    assert not list(tmp_path.iterdir())


def test_a_process_that_hangs_is_ended() -> None:
    with Isolation(timeout=0.5) as isolation:
        assert isolation.call(time.sleep, 30) == Died("does not end in time")
        assert isolation.call(abs, -3) == 3
        assert isolation.call(os._exit, 7) == Died("ends its process with 7")
        with pytest.raises(UsageError, match="cannot be asked in another process"):
            isolation.call(lambda: None)
        with pytest.raises(GraphoptError, match="could not be tried: ValueError"):
            isolation.call(int, "x")


def test_what_a_process_that_hangs_has_started_is_ended(tmp_path: Path) -> None:
    """A check is a process, too; the end of all, while one is at work, ends it as well."""
    tells = f"echo $$ >> {tmp_path / 'started'}; exec sleep 60"
    with Isolation(timeout=0.5) as isolation:
        assert isolation.call(subprocess.call, ["sh", "-c", tells]) == Died("does not end in time")
    isolation = Isolation()
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(isolation.call, subprocess.call, ["sh", "-c", tells])
        while len(started := (tmp_path / "started").read_text().splitlines()) < 2:
            time.sleep(0.01)
        isolation.close()
        assert isinstance(pending.exception(), (GraphoptError, ValueError))
    assert not any(is_running(int(one)) for one in started)


def is_running(process: int) -> bool:
    """Return whether a process is there, and has not ended by now."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        if Path(f"/proc/{process}/stat").is_file() and ") Z " in Path(f"/proc/{process}/stat").read_text():
            return False
        time.sleep(0.01)
    return True


# Checks of one's own


def script(folder: Path, body: str) -> str:
    file = folder / "check.py"
    file.write_text(f"import sys\nmodel = open(sys.argv[1], 'rb').read()\n{body}\n")
    return f"{sys.executable} {file} {{model}}"


def test_a_command_is_bad_with_one_exit_code(tmp_path: Path) -> None:
    """Another exit code is another failure; the inputs are there to be read."""
    import_lines = "import os\nassert os.path.getsize(sys.argv[2])\n"
    check = script(tmp_path, import_lines + "sys.exit(3 if b'Tanh' in model and b'Exp' in model else 4)")
    found = graphopt.reduce(mixed(), check=f"{check} {{inputs}}", output=tmp_path / "found", threads=1)
    assert sorted(ops(found)) == ["Exp", "Tanh"]
    assert found.failure.text.endswith("exits with 3")
    assert graphopt.replay(tmp_path / "found") == graphopt.Replay(True, found.failure.text)
    (tmp_path / "check.py").write_text("")
    assert graphopt.replay(tmp_path / "found") == graphopt.Replay(False, "the model shows no failure")
    (tmp_path / "check.py").write_text("raise SystemExit(9)")
    assert graphopt.replay(tmp_path / "found").text.startswith("another failure by now: ")


@pytest.mark.parametrize(
    ("kind", "nodes"), [("float", "a = Abs (file) y = Neg (a)"), ("string", "y = Identity (file)")]
)
def test_inputs_of_any_name_and_of_texts(kind: str, nodes: str, tmp_path: Path) -> None:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({kind}[2] file) => ({kind}[2] y) {{ {nodes} }}'
    body = "import numpy\nassert numpy.load(sys.argv[2])['file'].shape\nsys.exit(b'Neg' in model or b'Ident' in model)"
    check = f"{script(tmp_path, body)} {{inputs}}"
    found = graphopt.reduce(loaded(onnx.parser.parse_model(text)), check=check, output=tmp_path / "found", threads=1)
    assert found.nodes[1] == 1
    assert graphopt.replay(tmp_path / "found") == graphopt.Replay(True, found.failure.text)


def test_what_hangs_is_not_waited_for_when_it_is_replayed(tmp_path: Path) -> None:
    network = loaded(onnx.parser.parse_model(TINY))
    check = "sh -c 'exec sleep 60' {model}"
    found = graphopt.reduce(network, check=check, timeout=0.2, seconds=0.1, output=tmp_path / "found", threads=1)
    assert found.failure.text == "the process that runs it does not end in time"
    assert graphopt.replay(tmp_path / "found").fails


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the model shows no failure"),
        ({"check": lambda file: True}, "the model shows no failure"),
        ({"check": lambda file: 1 / 0}, "the check failed: ZeroDivisionError"),
        ({"check": "true"}, "does not say where the model goes"),
        ({"check": "true {model}", "passes": "simplify"}, "give either passes or a check"),
        ({"passes": "no-such-pass"}, "unknown pass"),
        ({"backend": "no-such-backend"}, "unknown backend"),
        ({"output": "/dev/null"}, "is there already"),
        ({"output": "no/such/folder/at/all"}, "there is no folder"),
    ],
)
def test_what_cannot_be_reduced_is_refused(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        graphopt.reduce(loaded(onnx.parser.parse_model(TINY)), **given)
    assert message in caught.value.message
    assert caught.value.hint


TINY = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { a = Abs (x) y = Neg (a) }'


def test_time_may_be_up() -> None:
    def check(file: Path) -> bool:
        time.sleep(0.01)
        return False

    found = graphopt.reduce(refused_model(4, 2), check=check, seconds=0.05)
    assert not found.complete


def test_words_that_tell_of_a_failure() -> None:
    first = "onnx fails: no kernel for Erf(13) node with name 'odd' of shape {2,3} at `c71` in odd 12"
    second = "onnx fails: no kernel for Erf(14) node with name 'other' of shape {7} at `c2` in other 9"
    assert (
        telling(first, {"odd"})
        == telling(second, {"other"})
        == "onnx fails no kernel for Erf node with name of shape at in"
    )


# The command line


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graphopt.save(refused_model(4, 2), "deep.onnx")
    outcome = run("debug", "reduce", "deep.onnx", "--threads", 1)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("nodes 37 -> 1, ")
    assert "\n [odd] e = Tan (" in outcome.out
    assert all(" tried: " in line for line in outcome.err.splitlines())
    replay = run("debug", "replay", "deep-reduced")
    assert (replay.code, replay.out.split(":")[0]) == (1, "still fails")
    assert json.loads(run("debug", "replay", "deep-reduced", "--json").out)["fails"] is True
    again = run("debug", "reduce", "deep.onnx")
    assert again.code == 2
    assert "is there already" in again.error
    shown = json.loads(run("debug", "reduce", "deep.onnx", "-o", "second", "--json").out)
    assert shown["nodes"] == {"before": 37, "after": 1}
    assert "add `--isolate`" in run("debug", "reduce", "deep.onnx", "-o", "third", "--timeout", 1).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep-reduced", "deep.onnx", "second"]


@pytest.mark.parametrize(
    ("words", "hint"), [(("bisect",), "`debug bisect`"), (("debug", "reduse"), "`reduce`"), (("debgu",), "`debug`")]
)
def test_commands_that_are_elsewhere_are_named(words: tuple[str, ...], hint: str) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    assert hint in outcome.err


def test_the_group_by_itself_shows_its_commands() -> None:
    outcome = run("debug")
    assert outcome.code == 2
    assert all(f" {name} " in outcome.out for name in ("bisect", "reduce", "replay"))
