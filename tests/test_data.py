"""Samples reach a model as they should: batched, padded, split, labelled, or made up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import HELD_BACK_LIMIT, Batch, Dataset, batch_size, open_data
from graphopt.errors import DataError
from graphopt.generated import generated_feeds, index_bound

Shape = list[int | str | None]


def model_of(**inputs: tuple[int, Shape | None]) -> ir.Model:
    """Return a model with the given inputs, each handed on as it is."""
    nodes, values, outputs = [], [], []
    for name, (dtype, shape) in inputs.items():
        nodes.append(helper.make_node("Identity", [name], [f"{name}_out"]))
        values.append(helper.make_tensor_value_info(name, dtype, shape))
        outputs.append(helper.make_tensor_value_info(f"{name}_out", dtype, shape))
    graph = helper.make_graph(nodes, "inputs", values, outputs)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
DYNAMIC = model_of(x=(FLOAT, ["N", 3]))
FIXED = model_of(x=(FLOAT, [4, 3]))


def rows(count: int) -> np.ndarray[Any, Any]:
    """Return samples of three features, the first of which is the sample's number."""
    x = np.zeros((count, 3), np.float32)
    x[:, 0] = np.arange(count)
    return x


def numbers(dataset: Dataset, size: int = 8) -> list[float]:
    """Return the numbers of the real samples, in the order they come."""
    return [number for batch in dataset.batches(size) for number in batch.real(batch.feeds["x"])[:, 0].tolist()]


# Batches


def test_dynamic_batches_are_cut_and_not_padded() -> None:
    batches = list(open_data({"x": rows(10), "labels": np.arange(10)}, DYNAMIC).batches(4))
    assert [batch.feeds["x"].shape for batch in batches] == [(4, 3), (4, 3), (2, 3)]
    assert [batch.count for batch in batches] == [4, 4, 2]
    assert [batch.padded_to for batch in batches] == [0, 0, 0]
    assert [label for batch in batches for label in batch.labels] == list(range(10))


def test_a_fixed_batch_is_filled_and_its_padding_known() -> None:
    batches = list(open_data({"x": rows(6), "labels": np.arange(6)}, FIXED).batches(1))
    assert [batch.feeds["x"].shape for batch in batches] == [(4, 3), (4, 3)]
    assert [batch.count for batch in batches] == [4, 2]
    assert [batch.padded_to for batch in batches] == [0, 4]
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert batches[1].feeds["x"][:, 0].tolist() == [4, 5, 4, 5]


def test_only_padding_is_trimmed() -> None:
    batch = Batch({}, None, 2, padded_to=4)
    np.testing.assert_array_equal(batch.real(np.arange(4)), [0, 1])
    np.testing.assert_array_equal(batch.real(np.arange(5)), np.arange(5))
    assert batch.real(np.float32(7)) == 7
    assert batch.real([1, 2, 3, 4]) == [1, 2, 3, 4]
    np.testing.assert_array_equal(Batch({}, None, 2).real(np.arange(4)), np.arange(4))


def test_rows_of_one_dimension_more_are_whole_feeds() -> None:
    held = np.stack([rows(4) + 10 * index for index in range(3)])
    batches = list(open_data({"x": held}, FIXED).batches(8))
    assert [batch.feeds["x"].shape for batch in batches] == [(4, 3)] * 3
    assert [batch.feeds["x"][0, 0] for batch in batches] == [0, 10, 20]
    assert {batch.count for batch in batches} == {1}


def test_scalar_inputs_stay_scalar() -> None:
    model = model_of(x=(FLOAT, ["N", 3]), rate=(INT64, []))
    shared = list(open_data({"x": rows(3), "rate": 16000}, model).batches(2))
    assert [batch.feeds["rate"].shape for batch in shared] == [(), ()]
    each = list(open_data({"x": rows(3), "rate": np.array([8, 16, 32])}, model).batches(2))
    assert [(batch.feeds["rate"].shape, int(batch.feeds["rate"])) for batch in each] == [((), 8), ((), 16), ((), 32)]
    assert [batch.feeds["x"].shape for batch in each] == [(1, 3)] * 3


def test_strings() -> None:
    model = model_of(text=(STRING, ["N", 1]))
    (batch,) = open_data({"text": np.array([["a"], ["bc"]])}, model).batches(8)
    assert batch.feeds["text"].dtype == object
    assert batch.feeds["text"].tolist() == [["a"], ["bc"]]
    assert all(type(text) is str for text in batch.feeds["text"].reshape(-1))


def test_batches_can_be_read_again() -> None:
    dataset = open_data({"x": rows(5)}, DYNAMIC)
    assert numbers(dataset) == numbers(dataset) == [0, 1, 2, 3, 4]


# Functions


