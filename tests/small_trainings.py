"""Trainings of a network of 200 weights: what tests of the engine share, and what they start in other processes.

As a script: ``small_trainings.py FOLDER NAME …`` runs trainings one after the other, as torchrun's processes do, and
leaves ``FOLDER/NAME.json``; ``kill`` as a name is a training that ends itself half-way, as a lost machine does.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import fx, nn

from graphopt.data import Chunk, Dataset, InputSpec
from graphopt.errors import PassError
from graphopt.passes.recovery.settings import Training
from graphopt.passes.recovery.training.curve import Curve
from graphopt.passes.recovery.training.engine import train

FEATURES, HIDDEN, OUTPUTS, SAMPLES = 8, 16, 4, 120
KILLED_AT = 7


@dataclass(frozen=True)
class Names:
    """What the engine reads of a lowered module."""

    inputs: tuple[str, ...] = ("x",)
    outputs: tuple[str, ...] = ("y",)
    observed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    name: str
    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]
    rate: float = 1.0
    decay: bool = True


@dataclass
class Everything:
    """A constraint that holds nothing: all that asks for a gradient is trained."""

    module: nn.Module
    rate: float = 1.0
    decay: bool = True

    def parameters(self) -> Sequence[Group]:
        found = {name: tensor for name, tensor in self.module.named_parameters() if tensor.requires_grad}
        return [Group("weights", tuple(found), tuple(found.values()), self.rate, self.decay)]


def network(seed: int = 1, *, dropout: float = 0.0) -> fx.GraphModule:
    """Return two layers, as a lowered module: [n, …, 8] to [n, …, 4]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (FEATURES, HIDDEN), "bias": (HIDDEN,), "second": (HIDDEN, OUTPUTS)}
    root = nn.Module()
    for name, shape in shapes.items():
        root.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) / 4))
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    hidden = graph.call_function(torch.matmul, (x, graph.get_attr("first")))
    hidden = graph.call_function(torch.tanh, (graph.call_function(torch.add, (hidden, graph.get_attr("bias"))),))
    if dropout:
        hidden = graph.call_function(nn.functional.dropout, (hidden, dropout))
    graph.output((graph.call_function(torch.matmul, (hidden, graph.get_attr("second"))),))
    module = fx.GraphModule(root, graph)
    module.meta["graphopt"] = Names()
    return module


def image_network(seed: int = 1) -> fx.GraphModule:
    """Return a convolution of single pixels, as a lowered module: [n, 4, 3, 8] to [n, 4, 3, 8]."""
    root = nn.Module()
    weight = torch.randn((OUTPUTS, OUTPUTS, 1, 1), generator=torch.Generator().manual_seed(seed))
    root.register_parameter("weight", nn.Parameter(weight))
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    graph.output((graph.call_function(nn.functional.conv2d, (x, graph.get_attr("weight"))),))
    module = fx.GraphModule(root, graph)
    module.meta["graphopt"] = Names()
    return module


