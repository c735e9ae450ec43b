"""What finds faults finds them: each pass that is broken on purpose is traced to the node at fault."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.debugging.edit_costs import NOISE, costly_edits
from graphopt.debugging.edit_states import KEPT_STATES, EditStates
from graphopt.errors import GraphoptError, UsageError
from graphopt.optimization import Run
from graphopt.request import Request
from graphopt.rewriter import Edit

from .broken_passes import BROKEN, FAULTS, LAYERS, Broken, model, samples
from .command_line import fill
from .pass_runs import to_bytes


@pytest.mark.parametrize(("name", "broken", "at"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_bisect_names_the_node_at_fault(name: str, broken: Pass, at: str) -> None:
    found = graphopt.bisect(model(), broken, evaluation=samples(2), threads=1)
    assert found.edit is not None
    assert (found.edit.rule, found.edit.nodes, found.edit.origins) == (name, (at,), {at})
    shows = FAULTS[name].shows
    assert found.kind == ("idle" if shows == "nothing" else "breaks")
    why = {one.why for one in found.judged if one.verdict == "bad"}
    assert any("differs from run to run" in text for text in why) == (shows == "random")
    assert any(text.startswith("output `") for text in why) == (shows in ("numbers", "random"))
    assert (not found.before and not found.after) == (name not in CHANGES_TEXT)


# What is stamped wrong stands in no line of a node.
CHANGES_TEXT = FAULTS.keys() - {"stale-shape", "wrong-dtype", "silent-no-op"}


def test_nothing_is_found_where_nothing_is_broken() -> None:
    with pytest.raises(UsageError, match=r"the result is good, with .* none of them idle"):
        graphopt.bisect(model(), Broken(), evaluation=samples(2), threads=1)


# States


def test_states_kept_are_those_of_runs_that_are_ended() -> None:
    states = EditStates(Run(Request(model=model(), passes=Broken(fault="wrong-axis"), verify="off")))
    for count in (len(states), 1, 17, 48):
        job = Run(Request(model=model(), passes=Broken(fault="wrong-axis"), verify="off", stop_after_edits=count))
        result = job.run()
        assert to_bytes(states[count]) == to_bytes(result.model)
    assert states.runs <= 8


@pytest.mark.parametrize(("then", "told"), [(slice(20, 50), "`touch` at "), (slice(3), "not made")])
def test_a_pass_that_makes_other_edits_each_time_is_named(then: slice, told: str) -> None:
    runs: list[int] = []

    @dataclass(frozen=True)
    class Fickle(Pass):
        name = "fickle"
        guarantee = Guarantee.EQUIVALENT

        def run(self, model: ir.Model, ctx: Context) -> None:
            runs.append(1)
            nodes = list(walk.every_node(model))
            for node in nodes[: KEPT_STATES + 4] if len(runs) == 1 else nodes[then]:
                with ctx.rewriter.edit("touch", node):
                    ctx.rewriter.set_attribute(node, "nonsense", 1)

    with pytest.raises(GraphoptError) as caught:
        graphopt.bisect(model(), Fickle(), threads=1)
    was, now = caught.value.message.split(", then ")
    assert re.fullmatch(r"pass `fickle` makes other edits each time: edit [14] was `touch` at .*", was)
    assert now.startswith(told)


# Lossy runs


@dataclass(frozen=True)
class Noisy(Pass):
    """Add noise to the biases of the second half of the layers: a little, and more to some."""

    loud: tuple[int, ...] = ()

    name = "noisy"
    guarantee = Guarantee.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        rng = np.random.default_rng(0)
        for i in range(LAYERS // 2, LAYERS):
            bias = model.graph.initializers[f"b_{i}"]
            assert bias.const_value is not None
            noise = rng.standard_normal(16) * (4.0 if i in self.loud else 0.002)
            ctx.rewriter.set_weight(bias, (bias.const_value.numpy() + noise).astype(np.float32))


def test_the_layer_that_costs_most_is_found() -> None:
    found = graphopt.bisect(model(), Noisy(loud=(20,)), evaluation=samples(), threads=1)
    assert found.kind == "costs"
    assert found.edit is not None
    assert found.edit.nodes == ("bias_20",)
    assert found.costs is not None
    assert found.costs.what == "noise"
    assert found.costs.costs[0].share > 0.8
    assert "one edit costs" in found.costs.describe()
    assert len(found.judged) < LAYERS
    assert any("b_20" in line for line in found.before)


def test_two_layers_that_cost_are_found_and_said_to_share_the_damage() -> None:
    found = graphopt.bisect(model(), Noisy(loud=(18, 27)), evaluation=samples(), threads=1)
    assert found.costs is not None
    assert {one.edit.nodes[0] for one in found.costs.costs[:2]} == {"bias_18", "bias_27"}


def test_damage_that_is_spread_is_said_to_be() -> None:
    found = graphopt.bisect(model(), Noisy(), evaluation=samples(), threads=1)
    assert found.edit is None
    assert found.costs is not None
    assert found.costs.dominant is None
    assert "spread" in found.costs.describe()


def test_what_costs_the_metric_of_a_budget_is_found(tmp_path: Path) -> None:
    network = fill(tmp_path)
    data = str(tmp_path / "data.npz")
    found = graphopt.bisect(network, "prune:sparsity=0.95", data=data, budget="agreement=1%", threads=1)
    assert found.kind == "costs"
    assert found.costs is not None
    assert found.costs.what == "agreement"
    assert found.judged[-1].why.endswith(" of agreement lost"), "0.01 is no agreement, but what is lost of it"
    assert found.costs.total > 0.01
    assert {one.edit.pass_name for one in found.costs.costs} == {"prune"}


def test_a_lossy_run_that_breaks_the_model_is_searched_for_what_breaks_it() -> None:
    @dataclass(frozen=True)
    class Poison(Noisy):
        name = "poison"

        def run(self, model: ir.Model, ctx: Context) -> None:
            super().run(model, ctx)
            bias: Any = model.graph.initializers["b_24"]
            ctx.rewriter.set_weight(bias, np.full(16, np.nan, np.float32))

    found = graphopt.bisect(model(), Poison(), evaluation=samples(), threads=1)
    assert found.kind == "breaks"
    assert found.edit is not None
    assert found.edit.nodes == ("bias_24",)
    assert found.edit.number == LAYERS // 2 + 1


@pytest.mark.parametrize("nothing_to_tell", [math.inf, math.nan])
def test_states_in_between_that_lose_everything(nothing_to_tell: float) -> None:
    edits = [Edit(number, "noisy", "touch", frozenset(), (f"node_{number}",)) for number in range(1, 9)]
    costs = costly_edits(edits, lambda count: nothing_to_tell if 3 <= count <= 6 else count / 8, NOISE)
    assert costs.dominant == edits[2]
    assert costs.costs[0].share == 1.0
    assert "nan" not in costs.describe()


def test_a_lossy_run_that_loses_nothing_is_refused() -> None:
    @dataclass(frozen=True)
    class Harmless(Pass):
        name = "harmless"
        guarantee = Guarantee.LOSSY

        def run(self, model: ir.Model, ctx: Context) -> None:
            bias: Any = model.graph.initializers["b_24"]
            ctx.rewriter.set_weight(bias, bias.const_value.numpy())

    with pytest.raises(UsageError, match="nothing is lost that could be told"):
        graphopt.bisect(model(), Harmless(), evaluation=samples(2), threads=1)