def test_dicts_of_a_function_are_samples() -> None:
    def source() -> Iterator[dict[str, Any]]:
        for index in range(3):
            yield {"x": rows(2) + 2 * index, "labels": [index, index]}

    dataset = open_data(source, DYNAMIC)
    assert len(dataset) == 6
    assert dataset.has_labels
    assert [batch.labels.tolist() for batch in dataset.batches(8)] == [[0, 0], [1, 1], [2, 2]]


def test_a_feed_that_cannot_be_divided_stays_whole() -> None:
    model = model_of(x=(FLOAT, ["N", 3]), state=(FLOAT, [2, "M"]))
    feeds = [{"x": rows(5) + index, "state": np.full((2, 1), index, np.float32)} for index in range(4)]
    dataset = open_data(feeds, model)
    assert len(dataset) == 4
    for index, batch in enumerate(dataset.batches(2)):
        assert batch.count == 1
        np.testing.assert_array_equal(batch.feeds["x"], feeds[index]["x"])
        np.testing.assert_array_equal(batch.real(batch.feeds["x"]), feeds[index]["x"])
    calibration, scored = dataset.split(0)
    assert (len(calibration), len(scored)) == (3, 1)


def test_one_dict_from_a_function_will_do() -> None:
    assert len(open_data(lambda: {"x": rows(3)}, DYNAMIC)) == 3


def test_an_iterator_is_refused_because_it_ends() -> None:
    with pytest.raises(DataError, match="cannot be read from `generator`") as caught:
        open_data(({"x": rows(1)} for _ in range(3)), DYNAMIC)
    assert "function" in (caught.value.hint or "")


def test_files_of_functions_see_their_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_samples.py").write_text("COUNT = 3\n")
    (tmp_path / "samples_with_neighbour.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "from neighbour_of_samples import COUNT\n"
        "@dataclass\n"
        "class Row:\n"
        "    x: np.ndarray\n"
        "def source():\n"
        "    return [{'x': Row(np.zeros((1, 3), np.float32)).x} for _ in range(COUNT)]\n"
    )
    assert len(open_data(f"{tmp_path / 'samples_with_neighbour.py'}:source", DYNAMIC)) == 3


# Files


def test_several_files_are_read_in_order_of_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=rows(9)[5:])
    np.savez(tmp_path / "a.npz", x=rows(5))
    (tmp_path / "readme.txt").write_text("not data")
    dataset = open_data(tmp_path, DYNAMIC)
    assert len(dataset) == 9
    assert numbers(dataset, size=4) == list(range(9))
    assert numbers(dataset.take(6), size=4) == list(range(6))


def test_one_test_data_set_by_itself(tmp_path: Path) -> None:
    (tmp_path / "input_0.pb").write_bytes(numpy_helper.from_array(rows(2), "x").SerializeToString())
    assert numbers(open_data(tmp_path, DYNAMIC)) == [0, 1]


def test_unnamed_test_tensors_go_by_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    (folder / "input_0.pb").write_bytes(numpy_helper.from_array(rows(2)).SerializeToString())
    assert numbers(open_data(tmp_path, DYNAMIC)) == [0, 1]


def test_arrays_that_no_input_asks_for_are_ignored() -> None:
    dataset = open_data({"x": rows(2), "ids": np.arange(7)}, DYNAMIC)
    assert [batch.feeds.keys() for batch in dataset.batches(8)] == [{"x"}]


@pytest.mark.parametrize(
    ("given", "wanted", "accepted"),
    [
        (np.float64, FLOAT, True),
        (np.float16, FLOAT, True),
        (np.int32, INT64, True),
        (np.uint8, INT64, True),
        (np.uint8, FLOAT, False),
        (np.float32, INT64, False),
        (np.bool_, INT64, False),
    ],
)
def test_only_the_width_of_a_dtype_changes(given: Any, wanted: int, accepted: bool) -> None:
    model, held = model_of(x=(wanted, ["N", 3])), {"x": np.ones((2, 3), given)}
    if not accepted:
        with pytest.raises(DataError, match="array for input `x`"):
            open_data(held, model)
        return
    (batch,) = open_data(held, model).batches(8)
    assert batch.feeds["x"].dtype == (np.float32 if wanted == FLOAT else np.int64)
    assert batch.feeds["x"].tolist() == [[1] * 3] * 2


def test_whole_numbers_that_do_not_fit_are_refused() -> None:
    model = model_of(x=(TensorProto.INT8, ["N"]))
    with pytest.raises(DataError, match="do not fit"):
        open_data({"x": np.array([1, 300])}, model)


# Splits


@pytest.mark.parametrize(("count", "held_back"), [(2, 1), (3, 1), (4, 1), (8, 2), (100, 25), (4800, HELD_BACK_LIMIT)])
def test_split_sizes(count: int, held_back: int) -> None:
    calibration, scored = open_data({"x": rows(count)}, DYNAMIC).split(0)
    assert (len(calibration), len(scored)) == (count - held_back, held_back)
    assert sorted(numbers(calibration) + numbers(scored)) == list(range(count))


