"""The public fixtures, and what every comparison with them or with plain loops needs."""

import numpy as np
import torch

from bpkd_sdk.output import SegmentationOutput


def load(reference, name):
    with np.load(reference / "losses" / f"{name}.npz") as content:
        return {key: torch.from_numpy(content[key]) for key in content}


def assert_gradient(tensor, expected, relative=1e-5):
    difference = (tensor.grad - expected).abs().max()
    assert difference <= relative * expected.abs().max() + 1e-8


def output(logits=None, feature=None):
    """An output with whichever of the two a case has; the other is of the right shape and constant."""
    if logits is None:
        logits = torch.zeros(len(feature), 19, *feature.shape[2:])
    return SegmentationOutput(logits, {} if feature is None else {"neck": feature})


def random_output(images, classes, channels, size, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits, feature = (
        torch.randn(images, width, *size, generator=generator, dtype=dtype) for width in (classes, channels)
    )
    return SegmentationOutput(logits.requires_grad_(), {"neck": feature.requires_grad_()})


def random_labels(images, classes, size, *, seed=0, void=255):
    """Blocks of 4x4 pixels, one corner void."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, classes, (images, -(-size[0] // 4), -(-size[1] // 4)), generator=generator)
    labels = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]].clone()
    labels[:, : size[0] // 4, : size[1] // 4] = void
    return labels
