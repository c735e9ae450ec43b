"""Weights shared by k-means as everybody does it: scikit-learn's KMeans on each tensor by itself.

    python benchmarks/share_peers.py make "k-means:4" MODEL DATA.npz OUT

The setting is the bits of a code. Every weight of two axes or more that a linear layer reads gets 2^bits values of its
own; the file has them as float32, since it is for scoring. The last line on stdout is JSON: seconds after the imports
and peak bytes resident. Imports nothing of graphopt.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from plain_layers import Array, with_weights
from prune_judging import layer_weights
from quant_peers import measure

SEED = 0


def clustered(weight: Array, count: int, importance: Array | None = None, starts: int = 1) -> Array:
    """Return a weight with no more than so many distinct values, by scikit-learn's KMeans."""
    # Here, as only some of what imports this has it.
    from sklearn.cluster import KMeans

    flat = weight.reshape(-1, 1)
    if len(np.unique(flat)) <= count:
        return weight
    found = KMeans(count, n_init=starts, random_state=SEED).fit(flat, sample_weight=importance)
    return np.asarray(found.cluster_centers_[found.labels_].reshape(weight.shape), weight.dtype)


def make(tool: str, model: str, data: str, out: str) -> None:
    """Cluster a model's weights and print what that took."""
    _, _, bits = tool.rpartition(":")

    def work() -> None:
        import sklearn.cluster  # noqa: F401

        original = onnx.load(model)
        weights = {node.input[1]: weight for node, weight in layer_weights(original)}
        onnx.save(with_weights(original, {name: clustered(one, 2 ** int(bits)) for name, one in weights.items()}), out)

    measure(work)


if __name__ == "__main__":
    {"make": make}[sys.argv[1]](*sys.argv[2:])
