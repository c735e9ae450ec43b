"""Task metrics: how good a model's outputs are, and how far they moved from the original's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.data import Batch, load_function
from graphopt.errors import DataError, UsageError

Outputs = Mapping[str, Any]


class Metric:
    """A figure accumulated over batches.

    Subclasses set the class attributes and implement `update` and `value`.

    Attributes:
        name: What ``--metric`` and ``--budget`` call it.
        help: One line for people.
        higher_is_better: Whether losing means falling.
        percent: Whether it is a share, shown in percent and budgeted in points.
        needs_labels: Whether it cannot be computed without labels.
        against_original: Whether it compares with the original's outputs instead of labels.
    """

    name: ClassVar[str] = ""
    help: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    against_original: ClassVar[bool] = False

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        """Add the outputs of one batch, and the original model's outputs for the same feeds."""
        raise NotImplementedError

    def value(self) -> float:
        """Return the figure over all batches so far."""
        raise NotImplementedError

    @classmethod
    def show(cls, value: float | None) -> str:
        """Return a value as people read it."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if cls.percent else f"{value:.4g}"


def first_output(outputs: Outputs, batch: Batch) -> Array:
    """Return the first tensor output, without the rows that only pad a fixed batch size."""
    array = np.asarray(next(iter(outputs.values())))
    return array[: batch.count] if batch.labels is not None and array.ndim else array


class _Mean(Metric):
    """A metric that is the mean of per-item scores."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, scores: Array) -> None:
        """Add the scores of some items."""
        self.total += float(np.sum(scores, dtype=np.float64))
        self.count += int(np.size(scores))

    def value(self) -> float:
        if not self.count:
            raise DataError(f"metric `{self.name}` had nothing to score", hint="give more samples")
        return self.total / self.count


def _class_scores(array: Array) -> Array:
    """Return classifier outputs as [items, classes], dropping 1×1 spatial axes."""
    return array.reshape(len(array), -1) if array.ndim != 3 else array


def _check_labels(labels: Array, items: tuple[int, ...], metric: str) -> Array:
    if labels.shape != items and labels.size != int(np.prod(items)):
        raise DataError(
            f"metric `{metric}`: labels of shape {list(labels.shape)} for outputs of {list(items)} items",
            hint="one label per scored item, or another `--metric`",
        )
    return labels.reshape(items)


class Top1(_Mean):
    """Share of items whose highest score is at the label."""

    name, help, percent, needs_labels = "top1", "share of items classified right", True, True
    places: ClassVar[int] = 1

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        assert batch.labels is not None
        scores = _class_scores(first_output(outputs, batch))
        labels = _check_labels(batch.labels, scores.shape[:-1], self.name)
        best = np.argsort(-scores, axis=-1, kind="stable")[..., : self.places]
        self.add((best == labels[..., None]).any(-1))


class Top5(Top1):
    """Share of items whose label is among the five highest scores."""

    name, help, places = "top5", "share of items whose label is among the five best", 5


class Perplexity(_Mean):
    """Exponential of the mean cross-entropy of the next token; lower is better.

    Targets are the labels where given ([N, T] token ids), else the first integer input shifted by one.
    """

    name, help, higher_is_better = "perplexity", "exp of the mean next-token cross-entropy (language models)", False

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        logits = np.asarray(next(iter(outputs.values())))[: batch.count].astype(np.float64)
        if batch.labels is not None:
            targets = _check_labels(batch.labels, logits.shape[:-1], self.name)
        else:
            tokens = next((a for a in batch.feeds.values() if a.dtype.kind in "iu" and a.ndim == 2), None)
            if tokens is None or logits.ndim != 3:
                raise DataError("metric `perplexity` needs token ids in and [batch, tokens, vocabulary] out")
            logits, targets = logits[:, :-1], tokens[: batch.count, 1:]
        logits = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, targets[..., None].astype(np.int64), -1)[..., 0]
        self.add(np.log(np.exp(logits).sum(-1)) - chosen)

    def value(self) -> float:
        return float(np.exp(super().value()))


class MeanSquaredError(_Mean):
    """Mean squared difference between the first output and the labels."""

    name, help, higher_is_better, needs_labels = "mse", "mean squared error against the labels", False, True

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        assert batch.labels is not None
        values = first_output(outputs, batch).astype(np.float64)
        if values.size != batch.labels.size:
            raise DataError(f"metric `mse`: {batch.labels.size} labels for {values.size} outputs")
        self.add((values - batch.labels.reshape(values.shape)) ** 2)


class Agreement(_Mean):
    """Share of items on which the model and the original pick the same class."""

    name, help, percent = "agreement", "share of items classified as the original does", True
    against_original = True

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        mine, theirs = (_class_scores(first_output(side, batch)) for side in (outputs, original))
        self.add(mine.argmax(-1) == theirs.argmax(-1))


class KL(_Mean):
    """Mean Kullback-Leibler divergence KL(original ‖ model) of the softmaxed first output, in nats."""

    name, help, higher_is_better = "kl", "KL(original ‖ model) of the softmaxed first output, in nats", False
    against_original = True

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        mine, theirs = (_log_probabilities(_class_scores(first_output(side, batch))) for side in (outputs, original))
        self.add((np.exp(theirs) * (theirs - mine)).sum(-1))


