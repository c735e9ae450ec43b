"""Pipelines and options: text, TOML and objects are one thing in three spellings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest

from graphopt import options
from graphopt.authoring import Guarantee, Pass
from graphopt.errors import UsageError
from graphopt.options import opt
from graphopt.passes import Prune, PruneChannels, PruneLayers, Quant
from graphopt.pipeline import Pipeline, schedule, weakest


@dataclass(frozen=True)
class Everything(Pass):
    flag: bool = opt(False, help="")
    count: int = opt(1, help="", low=1, high=9)
    share: float = opt(0.5, help="", low=0, high=1)
    text: str = opt("a", help="")
    maybe: str | None = opt(None, help="")
    names: tuple[str, ...] = opt((), help="")
    kind: Literal["x", "y"] = opt("x", help="")
    name = "everything"


WHERE = "pass `everything`"


def read(text: str) -> Everything:
    return options.build(Everything, options.from_text(text, where=WHERE), where=WHERE)


@pytest.mark.parametrize(
    "value",
    [
        Everything(),
        Everything(flag=True, count=3, share=0.25, text="b", maybe="c", names=("p", "q"), kind="y"),
        Everything(text="a:b,c\\d", maybe="node:0", names=("x,y", "z:1", "p+q", "back\\slash\\")),
    ],
)
def test_options_survive_text(value: Everything) -> None:
    assert read(options.to_text(value)) == value


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("cuont=2", "has no option `cuont`", "did you mean `count`?"),
        ("count=two", "option `count` cannot be `two`", "a whole number"),
        ("count=2.5", "option `count` cannot be `2.5`", "a whole number"),
        ("count=0", "option `count` is out of range: `0`", "from 1 to 9"),
        ("share=nan", "option `share` is out of range", "from 0 to 1"),
        ("share=-0.1", "option `share` is out of range", "from 0 to 1"),
        ("flag=maybe", "option `flag` cannot be `maybe`", "true or false"),
        ("kind=z", "option `kind` cannot be `z`", "one of: x, y"),
        ("count", "`count` is not an option", "name=value"),
        ("count=1:count=2", "option `count` is given twice", "keep one"),
    ],
)
def test_wrong_options_say_what_and_what_to_do(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_objects_are_checked_like_text() -> None:
    with pytest.raises(UsageError, match="out of range"):
        Pipeline.of([Prune(1.5)])
    with pytest.raises(UsageError, match="cannot be `half`"):
        Pipeline.of([Prune("half")])


@pytest.mark.parametrize(
    "text", ["simplify", "prune,quant", "simplify,prune:sparsity=0.3,quant:mode=dynamic", "prune:pattern=2of4"]
)
def test_text_objects_and_toml_agree(text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert Pipeline.from_toml(pipeline.to_toml()) == pipeline
    assert Pipeline.of([step.passes[0] if not step.preset else step.name for step in pipeline.steps]) == pipeline


def test_python_and_text_are_the_same_object() -> None:
    assert Pipeline.of([Prune(0.3), Quant(mode="dynamic")]) == Pipeline.parse("prune:sparsity=0.3,quant:mode=dynamic")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no passes given"),
        ("prun", "unknown pass `prun`"),
        ("prune,,quant", "has no name"),
        ("prune,", "has no name"),
        ("simplify:x=1", "preset `simplify` takes no options"),
        ("prune:pattern=4of2", "option `pattern` cannot be `4of2`"),
    ],
)
def test_wrong_pipelines(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml [", "not TOML"),
        ("passes = 1", "unknown key `passes`"),
        ("", "has no `[[pass]]`"),
        ("[[pass]]\nsparsity = 0.5", "pass 1 of the recipe has no `name`"),
        ('[[pass]]\nname = "prune"\nsparsity = "lots"', "cannot be `lots`"),
    ],
)
def test_wrong_recipes(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.from_toml(text)
    assert message in caught.value.message


def test_canonical_form_is_scheduled_before_a_pass_that_needs_it_and_only_once() -> None:
    steps = schedule(Pipeline.parse("prune,quant:mode=dynamic"), has_data=False)
    assert [step.name for step in steps] == ["simplify", "prune", "quant"]
    assert steps[0].reason == "`prune` needs canonical form"
    assert [step.name for step in schedule(Pipeline.parse("simplify,prune"), has_data=False)] == ["simplify", "prune"]


def test_missing_calibration_data_is_an_error_before_any_work() -> None:
    with pytest.raises(UsageError, match=r"`quant:mode=static` \(2 of 2\) needs calibration data"):
        schedule(Pipeline.parse("prune,quant:mode=static"), has_data=False)
    schedule(Pipeline.parse("quant"), has_data=False)


def test_the_weakest_guarantee_decides() -> None:
    assert weakest([Guarantee.EXACT, Guarantee.LOSSY, Guarantee.EQUIVALENT]) is Guarantee.LOSSY
    assert weakest([Guarantee.EXACT, Guarantee.EQUIVALENT]) is Guarantee.EQUIVALENT
    assert weakest([]) is Guarantee.EXACT
    assert Pipeline.parse("simplify").steps[0].guarantee is Guarantee.EQUIVALENT


def test_a_pass_that_needs_canonical_form_comes_before_one_that_leaves_another() -> None:
    with pytest.raises(UsageError, match="`O2` before it does not leave") as caught:
        schedule(Pipeline.parse("O2,prune"), has_data=False)
    assert caught.value.hint == "put `O2` last"
    assert [step.name for step in schedule(Pipeline.parse("prune,O2"), has_data=False)] == ["simplify", "prune", "O2"]


def test_what_simplify_restores_is_restored_before_the_next_pass_that_needs_it() -> None:
    for text in (
        "prune-layers:count=2,prune-channels:macs=0.8,quant",
        "prune-layers:count=2,simplify,prune-channels,quant",
    ):
        steps = schedule(Pipeline.parse(text), has_data=True)
        assert [step.name for step in steps] == ["simplify", "prune-layers", "simplify", "prune-channels", "quant"]
    steps = schedule(Pipeline.parse("prune-layers,O2"), has_data=True)
    assert [step.name for step in steps] == ["simplify", "prune-layers", "O2"]


def test_options_of_another_type_are_refused_where_passes_are_made() -> None:
    wrong: tuple[Callable[[], object], ...] = (
        lambda: PruneChannels(ratio="much"),  # type: ignore[arg-type]
        lambda: PruneLayers(macs="few"),  # type: ignore[arg-type]
        lambda: Prune(sparsity="half"),  # type: ignore[arg-type]
    )
    for make in wrong:
        with pytest.raises(UsageError) as caught:
            make()
        assert caught.value.hint


def test_a_word_that_is_a_number_is_the_same_in_all_spellings() -> None:
    from graphopt.passes import Quant

    text = "quant:mode=weights:weights=int4:group=32"
    recipe = '[[pass]]\nname = "quant"\nmode = "weights"\nweights = "int4"\ngroup = 32\n'
    objects = Pipeline.of([Quant(mode="weights", weights="int4", group=32)])  # type: ignore[arg-type]
    assert str(Pipeline.parse(text)) == str(Pipeline.from_toml(recipe)) == str(objects) == text
