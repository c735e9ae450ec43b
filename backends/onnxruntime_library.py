"""The ONNX Runtime that is installed, the GPUs it would run on, and what is missing for a provider."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import importlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import BackendError

from .onnxruntime_health import installed_packages
from .onnxruntime_options import Provider

PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# CUdevice_attribute of the driver: COMPUTE_CAPABILITY_MAJOR and COMPUTE_CAPABILITY_MINOR.
_CAPABILITY = (75, 76)
_LONGEST_NAME = 256  # bytes of the name of a GPU
# Names of the libraries a library is linked with lie in a table near its start.
_NAMES_WITHIN = 1 << 20
_NVIDIA_LIBRARY = re.compile(rb"\0(lib(?:nv|cu)\w+\.so\.(\d+))(?=\0)")
_DRIVER_LIBRARY = "libcuda.so.1"
_TENSORRT_LIBRARIES = ("libnvinfer", "libnvonnxparser")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it.

    Attributes:
        name: Its name.
        capability: Compute capability, such as ``9.0``.
        driver: Newest CUDA version the driver knows, such as ``12.8``.
    """

    name: str
    capability: str
    driver: str

    def describe(self) -> str:
        """Return it in one line."""
        return f"{self.name} (compute capability {self.capability}, driver for CUDA {self.driver})"


@functools.cache
def runtime() -> Any:
    """Return the module, or None where it is not installed."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        return None


@functools.cache
def gpus() -> tuple[Gpu, ...] | None:
    """Return the NVIDIA GPUs of this machine, asked of the driver, or None where there is no driver."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    count, release = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    driver.cuDriverGetVersion(ctypes.byref(release))
    cuda = f"{release.value // 1000}.{release.value % 1000 // 10}"  # 12080 is 12.8
    return tuple(_gpu(driver, number, cuda) for number in range(count.value))


def _gpu(driver: Any, number: int, cuda: str) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_LONGEST_NAME)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, _LONGEST_NAME, device)
    numbers = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    return Gpu(name.value.decode(errors="replace"), ".".join(numbers), cuda)


@functools.cache
def tensorrt_version() -> tuple[int, ...] | None:
    """Return TensorRT's version, or None where its library cannot be loaded; that makes it known to ONNX Runtime."""
    # The package loads its libraries from where pip put them, which is no place a loader looks in.
    with contextlib.suppress(Exception):
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", importlib.import_module("tensorrt").__version__)
        return tuple(int(number) for number in found.groups(default="0")) if found else None
    name = ctypes.util.find_library("nvinfer")
    if name is None:
        return None
    try:
        number = int(ctypes.CDLL(name).getInferLibVersion())
    except (OSError, AttributeError):
        return None
    # 8.6.1 says 8601, and from 10 on 10.9.0 says 100900.
    thousands, hundreds = (10_000, 100) if number >= 100_000 else (1_000, 100)
    return number // thousands, number % thousands // hundreds, number % hundreds


def unmet_libraries(provider: Provider) -> list[str]:
    """Return the libraries of NVIDIA that a provider is linked with and that cannot be loaded here."""
    load_gpu_libraries()
    if provider == "tensorrt":
        tensorrt_version()
    return [name for name in _linked_libraries(provider) if not _loads(name)]


def _linked_libraries(provider: Provider) -> list[str]:
    """Return their names; none where the provider is no file of Linux, and what it lacks shows when it is started."""
    module = getattr(runtime(), "__file__", None)
    library = Path(module).parent / "capi" / f"libonnxruntime_providers_{provider}.so" if module else None
    if library is None or not library.is_file():
        return []
    # The provider itself must not be loaded: started before ONNX Runtime has made itself known to it, it crashes.
    with library.open("rb") as file:
        names = [found[1].decode() for found in _NVIDIA_LIBRARY.finditer(file.read(_NAMES_WITHIN))]
    return [name for name in dict.fromkeys(names) if name != _DRIVER_LIBRARY]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@functools.cache
