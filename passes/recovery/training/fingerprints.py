"""What tells one training from another, and the weights of one process from those of another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

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
        modules: Modules it depends on, with all their weights as they are before it.
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
    """Return what modules of the same weights share, with their names."""
    state = hashlib.blake2b(digest_size=_FINGERPRINT_LENGTH // 2)
    for path, tensor in module.state_dict(keep_vars=True).items():
        state.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(_bytes_of(tensor))
    return state.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
