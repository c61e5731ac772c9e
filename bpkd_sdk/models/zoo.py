"""The zoo: the paper's eight networks by name, and the two variants that official checkpoints use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from bpkd_sdk.errors import check_choice
from bpkd_sdk.models import imagenet, weights
from bpkd_sdk.models.blocks import initialize
from bpkd_sdk.models.decoders import AuxiliaryHead, ConcatHead, Head, ISAHead, PSPHead, SeparableASPPHead
from bpkd_sdk.models.encoders import Backbone, HRNet, MobileNetV2, ResNet
from bpkd_sdk.models.spec import set_provenance
from bpkd_sdk.output import SegmentationOutput
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.spec import NetworkSpec

HAS_AUX_HEADS, TAKES_OTHER_CHANNELS = True, True


class SegmentationNetwork(nn.Module):
    """Segmentation network: an encoder, a decoder, and an optional auxiliary head.

    The attributes have OpenMMLab's names.

    Args:
        backbone: Encoder, which computes the feature maps.
        decode_head: Decoder, which computes the logits.
        auxiliary_head: Second decoder, which runs in training mode only; None for a network without one.
        spec: Name, classes and normalisation.
    """

    def __init__(
        self, backbone: Backbone, decode_head: Head, auxiliary_head: AuxiliaryHead | None, spec: NetworkSpec
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.spec = spec

    def forward(self, images: Tensor) -> Tensor | SegmentationOutput:
        """Map normalised images (N, channels, H, W) to logits (N, C, h, w) at the decoder's stride.

        In training mode with an auxiliary head, return a `SegmentationOutput` with the logits of both heads.
        """
        features = self.backbone(images)
        logits: Tensor = self.decode_head(features)
        if self.training and self.auxiliary_head is not None:
            return SegmentationOutput(logits, aux_logits=self.auxiliary_head(features))
        return logits


@dataclass(frozen=True)
class ZooEntry:
    """One network of the zoo.

    Attributes:
        name: Name that `create_model` builds the network by.
        backbone: Function that builds the encoder; it has a keyword `in_channels`, the number of channels of images.
        head: Class of the decoder.
        channels: Channels of the decoder's last feature map.
        aux_channels: Channels of the auxiliary head; None if the network cannot have one.
        stride: Ratio of the input size to the size of the logits.
        paper_gflops: FLOPs in the paper's table, in GFLOPs (150 classes, 512x512); None for a variant.
        paper_params: Parameters in the paper's table, in millions; None for a variant.
        imagenet: Key of `imagenet.SOURCES` whose weights fit the encoder; None if no such weights exist.
        variant_of: Name of the network in the paper's table that this one is a variant of, or None.
    """

    name: str
    backbone: Callable[..., Backbone]
    head: type[Head]
    channels: int
    aux_channels: int | None
    stride: int
    paper_gflops: float | None = None
    paper_params: float | None = None
    imagenet: str | None = None
    variant_of: str | None = None

    @property
    def has_aux_head(self) -> bool:
        """Whether the network can be built with ``aux_head=True``."""
        return self.aux_channels is not None


_R18, _R101 = partial(ResNet, 18), partial(ResNet, 101)
_R101_TIMM, _MV2_TIMM = "resnet101c.gluon_in1k", "mobilenetv2_100.ra_in1k"

_ENTRIES = (
    ZooEntry("pspnet_r101", _R101, PSPHead, 512, 256, 8, 256.89, 68.07, _R101_TIMM),
    ZooEntry("pspnet_r18", _R18, PSPHead, 128, 64, 8, 54.53, 12.82),
    ZooEntry("hrnetv2p_w48", partial(HRNet, "w48"), ConcatHead, 720, None, 4, 95.64, 65.95, "hrnet_w48.ms_in1k"),
    ZooEntry(
        "hrnetv2p_w18s", partial(HRNet, "w18s"), ConcatHead, 270, None, 4, 10.49, 3.97, "hrnet_w18_small_v2.ms_in1k"
    ),
    ZooEntry("deeplabv3plus_r101", _R101, SeparableASPPHead, 512, 256, 4, 255.67, 62.68, _R101_TIMM),
    ZooEntry("deeplabv3plus_mv2", MobileNetV2, SeparableASPPHead, 512, 256, 4, 69.60, 15.35, _MV2_TIMM),
    ZooEntry("isanet_r101", _R101, ISAHead, 512, 256, 8, 228.21, 56.80, _R101_TIMM),
    ZooEntry("isanet_r18", _R18, ISAHead, 128, 64, 8, 54.33, 12.46),
    ZooEntry(
        "pspnet_r18b",
        partial(ResNet, 18, deep_stem=False),
        PSPHead,
        128,
        64,
        8,
        imagenet="resnet18.tv_in1k",
        variant_of="pspnet_r18",
    ),
    ZooEntry(
        "deeplabv3plus_mv2_ch128",
        MobileNetV2,
        SeparableASPPHead,
        128,
        64,
        4,
        imagenet=_MV2_TIMM,
        variant_of="deeplabv3plus_mv2",
    ),
)

ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _ENTRIES}


def check_weights(name: str, backbone_weights: str) -> None:
    """Raise ValueError if the encoder of a network of the zoo cannot start from these weights.

    Args:
        name: Key of `ZOO`.
        backbone_weights: "none", "imagenet", or the path of a file.
    """
    check_choice("name", name, ZOO)
    weights.check_known_weights(backbone_weights)
    if backbone_weights == weights.IMAGENET:
        imagenet.check(name, ZOO[name].imagenet)


def build_network(
    name: str,
    num_classes: int,
    *,
    aux_head: bool = False,
    backbone_weights: str = weights.NONE,
    in_channels: int = 3,
) -> SegmentationNetwork:
    """Build a network of the zoo, in training mode.

    Args:
        name: Key of `ZOO`.
        num_classes: C, the number of channels of the logits.
        aux_head: Whether to add the auxiliary training head; see `ZooEntry.has_aux_head`.
        backbone_weights: Weights of the encoder: "none" for random ones, "imagenet" (downloaded by timm), or the path
            of a file with OpenMMLab's or timm's weights.
        in_channels: Number of channels of the images; pretrained weights are adapted to it.

    Raises:
        ValueError: If the name is unknown, the network has no auxiliary head, or the weights do not exist or fit.
        RuntimeError: If timm cannot download the weights.
    """
    check_weights(name, backbone_weights)
    entry = ZOO[name]
    if aux_head and not entry.has_aux_head:
        raise ValueError(f"{name!r} has no auxiliary head; build it with aux_head=False.")
    backbone = entry.backbone(in_channels=in_channels)
    network = SegmentationNetwork(
        backbone,
        entry.head(backbone.out_channels, entry.channels, num_classes),
        AuxiliaryHead(backbone.out_channels, entry.aux_channels, num_classes)
        if aux_head and entry.aux_channels
        else None,
        NetworkSpec(name=name, num_classes=num_classes, aux_head=aux_head).for_images(PixelFormat(in_channels)),
    )
    initialize(network)
    origin: dict[str, Any] | None = None
    if weights.is_file(backbone_weights):
        timm_names = imagenet.SOURCES.get(entry.imagenet or "")
        rename = partial(imagenet.rename_parameters, source=timm_names) if timm_names else None
        origin = weights.load_encoder_file(backbone, backbone_weights, rename=rename)
    elif backbone_weights == weights.IMAGENET and entry.imagenet is not None:
        origin = imagenet.load(backbone, name, entry.imagenet, in_channels)
    if origin is not None:
        set_provenance(network, {"backbone_weights": origin})
    return network
