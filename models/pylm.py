"""Train a small Llama-style language model on the source of Python's standard library, and export it.

    python models/pylm.py [--out models]

writes ``pylm.onnx`` (the network), ``pylm_tokenizer.json`` (its tokens), ``pylm.npz`` (tokens of modules it never saw),
``pylm_train.npz`` (some of the tokens it was trained on, to train it further), ``pylm_calibration.npz`` (a few of them,
to calibrate with), ``pylm.md`` (its card) and ``pylm_LICENSE.txt`` (the licence of the text). It needs the extras
``cpu`` and ``torch`` and the package ``tokenizers``, and about half an hour of one core. Two runs of one Python on one
machine write the same bytes.
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt

SEED = 0
THREADS = 1  # sums depend on how they are split, so the same bytes need the same number of threads

VOCABULARY = 1024
CONTEXT = 256
WIDTH = 128
LAYERS = 6
HEADS = 4
KV_HEADS = 2
HIDDEN = 384
ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-5
LOWEST_SCORE = -1e9  # of tokens that come later: nothing is left of it behind a softmax

STEPS = 5000
BATCH = 8
RATE = 3e-3
WARM_UP = 200
COOL_DOWN = 0.2  # share of the steps in which the rate falls to nothing
WEIGHT_DECAY = 0.1
CLIP = 1.0
INITIAL_DEVIATION = 0.02

SEPARATOR = "<|module|>"
# Tests and the tables of other encodings and of `pydoc` are not what people write Python for.
LEFT_OUT = ("encodings", "idlelib", "pydoc_data", "site-packages", "test", "tests")
HELD_OUT = (
    "argparse",
    "bisect",
    "calendar",
    "csv",
    "fractions",
    "graphlib",
    "heapq",
    "imaplib",
    "json",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "textwrap",
    "wsgiref",
    "zipfile",
)
HELD_OUT_ROWS = 400  # of `CONTEXT` tokens each, taken evenly over the held-out modules
TRAIN_ROWS = 4800
CALIBRATION_ROWS = 256

OPSET = 21  # the first with codes of 4 bits
SCORED_AT_ONCE = 8  # rows
PROMPT = "def __init__(self, name, value):"
SAMPLE_TOKENS = 48
CARD_COLUMNS = 120

CARD = """\
# pylm

A small Llama-style language model of Python code: the network that graphopt's tests and documents use for all that
concerns language models. It is exported by `graphopt.from_torch` and cleaned up by the preset `simplify`.

| | |
|---|---|
| Model | `pylm.onnx`, opset {opset}, {model_kb:,.0f} kB, {weights:,} weights |
| Nodes | {nodes}: {operators} |
| Input | `ids`, int64 [batch, tokens], token numbers from 0 to {last_token} |
| Output | `logits`, float32 [batch, tokens, {vocabulary}]: of the token behind each |
| Tokens | `pylm_tokenizer.json`: byte-level BPE of {vocabulary}, for `tokenizers`; 0 stands before each module |
| To score by | `pylm.npz`, {data_kb:,.0f} kB: `ids` uint16 [{rows}, {context}], of modules not trained on |
| To train on | `pylm_train.npz`, {train_kb:,.0f} kB: `ids` uint16 [{train_rows}, {context}], of the others |
| To calibrate on | `pylm_calibration.npz`: `ids` uint16 [{calibration_rows}, {context}], of the others too |
| Perplexity | {perplexity:.2f} ({bits:.2f} bits per byte), ONNX Runtime on the CPU over all of `pylm.npz` |
| In training | {train_perplexity:.2f}, over {rows} rows of `pylm_train.npz` |

    graphopt optimize models/pylm.onnx --passes prune,quant --data models/pylm_calibration.npz --eval models/pylm.npz

There are no labels: the target of each token is the next.

## Architecture

    ids [tokens]
    embedding            {vocabulary} x {width}, also the last matrix
    {layers} times
      attention          RMSNorm, {heads} heads of {channels}, {kv_heads} of keys and values, rotary positions, causal
      feed-forward       RMSNorm, SwiGLU of {hidden}
    head                 RMSNorm, the embedding's matrix
    logits [tokens, {vocabulary}]

No layer has a bias. Nodes bear the names of the modules they come from (`layers.3.mlp.up_proj`) and weights those of
the parameters (`layers.3.mlp.up_proj.weight`), stored as a MatMul reads them, [in, out]. Attention is spelled out in
products, a mask and a softmax; the two heads of queries that share one of keys and values are an axis of their own.

## How it was made

    python models/pylm.py

in an environment made with `pip install -e ".[cpu,torch]" tokenizers`, in about half an hour of one core. It trains
on {train_files} files of the standard library of Python {python} ({train_tokens:,} tokens) for {steps:,} steps of
{batch} rows of {context} tokens (AdamW, rate {rate}, level after {warm_up} steps and down to nothing in the last
{cool_down:.0%}, weight decay {decay}, gradients clipped at {clip}) from a fixed seed, and keeps the weights of the last
step. The split is by module. Held out are {held_out} ({held_tokens:,} tokens,
of which `pylm.npz` is an even choice); left out of both are {left_out}. The tokens were learnt on the training part
alone.

What it writes after a prompt of `{prompt}`, always the likeliest token:

{sample}

It was trained with PyTorch {torch}. Sizes, rate and steps were set by the time at hand; nothing was chosen by the
held-out part.

## Licences

- Weights, tokens' numbers and card: Apache-2.0, like graphopt.
- Text: the `.npz` files hold parts of Python's standard library as token numbers, and the tokens were learnt on it.
  Copyright © 2001 Python Software Foundation; All Rights Reserved; PSF License Agreement, `pylm_LICENSE.txt`. The
  changes are the choice of parts and the numbering.
"""


def sources() -> dict[str, str]:
    """Return the text of each file of the standard library that is taken, by its path with forward slashes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {file.relative_to(root): file for file in root.rglob("*.py")}
    taken = {path: file for path, file in files.items() if not set(LEFT_OUT) & set(path.parts)}
    return {path.as_posix(): taken[path].read_text("utf-8", errors="replace") for path in sorted(taken)}


def is_held_out(path: str) -> bool:
    """Return whether a file belongs to a module that takes no part in training."""
    return path.partition("/")[0].removesuffix(".py") in HELD_OUT


def train_tokenizer(texts: list[str]) -> Any:
    """Return a byte-level BPE of `VOCABULARY` tokens (Sennrich et al. 2016) learnt from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Return the texts one after another as token ids, uint16 [tokens], a separator before each."""
    parts = [np.array([tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(text).ids], np.uint16) for text in texts]
    return np.concatenate(parts)


def rows(stream: np.ndarray, count: int) -> np.ndarray:
    """Return rows spread evenly over a stream of tokens, uint16 [count, CONTEXT]; no two share a token."""
    whole = stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    return whole[np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int)]


