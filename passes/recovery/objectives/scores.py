"""Which outputs of a model are scores of classes, and where their logits are found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt import walk
from graphopt.data import Batch
from graphopt.explaining.codes import is_dequantize, is_quantize
from graphopt.metrics import KL, default_metrics
from graphopt.shapes import dims_of
from graphopt.token_inputs import mask_of, token_input

from ...analyses.linear_layers import LINEAR_OPS
from .terms import Items, Values, class_scores

if TYPE_CHECKING:
    from ..training.samples import TrainingBatch

# Probabilities below this say no more than that they are small; the metric KL has the same floor.
SMALLEST_SHARE = 1e-12
# From this on Softmax is about one axis; before, it was about all axes from one on.
_SOFTMAX_OPSET = 13
# What may stand between an operator and the output of a model without changing what it holds.
_VIEWS = ("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
# Names under which exporters hand out scores of classes.
_SCORES = re.compile(r"(logits?|probs?|probabilit(y|ies)|scores?)\b|.*[._](logits?|probs?|probabilities)\b", re.I)
# A sole output of a linear layer with as many values is taken for classes; fewer may be coordinates.
_CLASSES_AT_LEAST = 10
# Operators behind which scores are no probabilities, as long as nobody says so of a model.
_LOGITS = ("Add", "GlobalAveragePool", "LogSoftmax", *LINEAR_OPS)
# How far probabilities may be from a sum of 1; the metric KL allows as much.
_SUM_TOLERANCE = 1e-3
_IMAGE_RANK = 4
_TOKEN_RANK = 3


@dataclass(frozen=True)
class Scores:
    """Where scores of classes are read.

    Attributes:
        output: The output they belong to.
        value: The value that is read: the output, or the logits it is the Softmax of.
        are_shares: Whether these are probabilities.
        is_known: Whether that is known of the model, without a look at what it gives.
    """

    output: str
    value: str
    are_shares: bool = False
    is_known: bool = True

    @property
    def observed(self) -> tuple[str, ...]:
        """What must be observed besides outputs."""
        return (self.value,) if self.value != self.output else ()

    def settled(self, values: Values, batch: TrainingBatch) -> Scores:
        """Return the same, knowing of a batch whether it holds probabilities, as the metrics know it."""
        if self.is_known:
            return self
        scores = class_scores(batch.real(values[self.value]))
        sums = scores.sum(dim=-1)
        shares = bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=_SUM_TOLERANCE)
        return replace(self, are_shares=shares)

    def logits(self, values: Values) -> Tensor:
        """Return logits, float32 [rows, ..., classes]; those of probabilities are their logarithms."""
        scores = class_scores(values[self.value])
        return torch.log(scores.clamp_min(SMALLEST_SHARE)) if self.are_shares else scores


def scores_of(model: ir.Model, output: ir.Value) -> Scores:
    """Return where the scores are read that an output of classes stands for."""
    name = output.name or ""
    node = _maker(output)
    if node is None or not walk.is_onnx_op(node, "Softmax"):
        return Scores(name, name, is_known=node is not None and walk.is_onnx_op(node, *_LOGITS))
    rank = len(output.shape) if output.shape is not None else None
    axis = node.attributes.get_int("axis", -1)
    direct = node.outputs[0] is output and rank is not None and walk.opset(model) >= _SOFTMAX_OPSET
    if direct and rank is not None and axis % rank == (1 if rank >= _IMAGE_RANK else rank - 1):
        read = node.inputs[0]
        if read is not None and read.name and walk.constant_tensor(read) is None and not read.is_graph_input():
            return Scores(name, read.name)
    return Scores(name, name, are_shares=True)


def holds_classes(model: ir.Model, output: ir.Value, specimen: Batch) -> bool:
    """Return whether an output is scores of classes, of which one is right, rather than numbers of another kind."""
    dims = dims_of(output)
    if dims is None or len(dims) < 2 or output.dtype is None or not output.dtype.is_floating_point():
        return False
    node = _maker(output)
    if node is not None and (walk.is_onnx_op(node, "Softmax", "LogSoftmax") or _is_softmax_in_parts(node)):
        return True
    if node is not None and walk.is_onnx_op(node, "Sigmoid"):
        return False  # each class by itself: several may be right, or none
    if _SCORES.match(output.name or ""):
        return True
    if node is None or not walk.is_onnx_op(node, *_LOGITS):
        return False  # an activation or a normalization: no logits
    if output is model.graph.outputs[0] and KL in default_metrics(model, specimen):
        return True
    classes = dims[1] if len(dims) >= _IMAGE_RANK else dims[-1]
    alone = sum(1 for one in model.graph.outputs if one.dtype is not None and one.dtype.is_floating_point()) == 1
    return alone and all(dim == 1 for dim in dims[2:]) and isinstance(classes, int) and classes >= _CLASSES_AT_LEAST


def _is_softmax_in_parts(node: ir.Node) -> bool:
    numerator = node.inputs[0].producer() if walk.is_onnx_op(node, "Div") and node.inputs[0] is not None else None
    return numerator is not None and walk.is_onnx_op(numerator, "Exp")


def _maker(output: ir.Value) -> ir.Node | None:
    """Return the operator that makes an output, behind views and codes."""
    node = output.producer()
    while node is not None and (walk.is_onnx_op(node, *_VIEWS) or is_dequantize(node) or is_quantize(node)):
        read = node.inputs[0]
        node = read.producer() if read is not None else None
    return node


def items_of(model: ir.Model, output: ir.Value, *, shifted: bool = False) -> Items:
    """Return what is counted of an output: tokens where it holds something for each of an input's, else rows."""
    dims = dims_of(output)
    if dims is None or len(dims) < _TOKEN_RANK:
        return Items()
    return token_items(model, dims[:2], shifted=shifted)


def scored_tokens(model: ir.Model, output: ir.Value, *, shifted: bool = False) -> Items:
    """Return the token ids that an output may score, [rows, tokens, vocabulary]; rows where it cannot.

    Of many exporters its sizes have names of their own, or are those of a mask: only numbers contradict each other.
    """
    dims, given = dims_of(output), dims_of(token_input(model))
    if dims is None or given is None or len(dims) != _TOKEN_RANK:
        return Items()
    pairs = zip(dims, given, strict=False)
    if any(isinstance(scored, int) and isinstance(fed, int) and scored != fed for scored, fed in pairs):
        return Items()
    return token_items(model, given, shifted=shifted)


def token_items(model: ir.Model, sizes: Sequence[object], *, shifted: bool = False) -> Items:
    """Return tokens as what is counted where two axes of some value are those of the token ids, else rows."""
    tokens = token_input(model)
    given = dims_of(tokens)
    if tokens is None or given is None or tuple(sizes) != tuple(given):
        return Items()
    mask = mask_of(model, tokens.name or "")
    return Items(tokens.name, mask.name if mask is not None else None, shifted=shifted)
