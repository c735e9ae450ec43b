"""What changes of single layers do to the outputs of the model, measured, so that their errors count in one unit."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.errors import BackendError

# Samples each change is tried on: all on the same ones, so that their differences are not those of samples.
_SAMPLES = 32
# Changes tried, a run of the model each; of more, as many of each kind as it has of all.
_MOST_TRIED = 64
# What a change costs alone is known to a factor, and what it costs beside others is another matter; so half of it is
# believed, on the scale of factors. Of ResNet-20 with 70 % of its weights zero the KL is 0.62 by equal shares, 0.33 by
# errors against the power of each layer, 0.38 by errors as measured, and 0.30 halfway.
_TRUST = 0.5
# No weight is further from the middle one than by this factor: beyond, it is noise or a layer that does not matter yet.
_WIDEST = 100.0


@dataclass(frozen=True, eq=False)
class Change:
    """A change of one layer or group, to be tried alone.

    Attributes:
        name: The layer or group, as users call it.
        kind: What changes of the same kind are expected to do alike, such as an operator and its sizes.
        predicted: The error expected of it, as a share of the power of what it changes.
        contents: What constants of the model hold then, by name, each in its own shape; None of one that is not tried.
    """

    name: str
    kind: Hashable
    predicted: float
    contents: Mapping[str, Array] | None


def tried_of(kinds: Sequence[Hashable], most: int = _MOST_TRIED) -> list[int]:
    """Return which of many changes to try: all where there are few, else some of each kind, evenly spaced.

    Args:
        kinds: The kind of each change.
        most: How many are tried, about; one of each kind at least.
    """
    if len(kinds) <= most:
        return list(range(len(kinds)))
    of_kind: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        of_kind.setdefault(kind, []).append(index)
    chosen: set[int] = set()
    for indices in of_kind.values():
        count = max(1, round(most * len(indices) / len(kinds)))
        places = np.linspace(0, len(indices) - 1, count) if count > 1 else np.array([(len(indices) - 1) / 2])
        chosen.update(indices[int(place)] for place in places)
    return sorted(chosen)


def error_weights(ctx: Context, changes: Sequence[Change]) -> list[float]:
    """Return what an error at each layer, as a share of its power, does to the outputs of the model.

    Multiply each layer's curve of such errors with it, and curves of different layers can be added. Each change is made
    alone, and the divergence of the outputs measured (`graphopt.standing.Standing`: KL where they are of classes, else
    noise over signal); the weight is the square root of measured / predicted. Only the proportions of weights matter.

    Changes that are not tried stand between those of their kind before and behind them.
    Where nothing can be measured, all weights are 1.

    Args:
        ctx: The model as it is, and the calibration data; nothing is changed.
        changes: One for each layer or group, in graph order, each about as deep as it is going to be.
    """
    if ctx.judge is None or ctx.data is None or len(changes) < 2:
        return [1.0] * len(changes)
    ratios = np.full(len(changes), np.nan)
    samples = ctx.data.sample(_SAMPLES, ctx.seed)
    with ctx.judge(ctx.model.clone(), samples) as judge:
        for index, change in enumerate(ctx.track(changes, "measuring what each costs")):
            if change.contents is None or not change.predicted > 0:
                continue
            candidate = ctx.attempt(partial(_put, change.contents))
            try:
                measured = judge(candidate.model).divergence if candidate.edits else np.nan
            except BackendError:
                measured = np.nan
            ratios[index] = measured / change.predicted
    tried = sum(change.contents is not None for change in changes)
    if tried < len(changes):
        ctx.note(
            f"{tried} of {len(changes)} layers tried alone; the others count as those of their kind",
            tried=tried,
        )
    return list(_weights(ratios, [change.kind for change in changes]))


def say_curve(ctx: Context, node: ir.Node, errors: Mapping[float, float]) -> None:
    """Say, where predictions are asked for, what a layer is expected to lose of its outputs by what goes of it.

    Args:
        ctx: Where it is said.
        node: The layer, or the first that makes the channels of a group.
        errors: The share of its outputs that is noise, by the share of it that is gone.
    """
    if ctx.predicts:
        ctx.note("error curve", node, error_curve=dict(errors))


def _put(contents: Mapping[str, Array], model: ir.Model, ctx: Context) -> None:
    """Let constants of a copy of the model, by name, hold something else."""
    made = (value for node in walk.every_node(model) for value in node.outputs)
    with ctx.rewriter.edit("try"):
        for value in [*walk.initializers(model), *made]:
            if (content := contents.get(value.name or "")) is not None:
                ctx.rewriter.set_weight(value, content)


def _weights(ratios: Array, kinds: Sequence[Hashable]) -> Array:
    """Return a weight for each ratio of measured to predicted; NaN is none, and what is infinite counts as most."""
    known = np.isfinite(ratios) & (ratios > 0)
    if not known.any():
        return np.ones(len(ratios))
    middle = float(np.median(ratios[known]))
    bounded = np.clip(np.where(np.isnan(ratios), np.nan, ratios / middle), 1 / _WIDEST, _WIDEST)
    logarithms = np.log(bounded)
    for kind in set(kinds):
        own = np.array([index for index, one in enumerate(kinds) if one == kind])
        measured = own[~np.isnan(logarithms[own])]
        missing = own[np.isnan(logarithms[own])]
        logarithms[missing] = np.interp(missing, measured, logarithms[measured]) if len(measured) else 0.0
    return np.asarray(np.exp(_TRUST * logarithms))
