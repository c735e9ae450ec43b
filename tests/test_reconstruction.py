"""Training piece by piece; and what is done beside a loss: other images, zeros by penalties, fresh statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import graphopt  # noqa: E402
from graphopt import registry  # noqa: E402
from graphopt.authoring import Context  # noqa: E402
from graphopt.data import open_data  # noqa: E402
from graphopt.errors import PassError, UsageError  # noqa: E402
from graphopt.passes.recovery.aim import Aim  # noqa: E402
from graphopt.passes.recovery.constraints.constrained import constrain  # noqa: E402
from graphopt.passes.recovery.held import Held  # noqa: E402
from graphopt.passes.recovery.objectives.augmentation import Augmentation, augmentation_of  # noqa: E402
from graphopt.passes.recovery.objectives.batch_statistics import updated_batch_norms  # noqa: E402
from graphopt.passes.recovery.objectives.spans import Side, spans_of, stages_of  # noqa: E402
from graphopt.passes.recovery.objectives.sparsity_penalty import Penalty, penalty_of  # noqa: E402
from graphopt.passes.recovery.recover import Recover  # noqa: E402
from graphopt.passes.recovery.training.samples import StoredSamples  # noqa: E402
from graphopt.rewriter import Journal, Rewriter  # noqa: E402

from .pass_runs import BACKEND, TARGET, loaded  # noqa: E402
from .test_objectives import TOKENS, classifier, floats, language_model, made  # noqa: E402

MODELS = Path(__file__).resolve().parent.parent / "models"
DIGITS = MODELS / "digits_cnn.onnx"


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    with np.load(MODELS / "digits.npz") as archive:
        return {"image": archive["image"][:160], "labels": archive["labels"][:160]}


def lowered(model: ir.Model, **options: Any) -> Any:
    backend: Any = registry.backend("torch")
    return backend.lower(model, **options)


def trained(student: ir.Model, teacher: ir.Model, options: Recover, feeds: Any = None) -> Context:
    """Train a student by a pass, as the manager would run it, and return what the pass worked with."""
    images = np.random.default_rng(3).normal(0, 1, (40, 3, 6, 6)).astype(np.float32)
    context = Context(
        student,
        Rewriter(student, Journal(), "recover"),
        registry.find("TARGETS", TARGET),
        registry.backend(BACKEND),
        threads=1,
        data=open_data(feeds or {"x": images}, student),
        reference=teacher,
    )
    options.run(student, context)
    return context


def difference(student: ir.Model, teacher: ir.Model) -> float:
    images = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (32, 3, 6, 6)).astype(np.float32))
    with torch.no_grad():
        return float((lowered(student)(images)[0] - lowered(teacher)(images)[0]).square().mean())


@pytest.mark.parametrize(("by", "ends"), [("blocks", ["r0", "r1", "y"]), ("layers", ["r0", "r1", "f", "y"])])
def test_pieces_put_together_are_the_model(by: str, ends: list[str]) -> None:
    model = classifier()
    module, images = lowered(model), torch.from_numpy(IMAGES[:, :, :6, :6].copy())
    spans = spans_of(model, model, by)
    assert [name for span in spans for name, _ in span.ends] == ends
    values = {"x": images}
    with torch.no_grad():
        for stage in stages_of(spans, Side(model, module, 0), Side(model, module, 1)):
            given = [values[name] for name in stage.mine.inputs]
            values |= dict(zip(stage.mine.outputs, stage.mine.module(*given), strict=True))
        (whole,) = module(images)
    assert torch.equal(values["y"], whole)


def test_pieces_share_the_weights_of_the_model() -> None:
    model = classifier()
    module = lowered(model)
    stages = stages_of(spans_of(model, model, "blocks"), Side(model, module, 0), Side(model, module, 1))
    whole = {id(tensor) for tensor in module.parameters()}
    parts = [{id(tensor) for tensor in stage.mine.module.parameters()} for stage in stages]
    assert [len(part) for part in parts] == [1, 1, 3]  # the last two have a weight in common
    assert set.union(*parts) == whole


@pytest.mark.parametrize("by", ["blocks", "layers"])
def test_reconstruction_lessens_the_error_of_each_part_and_of_the_whole(by: str) -> None:
    student, teacher = classifier(noise=0.3), classifier()
    before = difference(student, teacher)
    context = trained(student, teacher, Recover(reconstruct=by, steps=25, batch=8, rate=0.01))  # type: ignore[arg-type]
    curves = [note.facts["loss_curve"] for note in context.notes if "loss_curve" in note.facts]
    assert len(curves) == 3  # of layers, one only has a weight that is trained already
    assert all(curve["best"] < curve["first"] for curve in curves)
    assert difference(student, teacher) < before / 2


def test_parts_without_an_error_are_left_as_they_are() -> None:
    student, teacher = classifier(), classifier()
    halved, kept = (student.graph.initializers[name].const_value.numpy().copy() for name in ("w2", "w1"))
    student.graph.initializers["w2"].const_value = ir.tensor(halved * 0.5, name="w2")
    context = trained(student, teacher, Recover(reconstruct="blocks", steps=3, batch=8, rate=0.01))
    assert any("nothing to train: 2" in note.text for note in context.notes)
    now = {name: value.const_value.numpy() for name, value in student.graph.initializers.items()}
    assert np.array_equal(now["w0"], floats(8, 3, 3, 3))
    assert not np.array_equal(now["w2"], halved * 0.5)
    assert now["w1"].shape == kept.shape


def test_parts_are_not_gone_on_with_on_other_samples_or_for_another_original(tmp_path: Path) -> None:
    images = np.random.default_rng(6).normal(0, 1, (40, 3, 6, 6)).astype(np.float32)

    def weights(*, folder: str | None, other: bool, noise: float = 0.0) -> Any:
        options = Recover(reconstruct="blocks", steps=2, batch=8, rate=0.01, checkpoints=folder)
        student = classifier(noise=0.3)
        trained(student, classifier(noise=noise), options, {"x": images if other else images[::-1].copy()})
        return [value.const_value.numpy().tolist() for value in student.graph.initializers.values()]

    folder = str(tmp_path)
    first = weights(folder=folder, other=False)
    assert weights(folder=folder, other=False) == first
    assert len(list(tmp_path.iterdir())) == 3
    assert weights(folder=folder, other=True) == weights(folder=None, other=True) != first
    assert weights(folder=folder, other=True, noise=0.1) == weights(folder=None, other=True, noise=0.1)


def test_sizes_of_earlier_parts_are_read_off_the_inputs() -> None:
    nodes = [
        ("Conv", ["x", "w"], "c0", {"pads": [1, 1, 1, 1]}),
        ("Shape", ["c0"], "sizes", {}),
        ("Relu", ["c0"], "r0", {}),
        ("Conv", ["r0", "w"], "c1", {"pads": [1, 1, 1, 1]}),
        ("Add", ["c1", "r0"], "a1", {}),
        ("Flatten", ["a1"], "f", {}),
        ("Reshape", ["f", "sizes"], "y", {}),
    ]
    model = made(nodes, {"x": ["N", 3, "H", 6]}, {"y": ["N", 3, "H", 6]}, {"w": floats(3, 3, 3, 3)})
    module, images = lowered(model), torch.from_numpy(IMAGES[:, :, :, :6].copy())
    stages = stages_of(spans_of(model, model, "blocks"), Side(model, module, 0), Side(model, module, 1))
    assert [stage.mine.inputs for stage in stages] == [("x",), ("x", "r0")]
    with torch.no_grad():
        (first,) = stages[0].mine.module(images)
        assert torch.equal(stages[1].mine.module(images, first)[0], module(images)[0])


@pytest.mark.parametrize(
    "aim",
    [{"reconstruct": "blocks"}, {"features": 1.0, "distill": 0.0}, {"distance": "mse"}],
    ids=lambda aim: next(iter(aim)),
)
def test_padding_has_no_part_in_what_is_learnt(aim: dict[str, Any]) -> None:
    student, teacher = language_model(noise=0.3), language_model()
    # Plain SGD: Adam would hide a loss of another size, and makes steps of differences that are rounding alone.
    options = Recover(**aim, steps=4, batch=2, held_out=0, optimizer="sgd", momentum=0.0, rate=0.2)
    trained(student, teacher, options, dict(TOKENS))
    assert any(
        not np.array_equal(weight, before)
        for weight, before in zip(*map(weights_of, (student, language_model(noise=0.3))), strict=True)
    )
    again = language_model(noise=0.3)
    other = {**TOKENS, "input_ids": np.where(TOKENS["attention_mask"] == 0, 7, TOKENS["input_ids"])}
    trained(again, teacher, options, other)
    for mine, theirs in zip(weights_of(student), weights_of(again), strict=True):
        assert np.allclose(mine, theirs, atol=1e-6)


def weights_of(model: ir.Model) -> list[Any]:
    return [value.const_value.numpy() for value in model.graph.initializers.values()]


def flattened(noise: float, rows: Any) -> ir.Model:
    """Return a model of tokens that all stand one behind the other inside, [samples × 5, 8]."""
    first, second = (floats(8, 8, seed=seed) + noise * floats(8, 8, seed=seed + 5) for seed in (1, 2))
    sizes = {"flat": [-1, 8], "back": [-1, 5, 8]} if rows == "N" else {"flat": [rows * 5, 8], "back": [rows, 5, 8]}
    constants = {"table": floats(11, 8, seed=3), "w1": first, "w2": second, **sizes}
    nodes = [
        ("Gather", ["table", "ids"], "e", {}),
        ("Reshape", ["e", "flat"], "f", {}),
        ("MatMul", ["f", "w1"], "m1", {}),
        ("Add", ["m1", "f"], "a1", {}),
        ("MatMul", ["a1", "w2"], "m2", {}),
        ("Add", ["m2", "a1"], "a2", {}),
        ("Reshape", ["a2", "back"], "y", {}),
    ]
    return made(nodes, {"ids": [rows, 5]}, {"y": [rows, 5, 8]}, constants)


@pytest.mark.parametrize("rows", ["N", 4])
def test_samples_stay_samples_where_their_positions_stand_in_one_row(rows: Any) -> None:
    ids = np.random.default_rng(7).integers(0, 11, (23, 5))
    student = flattened(0.5, rows)
    options = Recover(reconstruct="blocks", steps=6, batch=4, rate=0.01)
    context = trained(student, flattened(0, rows), options, {"ids": ids})
    curves = [note.facts["loss_curve"] for note in context.notes if "loss_curve" in note.facts]
    assert [(curve["samples"], curve["held_out"]) for curve in curves] == [(21, 2)] * 2
    assert all(curve["best"] < curve["first"] for curve in curves)


def test_models_without_a_part_in_common_are_refused() -> None:
    with pytest.raises(PassError, match="finds no value") as error:
        spans_of(language_model(), classifier(), "blocks")
    assert error.value.hint


IMAGES = np.random.default_rng(0).normal(0, 1, (6, 3, 16, 12)).astype(np.float32)
ROWS = np.array([7, 2, 31, 4, 0, 11])


def augmenting(*names: str) -> Augmentation:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3, 16, 12]))
    model = ir.Model(ir.Graph([value], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    made = augmentation_of(names, model)
    assert made is not None
    return made


@pytest.mark.parametrize("names", [("flip",), ("crop",), ("flip", "crop", "mixup"), ("cutmix",)])
def test_augmentation_hangs_on_seed_epoch_and_sample_alone(names: tuple[str, ...]) -> None:
    made = augmenting(*names)
    partners = {"x": IMAGES[::-1].copy()}
    whole = made.apply({"x": IMAGES}, ROWS, 3, 1, partners=partners)["x"]
    assert whole.dtype == IMAGES.dtype
    assert whole.shape == IMAGES.shape
    assert not np.array_equal(whole, IMAGES)
    order = np.array([4, 0, 5])
    some = made.apply({"x": IMAGES[order]}, ROWS[order], 3, 1, partners={"x": partners["x"][order]})["x"]
    assert np.array_equal(some, whole[order])
    assert not np.array_equal(made.apply({"x": IMAGES}, ROWS, 4, 1, partners=partners)["x"], whole)
    assert not np.array_equal(made.apply({"x": IMAGES}, ROWS, 3, 2, partners=partners)["x"], whole)


def test_partners_are_drawn_from_the_pool() -> None:
    pool = np.array([3, 5, 9])
    drawn = augmenting("mixup").partners(np.arange(200), 0, 0, pool)
    assert set(drawn) == set(pool)
    assert np.array_equal(drawn[50:60], augmenting("cutmix").partners(np.arange(50, 60), 0, 0, pool))


def test_images_are_what_their_names_say() -> None:
    flipped = augmenting("flip").apply({"x": IMAGES}, ROWS, 0, 0)["x"]
    for one, image in zip(flipped, IMAGES, strict=True):
        assert any(np.array_equal(one, other) for other in (image, image[..., ::-1]))
    mixed = augmenting("mixup").apply({"x": np.zeros_like(IMAGES)}, ROWS, 0, 0, partners={"x": np.ones_like(IMAGES)})
    assert all(0 < image.min() == image.max() < 1 for image in mixed["x"])
    patched = augmenting("cutmix").apply({"x": np.zeros_like(IMAGES)}, ROWS, 0, 0, partners={"x": np.ones_like(IMAGES)})
    assert set(np.unique(patched["x"])) == {0.0, 1.0}
    both = augmenting("mixup", "cutmix").apply(
        {"x": np.zeros_like(IMAGES)}, ROWS, 0, 0, partners={"x": np.ones_like(IMAGES)}
    )["x"]
    alone = list(zip(mixed["x"], patched["x"], both, strict=True))
    assert all(np.array_equal(one, blend) or np.array_equal(one, patch) for blend, patch, one in alone)
    assert {np.array_equal(one, blend) for blend, _, one in alone} == {True, False}
    moved = augmenting("crop").apply({"x": IMAGES}, ROWS, 0, 0)["x"]
    assert np.isin(moved, IMAGES).all()


def test_a_penalty_shrinks_by_rate_times_lambda_to_exact_zeros() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.5, -0.3, 0.05, 0.0]))
    Penalty(2.0, [weight], 0.0, []).apply(0.1)
    assert torch.allclose(weight, torch.tensor([0.3, -0.1, 0.0, 0.0]))
    assert weight[2] == 0


def test_group_lasso_takes_whole_channels() -> None:
    plain, options = without_ties(), Recover(group_lasso=1.0)
    module = lowered(plain, differentiable=True)
    constrained = constrain(module, plain, options)
    penalty = penalty_of(options, plain, constrained)
    assert penalty is not None
    weight, reader = constrained.weights()["w0"], constrained.weights()["w2"]
    with torch.no_grad():
        weight[5] *= 1e-3
    before, read = weight.detach().clone(), reader.detach().clone()
    penalty.apply(0.01)
    assert not weight[5].any()
    assert weight[6].any()
    assert torch.equal(reader, read)
    # All of a channel is shortened alike, its direction stays.
    ratio = weight[6] / before[6]
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)
    assert penalty.describe() == "1 of 8 channels are zero"


def without_ties() -> ir.Model:
    """Return Conv, Relu, pooling, Gemm: channels of one layer that one other reads."""
    constants = {"w0": floats(8, 3, 3, 3), "w2": floats(8, 4, seed=3), "b2": floats(4, seed=4)}
    nodes = [
        ("Conv", ["x", "w0"], "c0", {"pads": [1, 1, 1, 1]}),
        ("Relu", ["c0"], "r0", {}),
        ("GlobalAveragePool", ["r0"], "p", {}),
        ("Flatten", ["p"], "f", {}),
        ("Gemm", ["f", "w2", "b2"], "y", {}),
    ]
    return made(nodes, {"x": ["N", 3, 6, 6]}, {"y": ["N", 4]}, constants)


def test_penalties_without_anything_to_shrink_are_refused() -> None:
    plain = without_ties()
    constrained = constrain(lowered(plain, differentiable=True), plain, Held(train=("biases",)))
    for aim in (Aim(l1=1.0), Aim(group_lasso=1.0)):
        with pytest.raises(UsageError) as error:
            penalty_of(aim, plain, constrained)
        assert error.value.hint
    assert penalty_of(Aim(), plain, constrained) is None


def test_statistics_of_batch_norms_are_those_of_the_samples(digits: dict[str, Any]) -> None:
    model = graphopt.load(DIGITS)
    data = open_data(digits, model)
    module = lowered(model, observe=("conv2d",))
    new = updated_batch_norms(module, data, 32)
    with torch.no_grad():
        seen = module(torch.from_numpy(digits["image"]))[1].numpy()
    assert len(new) == 10
    assert np.allclose(new["stem.1.running_mean"], seen.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(new["stem.1.running_var"], seen.var((0, 2, 3)), rtol=1e-3)
    # The module itself is as it was.
    again = lowered(model, observe=("conv2d",))
    with torch.no_grad():
        assert torch.equal(module(torch.from_numpy(digits["image"]))[0], again(torch.from_numpy(digits["image"]))[0])


def normalized(rows: Any = "N") -> ir.Model:
    """Return a batch normalization in bfloat16 between casts."""
    shape = [rows, 3, 4, 4]
    bfloat16 = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=bfloat16),
        helper.make_node("BatchNormalization", ["narrow", "scale", "shift", "mean", "variance"], ["normal"]),
        helper.make_node("Cast", ["normal"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = [helper.make_tensor(name, bfloat16, [3], [1.0] * 3) for name in ("scale", "shift", "mean", "variance")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    return loaded(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_rows_that_only_pad_are_in_no_statistics() -> None:
    model, images = normalized(rows=4), np.random.default_rng(2).normal(0, 1, (5, 3, 4, 4)).astype(np.float32)
    new = updated_batch_norms(lowered(model), open_data({"x": images}, model), 4)
    assert np.allclose(new["mean"], images.mean((0, 2, 3)), atol=1e-3)
    assert np.allclose(new["variance"], images.var((0, 2, 3)), atol=1e-2)


def test_statistics_are_stored_in_their_own_dtype() -> None:
    student, teacher = normalized(), normalized()
    images = np.random.default_rng(2).normal(3, 1, (8, 3, 4, 4)).astype(np.float32)
    options = Recover(steps=1, batch=4, batch_norm="update", held_out=0)
    trained(student, teacher, options, {"x": images})
    mean = student.graph.initializers["mean"].const_value
    assert mean.dtype == ir.DataType.BFLOAT16
    assert np.allclose(mean.numpy().astype(np.float32), images.mean((0, 2, 3)), rtol=1e-2)


def test_without_batch_norms_there_are_no_statistics() -> None:
    plain = without_ties()
    assert updated_batch_norms(lowered(plain), open_data({"x": IMAGES[:, :, :6, :6]}, plain), 32) == {}


def test_augmented_samples_are_read_with_their_partners(digits: dict[str, Any]) -> None:
    model = graphopt.load(DIGITS)
    samples = StoredSamples(open_data(digits, model), augmentation_of(("mixup",), model), 0)
    rows, pool = np.array([3, 1]), np.arange(100)
    looked_at, trained_on = samples.batch(rows, None, pool), samples.batch(rows, 0, pool)
    assert np.array_equal(looked_at.feeds["image"].numpy(), digits["image"][rows])
    assert not np.array_equal(trained_on.feeds["image"].numpy(), digits["image"][rows])
