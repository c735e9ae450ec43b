"""The small language model of `models/`: what its card says of it is so, and it does what it is there for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt import layers, walk
from graphopt.data import open_data

ort = pytest.importorskip("onnxruntime")

MODELS = Path(__file__).resolve().parent.parent / "models"
MODEL, HELD = MODELS / "pylm.onnx", MODELS / "pylm.npz"
TRAIN, CALIBRATION = MODELS / "pylm_train.npz", MODELS / "pylm_calibration.npz"
VOCABULARY, CONTEXT, LAYERS = 1024, 256, 6
LARGEST_MODEL, LARGEST_TOKENS = 6_000_000, 1_500_000  # bytes that a repository can bear


@pytest.fixture(scope="module")
def model() -> graphopt.ir.Model:
    return graphopt.load(MODEL)


@pytest.fixture(scope="module")
def card() -> str:
    return (MODELS / "pylm.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def session() -> Any:
    return ort.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


def ids_of(file: Path) -> np.ndarray:
    with np.load(file) as arrays:
        return np.asarray(arrays["ids"])


def tokens() -> dict[str, int]:
    found: dict[str, int] = json.loads((MODELS / "pylm_tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return found


def nats(session: Any, ids: np.ndarray) -> float:
    """Return the mean cross-entropy of the next token, written without graphopt's."""
    (logits,) = session.run(None, {"ids": ids.astype(np.int64)})
    wide = logits[:, :-1].astype(np.float64)
    sums = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    chosen = np.take_along_axis(wide, ids[:, 1:, None].astype(np.int64), -1)[..., 0]
    return float((sums - chosen).mean())


def test_files_are_small_enough_to_keep() -> None:
    assert MODEL.stat().st_size <= LARGEST_MODEL
    assert sum(file.stat().st_size for file in (HELD, TRAIN, CALIBRATION)) <= LARGEST_TOKENS


def test_model_is_a_llama_with_the_names_of_its_modules(model: graphopt.ir.Model) -> None:
    assert [value.name for value in model.graph.inputs] == ["ids"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["batch", "tokens"]
    names = {node.name for node in model.graph}
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    for number in range(LAYERS):
        for part in (*linear, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            assert f"layers.{number}.{part}" in names
            assert f"layers.{number}.{part}.weight" in model.graph.initializers
    assert {"embed_tokens", "lm_head"} <= names
    assert "layers.3.mlp.up_proj" in {layer.name for layer in layers.layers_of(model)}


def test_embedding_is_stored_once(model: graphopt.ir.Model) -> None:
    tables = [v for v in walk.initializers(model) if sorted(map(int, v.shape or ())) == [128, VOCABULARY]]
    assert len(tables) == 1
    assert {use.node.op_type for use in tables[0].uses()} == {"Gather", "Transpose"}


def test_model_holds_no_notes_of_the_machine_it_was_made_on() -> None:
    content = MODEL.read_bytes()
    assert not [word for word in (b"pylm.py", b"stack_trace", b"site-packages") if word in content]


@pytest.mark.parametrize("file", [HELD, TRAIN, CALIBRATION])
def test_tokens_are_what_the_model_takes(file: Path, model: graphopt.ir.Model) -> None:
    ids = ids_of(file)
    assert ids.dtype == np.uint16
    assert ids.shape[1] == CONTEXT
    assert ids.max() < VOCABULARY
    batch = next(iter(open_data(str(file), model).take(2).batches(2)))
    assert batch.feeds["ids"].shape == (2, CONTEXT)


def test_no_held_out_row_is_trained_on() -> None:
    held = {row.tobytes() for row in ids_of(HELD)}
    for file in (TRAIN, CALIBRATION):
        assert not held & {row.tobytes() for row in ids_of(file)}


def test_tokenizer_spells_its_tokens_in_bytes() -> None:
    known = tokens()
    assert sorted(known.values()) == list(range(VOCABULARY))
    assert known["<|module|>"] == 0
    assert {"def", "Ġreturn", "Ġself"} <= known.keys()
    assert 0 in ids_of(TRAIN)


def test_card_says_what_the_files_hold(card: str, session: Any, model: graphopt.ir.Model) -> None:
    found = re.search(r"Perplexity \| ([\d.]+) ", card)
    assert found is not None
    ids = ids_of(HELD)
    some = ids[:: len(ids) // 24]
    # A few rows say roughly what all of them do.
    assert nats(session, some) == pytest.approx(math.log(float(found[1])), rel=0.1)
    nodes = re.search(r"Nodes \| (\d+):", card)
    assert nodes is not None
    assert int(nodes[1]) == sum(1 for _ in walk.every_node(model))
    assert f"uint16 [{len(ids)}, {CONTEXT}]" in card
    assert f"uint16 [{len(ids_of(TRAIN))}, {CONTEXT}]" in card
    weights = re.search(r"kB, ([\d,]+) weights", card)
    assert weights is not None
    assert int(weights[1].replace(",", "")) == pytest.approx(1.31e6, rel=0.01)
    assert "PSF License Agreement" in card
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODELS / "pylm_LICENSE.txt").read_text(encoding="utf-8")


def test_model_knows_more_than_how_often_tokens_are(session: Any) -> None:
    ids = ids_of(HELD)
    shares = np.bincount(ids.reshape(-1), minlength=VOCABULARY) / ids.size
    by_frequency = -float((shares * np.log(np.maximum(shares, 1e-12))).sum())
    assert nats(session, ids[:8]) < 0.75 * by_frequency


def test_any_batch_and_any_length_are_taken(session: Any) -> None:
    ids = ids_of(HELD)[:3].astype(np.int64)
    (all_rows,) = session.run(None, {"ids": ids})
    (one_row,) = session.run(None, {"ids": ids[1:2, :17]})
    # What a token is followed by does not depend on what comes later, nor on other rows.
    np.testing.assert_allclose(one_row[0], all_rows[1, :17], atol=1e-4)
    twice = np.concatenate((ids, ids), axis=1)  # longer than it was trained on
    assert session.run(None, {"ids": twice[:1]})[0].shape == (1, 2 * CONTEXT, VOCABULARY)


def test_passes_take_it() -> None:
    """Half of the weights of every layer go, in a pattern, and the figures say what that costs."""
    result = graphopt.optimize(
        MODEL,
        "prune:pattern=2of4:method=magnitude:include=layers.*",
        data={"ids": ids_of(CALIBRATION)[:4]},
        evaluation={"ids": ids_of(HELD)[:4]},
        verify="structure",
        timed=False,
    )
    before, after = result.report.before, result.report.after
    assert after is not None
    assert after.metrics["perplexity"] > before.metrics["perplexity"] > 1
    assert after.nonzero is not None
    assert after.nonzero < 0.6 * before.parameters
