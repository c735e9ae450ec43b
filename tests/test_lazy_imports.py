"""Deferred imports: nothing is loaded before it is used, and then it is what it always was."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from graphopt.lazy_imports import defer
defer("sympy", "onnx_ir._symbolic_shapes", "no.such.module")
import onnx_ir as ir
loaded = [name for name in sys.modules if name.startswith("sympy.")]
assert not loaded, loaded
assert str(ir.SymbolicDim("N") + 1) == "N + 1"
assert "sympy.core" in sys.modules
try:
    import no.such.module
except ModuleNotFoundError:
    print("as missing as before")
"""


def test_deferred_module_is_loaded_when_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "as missing as before", done.stderr


def test_command_line_reads_a_model_without_sympy() -> None:
    program = """
import sys
from graphopt import cli
sys.argv = ["graphopt", "list", "passes"]
cli.main()
assert not [name for name in sys.modules if name.startswith("sympy.")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
