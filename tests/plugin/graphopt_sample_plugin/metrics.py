"""A metric against the original's outputs."""

from __future__ import annotations

import numpy as np

from graphopt.data import Batch
from graphopt.metrics import Metric, Outputs


class Gap(Metric):
    """Largest difference of any output from the original's."""

    name, help, higher_is_better, against_original = "sample-gap", "largest difference of any output", False, True

    def __init__(self) -> None:
        self.largest = 0.0

    def update(self, outputs: Outputs, original: Outputs, batch: Batch) -> None:
        """Look at one batch."""
        gaps = [float(np.abs(outputs[name] - original[name]).max()) for name in outputs]
        self.largest = max(self.largest, *gaps)

    def value(self) -> float:
        """Return the largest gap so far."""
        return self.largest
