"""What `compare --layers` found, as tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from graphopt.comparing.layer_errors import Depth, LayerComparison, LayerError
from graphopt.comparison import SQNR_CEILING_DB
from graphopt.listing import Listing, Sheet

# Lines of the table of depths, the bar of one at the ceiling, and the most changes that are told of one layer.
_DEPTH_LINES, _BAR, _CHANGES_SHOWN = 16, 30, 5
# More dB than this is rounding of float32 at most: the bar is full.
_FULL_BAR_DB = 120.0
_FAULTS_SHOWN = 8


def listing_of(found: LayerComparison, worst: int, *, verbose: bool = False) -> Listing:
    """Return what people read: outputs, worst layers, SQNR by depth, and what that comes to.

    Args:
        found: What was found.
        worst: How many layers to name.
        verbose: Whether every layer is listed, in order.
    """
    sheets = [_layers("output", [one for one in found.layers if one.is_output], names=True)]
    if verbose:
        sheets.append(_layers("value", found.layers, names=True))
    elif found.worst(worst):
        sheets.append(_layers("worst layers", found.worst(worst)))
    depths = found.by_depth()
    if any(depth.lowest_db < SQNR_CEILING_DB for depth in depths):
        sheets.append(_depths(depths))
    return Listing([sheet for sheet in sheets if sheet.rows], found.as_dict(), list(_remarks(found)))


def _layers(title: str, layers: Sequence[LayerError], *, names: bool = False) -> Sheet:
    """Return a table of layers by origin, or else by the names of the two values."""
    columns = [title, "operator", "depth", "SQNR", "comes in here", "max |Δ|", "max relative", "verdict"]
    numbers = ["depth", "SQNR", "comes in here", "max |Δ|", "max relative"]
    rows = [
        [
            one.origin if not names else one.name if one.other == one.name else f"{one.name} ↔ {one.other}",
            one.op_type,
            str(one.depth),
            _db(one.sqnr_db),
            "–" if one.own_sqnr_db >= SQNR_CEILING_DB else _db(one.own_sqnr_db),
            "–" if one.has_other_shape else f"{one.max_abs_error:.3g}",
            "–" if one.has_other_shape else f"{one.relative_error:.3g}",
            _verdict(one),
        ]
        for one in layers
    ]
    return Sheet(columns, rows, numbers)


def _verdict(one: LayerError) -> str:
    if one.error.mismatch is not None:
        return one.error.mismatch
    if one.error.equal:
        return "equal"
    if not one.differs:
        return "within tolerance"
    if one.judges_disagree:
        return "as the first differs by itself"
    return "DIFFERS" if one.on_the_way else "differs, made up for"


def _depths(depths: Sequence[Depth]) -> Sheet:
    size = math.ceil(len(depths) / _DEPTH_LINES)
    rows = []
    for start in range(0, len(depths), size):
        group = depths[start : start + size]
        first, last = group[0].depth, group[-1].depth
        lowest = min(one.lowest_db for one in group)
        middle = sorted(one.median_db for one in group)[len(group) // 2]
        bar = "█" * max(0, min(_BAR, round(_BAR * lowest / _FULL_BAR_DB)))
        rows.append(
            [
                str(first) if first == last else f"{first}–{last}",
                str(sum(one.layers for one in group)),
                _db(lowest),
                _db(middle),
                bar,
            ]
        )
    return Sheet(["depth", "layers", "lowest SQNR", "median", ""], rows, ["layers", "lowest SQNR", "median"])


def _remarks(found: LayerComparison) -> Iterator[str]:
    for one in found.differences[:_FAULTS_SHOWN]:
        yield f"{'FAULT' if one.is_fault else 'note'}: {one.what}"
    if len(found.differences) > _FAULTS_SHOWN:
        yield f"… and {len(found.differences) - _FAULTS_SHOWN} more such lines (`--json` has all)"
    if found.cannot_run is not None:
        yield f"stopped comparing: {found.cannot_run}"
    if found.identical:
        yield "the two models are the same, operator by operator and bit by bit: nothing was changed"
    yield from _first(found)
    if found.suspect is not None:
        yield f"look first at `{found.suspect}`"
    other = sum(one.has_other_shape for one in found.layers)
    if other:
        yield f"{other} of the values are of another shape: no errors are taken of these"
    made_up = len(found.made_up_for)
    if made_up:
        yield f"{made_up} of the values differ and are made up for further down: no output hangs on that"
    yield from _left(found)
    source = f"of `{found.source}`" if found.source is not None else "made up"
    yield f"{len(found.layers)} values compared on {found.samples} samples {source}"


def _first(found: LayerComparison) -> Iterator[str]:
    first = found.first_diverging
    if first is None:
        if found.layers and found.cannot_run is None and not any(one.kind == "output" for one in found.faults):
            yield "no output differs beyond the tolerance"
        return
    if found.judges_disagree:
        assert found.judges is not None, "judges that disagree were asked"
        a, b = found.judges
        yield f"nobody is blamed: the first model by itself differs as much between {a} and {b}"
    how = first.error.mismatch or (
        f"{_db(first.sqnr_db)}, off by up to {first.max_abs_error:.3g}, {first.relative_error:.3g} of the largest value"
    )
    yield f"first diverging: `{first.name}` ({first.op_type}, depth {first.depth}): {how}"
    for change in first.changes[:_CHANGES_SHOWN]:
        yield f"  {change}"
    if first.judges_disagree:
        yield "  where the first model by itself differs as much, run in another way"


def _left(found: LayerComparison) -> Iterator[str]:
    if told := str(found.left):
        yield f"values not compared: {told}"


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "–"
