"""Tools as processes: which there are, what one run of each costs, and what is known of the file it made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
PEER_SCRIPT = Path(__file__).with_name("quant_peers.py")
MEGABYTE = 1e6
# No tool needs nearly as long for one model.
TIME_LIMIT = 1800
GRAPHOPT = "graphopt"

# graphopt's own command, timed from after the import on, as the peers are.
OWN = """
import json, sys, time
from graphopt.cli import main
sys.argv = ["graphopt", *sys.argv[1:]]
start = time.perf_counter()
try:
    main()
except SystemExit as exit:
    if exit.code:
        raise
seconds = time.perf_counter() - start
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print("\\n" + json.dumps([seconds, peak]))
"""


@dataclass(frozen=True)
class Tool:
    """A tool: what the table calls it, and graphopt's arguments, or None for a peer that a script knows by this name.

    graphopt is given data only where it calibrates, as it scores what it made on them.
    """

    name: str
    own: tuple[str, ...] | None = None
    calibrates: bool = True
    script: Path = PEER_SCRIPT


def graphopt(passes: str, *arguments: str, calibrates: bool = True) -> Tool:
    """Return graphopt with a pipeline, and with further arguments of its command."""
    return Tool(" ".join((f"{GRAPHOPT} `{passes}`", *arguments)), ("--passes", passes, *arguments), calibrates)


def peers(*names: str, script: Path = PEER_SCRIPT) -> tuple[Tool, ...]:
    """Return peers by the names that a script knows them by."""
    return tuple(Tool(name, script=script) for name in names)


@dataclass
class Entry:
    """One model file under test, and what was measured of it; seconds, bytes and milliseconds.

    Attributes:
        tool: What made it.
        path: The file.
        failure: Why there is no file, or no more to say of it.
        process: Wall time of the whole process, interpreter and imports included.
        after_import: Wall time of the work.
        cpu: Processor time of the whole process, which other work on the machine changes less.
        peak: Largest resident memory.
        score: What the scorer said of it.
        outputs: What it gave for the scored samples, where the scorer looks at one output.
        times: Of each batch size, or runtime, the milliseconds of each round.
    """

    tool: str
    path: Path
    failure: str = ""
    process: float | None = None
    after_import: float | None = None
    cpu: float | None = None
    peak: int | None = None
    score: dict[str, float] = field(default_factory=dict)
    outputs: list[Array] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the file and of its external data beside it."""
        return sum(file.stat().st_size for file in self.path.parent.glob(f"{self.path.name}*"))


def run(tool: Tool, model: Path, data: Path, sample: Path, folder: Path, interpreter: Path) -> Entry:
    """Run a tool once in a new process and return what it made, or why it made nothing.

    Args:
        tool: The tool.
        model: What it quantizes.
        data: What it calibrates on.
        sample: One sample of it, which graphopt scores its result on: nothing of the data is held back then.
        folder: Where it works; made new.
        interpreter: The peers' Python.
    """
    folder.mkdir(parents=True)
    out = folder / "model.onnx"
    entry = Entry(tool.name, out)
    if tool.own is not None:
        given = ["optimize", str(model), *tool.own, "--verify", "structure", "-q", "-o", str(out)]
        given += ["--threads", "2", "--no-reproducers"]
        given += ["--data", str(data), "--eval", str(sample)] if tool.calibrates else []
        command = [sys.executable, "-c", OWN, *given]
    else:
        command = [str(interpreter), str(tool.script), "make", tool.name, str(model), str(data), str(out)]
    before, start = os.times(), time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        entry.failure = f"not done after {TIME_LIMIT} s"
        return entry
    entry.process, after = time.perf_counter() - start, os.times()
    entry.cpu = sum(after[2:4]) - sum(before[2:4])
    if done.returncode or not out.exists():
        entry.failure = reason(done.stderr, done.stdout) or f"exit {done.returncode}"
        return entry
    entry.after_import, entry.peak = json.loads(done.stdout.splitlines()[-1])
    return entry


def reason(*streams: str) -> str:
    """Return the line that says what went wrong: graphopt's error, or the last line of a traceback."""
    for stream in streams:
        lines = [line.strip() for line in stream.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error")]
        if lines:
            return (errors or lines[-1:])[0].replace("|", "/")[:160]
    return ""


def cost(entry: Entry) -> list[str]:
    """Return what making a file took as cells of the table: process, after import, processor time, peak memory."""
    if entry.process is None or entry.after_import is None or entry.cpu is None or entry.peak is None:
        return ["", "", "", ""]
    seconds = [f"{value:.1f}" for value in (entry.process, entry.after_import, entry.cpu)]
    return [*seconds, f"{entry.peak / MEGABYTE:,.0f}"]
