"""Constraints held while training: what a model may not lose is built into the module, so that no step can break it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from graphopt import walk
from graphopt.backend import Array

from .constraint_checks import check_stored
from .held import ADAPTERS, Held
from .kept_constants import Kept, KeptZeros
from .placement import Placement
from .stored_weights import as_array
from .trainable import BIAS, NORM, SCALE, TABLE, WEIGHT, ZERO_POINT

# Decay pulls weights towards zero, which for all else is no neutral place.
_DECAYS = (WEIGHT, ADAPTERS)
_ORDER = (WEIGHT, ADAPTERS, BIAS, NORM, TABLE, SCALE, ZERO_POINT)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike.

    Attributes:
        name: What they are, of `KINDS`.
        rate: What the learning rate is multiplied by.
        decay: Whether weight decay applies.
        names: What each is called: the constant it stands for, with ``.A`` and ``.B`` for adapters.
        tensors: The parameters, float32 or float64, in memory of their own.
    """

    name: str
    rate: float
    decay: bool
    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]