def rotary(length: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary positions (Su et al. 2021), float32 [tokens, channels]."""
    frequencies = ROPE_BASE ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angles = length.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return queries or keys [batch, heads, tokens, channels] turned by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


class Attention(nn.Module):
    """Causal attention in which several heads of queries share one of keys and values (Ainslie et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * self.channels, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * self.channels, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attend = attend_at_once

    def heads(self, x: Tensor, each: int) -> Tensor:
        """Return heads apart: [batch, KV_HEADS, each, tokens, channels]."""
        return x.unflatten(-1, (KV_HEADS, each, self.channels)).permute(0, 2, 3, 1, 4)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        queries = rotate(self.heads(self.q_proj(x), HEADS // KV_HEADS), cosines, sines)
        keys = rotate(self.heads(self.k_proj(x), 1), cosines, sines)
        values = self.heads(self.v_proj(x), 1)
        mixed = self.attend(queries, keys, values)
        return self.o_proj(mixed.permute(0, 3, 1, 2, 4).flatten(2))


def attend_at_once(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return causal attention by the kernel that training is fastest with."""
    queries_of_all, keys_of_all, values_of_all = (heads.flatten(1, 2) for heads in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(queries_of_all, keys_of_all, values_of_all, is_causal=True, enable_gqa=True)
    return mixed.unflatten(1, queries.shape[1:3])


def attend_in_steps(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the same as products, a mask and a softmax: what a runtime, and a pass, can see into."""
    tokens = torch.arange(queries.shape[3], device=queries.device)
    later = tokens[None, :] > tokens[:, None]
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return scores.masked_fill(later, LOWEST_SCORE).softmax(dim=-1) @ values


class FeedForward(nn.Module):
    """A SwiGLU (Shazeer 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and a feed-forward network, each added to what came in, which it reads normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(WIDTH, eps=NORM_EPSILON)
        self.self_attn = Attention()
        self.post_attention_norm = nn.RMSNorm(WIDTH, eps=NORM_EPSILON)
        self.mlp = FeedForward()

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_norm(x), cosines, sines)
        return x + self.mlp(self.post_attention_norm(x))


class PyLM(nn.Module):
    """A Llama in small: its first and its last matrix are one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=NORM_EPSILON)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=INITIAL_DEVIATION / (math.sqrt(2 * LAYERS) if into_stream else 1.0))

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, float32 [batch, tokens, VOCABULARY], of token ids, int64 [batch, tokens]."""
        x = self.embed_tokens(ids)
        cosines, sines = rotary(torch.arange(ids.shape[1], device=ids.device), WIDTH // HEADS)
        for layer in self.layers:
            x = layer(x, cosines, sines)
        return self.lm_head(self.norm(x))


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: up, level, and down to nothing in a straight line."""
    left = (steps - step) / (COOL_DOWN * steps)
    return RATE * min(1.0, (step + 1) / WARM_UP, left)


def batches(stream: Tensor) -> Iterator[Tensor]:
    """Yield token ids, int64 [BATCH, CONTEXT + 1], of a stream, from places drawn by the seed."""
    generator = torch.Generator().manual_seed(SEED)
    window = torch.arange(CONTEXT + 1)
    while True:
        starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        yield stream[starts + window]


def make_optimizer(model: PyLM) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices and no vectors."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train_step(model: PyLM, optimizer: torch.optim.Optimizer, ids: Tensor, rate: float) -> Tensor:
    """Take one step and return the loss before it, in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach()


def train(stream: Tensor) -> PyLM:
    """Return a network trained from scratch for a fixed number of steps, in inference mode."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    model = PyLM()
    optimizer = make_optimizer(model)
    begin = time.monotonic()
    for step, ids in zip(range(STEPS), batches(stream), strict=False):
        loss = train_step(model, optimizer, ids, rate(step, STEPS))
        if step % 100 == 0:
            print(f"step {step} of {STEPS}: {float(loss):.3f} nats, {time.monotonic() - begin:.0f} s", flush=True)
    return model.eval()


def export(model: PyLM, path: Path) -> None:
    """Write the network as graphopt imports and simplifies it."""
    for layer in model.layers:
        layer.self_attn.attend = attend_in_steps
    imported = graphopt.from_torch(
        model,
        (torch.zeros(2, 16, dtype=torch.long),),
        dynamic_shapes={"ids": {0: "batch", 1: "tokens"}},
        output_names=["logits"],
        opset=OPSET,
    )
    graphopt.optimize(imported, "simplify", output=path, timed=False)
    onnx.checker.check_model(path, full_check=True)


def cross_entropy(session: onnxruntime.InferenceSession, ids: np.ndarray) -> float:
    """Return the mean of −log p of each next token, in nats, in the rows [rows, tokens]."""
    sums = []
    for start in range(0, len(ids), SCORED_AT_ONCE):
        batch = torch.from_numpy(ids[start : start + SCORED_AT_ONCE].astype(np.int64))
        logits = torch.from_numpy(session.run(None, {"ids": batch.numpy()})[0])
        sums.append(float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")))
    return math.fsum(sums) / (ids.shape[0] * (ids.shape[1] - 1))


def continuation(session: onnxruntime.InferenceSession, tokenizer: Any) -> str:
    """Return a prompt and what the network takes to follow, the likeliest token each time."""
    ids = [tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(PROMPT).ids]
    for _ in range(SAMPLE_TOKENS):
        (logits,) = session.run(None, {"ids": np.array([ids], np.int64)})
        ids.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[1:]))


def card(out: Path, tokenizer: Any, texts: dict[str, str], train_tokens: int, held_tokens: int) -> str:
    """Return the card of the files, its numbers measured on them."""
    proto = onnx.load(out / "pylm.onnx")
    operators = Counter(node.op_type for node in proto.graph.node)
    held, train = (np.load(out / name)["ids"] for name in ("pylm.npz", "pylm_train.npz"))
    session = onnxruntime.InferenceSession(out / "pylm.onnx", providers=["CPUExecutionProvider"])
    nats = cross_entropy(session, held)
    held_bytes = sum(len(text.encode()) for path, text in texts.items() if is_held_out(path))
    text = CARD.format(
        opset=proto.opset_import[0].version,
        model_kb=(out / "pylm.onnx").stat().st_size / 1000,
        data_kb=(out / "pylm.npz").stat().st_size / 1000,
        train_kb=(out / "pylm_train.npz").stat().st_size / 1000,
        weights=sum(
            math.prod(tensor.dims)
            for tensor in proto.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims
        ),
        nodes=operators.total(),
        operators=", ".join(f"{count} {name}" for name, count in sorted(operators.items())),
        rows=len(held),
        train_rows=len(train),
        calibration_rows=CALIBRATION_ROWS,
        perplexity=math.exp(nats),
        bits=nats / math.log(2) * held_tokens / held_bytes,
        train_perplexity=math.exp(cross_entropy(session, rows(train.reshape(-1), len(held)))),
        train_files=sum(not is_held_out(path) for path in texts),
        train_tokens=train_tokens,
        held_tokens=held_tokens,
        held_out=", ".join(f"`{name}`" for name in HELD_OUT),
        left_out=", ".join(f"`{name}`" for name in LEFT_OUT),
        sample="\n".join(f"    {line}".rstrip() for line in continuation(session, tokenizer).splitlines()),
        prompt=PROMPT,
        last_token=VOCABULARY - 1,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        channels=WIDTH // HEADS,
        hidden=HIDDEN,
        steps=STEPS,
        batch=BATCH,
        rate=RATE,
        warm_up=WARM_UP,
        cool_down=COOL_DOWN,
        decay=WEIGHT_DECAY,
        clip=CLIP,
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
    )
    return "\n\n".join(map(filled, text.split("\n\n")))


def filled(paragraph: str) -> str:
    """Return a paragraph with its lines filled; one that is no prose as it is."""
    if paragraph.startswith(("    ", "|", "#", "-")):
        return paragraph
    return textwrap.fill(paragraph, CARD_COLUMNS, break_long_words=False, break_on_hyphens=False)


def write(model: PyLM, tokenizer: Any, texts: dict[str, str], streams: list[np.ndarray], out: Path) -> None:
    """Write all files but the licence: of a trained network, its tokens, and the streams to train on and held out."""
    train_stream, held_stream = streams
    export(model, out / "pylm.onnx")
    tokenizer.save(str(out / "pylm_tokenizer.json"))
    np.savez_compressed(out / "pylm.npz", ids=rows(held_stream, HELD_OUT_ROWS))
    np.savez_compressed(out / "pylm_train.npz", ids=rows(train_stream, TRAIN_ROWS))
    np.savez_compressed(out / "pylm_calibration.npz", ids=rows(train_stream, CALIBRATION_ROWS))
    text = card(out, tokenizer, texts, len(train_stream), len(held_stream))
    (out / "pylm.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Learn tokens, train, export, measure and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", out / "pylm_LICENSE.txt")

    texts = sources()
    held = [text for path, text in texts.items() if is_held_out(path)]
    train_on = [text for path, text in texts.items() if not is_held_out(path)]
    tokenizer = train_tokenizer(train_on)
    streams = [tokens(tokenizer, train_on), tokens(tokenizer, held)]
    model = train(torch.from_numpy(streams[0].astype(np.int64)))
    write(model, tokenizer, texts, streams, out)
    for name in ("onnx", "md", "npz"):
        print(out / f"pylm.{name}")


if __name__ == "__main__":
    main()
