"""Protobuf at wire level: reach every tensor of a model without parsing or copying its bytes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5

# Field numbers that lead from a ModelProto to its tensors, per message kind. `tensor` is where a rewrite happens.
CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}

RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14

# Location of a tensor that is held elsewhere in this process. No file can have this name: it contains a NUL.
HELD_ELSEWHERE = "\0graphopt"

_MAX_VARINT_BITS = 64


class WireError(ValueError):
    """Bytes that are not protobuf, or that stop in the middle of a field."""


@dataclass(frozen=True, slots=True)
class Hole:
    """A stretch of output that is filled later: `length` bytes of the tensor numbered `index`."""

    index: int
    length: int


Buffer = bytes | mmap.mmap
Piece = bytes | Hole
Edit = Callable[[int, int], list[Piece] | None]
"""From the byte range of a TensorProto to its new content, or None to keep it."""


def fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (number, wire type, start of the tag, start of the value, end of the value) of each field of a message."""
    position = start
    while position < end:
        tag_start = position
        tag, position = _varint(data, position, end)
        wire_type = tag & 7
        if wire_type == LENGTH_DELIMITED:
            length, position = _varint(data, position, end)
            stop = position + length
        elif wire_type == VARINT:
            stop = _varint(data, position, end)[1]
        elif wire_type == FIXED64:
            stop = position + 8
        elif wire_type == FIXED32:
            stop = position + 4
        else:
            raise WireError(f"byte {tag_start} is no protobuf field")
        if stop > end:
            raise WireError(f"the field at byte {tag_start} needs {stop - end} bytes more than there are")
        yield tag >> 3, wire_type, tag_start, position, stop
        position = stop


def rewrite(data: Buffer, edit: Edit, skip: Callable[[int, int], bool]) -> list[Piece]:
    """Return the serialised ModelProto in pieces, with the tensors that `edit` changes replaced and lengths corrected.

    Args:
        data: A serialised ModelProto.
        edit: Called with the byte range of each tensor reached.
        skip: Called with the byte range of a message: True where nothing inside needs an edit.
    """
    pieces = _rewrite(data, 0, len(data), "model", edit, skip)
    return _solid([data[:]] if pieces is None else pieces)


def _rewrite(
    data: Buffer, start: int, end: int, kind: str, edit: Edit, skip: Callable[[int, int], bool]
) -> list[Piece] | None:
    children = CHILDREN[kind]
    pieces: list[Piece] = []
    copied = start
    for number, wire_type, tag_start, body, stop in fields(data, start, end):
        child = children.get(number)
        if child is None or wire_type != LENGTH_DELIMITED or skip(body, stop):
            continue
        inner = edit(body, stop) if child == "tensor" else _rewrite(data, body, stop, child, edit, skip)
        if inner is None:
            continue
        pieces.append(data[copied:tag_start])
        pieces.append(length_delimited(number, size_of(inner)))
        pieces.extend(inner)
        copied = stop
    if not pieces:
        return None
    pieces.append(data[copied:end])
    return pieces


def _solid(pieces: list[Piece]) -> list[Piece]:
    """Join neighbouring bytes, so that only holes separate the pieces."""
    solid: list[Piece] = []
    run: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, Hole):
            solid += [b"".join(run), piece]
            run = []
        else:
            run.append(piece)
    solid.append(b"".join(run))
    return solid


def size_of(pieces: list[Piece]) -> int:
    """Return the number of bytes the pieces stand for."""
    return sum(piece.length if isinstance(piece, Hole) else len(piece) for piece in pieces)


def length_delimited(number: int, length: int) -> bytes:
    """Return the tag and length that open a length-delimited field."""
    return _varint_bytes(number << 3 | LENGTH_DELIMITED) + _varint_bytes(length)


def raw_data_range(data: Buffer, start: int, end: int) -> tuple[int, int, int] | None:
    """Return where the only raw_data of a TensorProto lies (tag, value, end), None if there is anything unusual."""
    found: tuple[int, int, int] | None = None
    for number, wire_type, tag_start, body, stop in fields(data, start, end):
        if number == RAW_DATA and wire_type == LENGTH_DELIMITED:
            if found is not None:
                return None
            found = tag_start, body, stop
        elif number == EXTERNAL_DATA or (number == DATA_LOCATION and data[body] != onnx.TensorProto.DEFAULT):
            return None
    return found


def held_elsewhere(offset: int, length: int) -> bytes:
    """Return the TensorProto fields that say: these bytes are held elsewhere in this process."""
    proto = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", HELD_ELSEWHERE), ("offset", str(offset)), ("length", str(length))):
        proto.external_data.add(key=key, value=value)
    return bytes(proto.SerializeToString())


def strip_payloads(data: Buffer, threshold: int) -> bytes:
    """Return the ModelProto with each raw_data of at least `threshold` bytes replaced by its offset and length."""

    def strip(start: int, end: int) -> list[Piece] | None:
        found = raw_data_range(data, start, end)
        if found is None or found[2] - found[1] < threshold:
            return None
        tag_start, body, stop = found
        if isinstance(data, mmap.mmap) and hasattr(data, "madvise"):
            # One byte read brings in up to 2 MB around it, at every tensor of the file.
            data.madvise(mmap.MADV_DONTNEED)
        return [data[start:tag_start], data[stop:end], held_elsewhere(body, stop - body)]

    pieces = rewrite(data, strip, lambda start, end: end - start < threshold)
    return b"".join(piece for piece in pieces if not isinstance(piece, Hole))


def open_holes(header: bytes) -> list[Piece]:
    """Return the ModelProto in pieces, with a hole as raw_data for each tensor held elsewhere."""
    mark = HELD_ELSEWHERE.encode()

    def splice(start: int, end: int) -> list[Piece] | None:
        proto = onnx.TensorProto.FromString(header[start:end])
        reference = {entry.key: entry.value for entry in proto.external_data}
        if reference.get("location") != HELD_ELSEWHERE:
            return None
        proto.ClearField("external_data")
        proto.ClearField("data_location")
        hole = Hole(index=int(reference["offset"]), length=int(reference["length"]))
        return [proto.SerializeToString(), length_delimited(RAW_DATA, hole.length), hole]

    return rewrite(header, splice, lambda start, end: header.find(mark, start, end) < 0)


def _varint(data: Buffer, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > _MAX_VARINT_BITS:
            raise WireError(f"byte {position} is no protobuf number")
    raise WireError(f"a field is cut off at byte {end}")


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
