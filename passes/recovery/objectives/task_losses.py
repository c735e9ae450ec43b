"""Losses against labels: cross-entropy, the next token, squared error, and functions of the user."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from graphopt.data import Dataset
from graphopt.data_sources import load_named_function
from graphopt.errors import DataError, GraphoptError, PassError, in_words
from graphopt.metrics import IGNORED_LABEL, MeanSquaredError, Perplexity, Top1, default_metrics
from graphopt.options import FunctionText
from graphopt.shapes import dims_of

from .scores import Scores, items_of, scored_tokens, scores_of
from .terms import Items, Term, Values

if TYPE_CHECKING:
    from ..training.samples import TrainingBatch

_SCAN_BATCH = 256  # labels looked at together


class CrossEntropy(Term):
    """Cross-entropy of classes, in nats; labels of −100 are left out, as in torch, and so is padding.

    Of language models this is the logarithm of the metric `perplexity`: targets are the labels where given,
    [rows, tokens], else the token ids shifted by one.

    Args:
        name: The task.
        scores: Where scores are read.
        items: Rows, or tokens.
        weight: Its share of the loss.
    """

    def __init__(self, name: str, scores: Scores, items: Items, weight: float) -> None:
        self.name, self._scores, self.items, self.weight = name, scores, items, weight
        what = "next-token cross-entropy" if name == "next-token" else name
        self.measure = what if items.shifted else f"{what} against labels"
        self.subject = scores.output
        self.student = scores.observed
        self.needs_preparation = not scores.is_known

    def count(self, batch: TrainingBatch) -> float:
        """Return the number of targets."""
        return float(self._counted(self._targets(batch), batch).sum())

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over targets.

        Raises:
            DataError: There are not as many labels as the output has items.
        """
        logits = batch.real(self._scores.logits(student))
        targets = self._targets(batch)
        if self.items.shifted:
            logits = logits[:, :-1]
        if targets.numel() != logits[..., 0].numel():
            raise DataError(
                f"task `{self.name}`: labels of shape {list(targets.shape)} for scores of {list(logits.shape)}",
                hint="one label per scored item, or another `task`",
            )
        flat = logits.reshape(-1, logits.shape[-1])
        losses = functional.cross_entropy(flat, targets.reshape(-1), reduction="none", ignore_index=IGNORED_LABEL)
        return (losses.reshape(targets.shape) * self._counted(targets, batch)).sum()

    def look(self, student: Values, teacher: Values, batch: TrainingBatch) -> None:
        """Find out whether scores are probabilities."""
        self._scores = self._scores.settled(student, batch)

    def _targets(self, batch: TrainingBatch) -> Tensor:
        if self.items.shifted:
            assert self.items.tokens is not None, "tokens are counted"
            targets: Tensor = batch.real(batch.feeds[self.items.tokens])[:, 1:]
            return targets.long()
        assert batch.labels is not None, "samples were found to have labels"
        labels: Tensor = batch.labels
        return labels.long()

    def _counted(self, targets: Tensor, batch: TrainingBatch) -> Tensor:
        counted = (targets != IGNORED_LABEL).float()
        if self.items.mask is None:
            return counted
        weights = self.items.weights(batch)
        return counted * weights if weights.shape == counted.shape else counted


class SquaredError(Term):
    """Mean squared difference between the first output and the labels.

    Args:
        output: Name of the output.
        weight: Its share of the loss.
    """

    name = "mse"
    measure = "squared error against labels"

    def __init__(self, output: str, weight: float) -> None:
        self._output, self.subject, self.weight = output, output, weight

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over rows of each row's mean.

        Raises:
            DataError: There are not as many labels as values.
        """
        assert batch.labels is not None, "samples were found to have labels"
        values = batch.real(student[self._output]).float()
        if values.numel() != batch.labels.numel():
            raise DataError(
                f"task `mse`: labels of shape {list(batch.labels.shape)} for an output of {list(values.shape)}",
                hint="one label per value of the first output, or another `task`",
            )
        labels: Tensor = batch.labels.float()
        return (values - labels.reshape(values.shape)).square().mean() * batch.count


class UserLoss(Term):
    """A function ``(outputs: dict[str, Tensor], labels: Tensor | None) -> Tensor`` of the user.

    It is given the real samples of a batch, and returns a loss for each of them, [rows], or one that is their mean.

    Args:
        function: The function.
        text: How the user named it.
        weight: Its share of the loss.
    """

    name = "task"
    measure = "task"

    def __init__(self, function: Callable[..., Any], text: str, weight: float) -> None:
        self._function, self._text, self.weight = function, text, weight
        self.subject = text

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over rows.

        Raises:
            DataError: The function fails, or gives something else than a loss.
        """
        real = {name: batch.real(value) if isinstance(value, Tensor) else value for name, value in student.items()}
        hint = "it is called as function(outputs: dict of tensors, labels or None) and returns a loss per sample"
        try:
            losses = self._function(real, batch.labels)
        except GraphoptError:
            raise
        except Exception as error:
            raise DataError(f"task `{self._text}` fails: {in_words(error)}", hint=hint) from error
        if not isinstance(losses, Tensor):
            raise DataError(f"task `{self._text}` returns {type(losses).__name__}, no tensor", hint=hint)
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise DataError(
                f"task `{self._text}` returns a loss without gradient", hint="compute it by torch, no numpy"
            )
        return losses.float().mean() * batch.count


def task_of(model: ir.Model, data: Dataset) -> str | None:
    """Return the task that a model and its samples suggest, by the metrics they would be scored by."""
    metrics = default_metrics(model, next(iter(data.take(1).batches(1))))
    if Perplexity in metrics:
        return "next-token"
    if Top1 in metrics:
        return "cross-entropy"
    return "mse" if MeanSquaredError in metrics else None


