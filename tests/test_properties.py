"""Eight properties that every registered pass and preset keeps on generated graphs."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st

from graphopt import options, provenance, registry, walk
from graphopt.authoring import Guarantee, Pass
from graphopt.comparison import Comparison
from graphopt.errors import PassError, UsageError
from graphopt.instruments import VerifyStructure
from graphopt.pipeline import Pipeline, weakest
from graphopt.verify import Signature, verify

from .graph_generator import Recipe, build, feeds, random_recipe, recipes
from .pass_runs import (
    BRIEFLY,
    PassRun,
    kinds,
    loaded,
    outputs_of,
    run_passes,
    tensor_names,
    to_bytes,
    with_what_it_repairs,
)

PASSES = sorted(registry.table("PASSES"))
# Options under which a pass does other work than by default.
VARIANTS = {
    "cast": ("cast:compute=half", "cast:compute=half:keep=none"),
    "prune": ("prune:pattern=2of4",),
    "prune-heads": ("prune-heads:ratio=0.5",),
    "sparsify": ("prune:method=magnitude:sparsity=0.9,sparsify",),
    "quant": ("quant:mode=static", "quant:mode=dynamic", "quant:mode=weights", "quant:mode=static:group=tensor"),
}
SPECS = [
    *map(with_what_it_repairs, PASSES),
    *sorted(registry.table("PRESETS")),
    *(spec for name in PASSES for spec in VARIANTS.get(name, ())),
]
# What asks whether the work pays; on graphs as small as the generated ones it never does.
RELUCTANT = {
    "cast": ("graphopt.passes.lossy.stored_halves._pays",),
    "cluster": ("graphopt.passes.lossy.coded_layers._pays",),
    "codebook": ("graphopt.passes.lossy.coded_layers._pays",),
    "logarithmic": ("graphopt.passes.lossy.coded_layers._pays",),
    "quant:mode=dynamic": ("graphopt.passes.lossy.quant_dynamic._pays",),
    "quant:mode=weights": ("graphopt.passes.lossy.quant_weights._pays",),
}
# A fifth of two heads is none, no generated graph holds a residual block of layers, nor a stream between such, and no
# weight is mostly zeros before it is pruned; they have real ones in their own tests.
RARE = {"prune-heads", "prune-hidden", "prune-layers", "sparsify"}
# Lossy passes that few graphs show anything, for which more are run.
SELDOM = {"prune-heads:ratio=0.5", "tie-layers"}
# Passes that train take a hundred times as long as others on such graphs, of some of which nothing can be trained.
TRAINING_EXAMPLES = 6
RECIPE_SIZE = 8
CALIBRATION_SEEDS = range(1, 5)
TESTED_SEED = 0
# Where so small a change of the inputs moves the outputs beyond rounding, rounding decides and nobody is to blame.
NUDGES = 4
NUDGE = 1e-6
FEWEST_EDITED = 1
# Hypothesis prefers short recipes; where these show a pass nothing to do, up to so many longer ones are run as well.
MORE_RECIPES = 60
CHECKED = re.compile(r"(\d+) rewrites checked by themselves, (\d+) not")


def guarantee(spec: str) -> Guarantee:
    return weakest(step.guarantee for step in Pipeline.parse(spec).steps)


def apply(spec: str, proto: onnx.ModelProto, model: ir.Model) -> PassRun:
    """Run a pass with data of its own; a lossy pass may say that it cannot."""
    data = [feeds(proto, seed) for seed in CALIBRATION_SEEDS] if guarantee(spec) is Guarantee.LOSSY else None
    original = model.clone()
    try:
        return run_passes(model, spec, data=data, instruments=[VerifyStructure(lambda: original)])
    except PassError as error:
        if guarantee(spec) is not Guarantee.LOSSY or "failed" in error.message or not error.hint:
            raise
        event("refused")
        reject()


@pytest.mark.parametrize("spec", SPECS)
def test_pass_keeps_the_properties(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in RELUCTANT.get(spec, ()):
        monkeypatch.setattr(place, lambda *_: True)

    @given(recipes(size=RECIPE_SIZE))
    def holds(recipe: Recipe) -> None:
        edits = check_properties(spec, recipe).edits
        edited[any(edit.pass_name in names for edit in edits)] += 1

    trains = any(spec.endswith(one) for one in BRIEFLY.values())
    if trains:
        holds = settings(max_examples=TRAINING_EXAMPLES)(holds)
    # What goes before the pass does not count.
    names = {one.name for one in Pipeline.parse(spec).steps[-1].passes}
    edited: Counter[bool] = Counter()
    holds()
    for seed in range(MORE_RECIPES):
        seldom = trains or spec in SELDOM or guarantee(spec) is not Guarantee.LOSSY
        if edited[True] < FEWEST_EDITED and seldom:
            edits = check_properties(spec, random_recipe(seed)).edits
            edited[any(edit.pass_name in names for edit in edits)] += 1
    shown = spec in RARE or edited[True] >= FEWEST_EDITED
    assert shown, "the generated graphs hardly ever show this pass anything to do"


def check_properties(spec: str, recipe: Recipe) -> PassRun:
    proto = build(recipe)
    original = loaded(proto)
    before, names = to_bytes(original), tensor_names(original)
    run = apply(spec, proto, original.clone())
    assert_original_untouched(original, before, names)
    assert_valid(original, run)
    assert_signature_kept(original, run)
    assert_outputs_agree(spec, proto, run)
    assert_origins_are_loaded_nodes(original, run)
    assert_edited_if_and_only_if_changed(before, run)
    assert to_bytes(apply(spec, proto, original.clone()).model) == to_bytes(run.model), "not the same twice"
    if guarantee(spec) is not Guarantee.LOSSY:
        assert_idempotent(spec, run)
    return run


def assert_original_untouched(original: ir.Model, before: bytes, names: list[tuple[str | None, str | None]]) -> None:
    assert to_bytes(original) == before
    assert tensor_names(original) == names


def assert_valid(original: ir.Model, run: PassRun) -> None:
    verify(run.model, Signature.of(original), provenance_too=True)
    onnx.checker.check_model(ir.to_proto(run.model), full_check=True)


def assert_signature_kept(original: ir.Model, run: PassRun) -> None:
    """Compare as protobuf, where dimensions and their names show too."""
    before, after = ir.to_proto(original).graph, ir.to_proto(run.model).graph
    assert list(before.input) == list(after.input)
    assert list(before.output) == list(after.output)


def assert_outputs_agree(spec: str, proto: onnx.ModelProto, run: PassRun) -> None:
    feed = feeds(proto, TESTED_SEED)
    before, after = outputs_of(proto, feed), outputs_of(run.model, feed)
    if guarantee(spec) is Guarantee.LOSSY:
        assert kinds(before) == kinds(after)
        return
    if "nondeterministic" in {entry.key for entry in proto.metadata_props}:
        return
    comparison = Comparison()
    comparison.update(before, after)
    if guarantee(spec) is Guarantee.EXACT:
        assert comparison.equal, f"{comparison.worst}"
    elif not comparison.within():
        assert hangs_on_rounding(proto, feed, before), f"{comparison.worst}"
        event("hangs on rounding")


def hangs_on_rounding(proto: onnx.ModelProto, feed: dict[str, np.ndarray], outputs: dict[str, Any]) -> bool:
    """Tell whether inputs nudged by less than rounding already move the outputs beyond it."""
    rng = np.random.default_rng(TESTED_SEED)
    comparison = Comparison()
    for _ in range(NUDGES):
        nudged = {
            name: (a * (1 + NUDGE * rng.uniform(-1, 1, a.shape))).astype(a.dtype) if a.dtype.kind == "f" else a
            for name, a in feed.items()
        }
        comparison.update(outputs, outputs_of(proto, nudged))
    return not comparison.within()


def assert_origins_are_loaded_nodes(original: ir.Model, run: PassRun) -> None:
    ids = frozenset().union(*(provenance.origins(node) for node in walk.every_node(original)))
    for node in walk.every_node(run.model):
        assert provenance.origins(node), f"`{walk.label(node)}` comes from nowhere"
        assert provenance.origins(node) <= ids


def assert_edited_if_and_only_if_changed(before: bytes, run: PassRun) -> None:
    assert bool(run.edits) == (to_bytes(run.model) != before)
    assert len(run.edits) == sum(record.edits for record in run.records)


def assert_idempotent(spec: str, run: PassRun) -> None:
    again = run_passes(run.model, spec)
    assert not again.edits


@pytest.mark.parametrize("spec", sorted(registry.table("PRESETS")))
def test_no_rewrite_of_a_preset_is_refused_when_checked_by_itself(spec: str) -> None:
    @given(recipes(size=RECIPE_SIZE))
    def holds(recipe: Recipe) -> None:
        run = run_passes(loaded(build(recipe)), spec, check_rewrites=True)
        assert not [str(refusal) for record in run.records for refusal in record.refused]
        for text in run.remarks:
            found = CHECKED.match(text)
            if found:
                counts["checked"] += int(found[1])
                counts["not"] += int(found[2])

    counts: Counter[str] = Counter()
    holds()
    assert counts["checked"] >= settings().max_examples / 4, counts
    assert counts["checked"] > 10 * counts["not"], counts


def values_of(hint: Any, low: float | None, high: float | None) -> st.SearchStrategy[Any]:
    """Return the strategy of values for an option's annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return st.one_of(*(values_of(part, low, high) for part in arguments))
    if hint is type(None):
        return st.none()
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_of(arguments[0], low, high).filter(bool), max_size=3).map(tuple)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(None if low is None else int(low), None if high is None else int(high))
    if hint is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    assert hint is str, f"no values are known for an option of type {hint}"
    # Pipeline text may have spaces around its commas, so that a value neither begins nor ends with one.
    texts = st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda text: text == text.strip())
    return st.one_of(st.sampled_from(("2of4", "1:2", "*", "a+b")), texts)


def objects_of(cls: type[Pass]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    arguments = {
        name: values_of(hints[name], field.metadata.get("low"), field.metadata.get("high"))
        for name, field in options.fields(cls).items()
    }
    return st.fixed_dictionaries({}, optional=arguments)


@pytest.mark.parametrize("name", PASSES)
def test_pass_is_one_thing_in_python_text_and_toml(name: str) -> None:
    cls = registry.find("PASSES", name)

    @given(objects_of(cls))
    def holds(arguments: dict[str, Any]) -> None:
        try:
            one = cls(**arguments)
            pipeline = Pipeline.of([one])
        except UsageError:
            reject()
        assert Pipeline.parse(str(pipeline)).steps[0].passes == (one,)
        assert Pipeline.from_toml(pipeline.to_toml()).steps[0].passes == (one,)
        assert dataclasses.is_dataclass(one)

    holds()


@pytest.mark.parametrize("name", sorted(registry.table("PRESETS")))
def test_preset_is_one_thing_in_text_and_toml(name: str) -> None:
    pipeline = Pipeline.parse(name)
    assert str(pipeline) == name
    assert Pipeline.from_toml(pipeline.to_toml()) == pipeline
