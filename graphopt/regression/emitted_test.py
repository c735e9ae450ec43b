"""`--emit-test`: a test file that holds a model to what was measured when it was written."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.data import Dataset, batch_size
from graphopt.errors import BackendError, UsageError
from graphopt.evaluation import Judge, Outputs, compare_outputs, nudged
from graphopt.explaining import explanation
from graphopt.output_files import is_same_file
from graphopt.plain_runs import PlainRuns
from graphopt.regression import recorded_runs
from graphopt.regression.emitted_text import MARK, About, Facts, as_python
from graphopt.regression.output_bounds import RUN_NUDGE, Noise
from graphopt.regression.recorded_model import place_of, signature_of, versions_of
from graphopt.regression.recorded_runs import Run
from graphopt.staged_files import StagedFiles
from graphopt.versions import installed_version

RECORD_SUFFIX = ".npz"
# Samples kept, and the bytes of inputs they may take; one sample is kept in any case.
MOST_SAMPLES, MOST_INPUT_BYTES = 8, 1 << 19
# Sums are taken in the same order on one thread, here and where the test runs.
THREADS = 1
# Seeds of the nudges: one alone may happen to move nothing.
NUDGES = (0, 1)
# Weights of a larger model are not nudged: that takes a second copy of them.
MOST_NUDGED_BYTES = 1 << 29


@dataclass(frozen=True)
class Subject:
    """What a test is written of.

    Attributes:
        original: The model before.
        model: The model after, as it was saved.
        files: The files it was saved as, the model first; they may lie elsewhere than they will.
        name: What the original is called.
        feeds: What to run both on.
        inputs: What that is, for people.
        target: Name of the target.
        backend: What runs them.
        backend_text: The backend, where the user named it.
        lossless: Whether the outputs are the original's but for rounding.
        command: What makes all of it again, or None where no command does.
    """

    original: ir.Model
    model: ir.Model
    files: Sequence[Path]
    name: str
    feeds: Sequence[Mapping[str, Array]]
    inputs: str
    target: str
    backend: Backend
    backend_text: str | None
    lossless: bool
    command: str | None


class EmittedTest:
    """A test file and the record beside it: refused before any work, staged, then put in place together.

    Args:
        path: The test file wanted.
        output: The model it is to test.
        data: What the user gave as data: it must not be overwritten.

    Raises:
        UsageError: They cannot be written there, or pytest would not find the test.
    """

    def __init__(self, path: Path, output: Path | None, data: Sequence[Any] = ()) -> None:
        if not path.name:
            raise UsageError(f"test `{path}` is no file", hint="name it `test_model.py`")
        self.path, self.record = path, path.with_suffix(RECORD_SUFFIX)
        self._staged = StagedFiles()
        if output is None:
            raise UsageError(f"test `{path}` would have no model to test", hint="give an output, too")
        self._output = output
        self._check(data)

    def _check(self, data: Sequence[Any]) -> None:
        path = self.path
        if path.suffix != ".py" or not (path.stem.startswith("test_") or path.stem.endswith("_test")):
            raise UsageError(f"pytest would not find the test `{path}`", hint=f"name it `{_findable(path.stem)}.py`")
        if not path.parent.is_dir():
            raise UsageError(f"the folder of test `{path}` does not exist", hint=f"create `{path.parent}` first")
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"cannot write test `{path}`: no permission", hint="choose another place")
        if any(file.exists() and not file.is_file() for file in (path, self.record)):
            raise UsageError(f"cannot write test `{path}`: it, or its record, is no regular file", hint="name another")
        taken = [Path(one) for one in (*data, self._output) if isinstance(one, (str, Path))]
        if any(is_same_file(file, other) for file in (path, self.record) for other in taken):
            what = f"test `{path}`, or its record `{self.record.name}`, is the model or its data"
            raise UsageError(what, hint="name the test otherwise")
        ours = path.exists() and _is_ours(path)
        for file in (path, self.record):
            if file.exists() and not ours:
                hint = "name another file, or move this one away"
                raise UsageError(f"`{file}` was not written by graphopt, and is not overwritten", hint=hint)

    def require(self, judge: Judge) -> None:
        """Check that the original runs, and gives the same outputs each time.

        Raises:
            BackendError: It does not.
        """
        why = judge.cannot_probe
        # A runtime may draw the same numbers in each session of a process, and others in the next process.
        if why is None and any(walk.is_random(node) for node in walk.every_node(judge.original)):
            why = "the original's outputs are random"
        if why is not None or judge.reference is None:
            raise BackendError(f"no test can be written: {why}", hint="leave out `--emit-test`, or give other data")

    def stage(self, subject: Subject) -> None:
        """Measure what the test is to hold, and write both files under other names.

        Raises:
            BackendError: The runtime refuses a model.
            UsageError: The files cannot be written.
        """
        facts, runs = measure(subject)
        folder = self.path.parent.resolve()
        model = Path(os.path.relpath(self._output.resolve(), folder)).as_posix()
        about = About(
            model=model,
            record=self.record.name,
            original=subject.name,
            inputs=subject.inputs,
            target=subject.target,
            backend=subject.backend_text,
            command=subject.command,
            versions={"graphopt": installed_version(), **versions_of(_runtime(subject))},
        )
        text = as_python(about, facts)
        for file, content in ((self.record, recorded_runs.to_bytes(runs)), (self.path, text.encode())):
            try:
                with self._staged.open(file) as opened:
                    opened.write(content)
            except OSError as error:
                raise UsageError(
                    f"cannot write test `{file}`: {error.strerror}", hint="choose another place"
                ) from error

    def publish(self) -> Path:
        """Give both files their names, and return the test."""
        self._staged.publish()
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staged.discard()


def _findable(stem: str) -> str:
    """Return a name like another one, by which pytest finds a test."""
    return "test_" + re.sub(r"\W+", "_", stem).removeprefix("test_")


def _is_ours(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False


def some_feeds(data: Dataset | None, judge: Judge, seed: int) -> tuple[list[dict[str, Array]], int]:
    """Return a few feeds and how many samples are in them.

    They are of the samples that were scored, drawn with a seed, or the made-up ones of the judge.
    """
    if data is None:
        return judge.feeds, sum(map(batch_size, judge.feeds))
    one = next(iter(data.take(1).batches(1))).feeds
    fit = MOST_INPUT_BYTES // max(sum(array.nbytes for array in one.values()), 1)
    chosen = data.sample(min(max(fit, 1), MOST_SAMPLES), seed)
    feeds: list[dict[str, Array]] = []
    for batch in chosen.batches(MOST_SAMPLES):
        feeds.append(batch.feeds)
        if sum(array.nbytes for feed in feeds for array in feed.values()) >= MOST_INPUT_BYTES:
            break
    return feeds, sum(map(batch_size, feeds))


def measure(subject: Subject) -> tuple[Facts, list[Run]]:
    """Measure what a test of a model is to hold, and return it with the runs to keep beside the test.

    Raises:
        BackendError: The runtime refuses a model.
    """
    own, like_it = _own_runs(subject)
    with subject.backend.open(subject.original, threads=THREADS) as session:
        theirs = [session.run(feed) for feed in subject.feeds]
    sides = {"original": theirs} if subject.lossless else {"model": own, "original": theirs}
    runs = recorded_runs.record(subject.feeds, sides)
    reference = recorded_runs.record(subject.feeds, {"model": own})
    between = [recorded_runs.errors(reference, "model", outputs) for outputs in like_it]
    against = recorded_runs.errors(runs, "original", own)
    if subject.lossless:
        between.append(against)
    noise = {name: Noise.of([one[name] for one in between]) for name in against}
    inputs, outputs = signature_of(subject.model)
    return Facts(
        inputs=inputs,
        outputs=outputs,
        noise=noise,
        repeats_on=None if all(one.is_rounding for one in noise.values()) else _repeats_on(subject, own),
        loss=None if subject.lossless else {name: Noise.of([error]) for name, error in against.items()},
        operators=_integer_operators(subject),
        bytes=sum(file.stat().st_size for file in subject.files),
    ), runs


def _repeats_on(subject: Subject, own: Outputs) -> str | None:
    """Return where another session gives the same bits, or None if it does not, or runs where no processor counts."""
    if "cpu" not in _runtime(subject).describe():
        return None
    with subject.backend.open(subject.files[0], threads=THREADS) as session:
        again = [session.run(feed) for feed in subject.feeds]
    return place_of(_runtime(subject)) if compare_outputs(own, again).equal else None


def _runtime(subject: Subject) -> Backend:
    """Return what runs the model in the test: alone, without what ran it as it stands here."""
    return subject.backend.deployed if isinstance(subject.backend, PlainRuns) else subject.backend


def _own_runs(subject: Subject) -> tuple[Outputs, list[Outputs]]:
    """Return the model's outputs, and those of runs that should give the same but for what machines differ in.

    Those are with the runtime's own optimizations off, and of the model with its float weights nudged by rounding.
    """
    with subject.backend.open(subject.files[0], threads=THREADS) as session:
        own = [session.run(feed) for feed in subject.feeds]
    like_it = []
    for model, optimize in _others(subject):
        # Some models run only once the runtime has optimized them, or with the very floats they have.
        with (
            contextlib.suppress(BackendError),
            subject.backend.open(model, threads=THREADS, optimize=optimize) as session,
        ):
            like_it.append([session.run(feed) for feed in subject.feeds])
    return own, like_it or [own]


def _others(subject: Subject) -> Iterator[tuple[ir.Model | Path, bool]]:
    yield subject.files[0], False
    if sum(file.stat().st_size for file in subject.files) <= MOST_NUDGED_BYTES:
        for seed in NUDGES:
            yield nudged(subject.model, RUN_NUDGE, seed), True


def _integer_operators(subject: Subject) -> dict[str, int]:
    """Return how many operators are in integers, whichever is less: by the target's rules, or as they ran here."""
    feed = [dict(subject.feeds[0])] if subject.feeds else None
    found = explanation.explain(subject.model, target=subject.target, data=feed, threads=THREADS, runs=1)
    both = (one for one in found.findings if one.in_integers and replace(one, state=one.predicted).in_integers)
    return dict(Counter(one.op for one in both).most_common())
