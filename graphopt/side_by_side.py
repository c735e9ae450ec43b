"""Models side by side on the same inputs: how far their outputs are apart, and how long each takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import latency
from graphopt.backend import Array
from graphopt.choices import ModelLike, chosen_metrics, find_backend, find_target, known_metrics, open_model
from graphopt.comparison import Comparison, require_same_names
from graphopt.data import Batch, Dataset, batch_size, input_specs, open_data
from graphopt.errors import UsageError
from graphopt.evaluation import SCORING_BATCH
from graphopt.generated import generated_feeds
from graphopt.latency import Latency
from graphopt.progress import Display

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
    progress: bool = False,
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
        progress: Show progress on stderr.

    Raises:
        ModelError: The two have different inputs or outputs.
        BackendError: The runtime refuses one of them.
    """
    runtime, display = find_backend(backend, find_target(None)), Display(progress)
    models = [open_model(one) for one in (a, b)]
    for kind in ("input", "output"):
        names = [[value.name or "" for value in getattr(model.graph, kind + "s")] for model in models]
        require_same_names(kind, *names)
    samples = None
    if data is not None:
        with display.stage("reading the data"):
            samples = open_data(data, models[0], labels=labels, advance=display.advance)
    known = known_metrics(metric)
    if metric is not None and samples is None:
        raise UsageError(f"metric `{metric}` needs data to score", hint="add `--data`")
    chosen = chosen_metrics(metric, known, models[0], samples)
    # What compares with the original is in the table anyway, unless it was asked for by name.
    metrics = [one for one in chosen if not one.against_original or metric == one.name]
    comparison = Comparison(metric_types=known)
    scores = [[one() for one in metrics] for _ in models]
    with (
        display.stage("comparing"),
        runtime.open(models[0], threads=threads) as left,
        runtime.open(models[1], threads=threads) as right,
    ):
        for batch in _comparison_batches(models[0], samples, seed):
            outputs = left.run(batch.feeds), right.run(batch.feeds)
            comparison.update(*(batch.all_real(out) for out in outputs))
            comparison.samples += batch.count
            for side, out in zip(scores, outputs, strict=True):
                for one in side:
                    one.update(out, outputs[0], batch)
    for first, second in zip(*scores, strict=True):
        comparison.metrics[first.name] = (None if first.against_original else first.value(), second.value())
    comparison.source = samples.name if samples is not None else None
    return comparison


def _comparison_batches(model: ir.Model, data: Dataset | None, seed: int) -> Iterable[Batch]:
    if data is not None:
        return data.batches(SCORING_BATCH)
    return [Batch(feed, None, batch_size(feed)) for feed in generated_feeds(model, seed)]


def bench(
    models: Sequence[str | Path],
    *,
    data: Any = None,
    batch: int | None = None,
    backend: str | None = None,
    threads: int = 0,
    seconds: float = BENCH_SECONDS,
    seed: int = 0,
    progress: bool = False,
) -> list[Latency]:
    """Time model files in turn, each on the same inputs.

    Args:
        models: Model files with the same inputs.
        data: Samples to run on, as for `optimize`; made-up inputs where None.
        batch: Samples per run; where None, 1, or the model's fixed batch size.
        backend: Backend text.
        threads: Threads for the backend; 0 leaves it to the runtime.
        seconds: Time to spend in all.
        seed: Seed of made-up inputs.
        progress: Show progress on stderr.

    Raises:
        UsageError: A model cannot run on so many samples, or the data hold fewer.
        ModelError: The models have different inputs.
    """
    runtime = find_backend(backend, find_target(None))
    opened = [open_model(model) for model in models]
    for other in opened[1:]:
        require_same_names("input", *([spec.name for spec in input_specs(one)] for one in (opened[0], other)))
    feeds = [_bench_feed(model, str(name), data, batch, seed) for model, name in zip(opened, models, strict=True)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(Display(progress).stage("timing"))
        sessions = [stack.enter_context(runtime.open(Path(model), threads=threads)) for model in models]
        times = latency.measure(sessions, feeds, seconds=seconds)
    return [replace(one, batch=batch_size(feed)) for one, feed in zip(times, feeds, strict=True)]


def _bench_feed(model: ir.Model, name: str, data: Any, batch: int | None, seed: int) -> dict[str, Array]:
    if data is not None:
        feed = next(iter(open_data(data, model).batches(batch or 1))).feeds
    else:
        feed = generated_feeds(model, seed, sets=1, batch=batch or 1)[0]
    if batch is not None and batch_size(feed) != batch:
        raise UsageError(
            f"`{name}` cannot be timed with batch {batch}: it, or the data, gives {batch_size(feed)} at a time",
            hint=f"`--batch {batch_size(feed)}`, a model with a dynamic batch dimension, or more data",
        )
    return feed
