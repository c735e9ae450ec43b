"""The command line does what its options say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphopt import authoring
from graphopt.backends import onnxruntime as runtime
from graphopt.passes.lossy.prune import Prune
from graphopt.reporting import rows as report_rows

from .command_line import CLASSES, FEATURES, classifier, contents, fill, optimize, run, samples, scores_of

# The keys of the report that issue A promises; none may go or be renamed.
PROMISED = {
    "report": {"graphopt", "pipeline", "target", "backend", "seed", "steps", "before", "after", "ok"},
    "step": {
        *("pass", "spec", "guarantee", "edits", "nodes_before", "nodes_after", "bytes_before", "bytes_after"),
        *("seconds", "peak_rss_mb", "check", "notes"),
    },
    "check": {"kind", "ok", "max_abs_error"},
    "side": {"nodes", "parameters", "nonzero", "bytes", "bytes_gzip", "macs", "latency_ms", "metrics"},
}
ADDED = {
    "report": {
        "threads",
        "scored",
        "deployed",
        "latency_ratio",
        "latency_within",
        "latency_verdict",
        "latency_batch",
        "advice",
        "stopped_after_edits",
        "specialised",
        "teacher",
        "warnings",
        "failure",
        "findings",
    },
    "step": {"reason", "passes", "refused"},
    "check": {"metrics", "samples", "why"},
    "side": {"placement"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fill(tmp_path)


# Where the result goes


def test_output_goes_beside_the_input_by_default(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    outcome = run("optimize", model, "--passes", "prune")
    output = tmp_path / "net.opt.onnx"
    assert (outcome.code, outcome.err) == (0, "")
    assert f"wrote {output}\n" in outcome.out
    after = contents(tmp_path)
    assert after.keys() - before.keys() == {"net.opt.onnx"}
    assert {name: after[name] for name in before} == before, "an input was changed"
    assert scores_of(output, samples()["x"]).shape == (40, CLASSES)


def test_output_option(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("optimize", model, "--passes", "prune", "-o", tmp_path / "out" / "small.onnx").code == 0
    assert contents(tmp_path / "out").keys() == {"small.onnx"}


def test_an_older_output_is_replaced(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "net.opt.onnx"
    output.write_text("older")
    assert run("optimize", model, "--passes", "prune").code == 0
    assert onnx.load(output).graph.node


def test_external_data_stays_external_in_one_file(model: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.onnx"
    onnx.save(classifier(), big, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=100)
    before = contents(tmp_path)
    assert len(before) > 4, "several data files make the test worth something"
    assert run("optimize", big, "--passes", "prune:sparsity=0", "-o", tmp_path / "out.onnx").code == 0
    after = contents(tmp_path)
    assert after.keys() - before.keys() == {"out.onnx", "out.onnx.data"}
    assert {name: after[name] for name in before} == before, "an input was changed"
    x = samples()["x"]
    np.testing.assert_array_equal(scores_of(tmp_path / "out.onnx", x), scores_of(big, x))


def test_inline_models_get_no_data_file(model: Path, tmp_path: Path) -> None:
    assert run("optimize", model, "--passes", "prune").code == 0
    assert not list(tmp_path.glob("*.data"))


# What runs


def test_recipe_does_as_its_text_does(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[pass]]\nname = "prune"\nsparsity = 0.75\n\n[[pass]]\nname = "quant"\nmode = "weights"\n')
    by_recipe, report = optimize(model, "--recipe", recipe, "-o", tmp_path / "a.onnx")
    assert by_recipe.code == 0
    assert report["pipeline"] == "prune:sparsity=0.75,quant:mode=weights"
    assert run("optimize", model, "--passes", report["pipeline"], "-o", tmp_path / "b.onnx").code == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_target_decides_and_is_reported(model: Path, tmp_path: Path) -> None:
    data = ("--data", tmp_path / "data.npz", "--passes", "quant:mode=static")
    zero_points = {}
    for target in ("ort-cpu-x86", "ort-cpu-arm"):
        output = tmp_path / f"{target}.onnx"
        outcome, report = optimize(model, *data, "--target", target, "-o", output)
        assert outcome.code == 0, outcome.err
        assert report["target"] == target
        quantize = next(node for node in onnx.load(output).graph.node if node.op_type == "QuantizeLinear")
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(output).graph.initializer}
        zero_points[target] = held[quantize.input[2]].dtype
    assert zero_points == {"ort-cpu-x86": np.uint8, "ort-cpu-arm": np.int8}


def test_backend_option(model: Path) -> None:
    outcome, report = optimize(model, "--passes", "prune", "--backend", "reference")
    assert outcome.code == 0, outcome.err
    assert report["backend"] == "onnx reference"


@pytest.mark.parametrize(("provider", "extra"), [("cuda", "gpu"), ("tensorrt", "tensorrt")])
def test_missing_provider_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, provider: str, extra: str) -> None:
    monkeypatch.setattr(runtime.runtime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    outcome = run("optimize", model, "--passes", "prune", "--backend", f"onnxruntime:provider={provider}")
    assert outcome.code == 2
    assert f"backend `onnxruntime {provider}` cannot run here" in outcome.error
    assert f"graphopt[{extra}]" in outcome.hint


def test_threads_reach_every_session_of_the_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    options = runtime._session_options

    def spy(threads: int, optimize: bool, profile: Path | None) -> Any:
        seen.append(threads)
        return options(threads, optimize, profile)

    monkeypatch.setattr(runtime, "_session_options", spy)
    outcome, report = optimize(model, "--passes", "prune", "--data", model.parent / "data.npz", "--threads", "1")
    assert outcome.code == 0
    assert seen
    assert set(seen) == {1}
    assert report["threads"] == 1
    assert "1 thread, batch 1" in outcome.out


# Data


def _folder_of_npz(folder: Path) -> Path:
    data = folder / "parts"
    data.mkdir()
    whole = samples()
    for part, rows in (("a", slice(0, 8)), ("b", slice(8, 40))):
        np.savez(data / f"{part}.npz", **{name: array[rows] for name, array in whole.items()})
    return data


def _test_data_sets(folder: Path) -> Path:
    data = folder / "sets"
    for index, row in enumerate(samples()["x"]):
        (data / f"test_data_set_{index}").mkdir(parents=True)
        tensor = numpy_helper.from_array(row[None], "x")
        (data / f"test_data_set_{index}" / "input_0.pb").write_bytes(tensor.SerializeToString())
    return data


def _function(folder: Path) -> str:
    file = folder / "own_samples.py"
    file.write_text(
        "from pathlib import Path\n"
        "import numpy as np\n"
        "def rows():\n"
        "    held = np.load(Path(__file__).parent / 'data.npz')\n"
        "    for x, label in zip(held['x'], held['labels']):\n"
        "        yield {'x': x[None], 'labels': [label]}\n"
    )
    return f"{file}:rows"


@pytest.mark.parametrize(
    ("make", "labelled"),
    [
        pytest.param(lambda folder: folder / "data.npz", True, id="npz"),
        pytest.param(_folder_of_npz, True, id="folder of npz"),
        pytest.param(_test_data_sets, False, id="test data sets"),
        pytest.param(_function, True, id="function"),
    ],
)
def test_every_form_of_data(model: Path, make: Any, labelled: bool) -> None:
    outcome, report = optimize(model, "--passes", "quant:mode=static", "--data", make(model.parent))
    assert outcome.code == 0, outcome.err
    assert report["scored"].startswith("10 samples of ")
    assert ("top1" in report["after"]["metrics"]) == labelled
    assert report["before"]["metrics"] == ({"top1": 1.0} if labelled else {})


def test_data_forms_agree(model: Path, tmp_path: Path) -> None:
    bytes_of = set()
    for index, data in enumerate((tmp_path / "data.npz", _folder_of_npz(tmp_path), _function(tmp_path))):
        output = tmp_path / f"{index}.onnx"
        # By rounding alone: sums that solvers go by differ in their last bits with how samples come together.
        passes = "quant:mode=static:solver=rtn"
        assert run("optimize", model, "--passes", passes, "--data", data, "-o", output).code == 0
        bytes_of.add(output.read_bytes())
    assert len(bytes_of) == 1


def _record_calibration(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let calibration leave the first feature of each sample it sees."""
    seen: list[float] = []
    observe = authoring.observe

    def spy(model: Any, requests: Any, data: Any, *args: Any, **options: Any) -> Any:
        for batch in data.batches(7):
            seen.extend(batch.feeds["x"][: batch.count, 0].tolist())
        return observe(model, requests, data, *args, **options)

    monkeypatch.setattr(authoring, "observe", spy)
    return seen


