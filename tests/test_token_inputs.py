"""Token ids among other inputs: language models as exporters leave them are told from encoders, scored and trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.data import Batch, open_data
from graphopt.errors import DataError
from graphopt.metrics import KL, SQNR, Agreement, Perplexity, default_metrics
from graphopt.token_inputs import mask_feed, mask_of, predicts_tokens, token_feed, token_input

from .torch_models import model_of

VOCABULARY, ROWS, TOKENS, BEFORE = 11, 8, 5, 3
IDS = np.arange(TOKENS)[None] + np.arange(ROWS)[:, None]
MASK = np.tril(np.ones((ROWS, TOKENS), np.int64), 1)
LATER = ", ".join("0" if key <= query else "-1e9" for query in range(TOKENS) for key in range(TOKENS))

# How a model shows that no token sees those behind it: what is read beside the ids, what hides, from which constant.
SHOWS = {
    "positions": (", int64[n, t] position_ids", "", ""),
    "triangle": ("", "seen = Add (e, hidden)", f", float[{TOKENS}, {TOKENS}] hidden = {{{LATER}}}"),
    "cut": ("", "low = Trilu <upper = 0> (e)", ""),
    "compared": ("", "seen = LessOrEqual (input_ids, other)", ""),
    "declared": ("", "seen = Attention <is_causal = 1> (e, e, e)", ""),
}


def decoder(shows: str = "positions", *, width: int = VOCABULARY, ids: str = "input_ids") -> ir.Model:
    """Return a table of 11 tokens that are looked up, and scores of them."""
    inputs, node, constant = SHOWS.get(shows, ("", "", ""))
    other = "other = Identity (input_ids)" if "other" in node else ""
    numbers = np.random.default_rng(0).normal(size=(VOCABULARY, 4 + width)).astype(np.float32) / 2
    table, scores = (", ".join(map(str, part.reshape(-1))) for part in (numbers[:, :4], numbers[:4, 4:]))
    text = f"""
        g (int64[n, t] attention_mask, int64[n, t] input_ids{inputs}) => (float[n, t, {width}] logits)
        <float[{VOCABULARY}, 4] table = {{{table}}}, float[4, {width}] w = {{{scores}}}{constant}>
        {{
            e = Gather (table, input_ids)
            {other}
            {node}
            logits = MatMul (e, w)
        }}
    """
    return model_of(text.replace("input_ids", ids), opset=23)


@pytest.mark.parametrize("shows", SHOWS)
def test_decoders_predict_tokens(shows: str) -> None:
    model = decoder(shows)
    assert (token_input(model).name, mask_of(model).name) == ("input_ids", "attention_mask")  # type: ignore[union-attr]
    assert predicts_tokens(model)
    assert default_metrics(model, Batch({"input_ids": IDS}, None, ROWS)) == [Perplexity, Agreement, KL, SQNR]


def test_encoders_do_not() -> None:
    """Of several inputs, a model may as well be one that fills gaps; and features of tokens are no scores."""
    assert not predicts_tokens(decoder("nothing"))
    assert not predicts_tokens(decoder(width=VOCABULARY - 1))
    assert not predicts_tokens(decoder(width=VOCABULARY + 1))
    last = decoder()
    last.graph.outputs[0].shape = ir.Shape(["n", 1, VOCABULARY])
    assert not predicts_tokens(last)
    weight = decoder("triangle")
    constant = next(one for one in weight.graph.initializers.values() if one.name == "hidden")
    array = constant.const_value.numpy().copy()  # type: ignore[union-attr]
    array[2, 1] = -1.0
    constant.const_value = ir.tensor(array, name="hidden")
    assert not predicts_tokens(weight)


def test_of_one_input_the_vocabulary_decides() -> None:
    for width, expected in ((VOCABULARY, True), (VOCABULARY - 1, False)):
        model = decoder("nothing", width=width)
        del model.graph.inputs[0]
        assert predicts_tokens(model) is expected


def test_tokens_are_found_by_what_they_are_not() -> None:
    ids = np.zeros((2, 3), np.int64)
    others = dict.fromkeys(("attention_mask", "position_ids", "token_type_ids", "input_mask:0"), ids)
    assert token_feed({**others, "ids": ids}) == "ids"
    assert (
        token_feed({"input_ids": ids, "decoder_attention_mask": ids, "decoder_input_ids": ids}) == "decoder_input_ids"
    )
    assert token_feed({**others, "x": ids.astype(np.float32), "lengths": ids[0]}) is None
    assert mask_feed({"padding_mask": ids, **others}) == "attention_mask"
    assert mask_feed(others, "decoder_input_ids") is None
    assert mask_feed({**others, "decoder_attention_mask": ids}, "decoder_input_ids") == "decoder_attention_mask"
    assert token_input(decoder(ids="words")).name == "words"  # type: ignore[union-attr]


def perplexity(labels: Any = None, **feeds: Any) -> float:
    metric = Perplexity()
    metric.update({"logits": LOGITS}, {}, Batch(feeds, labels, ROWS))
    return float(np.log(metric.value()))


LOGITS = np.random.default_rng(1).normal(size=(ROWS, TOKENS, VOCABULARY + ROWS)).astype(np.float32)


def test_padding_is_not_scored() -> None:
    shares = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    losses = -np.take_along_axis(shares[:, :-1], IDS[:, 1:, None], -1)[..., 0]
    real = MASK[:, 1:] == 1
    assert not real.all()
    assert perplexity(input_ids=IDS) == pytest.approx(losses.mean(), rel=1e-6)
    assert perplexity(attention_mask=MASK, input_ids=IDS) == pytest.approx(losses[real].mean(), rel=1e-6)
    # A decoder's mask begins with what it has read before.
    longer = np.concatenate([np.ones((ROWS, BEFORE), np.int64), MASK], axis=1)
    assert perplexity(attention_mask=longer, input_ids=IDS) == pytest.approx(losses[real].mean(), rel=1e-6)
    # That of an encoder is of what the encoder reads.
    feeds = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS}
    assert perplexity(**feeds) == pytest.approx(losses.mean(), rel=1e-6)
    # Padding before a text predicts nothing, so its first token is no target, as without padding.
    assert perplexity(attention_mask=MASK[:, ::-1], input_ids=IDS) == pytest.approx(
        losses[(MASK[:, :0:-1] & MASK[:, -2::-1]) == 1].mean(), rel=1e-6
    )
    labels = np.where(MASK == 1, IDS, -100)
    targets = -np.take_along_axis(shares, IDS[..., None], -1)[..., 0]
    assert perplexity(labels, input_ids=IDS) == pytest.approx(targets[MASK == 1].mean(), rel=1e-6)


def test_scores_of_the_last_token_alone_are_refused() -> None:
    with pytest.raises(DataError, match="needs token ids in and"):
        Perplexity().update({"logits": LOGITS[:, -1:]}, {}, Batch({"input_ids": IDS}, None, ROWS))


def test_decoders_are_trained_by_their_own_mask() -> None:
    pytest.importorskip("torch")
    from graphopt.passes.recovery.objectives.scores import items_of

    model = decoder(ids="decoder_input_ids")
    for name, mask in {"attention_mask": None, "decoder_attention_mask": "decoder_attention_mask"}.items():
        model.graph.inputs[0].name = name
        items = items_of(model, model.graph.outputs[0])
        assert (items.tokens, items.mask) == ("decoder_input_ids", mask)


@pytest.mark.parametrize(
    ("scored", "fed", "found"), [("logits_dim_1", "t", True), (6, "t", True), (6, 6, True), (6, 5, False)]
)
def test_sizes_of_scores_may_have_names_of_their_own(scored: Any, fed: Any, found: bool) -> None:
    pytest.importorskip("torch")
    from graphopt.passes.recovery.objectives.scores import scored_tokens

    model = decoder()
    token_input(model).shape = ir.Shape(["n", fed])  # type: ignore[union-attr]
    model.graph.outputs[0].shape = ir.Shape(["n", scored, VOCABULARY])
    items = scored_tokens(model, model.graph.outputs[0])
    assert (items.tokens, items.mask) == (("input_ids", "attention_mask") if found else (None, None))


def cached() -> ir.Model:
    """Return a decoder that hands on what it has read, as Transformers' are exported."""
    model = decoder("nothing")
    text = """
        g (int64[n, t] attention_mask, int64[n, t] input_ids, float[n, 1, p, 2] past_key_values) =>
          (float[n, t, 11] logits, float[n, 1, p, 2] present)
        { logits = Identity (input_ids)  present = Identity (past_key_values) }
    """
    ports = model_of(text)
    past, present = ports.graph.inputs[2], ports.graph.outputs[1]
    node = present.producer()
    assert node is not None
    ports.graph.outputs.clear()
    ports.graph.remove(node)
    ports.graph.inputs.clear()
    model.graph.inputs.append(past)
    model.graph.append(node)
    model.graph.outputs.append(present)
    model.graph.inputs[0].shape = ir.Shape(["n", "all"])
    return model


