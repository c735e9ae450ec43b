"""The files a model is read from: its own, and the data files it refers to."""

from __future__ import annotations

import os
import stat

from graphopt.errors import ModelError
from graphopt.mapped import MappedFile

MAX_PINNED_FILES = 256
"""Data files kept mapped. Each costs a descriptor, of which a process has 1,024 by default; some exporters write one
file per tensor."""

_FOREIGN_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint", "export it with torch.onnx.export first"),
    (b"\x80\x02", "a Python pickle, perhaps a PyTorch checkpoint", "export it with torch.onnx.export first"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"\x89HDF", "an HDF5 file, perhaps a Keras model", "convert it with tf2onnx first"),
    (b"GGUF", "a GGUF file", "use the ONNX export of the same model"),
)
_ORT_FORMAT = b"ORTM"
_TEXT_SAMPLE = 64

# First bytes a ModelProto can begin with: the tags of its fields, with the wire types they have.
_FIRST_BYTES = frozenset(b"\x08\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xca\xd2")


def open_model_file(path: str) -> MappedFile:
    """Map a model file.

    Raises:
        ModelError: There is no such file, or it cannot be a model.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"`{path}` is a folder", hint="give the .onnx file inside it")
        if stat.S_ISREG(status.st_mode) and status.st_size == 0:
            raise ModelError(f"`{path}` is empty", hint="get the file again")
        return MappedFile(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"there is no file `{path}`", hint="check the path") from error
    except OSError as error:
        raise ModelError(f"cannot open `{path}`: {error.strerror or error}", hint=_open_hint(error)) from error


def foreign_format(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that begins like this, and what to do, if it is certainly not a ModelProto."""
    for magic, what, hint in _FOREIGN_FORMATS:
        if head.startswith(magic):
            return what, hint
    if head[4:8] == _ORT_FORMAT:
        return "in ONNX Runtime's own format", "use the .onnx file it was made from"
    sample = head[:_TEXT_SAMPLE]
    if all(byte in b"\t\n\r" or 0x20 <= byte < 0x7F for byte in sample):
        return "a text file", "give a binary .onnx file"
    if sample[0] not in _FIRST_BYTES:
        return "not ONNX", "give a binary .onnx file"
    return None


class DataFiles:
    """The data files next to one model, each mapped once.

    A data file must really lie in the folder the model was opened in, or in the folder the model file really lies in:
    in a Hugging Face cache both are links into a folder of blobs. Anything else could make a model read files that its
    user never meant to give it.

    Args:
        model_path: The path the model was opened with.
    """

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        real_model = os.path.realpath(model_path)
        self._folders = list(
            dict.fromkeys([os.path.realpath(os.path.dirname(model_path)), os.path.dirname(real_model)])
        )
        self._by_location: dict[str, MappedFile] = {}
        self._by_real_path: dict[str, MappedFile] = {}
        self.entries: list[str] = []

    def open(self, location: str, tensor_name: str) -> MappedFile:
        """Return the mapped file at a location as written in the model.

        Raises:
            ModelError: The file is missing, unreadable or outside the model's folders.
        """
        if location not in self._by_location:
            self._by_location[location] = self._open(location, tensor_name)
        return self._by_location[location]

    def _open(self, location: str, tensor_name: str) -> MappedFile:
        entry = self._find(location, tensor_name)
        real_path = os.path.realpath(entry)
        if not any(os.path.commonpath([real_path, folder]) == folder for folder in self._folders):
            raise ModelError(
                f"tensor `{tensor_name}` of `{self._model_path}` has its data in `{location}`, a link to `{real_path}`"
                " outside the model's folder",
                hint="copy the data file next to the model",
            )
        self.entries.append(os.path.join(os.path.realpath(os.path.dirname(entry)), os.path.basename(entry)))
        if real_path not in self._by_real_path:
            self._by_real_path[real_path] = self._map(real_path, tensor_name)
        return self._by_real_path[real_path]

    def _find(self, location: str, tensor_name: str) -> str:
        what = f"tensor `{tensor_name}` of `{self._model_path}`"
        if not location or os.path.isabs(location) or ".." in location.replace("\\", "/").split("/"):
            raise ModelError(
                f"{what} has its data in `{location}`, which is not a path inside the model's folder",
                hint="save the model again with its data file next to it",
            )
        for folder in self._folders:
            entry = os.path.join(folder, location)
            if os.path.lexists(entry):
                return entry
        raise ModelError(
            f"{what} has its data in `{location}`, and `{self._folders[0]}` holds no such file",
            hint="put the data file next to the model; it belongs to the download or export",
        )

    def _map(self, path: str, tensor_name: str) -> MappedFile:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ModelError(
                    f"the data of tensor `{tensor_name}` at `{path}` is not a regular file",
                    hint="put the data file next to the model",
                )
            return MappedFile(path, pinned=len(self._by_real_path) < MAX_PINNED_FILES)
        except OSError as error:
            raise ModelError(
                f"cannot open the data of tensor `{tensor_name}` at `{path}`: {error.strerror or error}",
                hint=_open_hint(error),
            ) from error


def _open_hint(error: OSError) -> str:
    return "ask for permission to read it" if isinstance(error, PermissionError) else "check the path"
