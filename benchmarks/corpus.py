"""Every model at hand through `simplify`, `prune` and `quant` on every backend of this machine: none may crash.

    python benchmarks/corpus.py [--models FOLDER] [--only TEXT] [--backend NAME ...] [--passes PASS ...]

The models are those that the onnx package ships with inputs (`onnx/backend/test/data`), those of `../shared/assets`
(or where GRAPHOPT_SHARED points) and those of a folder. Each model runs in a process of its own, so that one that takes
the runtime down takes nothing else with it. What graphopt writes is run again here, by the backend itself, beside the
original, on the same inputs. Prints a Markdown table of counts by source, pass and backend, and below it a line for
every run that is not plainly good:

* **good**: written, and within the guarantee: `simplify` equal up to rounding, `prune` and `quant` of the same names,
  shapes and types, finite where the original is, with their distance from it.
* **refused**: graphopt says in one line why it does not do this: a mistake of the model's, or a limit of ours.
* **not run there**: the backend refuses the original itself.
* **differs**, **crashed**: what must not be.

The reference evaluator, which takes minutes for whole networks, gets the models of a few operators only.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
from real_models import SHARED, calibration, load_scorer

import graphopt
from graphopt.backend import Backend
from graphopt.choices import find_backend, find_target
from graphopt.comparison import Comparison
from graphopt.data import open_data
from graphopt.errors import BackendError, GraphoptError, one_line
from graphopt.generated import generated_feeds

PASSES = ("simplify", "prune", "quant")
BACKENDS = ("onnxruntime", "openvino", "reference")
# The reference evaluates in NumPy, where whole networks take minutes a run: no larger files, nor the `light` models,
# which are whole networks without their weights.
LARGEST_FOR_REFERENCE = 1 << 20
CALIBRATION_SAMPLES = 16
SECONDS_PER_MODEL = 1800
NAMES_SHOWN, TEXT_SHOWN = 6, 160
GOOD, REFUSED, NOT_THERE, DIFFERS, CRASHED = "good", "refused", "not run there", "differs", "crashed"
KINDS = (GOOD, REFUSED, NOT_THERE, DIFFERS, CRASHED)

Feed = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Outcome:
    """What came of one model, pass and backend."""

    source: str
    model: str
    passes: str
    backend: str
    kind: str
    text: str = ""
    error: float | None = None


def sources(folder: Path | None) -> Iterator[tuple[str, str]]:
    """Yield the name of each source and each of its models: a path, or the name of an asset."""
    shipped = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for path in sorted(shipped.glob("*/*/model.onnx")) + sorted(shipped.glob("light/*.onnx")):
        yield "onnx package", str(path)
    if (SHARED / "assets").is_dir():
        for name in load_scorer().ASSETS:
            yield "assets", name
    for path in sorted(folder.glob("*.onnx")) if folder is not None else ():
        yield "large", str(path)


def short(model: str) -> str:
    """Return what a model is called in a table."""
    path = Path(model)
    return path.parent.name if path.name == "model.onnx" else path.stem


def file_and_inputs(source: str, model: str) -> tuple[Path, Feed | None]:
    """Return a model's file, and samples that come with it, or None."""
    if source == "assets":
        scorer = load_scorer()
        return scorer.HERE / "models" / scorer.ASSETS[model][0], calibration(scorer, model, CALIBRATION_SAMPLES)
    path = Path(model)
    feed = {}
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    for place, name in enumerate(value.name for value in graph.input if value.name not in stored):
        file = path.parent / "test_data_set_0" / f"input_{place}.pb"
        if path.name != "model.onnx" or not file.exists():
            return path, None
        try:
            feed[name] = onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))
        except Exception:  # a sequence, an optional: no tensor
            return path, None
    return path, feed


def run_model(source: str, model: str, passes: Sequence[str], backends: Sequence[str]) -> Iterator[Outcome]:
    """Run one model through each pass on each backend."""
    path, samples = file_and_inputs(source, model)
    for backend in backends:
        if backend == "reference" and (path.parent.name == "light" or path.stat().st_size > LARGEST_FOR_REFERENCE):
            continue
        runtime = find_backend(backend, find_target(None))
        feeds, why = inputs_that_run(path, samples, runtime)
        for name in passes:
            said = (source, short(model), name, backend)
            with tempfile.TemporaryDirectory() as folder:
                found = outcome(said, path, samples, feeds, runtime, Path(folder, "out.onnx"))
            # It must not take graphopt down all the same.
            yield found if why is None or found.kind == CRASHED else Outcome(*said, NOT_THERE, why)


def inputs_that_run(path: Path, samples: Feed | None, runtime: Backend) -> tuple[list[Feed], str | None]:
    """Return inputs for a model, and why the backend cannot run it on them, or None."""
    try:
        feeds = feeds_of(graphopt.load(path), samples)
        with runtime.open(path, optimize=False) as session:
            for feed in feeds:
                session.run(feed)
    except GraphoptError as error:
        return [], one_line(error)
    return feeds, None


def feeds_of(model: ir.Model, samples: Feed | None) -> list[Feed]:
    """Return what a model runs on: made up, a set of inputs, or samples as graphopt batches them."""
    if samples is None:
        return list(generated_feeds(model, 0))
    if rows(samples) is None:
        return [samples]
    return [dict(batch.feeds) for batch in open_data(samples, model).batches(CALIBRATION_SAMPLES)]


