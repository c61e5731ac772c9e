"""Traces a network into an ONNX graph, with pre- and post-processing inside, for fixed or for any sizes of images."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.data.shapes import render
from bpkd_sdk.export.graph import Graph
from bpkd_sdk.output import as_output
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.runtime.module import full_size_logits
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


class DeployableNetwork(nn.Module):
    """A network from image to mask or logits, as it is traced.

    Args:
        network: Network in eval mode.
        spec: Facts of the network: normalisation and size divisor.
        preprocess: Whether the input is an image (N, H, W, channels), uint8 or float32 by the range of its values, and
            is normalised inside; otherwise the input is normalised float32 (N, channels, H, W).
        argmax: Whether the output is a uint8 mask (N, H, W); otherwise it is float32 logits (N, C, H, W).
        dynamic_size: Whether the traced graph accepts images of any size.
    """

    def __init__(
        self, network: nn.Module, spec: NetworkSpec, *, preprocess: bool, argmax: bool, dynamic_size: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.preprocess = preprocess
        self.argmax = argmax
        self.dynamic_size = dynamic_size

    def forward(self, images: Tensor) -> Tensor:
        """Compute masks or logits."""
        # Cast before transposing: on uint8, TensorRT's parser accepts no operator but Cast.
        inputs = self.spec.normalize(images.float().permute(0, 3, 1, 2)) if self.preprocess else images
        compute_logits = _any_size_logits if self.dynamic_size else full_size_logits
        logits = compute_logits(self.network, inputs, self.spec.size_divisor)
        return to_mask(logits) if self.argmax else logits


def _any_size_logits(model: nn.Module, inputs: Tensor, divisor: int) -> Tensor:
    """Compute `full_size_logits` without a branch on the size, which would bind torch.export to the traced sizes."""
    height, width = inputs.shape[2:]
    # Written as a multiple, so that torch.export can prove that the network's strides divide the padded size.
    padded = [(side + divisor - 1) // divisor * divisor for side in (height, width)]
    bottom, right = padded[0] - height, padded[1] - width
    if divisor > 1:
        inputs = F.pad(inputs, (0, right, 0, bottom))
    precision = next((parameter.dtype for parameter in model.parameters()), inputs.dtype)
    logits = as_output(model(inputs.to(precision))).logits.float()
    logits = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
    return F.pad(logits, (0, -right, 0, -bottom)) if divisor > 1 else logits


def trace(model: DeployableNetwork, input_size: tuple[int, int], *, dynamic_batch: bool, opset: int) -> ModelProto:
    """Trace a network into an ONNX model, and simplify its graph.

    Args:
        model: Network to trace.
        input_size: (height, width) of the images to trace with.
        dynamic_batch: Whether the graph accepts any number of images; otherwise one.
        opset: ONNX operator set.

    Raises:
        RuntimeError: If torch cannot export the network; the message contains torch's reason.
    """
    import onnx
    import onnxslim

    axes = _dynamic_axes(model, dynamic_batch)
    try:
        with exact_pooling(), _no_checks(), _no_garbage_collection(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = _export(model, _sample_images(model, input_size, 2 if dynamic_batch else 1), axes, opset)
    except Exception as error:  # the network's own code may raise anything while it is traced
        advice = " Try dynamic_size=False." if model.dynamic_size else ""
        raise RuntimeError(
            f"torch cannot export {model.spec.name or type(model.network).__name__} at input_size={input_size}: "
            f"{first_reason(error)}.{advice} No file was written."
        ) from error
    remove_idle_resizes(exported)
    slimmed: ModelProto = onnxslim.slim(exported)
    onnx.checker.check_model(slimmed)
    return slimmed


def _dynamic_axes(model: DeployableNetwork, dynamic_batch: bool) -> dict[int, str]:
    """Return the names of the input's axes whose length may change, by axis."""
    height = 1 if model.preprocess else 2
    sides = {height: "height", height + 1: "width"} if model.dynamic_size else {}
    return ({0: "batch"} if dynamic_batch else {}) | sides


