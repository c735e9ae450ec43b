"""The sizes that `bench` runs models at, and feeds of these sizes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt.backend import Array
from graphopt.data import batch_size, open_data
from graphopt.errors import UsageError
from graphopt.generated import generated_feeds
from graphopt.specialise import specialise


@dataclass(frozen=True)
class Point:
    """Sizes to run at, and for each model a feed of these sizes."""

    sizes: Mapping[str, int]
    feeds: Sequence[dict[str, Array]]


def parse_sizes(text: str, option: str) -> list[int]:
    """Return the sizes of a text such as ``1,2,4,8``.

    Args:
        text: Numbers, separated by commas.
        option: What is written before them: ``"--batch "``.

    Raises:
        UsageError: One is no whole number above 0.
    """
    sizes = [part.strip() for part in text.split(",")]
    for size in sizes:
        if not size.isdecimal() or not int(size):
            raise UsageError(f"`{option}{text}`: `{size}` is no size", hint=f"`{option}1,2,4,8`, or one number")
    return list(dict.fromkeys(map(int, sizes)))


def parse_sweeps(texts: Sequence[str]) -> dict[str, list[int]]:
    """Return the sizes by dimension of texts such as ``sequence=16,64,256``.

    Raises:
        UsageError: A text is no ``name=sizes``, or a name is given twice.
    """
    sweeps: dict[str, list[int]] = {}
    for text in texts:
        name, equals, sizes = (part.strip() for part in text.rpartition("="))
        if not equals or not name:
            raise UsageError(f"`--sweep {text}` names no dimension", hint="write `--sweep sequence=16,64,256`")
        if name in sweeps:
            raise UsageError(f"dimension `{name}` is swept twice", hint="give all its sizes in one `--sweep`")
        sweeps[name] = parse_sizes(sizes, f"--sweep {name}=")
    return sweeps


def points_of(
    models: Sequence[ir.Model],
    names: Sequence[str],
    data: Any,
    batch: int | Sequence[int] | None,
    sweep: Mapping[str, Sequence[int]],
    seed: int,
) -> list[Point]:
    """Return every batch with every combination of sizes, and for each a feed for each model.

    Args:
        models: The models.
        names: What errors call them.
        data: Samples, as for `optimize`, or None for made-up inputs.
        batch: Samples per run, or several such numbers; where None, 1, or a model's fixed batch size.
        sweep: Sizes by name of dimension.
        seed: Seed of made-up inputs.

    Raises:
        UsageError: A model cannot run at such sizes, or the data hold too few samples.
        DataError: The data do not fit a model, or its inputs cannot be made up.
    """
    if data is not None and sweep:
        raise UsageError("dimensions of given samples cannot be swept", hint="leave out `--data`, or `--sweep`")
    batches = list(batch) if isinstance(batch, Sequence) else [batch]
    points = []
    for one, sizes in itertools.product(batches, itertools.product(*sweep.values())):
        swept = dict(zip(sweep, sizes, strict=True))
        feeds = [_feed(model, name, data, one, swept, seed) for model, name in zip(models, names, strict=True)]
        # What is made up hangs on what a model does with it, such as on how long a table is that it indexes.
        points.append(Point(swept, [feeds[0] if _fits(feeds[0], feed) else feed for feed in feeds]))
    return points


def _fits(first: Mapping[str, Array], feed: Mapping[str, Array]) -> bool:
    """Return whether one feed can stand for another: the same inputs, of the same sizes and dtypes."""
    kinds, wanted = ({name: (array.shape, array.dtype) for name, array in one.items()} for one in (first, feed))
    return kinds == wanted


def _feed(
    model: ir.Model, name: str, data: Any, batch: int | None, sizes: Mapping[str, int], seed: int
) -> dict[str, Array]:
    if data is not None:
        feed = next(iter(open_data(data, model).batches(batch or 1))).feeds
    else:
        shaped = model
        if sizes:
            shaped = model.clone()
            specialise(shaped, sizes, {})
        feed = generated_feeds(shaped, seed, sets=1, batch=batch or 1)[0]
    if batch is not None and batch_size(feed) != batch:
        raise UsageError(
            f"`{name}` cannot be timed with batch {batch}: it, or the data, gives {batch_size(feed)} at a time",
            hint=f"`--batch {batch_size(feed)}`, a model with a dynamic batch dimension, or more data",
        )
    return feed
