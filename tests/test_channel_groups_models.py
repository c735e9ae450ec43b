"""Channel groups of real models: how many of which size, and that what is left without some of them still runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from graphopt import model_io, shapes
from graphopt.passes.analyses.channel_groups import Groups, Layout, Side, channel_groups
from graphopt.passes.lossy.separate_sizes import separate_sizes
from graphopt.passes.lossy.separate_vectors import separate_vectors
from graphopt.rewriter import Rewriter

from .lettered_groups import letters, of_constants
from .pass_runs import loaded, outputs_of
from .removed_channels import check_removal, removed

# (units, layers that make them, layers that read them): how many groups there are, heads cut as a whole.
KNOWN: Mapping[str, Mapping[tuple[int, int, int], int]] = {
    "all-MiniLM-L6-v2": {(12, 3, 1): 6, (1536, 1, 1): 6},
    "gutenberg_llama_7m": {(6, 3, 1): 6, (768, 2, 1): 6, (288, 12, 30): 1},
    # Of eight heads of queries, two read each of keys and values.
    "stories260k": {(4, 3, 1): 5, (172, 2, 1): 5, (64, 10, 25): 1},
    # Twice, for two sampling rates: real and imaginary parts of a spectrum, and all but the last of four convolutions,
    # of which only a branch knows the rank.
    "silero_vad": {(65, 1, 1): 1, (129, 1, 1): 1, (128, 1, 1): 2, (64, 1, 1): 4},
    "magika_v3_3": {(64, 1, 1): 1, (512, 1, 1): 1},
    "squeezenet1.1_imagenet": {
        (64, 1, 1): 5,
        (16, 1, 2): 2,
        (32, 1, 2): 2,
        (128, 1, 1): 4,
        (48, 1, 2): 2,
        (192, 1, 1): 4,
        (64, 1, 2): 2,
        (256, 1, 1): 4,
    },
    "mobilenet_v1_0.5_160_imagenet": {
        (16, 2, 1): 1,
        (32, 2, 1): 1,
        (64, 2, 1): 2,
        (128, 2, 1): 2,
        (256, 2, 1): 6,
        (512, 2, 1): 1,
        (512, 1, 1): 1,
    },
    "yunet_n_dynamic": {(16, 1, 1): 1, (16, 2, 1): 2, (64, 2, 1): 8, (64, 4, 3): 2, (64, 2, 4): 3},
    "digits_resnet": {(16, 2, 3): 1, (16, 1, 1): 1, (32, 1, 1): 1, (32, 2, 2): 1, (64, 1, 1): 1, (64, 2, 1): 1},
}


def groups_in(model: ir.Model, side: Side) -> Groups:
    shapes.infer_shapes(model)
    rewriter = Rewriter(model)
    separate_vectors(model, rewriter)
    separate_sizes(model, rewriter)
    return channel_groups(model, Layout(splits=side))


@pytest.mark.parametrize("name", KNOWN)
def test_groups_of_real_models(shared: Path, name: str) -> None:
    model = model_io.load(shared / "assets" / "models" / f"{name}.onnx")
    groups = groups_in(model, Side.MAJOR).groups
    assert Counter((g.size, len(g.writers), len(g.readers)) for g in groups) == KNOWN[name]


@pytest.mark.parametrize("side", Side)
def test_a_language_model_without_some_channels_runs(shared: Path, side: Side) -> None:
    model = model_io.load(shared / "assets" / "models" / "stories260k.onnx")
    # What normalizations mix changes with every channel.
    groups = [group for group in groups_in(model, side).groups if not group.mixers]
    kept = {group: removed(group.size, *range(0, group.size, 3)) for group in groups}
    check_removal(model, kept, {"ids": np.arange(14).reshape(2, 7)})


# Sizes that layers only seem to share


SHARED_SHAPE = """
<ir_version: 10, opset_import: ["" : 21]>
two (float[N,4] x) => (float[N,6] out) <int64[1] axis = {1}> {
  y = MatMul(x, w0)
  z = MatMul(x, w1)
  shape = Shape(y)
  a = Reshape(y, shape)
  b = Reshape(z, shape)
  both = Concat<axis = 1>(a, b)
  out = MatMul(both, w2)
}
"""


def test_known_sizes_read_off_another_layer_are_written_down() -> None:
    weights = {"w0": (4, 3), "w1": (4, 3), "w2": (6, 6)}
    proto = onnx.parser.parse_model(SHARED_SHAPE)
    for name, shape in weights.items():
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    model = loaded(proto)
    shapes.infer_shapes(model)
    assert len(channel_groups(model).groups) == 1
    feed = {"x": np.eye(4, dtype=np.float32)}
    before = outputs_of(model.clone(), feed)
    assert separate_sizes(model, Rewriter(model)) == 2
    np.testing.assert_array_equal(outputs_of(model, feed)["out"], before["out"])
    assert [of_constants([letters(group)], weights)[0] for group in channel_groups(model).groups] == [
        {"w0:1": "abc", "w2:0": "abc..."},
        {"w1:1": "abc", "w2:0": "...abc"},
    ]
    assert separate_sizes(model, Rewriter(model)) == 0
