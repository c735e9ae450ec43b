"""The judge of candidates: many models against one original, on the same samples, its outputs computed once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Backend, Session
from graphopt.comparison import SQNR_CEILING_DB, OutputError
from graphopt.data import Batch, Dataset
from graphopt.errors import UsageError
from graphopt.metrics import KL, SQNR, Agreement, Budget, Metric, Perplexity, Top1, Top5
from graphopt.standing import Standing
from graphopt.walkthrough import Closing

# Bounds what is held of a language model at once: 8 windows of 256 tokens over 32,000 words are 262 MB.
CANDIDATE_BATCH = 8
# The most that passes let the original give them to choose by. Of a language model that gives 4,096 scores a token
# these are 8,192 tokens.
SELECTION_BYTES = 128 << 20
# Outputs of the original beyond this go to temporary files; so do not those of any classifier.
KEPT_IN_MEMORY = 512 << 20
# Probabilities sum to 1 within what float16 can say.
_SUM_TOLERANCE = 1e-2
# Metrics of outputs that hold a score per class.
_OF_CLASSES = (Top1, Top5, Agreement, Perplexity, KL)


class CandidateJudge(Closing):
    """Says how models stand against an original.

    Args:
        original: The model to stand against; kept as it is.
        backend: Runs all of them, its own optimizations on.
        data: The samples. They are for choosing: figures to publish come from others.
        metrics: What to score by besides divergence; what needs labels is left out where there are none.
        budgets: The most that metrics may lose.
        of_classes: Whether the first output is taken for one that holds a score per class. Where None, it is if one of
            the metrics is for such outputs; an output that holds probabilities always is.
        most_bytes: Where the original gives more than this, fewer of the samples are used: a language model says
            thousands of numbers of each token, and each token is an item. None for no such limit.
        threads: Threads for the backend.

    Raises:
        UsageError: A budget needs labels, the samples have none, and nothing can stand in for it.
    """

    def __init__(
        self,
        original: ir.Model,
        backend: Backend,
        data: Dataset,
        metrics: Sequence[type[Metric]],
        budgets: Sequence[tuple[Budget, type[Metric]]] = (),
        *,
        of_classes: bool | None = None,
        most_bytes: int | None = None,
        threads: int = 0,
    ) -> None:
        self.data = data
        self._most_bytes = most_bytes
        self._original, self._backend, self._threads = original, backend, threads
        self._budgets = [(budget, _usable(metric, data)) for budget, metric in budgets]
        wanted = [*metrics, *(metric for _, metric in self._budgets)]
        self.metrics = [one for one in dict.fromkeys(wanted) if data.has_labels or not one.needs_labels]
        # The first output is of classes wherever one of these metrics was chosen for it.
        self._first_is_of_classes = are_of_classes(wanted) if of_classes is None else of_classes
        self._kept: _KeptOutputs | None = None
        self._baseline: Mapping[str, float] = {}

    @property
    def baseline(self) -> Mapping[str, float]:
        """What the original scores, metrics against itself included."""
        self._reference()
        return self._baseline

    def __call__(self, model: ir.Model) -> Standing:
        """Return how a model stands.

        Raises:
            BackendError: The runtime refuses the model.
        """
        kept = self._reference()
        tally = Tally(self.metrics, self._first_is_of_classes)
        with self._backend.open(model, threads=self._threads) as session:
            for index, batch in enumerate(self.data.batches(CANDIDATE_BATCH)):
                tally.update(session.run(batch.feeds), kept.read(index), batch)
        standing = tally.standing()
        used, why = self._used(standing.metrics)
        return Standing(standing.kind, standing.divergence, standing.outputs, standing.metrics, used, why)

    def close(self) -> None:
        """Let go of the outputs of the original; asked again, the judge runs it anew."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _reference(self) -> _KeptOutputs:
        """Run the original at the first call, and keep what it gives."""
        if self._kept is None:
            with ExitStack() as undone:
                kept, tally = _KeptOutputs(), Tally(self.metrics, self._first_is_of_classes)
                undone.callback(kept.close)
                with self._backend.open(self._original, threads=self._threads) as session:
                    self._use_fewer(session)
                    for batch in self.data.batches(CANDIDATE_BATCH):
                        outputs = session.run(batch.feeds)
                        kept.append(outputs)
                        tally.update(outputs, outputs, batch)
                self._baseline = tally.standing().metrics
                self._check_budgets()
                undone.pop_all()
            self._kept = kept
        return self._kept

    def _use_fewer(self, session: Session) -> None:
        """Use only as many samples as the limit on what the original gives allows, one at least."""
        if self._most_bytes is None:
            return
        batch = next(iter(self.data.take(1).batches(1)))
        size = sum(np.asarray(value).nbytes for value in session.run(batch.feeds).values())
        self.data = self.data.sample(max(1, self._most_bytes // max(size, 1)), seed=0)

    def _check_budgets(self) -> None:
        for _, metric in self._budgets:
            if metric.name not in self._baseline:
                raise UsageError(
                    f"a budget on `{metric.name}` needs a score per class, and the first output has none",
                    hint="a budget on `sqnr_db` fits any output",
                )

    def _used(self, scores: Mapping[str, float]) -> tuple[float, str]:
        """Return the largest share of a budget that is used up, and that budget in words."""
        worst, words = 0.0, ""
        for budget, metric in self._budgets:
            before, after = self._baseline[metric.name], scores[metric.name]
            used = _share(budget.loss(before, after, metric), budget.drop)
            if used >= worst or not words:
                worst, words = used, f"{metric.name} {metric.show(before)} → {metric.show(after)}"
        return worst, words


def comparing(
    backend: Backend, metrics: Sequence[type[Metric]], threads: int = 0
) -> Callable[[ir.Model, Dataset], CandidateJudge]:
    """Return what opens a judge without budgets, for passes to compare candidates by.

    Args:
        backend: Runs them.
        metrics: What the run scores by, which tells whether the first output is of classes.
        threads: Threads for the backend.
    """

    def judge(original: ir.Model, samples: Dataset) -> CandidateJudge:
        of_classes, limit = are_of_classes(metrics), SELECTION_BYTES
        return CandidateJudge(original, backend, samples, (), of_classes=of_classes, most_bytes=limit, threads=threads)

    return judge


def are_of_classes(metrics: Sequence[type[Metric]]) -> bool:
    """Return whether one of some metrics is for outputs that hold a score per class."""
    return any(issubclass(one, _OF_CLASSES) for one in metrics)


def _share(loss: float, drop: float) -> float:
    """Return which share of a drop a loss uses up; as `Budget.allows`, a billionth is no loss, and NaN is over."""
    if not loss <= drop + 1e-9:
        return loss / drop if drop > 0 and np.isfinite(loss) else float("inf")
    return min(max(loss, 0.0) / drop, 1.0) if drop > 0 else 0.0


def _usable(metric: type[Metric], data: Dataset) -> type[Metric]:
    """Return what a budget is measured by on samples that may have no labels.

    No more items turn wrong than change their class, so that agreement loses at least what top-1 does.
    """
    if data.has_labels or not metric.needs_labels:
        return metric
    if metric is Top1:
        return Agreement
    raise UsageError(
        f"a budget on `{metric.name}` needs labels to choose by, and the calibration samples have none",
        hint="give labels with `--data`, or a budget on `kl`, `agreement` or `sqnr_db`",
    )


class _KeptOutputs:
    """Outputs of the original, batch by batch; beyond a limit in files that go when this is closed."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Any]] = []
        self._bytes = self._files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, outputs: Mapping[str, Any]) -> None:
        """Keep the outputs of one more batch."""
        self._batches.append({name: self._kept(value) for name, value in outputs.items()})

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            return value
        self._bytes += value.nbytes
        if self._bytes <= KEPT_IN_MEMORY:
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        file = Path(self._folder.name) / f"{self._files}.npy"
        self._files += 1
        np.save(file, value)
        return file

    def read(self, index: int) -> dict[str, Any]:
        """Return the outputs of one batch."""
        batch = self._batches[index]
        return {name: np.load(one) if isinstance(one, Path) else one for name, one in batch.items()}

    def close(self) -> None:
        """Let go of everything kept."""
        self._batches.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Tally:
    """Adds up everything measured of one model against another.

    Args:
        metrics: What to score by besides divergence.
        first_is_of_classes: Whether the first output is taken for one that holds a score per class.
    """

    def __init__(self, metrics: Sequence[type[Metric]], first_is_of_classes: bool) -> None:
        # These two are read off what is measured of each output.
        self._metrics = [metric() for metric in metrics if metric not in (KL, SQNR)]
        self._first_is_of_classes = first_is_of_classes
        self._noise: dict[str, _Noise] = {}
        self._kl: dict[str, KL] | None = None

    def update(self, outputs: Mapping[str, Any], reference: Mapping[str, Any], batch: Batch) -> None:
        """Add one batch."""
        if self._kl is None:
            self._kl = {name: KL() for name in self._of_classes(reference)}
        for name in [name for name in self._kl if not _has_scores(reference[name])]:
            del self._kl[name]  # an axis as long as the sample, which the first samples let pass for classes
        for name, divergence in self._kl.items():
            divergence.update({name: outputs[name]}, {name: reference[name]}, batch)
        for name, value in batch.all_real(reference).items():
            self._noise.setdefault(name, _Noise()).update(value, batch.real(outputs[name]))
        for metric in self._metrics:
            metric.update(outputs, reference, batch)

    def _of_classes(self, reference: Mapping[str, Any]) -> list[str]:
        first = next(iter(reference), None)
        return [
            name
            for name, value in reference.items()
            if _has_scores(value) and ((name == first and self._first_is_of_classes) or _are_probabilities(value))
        ]

    def standing(self) -> Standing:
        """Return what was measured, without any budget."""
        shares = {name: one.share for name, one in self._noise.items()}
        kl = {name: one.value() for name, one in (self._kl or {}).items()}
        outputs = {name: {"sqnr_db": _as_db(share)} for name, share in shares.items()}
        for name, value in kl.items():
            outputs[name]["kl"] = value
        figures = {metric.name: metric.value() for metric in self._metrics}
        worst = max(shares.values(), default=0.0)
        figures |= {"kl": next(iter(kl.values()))} if kl else {}
        figures["sqnr_db"] = _as_db(worst)
        # Rounding can make the divergence of nearly equal distributions less than nothing.
        divergence = max(0.0, *kl.values()) if kl else worst
        unusable = any(np.isnan(value) for value in kl.values()) or not np.isfinite(worst)
        return Standing("kl" if kl else "noise", float("inf") if unusable else divergence, outputs, figures)


class _Noise:
    """The noise power of an output over its signal power; what `OutputError` measures, and nothing else of it."""

    def __init__(self) -> None:
        self._noise = self._signal = 0.0
        self._others_are_equal = True

    @property
    def share(self) -> float:
        """Noise power over signal power; infinite where values that are no numbers changed."""
        if not self._others_are_equal:
            return float("inf")
        return self._noise / max(self._signal, np.finfo(np.float64).tiny) if self._noise else 0.0

    def update(self, signal: Any, noisy: Any) -> None:
        """Add the values of one batch."""
        if not isinstance(signal, np.ndarray) or signal.dtype.kind != "f" or signal.shape != np.shape(noisy):
            one = OutputError("")
            one.update(signal, noisy)
            self._others_are_equal &= one.equal
            return
        with np.errstate(over="ignore", invalid="ignore"):
            noise, power = _powers(signal, noisy)
            if not np.isfinite(noise + power):
                # Also what masks write for minus infinity, the square of which is none of its dtype.
                odd = ~(np.isfinite(np.square(signal)) & np.isfinite(np.square(noisy)))
                self._others_are_equal &= np.array_equal(signal[odd], noisy[odd], equal_nan=True)
                noise, power = _powers(np.where(odd, 0, signal), np.where(odd, 0, noisy))
        self._noise += noise
        self._signal += power


def _powers(signal: Array, noisy: Array) -> tuple[float, float]:
    kind = np.float32 if signal.dtype.itemsize <= np.float32().itemsize else np.float64
    x, y = (side.astype(kind, copy=False).reshape(-1) for side in (signal, noisy))
    difference: Array = np.subtract(y, x)
    return float(np.dot(difference, difference)), float(np.dot(x, x))


def _as_db(share: float) -> float:
    return min(SQNR_CEILING_DB, float(-10 * np.log10(share))) if share > 0 else SQNR_CEILING_DB


def _has_scores(value: Any) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim < 2:
        return False
    # Images hold their classes in axis 1.
    return (value.shape[-1] if value.ndim <= 3 else value[:1].size) > 1


def _are_probabilities(array: Array) -> bool:
    if array.shape[-1] < 2 or not (array >= 0).all():
        return False
    return bool(np.allclose(array.sum(-1, dtype=np.float64), 1.0, atol=_SUM_TOLERANCE))