def load_gpu_libraries() -> None:
    """Load the CUDA and cuDNN that pip installed, if it did: ONNX Runtime does not look for them by itself."""
    preload = getattr(runtime(), "preload_dlls", None)
    if preload is not None:
        # It prints what it cannot find, which may yet be found elsewhere.
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def missing(provider: Provider, device: int, name: str) -> BackendError | None:
    """Return the error that says why a provider cannot run here and what to install, or None if it can.

    Args:
        provider: The provider.
        device: Number of the GPU.
        name: What errors call the backend.
    """
    extra = "gpu" if provider == "cuda" else provider
    if runtime() is None:
        return _not_loaded(extra)
    if PROVIDERS[provider] not in runtime().get_available_providers():
        return _other_build(provider, extra, name)
    return None if provider == "cpu" else _gpu_missing(provider, device, name)


def _not_loaded(extra: str) -> BackendError:
    broken = next(iter(installed_packages()), None)
    if broken is None:
        return BackendError("ONNX Runtime is not installed", hint=f"`pip install 'graphopt[{extra}]'`")
    return BackendError(
        "ONNX Runtime is installed and cannot be loaded",
        hint=f"`pip install --force-reinstall {broken}`; `graphopt doctor` says why",
    )


def _other_build(provider: Provider, extra: str, name: str) -> BackendError:
    installed = list(installed_packages())
    why = f"backend `{name}` cannot run here: this ONNX Runtime has no {PROVIDERS[provider]}"
    if len(installed) > 1:
        why += f"; {' and '.join(f'`{package}`' for package in installed)} are all installed, over one another"
    return BackendError(
        why,
        hint="`--backend onnxruntime` checks the model on this CPU; on a machine with an NVIDIA GPU, "
        f"`pip uninstall -y {' '.join(installed) or 'onnxruntime'}`, then `pip install 'graphopt[{extra}]'`",
    )


def _gpu_missing(provider: Provider, device: int, name: str) -> BackendError | None:
    elsewhere = "`--backend onnxruntime` checks the model on this CPU"
    found = gpus()
    if found is None:
        hint = f"install NVIDIA's driver, or run it on a machine that has one; {elsewhere}"
        return BackendError(f"backend `{name}` cannot run here: there is no NVIDIA driver", hint=hint)
    if not found:
        hint = f"see what `nvidia-smi` says; in a container, start it with `--gpus all`; {elsewhere}"
        return BackendError(f"backend `{name}` cannot run here: the NVIDIA driver finds no GPU", hint=hint)
    if device >= len(found):
        listed = ", ".join(f"{number} {gpu.name}" for number, gpu in enumerate(found))
        return BackendError(f"backend `{name}`: there is no GPU number {device}", hint=f"`device_id` of: {listed}")
    built = str(getattr(runtime(), "cuda_version", None) or "")
    # Within a major version, a driver runs what was built for a newer minor one.
    if built and int(found[device].driver.split(".")[0]) < int(built.split(".")[0]):
        why = f"its driver knows CUDA {found[device].driver}, and this ONNX Runtime is built for CUDA {built}"
        hint = f"a newer driver of NVIDIA's, or an older `onnxruntime-gpu`; {elsewhere}"
        return BackendError(f"backend `{name}` cannot run on {found[device].name}: {why}", hint=hint)
    if provider == "tensorrt" and tensorrt_version() is None:
        hint = f"`pip install 'graphopt[tensorrt]'`; {elsewhere}"
        return BackendError(f"backend `{name}` cannot run here: TensorRT is not installed", hint=hint)
    unmet = unmet_libraries(provider)
    if unmet:
        why = f"backend `{name}` cannot run here: this ONNX Runtime needs {', '.join(unmet)}"
        return BackendError(why, hint=f"{_how_to_install(unmet)}; {elsewhere}")
    return None


def _how_to_install(libraries: list[str]) -> str:
    """Return the command that brings libraries: TensorRT in the version they are of, the rest as the runtime asks."""
    versions = [name.rpartition(".")[2] for name in libraries if name.startswith(_TENSORRT_LIBRARIES)]
    wanted = [f"'tensorrt=={versions[0]}.*'"] if versions else []
    if len(versions) < len(libraries):
        wanted.append("'onnxruntime-gpu[cuda,cudnn]'")
    return f"`pip install {' '.join(wanted)}`"