def _sample_images(model: DeployableNetwork, size: tuple[int, int], batch: int) -> Tensor:
    """Return generated images in the form that the network accepts."""
    scenes = torch.from_numpy(np.stack([render(0, "trace", index, size)[0] for index in range(batch)]))
    images = model.spec.imitate(scenes.permute(0, 3, 1, 2))
    return images.permute(0, 2, 3, 1).contiguous() if model.preprocess else model.spec.normalize(images)


def _export(model: DeployableNetwork, images: Tensor, axes: dict[int, str], opset: int) -> ModelProto:
    program = torch.export.export(
        model,
        (images,),
        dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),),
        # Sizes that must be equal for the network to run at all need no proof that they always are.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(axes,),
        input_names=["images"],
        output_names=["masks" if model.argmax else "logits"],
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model_proto: ModelProto = exported.model_proto
    return model_proto


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause Python's garbage collector, which would take a fifth of the tracing time and free nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _no_checks() -> Iterator[None]:
    """Switch off the checks of transformers on the values of tensors, for which ONNX has no operator."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def first_reason(error: BaseException) -> str:
    """Return the first paragraph of the error that caused all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().split(chr(10) * 2)[0]}".rstrip(".")


@contextmanager
def exact_pooling() -> Iterator[None]:
    """Replace torch's adaptive average pooling by `average_over_cells`, also inside `interpolate(mode="area")`.

    For tracing only: torch.onnx writes adaptive pooling for the traced size only, without an error. The function in
    `torch.nn.functional` is replaced for the whole process until the block ends.
    """
    original = F.adaptive_avg_pool2d
    F.adaptive_avg_pool2d = average_over_cells
    try:
        yield
    finally:
        F.adaptive_avg_pool2d = original
        # torch.compile keeps a table of torch's functions; one made in this block has the replacement in it.
        if rules := sys.modules.get("torch._dynamo.trace_rules"):
            rules.clear_lru_cache()


def average_over_cells(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Compute `torch.nn.functional.adaptive_avg_pool2d` by operations that accept any size once they are traced.

    Args:
        input: (..., H, W), floating point; the name is torch's, because callers may pass it by name.
        output_size: (h, w), or one number for both; None keeps that side.

    Returns:
        (..., h, w).

    Examples:
        >>> average_over_cells(torch.arange(6.0).view(1, 2, 3), (1, 2))
        tensor([[[2., 3.]]])
    """
    rows, columns = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    if rows == columns == 1:
        return input.mean((-2, -1), keepdim=True)
    if rows is not None:
        input = _averaging_matrix(input.shape[-2], rows, input) @ input
    if columns is not None:
        input = input @ _averaging_matrix(input.shape[-1], columns, input).transpose(0, 1)
    return input


def _averaging_matrix(length: int, cells: int, like: Tensor) -> Tensor:
    """Return the matrix (cells, length) that averages a line over its cells.

    Cell i is the interval from i length / cells to (i + 1) length / cells, and contains each position that it overlaps,
    as in torch. The comparisons are multiplied out, so that they are exact.
    """
    position = torch.arange(length, device=like.device)
    cell = torch.arange(cells, device=like.device).view(-1, 1)
    inside = ((position + 1) * cells > cell * length) & (position * cells < (cell + 1) * length)
    weights = inside.float()
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def remove_idle_resizes(model: ModelProto) -> None:
    """Remove the resizes to the size that their input has already, in place; ONNX Runtime and onnxslim keep them."""
    graph = Graph(model)
    shapes = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    for node in graph.take_nodes():
        if node.op_type == "Resize" and node.output[0] not in graph.outputs and _keeps_shape(node, shapes):
            graph.replace(node.output[0], node.input[0])
        else:
            graph.keep(node)
    graph.finish()


def _keeps_shape(node: NodeProto, shapes: Mapping[str, Any]) -> bool:
    """Return whether input and output have the same size, in numbers or in the names of dynamic sizes."""
    if not shapes.keys() >= {node.input[0], node.output[0]}:
        return False
    before, after = (
        [size.dim_value or size.dim_param for size in shapes[tensor].dim] for tensor in (node.input[0], node.output[0])
    )
    return before == after and all(before)
