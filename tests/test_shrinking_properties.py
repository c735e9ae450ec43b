"""Channels removed from generated graphs: the analysis says which go together, and what is left computes the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from graphopt import shapes
from graphopt.passes.analyses.channel_groups import Layout, Side, channel_groups
from graphopt.passes.lossy.separate_sizes import separate_sizes
from graphopt.passes.lossy.separate_vectors import separate_vectors
from graphopt.rewriter import Rewriter

pytest.importorskip("onnxruntime")

from .channel_graphs import channel_graph
from .graph_generator import Recipe, build, feeds, recipes
from .pass_runs import loaded, run_passes
from .removed_channels import Kept, check_removal, feed_of, is_read_by_layers

LAYOUTS = st.builds(Layout, st.sampled_from(Side), st.sampled_from(Side))
SEEDS = st.integers(0, 2**16)
RECIPE_SIZE = 8
NETWORK_SIZES = st.integers(2, 12)
EXAMPLES, CANONICAL_EXAMPLES = 25, 8
# What two runs, or numbers without bounds, say nothing of.
BEYOND_COMPARING = {"nondeterministic", "nonfinite"}


def remove_some(model: ir.Model, layout: Layout, seed: int, feed: Mapping[str, np.ndarray]) -> None:
    """Remove some units of each group of a model, and compare with zeros in their place."""
    rng = np.random.default_rng(seed)
    shapes.infer_shapes(model)
    kept: Kept = {
        group: rng.permutation(group.size) >= rng.integers(1, group.size)
        for group in channel_groups(model, layout).groups
        if group.size > 1 and not group.mixers
    }
    event(f"{min(len(kept), 3)} groups")
    names = {value.name for value in model.graph.inputs}
    feed = {name: array for name, array in feed.items() if name in names}
    check_removal(model, kept, feed, by_readers=all(map(is_read_by_layers, kept)))


@settings(max_examples=EXAMPLES)
@given(SEEDS, NETWORK_SIZES, LAYOUTS)
def test_channels_of_networks_can_go(seed: int, size: int, layout: Layout) -> None:
    model = loaded(channel_graph(seed, size))
    remove_some(model, layout, seed, feed_of(model, seed))


@settings(max_examples=CANONICAL_EXAMPLES)
@given(SEEDS, NETWORK_SIZES, LAYOUTS)
def test_channels_of_networks_in_canonical_form_can_go(seed: int, size: int, layout: Layout) -> None:
    model = loaded(channel_graph(seed, size))
    run_passes(model, "simplify")
    shapes.infer_shapes(model)
    separate_vectors(model, Rewriter(model))
    separate_sizes(model, Rewriter(model))
    remove_some(model, layout, seed, feed_of(model, seed))


@settings(max_examples=EXAMPLES)
@given(recipes(size=RECIPE_SIZE), LAYOUTS, SEEDS)
def test_channels_of_any_graph_can_go(recipe: Recipe, layout: Layout, seed: int) -> None:
    """Constants in nodes, sizes computed, subgraphs: nothing of it needs canonical form to be right."""
    proto = build(recipe)
    if not BEYOND_COMPARING & {entry.key for entry in proto.metadata_props}:
        remove_some(loaded(proto), layout, seed, feeds(proto, seed))
