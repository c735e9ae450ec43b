"""Pipelines: lists of passes as text, TOML or objects, one and the same thing in three spellings."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import tomli_w

from graphopt import options, registry
from graphopt.authoring import Given, Guarantee, Need, Pass
from graphopt.data import Dataset
from graphopt.errors import UsageError, did_you_mean

_STRENGTH = (Guarantee.LOSSY, Guarantee.EQUIVALENT, Guarantee.EXACT)
# The preset that brings a model into the form passes with Need.CANONICAL are written for.
CANONICALIZER = "simplify"


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: a pass, or the passes of a preset, repeated until they change nothing unless lossy.

    Attributes:
        name: Name of the pass or preset.
        passes: The passes; one unless it is a preset.
        preset: Whether it is a preset.
        reason: Why the manager added it, or None where the user asked for it.
    """

    name: str
    passes: tuple[Pass, ...]
    preset: bool = False
    reason: str | None = None

    @property
    def spec(self) -> str:
        """The step as pipeline text."""
        if self.preset:
            return self.name
        text = options.to_text(self.passes[0])
        return f"{self.name}:{text}" if text else self.name

    @property
    def guarantee(self) -> Guarantee:
        """The weakest guarantee of its passes."""
        return weakest(one.guarantee for one in self.passes)

    @property
    def needs(self) -> frozenset[Need]:
        """What any of its passes needs."""
        return frozenset().union(*(one.needs for one in self.passes))

    @property
    def trains(self) -> bool:
        """Whether a pass of it learns from samples."""
        return any(one.trains for one in self.passes)

    @property
    def spoils_canonical(self) -> bool:
        """Whether it leaves what no pass that needs canonical form can come behind."""
        return any(not one.keeps_canonical and not one.simplify_restores for one in self.passes)


def weakest(guarantees: Iterable[Guarantee]) -> Guarantee:
    """Return the weakest of some guarantees; EXACT of none."""
    return min(guarantees, key=_STRENGTH.index, default=Guarantee.EXACT)


@dataclass(frozen=True)
class Pipeline:
    """Steps to run in order; ``str()`` gives its text."""

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read pipeline text such as ``simplify,prune:sparsity=0.5,quant``.

        A backslash keeps the next character from separating.

        Raises:
            UsageError: Nothing in it, an unknown pass or option, a bad value.
        """
        parts = options.split(text.strip(), ",")
        if not parts:
            raise UsageError("no passes given", hint="for example `--passes prune,quant`; see `graphopt list passes`")
        return cls(tuple(_step_from_text(part.strip()) for part in parts))

    @classmethod
    def of(cls, passes: str | Pipeline | Pass | Sequence[str | Pass]) -> Pipeline:
        """Return what the Python API was given as a pipeline.

        Raises:
            UsageError: As `parse`; or something that is neither text nor a Pass.
        """
        if isinstance(passes, Pipeline):
            return passes
        if isinstance(passes, str):
            return cls.parse(passes)
        given = [passes] if isinstance(passes, Pass) else passes
        if not isinstance(given, Sequence):
            raise UsageError(f"passes cannot be `{given!r}`", hint='for example "prune,quant" or [Prune(0.5), Quant()]')
        steps: list[Step] = []
        for one in given:
            steps.extend(cls.parse(one).steps if isinstance(one, str) else [_step_of(one)])
        if not steps:
            raise UsageError("no passes given", hint='for example passes="prune,quant"')
        return cls(tuple(steps))

    @classmethod
    def from_toml(cls, text: str) -> Pipeline:
        """Read a recipe: one ``[[pass]]`` table a pass, its ``name`` and options.

        Raises:
            UsageError: Not TOML, a key that means nothing, or as `parse`.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"the recipe is not TOML: {error}", hint="write one `[[pass]]` table a pass") from error
        unknown = [key for key in document if key != "pass"]
        if unknown:
            raise UsageError(f"the recipe has an unknown key `{unknown[0]}`", hint=did_you_mean(unknown[0], ["pass"]))
        tables = document.get("pass", [])
        if not isinstance(tables, list) or not tables:
            raise UsageError("the recipe has no `[[pass]]`", hint="write one `[[pass]]` table a pass")
        return cls(tuple(_step_from_table(index, table) for index, table in enumerate(tables, 1)))

    def to_toml(self) -> str:
        """Return the pipeline as a recipe."""
        tables = [{"name": step.name, **_toml_options(step)} for step in self.steps]
        return tomli_w.dumps({"pass": tables})

    def __str__(self) -> str:
        return ",".join(step.spec for step in self.steps)


def _toml_options(step: Step) -> dict[str, Any]:
    if step.preset:
        return {}
    changed = options.changed(step.passes[0])
    # TOML has no null: `none` is what is read as none.
    return {
        name: list(value) if isinstance(value, tuple) else "none" if value is None else value
        for name, value in changed.items()
    }


def _step_from_text(text: str) -> Step:
    if not text:
        raise UsageError("a pass between two commas, or at an end, has no name", hint="remove the comma too many")
    name, *rest = options.split(text, ":")
    return _make_step(name, options.from_text(":".join(rest), where=f"pass `{name}`"))


def _step_from_table(index: int, table: dict[str, Any]) -> Step:
    values = dict(table)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"pass {index} of the recipe has no `name`", hint='for example name = "prune"')
    return _make_step(name, {key.replace("-", "_"): value for key, value in values.items()})


