"""Task metrics: how good a model's outputs are, and how far they moved from the original's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.data import Batch
from graphopt.data_sources import load_function
from graphopt.errors import DataError, UsageError, did_you_mean, in_words
from graphopt.token_inputs import mask_feed, predicts_tokens, token_feed

Outputs = Mapping[str, Any]

# Labels that say of a position that nothing is to be said there, as in torch and Transformers.
IGNORED_LABEL = -100


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
        return f"{100 * value:.1f} %" if cls.percent else show_number(value)


def show_number(value: float) -> str:
    """Return a number as people read it: four digits, and no exponent where a plain number is as short."""
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "−") if "e" not in text else text


def first_output(outputs: Outputs, batch: Batch) -> Array:
    """Return the first tensor output, without the rows that only pad a fixed batch size."""
    array: Array = batch.real(np.asarray(next(iter(outputs.values()))))
    return array


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
            raise DataError(
                f"metric `{self.name}` had nothing to score",
                hint="more samples; padding is none, nor are labels of −100",
            )
        return self.total / self.count


def _class_scores(array: Array, metric: str) -> Array:
    """Return scores as [items, ..., classes]; images hold their classes in axis 1, unless they are 1×1 pixels."""
    scores = array
    if array.ndim > 3:
        pixels = math.prod(array.shape[1:]) // max(array.shape[1:])
        scores = array.reshape(len(array), -1) if pixels == 1 else np.moveaxis(array, 1, -1)
    if scores.ndim < 2 or scores.shape[-1] < 2:
        raise DataError(
            f"metric `{metric}` needs a score per class and the first output is {list(array.shape)}",
            hint="name another `--metric`, such as `mse` or file.py:function",
        )
    return scores


def _check_labels(labels: Array, items: tuple[int, ...], metric: str) -> Array:
    if labels.shape != items and labels.size != int(np.prod(items)):
        raise DataError(
            f"metric `{metric}`: labels of shape {list(labels.shape)} for outputs of {list(items)} items",
            hint="one label per scored item, or another `--metric`",
        )
    return labels.reshape(items)


def _classes_named(array: Array, labels: Array) -> bool:
    """Return whether an output holds the classes themselves, one per label, rather than scores."""
    return array.dtype.kind in "iubOSU" and array.size == labels.size


def _check_classes(labels: Array, classes: int, metric: str) -> None:
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.size:
        raise DataError(
            f"metric `{metric}`: label {outside.flat[0]} for outputs of {classes} classes",
            hint=f"labels are class numbers from 0 to {classes - 1}",
        )


class Top1(_Mean):
    """Share of items whose highest score is at the label."""

    name, help, percent, needs_labels = "top1", "share of items classified right", True, True
    places: ClassVar[int] = 1

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        assert batch.labels is not None
        output = first_output(outputs, batch)
        if _classes_named(output, batch.labels):
            self.add(output.reshape(-1) == batch.labels.reshape(-1))
            return
        scores = _class_scores(output, self.name)
        labels = _check_labels(batch.labels, scores.shape[:-1], self.name)
        _check_classes(labels, scores.shape[-1], self.name)
        best = _best(scores, self.places)
        # Scores that are NaN name no class.
        self.add((best == labels[..., None]).any(-1) & ~_has_nan(scores))


def _best(scores: Array, places: int) -> Array:
    """Return the places of the highest scores, of equal ones the first."""
    if places == 1:
        return np.asarray(scores.argmax(-1))[..., None]
    return np.asarray(np.argsort(-scores.astype(np.float64), axis=-1, kind="stable"))[..., :places]


def _has_nan(scores: Array) -> Array:
    return np.asarray(np.isnan(scores.astype(np.float32, copy=False)).any(-1))


class Top5(Top1):
    """Share of items whose label is among the five highest scores."""

    name, help, places = "top5", "share of items whose label is among the five best", 5


class Perplexity(_Mean):
    """Exponential of the mean cross-entropy of the next token; lower is better.

    Targets are the labels where given ([N, T] token ids), else the token ids that are fed, shifted by one. Labels of
    −100 are left out, and so is what the model's mask says is padding.
    """

    name, help, higher_is_better = "perplexity", "exp of the mean next-token cross-entropy (language models)", False

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        logits = first_output(outputs, batch).astype(np.float64)
        if batch.labels is not None:
            targets = _check_labels(batch.labels, logits.shape[:-1], self.name)
            counted = _is_counted(targets, batch)
        else:
            tokens = token_feed(batch.feeds)
            if tokens is None or logits.ndim != 3 or logits.shape[:2] != batch.real(batch.feeds[tokens]).shape:
                raise DataError(
                    "metric `perplexity` needs token ids in and [batch, tokens, vocabulary] out",
                    hint="name another `--metric`",
                )
            targets = batch.real(batch.feeds[tokens])
            counted = _is_counted(targets, batch)
            # Padding before a text is no target, and predicts none.
            logits, targets, counted = logits[:, :-1], targets[:, 1:], counted[:, 1:] & counted[:, :-1]
        logits, targets = logits[counted], targets[counted]
        if targets.size and not 0 <= targets.min() <= targets.max() < logits.shape[-1]:
            raise DataError(
                f"metric `perplexity`: targets from {targets.min()} to {targets.max()}, vocabulary of "
                f"{logits.shape[-1]}",
                hint="targets are token ids",
            )
        logits = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, targets[..., None].astype(np.int64), -1)[..., 0]
        self.add(np.log(np.exp(logits).sum(-1)) - chosen)

    def value(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(super().value()))


def _is_counted(targets: Array, batch: Batch) -> Array:
    """Return which tokens [N, T] count: neither left out by their label, nor padding; bool, of the same shape."""
    counted: Array = targets != IGNORED_LABEL
    mask = mask_feed(batch.feeds, token_feed(batch.feeds) or "")
    if mask is not None and targets.ndim == 2:
        # Of a decoder the mask begins with what it has read before.
        real = batch.real(batch.feeds[mask])[:, -targets.shape[1] :]
        counted = counted & (real != 0) if real.shape == counted.shape else counted
    return counted


class MeanSquaredError(_Mean):
    """Mean squared difference between the first output and the labels."""

    name, help, higher_is_better, needs_labels = "mse", "mean squared error against the labels", False, True

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        assert batch.labels is not None
        values = first_output(outputs, batch).astype(np.float64)
        if values.size != batch.labels.size:
            raise DataError(
                f"metric `mse`: labels of shape {list(batch.labels.shape)} for an output of {list(values.shape)}",
                hint="one label per value of the first output, or another `--metric`",
            )
        self.add((values - batch.labels.reshape(values.shape)) ** 2)


class Agreement(_Mean):
    """Share of items on which the model and the original pick the same class."""

    name, help, percent = "agreement", "share of items classified as the original does", True
    against_original = True

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        mine, theirs = (first_output(side, batch) for side in (outputs, original))
        if batch.labels is not None and _classes_named(theirs, batch.labels):
            self.add(mine == theirs)
            return
        mine, theirs = _class_scores(mine, self.name), _class_scores(theirs, self.name)
        self.add((mine.argmax(-1) == theirs.argmax(-1)) & ~_has_nan(mine))


class KL(_Mean):
    """Mean Kullback-Leibler divergence KL(original ‖ model) of the softmaxed first output, in nats."""

    name, help, higher_is_better = "kl", "KL(original ‖ model) of the softmaxed first output, in nats", False
    against_original = True

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        mine, theirs = (_class_scores(first_output(side, batch), self.name) for side in (outputs, original))
        # The original decides for both: the model's probabilities may have drifted from a sum of one.
        self.add((_divergence_of_shares if _are_shares(theirs) else _divergence_of_logits)(theirs, mine))


def _are_shares(scores: Array) -> bool:
    """Return whether scores are probabilities already, rather than logits."""
    return bool((scores >= 0).all() and np.allclose(scores.sum(-1, dtype=np.float64), 1.0, atol=1e-3))


def _divergence_of_shares(theirs: Array, mine: Array) -> Array:
    """Return KL(theirs ‖ mine) of probabilities, [..., classes] to [...]."""
    p, q = (np.maximum(side.astype(np.float64), 1e-12) for side in (theirs, mine))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return np.asarray((p * np.log(p / q)).sum(-1))


def _divergence_of_logits(theirs: Array, mine: Array) -> Array:
    """Return KL of the softmaxes of logits, [..., classes] to [...]: Σ p (a − b) − log Σ eᵃ + log Σ eᵇ.

    Logits of a language model are many: float32 stays float32, and only sums are float64. What that rounds off is
    about 1e-8 for one item.
    """
    kind = np.float64 if np.float64 in (theirs.dtype, mine.dtype) else np.float32
    a: Array = np.subtract(theirs, theirs.max(-1, keepdims=True), dtype=kind)
    b: Array = np.subtract(mine, mine.max(-1, keepdims=True), dtype=kind)
    shares, sum_b = np.exp(a), np.exp(b).sum(-1, dtype=np.float64)
    sum_a = shares.sum(-1, dtype=np.float64)
    shares *= np.subtract(a, b, out=b)
    return np.asarray(shares.sum(-1, dtype=np.float64) / sum_a - np.log(sum_a) + np.log(sum_b))


_CROSS_ENTROPY = "cross-entropy"


def own_answers(output: Array) -> Array:
    """Return the class with the highest score of each item of an output, int64 [items, ...].

    Raises:
        DataError: The output holds no score per class.
    """
    return np.asarray(_class_scores(output, _CROSS_ENTROPY).argmax(-1))


def cross_entropies(output: Array, labels: Array) -> Array:
    """Return −log p(label) of each item of an output of logits, or of probabilities, float64 [items, ...], in nats.

    Args:
        output: A score per class.
        labels: A class number per item.

    Raises:
        DataError: The output holds no score per class, or the labels are no classes of it.
    """
    scores = _class_scores(output, _CROSS_ENTROPY)
    if scores.dtype.kind != "f" or labels.dtype.kind not in "iu":
        raise DataError(
            f"metric `{_CROSS_ENTROPY}` needs float scores and classes, not {output.dtype} and {labels.dtype}",
            hint="labels are class numbers",
        )
    labels = _check_labels(labels, scores.shape[:-1], _CROSS_ENTROPY)
    _check_classes(labels, scores.shape[-1], _CROSS_ENTROPY)
    if _are_shares(scores):
        scores = np.log(np.maximum(scores, np.finfo(np.float32).tiny, dtype=np.float64))
    # Logits of a language model are many: only sums are float64.
    scores = scores.astype(np.float32, copy=False) - scores.max(-1, keepdims=True)
    chosen = np.take_along_axis(scores, labels[..., None].astype(np.int64), -1)[..., 0]
    return np.asarray(np.log(np.exp(scores).sum(-1, dtype=np.float64)) - chosen)


class SQNR(Metric):
    """Signal to quantization noise ratio of the worst output against the original's, in dB."""

    name, help, against_original = "sqnr_db", "signal to noise ratio of the worst output, dB", True

    def __init__(self) -> None:
        from graphopt.comparison import Comparison

        self.comparison = Comparison()

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        self.comparison.update(batch.all_real(original), batch.all_real(outputs))

    def value(self) -> float:
        return self.comparison.sqnr_db

    @classmethod
    def show(cls, value: float | None) -> str:
        return "–" if value is None else f"{value:.1f} dB".replace("-", "−")


