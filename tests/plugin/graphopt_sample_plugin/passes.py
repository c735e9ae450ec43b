"""A lossy pass with an option."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt import Context, Guarantee, Pass, opt, walk


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply every float32 weight."""

    factor: float = opt(2.0, help="what to multiply by", low=0)

    name = "sample-scale"
    guarantee = Guarantee.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Scale the initializers."""
        for value in list(walk.initializers(model)):
            tensor = walk.constant_tensor(value)
            if tensor is not None and tensor.dtype is ir.DataType.FLOAT:
                ctx.rewriter.set_weight(value, tensor.numpy() * self.factor)
        ctx.note(f"scaled by {self.factor:g} for `{ctx.target.name}`")