def _scored_labels(folder: Path) -> str:
    """Return a metric that leaves the labels it was asked to score."""
    file = folder / "own_metric.py"
    file.write_text(
        "from pathlib import Path\n"
        "import numpy as np\n"
        "def seen(outputs, labels):\n"
        "    assert len(labels) == len(outputs['scores'])\n"
        "    np.save(Path(__file__).parent / 'scored.npy', labels)\n"
        "    return float(len(labels))\n"
    )
    return f"{file}:seen"


@pytest.mark.parametrize(("count", "held_back"), [(40, 10), (5000, 1000), (2, 1)])
def test_held_back_samples_are_never_calibrated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, held_back: int
) -> None:
    model = fill(tmp_path)
    x = np.random.default_rng(0).standard_normal((count, FEATURES)).astype(np.float32)
    x[:, 0] = np.arange(count)  # each sample carries its number, and so does its label
    np.savez(tmp_path / "numbered.npz", x=x, labels=np.arange(count))
    calibrated = _record_calibration(monkeypatch)
    outcome, report = optimize(
        model,
        *("--passes", "quant:mode=static", "--data", tmp_path / "numbered.npz"),
        *("--metric", _scored_labels(tmp_path)),
    )
    assert outcome.code == 0, outcome.err
    scored = set(np.load(tmp_path / "scored.npy").tolist())
    assert len(scored) == held_back
    assert scored.isdisjoint(calibrated)
    assert scored | set(calibrated) == set(range(count))
    assert report["scored"].endswith("not calibrated on")


