"""Token ids: which input holds them, which one says what is padding, and whether a model predicts the next one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.generated import index_bound

# Token ids, masks: samples and positions.
_RANK = 2
# What Transformers and TensorFlow call the input that is 1 where there is a token and 0 where there is none.
_MASK = re.compile(r"(attention|input)_mask(:0)?")
# Other integers that a token has: masks, its place, its segment.
_NO_TOKENS = re.compile(r"(.*_)?(mask|position_ids|positions|token_type_ids|segment_ids|type_ids)(:0)?")
# Where one model reads two texts, it is this one's tokens that it predicts; and its mask is called so, too.
_DECODED = "decoder_"
# What decoders hand on from step to step, as exporters call it, and the places of tokens, which encoders count up
# themselves.
_OF_DECODERS = re.compile(r"past.*|present.*|cache.*|position_ids")
_COMPARISONS = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")
# Attributes by which operators hide later positions.
_CAUSAL = ("is_causal", "unidirectional")
# Larger masks are none that anybody stores.
_LARGEST_MASK = 64 << 20
_LOGITS_RANK = 3


def token_feed(feeds: Mapping[str, Array]) -> str | None:
    """Return which of a model's inputs holds token ids, integers of [rows, tokens], by what it is fed; or None."""
    return _first_tokens(n for n, array in feeds.items() if array.dtype.kind in "iu" and array.ndim == _RANK)


def token_input(model: ir.Model) -> ir.Value | None:
    """Return which of a model's inputs holds token ids, integers of [rows, tokens]; or None."""
    fed = {one.name or "": one for one in model.graph.inputs if not one.is_initializer() and _is_of_integers(one)}
    name = _first_tokens(name for name, one in fed.items() if one.shape is not None and len(one.shape) == _RANK)
    return fed[name] if name is not None else None


def _is_of_integers(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _first_tokens(names: Iterable[str]) -> str | None:
    found = [name for name in names if not _NO_TOKENS.fullmatch(name)]
    return next((name for name in found if name.startswith(_DECODED)), next(iter(found), None))


def mask_feed(feeds: Mapping[str, Array], tokens: str = "") -> str | None:
    """Return which of a model's inputs says which tokens of another one are real, by what it is fed; or None."""
    return next((name for name, array in feeds.items() if _is_mask(name, tokens) and array.ndim == _RANK), None)


def mask_of(model: ir.Model, tokens: str = "") -> ir.Value | None:
    """Return the input of a model that says which tokens of another input are real, or None.

    Args:
        model: The model.
        tokens: The other input; where that is not said, what is read first, by an encoder if there is one.
    """
    for value in model.graph.inputs:
        is_mask = _is_mask(value.name or "", tokens) and not value.is_initializer()
        if is_mask and value.shape is not None and len(value.shape) == _RANK:
            return value
    return None


def _is_mask(name: str, tokens: str) -> bool:
    is_of_decoder = name.startswith(_DECODED)
    return is_of_decoder == tokens.startswith(_DECODED) and _MASK.fullmatch(name.removeprefix(_DECODED)) is not None


def predicts_tokens(model: ir.Model) -> bool:
    """Return whether the first output is scores of the next token.

    It is of [rows, tokens, vocabulary], the vocabulary as large as the table that the token ids are looked up in. Of
    several inputs, that could also be an encoder, which is trained to fill gaps: so something must show that no token
    sees those behind it.
    """
    tokens = token_input(model)
    output = model.graph.outputs[0] if model.graph.outputs else None
    if tokens is None or output is None or output.shape is None or len(output.shape) != _LOGITS_RANK:
        return False
    words, (_, places, vocabulary) = index_bound(tokens), output.shape
    if isinstance(vocabulary, int) and vocabulary < words:
        return False  # features of tokens, not scores
    if tokens.shape is not None and places == 1 != tokens.shape[-1]:
        return False  # scores of the last token alone
    alone = sum(not one.is_initializer() for one in model.graph.inputs) == 1
    return alone or (vocabulary == words and _looks_back_only(model))


def _looks_back_only(model: ir.Model) -> bool:
    """Return whether a model shows that it reads from left to right."""
    if any(_OF_DECODERS.fullmatch(one.name or "") for one in (*model.graph.inputs, *model.graph.outputs)):
        return True
    return any(_hides_later(node) for node in walk.every_node(model))


def _hides_later(node: ir.Node) -> bool:
    if node.op_type in ("Trilu", "GroupQueryAttention") or any(node.attributes.get_int(name, 0) for name in _CAUSAL):
        return True
    if walk.is_onnx_op(node, *_COMPARISONS):
        # Places of tokens with one another; those of relative biases are compared with constants.
        return all(one is not None and _may_be_place(one) for one in node.inputs)
    return any(one is not None and _is_triangle(walk.constant_tensor(one)) for one in node.inputs)


def _may_be_place(value: ir.Value) -> bool:
    return walk.constant_tensor(value) is None and (value.dtype is None or _is_of_integers(value))


def _is_triangle(tensor: ir.TensorProtocol | None) -> bool:
    """Return whether a constant is a mask of one number on and below its diagonal, and another one above."""
    if tensor is None or len(tensor.shape) < _RANK or not 0 < tensor.nbytes <= _LARGEST_MASK:
        return False
    height, width = walk.dims(tensor)[-2:]
    if height != width or height < _RANK or tensor.dtype is ir.DataType.STRING:
        return False
    content = tensor.numpy()
    first, last = content.reshape(-1, height, width)[0, [0, -1]]
    # Weights are as square as that, and told apart by two of their rows.
    if first[0] == first[1] or (first[1:] != first[1]).any() or (last != last[0]).any():
        return False
    mask = np.where(np.tri(height, dtype=np.bool_), first[0], first[1])
    return bool((content == mask).all())
