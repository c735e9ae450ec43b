"""Train the demo network, a small residual CNN on handwritten digits, and export it as PyTorch leaves it.

    python models/digits_cnn.py [--out models]

writes three files: ``digits_cnn.onnx`` (the network, unfused), ``digits.npz`` (samples it never saw) and
``digits_cnn.md`` (its card). It needs the extras ``cpu``, ``torch`` and ``dev``, and about a minute on two
cores. Two runs on one machine write the same bytes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
THREADS = 2  # sums depend on how they are split, so the same bytes need the same number of threads
TRAIN_SAMPLES = 1000
WIDTH = 64
EPOCHS = 60
BATCH = 50
WEIGHT_DECAY = 0.1
L1 = 0.005  # makes many weights small, so that pruning them costs little

CARD = """\
# digits_cnn

A small residual CNN that reads handwritten digits: the network of graphopt's demo. It is exported unfused, with every
BatchNorm and every constant the exporter spells out still in place.

| | |
|---|---|
| Model | `digits_cnn.onnx`, opset {opset}, {model_kb:.0f} kB, {weights:,} weights |
| Nodes | {nodes}: {operators} |
| Input | `image`, float32 [batch, 1, 8, 8], pixels scaled from 0..16 to 0..1 |
| Output | `logits`, float32 [batch, 10] |
| Data | `digits.npz`, {data_kb:.0f} kB: `image` float32 [{samples}, 1, 8, 8] and `labels` int64 [{samples}] |
| Accuracy | {accuracy:.2%} ({correct} of {samples}), ONNX Runtime on the CPU over all of `digits.npz` |
| Small weights | {small:.0%}, BatchNorm folded in: at most 1/1000 of the largest in their layer |

## Architecture

    image [1, 8, 8]
    stem        Conv 3x3, BatchNorm, ReLU
    residual    Conv 3x3, BatchNorm, ReLU, Conv 3x3, BatchNorm, Add, ReLU
    separable   depthwise Conv 3x3, BatchNorm, ReLU, Conv 1x1, BatchNorm, Add, ReLU
    head        global average pool, Linear
    logits [10]

Every convolution makes {width} channels at stride 1 and has no bias, because a BatchNorm follows. The other nodes are
the exporter's: it spells each missing bias as a chain of nodes that builds zeros (Shape, Constant, Expand, CastLike),
and the flattening before the Linear layer as arithmetic on the batch size (Shape, Squeeze, Reshape, Concat).

## How it was made

    python models/digits_cnn.py

in an environment made with `pip install -e ".[cpu,torch,dev]"`, in about a minute on two cores. It trains on
{train:,} of the {total:,} samples for {epochs} epochs (AdamW, one cycle of the learning rate, label smoothing, small
random affine changes of the images, weight decay {decay}, an L1 penalty of {l1}) from a fixed seed and keeps the
weights of the last epoch. The other {samples} samples, shuffled and with every class in its share, are `digits.npz`;
they took no part in training. Both parts hold digits by the same writers, so the accuracy says nothing about new
writers.

The L1 penalty is there for the demo's sake: it makes the network tolerate magnitude pruning without retraining. It is
taken on the weights with BatchNorm folded in, as the mean over a layer's outputs of the sum of magnitudes. A network
trained without it, with weight decay 0.01 for 40 epochs, lost about 15 points when half of each layer was pruned, so
what pruning costs here says little about a network that nobody trained for it. The penalty, the decay and the epochs
were chosen on splits of the training samples alone.

The export is `torch.onnx.export(..., dynamo=True, optimize=False)` of PyTorch {torch}. With the default,
`optimize=True`, the exporter folds the zero biases and the BatchNorms itself, so a gain measured against this file
includes what that clean-up gives. Of the exporter's notes on each node only the scope names are kept.

## Licences

- Weights and card: Apache-2.0, like graphopt.
- Data: *Optical Recognition of Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
  <https://doi.org/10.24432/C50P49>, CC BY 4.0. Its test part comes with scikit-learn (BSD-3-Clause) as `load_digits`;
  the changes are the scaling, the order and the choice of samples.
