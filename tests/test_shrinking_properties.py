"""Channels removed from generated graphs: the analysis says which go together, and what is left computes the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from graphopt import shapes
from graphopt.passes.analyses.channel_groups import Layout, Side, channel_groups
from graphopt.passes.lossy.separate_sizes import separate_sizes
from graphopt.passes.lossy.separate_vectors import separate_vectors
from graphopt.rewriter import Rewriter

pytest.importorskip("onnxruntime")

from .graph_generator import Recipe, build, feeds, recipes
from .pass_runs import loaded, run_passes
from .removed_channels import Kept, check_removal, is_read_by_layers

LAYOUTS = st.builds(Layout, st.sampled_from(Side), st.sampled_from(Side))
RECIPE_SIZE = 8
EXAMPLES = 25
# What two runs, or numbers without bounds, say nothing of.
BEYOND_COMPARING = {"nondeterministic", "nonfinite"}


def removal(recipe: Recipe, layout: Layout, seed: int, *, canonical: bool) -> None:
    """Remove some units of some groups of a generated model, and compare with zeros in their place."""
    proto = build(recipe)
    if BEYOND_COMPARING & {entry.key for entry in proto.metadata_props}:
        return
    rng = np.random.default_rng(seed)
    model = loaded(proto)
    if canonical:
        run_passes(model, "simplify")
    shapes.infer_shapes(model)
    if canonical:
        separate_vectors(model, Rewriter(model))
        separate_sizes(model, Rewriter(model))
    kept: Kept = {
        group: rng.permutation(group.size) >= rng.integers(1, group.size)
        for group in channel_groups(model, layout).groups
        if group.size > 1 and not group.mixers
    }
    event(f"{min(len(kept), 3)} groups")
    names = {value.name for value in model.graph.inputs}
    feed = {name: array for name, array in feeds(proto, seed).items() if name in names}
    check_removal(model, kept, feed, by_readers=all(map(is_read_by_layers, kept)))


@settings(max_examples=EXAMPLES)
@given(recipes(size=RECIPE_SIZE), LAYOUTS, st.integers(0, 2**16))
def test_channels_of_generated_graphs_can_go(recipe: Recipe, layout: Layout, seed: int) -> None:
    removal(recipe, layout, seed, canonical=True)


@settings(max_examples=EXAMPLES)
@given(recipes(size=RECIPE_SIZE), LAYOUTS, st.integers(0, 2**16))
def test_channels_of_graphs_as_they_were_exported_can_go(recipe: Recipe, layout: Layout, seed: int) -> None:
    """Constants in nodes, sizes computed, subgraphs: nothing of it needs canonical form to be right."""
    removal(recipe, layout, seed, canonical=False)
