"""Low rank as it is published, written plainly: every layer at one share of its parameters.

    python benchmarks/lowrank_peers.py make "plain SVD:params=0.8" MODEL DATA.npz OUT

``params=0.8`` gives each layer of m outputs and n inputs the rank ⌊0.8 mn / (m + n)⌋; ``macs=0.7`` looks for the share
of all layers that leaves 70 % of the model's multiplications. *Whitened* is SVD-LLM's (Wang et al. 2024, arXiv
2403.07378): the SVD of W S with E[x xᵀ] = S Sᵀ by Cholesky, moments measured in the model as it was. Of a convolution
both give one with the kernel and one of 1×1. The last line on stdout is JSON: seconds after the imports and peak bytes
resident. Imports nothing of graphopt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import onnx
from asked_share import down_to
from plain_layers import Array, Feeds, Layer, layers_of, second_moments, with_pairs
from quant_peers import measure

# Share of the moments' mean diagonal that is added to it, so that there is a Cholesky factor.
DAMPING = 0.01


def rank_of(layer: Layer, share: float) -> int:
    """Return the largest rank at which the two layers have no more than a share of the layer's parameters."""
    outputs, inputs = layer.matrix.shape
    return max(1, int(share * outputs * inputs / (outputs + inputs)))


def whitening(moments: Array) -> Array:
    """Return S of moments = S Sᵀ, damped."""
    damped = moments + DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))
    return np.linalg.cholesky(damped)


class Factored:
    """A model, the singular value decompositions of its layers, and what is left of it at any share."""

    def __init__(self, model: onnx.ModelProto, feeds: Feeds | None) -> None:
        self.model, self.layers = model, layers_of(model)
        self.parts: list[tuple[Array, Array]] = []
        moments = None if feeds is None else second_moments(model, self.layers, feeds)
        for place, layer in enumerate(self.layers):
            root = np.eye(layer.matrix.shape[1]) if moments is None else whitening(moments[place])
            left, values, right = np.linalg.svd(layer.matrix @ root, full_matrices=False)
            self.parts.append((left * values, np.linalg.solve(root.T, right.T).T))

    def at(self, share: float) -> onnx.ModelProto:
        """Return the model with every layer at a share of its parameters."""
        pairs: dict[str, tuple[Array, Array]] = {}
        for layer, (left, right) in zip(self.layers, self.parts, strict=True):
            rank = rank_of(layer, share)
            pairs[layer.name] = left[:, :rank], right[:rank]
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        return with_pairs(made, pairs)


def make(tool: str, model: str, data: str, out: str) -> None:
    """Factor a model and print what that took."""
    name, _, setting = tool.rpartition(":")
    goal, _, share = setting.partition("=")
    feeds: Mapping[str, Array] = dict(np.load(data))

    def work() -> None:
        original = onnx.load(model)
        factored = Factored(original, {"plain SVD": None, "whitened SVD": feeds}[name])
        if goal == "params":
            onnx.save(factored.at(float(share)), out)
        else:
            onnx.save(down_to(float(share), original, dict(feeds), lambda gone: factored.at(1 - gone)), out)

    measure(work)


if __name__ == "__main__":
    {"make": make}[sys.argv[1]](*sys.argv[2:])
