"""Load and save models: weights stay on disk, files are replaced whole or not at all, nothing is lost unsaid."""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from graphopt.data_files import DataFiles, foreign_format, open_model_file
from graphopt.derived import DerivedTensor
from graphopt.errors import ModelError
from graphopt.fidelity import first_loss, unknown_field
from graphopt.header import each_tensor, from_proto, graphs, reference, replace_tensors, to_proto
from graphopt.mapped import COPY_CHUNK, MappedFile, MappedTensor
from graphopt.normal_form import normalize
from graphopt.sparse import SparselyStored, make_dense, put_sparse
from graphopt.staged_files import StagedFiles
from graphopt.wire import HELD_ELSEWHERE, Hole, Piece, WireError, open_holes, size_of, strip_payloads

PAYLOAD_THRESHOLD = 1024
"""Bytes from which a tensor stays in its file; below, a reference is hardly smaller than the tensor."""

EXTERNAL_THRESHOLD = 10**9
"""Tensor bytes from which a model is saved with a data file: 1 GB, well below the 2 GB one file can hold."""

PROTOBUF_LIMIT = (1 << 31) - 1
GZIP_LIMIT = 256 << 20

DATA_ALIGNMENT = 64
"""A cache line, and the widest vector load."""

PAGE_ALIGNMENT, PAGE_ALIGNED_FROM = 4096, 1 << 20
"""ONNX Runtime maps large tensors that begin on a page."""

MEMORY_LOCATION = "graphopt-memory"
_SOURCE = "graphopt.source"
_GZIP_LEVEL = 1

_WRITE_HINTS = {
    errno.ENOSPC: "free some space, or save to another disk",
    errno.EDQUOT: "free some space, or save to another disk",
    errno.EFBIG: "raise the limit on file sizes, see `ulimit -f`",
    errno.EACCES: "save to a folder you may write to",
    errno.EPERM: "save to a folder you may write to",
    errno.EROFS: "save to a folder you may write to",
}


@dataclass(frozen=True)
class Source:
    """Where a model was loaded from.

    Attributes:
        path: The model file, absolute.
        data_files: The data files it refers to, absolute; empty when all tensors are in the model file.
    """

    path: str
    data_files: tuple[str, ...]


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load an ONNX model and leave its weights on disk.

    Tensors of 1 KiB or more become `MappedTensor`s on one mapping per file; the rest is parsed.

    Args:
        path: A binary .onnx file; its external data, if any, must lie in the same folder.

    Raises:
        ModelError: The file cannot be read, or holds something that would be lost when it is saved again.
    """
    try:
        return _load(os.fspath(path))
    except ModelError as error:
        # Names come from the file: none may break the line, or pass control characters to a terminal.
        printable = "".join(one if one.isprintable() else repr(one)[1:-1] for one in error.message)
        raise ModelError(printable, hint=error.hint) from error


def source(model: ir.Model) -> Source | None:
    """Return where a model, or the model it was cloned from, was loaded from."""
    found = model.graph.meta.get(_SOURCE)
    return found if isinstance(found, Source) else None


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None) -> list[Path]:
    """Write a model, and its data file if it has one, whole or not at all.

    Bytes go straight from the files they lie in to the new one; tensors made in memory are written one at a time. The
    model is left as it is, and may be saved over the file it was loaded from.

    Args:
        model: The model to write.
        path: The .onnx file to write. A link is replaced, not followed.
        external: True to put tensors of 1 KiB or more into a data file, the path with `.data` appended; False for one
            file; None for a data file if the model was loaded with one or holds more than 1 GiB.

    Returns:
        The files written.

    Raises:
        ModelError: The files cannot be written. What was there before is untouched.
    """
    target = Path(path)
    if external is None:
        external = _wants_data_file(model)
    staged = StagedFiles()
    try:
        check_target(model, target, external=external)
        if external:
            data = _data_file(target)
            _External.of(model, data.name).write(target, data, staged)
        else:
            _Inline.of(model).write(target, staged)
        return staged.publish()
    except OSError as error:
        hint = _WRITE_HINTS.get(error.errno or 0, "check the path and the disk")
        raise ModelError(f"cannot write `{target}`: {error.strerror or error}", hint=hint) from error
    finally:
        staged.discard()


def saved_bytes(model: ir.Model) -> int:
    """Return how many bytes `save` would write for a model, without writing it."""
    if _wants_data_file(model):
        plan = _External.of(model, "model.onnx.data")
        return len(plan.header) + plan.data_bytes
    return size_of(_Inline.of(model).pieces)


def check_target(model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Check, before any work, that a model may be saved where it is wanted.

    Raises:
        ModelError: The folder is missing, or a file in the way is none to replace.
    """
    target = Path(path)
    if external is None:
        external = _wants_data_file(model)
    written = [target, _data_file(target)] if external else [target]
    if not target.parent.is_dir():
        raise ModelError(f"cannot write `{target}`: there is no folder `{target.parent}`", hint="create it first")
    origin = source(model)
    folder = os.path.realpath(target.parent)
    for path in written:
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise ModelError(f"cannot write `{path}`: it exists and is not a regular file", hint="give another name")
        if path.exists() and not os.access(path, os.W_OK):
            raise ModelError(f"cannot write `{path}`: it is write-protected", hint="give another name")
        if origin is None or os.path.join(folder, path.name) not in origin.data_files:
            continue
        if os.path.realpath(origin.path) != os.path.realpath(target):
            raise ModelError(
                f"cannot write `{path}`: `{origin.path}` keeps its tensors there", hint="give another name"
            )


