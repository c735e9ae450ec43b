"""What runs in the interpreter of the other pruners: prune one model with one of them.

    PEERS/bin/python benchmarks/prune_peers.py make TOOL:SETTING MODEL DATA.npz OUT

The setting is a sparsity, ``2of4``, or, of a tool that removes channels, the share of the multiplications to be left;
such a tool is asked for more and more until no more than these are. The last line on stdout is JSON: seconds after the
imports and peak bytes resident. Imports nothing of graphopt.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import prune_language
import torch
import torch_graph
from asked_share import down_to
from onnx import numpy_helper
from prune_judging import LAYERS
from quant_peers import CALIBRATION_BATCH, THREADS, Array, Feeds, batches, measure
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

# Given a model, calibration samples and a setting, returns what it makes.
Tool = Callable[[onnx.ModelProto, Feeds, str], onnx.ModelProto]

PATTERN = "2of4"
# Of the channels of one layer, the most that a choice over all layers may remove.
MOST_OF_A_LAYER = 0.9


def torch_magnitude(*, everywhere: bool) -> Tool:
    """Return torch.nn.utils.prune's magnitude, over each layer or over all; for 2:4, torch.ao.pruning's."""

    def work(model: onnx.ModelProto, feeds: Feeds, setting: str) -> onnx.ModelProto:
        # Torch has a layer's outputs first; only the pattern minds, and of it only products of matrices are asked for.
        layers = nn.ModuleDict({name.replace(".", "_"): holder(one.T) for name, one in layer_constants(model).items()})
        if setting == PATTERN:
            sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
            sparsifier.prepare(layers, [{"tensor_fqn": f"{name}.weight"} for name in layers])
            sparsifier.step()
            sparsifier.squash_mask()
        elif everywhere:
            chosen = [(one, "weight") for one in layers.values()]
            prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=float(setting))
        else:
            for one in layers.values():
                prune.l1_unstructured(one, "weight", amount=float(setting))
        return with_constants(
            model, {name: layers[name.replace(".", "_")].weight.detach().numpy().T for name in layer_constants(model)}
        )

    return work


def holder(weight: Array) -> nn.Module:
    """Return a module with a weight and nothing else."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight)))
    return module


def layer_constants(model: onnx.ModelProto) -> dict[str, Array]:
    """Return the weights of two axes or more that linear layers read directly, by name."""
    constants = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    read = [name for node in model.graph.node if node.op_type in LAYERS for name in node.input[:2]]
    found = {name: numpy_helper.to_array(constants[name]) for name in read if name in constants}
    return {name: one for name, one in found.items() if one.ndim > 1}


def with_constants(model: onnx.ModelProto, arrays: dict[str, Array]) -> onnx.ModelProto:
    """Put other arrays into constants of a model and return it."""
    holders = [
        *model.graph.initializer,
        *(node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"),
    ]
    names = [one.name for one in model.graph.initializer]
    names += [node.output[0] for node in model.graph.node if node.op_type == "Constant"]
    for name, holder in zip(names, holders, strict=True):
        if name in arrays:
            holder.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(arrays[name]), holder.name))
    return model


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model as onnxsim simplifies it: it removes no channels before a BatchNormalization."""
    import onnxsim

    return onnxsim.simplify(model)[0]


def onnxsim_tool(function: str, *, calibrates: bool = True) -> Tool:
    """Return a pruner of onnxsim that zeroes weights."""

    def work(model: onnx.ModelProto, feeds: Feeds, setting: str) -> onnx.ModelProto:
        import onnxsim

        given: dict[str, Any] = {"n": 2, "m": 4} if setting == PATTERN else {"sparsity": float(setting)}
        if calibrates:
            given["calibration_data"] = list(batches(feeds))
        return getattr(onnxsim, function)(model, **given)

    return work


def onnxsim_channels(function: str, *, calibrates: bool = False, **settings: Any) -> Tool:
    """Return a pruner of onnxsim that removes channels."""

    def work(model: onnx.ModelProto, feeds: Feeds, setting: str) -> onnx.ModelProto:
        import onnxsim

        plain = simplified(model)
        given = {"calibration_data": list(batches(feeds))} if calibrates else {}

        def shrink(ratio: float) -> onnx.ModelProto:
            return getattr(onnxsim, function)(plain, sparsity=ratio, **given, **settings)

        return down_to(float(setting), model, feeds, shrink)

    return work


def torch_pruning(criterion: str, *, everywhere: bool = False, inner: bool = False) -> Tool:
    """Return Torch-Pruning by a criterion, over each group or over all; inner leaves residual streams alone."""

    def work(model: onnx.ModelProto, feeds: Feeds, setting: str) -> onnx.ModelProto:
        import torch_pruning as tp

        source = torch_graph.prepared(model)
        original = torch_graph.TorchGraph(source)
        images = torch.from_numpy(next(iter(feeds.values())))
        importance = {
            "L1": lambda: tp.importance.MagnitudeImportance(p=1),
            "L2": lambda: tp.importance.MagnitudeImportance(p=2),
            "LAMP": tp.importance.LAMPImportance,
            "Taylor": tp.importance.TaylorImportance,
        }[criterion]

        def shrink(ratio: float) -> onnx.ModelProto:
            module = copy.deepcopy(original)
            ignored = module.last_layers()
            if inner:
                ignored += shared_layers(tp, module, images[:1], ignored)
            pruner = tp.pruner.BasePruner(
                module,
                images[:1],
                importance=importance(),
                global_pruning=everywhere,
                pruning_ratio=ratio,
                max_pruning_ratio=MOST_OF_A_LAYER if everywhere else 1.0,
                ignored_layers=ignored,
            )
            if criterion == "Taylor":
                learn_nothing(module, images)
            pruner.step()
            return module.written(source)

        return down_to(float(setting), model, feeds, shrink)

    return work


def learn_nothing(module: nn.Module, images: torch.Tensor) -> None:
    """Leave gradients of the loss in a classifier's weights, what it says itself taken for the labels."""
    for batch in images.split(CALIBRATION_BATCH):
        logits = module(batch)[0].flatten(1)
        nn.functional.cross_entropy(logits, logits.argmax(1)).backward()


