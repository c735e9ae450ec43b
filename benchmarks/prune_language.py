"""A small Llama in ONNX pruned by the published recipes: plain SparseGPT and Wanda, and llm-compressor's.

The ONNX weights go into `transformers`' module, whose logits are compared with the ONNX file's first, and back into the
file. Plain means as the papers' own code does it: the same sparsity in every layer, block after block, each block's
inputs measured after the blocks before it were pruned, the embedding and the head left alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from quant_peers import Array, Feeds, batches
from torch import Tensor, nn

PATTERN = "2of4"
# Of the papers' code.
BLOCK, DAMPING = 128, 0.01
# The linear layers of a block in the order of the ONNX graph.
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Largest difference of the logits that float32 explains.
TOLERANCE = 1e-3

Tool = Callable[[onnx.ModelProto, Feeds, str], onnx.ModelProto]


class Language:
    """The Llama of an ONNX file as `transformers` has it, and which constant each of its layers came from."""

    def __init__(self, model: onnx.ModelProto, ids: Array) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        products = [
            node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants
        ]
        embedding, cosines = constants["head.weight"], constants["cos"]
        blocks, hidden = len(products) // len(LAYERS), embedding.shape[1]
        self.heads = hidden // (2 * cosines.shape[1])
        config = LlamaConfig(
            vocab_size=len(embedding),
            hidden_size=hidden,
            intermediate_size=constants[products[LAYERS.index("mlp.gate_proj")]].shape[1],
            num_hidden_layers=blocks,
            num_attention_heads=self.heads,
            max_position_embeddings=len(cosines),
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
        self.module = LlamaForCausalLM(config).eval()
        self.sources: dict[str, str] = {}
        with torch.no_grad():
            self.module.model.embed_tokens.weight.copy_(torch.from_numpy(embedding.copy()))
            self.module.model.norm.weight.copy_(torch.from_numpy(constants["nf.weight"].copy()))
            for i, block in enumerate(self.module.model.layers):
                block.input_layernorm.weight.copy_(torch.from_numpy(constants[f"blocks.{i}.n1.weight"].copy()))
                block.post_attention_layernorm.weight.copy_(torch.from_numpy(constants[f"blocks.{i}.n2.weight"].copy()))
                for j, name in enumerate(LAYERS):
                    source = products[i * len(LAYERS) + j]
                    self.sources[f"model.layers.{i}.{name}"] = source
                    weight = self.halves(name, constants[source].T)
                    block.get_submodule(name).weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        self.check(model, ids)

    def halves(self, name: str, weight: Array, *, back: bool = False) -> Array:
        """Return the rows of a query or key in the order of `transformers`: real parts first, or back."""
        if not name.endswith(("q_proj", "k_proj")):
            return weight
        pairs = (self.heads, 2, -1) if back else (self.heads, -1, 2)
        return weight.reshape(*pairs, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    def check(self, model: onnx.ModelProto, ids: Array) -> None:
        """Raise where this is another network than the file."""
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = session.run(None, {session.get_inputs()[0].name: ids})[0]
        with torch.no_grad():
            found = self.module(torch.from_numpy(ids)).logits.numpy()
        if np.abs(found - expected).max() > TOLERANCE:
            raise ValueError(f"the logits differ by {np.abs(found - expected).max():.3g}")

    def write(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Put the weights as they are now into the model."""
        holders = {one.name: one for one in model.graph.initializer}
        for name, source in self.sources.items():
            weight = self.halves(name, self.module.get_submodule(name).weight.detach().numpy(), back=True)
            holders[source].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight.T), source))
        return model


def by_reference(method: str) -> Tool:
    """Return a published recipe, written plainly."""

    def work(model: onnx.ModelProto, feeds: Feeds, setting: str) -> onnx.ModelProto:
        ids = next(iter(feeds.values()))
        language = Language(model, ids[:1])
        solve = sparsegpt if method == "sparsegpt" else wanda
        with torch.no_grad():
            body = language.module.model
            hidden = [body.embed_tokens(torch.from_numpy(next(iter(batch.values())))) for batch in batches(feeds)]
            positions = body.rotary_emb(hidden[0], torch.arange(ids.shape[1])[None])
            for block in body.layers:
                layers = [block.get_submodule(name) for name in LAYERS]
                for layer, moments in zip(layers, second_moments(block, layers, hidden, positions), strict=True):
                    layer.weight.copy_(solve(layer.weight, moments, setting))
                hidden = [block(x, position_embeddings=positions) for x in hidden]
        return language.write(model)

    return work


