"""Fourier transforms, windows, and the mel scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operators import Operator, Table
from .tensors import torch_dtype

_FLOAT32 = 1  # ONNX's code
# The mel scale: 2595 log10(1 + f / 700) (O'Shaughnessy 1987).
_MEL_FACTOR, _MEL_CORNER = 2595.0, 700.0
# Weights of the windows' cosines.
_HANN = (0.5, 0.5, 0.0)
_HAMMING = (25 / 46, 21 / 46, 0.0)
_BLACKMAN = (0.42, 0.5, 0.08)


def dft(
    x: Tensor, dft_length: Tensor | None = None, axis: Tensor | None = None, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """Discrete Fourier transform along an axis; the last one holds real and imaginary parts, or real ones alone."""
    length = None if dft_length is None else int(dft_length.item())
    return _transformed(x, length, -2 if axis is None else int(axis.item()), bool(inverse), bool(onesided))


def dft_before_20(
    x: Tensor, dft_length: Tensor | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """Discrete Fourier transform along an axis, which an attribute gives."""
    length = None if dft_length is None else int(dft_length.item())
    return _transformed(x, length, axis, bool(inverse), bool(onesided))


def _transformed(x: Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    at = axis % x.ndim
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    signal = wide.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(wide.contiguous())
    if inverse and onesided:
        # `irfft` wants complex numbers; of as many as the real signal needs it takes the first half.
        count = length or 2 * (x.shape[at] - 1)
        spectrum = signal if signal.is_complex() else torch.complex(signal, torch.zeros_like(signal))
        real: Tensor = torch.fft.irfft(spectrum, n=count, dim=at)
        return real.unsqueeze(-1).to(x.dtype)
    if inverse:
        found = torch.fft.ifft(signal, n=length, dim=at)
    elif onesided and not signal.is_complex():
        found = torch.fft.rfft(signal, n=length, dim=at)
    else:
        found = torch.fft.fft(signal, n=length, dim=at)
        found = found.narrow(at, 0, found.shape[at] // 2 + 1) if onesided else found
    return torch.view_as_real(found.resolve_conj()).to(x.dtype)


def stft(
    signal: Tensor,
    frame_step: Tensor,
    window: Tensor | None = None,
    frame_length: Tensor | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Fourier transforms of windows that move along a signal (batch, samples, parts)."""
    if frame_length is not None:
        length = int(frame_length.item())
    else:
        length = signal.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, length, int(frame_step.item())).movedim(-1, 2)
    frames = frames if window is None else frames * window[:, None]
    return _transformed(frames, None, 2, inverse=False, onesided=bool(onesided))


def hann_window(size: Tensor, *, output_datatype: int = _FLOAT32, periodic: int = 1, device: torch.device) -> Tensor:
    """Hann's window."""
    return _window(size, _HANN, output_datatype, periodic, device)


def hamming_window(size: Tensor, *, output_datatype: int = _FLOAT32, periodic: int = 1, device: torch.device) -> Tensor:
    """Hamming's window."""
    return _window(size, _HAMMING, output_datatype, periodic, device)


def blackman_window(
    size: Tensor, *, output_datatype: int = _FLOAT32, periodic: int = 1, device: torch.device
) -> Tensor:
    """Blackman's window."""
    return _window(size, _BLACKMAN, output_datatype, periodic, device)


def _window(
    size: Tensor, weights: tuple[float, float, float], code: int, periodic: int, device: torch.device
) -> Tensor:
    count = int(size.item())
    period = count if periodic else max(count - 1, 1)
    angle = torch.arange(count, dtype=torch.float64, device=device) * (2 * math.pi / max(period, 1))
    level, once, twice = weights
    return (level - once * torch.cos(angle) + twice * torch.cos(2 * angle)).to(torch_dtype(code))


def mel_weight_matrix(
    num_mel_bins: Tensor,
    dft_length: Tensor,
    sample_rate: Tensor,
    lower_edge_hertz: Tensor,
    upper_edge_hertz: Tensor,
    *,
    output_datatype: int = _FLOAT32,
    device: torch.device,
) -> Tensor:
    """Return the triangles that sum a spectrum up in bands of the mel scale: frequencies, bands."""
    bands, length = int(num_mel_bins.item()), int(dft_length.item())
    low, high = (
        _MEL_FACTOR * math.log10(1 + edge.item() / _MEL_CORNER) for edge in (lower_edge_hertz, upper_edge_hertz)
    )
    step = (high - low) / (bands + 2)
    hertz = [_MEL_CORNER * (10 ** ((low + at * step) / _MEL_FACTOR) - 1) for at in range(bands + 2)]
    corners = [int((length + 1) * one // sample_rate.item()) for one in hertz]
    found = torch.zeros(length // 2 + 1, bands, dtype=torch.float64)
    for band, (left, peak, right) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for at in range(left, peak):
            found[at, band] = (at - left) / (peak - left)
        found[peak, band] = 1.0
        for at in range(peak + 1, right):
            found[at, band] = (right - at) / (right - peak)
    return found.to(device, torch_dtype(output_datatype))


OPERATORS: Table = {
    "BlackmanWindow": Operator(blackman_window, since=17, sizes=(0,)),
    "DFT": (Operator(dft_before_20, since=17, sizes=(1,)), Operator(dft, since=20, sizes=(1, 2))),
    "HammingWindow": Operator(hamming_window, since=17, sizes=(0,)),
    "HannWindow": Operator(hann_window, since=17, sizes=(0,)),
    "MelWeightMatrix": Operator(mel_weight_matrix, since=17, sizes=(0, 1, 2, 3, 4)),
    "STFT": Operator(stft, since=17, sizes=(1, 3)),
}
