"""Property fuzzing: random graphs before and after exact passes, until time or graphs run out.

    python benchmarks/fuzz.py [--graphs 20000] [--seconds 600] [--seed 0] [--passes SPEC ...] [--write FOLDER]

Each seed is one graph of `tests/graph_generator.py`. Every pipeline named (`each` stands for every exact pass by
itself) runs over a copy of it; the result must be well-formed, keep its signature, and give the outputs of the original
on ONNX Runtime without its optimizations, to the bit or within rounding as its guarantee says, on inputs of usual sizes
and on some whose dynamic sizes are 0 and 1. What differs is shrunk, first by steps of the recipe and then by nodes of
the graph, and written as the beginning of a golden file, with the model beside it. A process that dies or hangs is a
finding too. Nothing is random but the seed: `--seed N --graphs 1`, with the same `--size` and while the motifs are the
same, shows seed N again, and a run that was stopped goes on at the seed it names last.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime_faults import hangs_on_rounding, opened, runtime_is_wrong  # noqa: E402
from shrink import smaller_model, smaller_recipe  # noqa: E402

from graphopt import registry  # noqa: E402
from graphopt.authoring import Guarantee  # noqa: E402
from graphopt.comparison import Comparison  # noqa: E402
from graphopt.errors import GraphoptError, PassCrash, VerificationError  # noqa: E402
from graphopt.manager import PassManager, Setting  # noqa: E402
from graphopt.pipeline import Pipeline, schedule, weakest  # noqa: E402
from graphopt.shapes import forget_inferred, infer_shapes  # noqa: E402
from graphopt.verify import Signature, verify  # noqa: E402
from tests.graph_generator import Recipe, build, feeds, random_recipe  # noqa: E402
from tests.pass_runs import BACKEND, TARGET, loaded  # noqa: E402

STEPS = 10
FEED_SEED = 0
# Dynamic sizes in turn: the generator's, and two that break what assumes a size: the first is 0, the next 1, and so on.
SIZES = (None, (0, 1), (1, 0))
SECONDS_PER_GRAPH = 60
# Of findings that look the same, so many are shrunk and written; the others are counted.
WRITTEN_ALIKE = 2
SHRINK_SECONDS = 90.0
REPORT_EVERY = 30.0
MEMORY_FOLDER = Path("/dev/shm")
PARENT_INTERVAL = 0.2

Feed = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Verdict:
    """What became of one graph: nothing wrong where `kind` is empty.

    Attributes:
        kind: `crash`, `structure`, `refused` by the runtime, `outputs` differ, `hang`, `died`, or empty.
        detail: In words.
        edits: How many edits were made.
        compared: On how many feeds the outputs were compared.
        rule: Pass and rule after whose edit it went wrong, where known.
    """

    kind: str = ""
    detail: str = ""
    edits: int = 0
    compared: int = 0
    rule: str = ""

    @property
    def likeness(self) -> str:
        """What findings of one cause share."""
        return f"{self.kind} {self.rule} {'' if self.rule else re.sub(r'[^a-z ]', '', self.detail.lower())[:40]}"


class Original:
    """A generated graph: loaded once, run once as loaded, then passed through any number of pipelines."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.flags = {entry.key for entry in proto.metadata_props}
        self.model = loaded(proto)
        self._runs: list[tuple[Feed, dict[str, Any]]] | None = None

    @property
    def runs(self) -> list[tuple[Feed, dict[str, Any]]]:
        """Feeds that the graph itself runs on, and its outputs."""
        if self._runs is None:
            self._runs = []
            with contextlib.suppress(Exception):  # what the runtime refuses as it is says nothing
                run = opened(self.model)
                for sizes in SIZES:
                    feed = feeds_of(self.proto, sizes)
                    with contextlib.suppress(Exception):  # an empty tensor may be refused
                        if feed is not None:
                            self._runs.append((feed, run(feed)))
        return self._runs


