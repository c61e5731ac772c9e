"""Devices, precision and processes of a run, set up with the accelerate library.

A run is one process, or as many as `accelerate launch` starts.

Every process holds the whole student and method and works on its shard of each batch; gradients are averaged. All
processes therefore start with equal weights and take the same decisions, and only the main process writes files. The
state of methods is equal everywhere too: critics average their gradients, and CIRKD's memory receives the features of
all processes. CIRKD's mini-batch term compares the images of one process at a time.
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from bpkd_sdk import progress
from bpkd_sdk.runtime.device import choose_device
from bpkd_sdk.training.config import TrainingConfig

Value = TypeVar("Value")

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def create_accelerator(config: TrainingConfig) -> Accelerator:
    """Create the accelerator from the configuration and from the launcher's environment variables.

    The progress output of all processes but the main one is switched off.

    Raises:
        ValueError: If one GPU is named for several processes, or if a batch cannot be split evenly.
        RuntimeError: If the device does not exist.
    """
    kind, _, index = config.device.partition(":")
    if index and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"device={config.device!r} is one device for several processes; pass {kind!r} instead.")
    device = choose_device(config.device)
    if device.type == "cuda" and index:
        torch.cuda.set_device(device)
    # accelerate keeps one state per process; without a reset, a second run could not use another device or precision.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=_mixed_precision(config.precision, on_cuda=device.type == "cuda"),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        kwargs_handlers=[
            # A static graph allows networks with weights that no step uses; the graph is the same at every step.
            DistributedDataParallelKwargs(static_graph=True, gradient_as_bucket_view=True),
            # The other processes wait while the main process checks all the data.
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
    )
    atexit.unregister(_leave_process_group)
    atexit.register(_leave_process_group)
    micro_batches = accelerator.num_processes * config.accumulate
    if config.batch_size % micro_batches:
        raise ValueError(
            f"Expected `batch_size`, the number of images per step, to be a multiple of {micro_batches} "
            f"({accelerator.num_processes} processes, accumulate={config.accumulate}), but got {config.batch_size}."
        )
    progress.console.quiet = not accelerator.is_main_process
    return accelerator


def _leave_process_group() -> None:
    """Close the connections between processes, because torch aborts a process that ends with open ones."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _mixed_precision(precision: str, *, on_cuda: bool) -> str:
    if precision == "auto" and on_cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "no" if precision in ("auto", "fp32") else precision


def teacher_dtype(config: TrainingConfig, accelerator: Accelerator) -> torch.dtype:
    """Return the data type of the teacher's autocast: its own precision, or the student's by default."""
    if config.teacher_precision is None:
        return DTYPES[accelerator.mixed_precision]
    return DTYPES[_mixed_precision(config.teacher_precision, on_cuda=accelerator.device.type == "cuda")]


def synchronize_batch_norm(module: nn.Module) -> None:
    """Replace every trained batch norm layer by SyncBatchNorm, in place.

    SyncBatchNorm uses the images of all processes, as in the paper.

    The critics of SKDS and IFVD are left out: they train themselves, and WGAN-GP differentiates twice, which torch's
    SyncBatchNorm does not support. A converted layer behaves like the original one in eval mode and on a CPU. timm
    converts its own layers that contain an activation, which torch's conversion would drop.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and any(weight.requires_grad for weight in child.parameters()):
                setattr(parent, name, convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]


@torch.no_grad()
def average_batch_norm_statistics(module: nn.Module, accelerator: Accelerator) -> None:
    """Average the running statistics of batch norm over all processes; no other buffer differs between processes."""
    if accelerator.num_processes > 1:
        norms = (part for part in module.modules() if isinstance(part, _NormBase))
        for buffer in (buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()):
            buffer.copy_(accelerator.reduce(buffer, "mean"))


def broadcast_from_main(value: Value) -> Value:
    """Return the main process's value on all processes."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