def serialize(model: ir.Model, *, inline_limit: int = PAYLOAD_THRESHOLD) -> tuple[bytes, dict[str, ir.TensorProtocol]]:
    """Return the model as bytes for a runtime in this process, and the large initializers beside it.

    Initializers of the main graph above the limit are marked external, for a runtime to be given by name. Those of
    fewer than 8 bits stay inline: numpy has no packed form of them that a runtime could use without a copy.

    Args:
        model: The model to serialise; it is left as it is.
        inline_limit: Bytes up to which an initializer stays inline.

    Raises:
        ModelError: What stays inline is more than protobuf can hold.
    """
    beside: dict[str, ir.TensorProtocol] = {}

    def hold(tensor: ir.TensorProtocol, name: str, is_main: bool) -> ir.ExternalTensor | None:
        if not is_main or not _has_payload(tensor) or tensor.dtype.bitwidth < 8 or tensor.nbytes <= inline_limit:
            return None
        beside[name] = tensor
        return reference(tensor, name, MEMORY_LOCATION, 0)

    return _to_bytes(to_proto(model, hold)), beside


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Return the size on disk of a model file and of the data files it refers to, in bytes."""
    return sum(os.path.getsize(name) for name in _files_of(path))


def gzip_bytes(path: str | os.PathLike[str]) -> int | None:
    """Return what a model and its data files take when compressed, None above 256 MiB, where it would take too long.

    Level 1 is used: for weights it is a few per cent larger than level 6 and several times faster.
    """
    names = _files_of(path)
    if sum(os.path.getsize(name) for name in names) > GZIP_LIMIT:
        return None
    compressor = zlib.compressobj(_GZIP_LEVEL)
    size = 0
    for name in names:
        with open(name, "rb") as file:
            while chunk := file.read(COPY_CHUNK):
                size += len(compressor.compress(chunk))
    return size + len(compressor.flush())


# Loading


def _load(path: str) -> ir.Model:
    file = open_model_file(path)
    proto = _parse(file, path)
    make_dense(proto, path)
    model = from_proto(proto, path)
    _refuse_doubled_inputs(model, path)
    data_files = DataFiles(path)
    replace_tensors(model, lambda tensor: _mapped(tensor, file, data_files))
    model.graph.meta[_SOURCE] = Source(os.path.abspath(path), tuple(data_files.entries))
    try:
        again = to_proto(model, lambda tensor, name, _: _reference_if_mapped(tensor, name))
    except ModelError as error:
        raise ModelError(f"`{path}`: {error.message}", hint=error.hint) from error
    loss = first_loss(proto, again)
    if loss is not None:
        raise ModelError(f"`{path}` holds what graphopt would lose: {loss}", hint=_loss_hint(loss))
    normalize(model)
    return model


def _parse(file: MappedFile, path: str) -> onnx.ModelProto:
    data = file.mapping()
    head = data[:256]
    try:
        header = strip_payloads(data, PAYLOAD_THRESHOLD)
        proto = onnx.ModelProto.FromString(header)
    except (WireError, DecodeError) as error:
        damaged = f"damaged or cut short: {error}", "get the file again"
        what, hint = foreign_format(head) or _single_tensor(file) or damaged
        raise ModelError(f"`{path}` is {what}", hint=hint) from error
    if not proto.HasField("graph"):
        graphless = "a model without a graph", "export the model again"
        what, hint = foreign_format(head) or _single_tensor(file) or graphless
        raise ModelError(f"`{path}` is {what}", hint=hint)
    size = proto.ByteSize()
    proto.DiscardUnknownFields()
    if proto.ByteSize() != size:
        place = unknown_field(onnx.ModelProto.FromString(header))
        raise ModelError(
            f"`{path}` holds what onnx {onnx.__version__} does not know: {place}",
            hint="upgrade onnx, or export for an earlier IR version",
        )
    return proto


def _single_tensor(file: MappedFile) -> tuple[str, str] | None:
    if file.size > EXTERNAL_THRESHOLD:
        return None
    with contextlib.suppress(DecodeError):
        tensor = onnx.TensorProto.FromString(file.mapping()[:])
        if tensor.data_type and unknown_field(tensor) is None:
            return f"a single tensor, `{tensor.name}`, not a model", "give the model's .onnx file"
    return None


def _mapped(tensor: ir.TensorProtocol, file: MappedFile, data_files: DataFiles) -> ir.TensorProtocol:
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        _check_raw_size(tensor)
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    location = os.fsdecode(tensor.location)
    return MappedTensor(
        file if location == HELD_ELSEWHERE else data_files.open(location, tensor.name),
        tensor.offset or 0,
        tensor.nbytes if tensor.length is None else tensor.length,
        tensor.dtype,
        tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _check_raw_size(tensor: ir.serde.TensorProtoTensor) -> None:
    try:
        needed = tensor.nbytes
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor `{tensor.name}`: {error}", hint="upgrade onnx_ir, or export again") from error
    if tensor.raw.HasField("raw_data") and len(tensor.raw.raw_data) != needed:
        raise ModelError(
            f"tensor `{tensor.name}` ({tensor.dtype.name}{list(tensor.shape.numpy())}) needs {needed} bytes"
            f" and has {len(tensor.raw.raw_data)}",
            hint="the model is damaged: get the file again",
        )


def _refuse_doubled_inputs(model: ir.Model, path: str) -> None:
    for graph in graphs(model):
        seen: set[str | None] = set()
        for value in graph.inputs:
            if value.name in seen:
                raise ModelError(f"`{path}` has two inputs named `{value.name}`", hint="export the model again")
            seen.add(value.name)


def _reference_if_mapped(tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor | None:
    return reference(tensor, name, HELD_ELSEWHERE, 0) if isinstance(tensor, MappedTensor) else None


def _loss_hint(loss: str) -> str:
    if "training_info" in loss:
        return "export for inference only"
    if "same name" in loss:
        return "export the model again: names must be unique"
    return "report it; until then remove that part from the model"


# Saving


def _data_file(target: Path) -> Path:
    return target.with_name(target.name + ".data")


def _wants_data_file(model: ir.Model) -> bool:
    origin = source(model)
    if origin is not None and origin.data_files:
        return True
    return sum(tensor.nbytes for tensor in each_tensor(model) if _has_payload(tensor)) > EXTERNAL_THRESHOLD


@dataclass
class _Inline:
    """A model as one file: pieces of header, and holes for the tensors that are written into them."""

    pieces: list[Piece]
    held: list[ir.TensorProtocol]

    @classmethod
    def of(cls, model: ir.Model) -> _Inline:
        held: list[ir.TensorProtocol] = []
        sparse: dict[str, SparselyStored] = {}

        def hold(tensor: ir.TensorProtocol, name: str, is_main: bool) -> ir.ExternalTensor | None:
            if is_main and isinstance(tensor, SparselyStored):
                sparse[name] = tensor
                return reference(tensor, name, HELD_ELSEWHERE, 0)
            # A tensor that onnx parsed is in memory already, and is kept in the field it came in.
            if isinstance(tensor, ir.serde.TensorProtoTensor) or not _is_large(tensor):
                return None
            held.append(tensor)
            return reference(tensor, name, HELD_ELSEWHERE, len(held) - 1)

        return cls(open_holes(_to_bytes(put_sparse(to_proto(model, hold), sparse))), held)

    def write(self, target: Path, staged: StagedFiles) -> None:
        if size_of(self.pieces) > PROTOBUF_LIMIT:
            raise ModelError(
                f"cannot write `{target}` as one file: {size_of(self.pieces):,} bytes are more than protobuf's 2 GB",
                hint="save with external data",
            )
        with staged.open(target) as file:
            for piece in self.pieces:
                if isinstance(piece, Hole):
                    _write_tensor(file, self.held[piece.index], piece.length)
                else:
                    file.write(piece)


@dataclass
class _External:
    """A model as a header and a data file: every large tensor at its offset."""

    header: bytes
    placed: list[tuple[ir.TensorProtocol, int]]

    @classmethod
    def of(cls, model: ir.Model, data_name: str) -> _External:
        placed: dict[object, tuple[ir.TensorProtocol, int]] = {}
        sparse: dict[str, SparselyStored] = {}
        end = 0

        def hold(tensor: ir.TensorProtocol, name: str, is_main: bool) -> ir.ExternalTensor | None:
            nonlocal end
            if is_main and isinstance(tensor, SparselyStored):
                sparse[name] = tensor
                return reference(tensor, name, data_name, 0)
            if not _is_large(tensor):
                return None
            key = _identity(tensor)
            if key not in placed:
                alignment = PAGE_ALIGNMENT if tensor.nbytes >= PAGE_ALIGNED_FROM else DATA_ALIGNMENT
                offset = -(-end // alignment) * alignment
                placed[key] = (tensor, offset)
                end = offset + tensor.nbytes
            return reference(tensor, name, data_name, placed[key][1])

        return cls(_to_bytes(put_sparse(to_proto(model, hold), sparse)), list(placed.values()))

    @property
    def data_bytes(self) -> int:
        tensor, offset = self.placed[-1] if self.placed else (None, 0)
        return offset + (tensor.nbytes if tensor is not None else 0)

    def write(self, target: Path, data: Path, staged: StagedFiles) -> None:
        if self.placed:
            with staged.open(data) as file:
                for tensor, offset in self.placed:
                    file.write(b"\0" * (offset - file.tell()))
                    _write_tensor(file, tensor, tensor.nbytes)
        with staged.open(target) as file:
            file.write(self.header)


def _write_tensor(file: BinaryIO, tensor: ir.TensorProtocol, length: int) -> None:
    start = file.tell()
    if isinstance(tensor, MappedTensor | DerivedTensor | ir.ExternalTensor):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    written = file.tell() - start
    if written != length:
        raise ModelError(
            f"tensor `{tensor.name}` gave {written} bytes and its type and shape say {length}",
            hint="the pass that made it is wrong: its array must have the tensor's dtype and shape",
        )


def _identity(tensor: ir.TensorProtocol) -> object:
    """Return what two tensors share if one copy of their bytes is enough."""
    if isinstance(tensor, MappedTensor):
        return tensor.file.path, tensor.offset, tensor.length
    return id(tensor)


def _has_payload(tensor: ir.TensorProtocol) -> bool:
    # Strings have no raw form: they stay in fields of their own.
    return tensor.dtype != ir.DataType.STRING


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return _has_payload(tensor) and tensor.nbytes >= PAYLOAD_THRESHOLD


def _to_bytes(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (EncodeError, ValueError) as error:
        raise ModelError(
            "the model is more than protobuf's 2 GB without its external tensors", hint="save with external data"
        ) from error


def _files_of(path: str | os.PathLike[str]) -> list[str]:
    origin = source(load(path))
    assert origin is not None, "load() says where a model came from"
    return [origin.path, *dict.fromkeys(origin.data_files)]
