"""In which order lossy passes come: of each kind, the passes that must come behind it, and why.

From what changes the shape of a model most to what only changes how numbers are stored: channels, heads and layers are
removed first, as the ranks of a layer are those of its final width; a layer becomes a pair before its weights become
zeros, since the product of two sparse factors is not sparse; zeros come before clusters, which keep them; and codes
come last, as nothing here solves for codes. Tied weights may be factored and factors tied. `share`, which changes no
number, may come anywhere: behind the others it also finds what they have made equal.
"""

from __future__ import annotations

from collections.abc import Mapping

# Each clause follows the words "behind `quant`".
_STORED: Mapping[str, str] = {
    "quant": "weights are stored as integers",
    "mixed-quant": "weights are stored as integers",
    "codebook": "weights are stored as codes",
    "logarithmic": "weights are stored as codes",
    "cast": "weights may be stored in halves that are widened first",
}

BEFORE_CODES: Mapping[str, str] = _STORED
BEFORE_CLUSTERS: Mapping[str, str] = {
    "cluster": "weights are few values, which would become many again",
    **BEFORE_CODES,
}
BEFORE_ZEROS: Mapping[str, str] = {
    "prune": "weights are zero that would not stay so",
    "prune-gradually": "weights are zero that would not stay so",
    "sparsify": "zeros are left out of the file already",
    **BEFORE_CLUSTERS,
}
BEFORE_FACTORS: Mapping[str, str] = {
    "factorize": "layers are pairs whose rank would count as a width",
    "tie-layers": "layers share weights, which cannot shrink by themselves",
    **BEFORE_ZEROS,
}
# What makes the zeros itself.
BEFORE_SPARSE_FILES: Mapping[str, str] = {
    name: why for name, why in BEFORE_ZEROS.items() if not name.startswith("prune")
}
