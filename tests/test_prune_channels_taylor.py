"""The Taylor criterion: gradients of gates against those worked out by hand, labels or none, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import shapes
from graphopt.data import Batch
from graphopt.errors import PassError, UsageError
from graphopt.passes.analyses.channel_groups import ChannelGroup, channel_groups
from graphopt.passes.lossy import channel_gradients
from graphopt.passes.lossy.channel_gradients import gate_gradients, orders_by_gradient

from .pass_runs import outputs_of
from .removed_channels import context, parsed

# Central differences of a tenth are off by a sixth of a hundredth of the third derivative.
TOLERANCE = 0.01

DENSE = """<ir_version: 8, opset_import: ["": 17]>
dense (float[N, 6] x) => (float[N, 4] y)
<float[8, 6] w1, float[8] b1, float[7, 8] w2, float[7] b2, float[4, 7] w3>
{
    c1 = Gemm <transB = 1> (x, w1, b1)
    t1 = Tanh (c1)
    c2 = Gemm <transB = 1> (t1, w2, b2)
    t2 = Tanh (c2)
    y = Gemm <transB = 1> (t2, w3)
}"""

TOKENS = """<ir_version: 8, opset_import: ["": 17]>
tokens (float[N, T, 6] x) => (float[N, T, 5] y)
<float[6, 8] w1, float[8, 5] w2>
{
    c = MatMul (x, w1)
    t = Tanh (c)
    y = MatMul (t, w2)
}"""

# The depthwise convolution keeps its channels apart: what reads the group is the last layer alone.
CONVOLUTIONS = """<ir_version: 8, opset_import: ["": 17]>
convolutions (float[N, 3, 6, 6] x{gate}) => (float[N, 5] y)
<float[8, 3, 3, 3] w1, float[8] b1, float[8, 1, 3, 3] w2, float[5, 8, 3, 3] w3>
{{
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    s1 = Sigmoid (c1)
    c2 = Conv <group = 8, pads = [1, 1, 1, 1]> (s1, w2)
    s2 = Tanh (c2)
    {gated}
    c3 = Conv ({read}, w3)
    p = GlobalAveragePool (c3)
    y = Flatten (p)
}}"""

NOT_SCORES = {
    "one value": (("float[N, 4] y", "float[N, 1] y"), ("float[4, 7] w3", "float[1, 7] w3")),
    "classes": (
        ("float[N, 4] y", "int64[N, 1] y"),
        ("    y = Gemm <transB = 1> (t2, w3)", "    z = Gemm <transB = 1> (t2, w3)\n    y = ArgMax <axis = 1> (z)"),
    ),
}


def rows(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def labels_of(classes: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, classes, shape)


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: one.const_value.numpy().astype(np.float64) for name, one in model.graph.initializers.items()}


def shares(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def measured(model: ir.Model, x: np.ndarray, labels: np.ndarray | None) -> list[np.ndarray]:
    """Return the gradients of every group, on samples in batches of 5."""
    batches = [
        Batch(
            {"x": x[start : start + 5]}, labels[start : start + 5] if labels is not None else None, len(x[start:][:5])
        )
        for start in range(0, len(x), 5)
    ]
    found = [gate_gradients(group, batches, context(model)) for group in channel_groups(model).groups]
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def by_hand(model: ir.Model, x: np.ndarray, labels: np.ndarray | None) -> list[np.ndarray]:
    """Return the mean over rows of |dL/dgate| of both layers of DENSE, by the chain rule."""
    w = weights(model)
    t1 = np.tanh(x @ w["w1"].T + w["b1"])
    t2 = np.tanh(t1 @ w["w2"].T + w["b2"])
    logits = t2 @ w["w3"].T
    labels = logits.argmax(-1) if labels is None else labels
    to_logits = shares(logits) - np.eye(4)[labels]
    to_t2 = to_logits @ w["w3"]
    to_t1 = (to_t2 * (1 - t2**2)) @ w["w2"]
    return [np.abs(to_t1 * t1).mean(0), np.abs(to_t2 * t2).mean(0)]


@pytest.mark.parametrize("labelled", [True, False])
def test_gradients_are_those_of_the_chain_rule(labelled: bool) -> None:
    model, x = parsed(DENSE), rows(12, 6)
    labels = labels_of(4, 12) if labelled else None
    for given, wanted in zip(measured(model, x, labels), by_hand(model, x, labels), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=TOLERANCE, atol=TOLERANCE * wanted.max())


def test_probabilities_count_as_the_logits_they_are_made_of() -> None:
    text = DENSE.replace("y = Gemm <transB = 1> (t2, w3)", "z = Gemm <transB = 1> (t2, w3)\n    y = Softmax (z)")
    x, labels = rows(12, 6), labels_of(4, 12)
    plain, soft = (measured(parsed(one), x, labels) for one in (DENSE, text))
    for given, wanted in zip(soft, plain, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-5)


def test_positions_of_a_sample_count_by_their_mean() -> None:
    model, x, labels = parsed(TOKENS), rows(7, 3, 6), labels_of(5, 7, 3)
    w = weights(model)
    t = np.tanh(x @ w["w1"])
    slopes = ((shares(t @ w["w2"]) - np.eye(5)[labels]) @ w["w2"].T) * t
    (given,) = measured(model, x, labels)
    wanted = np.abs(slopes.mean(1)).mean(0)
    np.testing.assert_allclose(given, wanted, rtol=TOLERANCE, atol=TOLERANCE * wanted.max())


def test_gates_of_convolutions_multiply_what_is_read() -> None:
    """Against a model with a gate of its own behind a depthwise convolution, turned much less."""
    model = parsed(CONVOLUTIONS.format(gate="", gated="", read="s2"))
    gated = parsed(CONVOLUTIONS.format(gate=", float[8, 1, 1] g", gated="m = Mul (s2, g)", read="m"))
    x, labels, step = rows(6, 3, 6, 6), labels_of(5, 6), 0.02

    def losses(gate: np.ndarray) -> np.ndarray:
        (logits,) = outputs_of(gated, {"x": x, "g": gate.reshape(8, 1, 1)}).values()
        return -np.log(shares(logits.astype(np.float64))[np.arange(6), labels])

    turned = step * np.eye(8, dtype=np.float32)
    wanted = np.array([np.abs(losses(1 + one) - losses(1 - one)).mean() / (2 * step) for one in turned])
    (given,) = measured(model, x, labels)
    np.testing.assert_allclose(given, wanted, rtol=0.02, atol=0.02 * wanted.max())


def pruned(text: str, labels: Any = None, spec: str = "ratio=0.25", **options: Any) -> graphopt.Result:
    data = {"x": rows(40, 6)} | ({"labels": labels} if labels is not None else {})
    return graphopt.optimize(parsed(text), f"prune-channels:criterion=taylor:{spec}", data=data, **options)


def remarks(result: graphopt.Result) -> str:
    return "\n".join(note.text for note in result.report.steps[-1].notes)


def test_what_the_loss_hardly_depends_on_goes() -> None:
    x, labels = rows(40, 6), labels_of(4, 40)
    model = parsed(DENSE)
    (first, _) = channel_groups(model).groups
    least = by_hand(model, x, labels)[0].argsort()
    ctx = context(model)
    ctx.data = graphopt.data.open_data({"x": x, "labels": labels}, model)
    order = orders_by_gradient([first], ctx)[first]
    # Other samples than all forty, so near the top places may differ.
    assert set(order[:2]) <= set(least[:4])
    result = pruned(DENSE, labels)
    shapes.infer_shapes(result.model)
    assert [group.size for group in channel_groups(result.model).groups] == [6, 5]
    assert "against the labels: 15 units, each in two runs of" in remarks(result)


def test_without_labels_the_models_own_answers_count_and_that_is_said() -> None:
    assert "what the model answers itself, as the samples have no labels" in remarks(pruned(DENSE))


def test_labels_decide() -> None:
    """Two units, one for each of two classes: the one goes that the labels do not ask for."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    gates (float[N, 2] x) => (float[N, 3] y)
    <float[2, 2] w1, float[3, 2] w2>
    { c = Gemm <transB = 1> (x, w1)  t = Sigmoid (c)  y = Gemm <transB = 1> (t, w2) }"""
    for label in (0, 1):
        model = parsed(text)
        for name, content in (("w1", np.eye(2)), ("w2", [[3, 0], [0, 3], [0, 0]])):
            model.graph.initializers[name].const_value = ir.tensor(np.array(content, np.float32), name=name)
        ctx = context(model)
        ctx.data = graphopt.data.open_data({"x": 0.01 * rows(10, 2), "labels": np.full(10, label)}, model)
        (group,) = channel_groups(model).groups
        assert orders_by_gradient([group], ctx)[group].tolist() == [1 - label, label]


def test_large_models_are_measured_on_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_gradients, "_MOST_MACS", 2 * 15 * (6 * 8 + 8 * 7 + 7 * 4) * 7)
    assert "each in two runs of 7 samples" in remarks(pruned(DENSE))


def test_twice_is_the_same() -> None:
    first, second = (pruned(DENSE, labels_of(4, 40)).model for _ in range(2))
    for name, value in weights(first).items():
        assert np.array_equal(value, weights(second)[name])


@pytest.mark.parametrize("spec", ["macs=0.7:multiple=1", "macs=0.7:multiple=1:allocate=uniform"])
def test_targets_work_with_it(spec: str) -> None:
    result = pruned(DENSE, labels_of(4, 40), spec)
    assert result.report.after.macs <= 0.7 * result.report.before.macs


def test_a_group_the_first_output_does_not_show_is_ordered_by_weights() -> None:
    text = DENSE.replace("(float[N, 4] y)", "(float[N, 4] y, float[N, 3] z)").replace(
        "w3>", "w3, float[9, 6] v, float[3, 9] u>"
    )
    text = text.replace(
        "t2, w3)", "t2, w3)\n    d = Gemm <transB = 1> (x, v)\n    e = Tanh (d)\n    z = Gemm <transB = 1> (e, u)"
    )
    said = remarks(pruned(text, labels_of(4, 40)))
    assert "groups ordered by their weights: 1, as the first output shows nothing of them" in said


@pytest.mark.parametrize("case", NOT_SCORES)
def test_outputs_that_are_no_scores_are_refused(case: str) -> None:
    text = DENSE
    for old, new in NOT_SCORES[case]:
        text = text.replace(old, new)
    with pytest.raises(PassError, match=r"criterion=taylor.*cross-entropy.*needs") as caught:
        pruned(text)
    assert "criterion=obs" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("labels", "what"),
    [(labels_of(4, 40) + 1, "label 4"), (rows(40), "float32"), (labels_of(4, 40, 3), "labels of shape")],
)
def test_labels_that_are_no_classes_are_refused(labels: np.ndarray, what: str) -> None:
    with pytest.raises(PassError, match=what) as caught:
        pruned(DENSE, labels, metric="sqnr_db")
    assert "criterion=obs" in (caught.value.hint or "")


def test_it_needs_data() -> None:
    with pytest.raises(UsageError, match="calibration"):
        graphopt.optimize(parsed(DENSE), "prune-channels:criterion=taylor")


def test_what_no_layer_reads_cannot_be_measured() -> None:
    assert gate_gradients(ChannelGroup("none", 2, {}), [], context(parsed(DENSE))) is None
