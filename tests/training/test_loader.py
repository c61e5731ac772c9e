"""Types and padding of the labels in training batches."""

import os

import pytest
import torch

from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.data.dataset import default_workers
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loader import training_loader

CONFIG = TrainingConfig(steps=3, batch_size=2, scale=(0.5, 0.5))


def batches(dataset):
    return list(training_loader(dataset, CONFIG, (32, 32), first_step=0, on_gpu=False))


@pytest.mark.parametrize("void", [255, -1, 300])
def test_padding_is_void_for_every_void_label(void):
    """Images of 16x16, which are padded in crops of 32x32."""
    expected = batches(ShapesDataset("train", length=4, size=(32, 32)))
    dataset = ShapesDataset("train", length=4, size=(32, 32))
    dataset.ignore_index = void
    for (images, labels), (same_images, same_labels) in zip(batches(dataset), expected, strict=True):
        assert labels.dtype == (torch.uint8 if void == 255 else torch.int64)
        assert torch.equal(images, same_images)
        assert torch.equal(labels, torch.where(same_labels == 255, void, same_labels.long()))
        assert (labels == void).float().mean() >= 0.75


def test_workers_are_as_many_as_cores_fall_to_a_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert default_workers() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers() == 1