class UserMetric(Metric):
    """A function ``(outputs: dict[str, array], labels: array | None) -> float`` over all scored samples at once.

    The outputs of all scored samples are held in memory.
    """

    function: Callable[..., Any]

    def __init__(self) -> None:
        self.outputs: list[dict[str, Array]] = []
        self.labels: list[Array] = []

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        self.outputs.append({name: np.atleast_1d(batch.real(np.asarray(value))) for name, value in outputs.items()})
        if batch.labels is not None:
            self.labels.append(batch.labels)

    def value(self) -> float:
        if not self.outputs:
            raise DataError(f"metric `{self.name}` had nothing to score", hint="give more samples")
        try:
            joined = {name: np.concatenate([part[name] for part in self.outputs]) for name in self.outputs[0]}
            labels = np.concatenate(self.labels) if self.labels else None
            return float(type(self).function(joined, labels))
        except Exception as error:
            raise DataError(
                f"metric `{self.name}` fails: {in_words(error)}",
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
    if not model.graph.outputs:
        return []
    output = model.graph.outputs[0]
    rank = len(output.shape) if output.shape is not None else None
    labels = batch.labels
    if labels is not None and rank is not None and _is_one_value(output):
        return [MeanSquaredError, SQNR]
    is_class = labels is not None and labels.dtype.kind in "iub" and labels.ndim <= 2
    if is_class and labels is not None and labels.ndim == 2 and labels.shape[1] > 1 and rank == 3:
        return [Perplexity, Agreement, KL, SQNR]
    is_image = labels is not None and labels.dtype.kind in "iub" and labels.ndim == 3 and rank == 4
    if (is_class or is_image) and output.dtype is not None and output.dtype.is_integer():
        return [Top1, Agreement]
    if is_class or is_image:
        return [Top1, Agreement, KL, SQNR]
    if labels is not None:
        return [MeanSquaredError, SQNR]
    if predicts_tokens(model):
        return [Perplexity, Agreement, KL, SQNR]
    return [SQNR]


def _is_one_value(output: ir.Value) -> bool:
    """Return whether an output is one float per sample, which no classifier's is."""
    if output.dtype is None or not output.dtype.is_floating_point() or output.shape is None:
        return False
    return len(output.shape) == 1 or (len(output.shape) == 2 and output.shape[1] == 1)


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
        metric = known[name]
        if metric.percent and (amount / 100 if percent else amount) >= 1:
            raise UsageError(f"budget `{text}` allows any loss", hint=f"one point is `{name}=1%` or `{name}=0.01`")
        if percent and metric.against_original and not metric.percent:
            raise UsageError(
                f"budget `{text}`: the original has no `{name}` that could change by a share",
                hint=f"write `{name}=DROP` without `%`",
            )
        return cls(name, amount / 100 if percent else amount, relative=percent and not metric.percent)

    def loss(self, before: float, after: float, metric: type[Metric]) -> float:
        """Return what was lost, in the unit the budget is given in; negative where the metric gained."""
        lost = before - after if metric.higher_is_better else after - before
        return lost / abs(before) if self.relative and before else lost

    def allows(self, before: float, after: float, metric: type[Metric]) -> bool:
        """Return whether the loss stays within the budget; NaN never does."""
        # A billionth of slack, so that 0.98 - 0.97 counts as the one point it is meant to be.
        return self.loss(before, after, metric) <= self.drop + 1e-9
