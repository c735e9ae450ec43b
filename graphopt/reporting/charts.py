"""The charts of a report page, in Bokeh: their colours are the page's, which has a light and a dark theme."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from graphopt.comparing.layer_comparison import LayerComparison, LayerError
from graphopt.comparison import SQNR_CEILING_DB
from graphopt.report import Report, StepRecord, show_bytes
from graphopt.reporting.findings import LayerCost, OperatorShare, OperatorTime
from graphopt.reporting.trainings import Training
from graphopt.reporting.weight_histograms import WeightHistogram
from graphopt.reporting.words import how_near, operators, own_noise, show_share, worst_layers

# The light theme, by the names that the page's style sheet gives its colours. The script of the page sets those of the
# theme that is on; these are what stands there until then.
LIGHT = {
    "ink": "#1b2430",
    "muted": "#5d6978",
    "line": "#e3e8ee",
    "panel": "#ffffff",
    "before": "#a9b4c2",
    "after": "#3558d4",
    "better": "#2c8a5b",
    "worse": "#c2493d",
    "warn": "#b86a12",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
_FONT_SIZE = "12px"
# Pixels: of a row of bars, of what is around the rows, and of charts whose height does not hang on their content.
_ROW, _AROUND = 30, 22
_SCATTER_HEIGHT, _SMALL_HEIGHT, _LOSS_HEIGHT = 320, 132, 220
# A loss that falls to less than this share of itself is shown by its logarithm.
_FAR = 20
# Longer names would leave no room for the bars.
_LONGEST_NAME = 28
_WORD_ENDS = re.compile(r"(?<=[/._])")
_ROOM_FOR_LABELS = 0.4
MOST_BARS = 12
# Bars shorter than this share of the longest are put together.
_LEAST_SEEN = 0.01
# A value without any error has no SQNR; 200 dB stands for it, which would squeeze all others together.
_HIGHEST_SHOWN_DB = 100.0
# With a hundred times as much noise as signal nothing is left of a value; what is worse, or NaN, stands here, too.
_LOWEST_SHOWN_DB = -20.0
# Where all values are better than this, the difference is what rounding leaves, and shown as it is.
_GOOD_DB = 80.0
_LEAST_ROOM_DB = 10.0
# The medians of more depths than these are a thicket.
MOST_MEDIANS = 60


def steps_chart(report: Report) -> Any:
    """Return the waterfall of bytes, from the original through each step to the result."""
    steps = report.steps
    rows = [("original", 0.0, float(steps[0].bytes_before), "before")]
    rows += [_fall(number, step) for number, step in enumerate(steps, 1)]
    rows.append(("result", 0.0, float(steps[-1].bytes_after), "after"))
    texts = [show_bytes(steps[0].bytes_before), *map(_byte_change, steps), show_bytes(steps[-1].bytes_after)]
    return _waterfall(rows, texts)


def nodes_chart(report: Report) -> Any:
    """Return the waterfall of nodes, as `steps_chart` does of bytes."""
    steps = report.steps
    rows = [("original", 0.0, float(steps[0].nodes_before), "before")]
    for number, step in enumerate(steps, 1):
        # More nodes are not worse: Q and DQ run as no node of their own.
        rows.append((_step_name(number, step), *_between(step.nodes_before, step.nodes_after, more="warn")))
    rows.append(("result", 0.0, float(steps[-1].nodes_after), "after"))
    changes = [_signed(step.nodes_after - step.nodes_before) for step in steps]
    return _waterfall(rows, [str(steps[0].nodes_before), *changes, str(steps[-1].nodes_after)])


def errors_chart(report: Report) -> Any:
    """Return the noise in the outputs after each step, against the original, as a share of the signal."""
    from graphopt.metrics import SQNR

    names, values, texts = [], [], []
    for number, step in enumerate(report.steps, 1):
        decibels = step.check.metrics.get(SQNR.name)
        names.append(_step_name(number, step))
        values.append(10 ** (-decibels / 10) if decibels is not None else 0.0)
        texts.append(f"{SQNR.show(decibels)}" if decibels is not None else _unscored(step))
    return _single_bars(names, values, texts, "worse")


def _unscored(step: StepRecord) -> str:
    if step.check.ok is None:
        return "not checked"
    return {"equal": "equal", "equivalent": "equal but for rounding"}.get(step.check.kind, "failed")


def _fall(number: int, step: StepRecord) -> tuple[str, float, float, str]:
    return (_step_name(number, step), *_between(step.bytes_before, step.bytes_after))


def _step_name(number: int, step: StepRecord) -> str:
    return f"{number} {step.name}"


def _between(before: float, after: float, more: str = "worse") -> tuple[float, float, str]:
    return float(min(before, after)), float(max(before, after)), "better" if after <= before else more


def _byte_change(step: StepRecord) -> str:
    change = step.bytes_after - step.bytes_before
    return ("+" if change > 0 else "−") + show_bytes(abs(change)) if change else "±0"


def _signed(change: int) -> str:
    return f"+{change}" if change > 0 else f"−{-change}" if change else "±0"


def _waterfall(rows: Sequence[tuple[str, float, float, str]], texts: Sequence[str]) -> Any:
    from bokeh.models import ColumnDataSource

    names = _distinct([name for name, *_ in rows])
    highest = max(right for _, _, right, _ in rows) or 1.0
    plot = _bars(names, highest)
    for token in ("before", "after", "better", "worse", "warn"):
        chosen = [index for index, row in enumerate(rows) if row[3] == token]
        if not chosen:
            continue
        source = ColumnDataSource(
            {
                "name": [names[index] for index in chosen],
                "left": [rows[index][1] for index in chosen],
                # A step that changes nothing is a line.
                "right": [max(rows[index][2], rows[index][1] + highest / 400) for index in chosen],
                "text": [texts[index] for index in chosen],
            }
        )
        bars = plot.hbar(y="name", left="left", right="right", height=0.62, source=source, line_color=None)
        _paint(bars.glyph, fill_color=token)
        _label(plot, source, "right", "name", "text")
    return plot


def operators_chart(shares: Sequence[OperatorShare]) -> Any:
    """Return bytes of weights by operator, before and after."""
    rows = [_Pair(one.operator, one.bytes_before, one.bytes_after) for one in shares]
    return _paired_bars(_with_others(rows), show_bytes)


def kernels_chart(times: Sequence[OperatorTime]) -> Any:
    """Return milliseconds by kernel, before and after."""
    rows = [_Pair(one.kernel, one.ms_before, one.ms_after) for one in times]
    return _paired_bars(_with_others(rows), lambda time: f"{time:.3g} ms")


class _Pair(NamedTuple):
    name: str
    before: float
    after: float


def _with_others(rows: Sequence[_Pair]) -> list[_Pair]:
    """Return the rows that can be seen, and the rest as one."""
    highest = max((max(row.before, row.after) for row in rows), default=0.0)
    seen = [row for row in rows if max(row.before, row.after) > _LEAST_SEEN * highest][:MOST_BARS]
    rest = [row for row in rows if row not in seen and (row.before or row.after)]
    if len(rest) > 1:
        rest = [_Pair(f"{len(rest)} others", sum(row.before for row in rest), sum(row.after for row in rest))]
    return [*seen, *rest]


def _paired_bars(rows: Sequence[_Pair], show: Callable[[Any], str]) -> Any:
    from bokeh.models import ColumnDataSource

    highest = max((max(row.before, row.after) for row in rows), default=1.0) or 1.0
    names = _distinct([row.name for row in rows])
    plot = _bars(names, highest, row=_ROW + 6)
    for token in ("before", "after"):
        shown = [(name, row) for name, row in zip(names, rows, strict=True) if getattr(row, token)]
        source = ColumnDataSource(
            {
                "place": [(name, _shift(row, token)) for name, row in shown],
                "value": [getattr(row, token) for _, row in shown],
                "text": [show(getattr(row, token)) for _, row in shown],
            }
        )
        bars = plot.hbar(y="place", right="value", height=0.34, source=source, line_color=None)
        _paint(bars.glyph, fill_color=token)
        _label(plot, source, "value", "place", "text")
    return plot


def _shift(row: _Pair, token: str) -> float:
    """Return how far a bar lies from the middle of its row, where it is alone if there is but one."""
    if not row.before or not row.after:
        return 0.0
    return 0.19 if token == "before" else -0.19


def layers_chart(layers: LayerComparison) -> Any:
    """Return the SQNR of every value by depth, with the median of each depth as a line."""
    from bokeh.models import ColumnDataSource, CustomJS, HoverTool, TapTool

    shown = [one for one in layers.layers if not one.has_other_shape]
    heights = [max(one.sqnr_db, _LOWEST_SHOWN_DB) for one in shown]
    low = min(heights, default=0.0)
    top = _HIGHEST_SHOWN_DB if low < _GOOD_DB else SQNR_CEILING_DB
    high = min(max(heights, default=1.0), top)
    room = max((high - low) * 0.08, _LEAST_ROOM_DB if low >= _GOOD_DB else 2.0)
    plot = _figure(height=_SCATTER_HEIGHT, y_range=(low - room, high + room), tools="")
    depths = layers.by_depth()
    if len(depths) <= MOST_MEDIANS:
        medians = [_within(one.median_db, top) for one in depths]
        line = plot.line([one.depth for one in depths], medians, line_width=1.6, line_join="round")
        _paint(line.glyph, line_color="before")
    points = []
    worst = {id(one) for one in worst_layers(layers, 5)}
    for token, chosen in (
        ("after", [one for one in shown if id(one) not in worst]),
        ("worse", [one for one in shown if id(one) in worst]),
    ):
        source = ColumnDataSource(_points(chosen, top))
        dots = plot.scatter("depth", "db", size=9 if token == "worse" else 7, alpha=0.85, line_width=1, source=source)
        _paint(dots.glyph, fill_color=token, line_color="panel")
        points.append(dots)
        dots.nonselection_glyph = None
        dots.selection_glyph = None
        source.selected.js_on_change(
            "indices",
            CustomJS(
                args={"source": source},
                code="""
                const index = source.selected.indices[0]
                if (index == null) return
                window.graphoptSelect(source.data.origin[index])
                source.selected.indices = []
                """,
            ),
        )
    plot.add_tools(HoverTool(tooltips=_POINT_TOOLTIP, renderers=points), TapTool(renderers=points))
    plot.yaxis.major_label_overrides = {
        top: "no error" if top == SQNR_CEILING_DB else f"≥ {top:.0f}",
        _LOWEST_SHOWN_DB: f"≤ −{-_LOWEST_SHOWN_DB:.0f}",
    }
    plot.xaxis.ticker.min_interval = 1
    plot.xaxis.axis_label = "operators between the input and the value"
    plot.yaxis.axis_label = "signal to noise, dB"
    _paint(plot.ygrid[0], grid_line_color="line")
    return plot


def _points(layers: Sequence[LayerError], top: float) -> dict[str, list[Any]]:
    return {
        "depth": [one.depth for one in layers],
        "db": [_within(one.sqnr_db, top) for one in layers],
        "name": [one.name for one in layers],
        "origin": [one.origin for one in layers],
        "op": [operators(one) for one in layers],
        "sqnr": [how_near(one) for one in layers],
        "lost": [show_share(own_noise(one)) for one in layers],
        "worst": [f"{one.max_abs_error:.3g}" for one in layers],
    }


def _within(decibels: float, top: float) -> float:
    return min(max(decibels, _LOWEST_SHOWN_DB), top)


# Colours come from the page, through the custom properties that reach into Bokeh's shadow trees.
_POINT_TOOLTIP = """
<div style="font: 12px/1.5 system-ui, sans-serif; max-width: 340px; overflow-wrap: anywhere">
<strong>@name</strong><br>@op · @sqnr · noise of its own: @lost<br>largest error: @worst</div>
"""


def losses_chart(layers: Sequence[LayerError]) -> Any:
    """Return the noise that comes in at each of some layers."""
    return _single_bars(
        [one.name for one in layers],
        [own_noise(one) for one in layers],
        [show_share(own_noise(one)) for one in layers],
        "worse",
    )


def sensitivity_chart(costs: Sequence[LayerCost]) -> Any:
    """Return what single layers cost: as measured of the whole model, or as predicted of their own outputs."""
    measured = [one for one in costs if one.measured is not None][:MOST_BARS]
    if measured:
        values = [one.measured or 0.0 for one in measured]
        return _single_bars(_named(measured), values, [f"{one:.3g}" for one in values], "warn")
    rows = costs[:MOST_BARS]
    shares = [one.predicted or 0.0 for one in rows]
    return _single_bars(_named(rows), shares, [show_share(one) for one in shares], "warn")


def _named(costs: Sequence[LayerCost]) -> list[str]:
    """Return the layers, with the pass where there are several."""
    several = len({one.pass_name for one in costs}) > 1
    return [f"{one.layer}, {one.pass_name}" if several else one.layer for one in costs]


def _single_bars(names: Sequence[str], values: Sequence[float], texts: Sequence[str], token: str) -> Any:
    from bokeh.models import ColumnDataSource

    names = _distinct(names)
    plot = _bars(names, max(values, default=1.0) or 1.0)
    source = ColumnDataSource({"name": names, "value": list(values), "text": list(texts)})
    bars = plot.hbar(y="name", right="value", height=0.6, source=source, line_color=None)
    _paint(bars.glyph, fill_color=token)
    _label(plot, source, "value", "name", "text")
    return plot


def loss_chart(training: Training) -> Any:
    """Return how a loss went, on a logarithmic axis where it falls far: of each step, and on what is held out."""
    batches, looks = training.batches, training.looks
    shown = [one for one in (*batches[1], *looks[1]) if math.isfinite(one)]
    is_far = bool(shown) and 0 < min(shown) < max(shown) / _FAR
    plot = _figure(height=_LOSS_HEIGHT, tools="", y_axis_type="log" if is_far else "linear")
    lines = plot.line(x=batches[0], y=batches[1], line_width=1.2)
    _paint(lines.glyph, line_color="before")
    if looks[0]:
        held_out = plot.line(x=looks[0], y=looks[1], line_width=2)
        _paint(held_out.glyph, line_color="after")
        dots = plot.scatter(x=looks[0], y=looks[1], size=6, line_color=None)
        _paint(dots.glyph, fill_color="after")
    plot.xaxis.axis_label, plot.yaxis.axis_label = "steps", "loss"
    plot.xaxis.ticker.min_interval = 1
    _paint(plot.ygrid[0], grid_line_color="line")
    return plot


def histogram_chart(one: WeightHistogram) -> Any:
    """Return the distribution of a layer's weights, before as an area, after as bars."""
    left, right = one.edges[:-1], one.edges[1:]
    plot = _figure(height=_SMALL_HEIGHT, tools="")
    highest = max((*one.before, *one.after), default=0.0) or 1.0
    plot.y_range.start, plot.y_range.end = 0, highest * 1.06
    plot.x_range.range_padding = 0
    if one.before:
        old = plot.quad(left=left, right=right, bottom=0, top=one.before, line_color=None, fill_alpha=0.75)
        _paint(old.glyph, fill_color="before")
    new = plot.step(x=[*left, right[-1]], y=[*one.after, one.after[-1]], mode="after", line_width=1.6)
    _paint(new.glyph, line_color="after")
    plot.yaxis.visible = False
    plot.xaxis.ticker.desired_num_ticks = 4
    return plot


