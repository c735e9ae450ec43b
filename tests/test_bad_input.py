"""Whatever is wrong with the input: one error line, one hint, the right exit code, and nothing left behind."""

from __future__ import annotations

import ast
import errno
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import optimization, output_files, staged_files
from graphopt.errors import EXIT_FAULT, did_you_mean
from graphopt.passes.lossy.prune import Prune

from .command_line import FEATURES, Outcome, classifier, contents, fill, run, samples

ROOT = Path(__file__).resolve().parent.parent
Prepare = Callable[[Path], list[Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the model and data, in which nothing may have changed or appeared afterwards."""
    fill(tmp_path)
    return tmp_path


def refused(folder: Path, args: list[Any], code: int = 2) -> Outcome:
    """Run a command that must fail and leave everything as it was."""
    before = contents(folder)
    outcome = run(*args)
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err + outcome.out
    assert contents(folder) == before
    assert outcome.error
    return outcome


def _optimize(folder: Path, *args: Any, model: Path | None = None) -> list[Any]:
    chosen = args if {"--passes", "--recipe"} & set(args) else ("--passes", "prune", *args)
    return ["optimize", model if model is not None else folder / "net.onnx", *chosen]


# Models


def _written(name: str, content: bytes) -> Prepare:
    def prepare(folder: Path) -> list[Any]:
        (folder / name).write_bytes(content)
        return _optimize(folder, model=folder / name)

    return prepare


def _zip(folder: Path) -> list[Any]:
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return _optimize(folder, model=folder / "model.pt")


def _truncated(share: float) -> Prepare:
    def prepare(folder: Path) -> list[Any]:
        whole = (folder / "net.onnx").read_bytes()
        (folder / "cut.onnx").write_bytes(whole[: int(len(whole) * share)])
        return _optimize(folder, model=folder / "cut.onnx")

    return prepare


def _external(folder: Path) -> Path:
    inside = folder / "model"
    inside.mkdir(exist_ok=True)
    path = inside / "big.onnx"
    onnx.save(classifier(), path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    return path


def _external_missing(folder: Path) -> list[Any]:
    path = _external(folder)
    (path.parent / "weights.bin").unlink()
    return _optimize(folder, model=path)


def _external_short(folder: Path) -> list[Any]:
    path = _external(folder)
    data = path.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:-100])
    return _optimize(folder, model=path)


def _external_outside(folder: Path) -> list[Any]:
    path = _external(folder)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    (path.parent / "weights.bin").rename(folder / "weights.bin")
    return _optimize(folder, model=path)


def _external_linked_outside(folder: Path) -> list[Any]:
    path = _external(folder)
    (path.parent / "weights.bin").rename(folder / "weights.bin")
    (path.parent / "weights.bin").symlink_to(folder / "weights.bin")
    return _optimize(folder, model=path)


def _unknown_operator(folder: Path) -> list[Any]:
    model = classifier()
    model.graph.node[2].op_type = "Frobnicate"
    model.graph.node[2].domain = "com.acme"
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    onnx.save(model, folder / "custom.onnx")
    return _optimize(folder, model=folder / "custom.onnx")


MODELS: dict[str, tuple[Prepare, str]] = {
    "missing": (lambda folder: _optimize(folder, model=folder / "no.onnx"), "no.onnx"),
    "missing beside an output that exists": (
        lambda folder: _optimize(folder, "-o", folder / "data.npz", model=folder / "no.onnx"),
        "no.onnx",
    ),
    "a folder": (lambda folder: _optimize(folder, model=folder), "is a folder"),
    "below a file": (lambda folder: _optimize(folder, model=folder / "net.onnx" / "x.onnx"), "x.onnx"),
    "empty": (_written("empty.onnx", b""), "is empty"),
    "text": (_written("text.onnx", b"hello, this is no model at all"), "text file"),
    "noise": (_written("noise.onnx", bytes(range(256)) * 8), "noise.onnx"),
    "pickle": (_written("old.pt", b"\x80\x02}q\x00."), "pickle"),
    "zip": (_zip, "zip archive"),
    "git lfs": (_written("lfs.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
    "cut in the weights": (_truncated(0.5), "cut short"),
    "cut at the end": (_truncated(0.999), "cut.onnx"),
    "external data missing": (_external_missing, "weights.bin"),
    "external data too short": (_external_short, "weights.bin"),
    "external data outside": (_external_outside, "../weights.bin"),
    "external data linked outside": (_external_linked_outside, "outside the model's folder"),
    "operator the runtime does not know": (_unknown_operator, "refuses the model"),
}


@pytest.mark.parametrize(("prepare", "expected"), MODELS.values(), ids=MODELS)
def test_models(folder: Path, prepare: Prepare, expected: str) -> None:
    assert expected in refused(folder, prepare(folder)).error


@pytest.mark.parametrize("command", ["inspect", "bench"])
@pytest.mark.parametrize("name", ["missing", "a folder", "text", "cut in the weights", "external data missing"])
def test_models_of_other_commands(folder: Path, command: str, name: str) -> None:
    prepare, expected = MODELS[name]
    assert expected in refused(folder, [command, prepare(folder)[1]]).error


def test_an_operator_the_runtime_does_not_know_is_kept_without_proof(folder: Path) -> None:
    outcome = run(*_unknown_operator(folder), "--verify", "off")
    assert outcome.code == 0, outcome.err
    assert "Frobnicate" in {node.op_type for node in onnx.load(folder / "custom.opt.onnx").graph.node}


# Pipelines and options


def _recipe(text: str | bytes) -> Prepare:
    def prepare(folder: Path) -> list[Any]:
        (folder / "recipe.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return _optimize(folder, "--recipe", folder / "recipe.toml")

    return prepare


def _with(*args: str) -> Prepare:
    return lambda folder: _optimize(folder, *(str(folder / arg[1:]) if arg.startswith("@") else arg for arg in args))


OPTIONS: dict[str, tuple[Prepare, str, str]] = {
    "unknown pass": (_with("--passes", "prun"), "unknown pass `prun`", "did you mean `prune`?"),
    "unknown preset": (_with("--passes", "simplfy"), "unknown pass `simplfy`", "did you mean `simplify`?"),
    "unknown option": (_with("--passes", "prune:sparsty=0.5"), "`sparsty`", "did you mean `sparsity`?"),
    "option of a preset": (_with("--passes", "simplify:x=1"), "takes no options", "stands for"),
    "no option": (_with("--passes", "prune:sparsity"), "`sparsity` is not an option", "name=value"),
    "option twice": (_with("--passes", "prune:sparsity=0:sparsity=1"), "given twice", "keep one"),
    "wrong type": (_with("--passes", "prune:sparsity=half"), "cannot be `half`", "a number"),
    "out of range": (_with("--passes", "prune:sparsity=1.5"), "out of range: `1.5`", "from 0 to 1"),
    "not a number": (_with("--passes", "prune:sparsity=nan"), "out of range: `nan`", "from 0 to 1"),
    "wrong choice": (_with("--passes", "quant:mode=statik"), "cannot be `statik`", "static"),
    "wrong pattern": (_with("--passes", "prune:pattern=4of2"), "cannot be `4of2`", "2of4"),
    "no passes": (_with("--passes", ""), "no passes given", "--passes"),
    "a comma too many": (_with("--passes", "prune,"), "has no name", "remove the comma"),
    "neither passes nor recipe": (lambda folder: ["optimize", folder / "net.onnx"], "neither was given", "--passes"),
    "both passes and recipe": (_with("--passes", "prune", "--recipe", "@r.toml"), "both was given", "--passes"),
    "data needed": (_with("--passes", "quant:mode=static"), "needs calibration data", "--data"),
    "recipe missing": (_with("--recipe", "@no.toml"), "no.toml", "[[pass]]"),
    "recipe is a folder": (_with("--recipe", "@"), "cannot read recipe", "[[pass]]"),
    "recipe is no toml": (_recipe("[[pass"), "not TOML", "[[pass]]"),
    "recipe is no text": (_recipe(b"\xff\xfe\x00"), "not text", "[[pass]]"),
    "recipe is empty": (_recipe(""), "no `[[pass]]`", "[[pass]]"),
    "recipe with an unknown key": (_recipe('[[passes]]\nname = "prune"'), "`passes`", "did you mean `pass`?"),
    "recipe without a name": (_recipe("[[pass]]\nsparsity = 0.5"), "no `name`", "name ="),
    "recipe with an unknown pass": (_recipe('[[pass]]\nname = "prun"'), "`prun`", "did you mean `prune`?"),
    "recipe with a wrong type": (
        _recipe('[[pass]]\nname = "prune"\nsparsity = "much"'),
        "cannot be `much`",
        "a number",
    ),
    "unknown target": (_with("--target", "ort-cpu-x68"), "unknown target `ort-cpu-x68`", "did you mean"),
    "target of several": (_with("--target", "ort-cpu"), "unknown target `ort-cpu`", "one of: ort-cpu-arm, ort-cpu-x86"),
    "unknown backend": (_with("--backend", "onnxruntme"), "unknown backend `onnxruntme`", "did you mean"),
    "unknown backend option": (_with("--backend", "onnxruntime:device=cpu"), "no option `device`", "device_id"),
    "unknown provider": (_with("--backend", "onnxruntime:provider=gpu"), "cannot be `gpu`", "cuda"),
    "unknown verify": (_with("--verify", "all"), "'all'", "--help"),
    "unknown option of the command": (_with("--pases", "x"), "no such option: --pases", "did you mean `--passes`?"),
    "no value": (_with("--seed"), "--seed", "--help"),
    "negative threads": (_with("--threads", "-1"), "--threads", "--help"),
    "too many threads": (_with("--threads", "1000000"), "--threads", "--help"),
    "seed no number": (_with("--seed", "x"), "--seed", "--help"),
    "report of unknown kind": (_with("--report", "@report.txt"), "unknown kind", ".json"),
    "report in no folder": (_with("--report", "@no/report.json"), "does not exist", "create"),
    "report is a folder": (_with("--report", "@folder.json"), "no regular file", "name a file"),
    "report is the output": (_with("--report", "@o.json", "-o", "@o.json"), "is the model", "another"),
}


@pytest.mark.parametrize(("prepare", "expected", "hint"), OPTIONS.values(), ids=OPTIONS)
def test_options(folder: Path, prepare: Prepare, expected: str, hint: str) -> None:
    (folder / "folder.json").mkdir()
    outcome = refused(folder, prepare(folder))
    assert expected in outcome.error
    assert hint in outcome.hint


def test_unknown_commands_and_kinds(folder: Path) -> None:
    outcome = refused(folder, ["optimise", folder / "net.onnx"])
    assert outcome.err.splitlines() == ["error: unknown command `optimise`", "hint: did you mean `optimize`?"]
    assert "'passs'" in refused(folder, ["list", "passs"]).error
    assert "missing argument" in refused(folder, ["optimize"]).error


# Data


def _npz(**arrays: Any) -> Prepare:
    def prepare(folder: Path) -> list[Any]:
        np.savez(folder / "bad.npz", **{name.removeprefix("_"): array for name, array in arrays.items()})
        return _optimize(folder, "--data", folder / "bad.npz")

    return prepare


def _poisoned(value: float) -> Any:
    x = np.zeros((4, FEATURES), np.float32)
    x[2, 5] = value
    return x


def _corrupt_npz(folder: Path) -> list[Any]:
    np.savez_compressed(folder / "bad.npz", x=np.random.default_rng(0).standard_normal((400, FEATURES)))
    content = bytearray((folder / "bad.npz").read_bytes())
    content[2000:2400] = bytes(400)
    (folder / "bad.npz").write_bytes(content)
    return _optimize(folder, "--data", folder / "bad.npz")


def _cut_npz(folder: Path) -> list[Any]:
    content = (folder / "data.npz").read_bytes()
    (folder / "bad.npz").write_bytes(content[: len(content) // 2])
    return _optimize(folder, "--data", folder / "bad.npz")


def _npy(folder: Path) -> list[Any]:
    np.save(folder / "x.npy", samples()["x"])
    return _optimize(folder, "--data", folder / "x.npy")


def _code(text: str, name: str = "rows", option: str = "--data") -> Prepare:
    def prepare(folder: Path) -> list[Any]:
        (folder / "own.py").write_text(text)
        extra = ("--data", folder / "data.npz") if option != "--data" else ()
        return _optimize(folder, *extra, option, f"{folder / 'own.py'}:{name}")

    return prepare


def _empty_folder(folder: Path) -> list[Any]:
    (folder / "none").mkdir()
    return _optimize(folder, "--data", folder / "none")


def _bad_test_data(folder: Path) -> list[Any]:
    (folder / "sets" / "test_data_set_0").mkdir(parents=True)
    (folder / "sets" / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    return _optimize(folder, "--data", folder / "sets")


def _partly_labelled(folder: Path) -> list[Any]:
    held = samples()
    (folder / "parts").mkdir()
    np.savez(folder / "parts" / "a.npz", **held)
    np.savez(folder / "parts" / "b.npz", x=held["x"])
    return _optimize(folder, "--data", folder / "parts")


_X = np.zeros((4, FEATURES), np.float32)
DATA: dict[str, tuple[Prepare, str, str]] = {
    "missing": (_with("--data", "@no.npz"), "does not exist", "file.py:function"),
    "lacks an input": (_npz(y=_X), "lacks input `x`", "it has: y"),
    "wrong rank": (_npz(x=_X[0]), "array of shape 16", "first axis is samples"),
    "wrong size": (_npz(x=_X[:, :7]), "array of shape 4x7 for input `x` (float32, ?x16)", "first axis"),
    "whole numbers for floats": (_npz(x=_X.astype(np.uint8)), "`uint8` array", "preprocess"),
    "text for floats": (_npz(x=np.full((4, FEATURES), "1.0")), "array for input `x`", "float32"),
    "nan": (_npz(x=_poisoned(np.nan)), "NaN or infinity in input `x`, sample 2", "clean"),
    "infinity": (_npz(x=_poisoned(np.inf)), "NaN or infinity in input `x`, sample 2", "clean"),
    "no samples": (_npz(x=_X[:0]), "is empty", "at least one sample"),
    "one sample": (_npz(x=_X[:1]), "too few", "--eval"),
    "labels too few": (_npz(x=_X, labels=np.zeros(3, int)), "4 samples but 3 labels", "one label per sample"),
    "label alone": (_npz(x=_X, labels=np.int64(3)), "no labels", "one label per sample"),
    "label key missing": (_with("--data", "@data.npz", "--labels", "label"), "no labels `label`", "`labels`"),
    "labels on some only": (_partly_labelled, "only some samples", "all or to none"),
    "pickled": (_npz(x=np.array([[None]])), "cannot read", "numpy.savez"),
    "corrupt": (_corrupt_npz, "cannot read", "numpy.savez"),
    "cut short": (_cut_npz, "cannot read", "numpy.savez"),
    "the model itself": (_with("--data", "@net.onnx"), "cannot read", "numpy.savez"),
    "npy": (_npy, "cannot read", "numpy.savez"),
    "empty folder": (_empty_folder, "holds no data", ".npz"),
    "damaged test data": (_bad_test_data, "input_0.pb", "per input"),
    "no function named": (_code("", name=""), "has no function", "known"),
    "python file alone": (lambda f: [*_code("")(f)[:-1], f / "own.py"], "names no function", "file.py:function"),
    "python file missing": (_with("--data", "@no.py:rows"), "does not exist", "file.py:function"),
    "function missing": (_code("def row(): ..."), "no function `rows`", "did you mean `row`?"),
    "file fails": (_code("import no_such_module"), "No module named", "run it by itself"),
    "file exits": (_code("raise SystemExit(3)"), "SystemExit: 3", "run it by itself"),
    "syntax error": (_code("def rows(:"), "SyntaxError", "run it by itself"),
    "function fails": (_code("def rows():\n    raise KeyError('lost')"), "KeyError: 'lost'", "run it by itself"),
    "function yields no dicts": (_code("def rows():\n    yield [1]"), "yields list", "yield dicts"),
    "function yields nothing": (_code("def rows():\n    return []"), "is empty", "at least one"),
    "eval missing": (_with("--data", "@data.npz", "--eval", "@no.npz"), "no.npz", "file.py:function"),
}


@pytest.mark.parametrize(("prepare", "expected", "hint"), DATA.values(), ids=DATA)
def test_data(folder: Path, prepare: Prepare, expected: str, hint: str) -> None:
    outcome = refused(folder, prepare(folder))
    assert expected in outcome.error
    assert hint in outcome.hint


# Metrics and budgets


def _budget(text: str, *args: str) -> Prepare:
    return _with("--data", "@data.npz", "--budget", text, *args)


METRICS: dict[str, tuple[Prepare, str, str]] = {
    "unknown metric": (_with("--metric", "top2"), "unknown metric `top2`", "did you mean `top"),
    "metric file alone": (_with("--metric", "own.py"), "unknown metric `own.py`", "file.py:function"),
    "metric file missing": (_with("--metric", "@no.py:f"), "does not exist", "file.py:function"),
    "metric function missing": (_code("def f(a, b): ...", "g", "--metric"), "no function `g`", "known: f"),
    "metric raises": (
        _code("def f(a, b):\n    raise ValueError('two\\nlines')", "f", "--metric"),
        "metric `f` fails: ValueError: two lines",
        "outputs",
    ),
    "metric returns no number": (_code("def f(a, b):\n    return 'x'", "f", "--metric"), "metric `f` fails", "number"),
    "metric without its labels": (
        lambda f: [*_npz(x=_X)(f), "--metric", "top1"],
        "metric `top1` needs labels",
        "--labels",
    ),
    "metric that does not fit": (_with("--data", "@data.npz", "--metric", "mse"), "labels of shape", "--metric"),
    "budget without a value": (_budget("top1"), "has no `=`", "top1=1%"),
    "budget on nothing known": (_budget("top=1%"), "unknown metric `top`", "did you mean `top"),
    "budget no number": (_budget("top1=few"), "`few` is not a number", "top1=1%"),
    "budget empty": (_budget("top1="), "is not a number", "top1=1%"),
    "budget negative": (_budget("top1=-1%"), "0 or more", "top1=1%"),
    "budget not a number": (_budget("top1=nan"), "0 or more", "top1=1%"),
    "budget of a point meant as a share": (_budget("top1=1"), "allows any loss", "`top1=1%`"),
    "budget relative to nothing": (_budget("kl=1%"), "`kl`", "without `%`"),
    "budget without data": (_with("--budget", "top1=1%"), "needs data to score", "--data"),
    "budget without labels": (
        lambda f: [*_npz(x=_X)(f), "--budget", "top1=1%"],
        "budget on `top1` needs labels",
        "--labels",
    ),
}


@pytest.mark.parametrize(("prepare", "expected", "hint"), METRICS.values(), ids=METRICS)
def test_metrics_and_budgets(folder: Path, prepare: Prepare, expected: str, hint: str) -> None:
    outcome = refused(folder, prepare(folder))
    assert expected in outcome.error
    assert hint in outcome.hint


# Outputs


def _linked(link: Callable[[Path, Path], None]) -> Prepare:
    def prepare(folder: Path) -> list[Any]:
        link(folder / "net.onnx", folder / "link.onnx")
        return _optimize(folder, "-o", folder / "link.onnx")

    return prepare


def _over_input_data(folder: Path) -> list[Any]:
    onnx.save(
        classifier(), folder / "in.onnx", save_as_external_data=True, location="out.onnx.data", size_threshold=100
    )
    return _optimize(folder, "-o", folder / "out.onnx", model=folder / "in.onnx")


def _is_input_data(folder: Path) -> list[Any]:
    path = _external(folder)
    return _optimize(folder, "-o", path.parent / "weights.bin", model=path)


def _fifo(folder: Path) -> list[Any]:
    os.mkfifo(folder / "pipe")
    return _optimize(folder, "-o", folder / "pipe")


def _report_over_input(folder: Path) -> list[Any]:
    (folder / "net.json").symlink_to(folder / "net.onnx")
    return _optimize(folder, "--report", folder / "net.json")


OUTPUTS: dict[str, tuple[Prepare, str]] = {
    "the input": (_with("-o", "@net.onnx"), "is the input"),
    "the input by another path": (lambda f: _optimize(f, "-o", f / ".." / f.name / "net.onnx"), "is the input"),
    "a symbolic link to the input": (_linked(lambda a, b: b.symlink_to(a)), "is the input"),
    "a hard link to the input": (_linked(os.link), "is the input"),
    "the input's data": (_is_input_data, "holds the data of the input"),
    "beside the input's data": (_over_input_data, "holds the data of the input"),
    "a folder": (_with("-o", "@"), "is a folder"),
    "in no folder": (_with("-o", "@no/out.onnx"), "does not exist"),
    "below a file": (_with("-o", "@net.onnx/out.onnx"), "does not exist"),
    "no regular file": (_fifo, "no regular file"),
    "a report over the input": (_report_over_input, "is the model"),
}


@pytest.mark.parametrize(("prepare", "expected"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(folder: Path, prepare: Prepare, expected: str) -> None:
    args = prepare(folder)
    before = contents(folder) if not (folder / "pipe").exists() else None
    outcome = run(*args)
    assert outcome.code == 2
    assert expected in outcome.error
    if before is not None:
        assert contents(folder) == before


def test_folder_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(output_files.tempfile, "TemporaryFile", refuse)
    outcome = refused(folder, _optimize(folder))
    assert "cannot write to" in outcome.error
    assert "Permission denied" in outcome.error


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full(folder: Path, monkeypatch: pytest.MonkeyPatch, external: bool, call: str) -> None:
    model = _external(folder) if external else folder / "net.onnx"

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staged_files.os, call, fail)
    outcome = refused(folder, _optimize(folder, "-o", folder / "out.onnx", model=model))
    assert "No space left on device" in outcome.error


def test_disk_full_keeps_an_older_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "net.opt.onnx").write_text("older")
    monkeypatch.setattr(staged_files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    refused(folder, _optimize(folder))
    assert (folder / "net.opt.onnx").read_text() == "older"


# What happens in the middle


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "pass `prune` ran out of memory"),
        (RuntimeError("two\nlines"), 3, "pass `prune` failed: RuntimeError: two lines"),
    ],
    ids=["interrupt", "memory", "fault"],
)
def test_a_pass_that_ends_early(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Prune, "run", fail)
    command = _optimize(folder, "--data", folder / "data.npz", "--no-reproducers")
    assert expected in refused(folder, command, code).error


def test_a_fault_of_graphopt_is_owned_up_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "measure_side", lambda *_, **__: 1 / 0)
    outcome = refused(folder, _optimize(folder), EXIT_FAULT)
    assert "graphopt failed: ZeroDivisionError" in outcome.error
    assert "report it" in outcome.hint


def test_calibration_that_overflows(folder: Path) -> None:
    model = classifier()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    weight.CopyFrom(numpy_helper.from_array(np.full((FEATURES, 32), 1e30, np.float32), "w1"))
    onnx.save(model, folder / "huge.onnx")
    np.savez(folder / "huge.npz", x=np.full((8, FEATURES), 1e30, np.float32))
    args = ("--passes", "quant:mode=static", "--data", folder / "huge.npz")
    assert "becomes NaN or infinite" in refused(folder, _optimize(folder, *args, model=folder / "huge.onnx")).error


# The other commands


def test_compare_of_models_that_do_not_match(folder: Path) -> None:
    other = classifier()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "logits"
    onnx.save(other, folder / "other.onnx")
    outcome = refused(folder, ["compare", folder / "net.onnx", folder / "other.onnx"])
    assert "different outputs: `logits`, `scores`" in outcome.error


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--tolerance", "nan"], "--tolerance"),
        (["--tolerance", "-1"], "--tolerance"),
        (["--metric", "top1"], "needs data to score"),
        (["--backend", "nothing"], "unknown backend"),
    ],
)
def test_compare_options(folder: Path, args: list[str], expected: str) -> None:
    assert expected in refused(folder, ["compare", folder / "net.onnx", folder / "net.onnx", *args]).error


def test_bench_of_a_batch_that_does_not_fit(folder: Path) -> None:
    onnx.save(classifier(batch=2), folder / "two.onnx")
    args = ["bench", folder / "two.onnx", "--seconds", 0.1]
    assert run(*args).code == 0
    outcome = refused(folder, [*args, "--batch", 8])
    assert "batch 8" in outcome.error
    assert "`--batch 2`" in outcome.hint


def test_bench_of_models_with_other_inputs(folder: Path) -> None:
    other = classifier()
    other.graph.input[0].name = other.graph.node[0].input[0] = "image"
    onnx.save(other, folder / "other.onnx")
    outcome = refused(folder, ["bench", folder / "net.onnx", folder / "other.onnx"])
    assert "different inputs: `image`, `x`" in outcome.error


def test_model_of_unknown_inputs_cannot_be_made_up(folder: Path) -> None:
    model = classifier()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    onnx.save(model, folder / "rankless.onnx")
    outcome = refused(folder, ["bench", folder / "rankless.onnx"])
    assert "cannot make up input `x`" in outcome.error
    assert "--data" in outcome.hint


def test_every_error_raised_has_a_hint() -> None:
    """Hold at the source what the cases above can only sample."""
    hintless = []
    for file in (file for folder in ("graphopt", "passes", "backends") for file in (ROOT / folder).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            if name in ("DataError", "ModelError", "PassError", "UsageError") and not any(
                keyword.arg == "hint" for keyword in call.keywords
            ):
                hintless.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert not hintless


def test_hints_list_no_more_names_than_are_read() -> None:
    assert did_you_mean("zebra", ["beta", "alpha"]) == "known: alpha, beta"
    many = did_you_mean("zebra", [f"{number:04}" for number in range(2000)])
    assert many.endswith("0079, and 1,920 more")
