"""Operators on boxes in images.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`. ImageDecoder is not
among them: it takes files apart, for which torch has nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import Operator, Table


def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Tensor | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Which boxes are left where of those that overlap the best stays: rows of batch, class, box."""
    most = 0 if max_output_boxes_per_class is None else int(max_output_boxes_per_class.item())
    overlap = 0.0 if iou_threshold is None else float(iou_threshold.item())
    least = None if score_threshold is None else float(score_threshold.item())
    # One box is compared after the other: on a GPU each would be waited for.
    corners, values = _corners(boxes, bool(center_point_box)).cpu(), scores.cpu()
    found = [
        [batch, kind, box]
        for batch in range(scores.shape[0])
        for kind in range(scores.shape[1])
        for box in _kept(corners[batch], values[batch, kind], most, overlap, least)
    ]
    return torch.tensor(found, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """Return boxes as their lower and upper corners, however they are given."""
    if centred:
        middle, half = boxes[..., :2], boxes[..., 2:] / 2
        return torch.cat([middle - half, middle + half], -1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _kept(boxes: Tensor, scores: Tensor, most: int, overlap: float, least: float | None) -> list[int]:
    order = torch.sort(scores, descending=True, stable=True).indices
    if least is not None:
        order = order[scores[order] > least]
    kept: list[int] = []
    while order.numel() and len(kept) < most:
        kept.append(int(order[0].item()))
        order = order[1:]
        order = order[_overlaps(boxes[kept[-1]], boxes[order]) <= overlap]
    return kept


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Return the areas that a box shares with others, over those of both together; 0 where there is none."""
    lower, upper = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    shared = (upper - lower).clamp(min=0).prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(shared))


OPERATORS: Table = {
    "NonMaxSuppression": Operator(non_max_suppression, since=10, sizes=(2, 3, 4)),
}
