"""Options of ONNX Runtime's execution providers, under the names ONNX Runtime gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graphopt import options
from graphopt.errors import UsageError
from graphopt.options import opt

Provider = Literal["cpu", "cuda", "tensorrt"]

_GIVES_CONTEXT = "trt_dump_ep_context_model"
_WHERE = "backend `onnxruntime`"


@dataclass(frozen=True)
class SessionOptions:
    """What every session has."""

    provider: Literal["cpu", "cuda", "tensorrt"] = opt("cpu", help="execution provider")
    config: tuple[str, ...] = opt((), help="session configuration entries, KEY=VALUE")


@dataclass(frozen=True)
class GpuOptions:
    """What CUDA and TensorRT have in common."""

    device_id: int = opt(0, low=0, help="cuda, tensorrt: number of the GPU")
    allow_cpu: bool = opt(False, help="cuda, tensorrt: whether nodes may run on the CPU for lack of a kernel")
    cpu_ops: tuple[str, ...] = opt(
        (), help="cuda, tensorrt: operators that may, joined by `+`; arithmetic on shapes may"
    )
    provider_options: tuple[str, ...] = opt((), help="cuda, tensorrt: any other option of the provider, KEY=VALUE")


@dataclass(frozen=True)
class CudaOptions:
    """Of the CUDA provider; what is None is left to it."""

    use_tf32: bool = opt(False, help="cuda: round float32 products to 10 bits: faster, and no longer float32")
    gpu_mem_limit: int | None = opt(None, low=1, help="cuda: bytes its arena may take")
    arena_extend_strategy: Literal["kNextPowerOfTwo", "kSameAsRequested"] | None = opt(
        None, help="cuda: by how much the arena grows"
    )
    cudnn_conv_algo_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] | None = opt(
        None, help="cuda: how kernels of convolutions are chosen"
    )
    cudnn_conv_use_max_workspace: bool | None = opt(None, help="cuda: let convolutions take all memory they can use")
    cudnn_conv1d_pad_to_nc1d: bool | None = opt(None, help="cuda: run 1-D convolutions as [N, C, 1, D]")
    do_copy_in_default_stream: bool | None = opt(None, help="cuda: copy in the stream it computes in")
    prefer_nhwc: bool | None = opt(None, help="cuda: channels last, for convolutions in half precision")
    fuse_conv_bias: bool | None = opt(None, help="cuda: let cuDNN add the bias of convolutions")
    sdpa_kernel: int | None = opt(None, low=0, help="cuda: attention kernels that may be chosen, as a sum of flags")
    enable_skip_layer_norm_strict_mode: bool | None = opt(None, help="cuda: sum in float32 in skip layer norms")
    tunable_op_enable: bool | None = opt(None, help="cuda: use tuned kernels")
    tunable_op_tuning_enable: bool | None = opt(None, help="cuda: tune kernels while running")


@dataclass(frozen=True)
class TensorRtOptions:
    """Of the TensorRT provider; what is None is left to it."""

    dims: tuple[str, ...] = opt((), help="tensorrt: sizes of dynamic dimensions, NAME=MIN..OPT..MAX joined by `+`")
    trt_engine_cache_enable: bool = opt(True, help="tensorrt: keep engines")
    trt_engine_cache_path: str | None = opt(None, help="tensorrt: folder of engines and timings; else the user's cache")
    trt_timing_cache_enable: bool = opt(True, help="tensorrt: keep how long kernels took, for later builds")
    trt_force_timing_cache: bool | None = opt(None, help="tensorrt: take timings of another GPU of its kind")
    trt_engine_hw_compatible: bool | None = opt(None, help="tensorrt: engines that run on later GPUs, too; slower")
    trt_builder_optimization_level: int | None = opt(None, low=0, high=5, help="tensorrt: effort of a build")
    trt_max_workspace_size: int | None = opt(None, low=1, help="tensorrt: bytes kernels may use as scratch")
    trt_min_subgraph_size: int | None = opt(None, low=1, help="tensorrt: fewest nodes it takes over")
    trt_max_partition_iterations: int | None = opt(None, low=1, help="tensorrt: tries at dividing the model")
    trt_sparsity_enable: bool | None = opt(None, help="tensorrt: use kernels for weights pruned 2:4")
    trt_layer_norm_fp32_fallback: bool | None = opt(None, help="tensorrt 10 and older: keep layer norms in float32")
    trt_op_types_to_exclude: tuple[str, ...] | None = opt(None, help="tensorrt: operators left to CUDA, joined by `+`")
    trt_fp16_enable: bool | None = opt(
        None, help="tensorrt 10 and older: it may choose float16, whatever the model says"
    )
    trt_bf16_enable: bool | None = opt(None, help="tensorrt 10 and older: it may choose bfloat16")
    trt_int8_enable: bool | None = opt(None, help="tensorrt 10 and older: it may choose int8")
    trt_int8_calibration_table_name: str | None = opt(None, help="tensorrt 10 and older: ranges, for a float model")
    trt_int8_use_native_calibration_table: bool | None = opt(None, help="tensorrt: the table is TensorRT's own")
    trt_auxiliary_streams: int | None = opt(None, low=-1, help="tensorrt: streams beside the one it runs in")
    trt_context_memory_sharing_enable: bool | None = opt(None, help="tensorrt: parts of a model share scratch memory")
    trt_dump_subgraphs: bool | None = opt(None, help="tensorrt: write what it was given to the current folder")
    trt_detailed_build_log: bool | None = opt(None, help="tensorrt: log each step of a build")
    trt_dump_ep_context_model: bool | None = opt(None, help="tensorrt: write the model with its engines in it")
    trt_ep_context_file_path: str | None = opt(None, help="tensorrt: where that is written")
    trt_ep_context_embed_mode: bool | None = opt(None, help="tensorrt: engines inside that file; up to 2 GB")
    trt_weight_stripped_engine_enable: bool | None = opt(None, help="tensorrt: engines without weights")
    trt_onnx_model_folder_path: str | None = opt(None, help="tensorrt: folder these take their weights from")


_OWNERS: tuple[tuple[type, frozenset[Provider]], ...] = (
    (GpuOptions, frozenset({"cuda", "tensorrt"})),
    (CudaOptions, frozenset({"cuda"})),
    (TensorRtOptions, frozenset({"tensorrt"})),
)
# Ours: they say what to do with the others, or where.
_NOT_PASSED_ON = ("allow_cpu", "cpu_ops", "provider_options", "dims", "trt_engine_cache_path")
_WEAK_TYPING = (
    "trt_fp16_enable",
    "trt_bf16_enable",
    "trt_int8_enable",
    "trt_int8_calibration_table_name",
    "trt_layer_norm_fp32_fallback",
)
_STRONGLY_TYPED = 11  # the first TensorRT that knows no other networks
_CUDA_GRAPHS = ("enable_cuda_graph", "trt_cuda_graph_enable")
# Options that do nothing without another one, or any of several.
_NEEDS: dict[str, tuple[str, ...]] = {
    "trt_int8_use_native_calibration_table": ("trt_int8_calibration_table_name",),
    "trt_int8_calibration_table_name": ("trt_int8_enable",),
    "trt_force_timing_cache": ("trt_timing_cache_enable",),
    "trt_engine_cache_path": ("trt_engine_cache_enable", "trt_timing_cache_enable"),
    _GIVES_CONTEXT: ("trt_ep_context_file_path",),
    "trt_ep_context_file_path": (_GIVES_CONTEXT,),
    "trt_ep_context_embed_mode": (_GIVES_CONTEXT,),
    "trt_weight_stripped_engine_enable": ("trt_onnx_model_folder_path",),
}


def check_options(backend: Any) -> None:
    """Refuse options of another provider than the one chosen, options without those they need, and malformed entries.

    Raises:
        UsageError: The first that is wrong.
    """
    given = options.changed(backend)
    for owner, providers in _OWNERS:
        for name in options.fields(owner):
            if name in given and backend.provider not in providers:
                raise UsageError(
                    f"{_WHERE}: `{name}` is an option of {' and '.join(sorted(providers))}, not of {backend.provider}",
                    hint=f"add `provider={min(providers)}`, or leave it out",
                )
    for name, needed in _NEEDS.items():
        if given.get(name) and not any(getattr(backend, one) for one in needed):
            words = " or ".join(f"`{one}`" for one in needed)
            raise UsageError(f"{_WHERE}: `{name}` does nothing without {words}", hint=f"give {words} as well")
    for entry in backend.provider_options:
        key, _, value = entry.partition("=")
        if not key or not value:
            raise UsageError(f"{_WHERE}: `{entry}` is no provider option", hint="KEY=VALUE")
        if key in _CUDA_GRAPHS:
            raise UsageError(
                f"{_WHERE}: `{key}` cannot be: a graph that was captured reads and writes where its first run did, "
                "and every run here has memory of its own",
                hint="leave it out",
            )
        if key in _typed():
            raise UsageError(f"{_WHERE}: `{key}` is an option of its own", hint=f"write `{key}={value}`")


def check_weak_typing(backend: Any, tensorrt: tuple[int, ...] | None) -> None:
    """Refuse what lets TensorRT choose precisions where it has no such choice any more.

    Raises:
        UsageError: TensorRT is known to be version 11 or newer, which takes precisions from the model alone.
    """
    if tensorrt is None or tensorrt[0] < _STRONGLY_TYPED:
        return
    for name in _WEAK_TYPING:
        if getattr(backend, name):
            version = ".".join(map(str, tensorrt))
            raise UsageError(
                f"{_WHERE}: TensorRT {version} has no `{name}`: it computes in what the model says",
                hint="optimize the model with `cast` or `quant` for `--target tensorrt`",
            )


def passed_on(backend: Any) -> dict[str, str]:
    """Return the options of the chosen provider as ONNX Runtime takes them, without those that are None."""
    found: dict[str, str] = {}
    for owner, providers in _OWNERS:
        if backend.provider in providers:
            for name in options.fields(owner):
                value = getattr(backend, name)
                if name not in _NOT_PASSED_ON and value is not None:
                    found[name] = _text(value)
    return found | dict(_pair(entry) for entry in backend.provider_options)


def config_entries(entries: tuple[str, ...]) -> Mapping[str, str]:
    """Return session configuration entries by key.

    Raises:
        UsageError: One is no ``KEY=VALUE``.
    """
    for entry in entries:
        if not all(entry.partition("=")):
            raise UsageError(f"{_WHERE}: `{entry}` is no configuration entry", hint="KEY=VALUE")
    return dict(map(_pair, entries))


def _typed() -> set[str]:
    return {name for owner, _ in _OWNERS for name in options.fields(owner)}


def _pair(entry: str) -> tuple[str, str]:
    key, _, value = entry.partition("=")
    return key, value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(value) if isinstance(value, tuple) else str(value)