def test_seed_chooses_what_is_held_back(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "numbered.npz", x=samples()["x"], labels=np.arange(40))
    chosen = []
    for seed in (0, 1, 0):
        outcome, report = optimize(
            model,
            *("--passes", "prune", "--data", tmp_path / "numbered.npz", "--seed", seed),
            *("--metric", _scored_labels(tmp_path)),
        )
        assert outcome.code == 0
        assert report["seed"] == seed
        chosen.append(np.load(tmp_path / "scored.npy").tolist())
    assert chosen[0] == chosen[2] != chosen[1]


def test_eval_is_scored_and_all_of_data_calibrated_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "eval.npz", **samples(7, seed=5))
    calibrated = _record_calibration(monkeypatch)
    outcome, report = optimize(
        model,
        *("--passes", "quant:mode=static", "--data", tmp_path / "data.npz", "--eval", tmp_path / "eval.npz"),
    )
    assert outcome.code == 0
    assert report["scored"] == f"7 samples of `{tmp_path / 'eval.npz'}`"
    assert len(set(calibrated)) == 40


def test_eval_alone_scores_without_calibrating(model: Path, tmp_path: Path) -> None:
    outcome, report = optimize(model, "--passes", "prune", "--eval", tmp_path / "data.npz")
    assert outcome.code == 0
    assert report["scored"].startswith("40 samples")
    assert report["before"]["metrics"] == {"top1": 1.0}


def test_labels_option(model: Path, tmp_path: Path) -> None:
    held = samples()
    np.savez(tmp_path / "named.npz", x=held["x"], y=held["labels"])
    data = ("--passes", "prune", "--data", tmp_path / "named.npz")
    assert "top1" not in optimize(model, *data)[1]["after"]["metrics"]
    assert "top1" in optimize(model, *data, "--labels", "y")[1]["after"]["metrics"]


