"""Samples to train on: in an order that is always the same, by index, wherever they come from."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.data import Chunk, Dataset, InputSpec
from graphopt.errors import DataError

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from graphopt.passes.recovery.training.samples import Order, StoredSamples, held_out_of  # noqa: E402

from .small_trainings import FEATURES, samples  # noqa: E402
from .test_training_engine import Noted  # noqa: E402


def test_every_sample_is_seen_as_often_as_any_other() -> None:
    order = Order(np.arange(100, 110), 4, seed=1)
    steps = [order.step(step) for step in range(5)]
    seen = np.concatenate([rows for rows, _ in steps])
    assert sorted(seen.tolist()) == sorted([*range(100, 110)] * 2)
    assert [epochs.tolist() for _, epochs in steps] == [[0] * 4, [0] * 4, [0, 0, 1, 1], [1] * 4, [1] * 4]
    assert (order.step(3)[0] == steps[3][0]).all()
    assert (Order(order.rows, 4, seed=2).step(0)[0] != steps[0][0]).any()
    # A batch may be more than there is.
    assert sorted(Order(np.arange(3), 6, seed=1).step(0)[0].tolist()) == [0, 0, 1, 1, 2, 2]


def test_what_is_held_out_is_not_trained_on() -> None:
    trained, held = held_out_of(50, 7, seed=3)
    assert sorted([*trained, *held]) == list(range(50))
    assert len(held) == 7


def test_samples_are_the_same_from_memory_and_from_a_file() -> None:
    data = samples((6, 4), count=10)
    whole = [chunk for chunk, _ in data.chunks()]
    for stored in (StoredSamples(data), StoredSamples(data, bytes_in_memory=0)):
        parts = stored.divide(np.array([13, 2, 19, 5, 2]), 2)
        assert [part.tolist() for part in parts] == [[13, 19], [2, 5], [2]]
        batch = stored.batch(parts[0], None, parts[0])
        assert (batch.feeds["x"].numpy() == whole[1].arrays["x"][[3, 9]]).all()
        assert batch.labels.tolist() == [3, 9]
        assert (batch.count, len(stored)) == (2, 20)


def test_a_subset_of_a_data_set_has_its_own_indices() -> None:
    data = samples(count=40)
    some = data.sample(5, seed=1)
    expected = np.concatenate([batch.feeds["x"] for batch in some.batches(1)])
    stored = StoredSamples(some)
    assert (stored.batch(np.arange(5), None, np.arange(5)).feeds["x"].numpy() == expected).all()


def test_fixed_batches_are_padded_behind_what_is_real() -> None:
    stored = StoredSamples(samples(count=10, fixed=4))
    assert [len(part) for part in stored.divide(np.arange(10), 32)] == [4, 3, 3]
    batch = stored.batch(np.array([7, 8, 9]), None, np.arange(10))
    assert (batch.feeds["x"].shape, batch.count, batch.labels.tolist()) == ((4, FEATURES), 3, [7, 8, 9])


def test_whole_feeds_stay_whole() -> None:
    feeds = [np.full((count, 2), count, np.float32) for count in (3, 5)]
    spec = InputSpec("x", np.dtype("float32"), (None, 2))
    indivisible = Dataset(
        lambda: (Chunk({"x": feed, "mask": np.ones(1)}, None, 1, divisible=False) for feed in feeds),
        [spec],
        "feeds",
        2,
        False,
    )
    stored = StoredSamples(indivisible)
    assert [part.tolist() for part in stored.divide(np.array([1, 0]), 8)] == [[1], [0]]
    assert stored.batch(np.array([1]), None, np.arange(2)).feeds["x"].shape == (5, 2)
    stacks = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    stacked = Dataset(
        lambda: iter([Chunk({"x": stacks}, None, 3, divisible=True, stacked=frozenset({"x"}))]), [spec], "s", 3, False
    )
    assert (StoredSamples(stacked).batch(np.array([2]), None, np.arange(3)).feeds["x"].numpy() == stacks[2]).all()


def test_what_is_mixed_has_the_same_shape() -> None:
    stored = StoredSamples(samples((6, 4), count=10), Noted(mixes=True))
    for rows in stored.divide(np.arange(20), 8):
        batch = stored.batch(rows, 0, np.arange(20)[::-1])
        assert batch.feeds["x"].shape == (len(rows), 6 if rows[0] < 10 else 4, FEATURES)


def test_whole_feeds_are_not_augmented() -> None:
    spec = InputSpec("x", np.dtype("float32"), (2, FEATURES))
    chunk = Chunk({"x": np.zeros((3, 2, FEATURES), np.float32)}, None, 3, divisible=True, stacked=frozenset({"x"}))
    data = Dataset(lambda: iter([chunk]), [spec], "feeds", 3, False)
    assert len(StoredSamples(data)) == 3
    with pytest.raises(DataError, match="`feeds` has whole feeds") as error:
        StoredSamples(data, Noted())
    assert error.value.hint


def test_positions_of_rows_that_only_pad_are_not_real() -> None:
    batch = StoredSamples(samples(count=10, fixed=4)).batch(np.arange(3), None, np.arange(10))
    places = torch.arange(4 * 5)
    assert batch.real(places).tolist() == list(range(3 * 5))
    assert batch.real(places[:7]).tolist() == list(range(7))