def feeds_of(proto: onnx.ModelProto, sizes: tuple[int, ...] | None) -> Feed | None:
    """Return inputs, the dynamic sizes in turn as given; None if no size is dynamic."""
    if sizes is None:
        return feeds(proto, FEED_SEED)
    dims = [dim for info in proto.graph.input for dim in info.type.tensor_type.shape.dim if dim.dim_param]
    names = sorted({dim.dim_param for dim in dims})
    if not names:
        return None
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for info in fixed.graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[names.index(dim.dim_param) % len(sizes)]
    return feeds(fixed, FEED_SEED)


def check(original: Original, spec: str, edit_limit: int | None = None) -> Verdict:
    """Run a pipeline over a copy of the graph and say what is wrong with the result."""
    model, signature = original.model.clone(), Signature.of(original.model)
    setting = Setting(target=registry.find("TARGETS", TARGET), backend=registry.backend(BACKEND), threads=1)
    pipeline = Pipeline.parse(spec)
    manager = PassManager(schedule(pipeline, has_data=False), setting, edit_limit=edit_limit)
    try:
        infer_shapes(model)
        manager.run(model)
        forget_inferred(model)
        edits = len(manager.journal.edits)
        if not edits:
            return Verdict()
        verify(model, signature, provenance_too=True)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
    except PassCrash as error:
        return Verdict("crash", error.message, rule=error.message.split("`")[1])
    except (VerificationError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Verdict("structure", one_line(error), len(manager.journal.edits))
    except GraphoptError:  # a pass says that it cannot: that is an answer
        return Verdict()
    guarantee = weakest(step.guarantee for step in pipeline.steps)
    return compare(original, proto, guarantee, edits)


def compare(original: Original, proto: onnx.ModelProto, guarantee: Guarantee, edits: int) -> Verdict:
    """Compare outputs on every feed that the original runs on."""
    compared = 0
    run = None
    for feed, before in original.runs:
        try:
            run = run or opened(proto)
            after = run(feed)
        except Exception as error:  # any: whatever the runtime says of a graph it took before
            if runtime_is_wrong(original.proto, feed):
                continue
            return Verdict("refused", one_line(error), edits)
        comparison = Comparison()
        comparison.update(before, after)
        if "nondeterministic" in original.flags:
            continue
        compared += 1
        fine = comparison.equal if guarantee is Guarantee.EXACT else comparison.within()
        if fine or runtime_is_wrong(original.proto, feed):
            continue
        if guarantee is Guarantee.EXACT or not hangs_on_rounding(original.model, feed, before):
            return Verdict("outputs", apart(comparison, guarantee), edits, compared)
    return Verdict(edits=edits, compared=compared)


def apart(comparison: Comparison, guarantee: Guarantee) -> str:
    """Say which output is how far away, the worst of those that are too far."""
    exact = guarantee is Guarantee.EXACT
    wrong = [one for one in comparison.outputs.values() if not (one.equal if exact else one.within())]
    worst = max(wrong, key=lambda one: (one.mismatch is not None, one.max_rel))
    return f"`{worst.name}` {worst.dtype}: {worst.mismatch or f'{worst.max_abs:.3g} apart, peak {worst.peak:.3g}'}"


def blamed(original: Original, spec: str, found: Verdict) -> Verdict:
    """Return a finding with the pass and rule of the first edit after which it is there, by binary search."""
    if found.rule or not found.edits:
        return found
    low, high = 0, found.edits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if check(original, spec, middle).kind == found.kind else (middle, high)
    setting = Setting(target=registry.find("TARGETS", TARGET), backend=registry.backend(BACKEND), threads=1)
    manager = PassManager(schedule(Pipeline.parse(spec), has_data=False), setting, edit_limit=high)
    model = original.model.clone()
    infer_shapes(model)
    manager.run(model)
    edit = manager.journal.edits[high - 1]
    return replace(found, rule=f"{edit.pass_name}/{edit.rule}")


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())[:300]


# Findings


def shrink(recipe: Recipe, spec: str, found: Verdict) -> onnx.ModelProto:
    """Return a small graph that goes wrong in the same way, blamed on the same rule."""
    end = time.monotonic() + SHRINK_SECONDS

    def fails(proto: onnx.ModelProto) -> bool:
        if time.monotonic() > end:
            return False
        try:
            onnx.checker.check_model(proto, full_check=True)
            original = Original(proto)
            again = check(original, spec)
            return again.kind == found.kind and blamed(original, spec, again).rule == found.rule
        except Exception:  # any: a graph that was cut badly is no smaller example
            return False

    def recipe_fails(one: Recipe) -> bool:
        try:
            return fails(build(one))
        except Exception:  # any: nor is a recipe that makes no graph
            return False

    return smaller_model(build(smaller_recipe(recipe, recipe_fails)), fails)


