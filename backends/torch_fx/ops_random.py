"""Operators that draw at random.

With a seed each draw starts from it anew, so the same values come every time; without one, torch's own generator goes
on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import Operator, Table
from .tensors import torch_dtype

_FLOAT32, _INT32 = 1, 6  # ONNX's codes


def _generator(seed: float | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


def random_normal(
    *,
    shape: list[int],
    dtype: int = _FLOAT32,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    device: torch.device,
) -> Tensor:
    """Draws of a normal distribution."""
    drawn = torch.randn(shape, generator=_generator(seed, device), device=device)
    return (drawn * scale + mean).to(torch_dtype(dtype))


def random_uniform(
    *,
    shape: list[int],
    dtype: int = _FLOAT32,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
    device: torch.device,
) -> Tensor:
    """Draws of a uniform distribution."""
    drawn = torch.rand(shape, generator=_generator(seed, device), device=device)
    return (drawn * (high - low) + low).to(torch_dtype(dtype))


def random_normal_like(
    x: Tensor, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Draws of a normal distribution, as many as another tensor has elements."""
    drawn = torch.randn(x.shape, generator=_generator(seed, x.device), device=x.device)
    return (drawn * scale + mean).to(x.dtype if dtype is None else torch_dtype(dtype))


def random_uniform_like(
    x: Tensor, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    """Draws of a uniform distribution, as many as another tensor has elements."""
    drawn = torch.rand(x.shape, generator=_generator(seed, x.device), device=x.device)
    return (drawn * (high - low) + low).to(x.dtype if dtype is None else torch_dtype(dtype))


def bernoulli(x: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """Ones with the probabilities given, and zeros."""
    drawn = torch.bernoulli(x.to(torch.float32), generator=_generator(seed, x.device))
    return drawn.to(x.dtype if dtype is None else torch_dtype(dtype))


def multinomial(x: Tensor, *, dtype: int = _INT32, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes drawn with the probabilities of which the logarithms are given."""
    shares = torch.softmax(x.to(torch.float32), -1)
    drawn = torch.multinomial(shares, sample_size, replacement=True, generator=_generator(seed, x.device))
    return drawn.to(torch_dtype(dtype))


def dropout(
    x: Tensor, ratio: Tensor | None = None, training_mode: Tensor | None = None, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Drop a share of the elements and scale up the rest, where the model asks for training; else pass them on.

    A model that is recovered runs as it is deployed: this is not switched on by training it.
    """
    share = 0.5 if ratio is None else ratio.item()
    if training_mode is None or not training_mode.item() or share == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = torch.rand(x.shape, generator=_generator(seed, x.device), device=x.device) >= share
    return x * kept.to(x.dtype) / (1 - share), kept


def dropout_before_12(x: Tensor, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pass the elements on; what the mask holds then is left open, in ONNX Runtime it is False."""
    return x, torch.zeros_like(x, dtype=torch.bool)


def dropout_before_10(x: Tensor, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pass the elements on; the mask has their type."""
    return x, torch.zeros_like(x)


OPERATORS: Table = {
    "Bernoulli": Operator(bernoulli, since=15),
    "Dropout": (
        Operator(dropout_before_10, since=7),
        Operator(dropout_before_12, since=10),
        Operator(dropout, since=12, sizes=(1, 2)),
    ),
    "Multinomial": Operator(multinomial, since=7),
    "RandomNormal": Operator(random_normal),
    "RandomNormalLike": Operator(random_normal_like),
    "RandomUniform": Operator(random_uniform),
    "RandomUniformLike": Operator(random_uniform_like),
}
