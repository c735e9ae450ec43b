"""Mixed precision: the fewest layers in more bits than the rest, so that a budget holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Attempt, Context, Note
from graphopt.errors import BackendError, PassError
from graphopt.layers import Layer, layers_of
from graphopt.report import show_bytes
from graphopt.standing import Standing

from ..analyses.selection import Selection
from .mixed_search import Move, OutOfTrials, Raised, fewest, in_order

# Models tried after the layers were measured one by one. A path of a thousand moves is halved in ten.
_MOST_TRIALS = 48
# Layers measured one by one; of larger models, those that are predicted to cost most.
_MOST_MEASURED = 48
# The fact of a note that says how many weights are stored in each format.
_STORED = "stored"
# The fact of a note that says which share of a layer's outputs is expected to be noise.
_PREDICTED = "predicted_error"


@dataclass(frozen=True)
class Rung:
    """One way to write a layer, of several from the coarsest to float.

    Attributes:
        name: What reports call it.
        lower: Changes those nodes that a selection allows; None for float, which leaves layers as they are.
        noise: Power of its error over that of the coarsest: a bit more quarters it.
        bits: Bits of a weight.
    """

    name: str
    lower: Callable[[ir.Model, Context, Selection], None] | None
    noise: float
    bits: float


@dataclass(frozen=True)
class Measured:
    """What is known of one layer.

    Attributes:
        layer: The layer.
        cost: Divergence of the model with this layer alone on the coarsest rung; estimated where it was not tried.
        predicted: The share of its outputs that is expected to be noise, or None.
        tried: Whether the cost was measured.
        stored: The formats its weight was stored in when it was tried; empty where the pass does not say.
    """

    layer: Layer
    cost: float
    predicted: float | None
    tried: bool
    stored: str = ""


@dataclass(frozen=True)
class Tried:
    """What became of one allocation.

    Attributes:
        standing: How the model stands.
        stored: How many weights in each format, as the passes say it; empty where they do not.
        bytes: What all constants of the model take.
    """

    standing: Standing
    stored: Mapping[str, int]
    bytes: int


def quantize_mixed(
    model: ir.Model, ctx: Context, selection: Selection, rungs: Sequence[Rung], *, by_bytes: bool
) -> None:
    """Put every layer on the coarsest rung but the fewest that must be higher for the budget of the run to hold.

    Every layer is tried alone on the coarsest rung; the path from all of them there to all in float goes by the error
    saved for what it costs. The shortest part of it that holds is searched for, each try a model that is run on the
    calibration samples, and what turns out to be needless is taken back.

    Args:
        model: The model, changed in place.
        ctx: What weighs models, besides rewriter and data.
        selection: Nodes that may be changed at all.
        rungs: From the coarsest to float.
        by_bytes: Whether a layer costs its bytes, as where only memory is saved, or counts as one.

    Raises:
        PassError: No allocation holds that leaves a layer out of float; names the best reached.
    """
    assert ctx.weigh is not None, "the pass declares that it needs a budget"
    search = _Search(ctx, selection, list(rungs), by_bytes)
    raised = search.run(model)
    search.say(raised)
    search.lower(model, ctx, raised)


@dataclass
class _Search:
    """Looks for the fewest raised layers.

    Attributes:
        ctx: What tries and weighs models.
        selection: Nodes that may be changed at all.
        rungs: From the coarsest to float.
        by_bytes: Whether a layer costs its bytes or counts as one.
        layers: What is known of each layer.
        tried: Every allocation that was weighed.
        best: The allocation nearest to the budget that leaves a layer out of float.
    """

    ctx: Context
    selection: Selection
    rungs: list[Rung]
    by_bytes: bool
    layers: list[Measured] = field(default_factory=list)
    tried: dict[tuple[tuple[int, int], ...], Tried] = field(default_factory=dict)
    best: tuple[Raised, Standing] | None = None
    trials: int = 0

    def run(self, model: ir.Model) -> Raised:
        """Return the rung of each raised layer."""
        layers = self._layers(model)
        plain = self.ctx.attempt(lambda copy, ctx: self.lower(copy, ctx, {}), predicts=True)
        if self._holds({}, plain):
            self.layers = [Measured(layer, 0.0, None, False) for layer in layers]
            return {}
        self.layers = self._measure(layers, _predictions(plain.notes))
        path = in_order(self._moves())
        found = fewest(path, self._holds)
        if found is None or (len(found) == len(self.layers) and self._all_float(found)):
            raise self._failure()
        return found

    def _layers(self, model: ir.Model) -> list[Layer]:
        """Return the layers that can be told apart by name and that may be changed."""
        nodes = {node.name: node for node in walk.every_node(model)}
        found, unnamed = [], 0
        for layer in layers_of(model):
            if not layer.globs:
                unnamed += 1
            elif any(self.selection.allows(nodes[name]) for name in layer.nodes):
                found.append(layer)
        if unnamed:
            self.ctx.left(f"{unnamed} layers on the coarsest rung: their nodes have no names of their own")
        return found

    def _measure(self, layers: Sequence[Layer], predicted: Mapping[str, float]) -> list[Measured]:
        """Try each layer alone on the coarsest rung, the ones predicted to cost most first, and estimate the rest."""
        known: list[tuple[Layer, float | None]] = []
        for layer in layers:
            errors = [predicted[name] for name in layer.nodes if name in predicted]
            known.append((layer, max(errors, default=None)))
        known.sort(key=lambda one: -(one[1] if one[1] is not None else float("inf")))
        measured: list[Measured] = []
        for layer, error in known:
            if len(measured) < _MOST_MEASURED:
                attempt = self._alone(layer)
                if attempt is not None:
                    formats = " and ".join(_stored(attempt.notes))
                    measured.append(Measured(layer, self._weigh(attempt).divergence, error, True, formats))
            else:
                measured.append(Measured(layer, _estimate(error, measured), error, False))
        return measured

    def _alone(self, layer: Layer) -> Attempt | None:
        """Return the model with a layer alone on the coarsest rung, or None where the pass leaves it as it is."""
        only = replace(self.selection, include=layer.globs)
        lower = self.rungs[0].lower
        assert lower is not None, "the coarsest rung is not float"
        attempt = self.ctx.attempt(lambda copy, ctx: lower(copy, ctx, only))
        return attempt if attempt.edits else None

    def _weigh(self, attempt: Attempt) -> Standing:
        assert self.ctx.weigh is not None, "the pass declares that it needs a budget"
        try:
            return self.ctx.weigh(attempt.model)
        except BackendError as error:
            return Standing("noise", float("inf"), {}, {}, float("inf"), f"it does not run: {error.message}")

    def _moves(self) -> list[Move]:
        moves = []
        for index, one in enumerate(self.layers):
            for rung in range(1, len(self.rungs)):
                below, above = self.rungs[rung - 1], self.rungs[rung]
                size = one.layer.elements * (above.bits - below.bits) / 8
                moves.append(Move(index, rung, one.cost * (below.noise - above.noise), size if self.by_bytes else 1.0))
        return moves

    def _holds(self, raised: Raised, attempt: Attempt | None = None) -> bool:
        """Try an allocation, each only once."""
        key = tuple(sorted(raised.items()))
        if key not in self.tried:
            if self.trials >= _MOST_TRIALS:
                raise OutOfTrials
            self.trials += 1
            attempt = attempt or self.ctx.attempt(lambda copy, ctx: self.lower(copy, ctx, raised))
            standing = self._weigh(attempt)
            size = sum(tensor.nbytes for tensor in walk.stored_tensors(attempt.model))
            self.tried[key] = Tried(standing, _stored(attempt.notes), size)
            partly = not self.layers or not self._all_float(raised)
            if partly and (self.best is None or standing.used < self.best[1].used):
                self.best = dict(raised), standing
        return self.tried[key].standing.holds

    def _all_float(self, raised: Raised) -> bool:
        return len(raised) == len(self.layers) and all(self.rungs[rung].lower is None for rung in raised.values())

    def lower(self, model: ir.Model, ctx: Context, raised: Raised) -> None:
        """Put every layer on its rung, and whatever else the selection allows on the coarsest."""
        above = tuple(glob for index in raised for glob in self.layers[index].layer.globs)
        for number, rung in enumerate(self.rungs):
            if rung.lower is None:
                continue
            if number == 0:
                rung.lower(model, ctx, replace(self.selection, exclude=(*self.selection.exclude, *above)))
                continue
            here = tuple(glob for i, one in raised.items() if one == number for glob in self.layers[i].layer.globs)
            if here:
                rung.lower(model, ctx, replace(self.selection, include=here))

    def _failure(self) -> PassError:
        assert self.best is not None, "nothing raised was tried first"
        raised, standing = self.best
        kept = f"{len(raised)} of {len(self.layers)} layers higher" if raised else "no layer kept higher"
        return PassError(
            f"no choice of layers keeps the budget; the best one tried has {kept}: {standing.why} on calibration data",
            hint="a larger `--budget`, a finer base (such as int8 instead of int4), or a pass that corrects first",
        )

    def say(self, raised: Raised) -> None:
        """Say what was chosen and why, in one line, and each layer's figures as facts."""
        tried = self.tried[tuple(sorted(raised.items()))]
        standing = tried.standing
        total = len(self.layers)
        chosen = sorted(raised, key=lambda index: -self.layers[index].cost)
        counts = {rung.name: sum(raised[index] == number for index in chosen) for number, rung in enumerate(self.rungs)}
        kept = ", ".join(f"{count} in {name}" for name, count in counts.items() if count) or "none higher"
        if tried.stored:
            told = f"weights stored: {', '.join(f'{count} as {name}' for name, count in tried.stored.items())}"
        else:
            told = f"the rest with `weights={self.rungs[0].name}`"
        self.ctx.note(
            f"{kept} of {total} layers; {told}: {standing.why} on calibration samples; "
            f"{self.trials} allocations tried, all constants {show_bytes(tried.bytes)}",
            kept=[self._facts(index, raised[index]) for index in chosen],
            layers=total,
            trials=self.trials,
            measured=sum(one.tried for one in self.layers),
            budget_used=standing.used,
            constant_bytes=tried.bytes,
            weights_stored=dict(tried.stored),
        )
        for index in chosen:
            one = self.layers[index]
            predicted = (
                f"; {one.predicted:.1%} of its outputs predicted to be noise" if one.predicted is not None else ""
            )
            coarse = one.stored or self.rungs[0].name
            self.ctx.note(
                f"`{one.layer.name}` in {self.rungs[raised[index]].name}: alone in {coarse} it costs "
                f"{one.cost:.3g}{predicted}"
            )

    def _facts(self, index: int, rung: int) -> dict[str, object]:
        one = self.layers[index]
        return {"layer": one.layer.name, "in": self.rungs[rung].name, "cost": one.cost, "predicted": one.predicted}


def _stored(notes: Sequence[Note]) -> Counter[str]:
    """Return how many weights are stored in each format, as the passes say it."""
    counts: Counter[str] = Counter()
    for note in notes:
        counts.update(note.facts.get(_STORED, {}))
    return counts


def _predictions(notes: Sequence[Note]) -> dict[str, float]:
    return {note.node: float(note.facts[_PREDICTED]) for note in notes if note.node and _PREDICTED in note.facts}


def _estimate(predicted: float | None, measured: Sequence[Measured]) -> float:
    """Return what a layer that was not tried may cost: its predicted error, on the scale of the ones tried."""
    ratios = sorted(one.cost / one.predicted for one in measured if one.tried and one.predicted)
    if predicted is None or not ratios:
        return min((one.cost for one in measured if one.tried), default=0.0)
    return predicted * ratios[len(ratios) // 2]