@pytest.mark.parametrize("metric", ["kl", "sqnr_db", "top5"])
def test_metric_by_name_comes_first(model: Path, tmp_path: Path, metric: str) -> None:
    outcome, report = optimize(model, "--passes", "prune", "--data", tmp_path / "data.npz", "--metric", metric)
    assert outcome.code == 0, outcome.err
    assert next(iter(report["after"]["metrics"])) == metric


def test_metric_of_a_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "measure.py"
    file.write_text("def spread(outputs, labels):\n    return outputs['scores'].std()\nspread.lower_is_better = True\n")
    outcome, report = optimize(
        model, "--passes", "prune", "--data", tmp_path / "data.npz", "--metric", f"{file}:spread"
    )
    assert outcome.code == 0
    held_back = report["before"]["metrics"]["spread"]
    assert 0 < held_back < 100
    assert report["after"]["metrics"]["spread"] != held_back


# Budgets and checks


def test_within_budget(model: Path, tmp_path: Path) -> None:
    outcome, report = optimize(
        model, "--passes", "prune:sparsity=0.1", "--data", tmp_path / "data.npz", "--budget", "top1=30%"
    )
    assert outcome.code == 0, outcome.err
    assert report["ok"] is True
    assert report["failure"] is None


def test_over_budget_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    outcome, report = optimize(
        model, "--passes", "prune:sparsity=0.97", "--data", tmp_path / "data.npz", "--budget", "top1=1%"
    )
    assert outcome.code == 1
    assert "over budget after pass `prune:sparsity=0.97`: top1 went from 100.0 % to" in outcome.error
    assert "wrote" not in outcome.out
    assert contents(tmp_path).keys() - before.keys() == {"report.json"}
    assert report["ok"] is False
    assert report["failure"] in outcome.error


def test_keep_failed_writes_what_is_over_budget(model: Path, tmp_path: Path) -> None:
    outcome, report = optimize(
        model,
        *("--passes", "prune:sparsity=0.97", "--data", tmp_path / "data.npz"),
        *("--budget", "top1=1%", "--keep-failed"),
    )
    assert outcome.code == 1
    assert "over budget" in outcome.error
    assert f"wrote {tmp_path / 'net.opt.onnx'}" in outcome.out
    assert report["ok"] is False
    assert report["after"]["metrics"]["top1"] < 0.99
    assert scores_of(tmp_path / "net.opt.onnx", samples()["x"]).shape == (40, CLASSES)


def test_budget_on_what_is_compared_with_the_original(model: Path, tmp_path: Path) -> None:
    data = ("--passes", "prune:sparsity=0.9", "--data", tmp_path / "data.npz")
    assert optimize(model, *data, "--budget", "kl=1000")[0].code == 0
    outcome = optimize(model, *data, "--budget", "kl=1000", "--budget", "agreement=0.1%")[0]
    assert outcome.code == 1
    assert "agreement went from 100.0 % to" in outcome.error


def test_verify_modes(model: Path) -> None:
    kinds = {}
    for mode in ("off", "final", "each", "rewrites"):
        outcome, report = optimize(model, "--passes", "identities,prune", "--verify", mode)
        assert outcome.code == 0, outcome.err
        kinds[mode] = [(step["check"]["kind"], step["check"]["ok"]) for step in report["steps"]]
    assert kinds["off"] == [("none", None)] * 3
    assert [kind for kind, _ in kinds["final"]] == ["none", "none", "measured"]
    for mode in ("each", "rewrites"):
        assert [ok for _, ok in kinds[mode]] == [True] * 3
        assert kinds[mode][-1] == ("measured", True)


# What is printed and reported


