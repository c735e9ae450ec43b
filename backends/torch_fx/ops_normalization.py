"""Normalizations: by batch, instance, layer, group, root mean square, neighbourhood, norm.

Where an operator says what its statistics are computed in (``stash_type``), it is that; elsewhere at least float32,
as in every runtime.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table
from .tensors import torch_dtype

_FLOAT32 = 1  # ONNX's code
# Put by ONNX's definition of MeanVarianceNormalization beside the deviation it divides by.
_MEAN_VARIANCE_EPSILON = 1e-9


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by statistics of each channel, those given or in training mode those of the input."""
    if not training_mode:
        return _by_statistics(x, scale, bias, mean, variance, epsilon), mean, variance
    wide = x.to(mean.dtype)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    now_variance, now_mean = torch.var_mean(wide, axes, correction=0)
    found = _by_statistics(x, scale, bias, now_mean, now_variance, epsilon)
    return (
        found,
        mean * momentum + now_mean * (1 - momentum),
        variance * momentum + now_variance * (1 - momentum),
    )


def batch_normalization_before_14(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Normalize by given statistics of each channel, or where more than the result is asked for, by the input's."""
    if not spatial:
        raise NotImplementedError("BatchNormalization: with statistics of each place of a channel")
    training = int(outputs > 1)
    found = batch_normalization(
        x, scale, bias, mean, variance, epsilon=epsilon, momentum=momentum, training_mode=training
    )
    if not training:
        return found
    axes = [axis for axis in range(x.ndim) if axis != 1]
    now_variance, now_mean = torch.var_mean(x, axes, correction=0)
    return (*found, now_mean, now_variance)


def _by_statistics(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    fixed = not (mean.requires_grad or variance.requires_grad)  # torch's kernel has no gradients of statistics
    alike = scale.dtype == bias.dtype == mean.dtype == variance.dtype
    half = scale.dtype == torch.float32 and x.dtype.itemsize == 2
    if fixed and alike and x.ndim > 1 and (half or scale.dtype == x.dtype):
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    shape = (1, -1, *[1] * (x.ndim - 2)) if x.ndim > 1 else (1,)
    factor = scale.to(mean.dtype) * torch.rsqrt(variance + epsilon)
    moved = x.to(mean.dtype) - mean.reshape(shape)
    return (moved * factor.reshape(shape) + bias.reshape(shape)).to(x.dtype)


def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalize each channel of each sample."""
    return _by_groups(x, x.shape[1], scale, bias, epsilon)


def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int, stash_type: int = _FLOAT32
) -> Tensor:
    """Normalize groups of channels of each sample; scale and bias are of channels."""
    return _by_groups(x, num_groups, scale, bias, epsilon)


def group_normalization_before_21(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int
) -> Tensor:
    """Normalize groups of channels of each sample; scale and bias are of groups."""
    each = x.shape[1] // num_groups
    return _by_groups(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


def _by_groups(x: Tensor, groups: int, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    # Not the function of torch.nn.functional: it refuses single elements as if it were training.
    return torch.group_norm(x, groups, scale, bias, epsilon)


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = _FLOAT32,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Normalize all axes from one on; gives the mean and the reciprocal of the deviation, too."""
    shape = x.shape[axis:]
    whole = scale.shape == shape and (bias is None or bias.shape == shape)
    if outputs == 1 and whole and x.dtype == scale.dtype and stash_type == _FLOAT32:
        return (F.layer_norm(x, shape, scale, bias, epsilon),)
    axes = list(range(axis % x.ndim, x.ndim))
    wide = x.to(_stash(x, stash_type))
    mean = torch.mean(wide, axes, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt(torch.mean(centred * centred, axes, keepdim=True) + epsilon)
    found = (centred * inverse).to(x.dtype) * scale
    return (found if bias is None else found + bias), mean, inverse


def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = _FLOAT32
) -> Tensor:
    """Divide by the root of the mean square over all axes from one on."""
    axes = list(range(axis % x.ndim, x.ndim))
    wide = x.to(_stash(x, stash_type))
    inverse = torch.rsqrt(torch.mean(wide * wide, axes, keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale


def _stash(x: Tensor, code: int) -> torch.dtype:
    """Return the type to compute statistics in: the one asked for, though never a narrower one than the input's."""
    return torch.promote_types(x.dtype, torch_dtype(code))


def lrn(x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int) -> Tensor:
    """Normalize by the squares of neighbouring channels."""
    before = (size - 1) // 2
    rest = [0, 0] * (x.ndim - 2)
    squares = F.pad(x * x, [*rest, before, size - 1 - before])
    around = squares.unfold(1, size, 1).sum(-1)
    return x / torch.pow(bias + alpha / size * around, beta)


def mean_variance_normalization(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Normalize along axes to mean 0 and variance 1."""
    if x.numel() == 0:
        return x
    along = axes or [0, 2, 3]
    variance, mean = torch.var_mean(x, along, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + _MEAN_VARIANCE_EPSILON)


def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the p-norm along an axis; what has none stays zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


OPERATORS: Table = {
    "BatchNormalization": (Operator(batch_normalization_before_14, since=7), Operator(batch_normalization, since=14)),
    "GroupNormalization": (
        Operator(group_normalization_before_21, since=18),
        Operator(group_normalization, since=21),
    ),
    "InstanceNormalization": Operator(instance_normalization, since=6),
    "LRN": Operator(lrn),
    "LayerNormalization": Operator(layer_normalization, since=17),
    "LpNormalization": Operator(lp_normalization),
    "MeanVarianceNormalization": Operator(mean_variance_normalization, since=9),
    "RMSNormalization": Operator(rms_normalization, since=23),
}
