"""Installed packages that do not go together, as they say themselves."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

# What graphopt and its runtimes stand on; the rest of an environment is not ours to judge.
PACKAGES = (
    "graphopt",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch",
    "accelerate",
    "numpy",
)


def package_skews() -> Iterator[tuple[str, str]]:
    """Yield what each package asks for and does not find in its version, and the command that brings it."""
    for package in PACKAGES:
        for name, wanted, found in _unmet(package):
            has = f"{name} {found} is installed" if found else f"{name} is not installed"
            yield f"{package} {version(package)} needs {name}{wanted}, and {has}", f"`pip install '{name}{wanted}'`"


def _unmet(package: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield the name, the versions asked for and the version found of each requirement that is not met."""
    from packaging.requirements import Requirement

    try:
        texts = requires(package) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        # What an extra asks for is nobody's mistake where the extra was not asked for.
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield requirement.name, str(requirement.specifier), found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
