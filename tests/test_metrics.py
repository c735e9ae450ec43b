"""Metrics agree with plain formulas, and budgets mean what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt.data import Batch
from graphopt.errors import DataError, UsageError
from graphopt.metrics import (
    BUILTIN,
    KL,
    SQNR,
    Agreement,
    Budget,
    MeanSquaredError,
    Metric,
    Perplexity,
    Top1,
    Top5,
    default_metrics,
    show_number,
    user_metric,
)

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((30, 8)).astype(np.float32)
MOVED = SCORES + 0.3 * RNG.standard_normal((30, 8)).astype(np.float32)
LABELS = RNG.integers(0, 8, 30)


def value(metric: type[Metric], outputs: Any, *, labels: Any = None, original: Any = None, **feeds: Any) -> float:
    """Score in two batches, so that accumulation is part of what is tested."""
    one = metric()
    original = outputs if original is None else original
    for part in (slice(0, 7), slice(7, None)):
        batch = Batch(
            {name: array[part] for name, array in feeds.items()},
            None if labels is None else labels[part],
            len(outputs[part]),
        )
        one.update({"y": outputs[part]}, {"y": original[part]}, batch)
    return one.value()


def softmax(x: Any) -> Any:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_top1() -> None:
    assert value(Top1, SCORES, labels=LABELS) == (SCORES.argmax(1) == LABELS).mean()


def test_top5() -> None:
    five_best = np.argsort(SCORES, 1)[:, -5:]
    assert value(Top5, SCORES, labels=LABELS) == (five_best == LABELS[:, None]).any(1).mean()
    assert value(Top5, SCORES, labels=LABELS) > value(Top1, SCORES, labels=LABELS)


def test_top1_ignores_single_pixels_and_wide_labels() -> None:
    expected = value(Top1, SCORES, labels=LABELS)
    assert value(Top1, SCORES.reshape(30, 8, 1, 1), labels=LABELS) == expected
    assert value(Top1, SCORES.reshape(30, 1, 1, 8), labels=LABELS) == expected
    assert value(Top1, SCORES, labels=LABELS[:, None]) == expected


def test_top1_of_every_token_and_every_pixel() -> None:
    tokens, labels = RNG.standard_normal((10, 4, 6)), RNG.integers(0, 6, (10, 4))
    assert value(Top1, tokens, labels=labels) == (tokens.argmax(-1) == labels).mean()
    pixels, labels = RNG.standard_normal((10, 6, 4, 5)), RNG.integers(0, 6, (10, 4, 5))
    assert value(Top1, pixels, labels=labels) == (pixels.argmax(1) == labels).mean()


def test_top1_of_outputs_that_name_the_class() -> None:
    named = np.where(np.arange(30) % 3, LABELS, LABELS + 1)
    assert value(Top1, named, labels=LABELS) == pytest.approx(2 / 3)
    assert value(Agreement, named, labels=LABELS, original=LABELS) == pytest.approx(2 / 3)


def test_nan_names_no_class() -> None:
    broken = SCORES.copy()
    broken[:15] = np.nan
    labels = SCORES.argmax(1)
    labels[:15] = 0  # where argmax would find a NaN
    assert value(Top1, broken, labels=labels) == 0.5
    assert value(Agreement, broken, original=SCORES) == 0.5


@pytest.mark.parametrize("metric", [Top1, Agreement, KL])
def test_one_score_is_no_classifier(metric: type[Metric]) -> None:
    with pytest.raises(DataError, match=f"metric `{metric.name}` needs a score per class"):
        value(metric, SCORES[:, :1], labels=LABELS)


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels of shape \[7, 3\]"):
        value(Top1, SCORES, labels=RNG.integers(0, 8, (30, 3)))


def test_padding_is_not_scored() -> None:
    padded = np.concatenate([SCORES[:2], SCORES[:2]])
    wrong = np.concatenate([SCORES[:2], -SCORES[:2]])
    batch = Batch({}, SCORES[:2].argmax(1), 2, padded_to=4)
    for metric in (Top1(), Agreement()):
        metric.update({"y": wrong}, {"y": padded}, batch)
        assert metric.value() == 1.0
    sqnr = SQNR()
    sqnr.update({"y": wrong}, {"y": padded}, batch)
    assert sqnr.value() == 200


def test_agreement() -> None:
    assert value(Agreement, MOVED, original=SCORES) == (MOVED.argmax(1) == SCORES.argmax(1)).mean()


@pytest.mark.parametrize("normalized", [False, True])
def test_kl(normalized: bool) -> None:
    p, q = softmax(SCORES), softmax(MOVED)
    expected = (p * np.log(p / q)).sum(1).mean()
    a, b = (p, q) if normalized else (SCORES, MOVED)
    assert value(KL, b, original=a) == pytest.approx(expected, rel=1e-5)
    assert value(KL, a, original=a) == pytest.approx(0, abs=1e-12)


def test_kl_of_probabilities_that_drifted() -> None:
    p, q = softmax(SCORES), softmax(MOVED)
    assert value(KL, 1.2 * q, original=p) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6)


def test_sqnr() -> None:
    noise = (SCORES.astype(float) - MOVED.astype(float)) ** 2
    expected = 10 * np.log10((SCORES.astype(float) ** 2).sum() / noise.sum())
    assert value(SQNR, MOVED, original=SCORES) == pytest.approx(expected, rel=1e-9)


def test_mse() -> None:
    targets = RNG.standard_normal(30)
    assert value(MeanSquaredError, SCORES[:, :1], labels=targets) == pytest.approx(
        ((SCORES[:, 0].astype(float) - targets) ** 2).mean()
    )
    with pytest.raises(DataError, match="labels of shape"):
        value(MeanSquaredError, SCORES, labels=targets)


def test_perplexity_of_the_next_token() -> None:
    logits, tokens = RNG.standard_normal((10, 5, 7)), RNG.integers(0, 7, (10, 5))
    chosen = np.take_along_axis(softmax(logits)[:, :-1], tokens[:, 1:, None], -1)
    expected = np.exp(-np.log(chosen).mean())
    assert value(Perplexity, logits, ids=tokens) == pytest.approx(expected)


def test_perplexity_of_labels() -> None:
    logits, targets = RNG.standard_normal((10, 5, 7)), RNG.integers(0, 7, (10, 5))
    expected = np.exp(-np.log(np.take_along_axis(softmax(logits), targets[..., None], -1)).mean())
    assert value(Perplexity, logits, labels=targets) == pytest.approx(expected)


def test_perplexity_of_targets_outside_the_vocabulary() -> None:
    with pytest.raises(DataError, match="vocabulary of 7"):
        value(Perplexity, RNG.standard_normal((10, 5, 7)), labels=np.full((10, 5), 7))


@pytest.mark.filterwarnings("error")
def test_perplexity_without_bounds_is_infinite() -> None:
    logits = np.zeros((10, 2, 3))
    logits[..., 0] = 1e4
    assert value(Perplexity, logits, labels=np.full((10, 2), 1)) == math.inf


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to score"):
        Top1().value()


def test_user_metric_sees_everything_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metric_of_a_user.py"
    file.write_text(
        "def error(outputs, labels):\n"
        "    '''How far off.'''\n"
        "    return abs(outputs['y'][:, 0] - labels).mean()\n"
        "error.lower_is_better = True\n"
    )
    metric = user_metric(f"{file}:error")
    assert (metric.name, metric.help, metric.higher_is_better) == ("error", "How far off.", False)
    assert value(metric, SCORES, labels=LABELS) == pytest.approx(np.abs(SCORES[:, 0] - LABELS).mean())


def test_user_metric_gets_no_labels_where_there_are_none(tmp_path: Path) -> None:
    file = tmp_path / "metric_without_labels.py"
    file.write_text("def count(outputs, labels):\n    assert labels is None\n    return len(outputs['y'])\n")
    assert value(user_metric(f"{file}:count"), SCORES) == 30


# What fits a model


def _model(shape: list[int | str], dtype: int = TensorProto.FLOAT) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "any",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape)],
    )
    return ir.from_proto(helper.make_model(graph))


IDS = {"ids": np.zeros((1, 5), np.int64)}
IMAGE = {"x": np.zeros((1, 3, 4, 4), np.float32)}


@pytest.mark.parametrize(
    ("shape", "labels", "feeds", "expected"),
    [
        (["N", 10], np.zeros(1, int), IMAGE, [Top1, Agreement, KL, SQNR]),
        (["N", 10, 8, 8], np.zeros((1, 8, 8), int), IMAGE, [Top1, Agreement, KL, SQNR]),
        (["N", 1], np.zeros(1, int), IMAGE, [MeanSquaredError, SQNR]),
        (["N"], np.zeros(1, int), IMAGE, [MeanSquaredError, SQNR]),
        (["N", 4], np.zeros((1, 4), np.float32), IMAGE, [MeanSquaredError, SQNR]),
        (["N", 5, 99], np.zeros((1, 5), int), IDS, [Perplexity, Agreement, KL, SQNR]),
        (["N", 10], None, IMAGE, [SQNR]),
    ],
)
def test_default_metrics(shape: list[int | str], labels: Any, feeds: Any, expected: list[type[Metric]]) -> None:
    assert default_metrics(_model(shape), Batch(feeds, labels, 1)) == expected


def test_default_metrics_of_classes_named() -> None:
    model = _model(["N"], TensorProto.INT64)
    assert default_metrics(model, Batch(IMAGE, np.zeros(1, int), 1)) == [Top1, Agreement]


# Budgets


@pytest.mark.parametrize(
    ("text", "before", "after", "allowed"),
    [
        ("top1=1%", 0.98, 0.97, True),
        ("top1=1%", 0.98, 0.969, False),
        ("top1=0.01", 0.98, 0.97, True),
        ("top1=0.01", 0.98, 0.969, False),
        ("top1=0", 0.98, 0.98, True),
        ("top1=0", 0.98, 0.97, False),
        ("top1=0%", 0.97, 0.98, True),
        ("perplexity=2%", 50, 51, True),
        ("perplexity=2%", 50, 51.1, False),
        ("perplexity=2", 50, 52, True),
        ("perplexity=2", 50, 52.1, False),
        ("perplexity=2%", 50, 10, True),
        ("mse=50%", 2, 3, True),
        ("mse=50%", 2, 3.1, False),
        ("kl=0.1", 0, 0.1, True),
        ("kl=0.1", 0, 0.11, False),
        ("top1=50%", 0.9, math.nan, False),
        ("perplexity=50%", math.nan, 10, False),
        ("perplexity=50%", math.inf, math.inf, False),
        ("perplexity=50%", 10, math.inf, False),
    ],
)
def test_budgets(text: str, before: float, after: float, allowed: bool) -> None:
    budget = Budget.parse(text, BUILTIN)
    assert budget.allows(before, after, BUILTIN[budget.metric]) is allowed


@pytest.mark.parametrize("text", ["top1", "top1=", "top1=x", "top1=-1%", "top1=nan", "top1=inf", "top9=1%", "top1=1"])
def test_budgets_that_say_nothing(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text, BUILTIN)
    assert caught.value.hint


# What people read


@pytest.mark.parametrize(
    ("number", "shown"),
    [(3048.2, "3048"), (12345.6, "12,346"), (0.07492, "0.07492"), (-0.5383, "−0.5383"), (1e-7, "1e-07"), (0, "0")],
)
def test_numbers(number: float, shown: str) -> None:
    assert show_number(number) == shown


def test_values_shown() -> None:
    assert Top1.show(0.97531) == "97.5 %"
    assert SQNR.show(-0.54) == "−0.5 dB"
    assert Perplexity.show(33.984) == "33.98"
    assert KL.show(None) == "–"
