"""Requirements of a configuration that the machine lacks, reported before ranks connect and memory is allocated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops

from seqlen_curriculum.config.deepspeed_part import missing_packages
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import writable_folder
from seqlen_curriculum.launchers import global_rank, port_problem

__all__ = ["SHM_BYTES", "machine_problems", "must_compile", "on_cpu", "precision_problems", "supported_precisions"]

SHM_BYTES = 67 * 2**20
"""Bytes of /dev/shm that DeepSpeed uses per CPU rank, rounded up to whole MiB."""
_GPU_OPTIMIZERS = {"lamb", "onebitadam", "onebitlamb", "zerooneadam"}
"""Lower-case names of DeepSpeed's optimizers that are written in CUDA or need NCCL."""


def machine_problems(deepspeed_config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per requirement of ``deepspeed_config`` that this machine or this launch lacks."""
    yield from precision_problems(deepspeed_config)
    yield from _gpu(deepspeed_config)
    yield from _compilers(deepspeed_config)
    yield from missing_packages(deepspeed_config)
    yield from _monitor_folders(deepspeed_config)
    yield from _checkpoint_writer(deepspeed_config)
    yield from port_problem()
    yield from _shared_memory()


def _monitor_folders(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the folders of monitors that can't be written to. Rank 0 writes them."""
    for name in ("csv_monitor", "tensorboard") if global_rank() == 0 else ():
        folder = config[name].get("output_path") if _enabled(config, name) else None
        if isinstance(folder, str) and folder:
            try:
                writable_folder(f"{name}.output_path:", Path(folder))
            except ConfigError as error:
                yield str(error)


def on_cpu() -> bool:
    """Return whether DeepSpeed trains on the CPU here."""
    return str(get_accelerator().device_name()) == "cpu"


def _enabled(config: Mapping[str, Any], section: str) -> bool:
    value = config.get(section)
    return isinstance(value, Mapping) and bool(value.get("enabled"))


def supported_precisions() -> dict[str, bool]:
    """Return whether the accelerator at hand trains in fp16 and in bf16."""
    accelerator = get_accelerator()
    supported = {"fp16": bool(accelerator.is_fp16_supported()), "bf16": bool(accelerator.is_bf16_supported())}
    if accelerator.device_name() == "cuda":  # DeepSpeed also accepts torch's emulation, many times slower than fp16
        supported["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return supported


def precision_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each enabled precision that the accelerator at hand lacks."""
    supported = supported_precisions()
    for name, is_supported in supported.items():
        if _enabled(config, name) and not is_supported:
            device = "no GPU is seen, and this CPU" if on_cpu() else f"this {get_accelerator().device_name()} device"
            others = [f'"{other}": {{"enabled": true}}' for other in supported if supported[other]]
            yield (
                f"{name}.enabled: true, but {device} has no {name}; set it to false (fp32)"
                f"{''.join(f', use {other} instead' for other in others)}, or start it where a GPU has {name}"
            )


def _gpu(config: Mapping[str, Any]) -> Iterator[str]:
    if not on_cpu():
        return
    optimizer = str((config.get("optimizer") or {}).get("type", ""))
    if optimizer.lower() in _GPU_OPTIMIZERS:
        yield f"optimizer.type: {optimizer} needs a GPU, and none is visible; use Adam, or start it on a node with GPUs"


def _compilers(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the missing tools to compile those C++ extensions of DeepSpeed that this run needs and still has to compile."""
    optimizer = config.get("optimizer") or {}
    params = optimizer.get("params") or {}
    with_adam = ("adam", "adamw", "muon")  # Muon trains embeddings and vectors by Adam
    is_adam = str(optimizer.get("type", "")).lower() in with_adam and not params.get("torch_adam")
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    adam = "CPUAdamBuilder" if offload.get("device", "none") != "none" else "FusedAdamBuilder"
    missing = "C++ compiler" if shutil.which(os.environ.get("CXX", "c++")) is None else ""
    install = "install one (Debian: apt-get install g++) or name it in CXX"
    if missing and must_compile("ShareMemCommBuilder"):
        yield f"c++: no C++ compiler found, and DeepSpeed compiles an extension at its first run on a CPU; {install}"
    if not is_adam or not must_compile(adam):
        return
    if not missing and not on_cpu() and shutil.which("nvcc") is None:
        from torch.utils.cpp_extension import CUDA_HOME

        missing, install = ("", "") if CUDA_HOME else ("nvcc", "install the CUDA toolkit")
    if missing:
        yield (
            f"optimizer.params.torch_adam: not set, so DeepSpeed compiles its own Adam, but no {missing} found; set "
            f"it to true (torch's AdamW), or {install}"
        )


def must_compile(builder_name: str) -> bool:
    """Return whether DeepSpeed must compile this extension for the current accelerator."""
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or builder.__class__.__name__ == "NotImplementedBuilder" or installed_ops.get(builder.name):
        return False
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    return folder is None or not (Path(folder) / builder.name / f"{builder.name}.so").exists()


def _checkpoint_writer(config: Mapping[str, Any]) -> Iterator[str]:
    if (config.get("checkpoint") or {}).get("writer") is not None and not os.environ.get("CROSS_SIZE"):
        yield (
            "checkpoint.writer: needs the variable CROSS_SIZE, the number of nodes, which only the deepspeed launcher sets; "
            "start with deepspeed, set CROSS_SIZE, or remove checkpoint.writer"
        )


def _shared_memory() -> Iterator[str]:
    # DeepSpeed uses it only if LOCAL_SIZE, set by its launcher, shows that all ranks are on this node.
    ranks, local_ranks = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_SIZE", "")
    if not on_cpu() or ranks != local_ranks:
        return
    needed = int(ranks) * SHM_BYTES
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    if free < needed:
        yield (
            f"/dev/shm: {free >> 20} MiB free, but DeepSpeed needs {needed >> 20} MiB for {ranks} CPU ranks; free some "
            "(a container: --shm-size=1g), or start fewer ranks"
        )
