"""Functions that Python gives for options: the text that names them, and what no text leads to."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt.errors import UsageError
from graphopt.options import FunctionText
from graphopt.passes.recovery.prune_gradually import PruneGradually
from graphopt.passes.recovery.recover import Recover
from graphopt.pipeline import Pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from graphopt.passes.recovery.objectives.task_losses import loss_function  # noqa: E402

DIGITS = Path(__file__).parents[1] / "models" / "digits_cnn.onnx"


def hinge(outputs: Mapping[str, Any], labels: Any) -> Any:
    (scores,) = outputs.values()
    return torch.nn.functional.multi_margin_loss(scores, labels, reduction="none")


def made_inside() -> Callable[..., Any]:
    def inner(outputs: Mapping[str, Any], labels: Any) -> Any:
        return hinge(outputs, labels)

    return inner


def nameless() -> list[Any]:
    return [made_inside(), lambda outputs, labels: hinge(outputs, labels), functools.partial(hinge), torch.nn.MSELoss()]


def task_of(one: Recover) -> FunctionText:
    assert isinstance(one.task, FunctionText)
    return one.task


def test_text_leads_to_the_function() -> None:
    made = Recover(task=hinge, epochs=2)  # type: ignore[arg-type]
    assert made.task == f"{__name__}:hinge"
    assert task_of(made).is_found
    pipeline = Pipeline.of(made)
    for again in (Pipeline.parse(str(pipeline)), Pipeline.from_toml(pipeline.to_toml())):
        (read,) = again.steps[0].passes
        assert read == made
        assert isinstance(read, Recover)
        assert type(read.task) is str
        assert loss_function(read.task) is hinge


def test_function_of_a_script_is_named_by_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("def loss(outputs, labels):\n    return 1\n")
    main = sys.modules["__main__"]

    def loss() -> None: ...

    loss.__module__, loss.__qualname__ = "__main__", "loss"
    monkeypatch.setattr(main, "loss", loss, raising=False)
    monkeypatch.setattr(main, "__file__", str(script), raising=False)
    assert FunctionText(loss) == f"{script}:loss"
    assert FunctionText(loss).is_found
    assert loss_function(str(FunctionText(loss)))(None, None) == 1
    monkeypatch.delattr(main, "__file__")  # as in a notebook
    assert FunctionText(loss) == "__main__:loss"
    assert not FunctionText(loss).is_found


def test_module_in_the_working_folder_is_found_as_python_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "losses_of_mine.py").write_text("def loss(outputs, labels):\n    return 1\n")
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "losses_of_mine", raising=False)
    monkeypatch.chdir(tmp_path)
    assert loss_function("losses_of_mine:loss")(None, None) == 1
    sys.modules.pop("losses_of_mine")
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        loss_function("none_of_mine:loss")
    assert caught.value.hint


def test_none_is_no_item_of_a_list() -> None:
    (one,) = Pipeline.parse("recover:augment=none:include=none").steps[0].passes
    assert one == Recover()


def test_colon_in_a_value_is_told_how_to_be_written() -> None:
    with pytest.raises(UsageError, match="`loss` is not an option") as caught:
        Pipeline.parse("recover:task=losses.py:loss")
    assert r"`\:`" in str(caught.value.hint)
    (one,) = Pipeline.parse(r"recover:task=losses.py\:loss").steps[0].passes
    assert isinstance(one, Recover)
    assert one.task == "losses.py:loss"


@pytest.mark.parametrize("index", range(4), ids=["local", "lambda", "partial", "object"])
def test_what_no_text_leads_to_is_used_and_not_read_back(index: int) -> None:
    given = nameless()[index]
    task = task_of(Recover(task=given))
    assert not task.is_found
    assert loss_function(task) is given
    with pytest.raises(UsageError, match="has no function") as caught:
        loss_function(str(task))
    assert caught.value.hint
    with pytest.raises(UsageError, match="could not be told from those of another"):
        Recover(task=given, checkpoints="run")


def test_copies_hold_the_function() -> None:
    made = Recover(task=hinge, checkpoints="run")  # type: ignore[arg-type]
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made
        assert task_of(again).function is hinge


def test_rounds_train_with_the_function() -> None:
    assert task_of(PruneGradually(task=hinge)._training()).function is hinge  # type: ignore[arg-type]


def test_only_options_that_name_functions_take_them() -> None:
    for option in ("optimizer", "epochs", "checkpoints"):
        with pytest.raises(UsageError, match=f"option `{option}` cannot be `<function"):
            graphopt.recover(DIGITS, data=DIGITS.with_name("digits.npz"), options={option: hinge})


def test_a_run_learns_by_a_lambda(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    archive = np.load(DIGITS.with_name("digits.npz"))
    np.savez(tmp_path / "few.npz", **{name: archive[name][:40] for name in archive.files})
    called: list[tuple[int, ...]] = []

    task = lambda outputs, labels: called.append(labels.shape) or hinge(outputs, labels)  # noqa: E731
    options = {"task": task, "steps": 2, "device": "cpu"}
    graphopt.recover(DIGITS, data=tmp_path / "few.npz", options=options, report=tmp_path / "report.json")
    assert called
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"][-1]["spec"].startswith(f"recover:task={__name__}\\:test_a_run_learns_by_a_lambda")
    assert report["findings"]["repetition"]["command"] is None
    assert report["findings"]["repetition"]["why"].startswith("option `task` of pass `recover` was given in memory")
