"""What training makes small: each term against the metric it stands for, and exact however a batch is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import graphopt  # noqa: E402
from graphopt import registry  # noqa: E402
from graphopt.data import Batch, Dataset, open_data  # noqa: E402
from graphopt.errors import DataError, GraphoptError, PassError, UsageError  # noqa: E402
from graphopt.generated import generated_feeds  # noqa: E402
from graphopt.metrics import KL, Perplexity, cross_entropies  # noqa: E402
from graphopt.passes.recovery.aim import Aim  # noqa: E402
from graphopt.passes.recovery.objectives.cut_values import cut_values, ends_of_blocks  # noqa: E402
from graphopt.passes.recovery.objectives.objective import Objective, choose  # noqa: E402
from graphopt.passes.recovery.training.lowered_values import values_of  # noqa: E402
from graphopt.passes.recovery.training.samples import StoredSamples, TrainingBatch  # noqa: E402
from graphopt.shapes import infer_shapes  # noqa: E402

from .pass_runs import loaded  # noqa: E402

RNG = np.random.default_rng(0)
VOCABULARY = 11
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.int64)
IDS = RNG.integers(0, VOCABULARY, MASK.shape)
TOKENS = {"input_ids": IDS, "attention_mask": MASK}
IMAGES = RNG.normal(0, 1, (6, 3, 6, 6)).astype(np.float32)
CLASSES = np.array([0, 3, 2, 1, 3, 0])
NEXT = Aim(task="next-token")
ONLY_FEATURES = Aim(features=1.0, distill=0.0, task="none")
ONLY_ATTENTION = Aim(attention=1.0, distill=0.0, task="none")


def made(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: dict[str, Any]) -> ir.Model:
    """Return a model of opset 17; inputs that hold ids or a mask are of whole numbers, the rest of floats."""
    whole = ("ids", "mask")
    graph = helper.make_graph(
        [helper.make_node(op, reads, [gives], gives, **more) for op, reads, gives, more in nodes],
        "g",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64 if n.endswith(whole) else TensorProto.FLOAT, dims)
            for n, dims in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return loaded(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def floats(*dims: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(0, 0.4, dims).astype(np.float32)


def classifier(width: int = 8, end: str = "", rows: Any = "N", noise: float = 0.0) -> ir.Model:
    """Return Conv, Relu, a residual block, pooling and Gemm; a smaller width has the first channels of a larger."""
    whole = {
        "w0": floats(8, 3, 3, 3),
        "w1": floats(8, 8, 3, 3, seed=2),
        "w2": floats(8, 4, seed=3),
        "b2": floats(4, seed=4),
    }
    whole = {name: array + noise * floats(*array.shape, seed=9) for name, array in whole.items()}
    constants = {
        "w0": whole["w0"][:width],
        "w1": whole["w1"][:width, :width],
        "w2": whole["w2"][:width],
        "b2": whole["b2"],
    }
    nodes = [
        ("Conv", ["x", "w0"], "c0", {"pads": [1, 1, 1, 1]}),
        ("Relu", ["c0"], "r0", {}),
        ("Conv", ["r0", "w1"], "c1", {"pads": [1, 1, 1, 1]}),
        ("Add", ["c1", "r0"], "a1", {}),
        ("Relu", ["a1"], "r1", {}),
        ("Conv", ["r1", "w1"], "c2", {"pads": [1, 1, 1, 1]}),
        ("Add", ["c2", "r1"], "a2", {}),
        ("GlobalAveragePool", ["a2"], "p", {}),
        ("Flatten", ["p"], "f", {}),
        ("Gemm", ["f", "w2", "b2"], "y" if not end else "logits", {}),
        *([(end, ["logits"], "y", {})] if end else []),
    ]
    return made(nodes, {"x": [rows, 3, 6, 6]}, {"y": [rows, 4]}, constants)


def language_model(noise: float = 0.0, mask: bool = True) -> ir.Model:
    """Return an embedding, one attention of a head with a mask, a residual sum and logits."""
    constants = {
        "table": floats(VOCABULARY, 6),
        "wq": floats(6, 6, seed=2),
        "wk": floats(6, 6, seed=3),
        "wv": floats(6, 6, seed=4),
        "wl": floats(6, VOCABULARY, seed=5),
    }
    constants = {name: array + noise * floats(*array.shape, seed=9) for name, array in constants.items()}
    constants |= {"axes": np.array([1]), "one": np.float32(1), "low": np.float32(-1e9)}
    nodes = [
        ("Gather", ["table", "input_ids"], "e", {}),
        *[("MatMul", ["e", f"w{part}"], part, {}) for part in "qkv"],
        *[("Unsqueeze", [part, "axes"], f"{part}h", {}) for part in "qkv"],
        ("Transpose", ["kh"], "kt", {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["qh", "kt"], "s", {}),
        ("Cast", ["attention_mask"], "real", {"to": TensorProto.FLOAT}),
        ("Sub", ["one", "real"], "padding", {}),
        ("Mul", ["padding", "low"], "hidden", {}),
        ("Unsqueeze", ["hidden", "both"], "bias", {}),
        ("Add", ["s", "bias"], "scores", {}),
        ("Softmax", ["scores"], "attention", {"axis": -1}),
        ("MatMul", ["attention", "vh"], "o", {}),
        ("Squeeze", ["o", "axes"], "os", {}),
        ("Add", ["os", "e"], "stream", {}),
        ("MatMul", ["stream", "wl"], "logits", {}),
    ]
    constants["both"] = np.array([1, 2])
    inputs = {"input_ids": ["N", "T"], "attention_mask": ["N", "T"]}
    return made(nodes, inputs, {"logits": ["N", "T", VOCABULARY]}, constants)


def data_for(model: ir.Model, labels: Any = None, **feeds: Any) -> Dataset:
    source = dict(feeds) if feeds else {"x": IMAGES} if model.graph.inputs[0].name == "x" else dict(TOKENS)
    return open_data(source if labels is None else {**source, "labels": labels}, model)


class Bench:
    """A student and a teacher, lowered for what an aim observes of them, with their samples."""

    def __init__(self, aim: Aim, student: ir.Model, teacher: ir.Model | None, data: Dataset) -> None:
        self.objective = choose(aim, student, teacher, data)
        torch_backend: Any = registry.backend("torch")
        self.student = torch_backend.lower(student, observe=self.objective.student_values, differentiable=True)
        self.teacher = None
        if teacher is not None:
            self.teacher = torch_backend.lower(teacher, observe=self.objective.teacher_values, differentiable=False)
        self.samples = StoredSamples(data)
        self.objective.prepare([self.run(self.rows())])

    def rows(self) -> Any:
        return np.arange(len(self.samples))

    def run(self, rows: Any) -> tuple[Any, Any, TrainingBatch]:
        batch = self.samples.batch(rows, None, self.rows())
        student = values_of(self.student, batch)
        return student, None if self.teacher is None else values_of(self.teacher, batch), batch

    def loss(self, rows: Any = None) -> Any:
        return self.objective(*self.run(self.rows() if rows is None else rows)).loss()


def outputs_of(bench: Bench, side: str = "student") -> dict[str, Any]:
    values = bench.run(bench.rows())[0 if side == "student" else 1]
    return {name: value.detach().numpy() for name, value in values.items()}


AIMS = [
    Aim(),
    Aim(distance="mse"),
    ONLY_FEATURES,
    ONLY_ATTENTION,
]


@pytest.mark.parametrize("aim", AIMS, ids=lambda aim: f"{aim.distance}{aim.features:g}{aim.attention:g}")
@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_parts_of_a_batch_add_up_to_it(aim: Aim, kind: str) -> None:
    """Totals over parts, divided by the counts of the whole, are the loss of the whole, and so is its gradient."""
    make = classifier if kind == "images" else language_model
    bench = Bench(aim, make(noise=0.3), make(), data_for(make()))
    # Not of the mask's numbers, which stand for minus infinity.
    weights = [weight for weight in bench.student.parameters() if weight.ndim > 1]
    for weight in weights:
        weight.requires_grad_(True)
    whole = bench.loss()
    gradients = torch.autograd.grad(whole, weights, allow_unused=True)
    parts = [bench.rows()[:1], bench.rows()[1:]]
    counts = bench.objective.counts(bench.run(bench.rows())[2])
    summed = sum(bench.objective(*bench.run(part)).loss(counts) for part in parts)
    assert whole.item() > 1e-6
    assert summed.item() == pytest.approx(whole.item(), rel=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(summed, weights, allow_unused=True), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("aim", AIMS, ids=lambda aim: f"{aim.distance}{aim.features:g}{aim.attention:g}")
def test_a_student_like_its_teacher_has_no_loss(aim: Aim) -> None:
    for make in (classifier, language_model):
        assert float(Bench(aim, make(), make(), data_for(make())).loss()) == pytest.approx(0, abs=1e-6)


def test_kl_is_the_metric_times_the_square_of_the_temperature() -> None:
    student, teacher = classifier(noise=0.5), classifier()
    aim = Aim(distance="kl", temperature=1.0)
    bench, metric = Bench(aim, student, teacher, data_for(student)), KL()
    metric.update(outputs_of(bench), outputs_of(bench, "teacher"), Batch({}, None, len(IMAGES)))
    assert float(bench.loss()) == pytest.approx(metric.value(), rel=1e-4)
    hot = Bench(Aim(distance="kl", temperature=4e2), student, teacher, data_for(student))
    mine, theirs = (outputs_of(hot, side)["y"] for side in ("student", "teacher"))
    # Hinton et al.: at high temperatures, and with T², half the variance of the difference of logits.
    assert float(hot.loss()) == pytest.approx(float(np.var(mine - theirs, axis=1).mean() / 2), rel=0.02)


@pytest.mark.parametrize("end", ["Softmax", "LogSoftmax"])
def test_probabilities_are_compared_as_the_logits_they_stand_for(end: str) -> None:
    plain = Bench(Aim(distance="kl"), classifier(noise=0.5), classifier(), data_for(classifier()))
    other = classifier(noise=0.5, end=end)
    assert float(Bench(Aim(), other, classifier(end=end), data_for(other)).loss()) == pytest.approx(
        float(plain.loss()), rel=1e-4
    )
    # The teacher may give logits and the student shares of them, too.
    mixed = Bench(Aim(distance="kl"), other, classifier(), data_for(other))
    assert float(mixed.loss()) == pytest.approx(float(plain.loss()), rel=1e-4)


@pytest.mark.parametrize(
    ("end", "name", "measure"),
    [
        ("Relu", "logits", "KL at temperature 4"),
        ("Sigmoid", "scores", "squared error"),
        ("Tanh", "y", "squared error"),
        ("Softmax", "y", "KL at temperature 4"),
    ],
)
def test_outputs_of_classes_are_told_from_others(end: str, name: str, measure: str) -> None:
    nodes = [("MatMul", ["x", "w"], "m", {}), (end, ["m"], name, {})]
    model = made(nodes, {"x": ["N", 4]}, {name: ["N", 12]}, {"w": floats(4, 12)})
    objective = choose(Aim(), model, model, open_data({"x": floats(6, 4)}, model))
    assert [term.measure for term in objective.terms] == [measure]


def test_cross_entropy_is_that_of_the_metrics() -> None:
    for end in ("", "Softmax"):
        model = classifier(end=end)
        bench = Bench(Aim(), model, None, data_for(model, CLASSES))
        assert "cross-entropy" in bench.objective.describe()
        assert float(bench.loss()) == pytest.approx(cross_entropies(outputs_of(bench)["y"], CLASSES).mean(), rel=1e-5)


def test_labels_left_out_are_not_counted() -> None:
    labels = CLASSES.copy()
    labels[1:] = -100
    model = classifier()
    bench = Bench(Aim(), model, None, data_for(model, labels))
    assert bench.objective.counts(bench.run(bench.rows())[2]) == {"cross-entropy": 1.0}
    first = cross_entropies(outputs_of(bench)["y"][:1], CLASSES[:1])
    assert float(bench.loss()) == pytest.approx(first[0], rel=1e-5)


def test_next_token_is_the_logarithm_of_perplexity_where_nothing_pads() -> None:
    model, full = language_model(), np.ones_like(MASK)
    bench, metric = Bench(NEXT, model, None, data_for(model, input_ids=IDS, attention_mask=full)), Perplexity()
    metric.update(outputs_of(bench), {}, Batch({"input_ids": IDS}, None, len(IDS)))
    assert float(bench.loss()) == pytest.approx(np.log(metric.value()), rel=1e-5)


def test_padding_is_no_target() -> None:
    model = language_model()
    bench = Bench(NEXT, model, None, data_for(model))
    assert bench.objective.counts(bench.run(bench.rows())[2]) == {"next-token": float(MASK[:, 1:].sum())}
    other = IDS.copy()
    other[MASK == 0] = (other[MASK == 0] + 1) % VOCABULARY
    changed = Bench(NEXT, model, None, data_for(model, input_ids=other, attention_mask=MASK))
    assert float(changed.loss()) == pytest.approx(float(bench.loss()), rel=1e-5)


def test_rows_that_pad_a_fixed_batch_are_not_counted() -> None:
    fixed, free = classifier(rows=4, noise=0.3), classifier(noise=0.3)
    for aim in (Aim(), Aim(distance="mse"), Aim(features=1.0)):
        padded = Bench.__new__(Bench)  # the same but for how batches are put together
        padded.__init__(aim, fixed, classifier(rows=4), data_for(fixed, x=IMAGES[:3]))  # type: ignore[misc]
        plain = Bench(aim, free, classifier(), data_for(free, x=IMAGES[:3]))
        assert float(padded.loss()) == pytest.approx(float(plain.loss()), rel=1e-5)


def test_squared_error_against_labels() -> None:
    model, labels = classifier(), RNG.normal(0, 1, (6, 4)).astype(np.float32)
    bench = Bench(Aim(), model, None, data_for(model, labels))
    assert float(bench.loss()) == pytest.approx(float(np.square(outputs_of(bench)["y"] - labels).mean()), rel=1e-5)


def test_a_function_of_the_user_is_the_task(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(
        "def hinge(outputs, labels):\n    return outputs['y'].relu().sum(1) + labels\n"
        "def broken(outputs, labels):\n    raise ValueError('no')\n"
        "def numbers(outputs, labels):\n    return 1.0\n"
        "def constant(outputs, labels):\n    return labels.float()\n"
    )
    model = classifier()
    for weight in (
        bench := Bench(Aim(task=f"{file}:hinge"), model, None, data_for(model, CLASSES))
    ).student.parameters():
        weight.requires_grad_(True)
    wanted = np.maximum(outputs_of(bench)["y"], 0).sum(1) + CLASSES
    assert bench.loss().item() == pytest.approx(wanted.mean(), rel=1e-5)
    for name, words in (("broken", "ValueError: no"), ("numbers", "returns float"), ("constant", "without gradient")):
        with pytest.raises(DataError, match=words) as error:
            Bench(Aim(task=f"{file}:{name}"), model, None, data_for(model, CLASSES)).loss()
        assert error.value.hint


def test_distillation_and_task_share_the_loss() -> None:
    student, data = classifier(noise=0.3), data_for(classifier(), CLASSES)
    both = Bench(Aim(task="cross-entropy", distill=0.25), student, classifier(), data)
    assert both.objective.describe() == (
        "0.75 × cross-entropy against labels of `y` + 0.25 × KL at temperature 4 of `y`"
    )
    task = Bench(Aim(), student, None, data).loss()
    distance = Bench(Aim(distance="kl"), student, classifier(), data).loss()
    assert float(both.loss()) == pytest.approx(0.75 * float(task) + 0.25 * float(distance), rel=1e-5)


def test_errors_of_outputs_are_shares_of_their_power() -> None:
    bench = Bench(Aim(distance="mse"), classifier(noise=0.3), classifier(), data_for(classifier()))
    mine, theirs = (outputs_of(bench, side)["y"] for side in ("student", "teacher"))
    assert float(bench.loss()) == pytest.approx(
        float(np.square(mine - theirs).mean() / np.square(theirs).mean()), rel=1e-4
    )


def test_what_is_not_finite_in_the_original_has_no_part_in_errors() -> None:
    mask = np.array([0, 0, -np.inf, 0], np.float32)
    student, teacher = (
        made(
            [("MatMul", ["x", "w"], "m", {}), ("Add", ["m", "mask"], "y", {})],
            {"x": ["N", 3]},
            {"y": ["N", 4]},
            {"w": floats(3, 4, seed=seed), "mask": mask},
        )
        for seed in (1, 2)
    )
    bench = Bench(Aim(distance="mse"), student, teacher, data_for(student, x=floats(6, 3)))
    (weight,) = (one for one in bench.student.parameters() if one.ndim == 2)
    weight.requires_grad_(True)
    bench.loss().backward()
    mine, theirs = (outputs_of(bench, side)["y"][:, mask == 0] for side in ("student", "teacher"))
    wanted = np.square(mine - theirs).mean() / np.square(theirs).mean() * 3 / 4
    assert bench.loss().item() == pytest.approx(wanted, rel=1e-5)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_features_are_taken_between_blocks_and_mapped_where_channels_are_gone() -> None:
    teacher, student = classifier(), classifier(width=5)
    bench = Bench(ONLY_FEATURES, student, teacher, data_for(student))
    assert bench.objective.teacher_values == ("r0", "r1")
    first, second = (float(v) for v in bench.objective(*bench.run(bench.rows())).totals.values())
    # The first value is the teacher's but for channels that the others tell little of: less than all is lost.
    assert 0 < first < 0.7 * len(IMAGES)
    assert second < len(IMAGES)
    # What the map cannot explain is the residual of the least squares, which nothing of the student's can explain.
    mine, theirs = bench.run(bench.rows())[:2]
    kept = theirs["r0"][:, :5]
    assert torch.allclose(mine["r0"], kept, atol=1e-5)


def test_attention_maps_need_no_channels_in_common() -> None:
    bench = Bench(ONLY_ATTENTION, classifier(width=3), classifier(), data_for(classifier()))
    assert bench.objective.teacher_values == ("r0", "r1")
    mine, theirs = bench.run(bench.rows())[:2]
    total = 0.0
    for name in ("r0", "r1"):
        sides = [side[name].square().mean(1).flatten(1).numpy() for side in (mine, theirs)]
        one, other = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        total += float(np.square(one - other).sum(1).mean()) / 2
    assert float(bench.loss()) == pytest.approx(total, rel=1e-4)


def test_attention_weights_are_found_by_the_shape_of_the_graph() -> None:
    bench = Bench(
        ONLY_ATTENTION,
        language_model(noise=0.3),
        language_model(),
        data_for(language_model()),
    )
    assert bench.objective.teacher_values == ("attention",)
    mine, theirs = (side["attention"].numpy()[:, 0] for side in bench.run(bench.rows())[:2])
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = np.where(theirs > 0, theirs * np.log(theirs / mine), 0).sum(-1)
    assert float(bench.loss()) == pytest.approx((rows * MASK).sum() / MASK.sum(), rel=1e-4)


def test_cuts_are_where_all_goes_through_one_value() -> None:
    model = classifier()
    infer_shapes(model)
    assert [cut.value.name for cut in ends_of_blocks(cut_values(model))] == ["r0", "r1"]
    tokens = language_model()
    infer_shapes(tokens)
    assert "stream" in [cut.value.name for cut in cut_values(tokens)]
    assert not {"q", "k", "v", "attention"} & {cut.value.name for cut in cut_values(tokens)}


@pytest.mark.parametrize(
    ("aim", "labels", "with_teacher", "kind", "words"),
    [
        (Aim(), None, False, PassError, "no teacher, and no labels"),
        (Aim(task="cross-entropy"), None, False, DataError, "needs labels"),
        (Aim(task="cross-entropy"), np.array([0, 1, 2, 3, 4, 0]), False, DataError, "label 4 for outputs of 4 classes"),
        (Aim(task="cross-entropy"), np.array([0, 1, -1, 3, 1, 0]), False, DataError, "label -1"),
        (Aim(task="cross-entropy"), floats(6), False, DataError, "needs class numbers"),
        (Aim(task="mse"), floats(6, 3), False, DataError, "labels of 3 values a sample for output `y` of 4"),
        (Aim(task="next-token"), None, False, PassError, "needs token ids"),
        (Aim(distill=0.5), CLASSES, False, UsageError, "`distill` needs a teacher"),
        (Aim(features=1.0), CLASSES, False, UsageError, "`features` needs a teacher"),
        (Aim(reconstruct="blocks"), CLASSES, False, UsageError, "needs a teacher"),
        (Aim(distill=0.5), None, True, PassError, "the samples have no labels"),
        (Aim(distill=0.0, task="none"), None, True, UsageError, "leaves a part of the loss empty"),
        (Aim(task="mixing"), None, False, UsageError, "unknown task `mixing`"),
        (Aim(task="no.such.module:f"), CLASSES, False, UsageError, "cannot be imported"),
        (Aim(task="json:no_such"), CLASSES, False, UsageError, "no function `no_such`"),
        (Aim(task="no_such.py:f"), CLASSES, False, DataError, "does not exist"),
        (Aim(task="mse", distill=1.0), CLASSES, True, UsageError, "leaves nothing"),
        (Aim(augment=("turn",)), None, True, UsageError, "unknown augmentation `turn`"),
        (Aim(augment=("mixup",)), CLASSES, False, UsageError, "no label for"),
        (Aim(augment=("flip",), task="mse"), floats(6, 2, 2), True, UsageError, "moves images"),
        (Aim(task="none"), CLASSES, False, UsageError, "`task=none` needs a teacher"),
        (Aim(l1=float("inf")), CLASSES, False, UsageError, "`l1` must be finite"),
        (Aim(reconstruct="blocks", features=1.0), None, True, UsageError, "exclude each other"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_minimised_is_refused(
    aim: Aim, labels: Any, with_teacher: bool, kind: type[GraphoptError], words: str
) -> None:
    model = classifier()
    with pytest.raises(kind, match=words.replace("`", ".")) as error:
        choose(aim, model, classifier() if with_teacher else None, data_for(model, labels))
    assert error.value.hint


def test_models_that_have_nothing_in_common_are_refused() -> None:
    tokens, images = language_model(), classifier()
    with pytest.raises(PassError, match="the teacher has no output `y`"):
        choose(Aim(), images, tokens, data_for(images))
    wider = made([("Flatten", ["x"], "y", {})], {"x": ["N", 3, 6, 6]}, {"y": ["N", 108]}, {})
    with pytest.raises(PassError, match="the teacher's"):
        choose(Aim(), images, wider, data_for(images))
    flat = made(
        [("ReduceSum", ["x", "axes"], "y", {"keepdims": 0})], {"x": ["N", 4]}, {"y": ["N"]}, {"axes": np.array([1])}
    )
    with pytest.raises(PassError, match="one number a sample"):
        choose(Aim(distance="kl"), flat, flat, open_data({"x": floats(6, 4)}, flat))
    with pytest.raises(UsageError, match="needs images"):
        choose(Aim(augment=("flip",)), tokens, language_model(), data_for(tokens))
    ids = np.full_like(IDS, VOCABULARY)
    with pytest.raises(DataError, match="token 11 for outputs of 11 classes"):
        choose(Aim(task="next-token"), tokens, None, data_for(tokens, input_ids=ids, attention_mask=MASK))
    pruned = ONLY_FEATURES
    wrong = classifier()
    objective: Objective = choose(pruned, wrong, classifier(), data_for(wrong))
    shapes = {"r0": torch.zeros(2, 8, 6, 6), "r1": torch.zeros(2, 8, 6, 6)}
    others = {"r0": torch.zeros(2, 4, 3, 6), "r1": torch.zeros(2, 8, 6, 6)}
    with pytest.raises(PassError, match="and the teacher's"):
        objective.prepare([(shapes, others, TrainingBatch({}, None, 2, np.arange(2)))])


REAL = {
    "digits_resnet.onnx": ("kl logits", "features relu_4", "attention relu_4"),
    "stories260k.onnx": ("kl logits", "features add_1616", "attention softmax_4"),
    "yunet_n_dynamic.onnx": ("mse cls_8", "features 241", "attention 241"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_drawn_to_what_they_were(shared: Path, name: str) -> None:
    """Each measure finds its values, is zero for the model itself, and has gradients once a weight is off."""
    teacher, student = (graphopt.load(shared / "assets" / "models" / name) for _ in range(2))
    feeds = next(iter(generated_feeds(teacher, seed=1)))
    data = open_data([feeds], teacher)
    for aim, term in zip((Aim(), ONLY_FEATURES, ONLY_ATTENTION), REAL[name], strict=True):
        bench = Bench(aim, student, teacher, data)
        assert term in [one.name for one in bench.objective.terms]
        assert float(bench.loss()) == pytest.approx(0, abs=1e-5)
        weights = [weight for weight in bench.student.parameters() if weight.ndim > 1 and weight.numel() > 64]
        for weight in weights:
            weight.data = weight.data * 0.9  # in memory of its own: what the file holds is read-only
            weight.requires_grad_(True)
        loss = bench.loss()
        loss.backward()
        assert loss.item() > 1e-6
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
