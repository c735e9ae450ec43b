"""Pipelines and options: text, TOML and objects are one thing in three spellings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from graphopt import options, registry
from graphopt.authoring import Guarantee, Pass
from graphopt.errors import UsageError
from graphopt.options import opt
from graphopt.passes import Factorize, Prune, PruneChannels, PruneLayers, Quant
from graphopt.pipeline import Pipeline, Step, schedule, weakest


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
    with pytest.raises(UsageError, match=r"option `rank` cannot be `2\.5`"):
        Pipeline.of([Factorize(rank=2.5)])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"option `bits` cannot be `4\.5`"):
        Pipeline.from_toml('[[pass]]\nname = "cluster"\nbits = 4.5\n')


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
        ("prune,sparsity=0.5", "`sparsity=0.5` is an option without its pass"),
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


@dataclass(frozen=True)
class Shaper(Pass):
    size: int = opt(1, help="")
    name = "shaper"
    precedes: ClassVar[Mapping[str, str]] = {"coder": "shapes are settled", "tidy": "nothing is left to shape"}


@dataclass(frozen=True)
class Coder(Pass):
    name = "coder"


@dataclass(frozen=True)
class Contrary(Pass):
    name = "contrary"
    precedes: ClassVar[Mapping[str, str]] = {"shaper": "it is contrary"}


@dataclass(frozen=True)
class Circular(Shaper):
    name = "circular"
    precedes: ClassVar[Mapping[str, str]] = {"contrary": "so is it"}


@dataclass(frozen=True)
class Plain(Pass):
    name = "plain"


def test_a_wrong_order_is_refused_with_the_right_one() -> None:
    steps = Pipeline.of([Plain(), Coder(), Plain(), Shaper(size=3), Contrary()])
    with pytest.raises(UsageError) as caught:
        schedule(steps, has_data=True)
    assert caught.value.message == "pass `shaper:size=3` (4 of 5) comes too late: behind `coder` shapes are settled"
    # Only what must move does: `plain` stays first, and stays behind what it came behind where it can.
    assert caught.value.hint == "in this order: `--passes plain,plain,contrary,shaper:size=3,coder`"
    right = Pipeline.of([Plain(), Plain(), Contrary(), Shaper(size=3), Coder()])
    assert schedule(right, has_data=True) == right.steps


def test_passes_that_declare_nothing_and_those_named_twice_keep_their_order() -> None:
    for order in ([Plain(), Coder(), Plain()], [Shaper(), Shaper(), Coder(), Coder()], [Coder(), Contrary()]):
        assert schedule(Pipeline.of(order), has_data=True)


def test_the_order_holds_inside_presets() -> None:
    def preset(name: str, *passes: Pass) -> Step:
        return Step(name, passes, preset=True)

    with pytest.raises(UsageError) as caught:
        schedule(Pipeline((preset("small", Plain(), Coder()), preset("shaped", Shaper()))), has_data=True)
    assert caught.value.message == "pass `shaped` (2 of 2) comes too late: behind `small` shapes are settled"
    assert caught.value.hint == "in this order: `--passes shaped,small`"
    with pytest.raises(UsageError) as caught:
        schedule(Pipeline((preset("wrong", Coder(), Shaper()),)), has_data=True)
    assert "behind its `coder` shapes are settled" in caught.value.message
    assert caught.value.hint == "put `shaper` before `coder`"


def test_orders_that_contradict_one_another_are_said_in_words() -> None:
    with pytest.raises(UsageError) as caught:
        schedule(Pipeline.of([Shaper(), Contrary(), Circular()]), has_data=True)
    assert "`contrary` (2 of 3) comes too late: behind `shaper` it is contrary" in caught.value.message
    assert caught.value.hint == "in this order: `--passes circular,contrary,shaper`"

    @dataclass(frozen=True)
    class Vicious(Pass):
        name = "contrary"
        precedes: ClassVar[Mapping[str, str]] = {"shaper": "it is contrary", "circular": "it is"}

    with pytest.raises(UsageError) as caught:
        schedule(Pipeline.of([Circular(), Vicious()]), has_data=True)
    assert caught.value.hint == "put `contrary` before `circular`"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("quant,prune", "prune,quant"),
        ("codebook,prune:sparsity=0.3,simplify", "prune:sparsity=0.3,codebook,simplify"),
        ("prune,quant,prune-channels:macs=0.8", "prune-channels:macs=0.8,prune,quant"),
        ("cast,prune-heads,logarithmic", "prune-heads,cast,logarithmic"),
        ("sparsify,prune", "prune,sparsify"),
        ("quant,O2,prune", "prune,quant,O2"),
        ("mixed-quant,prune-layers", "prune-layers,mixed-quant"),
        ("quant,prune-hidden", "prune-hidden,quant"),
        ("quant,cluster,prune,factorize", "factorize,prune,cluster,quant"),
        ("prune,factorize:macs=0.7,quant,cluster", "factorize:macs=0.7,prune,cluster,quant"),
        ("cluster,tie-layers,share", "tie-layers,cluster,share"),
        ("share,factorize,prune-channels", "share,prune-channels,factorize"),
        ("cast,factorize", "factorize,cast"),
    ],
)
def test_lossy_passes_know_their_order(text: str, right: str) -> None:
    with pytest.raises(UsageError, match="comes too late") as caught:
        schedule(Pipeline.parse(text), has_data=True, has_budget=True)
    assert caught.value.hint == f"in this order: `--passes {right}`"
    assert schedule(Pipeline.parse(right), has_data=True, has_budget=True)


def test_every_name_in_an_order_is_a_pass() -> None:
    """A name with a mistake in it would forbid nothing."""
    known = registry.table("PASSES")
    declared = {name: registry.find("PASSES", name).precedes for name in known}
    assert {other for one in declared.values() for other in one} <= set(known)
    assert all(name not in one for name, one in declared.items())
    # No two passes can both be the wrong way round.
    assert not [(one, two) for one, others in declared.items() for two in others if one in declared[two]]


def test_each_of_the_passes_in_their_order_fits_in_a_pipeline() -> None:
    for text in ("factorize,prune,cluster,quant", "prune-channels,tie-layers,factorize,prune,cluster,quant,share"):
        names = [step.name for step in schedule(Pipeline.parse(text), has_data=True) if step.reason is None]
        assert ",".join(names) == text


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