def write_finding(folder: Path, seed: int, spec: str, found: Verdict, proto: onnx.ModelProto) -> Path:
    """Write the beginning of a golden file, the model beside it and a line of the summary; return the file."""
    place = folder / re.sub(r"[^A-Za-z0-9]+", "-", spec)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{re.sub(r'[^a-z0-9]+', '-', found.rule or 'unknown')}_{found.kind}_{seed}.txt"
    onnx.save(proto, path.with_suffix(".onnx"))
    rule = found.rule.partition("/")[2]
    about = f"# Seed {seed}, {spec}: {found.kind} after {found.rule or 'nobody knows what'}: {found.detail}"
    del proto.metadata_props[:]
    text = re.sub(r" +$", "", str(onnx.printer.to_text(proto)).strip(), flags=re.MULTILINE)
    path.write_text(f"{about}\nfires: {rule}\n\n=== before\n{text}\n", "utf-8")
    with (folder / "SUMMARY.md").open("a", encoding="utf-8") as summary:
        summary.write(f"- `{spec}` {found.kind} · {found.rule} · {found.detail[:160]} · {len(proto.graph.node)} nodes")
        summary.write(f" · seed {seed} · {path.relative_to(folder)}\n")
    return path


# Workers


@dataclass
class Job:
    """What a worker is to do: seeds from `first` in steps of `stride`, and where to say at which it is."""

    specs: list[str]
    stride: int
    write: Path | None
    size: int


def work(job: Job, first: int, at: Any, stage: Any, line: Connection) -> None:
    """Check seed after seed until told to stop, and send what became of each."""
    warnings.filterwarnings("ignore")
    if MEMORY_FOLDER.is_dir():
        tempfile.tempdir = str(MEMORY_FOLDER)
    alike: collections.Counter[str] = collections.Counter()
    signal.signal(signal.SIGALRM, give_up)
    seed = first
    while True:
        at.value = seed
        for result in verdicts(seed, job, alike, stage):
            line.send((seed, *result))
        line.send((seed, None, None))
        seed += job.stride


def give_up(*_: object) -> None:
    """End a check that takes too long."""
    raise TimeoutError(f"more than {SECONDS_PER_GRAPH} s")


def verdicts(
    seed: int, job: Job, alike: collections.Counter[str], stage: Any
) -> Iterator[tuple[str | None, Verdict | None]]:
    """Yield the verdict on every pipeline over the graph of a seed; a finding is shrunk and written."""
    recipe = random_recipe(seed, size=job.size)
    stage.value = -1
    original = Original(build(recipe))
    if not original.runs:
        yield None, Verdict("original refused")
        return
    for place, spec in enumerate(job.specs):
        stage.value = place
        signal.alarm(SECONDS_PER_GRAPH)
        try:
            found = check(original, spec)
        except TimeoutError as error:
            found = Verdict("hang", str(error))
        except Exception as error:  # any: what a pass or a check of ours did not foresee
            found = Verdict("crash", f"{type(error).__name__}: {one_line(error)}")
        finally:
            signal.alarm(0)
        if found.kind and found.kind != "hang":
            found = blamed(original, spec, found)
        if found.kind and job.write is not None:
            alike[spec + found.likeness] += 1
            if alike[spec + found.likeness] <= WRITTEN_ALIKE:
                proto = original.proto if found.kind == "hang" else shrink(recipe, spec, found)
                write_finding(job.write, seed, spec, found, proto)
        yield spec, found


