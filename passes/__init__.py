"""The passes that come with graphopt, found through the same entry point as anybody else's.

``from graphopt.passes import Prune, Quant`` imports a pass by its class name, on use.
"""

from __future__ import annotations

from typing import Any

from graphopt.registry import Preset, resolve

PASSES = {
    "common-subexpressions": "graphopt.passes.exact.common_subexpressions:CommonSubexpressions",
    "dead-code": "graphopt.passes.exact.dead_code:DeadCode",
    "fold-constants": "graphopt.passes.exact.fold_constants:FoldConstants",
    "fuse-conv-bn": "graphopt.passes.exact.fuse_conv_bn:FuseConvBatchNorm",
    "identities": "graphopt.passes.exact.identities:Identities",
    "prune": "graphopt.passes.lossy.prune:Prune",
    "quant": "graphopt.passes.lossy.quant:Quant",
}

PRESETS = {
    "simplify": Preset(
        "fold-constants,identities,fuse-conv-bn,common-subexpressions,dead-code",
        help="canonical form: constants folded, no-ops, duplicates and dead code gone, BatchNorm in its Conv",
    ),
}

_CLASSES = {reference.partition(":")[2]: reference for reference in PASSES.values()}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module `{__name__}` has no pass `{name}`")
    return resolve(_CLASSES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])
