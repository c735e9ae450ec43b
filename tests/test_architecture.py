"""The architecture holds: import direction, light imports, sizes and names of files."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"graphopt": ROOT / "graphopt", "graphopt.passes": ROOT / "passes", "graphopt.backends": ROOT / "backends"}

# The rooms of core from the ground up. A module imports from its own room and from those above it in this list.
ROOMS = {
    "words": ("errors", "lazy_imports", "machine", "processes", "progress", "versions"),
    "ground": (
        "backend",
        "bias_scales",
        "constant_names",
        "fusion_rules",
        "options",
        "provenance",
        "standing",
        "target",
        "walk",
    ),
    "files": (
        "data_files",
        "fidelity",
        "header",
        "mapped",
        "derived",
        "model_io",
        "normal_form",
        "output_files",
        "sparse",
        "staged_files",
        "stored_weights",
        "regression.stored_arrays",
        "torch_import",
        "torch_names",
        "wire",
    ),
    "looking": (
        "analysis",
        "comparison",
        "data",
        "explaining.advice",
        "explaining.codes",
        "explaining.obstacles",
        "explaining.products",
        "explaining.proof",
        "explaining.rules",
        "fragment",
        "generated",
        "graph_view.facts",
        "graph_view.layout",
        "graph_view.pairs",
        "graph_view.slots",
        "graph_view.view",
        "regression.golden_files",
        "kernel_nodes",
        "latency",
        "node_costs",
        "comparing.layer_blame",
        "comparing.layer_errors",
        "comparing.layer_pairs",
        "comparing.layer_values",
        "layers",
        "listing",
        "model_diff",
        "comparing.node_changes",
        "comparing.structural_differences",
        "dims",
        "inference",
        "inference_bodies",
        "onnx_inference",
        "shape_rules.shape_facts",
        "shape_rules.contrib",
        "shape_rules.layout",
        "shape_rules.math",
        "shape_rules.reshape",
        "shape_rules.windows",
        "shapes",
        "value_records",
        "calibration_cache",
        "content_keys",
        "data_sources",
        "observation",
        "regression.recorded_runs",
        "regression.output_bounds",
        "ranges",
        "statistics",
        "summary",
        "graph_view.tensor_glance",
        "token_inputs",
        "torch_factory",
        "unfit_layers",
        "verify",
        "walkthrough",
        "reporting.weight_histograms",
        "weight_values",
    ),
    "editing": ("pattern", "worklist", "rewrite_check", "rewriter"),
    "authoring": ("authoring",),
    "finding": (
        "backend_survey",
        "metrics",
        "package_skews",
        "registry",
        "report",
        "reporting.rows",
        "reporting.trainings",
    ),
    "planning": (
        "benchmarking.points",
        "candidates",
        "choices",
        "evaluation",
        "measurement",
        "pipeline",
        "plain_runs",
        "request",
        "rulebook",
        "seen_samples",
        "specialise",
        "target_advice",
        "teacher",
    ),
    "running": ("instruments", "manager", "repetition", "reproducer"),
    "driving": (
        "benchmarking.results",
        "benchmarking.benchmark",
        "debugging.bisection",
        "debugging.candidate_runs",
        "benchmarking.cold_start",
        "doctor",
        "driver",
        "debugging.edit_costs",
        "debugging.edit_states",
        "regression.emitted_test",
        "regression.emitted_text",
        "explaining.explanation",
        "importing",
        "debugging.failures",
        "debugging.idle_edits",
        "debugging.isolation",
        "benchmarking.kernel_profile",
        "comparing.layer_comparison",
        "layer_sensitivity",
        "comparing.model_comparison",
        "optimization",
        "recovering",
        "regression.recorded_model",
        "debugging.reduction",
        "debugging.reduction_cuts",
        "debugging.reduction_folder",
        "debugging.reduction_result",
        "debugging.reduction_search",
        "debugging.reduction_sizes",
        "debugging.reduction_values",
        "reporting.charts",
        "reporting.file",
        "reporting.findings",
        "reporting.markdown",
        "reporting.page",
        "reporting.words",
        "debugging.rerun",
        "debugging.user_check",
        "debugging.verdicts",
        "benchmarking.roofline",
        "testing",
        "torch_export",
    ),
    "showing": (
        "__main__",
        "commands.bench_command",
        "commands.bench_tables",
        "cli",
        "commands.cli_options",
        "commands.compare_command",
        "commands.doctor_command",
        "commands.explain_command",
        "commands.debug_command",
        "commands.import_command",
        "commands.inspect_command",
        "commands.layer_tables",
        "pytest_plugin",
        "commands.recover_command",
        "commands.sensitivity_command",
        "commands.tables",
    ),
}
# Folders of core: what is in them is named `folder.module` in `ROOMS`.
CORE_PACKAGES = {folder.parent.name for folder in PACKAGES["graphopt"].glob("*/__init__.py")}
ROOM_OF = {module: room for room, modules in ROOMS.items() for module in modules}
LEVEL = {room: level for level, room in enumerate(ROOMS)}

# Loading one of these takes long, or needs what a machine may lack: only inside a function, where it is used.
HEAVY = frozenset({"accelerate", "onnxruntime", "openvino", "sklearn", "tensorrt", "torch"})
# What trains is written in torch throughout: its modules are imported inside functions instead, and bring it along.
WRITTEN_IN_TORCH = (PACKAGES["graphopt.passes"] / "recovery", PACKAGES["graphopt.backends"] / "torch_fx")
TRAINING = frozenset({"accelerate", "torch"})
LINES_LIMIT = 500
SAYS_NOTHING = re.compile(r"common|misc|(.*_)?(utils?|helpers?)", re.IGNORECASE)
# Import name to the distribution that brings it, where the two differ.
DISTRIBUTION = {"google": "protobuf", "onnx_ir": "onnx-ir", "ml_dtypes": "ml-dtypes", "tomli_w": "tomli-w"}


@dataclass(frozen=True)
class Import:
    """One import statement: what it names, in absolute terms, where, and whether it runs with its module."""

    module: str
    line: int
    at_import: bool


def files() -> list[Path]:
    return sorted(file for folder in PACKAGES.values() for file in folder.rglob("*.py"))


def module_name(file: Path) -> str:
    package, folder = next((name, folder) for name, folder in PACKAGES.items() if file.is_relative_to(folder))
    parts = [package, *file.relative_to(folder).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def imports(file: Path) -> list[Import]:
    """Return every import of a file; ``from graphopt import walk`` counts as ``graphopt.walk``."""
    return list(_imports(ast.parse(file.read_text()), file, at_import=True))


def _imports(node: ast.AST, file: Path, *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(child, file)
            whole = base not in PACKAGES and base.removeprefix("graphopt.") not in CORE_PACKAGES
            names = [base] if whole else [f"{base}.{alias.name}" for alias in child.names]
            yield from (Import(name, child.lineno, at_import) for name in names)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_for_types(child)
        yield from _imports(child, file, at_import=at_import and not inside)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def core_modules() -> dict[str, Path]:
    """Return every module of core by its name in `ROOMS`: ``walk``, ``reporting.page``."""
    core = (file for file in sorted(PACKAGES["graphopt"].rglob("*.py")) if file.stem != "__init__")
    return {module_name(file).removeprefix("graphopt."): file for file in core}


def core_imports(file: Path) -> list[tuple[str, Import]]:
    """Return what a file imports from core, by the name of the core module."""
    found = []
    for one in imports(file):
        package, _, rest = one.module.partition(".")
        parts = rest.split(".")
        if package == "graphopt" and parts[0] not in ("", "passes", "backends"):
            found.append((".".join(parts[: 2 if parts[0] in CORE_PACKAGES else 1]), one))
    return found


def complain(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_every_core_module_has_a_room() -> None:
    assert set(ROOM_OF) == set(core_modules()), "list each module of graphopt/ in ROOMS and in docs/architecture.md"
    assert len(ROOM_OF) == sum(len(modules) for modules in ROOMS.values()), "a module is in two rooms"


def test_core_imports_only_from_rooms_below() -> None:
    complain(
        [
            f"{name}.py:{one.line} ({room}) imports {other} ({ROOM_OF[other]}), which is above it"
            for name, file in core_modules().items()
            if (room := ROOM_OF.get(name)) is not None
            for other, one in core_imports(file)
            if other in ROOM_OF and LEVEL[ROOM_OF[other]] > LEVEL[room]
        ]
    )


def test_core_imports_make_no_circle() -> None:
    edges = [(name, other) for name, file in core_modules().items() for other, _ in core_imports(file)]
    assert edges
    assert list(networkx.simple_cycles(networkx.DiGraph(edges))) == []


def test_core_knows_no_pass_and_no_backend() -> None:
    complain(
        [
            f"{file.name}:{one.line} imports {one.module}"
            for file in PACKAGES["graphopt"].rglob("*.py")
            for one in imports(file)
            if one.module.startswith(("graphopt.passes", "graphopt.backends", "passes", "backends"))
        ]
    )


@pytest.mark.parametrize(("package", "other"), [("passes", "backends"), ("backends", "passes")])
def test_passes_and_backends_know_only_core_and_themselves(package: str, other: str) -> None:
    above = [module for room in ("running", "driving", "showing") for module in ROOMS[room]]
    banned = (f"graphopt.{other}", other, package, *(f"graphopt.{module}" for module in above))
    complain(
        [
            f"{file.relative_to(ROOT)}:{one.line} imports {one.module}"
            for file in PACKAGES[f"graphopt.{package}"].rglob("*.py")
            for one in imports(file)
            if any(one.module == name or one.module.startswith(f"{name}.") for name in banned)
        ]
    )


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    complain(
        [
            f"{file.relative_to(ROOT)}:{one.line} imports {one.module} with the module"
            for file in files()
            for one in imports(file)
            if one.at_import and one.module.split(".")[0] in HEAVY - (TRAINING if _is_of_torch(file) else set())
        ]
    )


def _is_of_torch(file: Path) -> bool:
    return any(file.is_relative_to(folder) for folder in WRITTEN_IN_TORCH)


def test_only_backends_know_a_runtime() -> None:
    runtimes = {"onnxruntime", "openvino", "tensorrt"}
    complain(
        [
            f"{file.relative_to(ROOT)}:{one.line} imports {one.module}"
            for file in files()
            if not file.is_relative_to(PACKAGES["graphopt.backends"])
            for one in imports(file)
            if one.module.split(".")[0] in runtimes
        ]
    )


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", text)[0].lower().replace("_", "-") for text in project["dependencies"]}
    third_party = {
        (file, top)
        for file in files()
        for one in imports(file)
        if one.at_import and (top := one.module.split(".")[0]) not in {*sys.stdlib_module_names, "graphopt"}
    }
    assert {"numpy", "onnx_ir"} <= {top for _, top in third_party}
    complain(
        [
            f"{file.relative_to(ROOT)} imports {top}, which pyproject.toml does not declare"
            for file, top in sorted(third_party)
            if DISTRIBUTION.get(top, top) not in declared | (TRAINING if _is_of_torch(file) else set())
        ]
    )


def test_imports_are_seen_for_what_they_are(tmp_path: Path) -> None:
    source = (
        "import os, torch.nn\n"
        "from graphopt import walk, errors\n"
        "from graphopt.passes.lossy.prune import Prune\n"
        "if TYPE_CHECKING:\n    import onnxruntime\n"
        "def late():\n    from torch import nn\n"
    )
    file = PACKAGES["graphopt"] / "imagined.py"
    seen = [(one.module, one.line, one.at_import) for one in _imports(ast.parse(source), file, at_import=True)]
    assert seen == [
        ("os", 1, True),
        ("torch.nn", 1, True),
        ("graphopt.walk", 2, True),
        ("graphopt.errors", 2, True),
        ("graphopt.passes.lossy.prune", 3, True),
        ("onnxruntime", 5, False),
        ("torch", 7, False),
    ]
    deep = PACKAGES["graphopt.passes"] / "lossy" / "imagined.py"
    relative = _imports(ast.parse("from ..solvers import mask\nfrom .prune import Prune"), deep, at_import=True)
    assert [one.module for one in relative] == ["graphopt.passes.solvers", "graphopt.passes.lossy.prune"]


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules a fresh interpreter has after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


LIGHT = HEAVY | {"ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxscript", "networkx", "rich"}


def test_import_graphopt_is_light() -> None:
    assert not LIGHT & loaded_by("import graphopt")


def test_help_is_light() -> None:
    # rich is typer's own.
    assert not (LIGHT - {"rich"}) & loaded_by("import graphopt.cli")


def test_whole_core_loads_no_runtime() -> None:
    modules = ", ".join(f"graphopt.{name}" for name in core_modules())
    loaded = loaded_by(f"import {modules}")
    assert not HEAVY & loaded
    assert {"onnx_ir", "numpy"} <= loaded


def test_listing_what_is_installed_loads_no_torch() -> None:
    loaded = loaded_by("from graphopt import registry\nfor kind in registry.TABLES:\n    registry.table(kind)")
    assert not HEAVY & loaded


@pytest.mark.parametrize("kind", ["PASSES", "BACKENDS"])
def test_passes_and_backends_are_known_without_torch(kind: str) -> None:
    loaded = loaded_by(
        f"from graphopt import registry\nfor name in registry.table('{kind}'):\n    registry.find('{kind}', name)"
    )
    assert not TRAINING & loaded


def test_public_names_exist() -> None:
    code = "import graphopt\nfor name in graphopt.__all__:\n    getattr(graphopt, name)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_files_are_short() -> None:
    lengths = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in files()}
    complain([f"{file} has {lines} lines" for file, lines in lengths.items() if lines > LINES_LIMIT])


def test_file_names_say_what_is_inside() -> None:
    complain([f"{file.relative_to(ROOT)}" for file in files() if SAYS_NOTHING.fullmatch(file.stem)])


def test_every_file_says_what_it_is() -> None:
    complain(
        [
            f"{file.relative_to(ROOT)} does not begin with a sentence that says what it is"
            for file in files()
            if not (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0].endswith((".", ":"))
        ]
    )


def test_no_print_in_packages() -> None:
    complain(
        [
            f"{file.relative_to(ROOT)}:{node.lineno} prints"
            for file in files()
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
    )


def test_no_mutable_state_in_modules() -> None:
    """A list or dict at module level is a table under a constant's name, or it has no place there."""
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    faults = []
    for file in files():
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, mutable):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            faults += [
                f"{file.relative_to(ROOT)}:{node.lineno} {name}"
                for name in names
                if name != "__all__" and name.upper() != name
            ]
    complain(faults)


def test_packages_of_the_wheel_are_all_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {
        ".".join([name, *folder.relative_to(root).parts])
        for name, root in PACKAGES.items()
        for folder in {file.parent for file in root.rglob("*.py")}
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders
