"""`python -m graphopt`: the command line, as `torchrun -m graphopt` starts it in each of its processes."""

from __future__ import annotations

from graphopt.cli import main

if __name__ == "__main__":
    main()
