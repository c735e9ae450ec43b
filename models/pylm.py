"""Train a small Llama-style language model on the source of Python's standard library, and export it.

    python models/pylm.py [--out models]

writes five files: ``pylm.onnx`` (the network), ``pylm_tokenizer.json`` (its tokens), ``pylm.npz`` (tokens of modules it
never saw), ``pylm_train.npz`` (some of the tokens it was trained on, to calibrate with and to train further) and
``pylm.md`` (its card). It needs the extras ``cpu`` and ``torch`` and the package ``tokenizers``, and about an hour of
one core. Two runs of one Python on one machine write the same bytes.
"""

from __future__ import annotations

import argparse
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

STEPS = 4000
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
TRAIN_ROWS = 2400


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
    mixed = F.scaled_dot_product_attention(
        queries_of_all, keys_of_all, values_of_all, is_causal=True, enable_gqa=True
    )
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
    """Yield token ids, int64 [BATCH, CONTEXT + 1], from places drawn by the seed."""
    generator = torch.Generator().manual_seed(SEED)
    window = torch.arange(CONTEXT + 1)
    while True:
        starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        yield stream[starts + window].long()


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
