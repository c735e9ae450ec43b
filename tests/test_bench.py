"""`graphopt bench`: models, backends and sizes in turn, cold starts, and what is said of the figures."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import graphopt
from graphopt import registry
from graphopt.backend import PlacedNode, Placement
from graphopt.benchmarking import benchmark, cold_start
from graphopt.benchmarking.cold_start import ColdStart, measure_cold_start
from graphopt.benchmarking.kernel_profile import KernelTime, Profile
from graphopt.benchmarking.points import parse_sizes, parse_sweeps, points_of
from graphopt.benchmarking.results import Bench, Placed, Profiled, Row, doubts_of, unseen_by
from graphopt.commands.bench_tables import listing_of
from graphopt.errors import BackendError, UsageError
from graphopt.latency import Latency
from graphopt.machine import allowed_cores

from .command_line import classifier, fill, run

QUICK = ("--seconds", 0.1, "--threads", 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fill(tmp_path)


def _save(folder: Path, name: str, nodes: list[onnx.NodeProto], shape: list[Any], out: list[Any]) -> Path:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [helper.make_tensor("two", TensorProto.INT64, [2], [2, -1])],
    )
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    """A model of `batch` × `sequence` × 4."""
    nodes = [helper.make_node("Relu", ["x"], ["y"], "relu")]
    return _save(tmp_path, "sequences", nodes, ["batch", "sequence", 4], ["batch", "sequence", 4])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A model that fails on odd batches."""
    nodes = [helper.make_node("Reshape", ["x", "two"], ["y"], "in_two")]
    return _save(tmp_path, "pairs", nodes, ["batch", 1], [2, None])


def test_every_batch_with_every_size(sequences: Path) -> None:
    args = ("--batch", "1,2", "--sweep", "sequence=3,5,7", *QUICK, "--json")
    found = json.loads(run("bench", sequences, *args).out)
    sizes = [(row["batch"], row["sizes"]["sequence"]) for row in found["rows"]]
    assert sizes == [(1, 3), (1, 5), (1, 7), (2, 3), (2, 5), (2, 7)]
    for row in found["rows"]:
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["median"] * 1e3)
        assert row["ratio"] == 1
    assert found["threads"] == 1
    assert found["inputs"] == "made-up inputs"


def test_table_of_a_sweep(sequences: Path) -> None:
    outcome = run("bench", sequences, sequences, "--sweep", "sequence=3,5", *QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    head, *rows = (line.split() for line in outcome.out.splitlines()[:5])
    assert head[:4] == ["model", "batch", "sequence", "median"]
    assert [row[:3] for row in rows] == [[str(sequences), "1", size] for size in "3355"]
    assert "ratio to the first of each size" in outcome.out


def test_dimensions_of_an_expression_follow(tmp_path: Path) -> None:
    shape = ["batch", "past + sequence", 2]
    path = _save(tmp_path, "net", [helper.make_node("Relu", ["x"], ["y"])], shape, shape)
    model = onnx.load(path)
    for name, dim in (("past_values", "past"), ("tokens", "sequence")):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", dim]))
    onnx.save(model, path)
    found = graphopt.bench([path], sweep={"past": [6], "sequence": [1]}, seconds=0.01, threads=1)
    assert found.rows[0].sizes == {"past": 6, "sequence": 1}


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["--batch", "1,two"], "`--batch 1,two`: `two` is no size", "1,2,4,8"),
        (["--batch", "0"], "`0` is no size", "1,2,4,8"),
        (["--sweep", "sequence"], "names no dimension", "--sweep sequence=16,64,256"),
        (["--sweep", "sequence=4,-1"], "`--sweep sequence=4,-1`: `-1` is no size", "--sweep sequence=1,2,4,8"),
        (["--sweep", "sequence=4", "--sweep", "sequence=8"], "swept twice", "one `--sweep`"),
        (["--sweep", "sequense=4"], "no dimension of an input is called `sequense`", "`sequence`"),
        (["--sweep", "sequence=4", "--data", "data.npz"], "cannot be swept", "`--data`"),
        (["--backend", "onnxruntime,nothing"], "unknown backend `nothing`", "known"),
        (["--backend", "onnxruntime,"], "unknown backend ``", "known"),
        (["--backend", ""], "unknown backend ``", "known"),
        (["--backend", "onnxruntime,onnxruntime"], "backend `onnxruntime` is given twice", "a model twice"),
    ],
)
def test_mistakes(sequences: Path, args: list[str], error: str, hint: str) -> None:
    outcome = run("bench", sequences, *args)
    assert outcome.code == 2
    assert error in outcome.error
    assert hint in outcome.hint
    assert outcome.out == ""


