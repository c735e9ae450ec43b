"""Recurrent operators: RNN, GRU and LSTM with all of their options.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`. What depends on the
input alone is one product over all steps; the steps themselves are a loop that autograd follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from .operators import Operator, Table

Activation: TypeAlias = Callable[[Tensor], Tensor]
State: TypeAlias = tuple[Tensor, ...]
# One step of one direction: what the input says to the gates, and the state before, to the state behind.
Step: TypeAlias = Callable[[Tensor, State], State]

# Activations by ONNX's names in lower case, of an input, alpha and beta; and defaults where they read alpha and beta.
_ACTIVATIONS: Mapping[str, Callable[[Tensor, float, float], Tensor]] = MappingProxyType(
    {
        "affine": lambda x, alpha, beta: alpha * x + beta,
        "elu": lambda x, alpha, beta: functional.elu(x, alpha),
        "hardsigmoid": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
        "leakyrelu": lambda x, alpha, beta: functional.leaky_relu(x, alpha),
        "relu": lambda x, alpha, beta: torch.relu(x),
        "scaledtanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
        "sigmoid": lambda x, alpha, beta: torch.sigmoid(x),
        "softplus": lambda x, alpha, beta: functional.softplus(x),
        "softsign": lambda x, alpha, beta: functional.softsign(x),
        "tanh": lambda x, alpha, beta: torch.tanh(x),
        "thresholdedrelu": lambda x, alpha, beta: torch.where(x >= alpha, x, torch.zeros_like(x)),
    }
)
_ALPHAS: Mapping[str, float] = MappingProxyType(
    {"affine": 1.0, "elu": 1.0, "hardsigmoid": 0.2, "leakyrelu": 0.01, "scaledtanh": 1.0, "thresholdedrelu": 1.0}
)
_BETAS: Mapping[str, float] = MappingProxyType({"affine": 0.0, "hardsigmoid": 0.5, "scaledtanh": 1.0})


def rnn(
    data: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = ("Tanh", "Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """h = f(x Wᵀ + h Rᵀ + b) along a sequence."""
    chosen = _activations(activations, activation_alpha, activation_beta, clip)
    biases = _biases(b, w, r)

    def step_of(at: int) -> Step:
        (f,) = chosen[at : at + 1]
        return lambda gates, state: (f(gates + functional.linear(state[0], r[at], biases[at][1])),)

    return _run(data, w, r, biases, sequence_lens, (initial_h,), step_of, direction, layout)


def gru(
    data: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = ("Sigmoid", "Tanh") * 2,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """Gates of update and reset, and a candidate for the state, along a sequence."""
    chosen = _activations(activations, activation_alpha, activation_beta, clip)
    biases = _biases(b, w, r)

    def step_of(at: int) -> Step:
        f, g = chosen[2 * at : 2 * at + 2]
        both = 2 * r.shape[-1]  # the gates of update and reset; the candidate's part lies behind
        bias = biases[at][1]

        def step(gates: Tensor, state: State) -> State:
            before = state[0]
            z, reset = f(gates[:, :both] + functional.linear(before, r[at, :both], bias[:both])).chunk(2, -1)
            candidate = gates[:, both:]
            if linear_before_reset:
                h = g(candidate + reset * functional.linear(before, r[at, both:], bias[both:]))
            else:
                h = g(candidate + functional.linear(reset * before, r[at, both:], bias[both:]))
            return ((1 - z) * h + z * before,)

        return step

    return _run(data, w, r, biases, sequence_lens, (initial_h,), step_of, direction, layout)


def lstm(
    data: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = ("Sigmoid", "Tanh", "Tanh") * 2,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Gates of input, output and forgetting around a cell, along a sequence; peepholes let gates see the cell."""
    chosen = _activations(activations, activation_alpha, activation_beta, clip)
    unclipped = _activations(activations, activation_alpha, activation_beta, None)  # of the cell, as in ONNX Runtime
    biases = _biases(b, w, r)

    def step_of(at: int) -> Step:
        (f, g), h = chosen[3 * at : 3 * at + 2], unclipped[3 * at + 2]
        peep = (0.0, 0.0, 0.0) if p is None else p[at].chunk(3)

        def step(gates: Tensor, state: State) -> State:
            before, cell = state
            i, o, forget, c = (gates + functional.linear(before, r[at], biases[at][1])).chunk(4, -1)
            i = f(i + peep[0] * cell)
            forget = 1 - i if input_forget else f(forget + peep[2] * cell)
            cell = forget * cell + i * g(c)
            return f(o + peep[1] * cell) * h(cell), cell

        return step

    return _run(data, w, r, biases, sequence_lens, (initial_h, initial_c), step_of, direction, layout)