def _bars(names: Sequence[str], highest: float, *, row: int = _ROW) -> Any:
    """Return an empty plot of horizontal bars by `_distinct` names, the first at the top, with room for labels."""
    from bokeh.models import FactorRange

    plot = _figure(
        height=row * max(len(names), 1) + _AROUND,
        y_range=FactorRange(*reversed(names), range_padding=0.02),
        x_range=(0, highest * (1 + _ROOM_FOR_LABELS)),
        tools="",
    )
    plot.xaxis.visible = False
    plot.ygrid.grid_line_color = None
    plot.yaxis.axis_line_color = None
    plot.yaxis.major_label_text_font_size = _FONT_SIZE
    return plot


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names short enough for an axis, each its own."""
    cut = [_cut(name) for name in names]
    if len(set(cut)) < len(set(names)):  # what tells them apart is cut off
        cut = [_cut(name) for name in _without_common_ends(names)]
    counts: Counter[str] = Counter()
    short = []
    for name in cut:
        short.append(name + "\u200b" * counts[name])  # of no width
        counts[name] += 1
    return short


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _without_common_ends(names: Sequence[str]) -> list[str]:
    """Return names, the long ones without the words that they all begin and end with."""
    words = {name: _WORD_ENDS.split(name) for name in names if len(name) > _LONGEST_NAME}
    start = _alike(words.values())
    end = _alike([own[:start:-1] for own in words.values()])  # one word stays
    middles = {name: "".join(own[start : len(own) - end]) for name, own in words.items()}
    shown = {name: f"{'…' if start else ''}{text}{'…' if end else ''}" for name, text in middles.items()}
    return [shown.get(name, name) for name in names]


def _alike(lists: Iterable[Sequence[str]]) -> int:
    """Return how many items lists have in common from their beginning."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))


def _figure(**settings: Any) -> Any:
    from bokeh.plotting import figure

    plot = figure(
        sizing_mode="stretch_width",
        toolbar_location=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **settings,
    )
    for axis in plot.axis:
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = _FONT_SIZE
        axis.minor_tick_line_color = axis.major_tick_line_color = None
        _paint(axis, axis_label_text_color="muted", major_label_text_color="ink", axis_line_color="line")
    plot.xgrid.grid_line_color = plot.ygrid.grid_line_color = None
    plot.min_border_right = 12
    return plot


def _label(plot: Any, source: Any, x: str, y: Any, text: str) -> None:
    """Write the figure of each bar behind its end."""
    from bokeh.core.properties import value

    words = plot.text(
        x=x,
        y=y,
        text=text,
        source=source,
        x_offset=6,
        text_baseline="middle",
        text_font_size=_FONT_SIZE,
        text_font=value(FONT),
    )
    _paint(words.glyph, text_color="ink")


def _paint(model: Any, **colours: str) -> None:
    """Give properties of a model colours of the page by name, and tell its script which."""
    for name, token in colours.items():
        setattr(model, name, LIGHT[token])
    model.tags = [*model.tags, *(f"{name}={token}" for name, token in colours.items())]
