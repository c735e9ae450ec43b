"""What a user's words stand for: the model, the target, the backend and the metrics of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import provenance, registry
from graphopt.backend import Backend, Differentiable
from graphopt.data import Dataset
from graphopt.errors import BackendError, UsageError, did_you_mean
from graphopt.metrics import BUILTIN, Metric, default_metrics, user_metric
from graphopt.model_io import load
from graphopt.normal_form import normalize
from graphopt.target import Target

LABELS_HINT = "store them beside the inputs under `labels`, or name their key with `--labels`"

ModelLike = ir.Model | str | Path

# The backend that lowers models to modules.
_LOWERING = "torch"


def open_model(model: Any) -> ir.Model:
    """Return a model of its own to work on: loaded, or a clone that shares weights, with origins stamped.

    Raises:
        UsageError: It is neither a path nor a model.
        ModelError: The file cannot be loaded.
    """
    if isinstance(model, ir.Model):
        opened = model.clone()
    elif isinstance(model, str | Path):
        opened = load(model)
    else:
        hint = "a path, or an `onnx_ir.Model`: `graphopt.ir.from_proto(proto)` makes one of an onnx.ModelProto"
        raise UsageError(f"a model cannot be a `{type(model).__name__}`", hint=hint)
    normalize(opened)
    provenance.stamp(opened)
    return opened


def find_target(name: str | None) -> Target:
    """Return a target by name, or the one of this machine's CPU."""
    found: Target = registry.find("TARGETS", name or registry.host_target())
    return found


def find_backend(text: str | None, target: Target, *, must_run: bool = True) -> Backend:
    """Return the backend asked for, or the target's own.

    Args:
        text: Backend text, or None.
        target: Whose backend it is where there is no text.
        must_run: Whether it is known now that it will be used; to find out loads the runtime.

    Raises:
        BackendError: It must run and cannot on this machine.
    """
    found: Backend = backend_of(target) if text is None else registry.backend(text)
    why = found.missing() if must_run else None
    if why is not None:
        raise why
    return found


def backend_of(target: Target) -> Backend:
    """Return the backend that runs a target, whether or not it can here."""
    provider = {"provider": target.provider} if target.provider is not None else {}
    found: Backend = registry.backend(target.backend, **provider)
    return found


def lowering_backend(device: str = "cpu") -> Differentiable:
    """Return what makes modules of PyTorch of models, on a device that must be there.

    Raises:
        BackendError: It is not, or PyTorch is not installed.
    """
    backend = registry.backend(_LOWERING, device=device)
    why = backend.missing()
    if why is not None:
        raise why
    if not isinstance(backend, Differentiable):
        raise BackendError(f"backend `{_LOWERING}` lowers nothing that trains", hint="repair or reinstall graphopt")
    return backend


def known_metrics(text: str | None) -> dict[str, type[Metric]]:
    """Return every metric by name, with the user's own if ``text`` is ``file.py:function``.

    Raises:
        UsageError: ``text`` names no metric, or a plug-in claims the name of one of ours.
    """
    metrics = dict(BUILTIN)
    for name in registry.table("METRICS"):
        if name in BUILTIN:
            raise UsageError(f"a plug-in claims the name of the metric `{name}`", hint="rename it, or uninstall it")
        metrics[name] = registry.find("METRICS", name)
    if text is None:
        return metrics
    if ":" in text:
        own = user_metric(text)
        return {**metrics, own.name: own}
    if text not in metrics:
        hint = "write `file.py:function`" if text.endswith(".py") else did_you_mean(text, metrics)
        raise UsageError(f"unknown metric `{text}`", hint=hint)
    return metrics


def chosen_metrics(
    text: str | None, known: Mapping[str, type[Metric]], model: ir.Model, data: Dataset | None
) -> list[type[Metric]]:
    """Return what to score by: what the user named first, then what fits the outputs and labels.

    Args:
        text: What the user named, or None.
        known: As `known_metrics` returned it for the same text.
        model: The original.
        data: What is scored, or None; then there is nothing to score by.

    Raises:
        UsageError: The metric named needs labels and there are none.
    """
    if data is None:
        return []
    fitting = default_metrics(model, next(iter(data.take(1).batches(1))))
    if text is None:
        return fitting
    named = known[text.rpartition(":")[2]]
    if named.needs_labels and not data.has_labels:
        raise UsageError(f"metric `{named.name}` needs labels and `{data.name}` has none", hint=LABELS_HINT)
    return [named, *(metric for metric in fitting if metric.against_original and metric is not named)]
