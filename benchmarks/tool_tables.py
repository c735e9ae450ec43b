"""What tables of tools side by side are made of: models with their samples, and the lines of a table."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import simplify
from prune_judging import macs, parameters
from quant_judging import time_together
from quant_runs import MEGABYTE, Array, Entry, Tool, run
from real_models import SHARED, calibration

CALIBRATION_SAMPLES = 64
# Made-up samples for models that come without data.
SAMPLES_OF_LARGE = 4
# Scores from 0 to 1 of which a loss is said in points.
IN_POINTS = ("top1", "spearman")
IMAGE = (3, 224, 224)


@dataclass
class Case:
    """A model in one table: its file, samples named as its inputs, and the folder for what is made of it."""

    name: str
    model: Path
    feeds: dict[str, Array]
    folder: Path

    @property
    def data(self) -> Path:
        """The samples as a file."""
        return self.written("data.npz", self.feeds)

    @property
    def sample(self) -> Path:
        """The first of them as a file."""
        return self.written("sample.npz", self.first(1))

    def written(self, name: str, feeds: dict[str, Array]) -> Path:
        """Return the file of some samples, written on first use."""
        path = self.folder / name
        if not path.exists():
            np.savez(path, **feeds)  # type: ignore[arg-type]
        return path

    def first(self, count: int) -> dict[str, Array]:
        """Return the first samples."""
        return {key: x[:count] for key, x in self.feeds.items()}


@dataclass
class Bench:
    """What the tables share: the scorer of the assets and what the command line says."""

    scorer: ModuleType
    options: argparse.Namespace

    def cases(self, known: Sequence[str], samples: int = CALIBRATION_SAMPLES) -> Iterator[Case]:
        """Yield the assets among some that were asked for, with calibration samples."""
        for name in known:
            if not self.options.names or name in self.options.names:
                file = SHARED / "assets" / "models" / self.scorer.ASSETS[name][0]
                with tempfile.TemporaryDirectory() as folder:
                    yield Case(name, file, calibration(self.scorer, name, samples), Path(folder))

    def time(self, entries: Sequence[Entry], feeds: dict[str, Array], key: str) -> None:
        """Time files on ONNX Runtime."""
        time_together(entries, feeds, key, self.options.seconds, busy=self.options.busy)

    def made(self, case: Case, tools: Sequence[Tool]) -> list[Entry]:
        """Return the model itself, and what each tool makes of it."""
        entries = [Entry("fp32", case.model)]
        for place, tool in enumerate(tools):
            given = (case.data, case.sample, case.folder / str(place), self.options.peers)
            entries.append(run(tool, case.model, *given))
        return entries


def resnet_case(bench: Bench, folder: str) -> Case | None:
    """Return the ResNet-50 of the command line with random images, or None where none was given."""
    path = bench.options.resnet50
    if path is None:
        return None
    images = np.random.default_rng(0).standard_normal((CALIBRATION_SAMPLES, *IMAGE)).astype(np.float32)
    spec = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0]
    if isinstance(spec.shape[0], int):
        raise SystemExit(f"`{path}` takes {spec.shape[0]} images only; give one whose batch is free")
    return Case(path.stem, path, {spec.name: images}, Path(folder))


def large_cases(bench: Bench) -> Iterator[Case]:
    """Yield the models of the folder of the command line with random inputs."""
    folder = bench.options.models
    for path in sorted(folder.glob("*.onnx")) if folder is not None else ():
        if bench.options.names and path.stem not in bench.options.names:
            continue
        feeds = simplify.feeds_of(simplify.open_session(path, "ORT_DISABLE_ALL"), {})
        with tempfile.TemporaryDirectory() as work:
            yield Case(path.stem, path, repeated(feeds), Path(work))


def repeated(feeds: dict[str, Array]) -> dict[str, Array]:
    """Return one sample as several, in which no two are alike."""
    return {
        name: np.concatenate([np.roll(x[:1], at, -1) for at in range(SAMPLES_OF_LARGE)]) for name, x in feeds.items()
    }


def made(bench: Bench, case: Case, tools: Sequence[Tool]) -> list[Entry]:
    """Return the model itself, and what each of the tools asked for makes of it."""
    asked = bench.options.tool
    return bench.made(case, [tool for tool in tools if not asked or any(one in tool.name for one in asked)])


def head(title: str, *columns: str) -> Iterator[str]:
    """Yield the lines that begin a table."""
    yield f"\n### {title}\n"
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)


def line(case: Case, entry: Entry, *cells: str) -> str:
    """Return one row of a table; of what failed, why."""
    given = (entry.failure,) if entry.failure else cells
    return "| " + " | ".join((case.name, entry.tool, *given)) + " |"


def size(entry: Entry) -> str:
    """Return the megabytes of a file."""
    return f"{entry.size / MEGABYTE:.2f}"


def scored(entry: Entry) -> str:
    """Return the first figure of a score."""
    return f"{next(iter(entry.score.values())):.4f}" if entry.score else ""


def lost(entry: Entry, reference: Entry) -> str:
    """Return by how much a score is worse: points of what goes from 0 to 1, or the difference."""
    if not entry.score or not reference.score:
        return ""
    name = next(iter(reference.score))
    before, after = reference.score[name], entry.score[name]
    return f"{100 * (before - after):.2f}" if name in IN_POINTS else f"{after - before:+.3f}"


def left(entry: Entry, original: Entry, case: Case) -> tuple[str, str]:
    """Return the shares of the original's multiplications and parameters that a file has."""
    if entry.failure:
        return "", ""
    shares = (
        macs(entry.path, case.first(1)) / macs(original.path, case.first(1)),
        parameters(onnx.load(entry.path)) / parameters(onnx.load(original.path)),
    )
    return f"{shares[0]:.1%}", f"{shares[1]:.1%}"