def test_report_has_the_promised_keys_and_no_unknown_ones(model: Path, tmp_path: Path) -> None:
    outcome, report = optimize(model, "--passes", "prune,quant:mode=static", "--data", tmp_path / "data.npz")
    assert outcome.code == 0
    assert f"report: {tmp_path / 'report.json'}" in outcome.out
    steps = report["steps"]
    assert [step["pass"] for step in steps] == ["simplify", "prune", "quant"]
    found = {
        "report": [report],
        "step": steps,
        "check": [step["check"] for step in steps],
        "side": [report["before"], report["after"]],
    }
    for part, documents in found.items():
        for document in documents:
            assert document.keys() == PROMISED[part] | ADDED[part], part
    assert {step["guarantee"] for step in steps} <= {"exact", "equivalent", "lossy"}
    assert report["after"]["bytes"] == (tmp_path / "net.opt.onnx").stat().st_size
    assert report["before"]["bytes"] == model.stat().st_size
    assert report["before"]["macs"] == FEATURES * 32 + 32 * CLASSES
    assert all({"pass", "text"} <= note.keys() for step in steps for note in step["notes"])
    assert "needs canonical form" in steps[0]["notes"][0]["text"]


def test_same_seed_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        outcome = run(
            *("optimize", model, "--passes", "prune,quant", "--data", tmp_path / "data.npz"),
            *("--seed", 7, "-o", tmp_path / name),
        )
        assert outcome.code == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_table_is_on_stdout_and_readable_by_scripts(model: Path, tmp_path: Path) -> None:
    outcome = run("optimize", model, "--passes", "prune", "--data", tmp_path / "data.npz")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["step", "pass", "edits", "nodes", "size", "time", "check"]
    assert lines[1].split()[:2] == ["1/2", "simplify"]
    assert lines[1].endswith("equal, every bit")
    for row in ("size", "size, gzip", "latency", "nodes", "parameters", "nonzero", "top1", "agreement"):
        assert any(line.startswith(f" {row} ") for line in lines), row
    assert not [line for line in lines if line != line.rstrip()]
    assert "\x1b" not in outcome.out
    assert outcome.err == ""


def test_quiet_prints_nothing(model: Path) -> None:
    outcome = run("optimize", model, "--passes", "prune", "-q")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_quiet_still_prints_errors(tmp_path: Path) -> None:
    outcome = run("optimize", tmp_path / "missing.onnx", "--passes", "prune", "-q")
    assert outcome.code == 2
    assert "missing.onnx" in outcome.error


def test_verbose_prints_remarks_about_nodes(model: Path) -> None:
    args = ("optimize", model, "--passes", "prune:pattern=3of5")
    remark = "16 input channels are no multiple of 5"
    assert remark in run(*args, "-v").out
    assert remark not in run(*args).out


def test_verbose_shows_the_cause_of_a_failing_pass(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(Prune, "run", fail)
    quiet, verbose = run("optimize", model, "--passes", "prune"), run("optimize", model, "--passes", "prune", "-v")
    assert "pass `prune` failed: ZeroDivisionError: of all things" in quiet.error
    assert "Traceback" in verbose.err


def test_reason_why_nothing_was_checked_is_given_once(model: Path, tmp_path: Path) -> None:
    needy = onnx.load(model)
    needy.graph.node.insert(0, onnx.helper.make_node("Reshape", ["x", "shape"], ["x2"]))
    needy.graph.node[1].input[0] = "x2"
    needy.graph.initializer.append(numpy_helper.from_array(np.array([7, 16]), "shape"))
    onnx.save(needy, tmp_path / "needy.onnx")
    outcome = run("optimize", tmp_path / "needy.onnx", "--passes", "prune")
    assert outcome.code == 0
    (line,) = (line for line in outcome.out.splitlines() if "does not run" in line)
    assert "not checked" in line
    assert "`--data`" in line


@pytest.mark.parametrize(
    ("before", "after", "paired", "verdict", "shown"),
    [
        (10, 5, 0.5, "faster", "2.0× faster"),
        (10, 20, 2.0, "slower", "2.0× slower"),
        (10, 5, 0.8, "faster", "1.2× faster"),  # of two ratios the one that claims less
        (10, 9.8, 0.98, "the same", "the same"),
        (10, 5, 0.5, "cannot tell", "cannot tell"),
        (10, 9, 1.1, "slower", "cannot tell"),  # one says faster, the other slower
    ],
)
def test_latency_claims_no_more_than_was_measured(
    before: float, after: float, paired: float, verdict: str, shown: str
) -> None:
    assert report_rows.latency_change(before, after, paired, verdict) == shown


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [(323, 328, "1.02× larger"), (1000, 1001, "the same"), (400, 100, "4.0× smaller"), (0, 5, "")],
)
def test_sizes_are_exact(before: int, after: int, shown: str) -> None:
    assert report_rows.ratio(before, after, "smaller", "larger") == shown


