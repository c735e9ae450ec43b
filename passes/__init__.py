"""The passes that come with graphopt, found through the same entry point as anybody else's.

``from graphopt.passes import Prune, Quant`` imports a pass by its class name, on use.
"""

from __future__ import annotations

from typing import Any

from graphopt.registry import Preset, resolve

PASSES = {
    "ada-round": "graphopt.passes.lossy.ada_round:AdaRound",
    "cast": "graphopt.passes.lossy.cast:Cast",
    "chains": "graphopt.passes.exact.chains:Chains",
    "cluster": "graphopt.passes.lossy.cluster:Cluster",
    "codebook": "graphopt.passes.lossy.codebook:CodebookWeights",
    "common-subexpressions": "graphopt.passes.exact.common_subexpressions:CommonSubexpressions",
    "control-flow": "graphopt.passes.exact.control_flow:ControlFlow",
    "correct-bias": "graphopt.passes.lossy.correct_bias:CorrectBias",
    "dead-code": "graphopt.passes.exact.dead_code:DeadCode",
    "equalize": "graphopt.passes.exact.equalize:Equalize",
    "factorize": "graphopt.passes.lossy.factorize:Factorize",
    "flatten-rows": "graphopt.passes.exact.rows:FlattenRows",
    "fold-constants": "graphopt.passes.exact.fold_constants:FoldConstants",
    "fold-shapes": "graphopt.passes.exact.fold_shapes:FoldShapes",
    "fuse-activations": "graphopt.passes.exact.fuse_activations:FuseActivations",
    "fuse-affine": "graphopt.passes.exact.fuse_affine:FuseAffine",
    "fuse-linear": "graphopt.passes.exact.fuse_linear:FuseLinear",
    "fuse-pad": "graphopt.passes.exact.fuse_pad:FusePad",
    "fuse-reductions": "graphopt.passes.exact.fuse_reductions:FuseReductions",
    "hoist": "graphopt.passes.exact.hoist:Hoist",
    "identities": "graphopt.passes.exact.identities:Identities",
    "logarithmic": "graphopt.passes.lossy.logarithmic:Logarithmic",
    "merge-affine": "graphopt.passes.exact.merge_affine:MergeAffine",
    "inline-functions": "graphopt.passes.exact.inline_functions:InlineFunctions",
    "merge-initializers": "graphopt.passes.exact.merge_initializers:MergeInitializers",
    "mixed-quant": "graphopt.passes.lossy.mixed_quant:MixedQuant",
    "move-transposes": "graphopt.passes.exact.transposes:MoveTransposes",
    "opset": "graphopt.passes.exact.opset:Opset",
    "prune": "graphopt.passes.lossy.prune:Prune",
    "prune-channels": "graphopt.passes.lossy.prune_channels:PruneChannels",
    "prune-gradually": "graphopt.passes.recovery.prune_gradually:PruneGradually",
    "prune-heads": "graphopt.passes.lossy.prune_heads:PruneHeads",
    "prune-hidden": "graphopt.passes.lossy.prune_hidden:PruneHidden",
    "prune-layers": "graphopt.passes.lossy.prune_layers:PruneLayers",
    "quant": "graphopt.passes.lossy.quant:Quant",
    "raise-operators": "graphopt.passes.raising.raise_operators:RaiseOperators",
    "runtime-operators": "graphopt.passes.raising.runtime_operators:RuntimeOperators",
    "recover": "graphopt.passes.recovery.recover:Recover",
    "reciprocals": "graphopt.passes.exact.reciprocals:Reciprocals",
    "repeats": "graphopt.passes.exact.repeats:Repeats",
    "sequences": "graphopt.passes.exact.sequences:Sequences",
    "share": "graphopt.passes.exact.share:Share",
    "smooth-quant": "graphopt.passes.exact.smooth_quant:SmoothQuant",
    "sparsify": "graphopt.passes.lossy.sparsify:Sparsify",
    "split-slices": "graphopt.passes.exact.split_slices:SplitSlices",
    "tie-layers": "graphopt.passes.lossy.tie_layers:TieLayers",
}

# From what makes most of the rest needless to what only tidies up; all of it is repeated until nothing changes.
_SIMPLIFY = (
    "inline-functions,control-flow,fold-shapes,identities,fold-constants,sequences,chains,split-slices,move-transposes,"
    "repeats,reciprocals,fuse-affine,merge-affine,fuse-pad,flatten-rows,fuse-linear,fuse-activations,fuse-reductions,hoist,"
    "merge-initializers,common-subexpressions,dead-code"
)

PRESETS = {
    "simplify": Preset(
        _SIMPLIFY,
        help="canonical form in standard operators: constants and shapes folded, no-ops, duplicates, dead code gone, "
        "layers merged with what surrounds them",
    ),
    "O2": Preset(
        _SIMPLIFY.replace("repeats,", "raise-operators,runtime-operators,repeats,"),
        help="simplify, and what was decomposed raised to single operators, the target's own where these are faster",
    ),
}

INSPECTIONS = {
    "groups": "graphopt.passes.lossy.group_listing:list_groups",
    "shared": "graphopt.passes.exact.shared_listing:list_shared",
}

_CLASSES = {reference.partition(":")[2]: reference for reference in PASSES.values()}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module `{__name__}` has no pass `{name}`")
    return resolve(_CLASSES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])
