"""Untrained networks that behave like trained ones, and their int8 files, for benchmarks and tests.

Their batch norms are adapted to generated scenes, and their classifier can be fitted to them.
"""

from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export.calibration import measure_ranges
from bpkd_sdk.export.qdq import find_layers, inner_layers, insert_qdq
from bpkd_sdk.export.quantization import int8_metadata, write_int8
from bpkd_sdk.models.encoders import BasicBlock, Bottleneck, InvertedResidual
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.runtime.module import whole_logits

RIDGE = 0.01  # share of the mean square of the features


def settled(name: str, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """Return a network with random weights, batch norms adapted to scenes, and small residuals.

    Its activations have the ranges of a trained network.

    Args:
        name: Name of the network for `create_model`.
        num_classes: Number of channels of the logits.
        size: (height, width) of the scenes.
    """
    torch.manual_seed(0)
    network = bpkd_sdk.create_model(name, num_classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics become the mean over all images
        if (last := _last_norm(module)) is not None:
            nn.init.constant_(last.weight, 0.2)
    scenes = ShapesDataset("settle", length=4, size=size)
    with torch.no_grad():
        whole_logits(network, torch.stack([image for image, _ in scenes]))
    return network.eval()


def _last_norm(module: nn.Module) -> nn.BatchNorm2d | None:
    """Return the last batch norm of a residual block; None for other modules."""
    if isinstance(module, InvertedResidual):
        return module.conv[-1].bn if module.residual else None
    if isinstance(module, BasicBlock):
        return module.bn2
    return module.bn3 if isinstance(module, Bottleneck) else None


def fitted(name: str, size: tuple[int, int], scenes: int = 32) -> nn.Module:
    """Return a `settled` network whose classifier is fitted to the nine classes of the scenes by ridge regression.

    Its logits are seldom equal, so masks can be compared.

    Args:
        name: Name of the network for `create_model`.
        size: (height, width) of the scenes.
        scenes: Number of scenes.
    """
    data = ShapesDataset("fit", length=scenes, size=size)
    network = settled(name, data.num_classes, size)
    (classifier,) = (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.out_channels == data.num_classes)
    features: list[Tensor] = []
    with torch.inference_mode(), classifier.register_forward_hook(lambda _, inputs, __: features.append(inputs[0])):
        for image, _ in data:
            whole_logits(network, image[None])
    shares = [_shares(label, data.num_classes, features[0].shape[2:]) for _, label in data]
    inputs, targets = (torch.cat([_rows(part) for part in parts]) for parts in (features, shares))
    weight = (targets / targets.mean(0) ** 0.2).sum(1, keepdim=True)
    weight /= weight.sum()
    mean_input, mean_target = (weight * inputs).sum(0), (weight * targets).sum(0)
    inputs, targets = weight.sqrt() * (inputs - mean_input), weight.sqrt() * (targets - mean_target)
    products = inputs.T @ inputs
    products += RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=torch.double)
    weights = torch.linalg.solve(products, inputs.T @ targets)
    with torch.no_grad():
        classifier.weight.copy_(weights.T[:, :, None, None])
        classifier.bias.copy_(mean_target - mean_input @ weights)
    return network


def _shares(label: Tensor, num_classes: int, size: tuple[int, int]) -> Tensor:
    """Return the share of each class in each cell, (1, C, h, w); void pixels count for no class."""
    known = F.one_hot(label.long().clamp(max=num_classes), num_classes + 1)[..., :num_classes]
    return F.adaptive_avg_pool2d(known.permute(2, 0, 1)[None].double(), size)


def _rows(maps: Tensor) -> Tensor:
    """Reshape (1, C, h, w) to (h w, C)."""
    return maps[0].flatten(1).T.double()


def to_int8(source: Path, target: Path, *, ends: bool = False) -> int:
    """Convert a float32 file to int8 without the search of `quantize` for layers to leave out.

    Args:
        source: File of `to_onnx`, from image to mask.
        target: File to write.
        ends: Whether the first and the last layer are converted too.

    Returns:
        Number of layers with weights in int8.
    """
    proto, facts = onnx.load(source), open_runtime(source, "cpu").metadata
    layers = find_layers(proto)
    if not ends:
        layers = inner_layers(layers)
    weighted = sum(layer.weighted for layer in layers)
    image, _ = ShapesDataset("calibration", length=1, size=tuple(facts["input_size"]))[0]
    result = insert_qdq(proto, layers, measure_ranges(proto, layers, [image]))
    write_int8(result, target, int8_metadata(facts, quantized=weighted))
    return weighted
