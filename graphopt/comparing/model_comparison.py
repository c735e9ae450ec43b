"""`compare`: how far the outputs of two models are apart on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from graphopt.choices import ModelLike, chosen_metrics, find_backend, find_target, known_metrics, open_model
from graphopt.comparison import Comparison, require_same_names
from graphopt.data import Batch, Dataset, batch_size, open_data
from graphopt.errors import UsageError
from graphopt.evaluation import SCORING_BATCH
from graphopt.generated import generated_feeds
from graphopt.progress import Display


def compare(
    a: ModelLike,
    b: ModelLike,
    *,
    data: Any = None,
    labels: str | None = None,
    metric: str | None = None,
    backend: str | None = None,
    other_backend: str | None = None,
    samples: int | None = None,
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
        other_backend: Backend text for the second model where it is another.
        samples: How many samples to run at most, the first ones; all where None.
        seed: Seed of made-up inputs.
        threads: Threads for the backend.
        progress: Show progress on stderr.

    Raises:
        ModelError: The two have different inputs or outputs.
        BackendError: The runtime refuses one of them.
    """
    runtime, display = find_backend(backend, find_target(None)), Display(progress)
    other = find_backend(other_backend, find_target(None)) if other_backend is not None else runtime
    models = [open_model(one) for one in (a, b)]
    for kind in ("input", "output"):
        names = [[value.name or "" for value in getattr(model.graph, kind + "s")] for model in models]
        require_same_names(kind, *names)
    dataset = None
    if data is not None:
        with display.stage("reading the data"):
            dataset = open_data(data, models[0], labels=labels, advance=display.advance)
        dataset = dataset.take(samples) if samples is not None else dataset
    known = known_metrics(metric)
    if metric is not None and dataset is None:
        raise UsageError(f"metric `{metric}` needs data to score", hint="add `--data`")
    chosen = chosen_metrics(metric, known, models[0], dataset)
    # What compares with the original is in the table anyway, unless it was asked for by name.
    metrics = [one for one in chosen if not one.against_original or metric == one.name]
    comparison = Comparison(metric_types=known)
    scores = [[one() for one in metrics] for _ in models]
    with (
        display.stage("comparing"),
        runtime.open(models[0], threads=threads) as left,
        other.open(models[1], threads=threads) as right,
    ):
        for batch in _comparison_batches(models[0], dataset, seed):
            outputs = left.run(batch.feeds), right.run(batch.feeds)
            comparison.update(*(batch.all_real(out) for out in outputs))
            comparison.samples += batch.count
            for side, out in zip(scores, outputs, strict=True):
                for one in side:
                    one.update(out, outputs[0], batch)
    for first, second in zip(*scores, strict=True):
        comparison.metrics[first.name] = (None if first.against_original else first.value(), second.value())
    comparison.source = dataset.name if dataset is not None else None
    return comparison


def _comparison_batches(model: ir.Model, data: Dataset | None, seed: int) -> Iterable[Batch]:
    if data is not None:
        return data.batches(SCORING_BATCH)
    return [Batch(feed, None, batch_size(feed)) for feed in generated_feeds(model, seed)]
