"""BatchNormalization at inference, as one scale and one shift for each channel."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array
from graphopt.pattern import Match, Miss

_FIRST_OPSET_WITH_TRAINING_MODE = 14
STATISTICS = ("gamma", "beta", "mean", "var")


def training(m: Match) -> Miss | None:
    """Return why the BatchNormalization ``m.bn`` is not the same at every run, or None."""
    if m.bn.attributes.get_int("training_mode", 0):
        return Miss("is in training mode", m.bn)
    if any(value.uses() or value.is_graph_output() for value in m.bn.outputs[1:]):
        return Miss("its running statistics are read", m.bn)
    # Before there was an attribute for it, more outputs than one meant training.
    if m.opset < _FIRST_OPSET_WITH_TRAINING_MODE and any(value.name for value in m.bn.outputs[1:]):
        return Miss("is in training mode", m.bn)
    if not m.all_constant(*STATISTICS):
        return Miss("needs constant statistics", m.bn)
    return None


def scale_and_shift(m: Match, channels: int) -> tuple[Array, Array] | Miss:
    """Return s and t of BN(x) = s·x + t as float64 [channels]: s = gamma / sqrt(var + epsilon), t = beta − mean·s.

    They come from the constants that the pattern variables ``gamma``, ``beta``, ``mean`` and ``var`` hold.
    """
    gamma, beta, mean, var = (m.array(name).astype(np.float64) for name in STATISTICS)
    if any(statistic.shape != (channels,) for statistic in (gamma, beta, mean, var)):
        return Miss("its statistics are not one number for each channel", m.bn)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(var + m.bn.attributes.get_float("epsilon", 1e-5))
        return scale, beta - mean * scale