def rows(samples: Feed) -> int | None:
    """Return how many samples there are, or None where not every input has one row for each, as with operators."""
    counts = {len(x) if x.ndim else None for x in samples.values()}
    return counts.pop() if len(counts) == 1 else None


def outcome(
    said: tuple[str, str, str, str], path: Path, samples: Feed | None, feeds: list[Feed], runtime: Backend, output: Path
) -> Outcome:
    """Run one pass, and what it wrote beside the original."""
    passes, backend = said[2:]
    data = samples if samples is not None and rows(samples) is not None else None
    try:
        graphopt.optimize(path, passes, data=data, evaluation=data, backend=backend, output=output)
    except GraphoptError as error:
        kind = DIFFERS if error.exit_code == 1 else REFUSED
        return Outcome(*said, kind, f"{one_line(error)} ({error.hint})")
    except Exception as error:  # what a user would see as a traceback
        return Outcome(*said, CRASHED, f"{type(error).__name__}: {one_line(error)}")
    comparison = Comparison()
    try:
        with runtime.open(path, optimize=False) as before, runtime.open(output, optimize=False) as after:
            for feed in feeds:
                wanted, got = before.run(feed), after.run(feed)
                why = other_outputs(wanted, got)
                if why is not None:
                    return Outcome(*said, DIFFERS, why)
                comparison.update(wanted, got)
    except BackendError as error:
        return Outcome(*said, CRASHED, f"the result does not run: {one_line(error)}")
    worst = comparison.max_abs_error
    if passes == "simplify" and not comparison.within():
        return Outcome(*said, DIFFERS, f"max |Δ| {worst:.2g}", worst)
    return Outcome(*said, GOOD, error=worst)


def other_outputs(wanted: dict[str, Any], got: dict[str, Any]) -> str | None:
    """Return what no pass may change of the outputs and this one did, or None."""
    if list(wanted) != list(got):
        return f"outputs {list(got)} instead of {list(wanted)}"
    for name, value in wanted.items():
        if not isinstance(value, np.ndarray):
            continue
        if (value.shape, value.dtype) != (got[name].shape, got[name].dtype):
            return f"`{name}` is {got[name].dtype} {got[name].shape} instead of {value.dtype} {value.shape}"
        if value.dtype.kind == "f" and np.isfinite(value).all() and not np.isfinite(got[name]).all():
            return f"`{name}` has infinities or NaN"
    return None


def in_child(source: str, model: str, passes: Sequence[str], backends: Sequence[str]) -> list[Outcome]:
    """Run one model in a process of its own."""
    command = [sys.executable, __file__, "--child", source, model, "--passes", *passes, "--backend", *backends]
    failed = (source, short(model), "any", "any", CRASHED)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_PER_MODEL)
    except subprocess.TimeoutExpired:
        return [Outcome(*failed, f"no result in {SECONDS_PER_MODEL} s")]
    found = [Outcome(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        found.append(Outcome(*failed, f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"))
    return found


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the counts, then every run that is not plainly good; those alike in one line."""
    yield "| models | passes | backend | " + " | ".join(KINDS) + " | largest error |"
    yield "|" + "---|" * (4 + len(KINDS))
    groups: dict[tuple[str, str, str], list[Outcome]] = collections.defaultdict(list)
    for one in outcomes:
        groups[one.source, one.passes, one.backend].append(one)
    for key, found in groups.items():
        counts = collections.Counter(one.kind for one in found)
        errors = [one.error for one in found if one.error is not None]
        cells = (*key, *(str(counts[kind]) for kind in KINDS), f"{max(errors):.2g}" if errors else "–")
        yield "| " + " | ".join(cells) + " |"
    yield ""
    alike: dict[tuple[str, str, str], list[Outcome]] = collections.defaultdict(list)
    for one in outcomes:
        if one.kind != GOOD:
            alike[one.kind, one.backend, without_paths(one.text)].append(one)
    for (kind, backend, text), found in sorted(alike.items()):
        names = list(dict.fromkeys(one.model for one in found))
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        passes = ", ".join(dict.fromkeys(one.passes for one in found))
        yield f"* {kind}, {backend}, {passes}: {', '.join(names[:NAMES_SHOWN])}{more}: {text}"


def without_paths(text: str) -> str:
    """Return the beginning of what was said, without the folders of this machine."""
    return re.sub(r"(/[^\s/:]+)+/", "", text)[:TEXT_SHOWN]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="more models")
    parser.add_argument("--only", default="", metavar="TEXT", help="only models whose path has this in it")
    parser.add_argument("--passes", nargs="+", default=PASSES)
    parser.add_argument("--backend", nargs="+", default=BACKENDS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        for one in run_model(*options.child, options.passes, options.backend):
            print(json.dumps(asdict(one)), flush=True)
        return
    target = find_target(None)
    absent = {name: find_backend(name, target).missing() for name in options.backend}
    for name, why in absent.items():
        if why is not None:
            print(f"not here: {name}: {why.message}")
    here = [name for name, why in absent.items() if why is None]
    outcomes: list[Outcome] = []
    for source, model in sources(options.models):
        if options.only in model:
            outcomes += in_child(source, model, options.passes, here)
            print(f"{short(model)}: {collections.Counter(one.kind for one in outcomes)}", file=sys.stderr, flush=True)
    for line in table(outcomes):
        print(line)


if __name__ == "__main__":
    main()
