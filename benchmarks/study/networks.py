"""Networks of the study: the teacher of CamVid, the dense student, and the FPN with EfficientNet-lite0."""

from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import bpkd_sdk
from bpkd_sdk.arrays import resize_bilinear
from bpkd_sdk.models.blocks import ConvBN

FIRST_LOGITS = 0.01  # factor of the classifier's random weights: the first cross-entropy is then ln C


class DenseNet(nn.Module):
    """A small encoder and decoder of plain 3x3 convolutions, with random weights and logits of stride 4.

    It has 0.26 million parameters, and 0.113 GMACs for an image of 192x256 and 11 classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stride4 = nn.Sequential(ConvBN(3, 16, 3, stride=2), ConvBN(16, 24, 3, stride=2))
        self.stride8 = nn.Sequential(ConvBN(24, 48, 3, stride=2), ConvBN(48, 48, 3))
        self.stride16 = nn.Sequential(
            ConvBN(48, 96, 3, stride=2), *(ConvBN(96, 96, 3, dilation=dilation) for dilation in (2, 4))
        )
        self.fine, self.middle, self.coarse = ConvBN(24, 32), ConvBN(48, 32), ConvBN(96, 32)
        self.decoder = ConvBN(32, 32, 3)
        self.classifier = quiet(nn.Conv2d(32, num_classes, 1))
        self.spec = _spec(num_classes, size_divisor=16)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, C, H / 4, W / 4)."""
        stride4 = self.stride4(images)
        stride8 = self.stride8(stride4)
        coarse = self.coarse(self.stride16(stride8))
        middle = self.middle(stride8) + resize_bilinear(coarse, stride8.shape[2:])
        logits: Tensor = self.classifier(self.decoder(self.fine(stride4) + resize_bilinear(middle, stride4.shape[2:])))
        return logits


def quiet(classifier: nn.Conv2d) -> nn.Conv2d:
    """Make a classifier's first logits almost 0."""
    with torch.no_grad():
        classifier.weight *= FIRST_LOGITS
        nn.init.zeros_(classifier.bias)
    return classifier


def teacher_network(weights: Path, num_classes: int) -> nn.Module:
    """Return the teacher of CamVid: an FPN with EfficientNet-lite2."""
    return create_fpn("timm-tf_efficientnet_lite2", weights, num_classes, pyramid=160, segmentation=96)


def lite0_network(weights: Path, num_classes: int) -> nn.Module:
    """Return an FPN with EfficientNet-lite0 and a narrow decoder."""
    return create_fpn("timm-tf_efficientnet_lite0", weights, num_classes, pyramid=64, segmentation=32)


def quiet_lite0_network(weights: Path, num_classes: int) -> nn.Module:
    """Return `lite0_network` whose first logits are almost 0."""
    network = lite0_network(weights, num_classes)
    quiet(network.segmentation_head[0])
    return network


def create_fpn(encoder: str, weights: Path, num_classes: int, *, pyramid: int, segmentation: int) -> nn.Module:
    """Return an FPN whose encoder has ImageNet weights. For the SDK it is a user's own module."""
    network = smp.FPN(
        encoder,
        encoder_weights=None,
        decoder_pyramid_channels=pyramid,
        decoder_segmentation_channels=segmentation,
        classes=num_classes,
        upsampling=1,
    )
    load_encoder(network, weights)
    network.spec = _spec(num_classes, size_divisor=32)
    return network


def load_encoder(network: nn.Module, weights: Path) -> None:
    """Load the encoder's weights from the files of the packages, which list the same tensors in the same order."""
    tensors = list(torch.load(weights, weights_only=True).values())[:-2]  # without the classifier
    network.encoder.load_state_dict(dict(zip(network.encoder.state_dict(), tensors, strict=True)))


def _spec(num_classes: int, *, size_divisor: int) -> bpkd_sdk.NetworkSpec:
    return bpkd_sdk.NetworkSpec(
        name=None, num_classes=num_classes, size_divisor=size_divisor, mean=(0.5,) * 3, std=(0.5,) * 3
    )
