"""The seven models that exact simplifiers are compared on, exported from PyTorch with random weights of a fixed seed.

    python benchmarks/simplify_models.py FOLDER [--tiny] [--only NAME ...]

`ts` models come from the TorchScript exporter, which keeps BatchNormalization and folds no constants here, and have a
dynamic batch (and sequence); `dynamo` models from torch.export without optimization, with static shapes, because that
is what torch.export makes of a model unless it is told more. Attention is written out ("eager"), no cache is kept, and
Llama shares each key head among four query heads. `--tiny` makes the same architectures with two layers and a hidden
size of 64. Needs torch and transformers; nothing is downloaded.

Settings that come nearest to the sizes and node counts that `RESULTS.md` shows of the originals: TorchScript at opset
17 with `do_constant_folding=False`, so that every repeated parameter comes through an Identity; token ids as the only
input. Weights that PyTorch starts as all zeros or all ones (biases, scales, running statistics) are made random after
the export, because a fold that forgets to add zero, or to multiply by one, would go unseen.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from torch import nn

SEED = 0
TORCHSCRIPT_OPSET = 17
TOKENS, IMAGE = 128, 224
TINY_TOKENS, TINY_IMAGE = 16, 32


class Bottleneck(nn.Module):
    """Three convolutions with a shortcut around them, as in ResNet-50."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(channels, width, 1)
        self.second = convolution(width, width, 3, stride)
        self.third = convolution(width, width * 4, 1)
        self.relu = nn.ReLU(inplace=True)
        fits = stride == 1 and channels == width * 4
        self.shortcut = nn.Sequential() if fits else convolution(channels, width * 4, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, 4 width, height / stride, width / stride]."""
        y = self.third(self.relu(self.second(self.relu(self.first(x)))))
        out: torch.Tensor = self.relu(y + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """ResNet-50, or one like it of another depth and width."""

    def __init__(self, depths: Sequence[int], width: int) -> None:
        super().__init__()
        pooling = nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(convolution(3, width, 7, 2), nn.ReLU(inplace=True), pooling)
        blocks, channels = [], width
        for stage, depth in enumerate(depths):
            for place in range(depth):
                blocks.append(Bottleneck(channels, width * 2**stage, 2 if stage and not place else 1))
                channels = width * 2**stage * 4
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, [batch, 1000]."""
        logits: torch.Tensor = self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))
        return logits


def convolution(channels: int, out: int, side: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution and its batch normalization."""
    conv = nn.Conv2d(channels, out, side, stride, side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class FirstOutput(nn.Module):
    """A transformers model as a function of one tensor."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first output: hidden states or logits."""
        out: torch.Tensor = self.model(**{self.argument: x})[0]
        return out


def resnet50(tiny: bool) -> nn.Module:
    """Return ResNet-50, 25.6 M parameters."""
    return ResNet((1, 1) if tiny else (3, 4, 6, 3), 16 if tiny else 64)


def bert_base(tiny: bool) -> nn.Module:
    """Return BERT base without its pooler, 108.9 M parameters."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.BertConfig(attn_implementation="eager", **(sizes | {"vocab_size": 500} if tiny else {}))
    return FirstOutput(transformers.BertModel(config, add_pooling_layer=False), "input_ids")


def gpt2(tiny: bool) -> nn.Module:
    """Return GPT-2 small with its language-model head, tied to the embedding, 124.4 M parameters."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500}
    config = transformers.GPT2Config(use_cache=False, attn_implementation="eager", **(sizes if tiny else {}))
    return FirstOutput(transformers.GPT2LMHeadModel(config), "input_ids")


def vit_base(tiny: bool) -> nn.Module:
    """Return ViT base with patches of 16 and two classes, 85.8 M parameters."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(
        attn_implementation="eager", **(sizes | {"image_size": TINY_IMAGE, "patch_size": 8} if tiny else {})
    )
    return FirstOutput(transformers.ViTForImageClassification(config), "pixel_values")


def llama_300m(tiny: bool) -> nn.Module:
    """Return a Llama of 24 layers with grouped-query attention and a head of its own, 299 M parameters."""
    config = transformers.LlamaConfig(
        vocab_size=500 if tiny else 32000,
        hidden_size=64 if tiny else 1024,
        intermediate_size=176 if tiny else 2304,
        num_hidden_layers=2 if tiny else 24,
        num_attention_heads=4 if tiny else 16,
        num_key_value_heads=1 if tiny else 4,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="eager",
    )
    return FirstOutput(transformers.LlamaForCausalLM(config), "input_ids")


@dataclass(frozen=True)
class Export:
    """One model file: what it is made of and by which exporter."""

    module: Callable[[bool], nn.Module]
    torchscript: bool
    image: bool

    def example(self, tiny: bool) -> torch.Tensor:
        """Return an input: images [1, 3, height, width] or token ids [1, tokens]."""
        if self.image:
            side = TINY_IMAGE if tiny else IMAGE
            return torch.randn(1, 3, side, side)
        return torch.randint(0, 500, (1, TINY_TOKENS if tiny else TOKENS))


EXPORTS = {
    "resnet50_ts": Export(resnet50, torchscript=True, image=True),
    "resnet50_dynamo": Export(resnet50, torchscript=False, image=True),
    "bert_base_ts": Export(bert_base, torchscript=True, image=False),
    "bert_base_dynamo": Export(bert_base, torchscript=False, image=False),
    "gpt2_dynamo": Export(gpt2, torchscript=False, image=False),
    "vit_base_ts": Export(vit_base, torchscript=True, image=True),
    "llama_300m_dynamo": Export(llama_300m, torchscript=False, image=False),
}


def main() -> None:
    """Export the models into a folder, each in one file with its weights inside, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="two layers, hidden size 64; files are named tiny_…")
    parser.add_argument("--only", nargs="+", choices=EXPORTS, default=list(EXPORTS), metavar="NAME")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| model | MB | nodes | seconds |\n|---|---:|---:|---:|", flush=True)
    for name in options.only:
        start = time.perf_counter()
        path = options.folder / f"{'tiny_' if options.tiny else ''}{name}.onnx"
        nodes = write(EXPORTS[name], options.tiny, path)
        seconds = time.perf_counter() - start
        print(f"| {path.stem} | {path.stat().st_size / 1e6:,.1f} | {nodes:,} | {seconds:.0f} |", flush=True)


