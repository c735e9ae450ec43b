"""What the options of `quant` come to on a target, or why they come to nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from graphopt.errors import PassError, UsageError
from graphopt.ranges import RangeMethod
from graphopt.target import IntegerScheme, Target

from .integer_weights import PER_CHANNEL_OPSET
from .static_formats import first_opset, is_float

Group = Literal["tensor", "channel"] | int
# Sizes a block of weights may have.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
# First opset in which a DequantizeLinear has scales at all, or one for each block.
_FIRST_OPSET, BLOCKED_OPSET = 10, 21


@dataclass(frozen=True)
class StaticPlan:
    """Static quantization, settled.

    Attributes:
        scheme: How the target's kernels take values.
        group: What shares a scale: all of a weight, each output channel, or so many inputs of each.
        method: How activation ranges are read off the data.
    """

    scheme: IntegerScheme
    group: Group
    method: RangeMethod

    @property
    def opset(self) -> int:
        """The first opset that says all of it."""
        formats = max(first_opset(self.scheme.activation), first_opset(self.scheme.weight))
        match self.group:
            case "tensor":
                return max(formats, _FIRST_OPSET)
            case "channel":
                return max(formats, PER_CHANNEL_OPSET)
            case _:
                return max(formats, BLOCKED_OPSET)


def parse_group(text: str | None) -> Group | None:
    """Return what shares a scale, from the option's text.

    Raises:
        UsageError: It is neither ``tensor``, ``channel`` nor a power of two from 16 to 256.
    """
    if text is None or text == "tensor" or text == "channel":
        return text  # type: ignore[return-value]
    text = str(text)  # from Python it may be a number
    if text.isdecimal() and SMALLEST_BLOCK <= int(text) <= LARGEST_BLOCK and int(text).bit_count() == 1:
        return int(text)
    raise UsageError(
        f"pass `quant`: option `group` cannot be `{text}`",
        hint=f"tensor, channel, or a block size that is a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}",
    )


def static_scheme(
    target: Target, activations: str | None, weights: str | None, symmetric: bool | None, group: Group | None
) -> tuple[IntegerScheme, Group]:
    """Return the first scheme of a target that is as asked, and what shares a scale in it.

    Args:
        target: The target.
        activations: Format of activations, or None for any.
        weights: Format of weights, or None for any.
        symmetric: Whether activations are symmetric, or None for either.
        group: What shares a weight scale, or None for what the scheme likes best.

    Raises:
        PassError: The target has no kernels for codes at all.
        UsageError: It has none for these; says which it has.
    """
    schemes = [scheme for scheme in (target.static, *target.alternatives) if scheme is not None]
    if not schemes:
        raise PassError(
            f"pass `quant:mode=static` gains nothing on target `{target.name}`", hint="use `quant:mode=weights`"
        )
    asked = {"activation": activations, "weight": weights, "activation_symmetric": symmetric}
    fitting = [
        scheme
        for scheme in schemes
        if all(value is None or getattr(scheme, name) == value for name, value in asked.items())
    ]
    if not fitting:
        words = {"activations": activations, "weights": weights, "symmetric": symmetric}
        raise _not_there(target, words, schemes)
    if isinstance(group, int):
        fitting = [scheme for scheme in fitting if group in scheme.blocks]
        if not fitting:
            raise UsageError(
                f"pass `quant:mode=static`: the kernels of target `{target.name}` take no weight scales by blocks "
                f"of {group}",
                hint="use `group=channel`, or `quant:mode=weights`, which computes in float",
            )
    scheme = fitting[0]
    return scheme, group or ("channel" if scheme.per_channel else "tensor")


def _not_there(target: Target, words: Mapping[str, object], schemes: Iterable[IntegerScheme]) -> UsageError:
    given = ":".join(f"{name}={str(value).lower()}" for name, value in words.items() if value is not None)
    return UsageError(
        f"pass `quant:mode=static:{given}`: target `{target.name}` has no kernels for it",
        hint=f"it has them for {'; '.join(dict.fromkeys(_spelled(scheme) for scheme in schemes))}",
    )


def _spelled(scheme: IntegerScheme) -> str:
    symmetric = "" if is_float(scheme.activation) else f":symmetric={str(scheme.activation_symmetric).lower()}"
    return f"`activations={scheme.activation}:weights={scheme.weight}{symmetric}`"


def as_opset_allows(plan: StaticPlan, opset: int) -> StaticPlan | None:
    """Return a plan in an older opset: with one scale for each weight if that is all that is too new, else None."""
    if plan.opset <= opset:
        return plan
    coarser = replace(plan, group="tensor")
    return coarser if plan.group == "channel" and coarser.opset <= opset else None


def refuse_words_of_other_modes(mode: str, words: Mapping[str, object]) -> None:
    """Raise an error where an option was given that the mode does not read.

    Args:
        mode: ``static``, ``dynamic`` or ``weights``.
        words: Options of static quantization by name, as given; None or ``auto`` where they were not.

    Raises:
        UsageError: One was given; names it.
    """
    given = [name for name, value in words.items() if value not in (None, "auto")]
    if mode != "static" and given:
        reason = {"dynamic": "takes activations as uint8, by their range in each run", "weights": "leaves activations"}
        raise UsageError(
            f"pass `quant:mode={mode}` {reason[mode]}: it has no use for `{given[0]}`",
            hint=f"leave `{given[0]}` out, or use `quant:mode=static`",
        )
