"""Shared code of the tests of the losses: reference arrays, random outputs and labels, one step of a method."""

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
    """Return an output; logits that are not given are zeros of the size of the feature map."""
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
    """Return labels of random blocks of 4x4 pixels, with void in one corner."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, classes, (images, -(-size[0] // 4), -(-size[1] // 4)), generator=generator)
    labels = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]].clone()
    labels[:, : size[0] // 4, : size[1] // 4] = void
    return labels


STUDENT, TEACHER = (3, 4, (9, 12)), (3, 6, (18, 24))  # classes, channels, size
LABELS = random_labels(2, 3, (36, 48))


def outputs(seed=0):
    return random_output(2, *STUDENT, seed=seed), random_output(2, *TEACHER, seed=seed + 100)


def prepared(method, seed=0):
    torch.manual_seed(seed)
    method.prepare(*outputs())
    return method


def step(method, seed):
    """Run one forward and backward pass; return the terms, and the outputs with their gradients."""
    student, teacher = outputs(seed)
    torch.manual_seed(seed)
    terms = method(student, teacher, LABELS)
    torch.stack(list(terms.values())).sum().backward()
    return terms, student, teacher