def _make_step(name: str, values: dict[str, Any]) -> Step:
    presets = registry.table("PRESETS")
    if name in presets:
        if values:
            raise UsageError(f"preset `{name}` takes no options", hint=f"it stands for `{presets[name].passes}`")
        passes = tuple(one for step in Pipeline.parse(presets[name].passes).steps for one in step.passes)
        return Step(name, passes, preset=True)
    if "=" in name and name not in registry.table("PASSES"):
        raise UsageError(
            f"`{name}` is an option without its pass",
            hint="options follow their pass behind colons: `prune:pattern=2of4,quant:mode=static`",
        )
    cls = registry.find("PASSES", name)
    return Step(name, (options.build(cls, values, where=f"pass `{name}`"),))


def _step_of(one: Any) -> Step:
    if not isinstance(one, Pass):
        raise UsageError(f"`{one!r}` is no pass", hint="give Pass objects, such as Prune(0.5), or their names")
    options.check(one, where=f"pass `{one.name}`")
    return Step(one.name, (one,))


def schedule(pipeline: Pipeline, *, has_data: bool, has_budget: bool = False) -> tuple[Step, ...]:
    """Return the steps to run: what passes need is put before them, and what is missing is an error now.

    Raises:
        UsageError: Passes are in an order that one of them declares to be wrong, a pass needs calibration data or a
            budget and there is none, or comes behind one that leaves another form than it needs.
    """
    _refuse_wrong_order(pipeline)
    steps: list[Step] = []
    canonical, spoiler = False, None
    for position, step in enumerate(pipeline.steps, 1):
        if Need.CALIBRATION in step.needs and not has_data:
            raise UsageError(
                f"pass `{step.spec}` ({position} of {len(pipeline.steps)}) needs calibration data and none was given",
                hint="add `--data samples.npz` (in Python: data=...)",
            )
        if Need.BUDGET in step.needs and not has_budget:
            raise UsageError(
                f"pass `{step.spec}` ({position} of {len(pipeline.steps)}) needs a budget and none was given",
                hint="add `--budget METRIC=DROP`, such as `top1=1%` or `kl=0.01` (in Python: budget=...)",
            )
        if Need.CANONICAL in step.needs and spoiler is not None:
            raise UsageError(
                f"pass `{step.spec}` needs canonical form, which `{spoiler.spec}` before it does not leave",
                hint=f"put `{spoiler.spec}` last",
            )
        changing = [one for one in step.passes if not one.keeps_canonical]
        if step.spoils_canonical:
            spoiler = step
        canonical = canonical or step.name == CANONICALIZER
        if Need.CANONICAL in step.needs and not canonical:
            added = _make_step(CANONICALIZER, {})
            steps.append(Step(added.name, added.passes, True, reason=f"`{step.name}` needs canonical form"))
            canonical = True
        steps.append(step)
        canonical = canonical and not changing
    return tuple(steps)


def check_ahead(
    steps: Sequence[Step], model: ir.Model, *, data: Dataset | None = None, teacher: ir.Model | None = None
) -> None:
    """Let each pass refuse what it could not do, before any of them runs.

    Args:
        steps: As `schedule` returned them.
        model: The model they are for.
        data: Calibration samples, or None.
        teacher: The teacher that was given, or None.

    Raises:
        GraphoptError: A pass refuses.
    """
    for step in steps:
        for one in step.passes:
            one.check_ahead(Given(model, data, teacher))
            if teacher is None and one.guarantee is Guarantee.LOSSY:
                teacher = model  # as it was before the first loss


def _refuse_wrong_order(pipeline: Pipeline) -> None:
    """Raise an error for the first pass that declares to precede one before it, presets taken apart."""
    earlier: list[tuple[Step, Pass]] = []
    for position, step in enumerate(pipeline.steps, 1):
        for one in step.passes:
            for other, before in earlier:
                why = one.precedes.get(before.name)
                if why is not None:
                    behind = f"`{other.spec}`" if other is not step else f"its `{before.name}`"
                    raise UsageError(
                        f"pass `{step.spec}` ({position} of {len(pipeline.steps)}) comes too late: "
                        f"behind {behind} {why}",
                        hint=_right_order(pipeline, one.name, before.name),
                    )
            earlier.append((step, one))


def _right_order(pipeline: Pipeline, first: str, second: str) -> str:
    """Return in words the pipeline with every pass where it belongs, in the given order otherwise."""
    import networkx  # a hundredth of a second that only a mistake costs

    steps = pipeline.steps
    order = networkx.DiGraph()
    order.add_nodes_from(range(len(steps)))
    order.add_edges_from(
        (i, j) for i, one in enumerate(steps) for j, other in enumerate(steps) if i != j and _precedes(one, other)
    )
    if not networkx.is_directed_acyclic_graph(order) or any(_precedes(step, step) for step in steps):
        return f"put `{first}` before `{second}`"
    places = networkx.lexicographical_topological_sort(order, key=lambda place: place)
    return f"in this order: `--passes {Pipeline(tuple(steps[place] for place in places))}`"


def _precedes(step: Step, other: Step) -> bool:
    """Return whether a step must come before another: a pass of it says so, or needs the form that the other spoils."""
    names = {one.name for one in other.passes}
    if any(names & one.precedes.keys() for one in step.passes):
        return True
    return Need.CANONICAL in step.needs and other.spoils_canonical and not step.spoils_canonical