def test_split_follows_its_seed_alone() -> None:
    dataset = open_data({"x": rows(40)}, DYNAMIC)
    first, again, other = (numbers(dataset.split(seed)[1]) for seed in (0, 0, 1))
    assert first == again != other
    assert first != list(range(10)), "samples are often sorted by class: the first quarter would be of one kind"


def test_split_keeps_labels_with_their_samples() -> None:
    dataset = open_data({"x": rows(40), "labels": np.arange(40) * 2}, DYNAMIC)
    for part in dataset.split(3):
        assert part.has_labels
        for batch in part.batches(7):
            np.testing.assert_array_equal(batch.labels, batch.feeds["x"][:, 0] * 2)


def test_a_part_can_be_taken_of_a_part() -> None:
    scored = open_data({"x": rows(40)}, DYNAMIC).split(0)[1]
    assert numbers(scored.take(4)) == numbers(scored)[:4]
    assert len(scored.take(100)) == 10


def test_batch_size_is_that_of_the_first_array() -> None:
    assert batch_size({"rate": np.array(3), "x": rows(5)}) == 5
    assert batch_size({"rate": np.array(3)}) == 1


# Inputs made up


def test_dimensions_of_one_name_get_one_size() -> None:
    model = model_of(a=(FLOAT, ["N", "T", 3]), b=(FLOAT, ["N", "T"]), c=(FLOAT, ["T", None]))
    feed = generated_feeds(model, 0, sets=1)[0]
    assert feed["a"].shape[:2] == feed["b"].shape
    assert feed["c"].shape[0] == feed["b"].shape[1]
    assert feed["a"].shape[2] == 3
    larger = generated_feeds(model, 0, sets=1, scale=8, batch=5)[0]
    assert larger["b"].shape == (5, 8 * feed["b"].shape[1])


def test_made_up_inputs_follow_their_seed() -> None:
    first, again, other = (generated_feeds(DYNAMIC, seed)[0]["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    a, b = generated_feeds(DYNAMIC, 0)
    assert not np.array_equal(a["x"], b["x"])


def embedding(table: int, *, through: str | None = None) -> ir.Model:
    """Return a model that looks token ids up in a table of so many rows, perhaps through another operator."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    if through is not None:
        nodes = [
            helper.make_node(through, ["ids"], ["same"], **({"to": INT64} if through == "Cast" else {})),
            helper.make_node("Gather", ["table", "same"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "embedding",
        [helper.make_tensor_value_info("ids", INT64, ["N", "T"])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.zeros((table, 2), np.float32), "table")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


@pytest.mark.parametrize("through", [None, "Cast", "Identity"])
def test_token_ids_stay_in_their_table(through: str | None) -> None:
    model = embedding(50, through=through)
    assert index_bound(model.graph.inputs[0]) == 50
    ids = np.concatenate([feed["ids"].reshape(-1) for feed in generated_feeds(model, 0, sets=40)])
    assert ids.min() >= 0
    assert 40 <= ids.max() < 50, "the table should be used, too"


def test_integers_of_unknown_use_stay_small() -> None:
    model = model_of(mask=(INT64, ["N", "T"]))
    assert set(np.unique(generated_feeds(model, 0)[0]["mask"])) == {0, 1}


@pytest.mark.parametrize(("dtype", "expected"), [(TensorProto.BOOL, np.bool_), (STRING, object), (FLOAT, np.float32)])
def test_made_up_dtypes(dtype: int, expected: Any) -> None:
    assert generated_feeds(model_of(x=(dtype, ["N", 2])), 0)[0]["x"].dtype == expected


def test_an_input_of_unknown_rank_cannot_be_made_up() -> None:
    with pytest.raises(DataError, match="cannot make up input `x`") as caught:
        generated_feeds(model_of(x=(FLOAT, None)), 0)
    assert "--data" in (caught.value.hint or "")


def test_a_function_that_gives_other_samples_each_time_is_refused() -> None:
    rng = np.random.default_rng(0)
    data = open_data(lambda: [{"x": rng.random((4, 4), np.float32)}], model_of(x=(TensorProto.FLOAT, ("n", 4))))
    with pytest.raises(DataError, match="gives other samples the second time"):
        list(data.batches(2))


def test_an_iterator_that_is_used_up_is_refused() -> None:
    once = iter([{"x": np.ones((4, 4), np.float32)}])
    data = open_data(lambda: once, model_of(x=(TensorProto.FLOAT, ("n", 4))))
    with pytest.raises(DataError, match="gives other samples the second time"):
        list(data.batches(2))


def test_what_is_no_archive_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    for content in (b"garbage", b"\x80\x04K\x01.", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not an archive of named arrays") as caught:
            open_data(path, DYNAMIC)
        assert "pickle" not in f"{caught.value.message} {caught.value.hint}"