def test_models_of_the_same_inputs_run_on_the_same_values() -> None:
    head = '<ir_version: 9, opset_import: ["": 17]> agraph (int64[n] x) => '
    indexing = f"(float[n, 2] y) <float[50, 2] table = {{{', '.join(['1'] * 100)}}}> {{ y = Gather(table, x) }}"
    texts = [head + indexing, head + "(int64[n] y) { y = Neg(x) }"]
    models = [ir.from_proto(onnx.parser.parse_model(text)) for text in texts]
    (point,) = points_of(models, ["a", "b"], None, 8, {}, 0)
    assert point.feeds[0]["x"].max() > 1
    np.testing.assert_array_equal(*(feed["x"] for feed in point.feeds))


def test_texts_of_sizes() -> None:
    assert parse_sizes("1, 2,4,2", "--batch ") == [1, 2, 4]
    assert parse_sweeps(["a=1,2", "b=c=3"]) == {"a": [1, 2], "b=c": [3]}
    with pytest.raises(UsageError):
        parse_sizes("", "--batch ")


def test_several_backends(model: Path) -> None:
    outcome = run("bench", model, "--backend", "onnxruntime,reference", *QUICK)
    assert outcome.code == 0, outcome.err
    assert [line.split()[1:3] for line in outcome.out.splitlines()[:3]] == [
        ["backend", "batch"],
        ["onnxruntime", "cpu"],
        ["onnx", "reference"],
    ]
    assert "warning: how long onnx reference takes says nothing of any other runtime" in outcome.out


def test_two_of_one_backend_are_told_apart(model: Path) -> None:
    other = "onnxruntime:config=session.disable_prepacking=1"
    found = graphopt.bench([model], backend=f"onnxruntime,{other}", seconds=0.01, threads=1)
    assert [row.backend for row in found.rows] == ["onnxruntime", other]


def _unknown_operator(folder: Path) -> Path:
    path = folder / "custom.onnx"
    other = classifier()
    other.graph.node[2].op_type, other.graph.node[2].domain = "Frobnicate", "nobody"
    other.opset_import.append(helper.make_opsetid("nobody", 1))
    onnx.save(other, path)
    return path


def test_what_is_refused_is_a_row_that_says_so(model: Path, tmp_path: Path) -> None:
    custom = _unknown_operator(tmp_path)
    outcome = run("bench", model, custom, *QUICK, "--json")
    assert outcome.code == 1
    first, second = json.loads(outcome.out)["rows"]
    assert first["failure"] == ""
    assert "refuses the model" in second["failure"]
    assert "median" not in second
    text = run("bench", model, custom, *QUICK).out
    assert "does not run" in text
    assert f"{custom} on onnxruntime cpu: onnxruntime cpu refuses the model" in text


def test_nothing_that_runs_is_an_error(tmp_path: Path) -> None:
    outcome = run("bench", _unknown_operator(tmp_path), *QUICK)
    assert outcome.code == 2
    assert "refuses the model" in outcome.error


def test_a_size_that_fails_is_a_row_that_says_so(pairs: Path) -> None:
    found = graphopt.bench([pairs], batch=[2, 3, 4], seconds=0.01, threads=1)
    assert [bool(row.failure) for row in found.rows] == [False, True, False]
    assert [row.latency is None for row in found.rows] == [False, True, False]
    assert not found.complete


def test_made_up_inputs_it_fails_on_are_said_to_be_made_up(pairs: Path, tmp_path: Path) -> None:
    outcome = run("bench", pairs, "--batch", 3, *QUICK)
    assert outcome.code == 2
    assert "made up" in outcome.hint
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 1), np.float32))
    assert "made up" not in run("bench", pairs, "--batch", 3, "--data", tmp_path / "data.npz", *QUICK).hint


class Counting:
    """ONNX Runtime, its sessions counted."""

    name = "onnxruntime"

    def __init__(self, seconds: float = 0.0) -> None:
        self._backend, self._seconds = registry.backend("onnxruntime"), seconds
        self.opened: list[Any] = []

    def describe(self) -> str:
        return "counting"

    def open(self, model: Any, **options: Any) -> Any:
        time.sleep(self._seconds)
        if len(self.opened) >= self.most:
            raise BackendError("no more of them", hint="none")
        self.opened.append(self._backend.open(model, **options))
        return self.opened[-1]

    most = 1000


