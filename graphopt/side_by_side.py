"""Models side by side on the same inputs: how far their outputs are apart, and how long each takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import latency
from graphopt.backend import Array
from graphopt.choices import ModelLike, chosen_metrics, find_backend, find_target, open_model
from graphopt.comparison import Comparison, require_same_names
from graphopt.data import Batch, Dataset, open_data
from graphopt.evaluation import SCORING_BATCH
from graphopt.generated import generated_feeds
from graphopt.latency import Latency

BENCH_SECONDS = 2.0


def compare(
    a: ModelLike,
    b: ModelLike,
    *,
    data: Any = None,
    labels: str | None = None,
    metric: str | None = None,
    backend: str | None = None,
    seed: int = 0,
    threads: int = 0,
) -> Comparison:
    """Compare two models' outputs, matched by name, on the same inputs, as deployed.

    Args:
        a: A model or path; the reference.
        b: Another.
        data: Samples, as for `optimize`; made-up inputs where None.
        labels: Key of the labels; metrics are scored where there are any.
        metric: Metric to score by.
        backend: Backend text.
        seed: Seed of made-up inputs.
        threads: Threads for the backend.

    Raises:
        ModelError: The two have different inputs or outputs.
        BackendError: The runtime refuses one of them.
    """
    runtime = find_backend(backend, find_target(None))
    models = [open_model(one) for one in (a, b)]
    for kind in ("input", "output"):
        names = [[value.name or "" for value in getattr(model.graph, kind + "s")] for model in models]
        require_same_names(kind, *names)
    samples = open_data(data, models[0], labels=labels) if data is not None else None
    metrics = chosen_metrics(metric, models[0], samples)
    comparison = Comparison()
    scores = [[one() for one in metrics if not one.against_original] for _ in models]
    with runtime.open(models[0], threads=threads) as left, runtime.open(models[1], threads=threads) as right:
        for batch in _comparison_batches(models[0], samples, seed):
            outputs = left.run(batch.feeds), right.run(batch.feeds)
            comparison.update(*outputs)
            for side, out in zip(scores, outputs, strict=True):
                for one in side:
                    one.update(out, outputs[0], batch)
    for first, second in zip(*scores, strict=True):
        comparison.metrics[first.name] = (first.value(), second.value())
    return comparison


def _comparison_batches(model: ir.Model, data: Dataset | None, seed: int) -> Iterable[Batch]:
    if data is not None:
        return data.batches(SCORING_BATCH)
    return [Batch(feed, None, 1) for feed in generated_feeds(model, seed)]


def bench(
    models: Sequence[str | Path],
    *,
    data: Any = None,
    batch: int = 1,
    backend: str | None = None,
    threads: int = 0,
    seconds: float = BENCH_SECONDS,
    seed: int = 0,
) -> list[Latency]:
    """Time model files in turn, each on the same inputs.

    Args:
        models: Model files with the same inputs.
        data: Samples to run on, as for `optimize`; made-up inputs where None.
        batch: Samples per run, where the model's batch dimension is dynamic.
        backend: Backend text.
        threads: Threads for the backend; 0 leaves it to the runtime.
        seconds: Time to spend in all.
        seed: Seed of made-up inputs.
    """
    runtime = find_backend(backend, find_target(None))
    feeds = [_bench_feed(open_model(model), data, batch, seed) for model in models]
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(runtime.open(Path(model), threads=threads)) for model in models]
        return latency.measure(sessions, feeds, seconds=seconds)


def _bench_feed(model: ir.Model, data: Any, batch: int, seed: int) -> dict[str, Array]:
    if data is not None:
        return next(iter(open_data(data, model).batches(batch))).feeds
    return generated_feeds(model, seed, sets=1, batch=batch)[0]