# A process of its own


def _python(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120, **options)


_MAIN = "import sys; from graphopt.cli import main; sys.argv = ['graphopt', *sys.argv[1:]]; main()"


def test_real_process(model: Path, tmp_path: Path) -> None:
    done = _python("-c", _MAIN, "optimize", model, "--passes", "prune", "--data", tmp_path / "data.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote" in done.stdout
    done = _python("-c", _MAIN, "optimize", model, "--passes", "prun")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: unknown pass `prun`", "hint: did you mean `prune`?"]


def test_terminal_that_knows_no_arrows(model: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = _python("-c", _MAIN, "list", "passes", env=env)
    assert done.returncode == 0, done.stderr
    assert "x?1" in done.stdout


def test_import_is_light() -> None:
    code = "import graphopt, sys; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in _python("-c", code).stdout.split()}
    assert "graphopt" in loaded
    assert not loaded & {"torch", "onnxruntime", "onnx", "onnx_ir", "numpy", "onnxscript", "typer", "rich"}


def test_help_is_light() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        "from graphopt.cli import main; sys.argv = ['graphopt', '--help']; main()"
    )
    done = _python("-c", code)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert done.returncode == 0
    assert "graphopt" in loaded
    assert "optimize" in done.stdout
    assert not loaded & {"torch", "onnxruntime", "onnx", "onnx_ir", "numpy", "onnxscript"}


def test_termination_leaves_nothing_behind(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tmp_path)
    monkeypatch.setattr(Prune, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    assert run("optimize", model, "--passes", "prune").code == 143
    assert contents(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) is handler


# The other commands


COMMANDS = ("optimize", "compare", "bench", "inspect", "explain", "import", "recover", "sensitivity", "list")


@pytest.mark.parametrize("words", [*COMMANDS, "debug bisect", "debug reduce", "debug replay"])
def test_help_names_what_is_given_in_capitals(words: str) -> None:
    text = run(*words.split(), "--help").out
    (usage,) = re.findall(r"Usage: graphopt .*?\[OPTIONS\](.*)", text)
    assert usage.strip()
    assert usage == usage.upper()
    # A choice is shown as such; of a number or a text, its name.
    assert [kind for kind in re.findall(r"^ +-.*?<([a-z ]+)>", text, re.MULTILINE) if "|" not in kind] == []


def test_version_and_help() -> None:
    assert re.fullmatch(r"graphopt \S+\n", run("--version").out)
    outcome = run("optimize", "--help")
    assert outcome.code == 0
    assert "[default: MODEL.opt.onnx]" in outcome.out
    assert run().code == 2


def test_inspect(model: Path) -> None:
    outcome = run("inspect", model)
    assert (outcome.code, outcome.err) == (0, "")
    for text in ("x: ", "[batch, 16]", "[batch, 3]", "MatMul", "ai.onnx 17", "first", "nonzero"):
        assert text in outcome.out


def test_inspect_json(model: Path) -> None:
    found = json.loads(run("inspect", model, "--json").out)
    assert found["parameters"] == FEATURES * 32 + 32 + 32 * CLASSES
    assert found["macs"] == FEATURES * 32 + 32 * CLASSES
    assert found["bytes"] == model.stat().st_size
    assert found["ops"] == {"MatMul": 2, "Add": 1, "Relu": 1}
    assert found["inputs"][0][0] == "x"
    assert found["largest"][0]["name"] == "first"
    assert sum(found["bytes_by_dtype"].values()) == 4 * found["parameters"]


def _moved(model: Path, by: float) -> Path:
    """Write the classifier with its first bias moved."""
    other = onnx.load(model)
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == "b1")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(by), "b1"))
    onnx.save(other, model.with_name("moved.onnx"))
    return model.with_name("moved.onnx")


