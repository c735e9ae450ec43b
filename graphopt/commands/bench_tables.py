"""What `bench` found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.benchmarking.kernel_profile import KernelTime, OpTime
from graphopt.benchmarking.results import Bench, Placed, Profiled, Row
from graphopt.benchmarking.roofline import Peaks, Roof
from graphopt.latency import Latency
from graphopt.listing import Listing, Sheet

SLOWEST_SHOWN = 10
# Names of more nodes than this say no more.
_NODES_SHOWN = 3
_NONE = "–"


@dataclass(frozen=True)
class _Column:
    """One column of the table of times: what is in it, and whether that is numbers."""

    name: str
    cell: Callable[[Row], str]
    number: bool = True


def listing_of(found: Bench, *, verbose: bool = False) -> Listing:
    """Return what people read.

    Args:
        found: What was found.
        verbose: Whether all kernels are listed, not the slowest alone, and where nodes ran although they all ran
            where they were wanted.
    """
    sheets = [_times(found.rows)]
    for one in found.profiles:
        sheets += [_by_op(one, verbose), _slowest(one, verbose)]
    roofs = [f"{one.model} on {one.backend}: {_in_words(one.roof)}" for one in found.profiles if one.roof is not None]
    peaks = {one.roof.peaks.backend: one.roof.peaks for one in found.profiles if one.roof is not None}
    failures = dict.fromkeys(f"{row.model} on {row.backend}: {row.failure}" for row in found.rows if row.failure)
    placed = [_where(one) for one in found.placements if verbose or one.placement.elsewhere]
    remarks = [*failures, *placed, *map(_peaks, peaks.values()), *roofs, _conditions(found)]
    return Listing(sheets, found.as_dict(), [*remarks, *(f"warning: {one}" for one in found.warnings)])


def _times(rows: Sequence[Row]) -> Sheet:
    columns = [_Column("model", lambda row: row.model, number=False)]
    if len({row.backend for row in rows}) > 1:
        columns.append(_Column("backend", lambda row: row.backend, number=False))
    columns.append(_Column("batch", lambda row: str(row.batch)))
    columns += [_size(name) for name in rows[0].sizes]
    columns += [_timed("median", lambda one: f"{_short(one.median)} ms"), _timed("95 %", _median_within)]
    columns.append(_timed("p10–p90", lambda one: f"{_short(one.low)}–{_short(one.high)} ms"))
    columns += [
        _timed("runs", lambda one: str(one.runs)),
        _timed("samples/s", lambda one: _short(one.samples_per_second)),
    ]
    if len({(row.model, row.backend) for row in rows}) > 1 or _repeats(rows):
        columns += [_timed("ratio", lambda one: f"{one.ratio:.2f}"), _Column("verdict", _verdict, number=False)]
    if any(row.cold for row in rows):
        columns += [_cold("start", "start"), _cold("load", "load"), _cold("first run", "first")]
        columns.append(
            _Column("memory", lambda row: f"{_short(row.cold.peak_mb)} MB" if row.cold is not None else _NONE)
        )
    cells = [[column.cell(row) for column in columns] for row in rows]
    return Sheet([column.name for column in columns], cells, [column.name for column in columns if column.number])


def _repeats(rows: Sequence[Row]) -> bool:
    """Return whether a file was given more than once, as one does to see the noise."""
    return len({(row.model, row.backend, row.batch, *row.sizes.items()) for row in rows}) < len(rows)


def _size(name: str) -> _Column:
    return _Column(name, lambda row: str(row.sizes[name]))


def _timed(name: str, show: Callable[[Latency], str]) -> _Column:
    return _Column(name, lambda row: show(row.latency) if row.latency is not None else _NONE)


def _cold(name: str, field: str) -> _Column:
    return _Column(name, lambda row: f"{_short(getattr(row.cold, field))} ms" if row.cold is not None else _NONE)


def _median_within(one: Latency) -> str:
    low, high = one.median_within
    return f"{_short(low)}–{_short(high)}"


def _verdict(row: Row) -> str:
    one = row.latency
    if one is None:
        return "does not run"
    low, high = one.ratio_within
    if low == high == 1:
        return ""  # the first: everything is compared with it
    if one.verdict in ("faster", "slower"):
        factor = 1 / one.ratio if one.verdict == "faster" else one.ratio
        ends = sorted((1 / low, 1 / high)) if one.verdict == "faster" else [low, high]
        return f"{factor:.2f}× {one.verdict} ({ends[0]:.2f}–{ends[1]:.2f})"
    return f"{one.verdict} ({low:.2f}–{high:.2f})"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _by_op(one: Profiled, verbose: bool) -> Sheet:
    columns = [f"{one.model} on {one.backend}", "kernels", "time", "share", "GOP/s"]
    ops = one.profile.by_op
    # One more takes no more room than to say that there is one more.
    shown = len(ops) if verbose or len(ops) == SLOWEST_SHOWN + 1 else SLOWEST_SHOWN
    rows = [_op_cells(row, one.profile.milliseconds) for row in ops[:shown]]
    if rest := ops[shown:]:
        time = sum(row.milliseconds for row in rest)
        other = OpTime(f"{len(rest)} other operators", sum(row.count for row in rest), time, None)
        rows.append(_op_cells(other, one.profile.milliseconds))
    rows.append(["all", str(len(one.profile.kernels)), f"{_short(one.profile.milliseconds)} ms", "", ""])
    return Sheet(columns, rows, columns[1:])


def _op_cells(row: OpTime, whole: float) -> list[str]:
    rate = row.operations / row.milliseconds / 1e6 if row.operations and row.milliseconds else None
    share = row.milliseconds / whole if whole else 0.0
    return [row.op, str(row.count), f"{_short(row.milliseconds)} ms", f"{share:.1%}", _rate(rate)]


def _slowest(one: Profiled, verbose: bool) -> Sheet:
    kernels = one.profile.kernels if verbose else one.profile.kernels[:SLOWEST_SHOWN]
    head = "kernel" if verbose else f"slowest of {len(one.profile.kernels)}"
    columns = [head, "nodes", "time", "share", "GOP/s", "GB/s"]
    numbers = columns[2:]
    if _providers(one) > 1:
        columns.append("run by")
    if one.roof is not None:
        columns, numbers = [*columns, "of the roof", "bound by"], [*numbers, "of the roof"]
    rows = [_kernel_cells(kernel, one) for kernel in kernels]
    return Sheet(columns, rows, numbers)


def _kernel_cells(kernel: KernelTime, one: Profiled) -> list[str]:
    flops, moved = kernel.operations_per_second, kernel.bytes_per_second
    share = kernel.milliseconds / one.profile.milliseconds if one.profile.milliseconds else 0.0
    cells = [kernel.op, _nodes(kernel), f"{_short(kernel.milliseconds)} ms", f"{share:.1%}"]
    cells += [_rate(flops / 1e9 if flops else None), _rate(moved / 1e9 if moved else None)]
    if _providers(one) > 1:
        cells.append(kernel.provider)
    if one.roof is None:
        return cells
    bound = one.roof.peaks.least(kernel, one.profile.bytes)
    if bound is None or not bound[0] or not kernel.milliseconds:
        return [*cells, _NONE, ""]
    return [*cells, f"{bound[0] / kernel.milliseconds:.0%}", bound[1]]


def _providers(one: Profiled) -> int:
    return len({kernel.provider for kernel in one.profile.kernels})


def _nodes(kernel: KernelTime) -> str:
    shown = ", ".join(kernel.nodes[:_NODES_SHOWN]) or "the runtime's own"
    more = len(kernel.nodes) - _NODES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _rate(number: float | None) -> str:
    return _NONE if number is None else _short(number)


def _peaks(peaks: Peaks) -> str:
    integers = peaks.integer_operations
    parts = [f"float32 {_short(peaks.float_operations / 1e9)} GFLOP/s"]
    parts.append(f"int8 {_short(integers / 1e9)} GOP/s" if integers is not None else "no int8")
    parts.append(f"memory {_short(peaks.memory / 1e9)} GB/s, caches {_short(peaks.caches / 1e9)} GB/s")
    return f"peaks of {peaks.backend}, measured: {', '.join(parts)}"


def _in_words(roof: Roof) -> str:
    bounds = ", ".join(f"{share:.0%} {name}" for name, share in sorted(roof.bound_by.items(), key=lambda one: -one[1]))
    times = f"{_short(roof.taken)} ms, at the peaks {_short(roof.least)} ms"
    text = f"{roof.share:.0%} of the roof: {times} (bound by: {bounds})"
    return f"{text}; {_short(roof.unknown)} ms more of kernels whose work is not known" if roof.unknown else text


def _where(one: Placed) -> str:
    counts = ", ".join(f"{count} by {provider}" for provider, count in one.placement.counts.items())
    elsewhere = ", ".join(dict.fromkeys(f"{node.op} by {node.provider}" for node in one.placement.elsewhere))
    text = f"{one.model} on {one.backend}: nodes run {counts}"
    return f"{text}; not where they were wanted: {elsewhere}" if elsewhere else text


def _conditions(found: Bench) -> str:
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    where = ""
    if found.cores:
        where = f" on core{'s' if len(found.cores) > 1 else ''} {', '.join(map(str, found.cores))}"
    backends = ", ".join(dict.fromkeys(row.backend for row in found.rows))
    more = ["runs interleaved"]
    if len(found.rows) > 1:
        more.append("ratio to the first of each size" if _several_sizes(found) else "ratio to the first")
    return f"{backends}, {threads}{where} of {found.cpu}, {found.inputs}, {', '.join(more)}"


def _several_sizes(found: Bench) -> bool:
    return len({(row.batch, *row.sizes.items()) for row in found.rows}) > 1
