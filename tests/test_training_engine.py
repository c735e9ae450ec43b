"""The training engine: what a batch is divided into does not matter, and what goes wrong is said."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from graphopt.errors import BackendError, DataError, GraphoptError, PassError, UsageError
from graphopt.passes.recovery.settings import Training

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import torch

from graphopt.passes.recovery.training import lowered_values
from graphopt.passes.recovery.training.acceleration import refuse_device
from graphopt.passes.recovery.training.curve import POINTS_SHOWN, Curve, Point
from graphopt.passes.recovery.training.early_stopping import EarlyStopping
from graphopt.passes.recovery.training.engine import train
from graphopt.passes.recovery.training.samples import held_out_of
from graphopt.passes.recovery.training.schedules import rate_factor

from .small_trainings import BRIEF, SAMPLES, Distance, Everything, network, run, samples, weights_of

# What sums in another order may differ by, in float32.
ROUNDING = 1e-5


def losses(curve: Curve) -> list[float]:
    return [point.loss for point in curve.points] + [look.loss for look in curve.looks]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "`rate` cannot be 0"),
        ({"clip": 0.0}, "`clip` cannot be 0"),
        ({"rate": float("nan")}, "must be finite"),
        ({"epochs": 0.0}, "neither `steps` nor `epochs`"),
        ({"held_out": 0.0, "patience": 2}, "`patience` needs samples"),
        ({"checkpoint_every": 5}, "`checkpoint_every` without a folder"),
        ({"batch": 8, "micro_batch": 9}, "`micro_batch=9` is more than `batch=8`"),
        ({"sharding": "fsdp"}, "in a single process"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Training(**settings).check_training()
    assert error.value.hint


def test_a_batch_has_a_sample_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="`batch=3` for 4 processes"):
        Training(batch=3).check_training()


def test_steps_are_counted_in_epochs_of_what_is_trained_on() -> None:
    assert Training(epochs=3, batch=10).step_count(25) == 8
    assert Training(steps=5, epochs=3).step_count(25) == 5
    assert Training(epochs=0.001).step_count(25) == 1
    assert [Training(held_out=0.1).held_out_count(count) for count in (2, 30, 10**6)] == [1, 3, 1024]
    assert Training(held_out=0.0).held_out_count(30) == 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_rates_rise_and_fall(schedule: Any) -> None:
    factor = rate_factor(Training(schedule=schedule, warmup=0.1), 100)
    factors = [factor(step) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    last = {"constant": 1.0, "linear": 1 / 90, "cosine": 0.0003, "step": 0.001}
    assert factors[-1] == pytest.approx(last[schedule], rel=0.02)


def test_a_step_goes_down_the_gradient_of_the_whole_batch() -> None:
    """Sums over positions that count and over rows, in three parts: each is divided by what the whole batch has."""
    data = samples((6, 4), count=8)
    settings = Training(
        steps=1, batch=16, micro_batch=5, held_out=0.0, optimizer="sgd", momentum=0.0, rate=0.1, warmup=0.0, clip=None
    )
    module, by_hand, teacher = network(), network(), network(2)
    curve = train(module, Distance(), data, settings, constrained=Everything(module), teacher=teacher, threads=1)
    gaps, counting, absolute = [], [], 0.0
    for chunk, _ in data.chunks():
        x = torch.from_numpy(chunk.arrays["x"])
        gap = by_hand(x)[0] - teacher(x)[0]
        gaps.append((gap.square().sum(-1) * (x[..., 0] > 0)).sum())
        counting.append((x[..., 0] > 0).sum())
        absolute = absolute + gap.abs().sum()
    loss = sum(gaps) / sum(counting) + 0.1 * absolute / 16
    loss.backward()
    assert curve.points[0].loss == pytest.approx(loss.item(), rel=ROUNDING)
    for (name, tensor), other in zip(module.named_parameters(), by_hand.parameters(), strict=True):
        expected = other.detach() - 0.1 * other.grad
        torch.testing.assert_close(tensor.detach(), expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("micro_batch", [1, 7, 32])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    whole, expected = run(Training(**BRIEF))
    divided, weights = run(Training(**BRIEF, micro_batch=micro_batch))
    assert losses(divided) == pytest.approx(losses(whole), rel=ROUNDING)
    assert weights == pytest.approx(expected, abs=ROUNDING)


def test_a_batch_is_no_more_than_there_is_to_train_on() -> None:
    """Of 9 samples, taken literally, a batch of 64 would have each seven times, and eight epochs would be two steps."""
    few = {"held_out": 0.1, "epochs": 8, "rate": 0.02}
    all_of_them, expected = run(Training(**few, batch=9, micro_batch=9), data=samples(count=10))
    curve, weights = run(Training(**few, batch=64, micro_batch=32), data=samples(count=10))
    assert weights == expected
    assert (curve.steps, [point.epoch for point in curve.points]) == (8, [*range(1, 9)])
    assert (len(all_of_them.remarks), len(curve.remarks)) == (0, 1)
    assert "`batch=64` is more than there is" in curve.remarks[0]


def test_each_process_has_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(DataError, match="3 samples to train on, for 4 processes"):
        Training(held_out=0.25).check_data(samples(count=4))
    Training(held_out=0.25).check_data(samples(count=5))


def test_seeds_decide() -> None:
    first, again, other = (run(Training(**BRIEF), seed=seed) for seed in (1, 1, 2))
    assert losses(first[0]) == losses(again[0])
    assert first[1] == again[1] != other[1]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_optimizers_learn(optimizer: Any) -> None:
    curve, _ = run(Training(steps=30, rate=0.02, held_out=0.2, optimizer=optimizer))
    assert curve.looks[0].loss > 1.5 * curve.looks[-1].loss
    assert (curve.kept, curve.steps, curve.planned, curve.trained) == (30, 30, 30, 208)
    assert (curve.samples, curve.held_out) == (96, 24)


def test_groups_have_their_own_rate_and_decay() -> None:
    settings = Training(steps=1, rate=0.1, held_out=0.0, optimizer="sgd", momentum=0.0, decay=0.5, warmup=0.0)

    def moved(**group: Any) -> Any:
        module = network()
        _, after = run(settings, module, constrained=Everything(module, **group))
        return np.array(after) - np.array(weights_of(network()))

    both, slow, kept = moved(), moved(rate=0.5), moved(decay=False)
    assert slow == pytest.approx(0.5 * both, abs=ROUNDING)
    assert both - kept == pytest.approx(-0.1 * 0.5 * np.array(weights_of(network())), abs=ROUNDING)


def test_long_gradients_are_cut() -> None:
    settings = {"steps": 1, "rate": 1.0, "held_out": 0.0, "optimizer": "sgd", "momentum": 0.0, "warmup": 0.0}
    before = np.array(weights_of(network()))
    _, cut = run(Training(**settings, clip=0.01))
    _, free = run(Training(**settings, clip=None))
    assert np.linalg.norm(np.array(cut) - before) == pytest.approx(0.01, rel=1e-3)
    assert np.linalg.norm(np.array(free) - before) > 0.1


def test_a_penalty_is_told_the_rate_of_each_step() -> None:
    rates: list[float] = []

    class Penalty:
        def apply(self, rate: float) -> None:
            rates.append(rate)

    curve, _ = run(Training(**BRIEF), proximal=Penalty())
    assert rates == [point.rate for point in curve.points]
    assert max(rates) == BRIEF["rate"]


@dataclass
class Noted:
    """An augmentation that takes note of what it is asked for, and mixes a sample with another one."""

    mixes: bool = True
    rows: set[int] = field(default_factory=set)
    partners_of: set[int] = field(default_factory=set)
    seen: list[tuple[int, int]] = field(default_factory=list)

    def partners(self, rows: Any, epoch: int, seed: int, pool: Any) -> Any:
        self.partners_of |= set(pool.tolist())
        return pool[rows % len(pool)]

    def apply(self, feeds: Any, rows: Any, epoch: int, seed: int, *, partners: Any = None) -> Any:
        self.rows |= set(rows.tolist())
        self.seen += [(epoch, row) for row in rows.tolist()]
        if partners is None:
            return feeds
        return {name: (array + partners[name]) / 2 for name, array in feeds.items()}


def test_only_what_is_trained_on_is_augmented() -> None:
    noted = Noted()
    settings = Training(**{**BRIEF, "steps": 6}, batch=64, evaluate_every=1)
    curve, _ = run(settings, augmentation=noted)
    trained, held = held_out_of(SAMPLES, curve.held_out, 3)
    assert noted.rows == noted.partners_of == set(trained.tolist())
    assert not noted.rows & set(held.tolist())
    # Each sample once in each epoch, also where a batch has some of two.
    assert sorted(noted.seen) == [(epoch, row) for epoch in range(4) for row in trained.tolist()]
    plain, _ = run(settings)
    assert plain.looks[0] == curve.looks[0]
    assert plain.points[0] != curve.points[0]


def _calls_of_teacher(settings: Training, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, Curve]:
    """Train, and return on how many rows the teacher was run."""
    rows, forward = 0, lowered_values.values_of
    teacher = options.pop("teacher", network(2))

    def counted(module: Any, batch: Any) -> Any:
        nonlocal rows
        rows += len(batch.feeds["x"])
        return forward(module, batch)

    monkeypatch.setattr(lowered_values, "values_of", counted)
    curve, _ = run(settings, teacher=teacher, **options)
    return rows, curve


def test_a_teacher_is_asked_once_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(epochs=4, rate=0.02, held_out=0.2)
    once, curve = _calls_of_teacher(settings, monkeypatch)
    # The first batch is run twice, and a sample of it by itself: whether they depend on each other.
    assert SAMPLES < once < 1.5 * SAMPLES
    monkeypatch.setattr(lowered_values, "BYTES_KEPT", 100)
    often, expected = _calls_of_teacher(settings, monkeypatch)
    assert often > 4 * SAMPLES
    assert losses(curve) == pytest.approx(losses(expected), rel=ROUNDING)


def test_a_teacher_is_asked_each_time_where_its_answers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(epochs=4, rate=0.02, held_out=0.2)
    assert _calls_of_teacher(settings, monkeypatch, augmentation=Noted(mixes=False))[0] > 4 * SAMPLES
    short = Training(steps=2, rate=0.02, held_out=0.2)
    assert _calls_of_teacher(short, monkeypatch)[0] < SAMPLES
    # One whose outputs for a sample depend on the others of the batch.
    coupled = network(2)
    output = next(node for node in coupled.graph.nodes if node.op == "output")
    with coupled.graph.inserting_before(output):
        (y,) = output.args[0]
        mean = coupled.graph.call_method("mean", (y, 0, True))
        centred = coupled.graph.call_function(torch.sub, (y, mean))
    output.args = ((centred,),)
    coupled.recompile()
    assert _calls_of_teacher(settings, monkeypatch, teacher=coupled)[0] > 4 * SAMPLES


@pytest.mark.parametrize("data", [{"fixed": 1}, {"fixed": 8}, {"lengths": (6, 4), "count": 60}])
def test_what_a_teacher_gave_is_given_to_its_own_sample(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(epochs=3, rate=0.02, held_out=0.2, batch=20)
    curve, weights = run(settings, data=samples(**data))
    monkeypatch.setattr(lowered_values, "BYTES_KEPT", 0)
    expected, others = run(settings, data=samples(**data))
    assert losses(curve) == pytest.approx(losses(expected), rel=ROUNDING)
    assert weights == pytest.approx(others, abs=ROUNDING)


def test_an_objective_sees_samples_before_the_first_step() -> None:
    objective = Distance(needs_preparation=True)
    curve, _ = run(Training(**BRIEF), objective=objective)
    trained, _ = held_out_of(SAMPLES, curve.held_out, 3)
    assert objective.prepared == trained.tolist()


def test_training_that_does_harm_leaves_the_weights_as_they_were() -> None:
    settings = Training(steps=20, rate=3.0, optimizer="sgd", clip=None, held_out=0.2, evaluate_every=1, patience=3)
    curve, weights = run(settings, teacher=network())
    assert curve.looks[0].loss == 0.0
    assert curve.stopped == "no better loss in 3 looks"
    assert (curve.kept, curve.steps, curve.best) == (0, 3, 0.0)
    assert weights == weights_of(network())
    assert "weights are as they were" in curve.remarks[0]


def test_the_last_weights_are_kept_where_that_is_asked_for() -> None:
    start = network(2)
    kept, weights = run(Training(**BRIEF, keep="last"), network(2), teacher=network(2))
    assert kept.kept == 12
    # At its goal from the start, so nothing moves but by rounding.
    assert weights == pytest.approx(weights_of(start), abs=1e-3)
    best, _ = run(Training(steps=40, rate=0.05, held_out=0.2, evaluate_every=1, schedule="constant", batch=4))
    assert best.best == min(look.loss for look in best.looks)


def test_patience_counts_looks_without_a_better_one() -> None:
    stopping = EarlyStopping(2)
    assert [stopping.improves(step, loss) for step, loss in enumerate((3.0, 2.0, 2.5, 1.0, 1.0))] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert not stopping.is_over
    assert not stopping.improves(5, float("inf"))
    assert stopping.is_over
    assert (stopping.loss, stopping.step) == (1.0, 3)


def test_divergence_is_an_error() -> None:
    with pytest.raises(PassError, match=r"training diverged: after [0-9] steps the loss is") as error:
        run(Training(steps=9, rate=1e30, held_out=0.0, optimizer="sgd", clip=None))
    assert "smaller `rate`" in (error.value.hint or "")


def test_weights_that_no_loss_was_computed_with_may_have_diverged() -> None:
    module = network()
    settings = Training(steps=1, held_out=0, rate=1e6, clip=None, optimizer="sgd", momentum=0, warmup=0)
    module.first.register_hook(lambda gradient: gradient * 1e38)
    with pytest.raises(PassError, match="is NaN or infinite after the last step") as error:
        run(settings, module)
    assert error.value.hint


def test_a_loss_of_nothing_that_is_trained_is_an_error() -> None:
    module = network()
    module.requires_grad_(False)
    with pytest.raises(PassError, match="nothing to train"):
        run(Training(**BRIEF), module)
    module.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(PassError, match="does not depend on anything that is trained"):
        run(Training(**BRIEF), module)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (torch.OutOfMemoryError("no room"), PassError, "out of memory: no room"),
        (torch.distributed.DistBackendError("closed by peer"), BackendError, "lost each other: closed by peer"),
        (NotImplementedError("Foo: no such mode"), PassError, "cannot train this model: Foo: no such mode"),
    ],
)
def test_what_torch_raises_is_explained(raised: Exception, kind: type[GraphoptError], message: str) -> None:
    def fail(batch: Any) -> None:
        raise raised

    with pytest.raises(kind, match=message) as error:
        run(Training(**BRIEF), objective=Distance(on_call=fail))
    assert error.value.hint


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(DataError, match="1 sample to train on"):
        run(Training(**BRIEF), data=samples(count=1))
    assert run(Training(**BRIEF), data=samples(count=2))[0].samples == 1


@pytest.mark.parametrize(
    ("settings", "device", "kind", "message"),
    [
        ({"precision": "fp16"}, "cpu", UsageError, "`precision=fp16` needs a GPU"),
        ({}, "cuda:99", BackendError, "torch finds"),
        ({}, "tpu", UsageError, "cannot train on `tpu`"),
    ],
)
def test_devices_that_will_not_do_are_refused(
    settings: dict[str, Any], device: str, kind: type[GraphoptError], message: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        run(Training(**BRIEF, **settings), device=device)
    assert error.value.hint


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="4 processes for 2 GPUs") as error:
        refuse_device(Training(**BRIEF), "cuda")
    assert error.value.hint


def test_what_a_launcher_was_told_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(**BRIEF, optimizer="sgd")
    weights = run(settings)[1]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert run(settings)[1] == weights
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="was told to train by FSDP") as error:
        run(settings)
    assert error.value.hint


def test_precisions_may_change_between_trainings() -> None:
    half, weights = run(Training(**BRIEF, precision="bf16"))
    whole, expected = run(Training(**BRIEF))
    assert losses(half) == pytest.approx(losses(whole), rel=0.02)
    assert losses(half) != losses(whole)
    assert weights == pytest.approx(expected, abs=0.02)
    # Weights stay in full: rounded to bfloat16 they would be others.
    assert weights != torch.tensor(weights).bfloat16().float().tolist()


def test_nothing_is_left_behind() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    module = network()
    run(Training(**BRIEF), module, threads=1)
    assert torch.get_num_threads() == threads
    assert (torch.random.get_rng_state() == state).all()
    assert all(tensor.grad is None for tensor in module.parameters())


def test_who_waits_sees_steps_and_loss() -> None:
    shown: list[Any] = []

    class Display:
        def stage(self, name: str, total: int, noun: str) -> Any:
            shown.append((name, total, noun))
            return contextlib.nullcontext()

        def advance(self, count: int, noun: str) -> None:
            shown.append((count, noun))

        def describe(self, name: str) -> None:
            shown.append(name)

    run(Training(**BRIEF), display=Display())
    assert shown[:2] == [("training", 12, "steps"), (0, "steps")]
    assert shown.count((1, "steps")) == 12
    assert shown[-1].startswith("training, loss 0.")


def test_a_curve_is_plain_figures_and_not_too_many() -> None:
    curve, _ = run(Training(**BRIEF, evaluate_every=4))
    written = json.loads(json.dumps(curve.as_dict()))
    assert [point["step"] for point in written["points"]] == list(range(1, 13))
    assert [look["step"] for look in written["looks"]] == [0, 4, 8, 12]
    assert written["points"][0]["terms"].keys() == {"squared", "absolute"}
    assert (written["best"], written["kept"]) == (curve.best, 12)
    assert curve.step_seconds > 0
    long = Curve(points=[Point(step, 0.0, 0.0, 0.0, {}) for step in range(5 * POINTS_SHOWN + 3)])
    shown = long.as_dict()["points"]
    assert len(shown) <= POINTS_SHOWN + 1
    assert shown[-1]["step"] == 5 * POINTS_SHOWN + 2
