"""What tells one training from another, and the weights of one process from those of another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ..settings import Training

# What does not change the result: whoever asks for other checkpoints goes on from those there are.
_OF_NO_EFFECT = frozenset({"checkpoints", "checkpoint_every", "minutes"})
# Characters of a fingerprint in the name of a folder.
_FINGERPRINT_LENGTH = 16


def fingerprint(settings: Training, parts: Mapping[str, Any], modules: Mapping[str, torch.nn.Module | None]) -> str:
    """Return what tells a training from all others: a name for the folder of its checkpoints.

    Args:
        settings: How it goes.
        parts: What else it depends on, as JSON values.
        modules: Modules it depends on, with what they compute and all their weights as they are before it.
    """
    state = hashlib.blake2b(digest_size=_FINGERPRINT_LENGTH // 2)
    # Of a pass that has more options than these, all count.
    fields = dataclasses.fields(settings)
    chosen = {f.name: getattr(settings, f.name) for f in fields if f.name not in _OF_NO_EFFECT}
    state.update(json.dumps([chosen, dict(parts)], sort_keys=True, default=str).encode())
    for name, module in modules.items():
        if module is not None:
            state.update(f"{name} {digest(module)}".encode())
    return state.hexdigest()


def digest(module: torch.nn.Module) -> str:
    """Return what modules share that compute the same of the same weights, whose names count, too; on any device."""
    state = hashlib.blake2b(digest_size=_FINGERPRINT_LENGTH // 2)
    for path, tensor in module.state_dict(keep_vars=True).items():
        state.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(_bytes_of(tensor))
    for path, part in module.named_modules():
        state.update(f"{path} {type(part).__qualname__}".encode())
        if isinstance(part, fx.GraphModule):
            for line in _calls(part.graph):
                state.update(line.encode())
    return state.hexdigest()


def _calls(graph: fx.Graph) -> Iterator[str]:
    """Yield what each node of a graph does: what it calls, on which nodes, with which attributes."""
    places: dict[fx.Node, int] = {}
    for node in graph.nodes:
        places[node] = len(places)
        yield f"{node.op} {_in_words(node.target, places)} {_in_words([node.args, node.kwargs], places)}\n"


def _in_words(value: Any, places: Mapping[fx.Node, int]) -> str:
    """Return an argument as text that is the same in every process: without addresses, and without devices."""
    match value:
        case fx.Node():
            return f"%{places[value]}"
        case list() | tuple():
            return f"({','.join(_in_words(one, places) for one in value)})"
        case Mapping():
            return f"({','.join(f'{key}={_in_words(one, places)}' for key, one in value.items())})"
        case slice():
            return _in_words(["slice", value.start, value.stop, value.step], places)
        case None | bool() | int() | float() | str() | bytes() | torch.dtype():
            return repr(value)
        case _:
            name = getattr(value, "__qualname__", type(value).__qualname__)
            return f"{getattr(value, '__module__', '')}.{name}"


def _bytes_of(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
