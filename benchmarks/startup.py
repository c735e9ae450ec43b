"""Time what every call pays: starting the command line and importing the library.

    python benchmarks/startup.py [--runs 15]

Prints a Markdown table of whole-process times, fresh processes in turn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import graphopt": [sys.executable, "-c", "import graphopt"],
    "import graphopt; graphopt.optimize": [sys.executable, "-c", "import graphopt; graphopt.optimize"],
    "graphopt --help": [sys.executable, "-c", "from graphopt.cli import main; main()", "--help"],
    "graphopt list": [sys.executable, "-c", "from graphopt.cli import main; main()", "list"],
}


def seconds(command: list[str]) -> float:
    """Return how long a fresh process takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)  # warm the file cache
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    print("| process | median, s | min–max |\n|---|---|---|")
    for name, taken in times.items():
        print(f"| `{name}` | {statistics.median(taken):.3f} | {min(taken):.3f}–{max(taken):.3f} |")


if __name__ == "__main__":
    main()
