"""Activations, and the soft and hard choices among classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table

# Beyond it softplus is taken to be the identity; it differs by less than any of the float types holds.
_SOFTPLUS_THRESHOLD = 40.0


def relu(x: Tensor) -> Tensor:
    """max(0, x)."""
    return torch.relu(x)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """Return x, or alpha x where it is negative."""
    return F.leaky_relu(x, alpha)


def p_relu(x: Tensor, slope: Tensor) -> Tensor:
    """Return x, or slope x where it is negative."""
    return torch.where(x < 0, x * slope, x) if x.dtype.is_signed else x


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x where it is more than alpha, and 0 elsewhere."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x, or alpha (eˣ - 1) where it is negative."""
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x, or alpha (e^(x / alpha) - 1) where it is negative."""
    return F.celu(x, alpha)


def selu(x: Tensor, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Tensor:
    """Return gamma times the ELU of x."""
    return gamma * F.elu(x, alpha)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e⁻ˣ)."""
    return torch.sigmoid(x)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Return alpha x + beta kept within 0 and 1."""
    return torch.clamp(alpha * x + beta, 0, 1)


def hard_swish(x: Tensor) -> Tensor:
    """Return x times (x / 6 + 1/2) kept within 0 and 1."""
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x sigmoid(alpha x)."""
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def swi_glu(gate: Tensor, value: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return the value times the Swish of its gate."""
    return swish(gate, alpha=alpha) * value


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangents."""
    return torch.tanh(x)


def softplus(x: Tensor) -> Tensor:
    """ln(1 + eˣ)."""
    return F.softplus(x, threshold=_SOFTPLUS_THRESHOLD)


def softsign(x: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return F.softsign(x)


def mish(x: Tensor) -> Tensor:
    """Return x tanh(softplus(x))."""
    return F.mish(x)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return x times the normal distribution function of x, or tanh's approximation of it."""
    return F.gelu(x, approximate=approximate)


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Return what is farther from zero than lambd, moved towards it by bias, and 0 for the rest."""
    below, above = (x + bias).to(x.dtype), (x - bias).to(x.dtype)
    return torch.where(x < -lambd, below, torch.where(x > lambd, above, torch.zeros_like(x)))


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Shares along an axis."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Logarithms of shares along an axis."""
    return torch.log_softmax(x, axis)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return 1 at the first of the largest elements along an axis, and 0 elsewhere."""
    if x.numel() == 0:
        return x
    place = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, place, 1)


# Before version 13 all axes from the given one on were taken together.


def flat_softmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """Shares among all elements from an axis on."""
    return softmax(_flattened(x, axis)).reshape(x.shape)


def flat_log_softmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """Logarithms of shares among all elements from an axis on."""
    return log_softmax(_flattened(x, axis)).reshape(x.shape)


def flat_hardmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """Return 1 at the first of the largest elements from an axis on, and 0 elsewhere."""
    return hardmax(_flattened(x, axis)).reshape(x.shape)


def _flattened(x: Tensor, axis: int) -> Tensor:
    """Return the elements in two axes: those before the given one, and it with those behind."""
    axis += x.ndim if axis < 0 else 0
    rows = x.shape[:axis].numel()
    return x.reshape(rows, x.shape[axis:].numel())


OPERATORS: Table = {
    "Celu": Operator(celu, since=12),
    "Elu": Operator(elu, since=6),
    "Gelu": Operator(gelu, since=20),
    "HardSigmoid": Operator(hard_sigmoid, since=6),
    "HardSwish": Operator(hard_swish, since=14),
    "Hardmax": (Operator(flat_hardmax), Operator(hardmax, since=13)),
    "LeakyRelu": Operator(leaky_relu, since=6),
    "LogSoftmax": (Operator(flat_log_softmax), Operator(log_softmax, since=13)),
    "Mish": Operator(mish, since=18),
    "PRelu": Operator(p_relu, since=7),
    "Relu": Operator(relu, since=6),
    "Selu": Operator(selu, since=6),
    "Shrink": Operator(shrink, since=9),
    "Sigmoid": Operator(sigmoid, since=6),
    "Softmax": (Operator(flat_softmax), Operator(softmax, since=13)),
    "Softplus": Operator(softplus),
    "Softsign": Operator(softsign),
    "SwiGLU": Operator(swi_glu, since=28),
    "Swish": Operator(swish, since=24),
    "Tanh": Operator(tanh, since=6),
    "ThresholdedRelu": Operator(thresholded_relu, since=10),
}