def with_mapped_constant(module: fx.GraphModule) -> fx.GraphModule:
    """Give a module a constant in memory that nobody may write (whoever does ends the process), and a single number."""
    with tempfile.TemporaryFile() as file:
        file.write(np.zeros(OUTPUTS, np.float32).tobytes())
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings(action="ignore"):  # of just that
        constant = torch.from_numpy(np.frombuffer(memory, np.float32))
    module.register_parameter("offset", nn.Parameter(constant, requires_grad=False))
    module.register_parameter("number", nn.Parameter(torch.tensor(1.0), requires_grad=False))
    output = next(node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        (y,) = output.args[0]
        moved = module.graph.call_function(torch.add, (y, module.graph.get_attr("offset")))
    output.args = ((moved,),)
    module.recompile()
    return module


def with_idle_weight(module: fx.GraphModule) -> fx.GraphModule:
    """Give a module a weight to train that its outputs do not depend on."""
    module.register_parameter("idle", nn.Parameter(torch.ones(3)))
    return module


@dataclass(frozen=True)
class Sums:
    totals: dict[str, torch.Tensor]
    weights: dict[str, float]


@dataclass
class Distance:
    """Squared distance over the positions that count, and absolute distance over rows: their counts differ."""

    needs_preparation: bool = False
    prepared: list[int] = field(default_factory=list)
    on_call: Callable[[Any], None] = lambda batch: None

    def counts(self, batch: Any) -> dict[str, float]:
        return {"squared": float(_counted(batch).sum()), "absolute": float(batch.count)}

    def __call__(self, student: Any, teacher: Any, batch: Any) -> Sums:
        self.on_call(batch)
        gap = (student["y"] - teacher["y"])[: batch.count]
        squared = (gap.square().sum(dim=-1) * _counted(batch)).sum()
        return Sums({"squared": squared, "absolute": gap.abs().sum()}, {"squared": 1.0, "absolute": 0.1})

    def prepare(self, batches: Any) -> None:
        self.prepared = [row for _, _, batch in batches for row in batch.rows.tolist()]


def _counted(batch: Any) -> torch.Tensor:
    """Return which positions count: those whose first feature is positive."""
    return (batch.feeds["x"][: batch.count, ..., 0] > 0).float()


def samples(
    lengths: Sequence[int] = (0,), *, count: int = SAMPLES, fixed: int | None = None, labels: int = 0, channels: int = 0
) -> Dataset:
    """Return samples, one chunk for each length of sequences; of length 0, vectors; of channels, images."""
    generator = np.random.default_rng(5)
    outer = [channels] if channels else []
    shapes = [(count, *outer, *([length] if length else []), FEATURES) for length in lengths]
    arrays = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    spec = InputSpec("x", np.dtype("float32"), (fixed, *outer, *([None] if lengths[0] else []), FEATURES))

    def chunks() -> Iterator[Chunk]:
        for array in arrays:
            yield Chunk({"x": array}, labels + np.arange(count), count, divisible=True)

    return Dataset(chunks, [spec], "made-up samples", count * len(lengths), True)


def run(
    settings: Training, module: fx.GraphModule | None = None, objective: Distance | None = None, **options: Any
) -> tuple[Curve, list[float]]:
    """Train, and return how it went with all weights behind it."""
    module = module or network()
    data = options.pop("data", None) or samples()
    options = {"constrained": Everything(module), "teacher": network(2), "seed": 3, "threads": 1, **options}
    curve = train(module, objective or Distance(), data, settings, **options)
    return curve, weights_of(module)


def weights_of(module: nn.Module) -> list[float]:
    """Return every weight of a module, in order."""
    return [float(number) for tensor in module.parameters() for number in tensor.detach().reshape(-1)]


BRIEF = {"steps": 12, "rate": 0.02, "held_out": 0.2}
# Name to what is trained, how, and on what.
SCENARIOS: dict[str, Callable[[], tuple[Curve, list[float]]]] = {
    "plain": lambda: run(Training(**BRIEF)),
    "uneven": lambda: run(Training(**BRIEF, batch=33, micro_batch=5), data=samples((6, 4, 5))),
    "mapped": lambda: run(Training(**BRIEF), with_mapped_constant(network())),
    "idle": lambda: run(Training(**BRIEF), with_idle_weight(network())),
    "images": lambda: run(
        Training(**BRIEF | {"rate": 0.1}),
        image_network(),
        data=samples((3,), channels=OUTPUTS),
        teacher=image_network(2),
    ),
    "prepared": lambda: run(Training(**BRIEF, batch=7), objective=Distance(needs_preparation=True)),
    "bf16": lambda: run(Training(**BRIEF, precision="bf16")),
    "again": lambda: run(Training(**BRIEF)),
}


def checkpointed(folder: str, *, killed: bool = False, interrupted: bool = False) -> tuple[Curve, list[float]]:
    """Train with a checkpoint every third step; random numbers take part where one process trains.

    Args:
        folder: Where checkpoints go.
        killed: Whether the process ends itself in the midst of a step, without a chance to clean up.
        interrupted: Whether the training fails there.
    """
    calls = 0

    def count(batch: Any) -> None:
        nonlocal calls
        calls += batch.epoch is not None
        if calls > KILLED_AT and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if calls > KILLED_AT and interrupted:
            raise InterruptedError

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    settings = Training(**BRIEF, checkpoints=folder, checkpoint_every=3)
    return run(settings, network(dropout=0.2 if alone else 0.0), Distance(on_call=count))


def resumed(folder: Path) -> tuple[Curve, list[float]]:
    """Train, fail, and go on from the checkpoint."""
    try:
        checkpointed(str(folder / "checkpoints"), interrupted=True)
    except InterruptedError:
        return checkpointed(str(folder / "checkpoints"))
    raise AssertionError("it did not fail")


def sharded() -> tuple[Curve, list[float]]:
    """Train with weights divided among processes; Accelerate takes CPUs for GPUs then, as it divides on those only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from graphopt.passes.recovery.training import acceleration

    prepare, refuse = PartialState._prepare_backend, acceleration.refuse_device
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    acceleration.refuse_device = lambda *_: None
    try:
        found = run(Training(**BRIEF, micro_batch=6, sharding="fsdp"), with_mapped_constant(network()), device="cuda")
        assert "ACCELERATE_USE_FSDP" not in os.environ, "the next training would be sharded, too"
        return found
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        PartialState._prepare_backend, acceleration.refuse_device = prepare, refuse


def at_odds() -> None:
    """Begin with other weights on each process.

    Raises:
        PassError: That is refused.
    """
    run(Training(**BRIEF), network(int(os.environ["RANK"])))


def commands(folder: Path) -> None:
    """Run the command `recover` as one of several processes: once as it should be, once over its budget."""
    import command_line  # beside this file, which is a script here
    import onnx

    from graphopt.evaluation import Judge

    folder = folder / f"process{os.environ['RANK']}"
    folder.mkdir()
    command_line.fill(folder)
    onnx.save(command_line.classifier(seed=1), folder / "student.onnx")
    args = ["recover", folder / "student.onnx", "--teacher", folder / "net.onnx", "--data", folder / "data.npz"]
    found = {}
    for name, more in {"good": (), "over budget": ("--budget", "top1=1%")}.items():
        with mock.patch.object(Judge, "score", autospec=True, side_effect=Judge.score) as score:
            outcome = command_line.run(*args, "--steps", 2, "--rate", 1e-6, "--threads", 1, "-q", *more)
        files = sorted(path.name for path in folder.glob("*recovered*"))
        found[name] = [outcome.code, outcome.err, files, score.call_count]
        for file in files:
            (folder / file).unlink()
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(found))


def main(folder: Path, names: Sequence[str]) -> None:
    """Run trainings by name, and write down what came of them."""
    for name in names:
        if name == "kill":
            checkpointed(str(folder), killed=True)
        if name == "commands":
            commands(folder)
            continue
        if name == "at_odds":
            with contextlib.suppress(PassError):
                at_odds()
                raise AssertionError("different weights were not noticed")
            continue
        special = {"sharded": sharded, "resumed": lambda: resumed(folder)}
        curve, weights = (special | SCENARIOS)[name]()
        if int(os.environ.get("RANK", "0")) == 0:
            written = {"curve": curve.as_dict(), "weights": weights}
            (folder / f"{name}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
