"""Models trained for a few steps within their constraints, and written back, as tests of recovery look at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import fx

from graphopt.backends.torch_fx.lowering import lower
from graphopt.backends.torch_fx.tensors import to_torch
from graphopt.passes.recovery.constraints.constrained import Constrained, constrain
from graphopt.passes.recovery.constraints.trainable import constants
from graphopt.passes.recovery.held import Held
from graphopt.rewriter import Journal, Rewriter
from graphopt.stored_weights import stored_tensor

from .pass_runs import loaded, outputs_of

Feed = Mapping[str, np.ndarray]
# Adam moves each number by about the rate in each step: far enough to be seen, not to break anything.
RATE, STEPS = 0.01, 5
ALL_BUT_ADAPTERS = ("weights", "biases", "norms", "scales", "tables", "zero-points")


@dataclass(frozen=True, eq=False)
class Trained:
    """A model, the module it was lowered to, and what holds it."""

    model: ir.Model
    module: fx.GraphModule
    constrained: Constrained

    def outputs(self, feed: Feed) -> list[np.ndarray]:
        """Return what the module gives."""
        with torch.no_grad():
            return [one.numpy() for one in self.module(*self._inputs(feed))]

    def train(self, feed: Feed, wanted: np.ndarray | None = None, *, steps: int = STEPS, rate: float = RATE) -> float:
        """Bring the first output closer to what is wanted, zeros by default, and return the last loss."""
        groups = self.constrained.parameters()
        settings = [{"params": one.tensors, "weight_decay": 0.1 if one.decay else 0.0} for one in groups]
        optimizer = torch.optim.AdamW(settings, lr=rate)
        inputs = self._inputs(feed)
        loss = torch.zeros(())
        for _ in range(steps):
            y = self.module(*inputs)[0].float()
            loss = (y - (0.0 if wanted is None else torch.from_numpy(wanted))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    def _inputs(self, feed: Feed) -> list[torch.Tensor]:
        return [to_torch(np.array(feed[name])) for name in self.module.meta["graphopt"].inputs]

    def written(self) -> ir.Model:
        """Return the model with what was trained in it; the model itself stays as it is."""
        copy = self.model.clone()
        rewriter = Rewriter(copy, Journal(), "recover")
        values = {name: value for value, name in constants(copy).items()}
        for name, array in self.constrained.stored():
            rewriter.set_weight(values[name], stored_tensor(values[name], array))
        return copy

    def array(self, name: str) -> np.ndarray:
        """Return what a constant is by now."""
        return dict(self.constrained.stored())[name]


def constrained(model: onnx.ModelProto | ir.Model, **options: Any) -> Trained:
    """Return a model ready to be trained."""
    own = loaded(model) if isinstance(model, onnx.ModelProto) else model
    module = lower(own, differentiable=True)
    return Trained(own, module, constrain(module, own, Held(**options)))


def is_exact(trained: Trained, feed: Feed) -> bool:
    """Return whether what is written, lowered anew, gives the same bits as what was trained."""
    again = Trained(trained.model, lower(trained.written(), differentiable=True), trained.constrained)
    pairs = zip(trained.outputs(feed), again.outputs(feed), strict=True)
    return all(np.array_equal(now, then) for now, then in pairs)


def difference(trained: Trained, feed: Feed) -> float:
    """Return the largest difference between what was trained and what ONNX Runtime makes of what is written."""
    now = outputs_of(trained.written(), feed)
    pairs = zip(trained.outputs(feed), now.values(), strict=True)
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in pairs)