def second_moments(block: Any, layers: list[nn.Linear], hidden: list[Tensor], positions: Any) -> list[Tensor]:
    """Return the mean of x xᵀ over all tokens for what each layer of a block reads, [inputs, inputs]."""
    sums = [torch.zeros(layer.in_features, layer.in_features) for layer in layers]

    def hook(place: int) -> Any:
        def add(_: nn.Module, reads: tuple[Tensor, ...]) -> None:
            x = reads[0].flatten(0, -2)
            sums[place] += x.T @ x

        return add

    hooks = [layer.register_forward_pre_hook(hook(place)) for place, layer in enumerate(layers)]
    for x in hidden:
        block(x, position_embeddings=positions)
    for one in hooks:
        one.remove()
    return [one / sum(x[..., 0].numel() for x in hidden) for one in sums]


def wanda(weight: Tensor, moments: Tensor, setting: str) -> Tensor:
    """Return weights of which those least in |w|·‖x‖ of each row are zero (Sun et al. 2023, arXiv 2306.11695)."""
    metric = weight.abs() * moments.diag().sqrt()
    width = 4 if setting == PATTERN else weight.shape[1]
    drop = 2 if setting == PATTERN else int(weight.shape[1] * float(setting))
    blocks = metric.reshape(len(weight), -1, width)
    least = torch.argsort(blocks, dim=-1, stable=True)[..., :drop]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, least, True).reshape(weight.shape)
    return weight.masked_fill(mask, 0)


def sparsegpt(weight: Tensor, moments: Tensor, setting: str) -> Tensor:
    """Return weights pruned column by column, the rest making up for it (Frantar & Alistarh, arXiv 2301.00774)."""
    w, h = weight.clone(), 2 * moments
    dead = h.diag() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += DAMPING * h.diag().mean() * torch.eye(len(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        part, local = w[:, start:end].clone(), inverse[start:end, start:end]
        errors = torch.zeros_like(part)
        saliency = part**2 / local.diag() ** 2
        mask = torch.zeros_like(part, dtype=torch.bool)
        if setting != PATTERN:
            threshold = saliency.flatten().sort()[0][int(saliency.numel() * float(setting))]
            mask = saliency <= threshold
        for i in range(end - start):
            if setting == PATTERN and i % 4 == 0:
                now = part[:, i : i + 4] ** 2 / local.diag()[i : i + 4] ** 2
                mask.scatter_(1, i + now.topk(2, dim=1, largest=False)[1], True)
            kept = part[:, i].masked_fill(mask[:, i], 0)
            error = (part[:, i] - kept) / local[i, i]
            part[:, i:] -= error[:, None] * local[i, i:]
            part[:, i] = kept
            errors[:, i] = error
        w[:, start:end] = part
        w[:, end:] -= errors @ inverse[start:end, end:]
    return w


def by_llm_compressor(modifier: str) -> Tool:
    """Return a recipe of llm-compressor with its defaults."""

    def work(model: onnx.ModelProto, feeds: Feeds, setting: str) -> onnx.ModelProto:
        import llmcompressor
        from datasets import Dataset
        from llmcompressor.modifiers import pruning
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        ids = next(iter(feeds.values()))
        language = Language(model, ids[:1])
        pattern = {"sparsity": 0.5, "mask_structure": "2:4"} if setting == PATTERN else {"sparsity": float(setting)}
        recipe = getattr(pruning, modifier)(targets=["Linear"], ignore=["re:.*lm_head"], **pattern)
        samples = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
        # The samples are token ids already, but it insists on a tokenizer.
        unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"": 0}, "")), pad_token="")
        with tempfile.TemporaryDirectory() as folder:  # it reads the configuration again from where the model came from
            language.module.save_pretrained(folder)
            language.module.config._name_or_path = language.module.name_or_path = folder
            llmcompressor.oneshot(
                model=language.module,
                dataset=Dataset.from_dict(samples),
                recipe=recipe,
                processor=unused,
                max_seq_length=ids.shape[1],
                num_calibration_samples=len(ids),
            )
        return language.write(model)

    return work