def shared_layers(tp: Any, module: nn.Module, example: torch.Tensor, ignored: list[nn.Module]) -> list[nn.Module]:
    """Return the layers whose outputs other layers' outputs are added to: all but the inner ones of blocks."""
    graph = tp.DependencyGraph().build_dependency(module, example)
    found: list[nn.Module] = []
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.Conv2d, nn.Linear]):
        makers = [item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
        makers = [
            one for one in makers if isinstance(one, nn.Linear) or (isinstance(one, nn.Conv2d) and one.groups == 1)
        ]
        if len(set(makers)) > 1:
            found.extend(makers)
    return found


TOOLS: dict[str, Tool] = {
    "torch magnitude": torch_magnitude(everywhere=False),
    "torch magnitude, global": torch_magnitude(everywhere=True),
    "Wanda, reference": prune_language.by_reference("wanda"),
    "SparseGPT, reference": prune_language.by_reference("sparsegpt"),
    "llm-compressor Wanda": prune_language.by_llm_compressor("WandaPruningModifier"),
    "llm-compressor SparseGPT": prune_language.by_llm_compressor("SparseGPTModifier"),
    "onnxsim magnitude": onnxsim_tool("apply_magnitude_pruning", calibrates=False),
    "onnxsim Wanda": onnxsim_tool("apply_wanda_pruning"),
    "onnxsim SparseGPT": onnxsim_tool("apply_sparsegpt_pruning"),
    "onnxsim channels": onnxsim_channels("apply_structured_pruning"),
    "onnxsim channels, global": onnxsim_channels("apply_structured_pruning", global_sparsity=True),
    "onnxsim channels, Wanda": onnxsim_channels("apply_structured_wanda_pruning", calibrates=True),
    "Torch-Pruning L1": torch_pruning("L1"),
    "Torch-Pruning L2": torch_pruning("L2"),
    "Torch-Pruning L2, global": torch_pruning("L2", everywhere=True),
    "Torch-Pruning LAMP, global": torch_pruning("LAMP", everywhere=True),
    "Torch-Pruning Taylor, global": torch_pruning("Taylor", everywhere=True),
    "Torch-Pruning L1, inner": torch_pruning("L1", inner=True),
    "Torch-Pruning Taylor, inner": torch_pruning("Taylor", inner=True, everywhere=True),
}


def make(tool: str, model: str, data: str, out: str) -> None:
    """Prune a model and print what that took."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
    name, _, setting = tool.rpartition(":")
    feeds = dict(np.load(data))
    measure(lambda: onnx.save(TOOLS[name](onnx.load(model), feeds, setting), out))


if __name__ == "__main__":
    {"make": make}[sys.argv[1]](*sys.argv[2:])
