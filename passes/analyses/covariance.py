"""Mean and covariance of rows, streamed."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array


class Covariance:
    """Mean and covariance of the rows of some groups.

    Rows are taken around the mean of the first ones, and sums are float64: E[x xᵀ] − E[x] E[x]ᵀ in float32 loses all
    digits, and even its sign, where the mean is far from zero and the spread small (Chan et al., Algorithms for
    Computing the Sample Variance, 1983).
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = self._products = np.zeros(())

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
        moment = self._products / self.count - shift[:, :, None] * shift[:, None, :]
        diagonal = np.arange(moment.shape[1])
        moment[:, diagonal, diagonal] = np.maximum(moment[:, diagonal, diagonal], 0.0)
        found: Array = moment.astype(np.float32)
        return found

    def second(self) -> Array:
        """Return E[x xᵀ], float32 [groups, inputs, inputs]."""
        mean = self.mean()
        found: Array = (self.covariance() + mean[:, :, None] * mean[:, None, :]).astype(np.float32)
        return found