def _log_probabilities(scores: Array) -> Array:
    x = scores.astype(np.float64)
    if (x >= 0).all() and np.allclose(x.sum(-1), 1.0, atol=1e-2):
        return np.log(np.maximum(x, 1e-12))  # already probabilities
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


class SQNR(Metric):
    """Signal to quantization noise ratio of the worst output against the original's, in dB."""

    name, help, against_original = "sqnr_db", "signal to noise ratio of the worst output, dB", True

    def __init__(self) -> None:
        from graphopt.comparison import Comparison

        self.comparison = Comparison()

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        self.comparison.update(original, outputs)

    def value(self) -> float:
        return self.comparison.sqnr_db


class UserMetric(Metric):
    """A function ``(outputs: dict[str, array], labels: array | None) -> float`` over all scored samples at once.

    The outputs of all scored samples are held in memory.
    """

    function: Callable[..., Any]

    def __init__(self) -> None:
        self.outputs: list[dict[str, Array]] = []
        self.labels: list[Array] = []

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        self.outputs.append({name: np.asarray(value)[: batch.count] for name, value in outputs.items()})
        if batch.labels is not None:
            self.labels.append(batch.labels)

    def value(self) -> float:
        joined = {name: np.concatenate([part[name] for part in self.outputs]) for name in self.outputs[0]}
        labels = np.concatenate(self.labels) if self.labels else None
        try:
            return float(type(self).function(joined, labels))
        except Exception as error:
            raise DataError(
                f"metric `{self.name}` fails: {type(error).__name__}: {error}",
                hint="it is called as function(outputs: dict of arrays, labels or None) and returns a number",
            ) from error


BUILTIN: dict[str, type[Metric]] = {
    metric.name: metric for metric in (Top1, Top5, Perplexity, MeanSquaredError, Agreement, KL, SQNR)
}


def user_metric(text: str) -> type[Metric]:
    """Return the metric ``file.py:function``; a function attribute ``lower_is_better = True`` turns it round.

    Raises:
        DataError: No such file or function.
    """
    file, _, name = text.rpartition(":")
    function = load_function(file, name)
    body = {
        "name": name,
        "help": inspect.getdoc(function) or text,
        "higher_is_better": not getattr(function, "lower_is_better", False),
        "function": staticmethod(function),
    }
    return type(name, (UserMetric,), body)


def default_metrics(model: ir.Model, batch: Batch) -> list[type[Metric]]:
    """Return what to score by when the user named no metric, judged by the first output and the labels."""
    output = model.graph.outputs[0]
    rank = len(output.shape) if output.shape is not None else None
    labels = batch.labels
    is_class = labels is not None and labels.dtype.kind in "iub" and labels.ndim <= 2
    if is_class and labels is not None and labels.ndim == 2 and labels.shape[1] > 1 and rank == 3:
        return [Perplexity, Agreement, KL, SQNR]
    if is_class:
        return [Top1, Agreement, KL, SQNR]
    if labels is not None:
        return [MeanSquaredError, SQNR]
    tokens = [array for array in batch.feeds.values() if array.dtype.kind in "iu" and array.ndim == 2]
    if rank == 3 and len(tokens) == 1 and len(batch.feeds) == 1:
        return [Perplexity, Agreement, KL, SQNR]
    return [SQNR]


@dataclass(frozen=True)
class Budget:
    """The most a metric may lose against the original.

    Attributes:
        metric: Name of the metric.
        drop: The loss allowed: in the metric's unit, or relative to the original's value.
        relative: Whether ``drop`` is a share of the original's value.
    """

    metric: str
    drop: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str, known: Mapping[str, type[Metric]]) -> Budget:
        """Read ``METRIC=DROP``: ``top1=1%`` is one point, ``perplexity=2%`` two percent more, ``top1=0.01`` a point.

        Raises:
            UsageError: Not of that form, an unknown metric, or a negative drop.
        """
        from graphopt.errors import did_you_mean

        name, equals, drop = text.partition("=")
        hint = "write `METRIC=DROP`, for example `top1=1%`"
        if not equals:
            raise UsageError(f"budget `{text}` has no `=`", hint=hint)
        if name not in known:
            raise UsageError(f"budget `{text}`: unknown metric `{name}`", hint=did_you_mean(name, known))
        percent = drop.endswith("%")
        try:
            amount = float(drop.removesuffix("%"))
        except ValueError:
            raise UsageError(f"budget `{text}`: `{drop}` is not a number", hint=hint) from None
        if not 0 <= amount < float("inf"):
            raise UsageError(f"budget `{text}`: a drop is 0 or more", hint=hint)
        return cls(name, amount / 100 if percent else amount, relative=percent and not known[name].percent)

    def loss(self, before: float, after: float, metric: type[Metric]) -> float:
        """Return what was lost, in the unit the budget is given in; negative where the metric gained."""
        lost = before - after if metric.higher_is_better else after - before
        return lost / abs(before) if self.relative and before else lost

    def allows(self, before: float, after: float, metric: type[Metric]) -> bool:
        """Return whether the loss stays within the budget; NaN never does."""
        # A billionth of slack, so that 0.98 - 0.97 counts as the one point it is meant to be.
        return self.loss(before, after, metric) <= self.drop + 1e-9
