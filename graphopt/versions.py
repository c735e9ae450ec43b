"""Versions: which graphopt this is, and what it runs with."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "numpy",
    "onnx",
    "onnx_ir",
    "protobuf",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch",
    "accelerate",
)


def installed_version() -> str:
    """Return graphopt's version."""
    return _version("graphopt") or "0+unknown"


def all_versions() -> dict[str, str]:
    """Return the versions of everything that decides what a run does, by name; what is not installed is left out."""
    found = {"graphopt": installed_version(), "python": platform.python_version(), "machine": platform.platform()}
    return found | {name: text for name in _PACKAGES if (text := _version(name)) is not None}


def release_of(*packages: str) -> tuple[int, int] | None:
    """Return the first two numbers of the version of the first package that is installed, or None where none is."""
    text = next((found for package in packages if (found := _version(package)) is not None), None)
    numbers = re.match(r"(\d+)\.(\d+)", text) if text is not None else None
    return (int(numbers[1]), int(numbers[2])) if numbers is not None else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
