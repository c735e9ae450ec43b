"""Mean and covariance of rows, streamed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphopt.backend import Array

# Numbers of a matrix brought to float64 at once, 1 MB: of inputs by the thousand, a few such matrices are hundreds.
_AT_ONCE = 1 << 17


class Covariance:
    """Mean and covariance of the rows of some groups.

    Rows are taken around the mean of the first ones, and sums are float64: E[x xᵀ] − E[x] E[x]ᵀ in float32 loses all
    digits, and even its sign, where the mean is far from zero and the spread small (Chan et al., Algorithms for
    Computing the Sample Variance, 1983).
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = np.zeros(())
        self._products: Array = np.zeros(())

    def update(self, rows: Array) -> None:
        """Add rows, float32 [groups, rows, inputs]."""
        if rows.shape[1] == 0:
            return
        if self.count == 0:
            self._origin = rows.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
            inputs = rows.shape[2]
            self._products = np.zeros((len(rows), inputs, inputs))
        with np.errstate(all="ignore"):  # what overflows is not finite, which `is_known` tells
            centred = rows - self._origin
            self._products += centred.transpose(0, 2, 1) @ centred
            self._sum = self._sum + centred.sum(axis=1, dtype=np.float64)
        self.count += rows.shape[1]

    @property
    def is_known(self) -> bool:
        """Whether there were rows, and all of them finite."""
        return self.count > 0 and bool(np.isfinite(self._products).all())

    def mean(self) -> Array:
        """Return E[x], float64 [groups, inputs]."""
        mean: Array = self._origin[:, 0].astype(np.float64) + self._sum / self.count
        return mean

    def covariance(self) -> Array:
        """Return E[(x − E[x]) (x − E[x])ᵀ], float32 [groups, inputs, inputs]; its diagonal is never negative."""
        shift = self._sum / self.count
        found: Array = np.empty(self._products.shape, np.float32)
        for part in parts(found.shape[1]):
            found[:, part] = self._products[:, part] / self.count - shift[:, part, None] * shift[:, None, :]
        diagonal = np.arange(found.shape[1])
        found[:, diagonal, diagonal] = np.maximum(found[:, diagonal, diagonal], 0.0)
        return found

    def second(self) -> Array:
        """Return E[x xᵀ], float32 [groups, inputs, inputs]."""
        return around_zero(self.covariance(), self.mean())


def around_zero(covariance: Array, mean: Array) -> Array:
    """Return E[x xᵀ], float32 [groups, inputs, inputs], in the place of a covariance, from it and E[x].

    Args:
        covariance: float32 [groups, inputs, inputs], overwritten.
        mean: float64 [groups, inputs].
    """
    for part in parts(mean.shape[1]):
        covariance[:, part] = covariance[:, part] + mean[:, part, None] * mean[:, None, :]
    return covariance


def parts(inputs: int) -> Iterator[slice]:
    """Yield rows of matrices [inputs, inputs], so many at a time as are worked on at once."""
    step = max(1, _AT_ONCE // max(inputs, 1))
    return (slice(start, start + step) for start in range(0, inputs, step))