class Worker:
    """A process that checks seeds, started again behind the seed at which it died."""

    def __init__(self, job: Job, first: int) -> None:
        self.job = job
        self.at = multiprocessing.get_context("spawn").Value("q", first)
        self.stage = multiprocessing.get_context("spawn").Value("i", -1)
        self._start(first)

    def _start(self, first: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(self.job, first, self.at, self.stage, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def received(self) -> Iterator[tuple[int, str | None, Verdict | None]]:
        """Yield what has arrived; if the process died, what it died of, and start another."""
        try:
            while self.line.poll():
                yield self.line.recv()
        except EOFError:
            self.process.join()
            seed, stage = int(self.at.value), int(self.stage.value)
            kind = "died" if stage >= 0 else "original died"
            spec = self.job.specs[stage] if stage >= 0 else None
            yield seed, spec, Verdict(kind, f"the process ended with {self.process.exitcode}")
            self._start(seed + self.job.stride)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


# The run


def main() -> None:
    """Fuzz and print what was found."""
    options = arguments()
    specs = list(
        dict.fromkeys(spec for text in options.passes for spec in (every_pass() if text == "each" else [text]))
    )
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
    job = Job(specs, options.jobs, options.write, options.size)
    workers = [Worker(job, options.seed + place) for place in range(options.jobs)]
    counts: dict[str, collections.Counter[str]] = {spec: collections.Counter() for spec in specs}
    totals: collections.Counter[str] = collections.Counter()
    start = reported = time.monotonic()
    try:
        while totals["graphs"] < options.graphs and time.monotonic() - start < options.seconds:
            time.sleep(PARENT_INTERVAL)
            for worker in workers:
                for seed, spec, verdict in worker.received():
                    note(seed, spec, verdict, counts, totals)
            if time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                rate = totals["graphs"] / (reported - start)
                print(f"{totals['graphs']:,} graphs, {rate:.1f}/s, {totals['findings']} findings", file=sys.stderr)
    finally:
        last = min(int(worker.at.value) for worker in workers)
        for worker in workers:
            worker.stop()
    print_table(counts, totals, time.monotonic() - start, last)
    sys.exit(1 if totals["findings"] else 0)


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=1_000_000_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--passes", nargs="+", default=["simplify"], metavar="SPEC", help="pipelines, or `each`")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="shrink findings and write them here")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--size", type=int, default=STEPS, help="most motifs in a graph")
    options = parser.parse_args()
    options.jobs = max(1, min(options.jobs, options.graphs, os.cpu_count() or 1))
    return options


def every_pass() -> list[str]:
    """Return every registered pass that is not lossy."""
    names = sorted(registry.table("PASSES"))
    return [name for name in names if registry.find("PASSES", name).guarantee is not Guarantee.LOSSY]


def note(
    seed: int,
    spec: str | None,
    verdict: Verdict | None,
    counts: dict[str, collections.Counter[str]],
    totals: collections.Counter[str],
) -> None:
    """Count what became of a graph, and print a finding."""
    if verdict is None or spec is None:
        totals["graphs"] += verdict is None or verdict.kind == "original died"
        totals[verdict.kind if verdict else "run"] += 1
        return
    counts[spec]["edited"] += bool(verdict.edits)
    counts[spec]["compared"] += verdict.compared
    if verdict.kind:
        totals["findings"] += 1
        totals["graphs"] += verdict.kind == "died"
        counts[spec][verdict.kind] += 1
        print(f"seed {seed}, {spec}: {verdict.kind} · {verdict.rule} · {verdict.detail[:200]}", flush=True)


def print_table(
    counts: dict[str, collections.Counter[str]], totals: collections.Counter[str], seconds: float, last: int
) -> None:
    """Print how many graphs each pipeline edited, on how many feeds outputs were compared, and what was found."""
    kinds = ("crash", "structure", "refused", "outputs", "hang", "died")
    rate = totals["graphs"] / seconds
    refused = totals["original refused"] + totals["original died"]
    print(f"\n{totals['graphs']:,} graphs in {seconds:.0f} s, {rate:.1f} a second; {refused} do not run themselves;")
    print(f"go on with `--seed {last}`\n\n| passes | edited | compared | {' | '.join(kinds)} |")
    print("|---|" + "---:|" * (2 + len(kinds)))
    for spec, found in counts.items():
        figures = " | ".join(f"{found[key]:,}" for key in ("edited", "compared", *kinds))
        print(f"| {spec} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