def write(export: Export, tiny: bool, path: Path) -> int:
    """Export one model to a file and return how many nodes it has, subgraphs included."""
    torch.manual_seed(SEED)
    module, x = export.module(tiny).eval(), export.example(tiny)
    draft = path.with_suffix(".draft")
    with torch.no_grad():
        (from_torchscript if export.torchscript else from_torch_export)(module, x, draft, export.image)
    model = onnx.load(draft)
    draft.unlink()
    randomize_constants(model.graph)
    onnx.save(model, path)
    return count_nodes(model.graph)


def from_torchscript(module: nn.Module, x: torch.Tensor, path: Path, image: bool) -> None:
    """Export by way of TorchScript."""
    axes = {0: "batch"} if image else {0: "batch", 1: "sequence"}
    torch.onnx.export(
        module,
        (x,),
        str(path),
        dynamo=False,
        opset_version=TORCHSCRIPT_OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,  # otherwise BatchNormalization is folded
        do_constant_folding=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": axes, "y": {0: "batch"}},
    )


def from_torch_export(module: nn.Module, x: torch.Tensor, path: Path, image: bool) -> None:
    """Export by way of torch.export, without optimization."""
    exported = torch.export.export(module, (x,), strict=False)
    program = torch.onnx.export(
        exported, dynamo=True, optimize=False, verbose=False, input_names=["x"], output_names=["y"]
    )
    assert program is not None
    program.save(str(path), external_data=False)


def randomize_constants(graph: onnx.GraphProto) -> None:
    """Replace weights all of whose numbers are 0 by numbers near it, and those that are all 1 by positive ones."""
    random = np.random.default_rng(SEED)
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < 2:
            continue
        array: np.ndarray[Any, Any] = onnx.numpy_helper.to_array(tensor)
        first = array.flat[0]
        if first not in (0, 1) or not (array == first).all():
            continue
        fresh = random.uniform(0.5, 1.5, array.shape) if first else random.normal(0, 0.1, array.shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array(fresh.astype(np.float32), tensor.name))


def count_nodes(graph: onnx.GraphProto) -> int:
    """Return how many nodes a graph has, those of its subgraphs included."""
    inner = (sub for node in graph.node for attribute in node.attribute for sub in (attribute.g, *attribute.graphs))
    return len(graph.node) + sum(count_nodes(sub) for sub in inner if sub.node)


if __name__ == "__main__":
    sys.exit(main())