"""


def conv_bn(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the image size, and the BatchNorm that stands in for its bias."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    """Two convolutions with a ReLU between them, added to what came in."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class DigitsCNN(nn.Module):
    """A stem, a residual block, a depthwise-separable residual block, global pooling and a linear layer."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = conv_bn(1, width)
        self.residual = Residual(conv_bn(width, width), conv_bn(width, width))
        self.separable = Residual(conv_bn(width, width, groups=width), conv_bn(width, width, kernel=1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        x = self.separable(self.residual(x))
        return self.classifier(self.pool(x).flatten(1))


def load_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images, held-out images, training labels and held-out labels, shuffled, every class its share."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    return train_test_split(images, labels, train_size=TRAIN_SAMPLES, stratify=labels, random_state=SEED)


def jitter(images: Tensor) -> Tensor:
    """Return the images, each shifted, turned and stretched a little at random."""
    affine = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(affine, list(images.shape), align_corners=False), align_corners=False)


def folded_weights(model: DigitsCNN) -> list[Tensor]:
    """Return the weights of every layer as they are once its BatchNorm is folded into it."""
    weights = [model.classifier.weight]
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            conv, norm = module
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weights.append(conv.weight * scale[:, None, None, None])
    return weights


def l1_norm(model: DigitsCNN) -> Tensor:
    """Return the sum over the layers of the mean magnitude sum of one output's weights, BatchNorm folded in."""
    return sum(weight.abs().sum() / len(weight) for weight in folded_weights(model))


def small_share(model: DigitsCNN) -> float:
    """Return the share of weights that are at most 1/1000 of the largest in their layer, BatchNorm folded in."""
    magnitudes = [weight.detach().abs() for weight in folded_weights(model)]
    small = sum(int((values <= values.max() / 1000).sum()) for values in magnitudes)
    return small / sum(values.numel() for values in magnitudes)


def train(images: Tensor, labels: Tensor) -> DigitsCNN:
    """Return a network trained from scratch for a fixed number of epochs, in inference mode."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    model = DigitsCNN()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(jitter(images[rows])), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            (loss + L1 * l1_norm(model)).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: DigitsCNN, path: Path) -> None:
    """Write the network as the exporter leaves it, less its notes on the nodes, which name files of this machine."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        opset_version=20,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    for node in program.model.graph:
        for key in set(node.metadata_props) - {"pkg.torch.onnx.name_scopes"}:
            del node.metadata_props[key]
    program.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)


def card(model: Path, data: Path, small: float) -> str:
    """Return the card of the two files, its numbers measured on them, `small` the share of small weights."""
    proto = onnx.load(model)
    operators = Counter(node.op_type for node in proto.graph.node)
    samples = np.load(data)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": samples["image"]})
    right = logits.argmax(axis=1) == samples["labels"]
    return CARD.format(
        opset=proto.opset_import[0].version,
        model_kb=model.stat().st_size / 1000,
        data_kb=data.stat().st_size / 1000,
        weights=sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer),
        nodes=operators.total(),
        operators=", ".join(f"{count} {name}" for name, count in sorted(operators.items())),
        accuracy=right.mean(),
        correct=right.sum(),
        samples=len(right),
        train=TRAIN_SAMPLES,
        total=TRAIN_SAMPLES + len(right),
        width=WIDTH,
        epochs=EPOCHS,
        decay=WEIGHT_DECAY,
        l1=L1,
        small=small,
        torch=torch.__version__.partition("+")[0],
    )


def main() -> None:
    """Train, export, measure and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    train_images, images, train_labels, labels = load_split()
    model = train(torch.from_numpy(train_images), torch.from_numpy(train_labels))
    export(model, out / "digits_cnn.onnx")
    np.savez_compressed(out / "digits.npz", image=images, labels=labels)
    text = card(out / "digits_cnn.onnx", out / "digits.npz", small_share(model))
    (out / "digits_cnn.md").write_text(text, encoding="utf-8")
    for name in ("digits_cnn.onnx", "digits.npz", "digits_cnn.md"):
        print(out / name)


if __name__ == "__main__":
    main()