def _activations(
    names: Sequence[str], alphas: Sequence[float], betas: Sequence[float], clip: float | None
) -> list[Activation]:
    """Return the activations of all directions; alphas and betas are used up by those that read any, in order."""
    given_alphas, given_betas = iter(alphas), iter(betas)
    found = []
    for name in names:
        key = name.lower()
        alpha = next(given_alphas, _ALPHAS[key]) if key in _ALPHAS else 0.0
        beta = next(given_betas, _BETAS[key]) if key in _BETAS else 0.0
        found.append(_activation(key, alpha, beta, clip))
    return found


def _activation(key: str, alpha: float, beta: float, clip: float | None) -> Activation:
    function = _ACTIVATIONS[key]
    if clip is None:
        return lambda x: function(x, alpha, beta)
    return lambda x: function(x.clamp(-clip, clip), alpha, beta)


def _biases(b: Tensor | None, w: Tensor, r: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return for each direction the biases of the input's and the state's weights."""
    if b is None:
        none = w.new_zeros(w.shape[1])
        return [(none, none)] * w.shape[0]
    return [(one[: w.shape[1]], one[w.shape[1] :]) for one in b]


def _run(
    data: Tensor,
    w: Tensor,
    r: Tensor,
    biases: Sequence[tuple[Tensor, Tensor]],
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    step_of: Callable[[int], Step],
    direction: str,
    layout: int,
) -> tuple[Tensor, ...]:
    """Run each direction, and return all outputs of steps, and the state behind the last one."""
    if layout:
        data = data.transpose(0, 1)
        initial = [None if one is None else one.transpose(0, 1) for one in initial]
    alive = None
    if lengths is not None:
        alive = torch.arange(data.shape[0], device=data.device).unsqueeze(1) < lengths.to(data.device)
    outputs, states = [], []
    for at in range(w.shape[0]):
        turned = direction == "reverse" or at == 1
        order = _order(data, alive) if turned else None
        gates = functional.linear(data if order is None else _ordered(data, order), w[at], biases[at][0])
        empty = data.new_zeros(data.shape[1], r.shape[-1])
        state = tuple(empty if one is None else one[at] for one in initial)
        output, state = _steps(gates, state, step_of(at), alive)
        outputs.append(output if order is None else _ordered(output, order))
        states.append(state)
    every = torch.stack(outputs, 1)  # step × direction × batch × hidden
    last = [torch.stack(one) for one in zip(*states, strict=True)]
    if layout:
        return every.permute(2, 0, 1, 3), *(one.transpose(0, 1) for one in last)
    return every, *last


def _order(data: Tensor, alive: Tensor | None) -> Tensor:
    """Return for each step and batch which step it is from behind; what lies behind a sequence's end stays there."""
    steps = torch.arange(data.shape[0], device=data.device).unsqueeze(1).expand(data.shape[:2])
    if alive is None:
        return steps.flip(0)
    return torch.where(alive, alive.sum(0) - 1 - steps, steps)


def _ordered(data: Tensor, order: Tensor) -> Tensor:
    return data.gather(0, order.unsqueeze(-1).expand(data.shape))


def _steps(gates: Tensor, state: State, step: Step, alive: Tensor | None) -> tuple[Tensor, State]:
    outputs = []
    for at in range(gates.shape[0]):
        after = step(gates[at], state)
        output = after[0]
        if alive is not None:
            lives = alive[at].unsqueeze(1)
            output = torch.where(lives, output, torch.zeros_like(output))
            after = tuple(torch.where(lives, new, old) for new, old in zip(after, state, strict=True))
        outputs.append(output)
        state = after
    return torch.stack(outputs) if outputs else state[0].new_zeros(0, *state[0].shape), state


OPERATORS: Table = {
    "GRU": Operator(gru, since=7),
    "LSTM": Operator(lstm, since=7),
    "RNN": Operator(rnn, since=7),
}