@pytest.mark.parametrize(("before", "mask"), [(0, MASK), (BEFORE, MASK), (0, MASK[:, ::-1])])
def test_auto_trains_language_models_as_they_are_exported(before: int, mask: Any) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from graphopt.passes.recovery.aim import Aim
    from graphopt.passes.recovery.objectives.objective import choose
    from graphopt.passes.recovery.training.samples import StoredSamples

    model = cached()
    data = {
        "input_ids": IDS % VOCABULARY,
        "attention_mask": np.concatenate([np.ones((ROWS, before), np.int64), mask], axis=1),
        "past_key_values": np.zeros((ROWS, 1, before, 2), np.float32),
    }
    opened = open_data(data, model)
    objective, rows = choose(Aim(), model, None, opened), np.arange(ROWS)
    batch = StoredSamples(opened).batch(rows, None, rows)
    logits = torch.from_numpy(LOGITS[..., :VOCABULARY])
    losses = objective({"logits": logits}, None, batch)
    assert objective.describe() == "next-token cross-entropy of `logits`"
    assert losses.counts == {"next-token": (mask[:, 1:] & mask[:, :-1]).sum()}
    metric = Perplexity()
    metric.update({"logits": logits.numpy()}, {}, Batch(data, None, ROWS))
    assert float(losses.loss()) == pytest.approx(np.log(metric.value()), rel=1e-5)
    report = graphopt.recover(model, data=data, options={"steps": 15, "rate": 0.1, "held_out": 0}, threads=1).report
    assert report.after is not None
    assert report.after.metrics["perplexity"] < report.before.metrics["perplexity"]