def test_compare_with_itself(model: Path, tmp_path: Path) -> None:
    outcome = run("compare", model, model, "--data", tmp_path / "data.npz")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"scores +0 +0 +1\.000000 +200\.0 dB +100\.0% +equal", outcome.out)
    assert "top1: 100.0 % → 100.0 %" in outcome.out
    assert "40 samples of" in outcome.out


def test_compare_exit_code_follows_the_tolerance(model: Path) -> None:
    other = _moved(model, 0.01)
    assert run("compare", model, other).code == 1
    assert "DIFFERS" in run("compare", model, other).out
    assert run("compare", model, other, "--tolerance", 10).code == 0
    assert run("compare", model, other, "--tolerance", 1e-6).code == 1


def test_compare_json(model: Path, tmp_path: Path) -> None:
    outcome = run("compare", model, _moved(model, 0.5), "--data", tmp_path / "data.npz", "--metric", "kl", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert found["within"] is False
    assert found["samples"] == 40
    scores = found["outputs"]["scores"]
    x = samples()["x"]
    a, b = scores_of(model, x).astype(float), scores_of(tmp_path / "moved.onnx", x).astype(float)
    assert scores["max_abs_error"] == pytest.approx(np.abs(a - b).max(), rel=1e-4)
    assert scores["top1_agreement"] == (a.argmax(1) == b.argmax(1)).mean()
    assert found["metrics"]["kl"][0] is None
    assert found["metrics"]["kl"][1] > 0


def test_compare_json_knows_no_infinity(model: Path) -> None:
    other = onnx.load(model)
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == "b1")
    bias.CopyFrom(numpy_helper.from_array(np.full(32, np.nan, np.float32), "b1"))
    onnx.save(other, model.with_name("nan.onnx"))
    outcome = run("compare", model, model.with_name("nan.onnx"), "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(outcome.out, parse_constant=refuse)["outputs"]["scores"]["max_abs_error"] is None


def test_bench(model: Path) -> None:
    outcome = run("bench", model, _moved(model, 0.1), "--seconds", 0.1, "--threads", 1)
    assert (outcome.code, outcome.err) == (0, "")
    rows = outcome.out.splitlines()
    assert re.split(r" {2,}", rows[0].strip())[:3] == ["model", "batch", "median"]
    assert rows[1].endswith("1.00")
    assert re.match(r" onnxruntime cpu, 1 thread( on core \d+)? of .*, made-up inputs, runs interleaved", rows[4])


def test_bench_json(model: Path, tmp_path: Path) -> None:
    args = ("--seconds", 0.1, "--batch", 4, "--data", tmp_path / "data.npz", "--json")
    first, second = json.loads(run("bench", model, _moved(model, 0.1), *args).out)["rows"]
    assert first["model"] == str(model)
    assert first["ratio"] == 1
    assert first["runs"] >= 3
    assert second["ratio_within"][0] <= second["ratio"] <= second["ratio_within"][1]
    assert first["low"] <= first["median"] <= first["high"]
    assert first["batch"] == second["batch"] == 4


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("passes", "quant  "),
        ("presets", "simplify"),
        ("backends", "onnxruntime"),
        ("targets", "— this machine"),
        ("metrics", "perplexity"),
    ],
)
def test_list(kind: str, expected: str) -> None:
    outcome = run("list", kind)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f" {kind}\n")
    assert expected in outcome.out
    assert outcome.out in run("list").out


def test_list_says_what_an_option_accepts() -> None:
    passes = run("list", "passes").out
    assert "[default: auto] (auto|static|dynamic|weights)" in passes
    assert "[default: 0.5] (from 0 to 1)" in passes
