"""Which ONNX Runtime is installed, and what is wrong with how it is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from graphopt.backend import Trouble
from graphopt.errors import one_line

# All of them bring the module `onnxruntime`; where several are installed, the last one lies over the others.
_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "onnxruntime-training",
)


def installed_packages() -> dict[str, str]:
    """Return the packages that bring ONNX Runtime, by name with their versions."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def installed_version() -> str | None:
    """Return package and version in one line, all of them where several are installed, or None."""
    return ", ".join(f"{package} {number}" for package, number in installed_packages().items()) or None


def troubles() -> Sequence[Trouble]:
    """Return what is wrong with the installation; see `graphopt.backend.Diagnosable.troubles`."""
    packages = installed_packages()
    found = []
    if len(packages) > 1:
        names = " ".join(packages)
        found.append(
            Trouble(
                f"{' and '.join(packages)} are both installed, one over the files of the other",
                f"`pip uninstall -y {names}`, then install the one you need again",
                fatal=True,
            )
        )
    if not packages:
        return found
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        fix = f"`pip install --force-reinstall {next(iter(packages))}`"
        return [*found, Trouble(f"onnxruntime does not load: {one_line(error)}", fix, fatal=True)]
    loaded = getattr(module, "__version__", None)
    if loaded is not None and loaded not in packages.values():
        what = f"the onnxruntime that is imported is {loaded}, and {installed_version()} is installed"
        found.append(Trouble(what, "`pip install --force-reinstall onnxruntime`", fatal=True))
    return found