@pytest.mark.parametrize(("seconds", "openings"), [(0.0, 12), (0.05, 1)], ids=["at once", "slowly"])
def test_what_opens_quickly_is_opened_often(
    model: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, openings: int
) -> None:
    backend = Counting(seconds)
    monkeypatch.setattr(benchmark, "find_backend", lambda *_: backend)
    found = graphopt.bench([model, model], seconds=0.2, threads=1)
    assert [row.latency.openings for row in found.rows if row.latency] == [openings] * 2
    assert len(backend.opened) == 2 * openings
    assert all(session._session is None for session in backend.opened), "each is closed"


def test_a_backend_that_opens_no_more_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counting()
    backend.most = 3
    monkeypatch.setattr(benchmark, "find_backend", lambda *_: backend)
    with pytest.raises(BackendError, match="no more of them"):
        graphopt.bench([model], seconds=0.2, threads=1)
    assert all(session._session is None for session in backend.opened), "each is closed"


def test_interrupt_closes_what_is_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counting()
    monkeypatch.setattr(benchmark, "find_backend", lambda *_: backend)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.latency.rounds", interrupt)
    cores = allowed_cores()
    outcome = run("bench", model, *QUICK)
    assert outcome.code == 130
    assert "interrupted" in outcome.error
    assert [session._session for session in backend.opened] == [None]
    assert allowed_cores() == cores


def test_data_are_named(model: Path, tmp_path: Path) -> None:
    found = graphopt.bench([model], data=str(tmp_path / "data.npz"), batch=[1, 8], seconds=0.01)
    assert [row.batch for row in found.rows] == [1, 8]
    assert found.inputs == f"samples of `{tmp_path / 'data.npz'}`"
    assert found.threads >= 1


# Cold starts


def test_cold_start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "measure_cold_start", _once)
    # What lies in the current folder is not taken for a library.
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    found = json.loads(run("bench", model.name, "--cold", *QUICK, "--json").out)
    cold = found["rows"][0]["cold"]
    assert all(cold[name] > 0 for name in ("start", "load", "first"))
    assert cold["peak_mb"] >= 0
    assert found["warnings"] == [one for one in found["warnings"] if "cold" not in one]


def _once(*args: Any, **options: Any) -> ColdStart:
    return measure_cold_start(*args, **options, starts=1)


def test_cold_start_takes_the_memory_of_the_weights(tmp_path: Path) -> None:
    megabytes = 32
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT, [2500, 3200], np.ones(8_000_000, np.float32).tobytes(), raw=True
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2500])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3200])],
        [weight],
    )
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    feed = {"x": np.ones((1, 2500), np.float32)}
    cold = measure_cold_start(registry.backend("onnxruntime"), path, feed, threads=1, starts=1)
    assert cold.peak_mb > 0.9 * megabytes


def test_cold_start_of_what_the_runtime_refuses(tmp_path: Path) -> None:
    custom = _unknown_operator(tmp_path)
    with pytest.raises(BackendError, match="refuses the model") as caught:
        measure_cold_start(registry.backend("onnxruntime"), custom, {}, starts=1)
    assert caught.value.hint


def test_cold_start_in_a_process_that_dies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(BackendError, match="ended with 1: it said nothing") as caught:
        measure_cold_start(registry.backend("onnxruntime"), model, {}, starts=1)
    assert "`--cold`" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("", None), ("runtime: hello\n", None), ("7\n", None), ('runtime: hello\n{"start": 1.0}\n', {"start": 1.0})],
)
def test_what_a_runtime_prints_is_no_answer(said: str, expected: dict[str, float] | None) -> None:
    assert cold_start._answer_in(said) == expected


def test_no_cold_start_is_a_warning(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any, **__: Any) -> ColdStart:
        raise BackendError("the process died", hint="no idea")

    monkeypatch.setattr(benchmark, "measure_cold_start", die)
    found = graphopt.bench([model], cold=True, seconds=0.01, threads=1)
    assert found.rows[0].cold is None
    assert f"no cold start of {model}: the process died" in found.warnings


# What is said of the figures

FIRST = Latency(2.0, 1.9, 2.2, 100, 1.0, 4, (1.98, 2.02), (1.0, 1.0))
ROW = Row("a.onnx", "onnxruntime cpu", 4, {}, FIRST)
BENCH = Bench((ROW,), (), 2, (0, 1), "a CPU", "made-up inputs", 0.0, ())


def _second(low: float, high: float, median: float = 1.0) -> Row:
    ratio = (low + high) / 2
    return replace(ROW, model="b.onnx", latency=replace(FIRST, median=median, ratio=ratio, ratio_within=(low, high)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (_second(0.4, 0.625), "1.95× faster (1.60–2.50)"),
        (_second(1.5, 2.0), "1.75× slower (1.50–2.00)"),
        (_second(0.99, 1.01), "the same (0.99–1.01)"),
        (_second(0.5, 1.5), "cannot tell (0.50–1.50)"),
        (replace(ROW, latency=None, failure="no kernel"), "does not run"),
    ],
)
def test_verdicts_in_words(row: Row, expected: str) -> None:
    sheet = listing_of(replace(BENCH, rows=(ROW, row))).sheets[0]
    verdicts = [cells[list(sheet.columns).index("verdict")] for cells in sheet.rows]
    assert verdicts == ["", expected]


def test_one_model_is_compared_with_nothing() -> None:
    sheet = listing_of(BENCH).sheets[0]
    assert list(sheet.columns) == ["model", "batch", "median", "95 %", "p10–p90", "runs", "samples/s"]
    assert list(sheet.rows[0]) == ["a.onnx", "4", "2 ms", "1.98–2.02", "1.9–2.2 ms", "100", "2,000"]


def test_cold_columns() -> None:
    cold = ColdStart(300.0, 25.0, 2.5, 12.3, 3)
    sheet = listing_of(replace(BENCH, rows=(replace(ROW, cold=cold), _second(1, 1)))).sheets[0]
    assert list(sheet.columns)[-4:] == ["start", "load", "first run", "memory"]
    assert list(sheet.rows[0])[-4:] == ["300 ms", "25 ms", "2.5 ms", "12.3 MB"]
    assert list(sheet.rows[1])[-4:] == ["–"] * 4


def test_noise_is_said() -> None:
    assert doubts_of([ROW, _second(0.5, 0.6)], 0.01) == []
    assert doubts_of([ROW], None) == []
    (busy,) = doubts_of([ROW], 0.4)
    assert busy.startswith("other processes took 40% of the cores")
    (noisy,) = doubts_of([ROW, _second(0.9, 1.1), _second(0.8, 1.2)], 0.0)
    assert "too noisy to tell 2 of the ratios, one of which is anywhere from 0.80 to 1.20" in noisy
    loose = replace(ROW, latency=replace(FIRST, median_within=(1.6, 2.4)))
    (wide,) = doubts_of([loose], 0.0)
    assert wide.startswith("medians are known to ±20% only")


def test_a_profile_that_sees_little_of_a_run_is_doubted() -> None:
    """ONNX Runtime's of CUDA: it times how long the CPU takes to hand work to the GPU."""
    for milliseconds, doubted in ((0.4, True), (1.9, False)):
        kernel = KernelTime("Conv", ("conv",), "GPU", False, milliseconds, None, None)
        told = unseen_by([Profiled(ROW.model, ROW.backend, Profile((kernel,)), None)], [ROW])
        assert [one.split(": ")[0] for one in told] == [
            "the kernels of a.onnx on onnxruntime cpu take 20% of its run"
        ] * doubted
    assert unseen_by([Profiled("other.onnx", ROW.backend, Profile(()), None)], [ROW]) == []


def test_where_nodes_ran_is_said() -> None:
    nodes = [PlacedNode("a", "Conv", "GPU"), PlacedNode("b", "Conv", "GPU"), PlacedNode("c", "TopK", "CPU")]
    found = replace(BENCH, placements=(Placed("a.onnx", "two chips", Placement("GPU", tuple(nodes))),))
    line = "a.onnx on two chips: nodes run 2 by GPU, 1 by CPU; not where they were wanted: TopK by CPU"
    assert line in listing_of(found).remarks
    assert found.as_dict()["placements"][0]["nodes"] == {"GPU": 2, "CPU": 1}
    well = replace(BENCH, placements=(Placed("a.onnx", "two chips", Placement("GPU", tuple(nodes[:2]))),))
    assert "a.onnx on two chips: nodes run 2 by GPU" in listing_of(well, verbose=True).remarks
    assert len(listing_of(well).remarks) == 1


def test_conditions_are_said() -> None:
    (line,) = listing_of(BENCH).remarks
    assert line == "onnxruntime cpu, 2 threads on cores 0, 1 of a CPU, made-up inputs, runs interleaved"
    (line,) = listing_of(replace(BENCH, threads=1, cores=(), rows=(ROW, _second(1, 1)))).remarks
    assert line == "onnxruntime cpu, 1 thread of a CPU, made-up inputs, runs interleaved, ratio to the first"
