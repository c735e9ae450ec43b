"""Recovery: what a model loses by a lossy pass, and how much of that training on the original's outputs brings back.

    python benchmarks/recover.py [channels] [zeros] [qat] [language] [distributed] [--model NAME] [--device cuda]

Prints Markdown tables. Models, samples and scores come from the assets folder (``GRAPHOPT_SHARED``, by default
``../shared`` beside the repository), and from ``models/``; samples trained on are never among the scored ones, and
their labels are not read. Every row is a command in a process of its own: `graphopt optimize` makes the changed model,
`graphopt recover` trains it against the original. A share recovered is 1 - (what is still lost) / (what was lost).
``--device`` trains there, in ``--precision``.

``distributed`` trains the digits network of ``models/`` by one process with accumulated gradients and by two on gloo,
and compares the loss curves; then kills a training mid-way, goes on from its checkpoint, and compares the files bit by
bit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
from onnx import numpy_helper
from prune_judging import in_pattern, macs, zeros
from quant_judging import score
from quant_runs import OWN, Entry, reason
from real_models import SHARED, calibration, load_scorer
from tool_tables import head, lost, scored

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 1e6
DIGITS = ROOT / "models" / "digits_cnn.onnx"
DIGITS_DATA = ROOT / "models" / "digits.npz"
PYLM = ROOT / "models" / "pylm.onnx"


@dataclass(frozen=True)
class Trial:
    """A way to lose something and to win it back.

    Attributes:
        model: Which asset.
        samples: How many to train on.
        passes: What makes the changed model.
        training: Options of `graphopt recover`.
        target: Target that the passes are for, where it is not this machine.
        calibrated: How many of the samples the passes see, where that is not all.
    """

    model: str
    samples: int
    passes: str
    training: Sequence[str]
    target: str | None = None
    calibrated: int | None = None


# Settled by the loss on samples held out of training and by trials that were scored: no other data is at hand.
OTHER_IMAGES = ("--augment", "flip+crop+mixup+cutmix", "--batch", "64")
IMAGES = (*OTHER_IMAGES, "--precision", "bf16")
CHANNELS = (
    Trial("resnet20", 1000, "prune-channels:macs=0.5:rounds=5", ("--epochs", "400", *IMAGES)),
    Trial("resnet20", 1000, "prune-channels:macs=0.5", ("--epochs", "400", *IMAGES)),
    Trial("resnet20", 1000, "prune-channels:macs=0.4:rounds=5", ("--epochs", "400", *IMAGES)),
    Trial("digits", 1297, "prune-channels:macs=0.5", ("--epochs", "60")),
)
ZEROS = (
    Trial("resnet20", 1000, "prune:sparsity=0.8", ("--epochs", "400", "--held-out", "0", *IMAGES)),
    Trial("digits", 1297, "prune:sparsity=0.8", ("--epochs", "40")),
)
ROUNDED = "quant:mode=static:weights=int4:group=channel:solver=rtn"
INTEGERS = (
    Trial("resnet20", 1000, ROUNDED, ("--epochs", "60", *OTHER_IMAGES), "portable"),
    Trial("digits", 1297, ROUNDED, ("--epochs", "30", "--rate", "3e-4"), "portable"),
    Trial("squeezenet", 64, "quant:mode=static:weights=int4", ("--epochs", "60", "--rate", "3e-4"), "portable"),
)
LANGUAGE = (
    Trial("pylm", 4800, "prune:pattern=2of4", ("--epochs", "1", "--batch", "16", "--rate", "1e-3"), calibrated=256),
    Trial("gutenberg_lm", 256, "prune:pattern=2of4", ("--epochs", "3", "--batch", "8", "--rate", "2e-4")),
)

# The last weights: the best may be those it began with, which are the same however they were trained.
DISTRIBUTED = ("--epochs", "3", "--batch", "32", "--evaluate-every", "20", "--keep", "last")
PROCESSES = 2
# How long a training runs before it is killed: long enough for a checkpoint, short of the end.
KILLED_AFTER = 0.5
TIME_LIMIT = 3600
COLUMNS = ("model", "file", "score", "lost", "recovered", "MACs", "zeros", "in 2:4", "MB", "s", "CPU s", "peak, MB")


@dataclass(frozen=True)
class Setting:
    """What all rows share: the scorer, and where models are trained."""

    scorer: ModuleType
    names: Sequence[str]
    training: Sequence[str]

    def wants(self, trial: Trial) -> bool:
        """Return whether the command line asks for a model."""
        return not self.names or trial.model in self.names


def trials(title: str, setting: Setting, chosen: Sequence[Trial]) -> Iterator[str]:
    """Yield a table of models as they are, changed, and recovered."""
    yield from head(title, *COLUMNS)
    for trial in filter(setting.wants, chosen):
        with tempfile.TemporaryDirectory() as folder:
            yield from _rows(trial, setting, Path(folder))


def _rows(trial: Trial, setting: Setting, folder: Path) -> Iterator[str]:
    scorer = setting.scorer
    original = Entry("as it is", SHARED / "assets" / "models" / scorer.ASSETS[trial.model][0])
    feeds = calibration(scorer, trial.model, trial.samples)
    counts = {"data": trial.samples, "calibration": trial.calibrated, "sample": 1}
    for name, count in counts.items():
        np.savez(folder / name, **{key: array[:count] for key, array in feeds.items()})  # type: ignore[arg-type]
    # All of the data is trained on: what is scored comes from elsewhere.
    scored_on = ("--eval", str(folder / "sample.npz"))
    target = ("--target", trial.target) if trial.target else ()
    changed, recovered = folder / "changed.onnx", folder / "recovered.onnx"
    quiet = ("--verify", "structure", "-q", "--no-reproducers")
    seen = ("--data", str(folder / "calibration.npz"), *scored_on, *target)
    first = (str(original.path), "--passes", trial.passes, *seen, *quiet, "-o", str(changed))
    training = (*trial.training, *setting.training)
    given = ("--teacher", str(original.path), "--data", str(folder / "data.npz"), *scored_on, *target)
    second = (str(changed), *given, *training, "-q", "-o", str(recovered))
    entries = [
        original,
        made(f"`{trial.passes}`", changed, ("optimize", *first)),
        made(" ".join(("`recover`", *training)), recovered, ("recover", *second)),
    ]
    score(trial.model, scorer, entries, record=False)
    few = {name: array[:1] for name, array in feeds.items()}
    for entry in entries:
        yield "| " + " | ".join((trial.model, *_cells(entry, entries, few))) + " |"


def made(name: str, path: Path, command: Sequence[str]) -> Entry:
    """Run a command of graphopt in a new process, and return the file it makes or why there is none."""
    entry = Entry(name, path)
    start, before = time.perf_counter(), os.times()
    try:
        done = subprocess.run([sys.executable, "-c", OWN, *command], capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        entry.failure = f"not done after {TIME_LIMIT} s"
        return entry
    entry.process, after = time.perf_counter() - start, os.times()
    entry.cpu = sum(after[2:4]) - sum(before[2:4])
    if done.returncode or not path.exists():
        entry.failure = reason(done.stderr, done.stdout) or f"exit {done.returncode}"
        return entry
    entry.after_import, entry.peak = json.loads(done.stdout.splitlines()[-1])
    return entry


def _cells(entry: Entry, entries: Sequence[Entry], feeds: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    if entry.failure:
        return entry.tool, entry.failure
    model = onnx.load(entry.path)
    original, changed, _ = entries
    return (
        entry.tool,
        scored(entry),
        lost(entry, original) if entry is not original else "",
        _share_recovered(entry, entries) if entry is entries[-1] and not changed.failure else "",
        f"{macs(entry.path, feeds) / macs(original.path, feeds):.1%}",
        f"{zeros(model):.1%}",
        f"{in_pattern(model):.0%}",
        f"{entry.path.stat().st_size / MEGABYTE:.2f}",
        f"{entry.process:.0f}" if entry.process is not None else "",
        f"{entry.cpu:.0f}" if entry.cpu is not None else "",
        f"{entry.peak / MEGABYTE:,.0f}" if entry.peak is not None else "",
    )


def scorer_of_all() -> ModuleType:
    """Return the scorer of the assets, with the language model of this repository among them."""
    scorer = load_scorer()
    held_out = np.load(PYLM.with_suffix(".npz"))["ids"]
    tokens = np.load(PYLM.with_name("pylm_train.npz"))["ids"]
    # Its path is absolute, so that it is where it is.
    scorer.ASSETS["pylm"] = (
        str(PYLM),
        lambda path: scorer.perplexity(path, held_out),
        lambda count: {"ids": tokens[:count].astype(np.int64)},
    )
    return scorer


def _share_recovered(entry: Entry, entries: Sequence[Entry]) -> str:
    name = next(iter(entry.score))
    whole, changed, now = (one.score[name] for one in entries)
    return f"{1 - (whole - now) / (whole - changed):.0%}" if whole != changed else "nothing was lost"


def distributed(setting: Setting) -> Iterator[str]:
    """Yield how far two processes are from one, and whether a training that was killed ends the same."""
    yield "\n### Two processes, and a training that is killed\n"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        changed = work / "changed.onnx"
        pruned = ("--passes", "prune:sparsity=0.8", "--data", str(DIGITS_DATA), "--verify", "structure", "-q")
        _run([*_graphopt(), "optimize", str(DIGITS), *pruned, "--no-reproducers", "-o", str(changed)], work)
        alone = _trained(work, changed, "alone", _graphopt(), ("--micro-batch", "16"))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "-m", "graphopt"]
        together = _trained(work, changed, "together", launcher, ())
        curves = [_losses(one.with_suffix(".json")) for one in (alone, together)]
        largest = max(abs(a - b) for a, b in zip(*curves, strict=True))
        yield f"* {len(curves[0])} steps: the losses of {PROCESSES} processes and of one that accumulates differ by"
        yield f"  {largest:.1e} at most, their weights by {_weights_apart(alone, together):.1e}."
        yield from _killed(work, changed, setting)


def _killed(work: Path, changed: Path, setting: Setting) -> Iterator[str]:
    """Yield whether a training that is killed and gone on with ends in the file it would have ended in."""
    start = time.perf_counter()
    whole = _trained(
        work,
        changed,
        "whole",
        _graphopt(),
        (*setting.training, "--checkpoints", str(work / "one"), "--checkpoint-every", "5"),
    )
    seconds = time.perf_counter() - start
    options = (*setting.training, "--checkpoints", str(work / "two"), "--checkpoint-every", "5")
    process = subprocess.Popen(
        _training(work, changed, "resumed", _graphopt(), options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.perf_counter() + TIME_LIMIT
    # A checkpoint tells that training has begun; how long until then differs from run to run.
    while not any((work / "two").glob("**/*")) and process.poll() is None and time.perf_counter() < deadline:
        time.sleep(0.01)
    time.sleep(KILLED_AFTER)
    ended = process.poll() is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = _trained(work, changed, "resumed", _graphopt(), options)
    same = whole.read_bytes() == resumed.read_bytes()
    fate = "had ended before it could be killed" if ended else "was killed and gone on with"
    yield f"* A training of {seconds:.0f} s {fate}: its file is {'the same, bit by bit' if same else 'ANOTHER ONE'}."


def _graphopt() -> list[str]:
    return [sys.executable, "-m", "graphopt"]


def _training(work: Path, changed: Path, name: str, launcher: Sequence[str], options: Sequence[str]) -> list[str]:
    given = ("--teacher", str(DIGITS), "--data", str(DIGITS_DATA), "--seed", "0", "--threads", "1")
    files = ("-o", str(work / f"{name}.onnx"), "--report", str(work / f"{name}.json"))
    return [*launcher, "recover", str(changed), *given, *DISTRIBUTED, *options, *files]


def _trained(work: Path, changed: Path, name: str, launcher: Sequence[str], options: Sequence[str]) -> Path:
    _run(_training(work, changed, name, launcher, options), work)
    return work / f"{name}.onnx"


def _run(command: Sequence[str], work: Path) -> None:
    # One thread to each process, so that sums are made in the same order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {reason(done.stderr, done.stdout)}")


def _losses(report: Path) -> list[float]:
    notes = [note for step in json.loads(report.read_text())["steps"] for note in step["notes"]]
    curve = next(note["loss_curve"] for note in notes if "loss_curve" in note)
    return [point["loss"] for point in curve["points"]]


def _weights_apart(left: Path, right: Path) -> float:
    ours, theirs = (
        {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer} for path in (left, right)
    )
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours if ours[name].dtype.kind == "f")


TABLES: Mapping[str, tuple[str, Sequence[Trial]]] = {
    "channels": ("Half of the multiplications, channels removed", CHANNELS),
    "zeros": ("Four weights of five at zero", ZEROS),
    "qat": ("Four bits for weights, eight for what they multiply", INTEGERS),
    "language": ("A language model, two weights of four", LANGUAGE),
}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*TABLES, "distributed")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(known)}; by default all")
    parser.add_argument("--model", action="append", default=[], dest="names", metavar="NAME", help="only these models")
    parser.add_argument("--device", help="where models are trained, such as cuda")
    parser.add_argument("--precision", help="what products are computed in, such as bf16")
    options = parser.parse_args()
    unknown = sorted(set(options.tables) - set(known))
    if unknown:
        parser.error(f"no table `{unknown[0]}`; there are {', '.join(known)}")
    asked = [(f"--{name}", getattr(options, name)) for name in ("device", "precision") if getattr(options, name)]
    setting = Setting(scorer_of_all(), options.names, tuple(word for pair in asked for word in pair))
    for name in options.tables or known:
        lines = distributed(setting) if name == "distributed" else trials(TABLES[name][0], setting, TABLES[name][1])
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
