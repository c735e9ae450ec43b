"""The judge: runs models against the original on the same samples, and scores them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend, Session
from graphopt.comparison import Comparison
from graphopt.data import Batch, Dataset
from graphopt.errors import BackendError, DataError
from graphopt.generated import generated_feeds
from graphopt.metrics import SQNR, Metric
from graphopt.report import Check

PROBE_SAMPLES = 4
SCORING_BATCH = 32
# Sizes tried, as factors, until the original runs on made-up inputs: some models want a least length.
GENERATED_SCALES = (1, 8, 64)
# Relative: what a few roundings of float32 that all go the same way come to.
NUDGE = 1e-5
# What these read is no weight: it decides how many elements there are, and -1 to the power of 2.00001 is no number.
_EXACT_FLOATS = ("Pow", "Range", "Resize", "Upsample")

Outputs = list[dict[str, Any]]


class Judge:
    """Runs models on the same samples as the original.

    Args:
        original: The model to be judged against.
        backend: Runs both.
        data: Samples to score on, or None: then inputs are made up.
        metrics: What to score by.
        seed: Seed of made-up inputs.
        threads: Threads for the backend.
        feeds: What to compare outputs on, instead of the data or made-up inputs.
        teacher: What outputs are scored against instead of the original's, or None.

    Attributes:
        cannot_probe: Why outputs cannot be compared, or None.
        refusal: The backend's error where it refuses the original whatever it is fed, or None.
    """

    def __init__(
        self,
        original: ir.Model,
        backend: Backend,
        data: Dataset | None,
        metrics: Sequence[type[Metric]],
        *,
        seed: int = 0,
        threads: int = 0,
        feeds: Sequence[dict[str, Array]] = (),
        teacher: ir.Model | None = None,
    ) -> None:
        self.original = original
        self.teacher = teacher
        self.backend = backend
        self.data = data
        self.metrics = list(metrics)
        self.threads = threads
        self.cannot_probe: str | None = None
        self.refusal: BackendError | None = None
        self.feeds: list[dict[str, Array]] = list(feeds)
        self.reference: Outputs | None = None
        self._prepare(seed)

    @property
    def samples(self) -> int:
        """How many samples are scored."""
        return len(self.data) if self.data is not None else 0

    @property
    def scored_on(self) -> str:
        """What figures come from, for people."""
        if self.data is None:
            return "made-up inputs"
        return f"{self.samples} sample{'s' if self.samples != 1 else ''} of `{self.data.name}`"

    def _prepare(self, seed: int) -> None:
        """Find feeds the original runs on and keep its outputs, or say why there are none."""
        try:
            with self.backend.open(self.original, threads=self.threads, optimize=False) as session:
                self._find_reference(session, seed)
        except BackendError as error:
            self.refusal, self.cannot_probe = error, error.message
        if self.reference is None:
            return
        self.cannot_probe = None
        if _has_random_ops(self.original) and not compare_outputs(self.reference, self.probe(self.original)).equal:
            self.cannot_probe = "the original's outputs differ from run to run (random operators)"

    def _find_reference(self, session: Session, seed: int) -> None:
        for feeds in self._candidate_feeds(seed):
            self.feeds = feeds
            try:
                self.reference = [session.run(feed) for feed in feeds]
                return
            except BackendError as error:
                source = "the given data" if self.data is not None else "made-up inputs (give real ones with `--data`)"
                self.cannot_probe = f"the original does not run on {source}: {error.message}"

    def _candidate_feeds(self, seed: int) -> Iterator[list[dict[str, Array]]]:
        if self.feeds:
            yield self.feeds
            return
        if self.data is not None:
            yield [batch.feeds for batch in self.data.take(PROBE_SAMPLES).batches(PROBE_SAMPLES)]
            return
        try:
            for scale in GENERATED_SCALES:
                yield generated_feeds(self.original, seed, scale=scale)
        except DataError as error:
            self.cannot_probe = error.message

    def probe(self, model: ir.Model) -> Outputs:
        """Return a model's outputs on the probe feeds, the runtime's own optimizations off.

        Raises:
            BackendError: The runtime refuses the model.
        """
        with self.backend.open(model, threads=self.threads, optimize=False) as session:
            return [session.run(feed) for feed in self.feeds]

    def score(self, model: ir.Model | Path) -> dict[str, float]:
        """Return a model's metrics as deployed: the runtime's own optimizations fully on.

        Without data, the SQNR on the probe feeds is all there is.
        """
        if self.refusal is not None or (self.cannot_probe is not None and self.data is None):
            return {}
        metrics = [metric() for metric in self.metrics] if self.data is not None else [SQNR()]
        standard = self.teacher if self.teacher is not None else self.original
        with (
            self.backend.open(standard, threads=self.threads) as original,
            self.backend.open(model, threads=self.threads) as session,
        ):
            for batch in self._batches():
                outputs, reference = session.run(batch.feeds), original.run(batch.feeds)
                for metric in metrics:
                    metric.update(outputs, reference, batch)
        return {metric.name: metric.value() for metric in metrics}

    def _batches(self) -> Iterable[Batch]:
        if self.data is not None:
            return self.data.batches(SCORING_BATCH)
        return [Batch(feed, None, 1) for feed in self.feeds]

    def hangs_on_rounding(self, error: float) -> str | None:
        """Return why an error says nothing about what was done to a model, or None where it does.

        A variance that is a small difference of large numbers, for one, moves by far more than what it is computed
        from. So every weight of the original is nudged; where that alone moves the outputs beyond rounding, and as far
        as the error, nobody is blamed for it.

        Raises:
            BackendError: The runtime refuses the original.
        """
        assert self.reference is not None, "the original runs"
        moved = compare_outputs(self.reference, self.probe(nudged(self.original)))
        if moved.within() or error > moved.max_abs_error:
            return None
        return f"nudging the original's weights by {NUDGE:g} of themselves moves it by {moved.max_abs_error:.3g}"

    def deployed(self, original: ir.Model | Path, result: ir.Model | Path) -> Check:
        """Compare two models by rounding, the runtime's own optimizations fully on.

        Where those optimizations already change the original beyond rounding, no pass is blamed.
        """
        if self.reference is None or self.cannot_probe is not None:
            return Check("none", None, why=self.cannot_probe)
        before, after = (self._run_optimized(model) for model in (original, result))
        comparison = compare_outputs(before, after)
        runtime = compare_outputs(self.reference, before)
        if not runtime.within() and not comparison.within():
            why = f"the runtime's own optimizations change the original by {runtime.max_abs_error:.3g}"
            return Check("none", None, comparison.max_abs_error, why=why)
        if comparison.says_nothing:
            return Check("none", None, why="the original gives only NaN or infinity on these inputs")
        excuse = None if comparison.within() else self.hangs_on_rounding(comparison.max_abs_error)
        if excuse is not None:
            return Check("none", None, comparison.max_abs_error, why=excuse)
        kind = "equal" if comparison.equal else "equivalent"
        failure = None if comparison.within() else f"off by {comparison.max_abs_error:.3g}"
        return Check(kind, comparison.within(), comparison.max_abs_error, why=failure)

    def _run_optimized(self, model: ir.Model | Path) -> Outputs:
        with self.backend.open(model, threads=self.threads) as session:
            return [session.run(feed) for feed in self.feeds]

    def single_feed(self) -> dict[str, Array] | None:
        """Return a feed of one sample to time runs with, or None where there is none."""
        if self.refusal is not None:
            return None
        if self.data is not None:
            return next(iter(self.data.take(1).batches(1))).feeds
        if self.cannot_probe is not None or not self.feeds:
            return None
        return {name: _first_sample(self.original, name, array) for name, array in self.feeds[0].items()}


def _first_sample(model: ir.Model, name: str, array: Array) -> Array:
    """Cut a made-up feed down to batch 1 where the first dimension is dynamic."""
    value = next(value for value in model.graph.inputs if value.name == name)
    dynamic = value.shape is not None and len(value.shape) > 0 and not isinstance(value.shape[0], int)
    return np.ascontiguousarray(array[:1]) if dynamic else array


def nudged(model: ir.Model, share: float = NUDGE, seed: int = 0) -> ir.Model:
    """Return a model whose float weights are off, at random, by up to a share of themselves.

    Exponents and what sizes are computed from stay, and so does what stands in for infinity.
    """
    rng, moved = np.random.default_rng(seed), model.clone()
    for value in walk.initializers(moved):
        tensor = walk.constant_tensor(value)
        if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE) or _is_exact(value):
            continue
        array = tensor.numpy()
        limit = np.finfo(array.dtype).max / 4
        factors = 1 + share * rng.uniform(-1, 1, array.shape)
        value.const_value = ir.tensor(
            np.where(np.abs(array) < limit, array * factors, array).astype(array.dtype), name=value.name
        )
    return moved


def _is_exact(value: ir.Value) -> bool:
    return any(walk.is_onnx_op(use.node, *_EXACT_FLOATS) for use in value.uses())


def compare_outputs(before: Outputs, after: Outputs) -> Comparison:
    """Compare two models' outputs on the same feeds."""
    comparison = Comparison()
    for a, b in zip(before, after, strict=True):
        comparison.update(a, b)
    return comparison


def _has_random_ops(model: ir.Model) -> bool:
    return any(walk.is_random(node) for node in walk.every_node(model))
