"""Penalties that make weights and channels exactly zero while a model trains, for a later pass to take out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.shapes import infer_shapes

from ...analyses.channel_groups import ChannelGroup, channel_groups, input_axis
from ..aim import Aim

if TYPE_CHECKING:
    from ..constraints.constrained import Constrained

# Constants that a channel is made of, by what they are for; scales and adapters are of the layer, not of a channel.
_OF_CHANNELS = ("weights", "biases", "norms")


@dataclass(frozen=True, eq=False)
class Slice:
    """What a tensor has of channels.

    Attributes:
        tensor: A parameter.
        axis: Its axis of channels.
        units: Which channel each element of the axis belongs to, int64 [length]; -1 where to none.
    """

    tensor: nn.Parameter
    axis: int
    units: Tensor

    def squares(self, count: int) -> tuple[Tensor, Tensor]:
        """Return for each channel the sum of squares of what it has here, and how many elements these are."""
        units = self.units.to(self.tensor.device)
        rows = self.tensor.detach().movedim(self.axis, 0).reshape(len(units), -1)
        real = units >= 0
        zeros = torch.zeros(count, dtype=rows.dtype, device=rows.device)
        sums = zeros.index_add(0, units[real], rows[real].square().sum(dim=1))
        sizes = zeros.index_add(0, units[real], torch.full_like(units[real], rows.shape[1], dtype=rows.dtype))
        return sums, sizes

    def scale(self, factors: Tensor) -> None:
        """Multiply what each channel has here by its factor."""
        units = self.units.to(self.tensor.device)
        each = torch.where(units >= 0, factors[units.clamp_min(0)], 1.0)
        shape = [-1 if axis == self.axis else 1 for axis in range(self.tensor.ndim)]
        self.tensor.mul_(each.reshape(shape).to(self.tensor.dtype))


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels that go together, with all that makes them.

    Attributes:
        name: What users call the group.
        count: How many channels there are.
        slices: What they are made of.
    """

    name: str
    count: int
    slices: Sequence[Slice]

    def norms(self) -> Tensor:
        """Return the root of the mean square of what each channel is made of."""
        parts = [one.squares(self.count) for one in self.slices]
        sums, sizes = (torch.stack([part[side] for part in parts]).sum(dim=0) for side in (0, 1))
        return (sums / sizes.clamp_min(1)).sqrt()


class Penalty:
    """Steps of the proximal operators of L1 and the group lasso, one after each step of the optimizer.

    A step of the operator of λ‖w‖₁ brings each weight closer to zero by rate × λ, and those within that to zero itself
    (Daubechies et al., An Iterative Thresholding Algorithm, 2004). That of the group lasso (Yuan and Lin, Model
    Selection and Estimation in Regression with Grouped Variables, 2006) does so with the root of the mean square of
    all that makes a channel, so that one λ suits channels of any size; they become zero together (Wen et al.,
    Learning Structured Sparsity in Deep Neural Networks, 2016). Both come after the optimizer rather than into the
    gradient, as decay does in AdamW: zeros are exact, and not divided by Adam's second moments.

    Args:
        l1: λ of single weights.
        weights: What it is for.
        lasso: λ of channels.
        channels: What that is for.
    """

    def __init__(self, l1: float, weights: Sequence[nn.Parameter], lasso: float, channels: Sequence[Channels]) -> None:
        self._l1, self._weights = l1, list(weights)
        self._lasso, self._channels = lasso, list(channels)

    @torch.no_grad()
    def apply(self, rate: float) -> None:
        """Shrink weights, in place.

        Args:
            rate: The learning rate of the step.
        """
        for weight in self._weights:
            weight.copy_(nn.functional.softshrink(weight, rate * self._l1))
        for group in self._channels:
            norms = group.norms()
            # A channel that is zero already has no direction to shrink in.
            factors = (1 - rate * self._lasso / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
            for one in group.slices:
                one.scale(factors)

    @torch.no_grad()
    def describe(self) -> str:
        """Return what has become zero, in words."""
        parts = []
        if self._weights:
            zeros = sum(int((weight == 0).sum()) for weight in self._weights)
            parts.append(f"{zeros / sum(weight.numel() for weight in self._weights):.1%} of the weights are zero")
        if self._channels:
            norms = [group.norms() for group in self._channels]
            zeros, total = sum(int((one == 0).sum()) for one in norms), sum(len(one) for one in norms)
            parts.append(f"{zeros} of {total} channels are zero")
        return ", ".join(parts)


def penalty_of(aim: Aim, model: ir.Model, constrained: Constrained) -> Penalty | None:
    """Return the penalty that was asked for, on what trains; None where none was.

    Raises:
        UsageError: Nothing that trains can be penalized.
    """
    if not aim.l1 and not aim.group_lasso:
        return None
    weights = list(constrained.weights().values()) if aim.l1 else []
    if aim.l1 and not weights:
        raise UsageError("pass `recover`: `l1` has no weights to shrink", hint="train weights: `train=weights`")
    channels: list[Channels] = []
    if aim.group_lasso:
        trained = {
            name: tensor
            for group in constrained.parameters()
            if group.name in _OF_CHANNELS
            for name, tensor in zip(group.names, group.tensors, strict=True)
        }
        channels = penalized_channels(model, trained)
        if not channels:
            raise UsageError(
                "pass `recover`: `group_lasso` finds no channels that could be removed, of weights that train",
                hint="`graphopt inspect --groups` says which there are, and what holds the others",
            )
    return Penalty(aim.l1, weights, aim.group_lasso, channels)


def penalized_channels(model: ir.Model, trained: Mapping[str, nn.Parameter]) -> list[Channels]:
    """Return the channels that `prune-channels` could take out, each with what makes it.

    That is the rows of weights that give a channel, its biases and what normalizations multiply it by; not the columns
    of weights that read it, which multiply zeros once it is zero.

    Args:
        model: A model in canonical form.
        trained: Name of a constant to its parameter.
    """
    infer_shapes(model)
    found = []
    for group in channel_groups(model).groups:
        slices = _slices(group, trained)
        if slices and group.writers and all(layer.weight.name in trained for layer in group.writers):
            found.append(Channels(group.name, group.size, slices))
    return found


def _slices(group: ChannelGroup, trained: Mapping[str, nn.Parameter]) -> list[Slice]:
    read = {input_axis(layer) for layer in group.readers}
    return [
        Slice(trained[axis.value.name or ""], axis.axis, _units(units))
        for axis, units in group.axes.items()
        if (axis.value.name or "") in trained and axis not in read
    ]


def _units(units: Array) -> Tensor:
    return torch.from_numpy(np.array(units, np.int64))
