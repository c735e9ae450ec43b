"""What the exporter of PyTorch spells out, and what `simplify` leaves of it, on several kinds of networks.

    python benchmarks/torch_import.py

It prints a table: nodes as exported and simplified, how far the result is from the module, and seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt import walk

ROOT = Path(__file__).resolve().parent.parent
BATCH, TOKENS, WORDS, WIDTH = 2, 16, 100, 64


class Block(nn.Module):
    """A block of a ResNet (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if stride > 1:
            self.shortcut: nn.Module = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18, a quarter as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        sizes = (
            (16, 16, 1),
            (16, 16, 1),
            (16, 32, 2),
            (32, 32, 1),
            (32, 64, 2),
            (64, 64, 1),
            (64, 128, 2),
            (128, 128, 1),
        )
        self.layers = nn.Sequential(*(Block(*size) for size in sizes))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.pool(self.layers(self.stem(image))).flatten(1))


class Bert(nn.Module):
    """An encoder of four of torch's own transformer layers, with a mask and a pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(128, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)))
        x = self.encoder(x, src_key_padding_mask=mask == 0)
        return x, self.pooler(x[:, 0]).tanh()


class Recurrent(nn.Module):
    """Two layers of LSTM in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.rnn = nn.LSTM(32, 48, 2, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(96, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.rnn(self.words(ids))[0][:, -1])


def networks() -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]]:
    """Return each network, its example inputs and its free axes."""
    sys.path.insert(0, str(ROOT / "models"))
    from pylm import PyLM

    ids, free = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS), {0: "batch", 1: "tokens"}
    image = torch.randn(BATCH, 3, 64, 64)
    return {
        "ResNet-18": (ResNet18(), (image,), {"image": {0: "batch"}}),
        "BERT, 4 layers": (Bert(), (ids, torch.ones_like(ids)), {"ids": free, "mask": free}),
        "Llama, 6 layers (`models/pylm.py`)": (PyLM(), (ids,), {"ids": free}),
        "LSTM, 2 layers, both directions": (Recurrent(), (ids,), {"ids": {0: "batch"}}),
    }


def measure(
    module: nn.Module, inputs: tuple[Tensor, ...], free: dict[str, Any]
) -> tuple[int, int, float, float, float]:
    """Return nodes exported and simplified, the largest error, and seconds to import and to simplify."""
    begin = time.perf_counter()
    model = graphopt.from_torch(module, inputs, dynamic_shapes=free)
    imported = time.perf_counter()
    result = graphopt.optimize(model, "simplify", timed=False)
    simplified = time.perf_counter()
    with torch.no_grad():
        wanted = module(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        graphopt.save(result.model, path)
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        found = session.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})
    error = max(float(abs(a.numpy() - b).max()) for a, b in zip(wanted, found, strict=True))
    before, after = (sum(1 for _ in walk.every_node(one)) for one in (model, result.model))
    return before, after, error, imported - begin, simplified - imported


def main() -> None:
    """Measure every network and print the table."""
    torch.manual_seed(0)
    print("| network | nodes as exported | simplified | largest error | import | simplify |\n|---|---|---|---|---|---|")
    for name, (module, inputs, free) in networks().items():
        before, after, error, imported, simplified = measure(module.eval(), inputs, free)
        print(f"| {name} | {before} | {after} | {error:.0e} | {imported:.1f} s | {simplified:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
