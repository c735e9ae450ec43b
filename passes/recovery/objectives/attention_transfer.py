"""Attention transfer: where the student looks drawn to where the teacher looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from graphopt import walk
from graphopt.errors import PassError
from graphopt.explaining.codes import is_dequantize, is_quantize
from graphopt.fragment import constant_content
from graphopt.shapes import dims_of

from .cut_values import thinned
from .scores import token_items
from .terms import Items, Term, Values
from .value_pairs import MOST_PLACES, paired, pairs_at_blocks

if TYPE_CHECKING:
    from ..training.samples import TrainingBatch

# What may stand between attention weights and the product they are for.
_BETWEEN = ("Cast", "Dropout", "Expand", "Identity", "Reshape", "Where")
_RANK = 4  # [rows, heads, queries, keys], and [rows, channels, rows, columns] of images


class AttentionWeights(Term):
    """KL(teacher ‖ student) of attention weights, averaged over heads and queries.

    This is the attention transfer of MiniLM (Wang et al., MiniLM: Deep Self-Attention Distillation, 2020, section 3.1),
    in several layers. Where heads were removed, it is the mean over heads that is compared.

    Args:
        mine: Name of the student's weights, [rows, heads, queries, keys].
        theirs: Name of the teacher's.
        items: Rows, or queries that are no padding.
        weight: Its weight in the loss.
    """

    measure = "KL of attention"
    reads_teacher = True

    def __init__(self, mine: str, theirs: str, items: Items, weight: float) -> None:
        self._mine, self._theirs = mine, theirs
        self.name, self.subject = f"attention {theirs}", theirs
        self.items, self.weight = items, weight
        self.student, self.teacher = (mine,), (theirs,)

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over items, in nats."""
        mine, theirs = student[self._mine].float(), teacher[self._theirs].float()
        if mine.shape[1] != theirs.shape[1]:
            mine, theirs = mine.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)
        smallest = torch.finfo(torch.float32).tiny
        gaps = torch.xlogy(theirs, theirs) - theirs * torch.log(mine.clamp_min(smallest))
        return self.items.total(gaps.sum(dim=-1).movedim(1, -1), batch)


class AttentionMap(Term):
    """Squared distance of normalized attention maps: for each pixel of a feature map, the mean square of its channels.

    Any number of channels will do on either side (Zagoruyko and Komodakis, Paying More Attention to Attention, 2017,
    equation 2).

    Args:
        mine: Name of the student's feature map, [rows, channels, rows, columns].
        theirs: Name of the teacher's.
        weight: Its weight in the loss.
    """

    measure = "attention map"
    reads_teacher = True

    def __init__(self, mine: str, theirs: str, weight: float) -> None:
        self._mine, self._theirs = mine, theirs
        self.name, self.subject = f"attention {theirs}", theirs
        self.weight = weight
        self.student, self.teacher = (mine,), (theirs,)

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over rows, each from 0 to 2."""
        mine, theirs = (_attention_map(side) for side in (student[self._mine], teacher[self._theirs]))
        return self.items.total((mine - theirs).square().sum(dim=1), batch)


def _attention_map(values: Tensor) -> Tensor:
    return functional.normalize(values.float().square().mean(dim=1).flatten(1), dim=1)


def attention_terms(student: ir.Model, teacher: ir.Model, weight: float) -> list[Term]:
    """Return a term for each of some attention weights, or else feature maps, which share the weight evenly.

    Raises:
        PassError: There is neither in both models.
    """
    pairs = paired(teacher, student)
    found = [(theirs, mine) for theirs, mine in pairs.items() if _is_attention(theirs) and _is_attention(mine)]
    if found:
        chosen = thinned(found, MOST_PLACES)
        return [
            AttentionWeights(mine.name or "", theirs.name or "", _queries(student, mine), weight / len(chosen))
            for theirs, mine in chosen
        ]
    maps = [pair for pair in pairs_at_blocks(teacher, student, _is_image) if _same_pixels(*pair)]
    if maps:
        return [AttentionMap(mine.name or "", theirs.name or "", weight / len(maps)) for theirs, mine in maps]
    raise PassError(
        "pass `recover`: neither attention weights nor feature maps are in both models",
        hint="one operator for all of an attention shows no weights; use `features`",
    )


def _is_attention(value: ir.Value) -> bool:
    """Return whether a value is the Softmax of an attention: it is multiplied by what is no weight."""
    node = value.producer()
    if node is None or not walk.is_onnx_op(node, "Softmax") or len(dims_of(value) or ()) != _RANK:
        return False
    return any(_is_weighted_sum(reader, read) for reader, read in _readers(value))


def _readers(value: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    """Return what reads a value, behind views and codes, each with what it reads."""
    found, stack = [], [value]
    while stack:
        read = stack.pop()
        for use in read.uses():
            if walk.is_onnx_op(use.node, *_BETWEEN) or is_quantize(use.node) or is_dequantize(use.node):
                stack.append(use.node.outputs[0])
            else:
                found.append((use.node, read))
    return found


def _is_weighted_sum(node: ir.Node, read: ir.Value) -> bool:
    if not walk.is_onnx_op(node, "MatMul", "Einsum"):
        return False
    others = [value for value in node.inputs if value is not None and value is not read]
    return any(constant_content(value) is None for value in others)


def _queries(model: ir.Model, value: ir.Value) -> Items:
    dims = dims_of(value)
    return token_items(model, (dims[0], dims[2])) if dims is not None else Items()


def _is_image(value: ir.Value) -> bool:
    dims = dims_of(value)
    return dims is not None and len(dims) == _RANK and dims[2:] != (1, 1)


def _same_pixels(theirs: ir.Value, mine: ir.Value) -> bool:
    first, second = dims_of(theirs), dims_of(mine)
    return first is not None and second is not None and len(second) == _RANK and first[2:] == second[2:]