def task_term(task: str, model: ir.Model, data: Dataset, weight: float) -> Term:
    """Return the term of a task.

    Args:
        task: A built-in task, ``file.py:function`` or ``package.module:function``.
        model: The model that is trained.
        data: The samples.
        weight: The term's share of the loss.

    Raises:
        UsageError: No such function.
        PassError: The task does not suit the model.
        DataError: The samples lack labels, or have other ones.
    """
    if ":" in task:
        return UserLoss(loss_function(task), task, weight)
    output = model.graph.outputs[0] if model.graph.outputs else None
    if output is None or output.dtype is None or not output.dtype.is_floating_point():
        raise PassError(
            f"pass `recover`: task `{task}` has no output of floats to work on",
            hint="train the model as it is before an ArgMax or a Cast at its end, or write a task as file.py:function",
        )
    makers = {"cross-entropy": _cross_entropy, "next-token": _next_token, "mse": _squared_error}
    return makers[task](model, output, data, weight)


def _cross_entropy(model: ir.Model, output: ir.Value, data: Dataset, weight: float) -> Term:
    _need_labels(data, "cross-entropy")
    dims = dims_of(output)
    if dims is not None and len(dims) < 2:
        raise PassError(
            f"pass `recover`: task `cross-entropy` needs a score per class, and `{output.name}` is of rank {len(dims)}",
            hint="`task=mse`, or a function of your own",
        )
    _check_classes(data, _classes(dims), "cross-entropy")
    return CrossEntropy("cross-entropy", scores_of(model, output), items_of(model, output), weight)


def _next_token(model: ir.Model, output: ir.Value, data: Dataset, weight: float) -> Term:
    items = scored_tokens(model, output, shifted=not data.has_labels)
    if items.tokens is None:
        raise PassError(
            "pass `recover`: task `next-token` needs token ids in and [rows, tokens, vocabulary] out",
            hint="`task=cross-entropy`, or a function of your own",
        )
    _check_classes(data, _classes(dims_of(output)), "next-token", items.tokens if items.shifted else None)
    return CrossEntropy("next-token", scores_of(model, output), items, weight)


def _squared_error(model: ir.Model, output: ir.Value, data: Dataset, weight: float) -> Term:
    labels = _need_labels(data, "mse")
    if labels.dtype.kind not in "fiub":
        raise DataError(f"task `mse` needs numbers for labels, not {labels.dtype}", hint="another `task`")
    dims = dims_of(output)
    sizes = [dim for dim in dims[1:] if isinstance(dim, int)] if dims is not None else []
    wanted = int(np.prod(sizes)) if dims is not None and len(sizes) == len(dims) - 1 else None
    given = int(np.prod(labels.shape[1:]))
    if wanted is not None and wanted != given:
        raise DataError(
            f"task `mse`: labels of {given} values a sample for output `{output.name}` of {wanted}",
            hint="one label per value of the first output, or another `task`",
        )
    return SquaredError(output.name or "", weight)


def _classes(dims: Any) -> int | None:
    """Return the static number of classes of an output, where images hold them in axis 1."""
    if dims is None:
        return None
    if len(dims) > 3:
        known = [dim for dim in dims[1:] if isinstance(dim, int)]
        dim = max(known) if len(known) == len(dims) - 1 and sorted(known)[:-1] == [1] * (len(known) - 1) else dims[1]
    else:
        dim = dims[-1]
    return dim if isinstance(dim, int) else None


def _need_labels(data: Dataset, task: str) -> np.ndarray[Any, Any]:
    if not data.has_labels:
        raise DataError(
            f"task `{task}` needs labels, and `{data.name}` has none",
            hint="put them beside the inputs as `labels`, name their key with `--labels`, or give a teacher",
        )
    labels = next(iter(data.take(1).batches(1))).labels
    assert labels is not None, "samples have labels"
    return labels


def _check_classes(data: Dataset, classes: int | None, task: str, tokens: str | None = None) -> None:
    """Refuse targets that are no classes of a model, before anything is trained.

    Args:
        data: The samples.
        classes: How many classes there are, or None where that is not known.
        task: What they are for.
        tokens: Input of token ids that are the targets; labels where None.
    """
    what = "label" if tokens is None else "token"
    for batch in data.batches(_SCAN_BATCH):
        targets = batch.labels if tokens is None else batch.feeds[tokens]
        assert targets is not None, "samples were found to have labels"
        if targets.dtype.kind not in "iub":
            raise DataError(
                f"task `{task}` needs class numbers for {what}s, not {targets.dtype}",
                hint="`task=mse`, or other labels",
            )
        numbers = targets.astype(np.int64)
        outside = (numbers < 0) & (numbers != IGNORED_LABEL)
        if classes is not None:
            outside |= numbers >= classes
        if outside.any():
            of = f" for outputs of {classes} classes" if classes is not None else ""
            raise DataError(
                f"task `{task}`: {what} {numbers[outside].flat[0]}{of}",
                hint=f"class numbers count from 0; labels of {IGNORED_LABEL} are left out",
            )


def source_of(task: str) -> str:
    """Return a checksum of the file a task of the user is in, which its result depends on; "" for a built-in one."""
    place, _, name = task.rpartition(":")
    if not name or not place:
        return ""
    file = Path(place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None) or "")
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest() if file.is_file() else ""


def loss_function(text: str) -> Callable[..., Any]:
    """Return the function ``file.py:function`` or ``package.module:function``, or the one that Python gave.

    Raises:
        DataError: No such file, or it fails to run.
        UsageError: No such module or function.
    """
    if isinstance(text, FunctionText):
        return text.function
    return load_named_function(text, hint="write file.py:function, or package.module:function")
