"""Levels part of the CamVid study: one number per class, added to the logits, corrects much of a student's error."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpkd_sdk
from benchmarks.camvid.setup import Study
from bpkd_sdk.models import get_spec
from bpkd_sdk.runtime import TorchRuntime

IMAGE_STRIDE = 15  # distance of the training images that the levels are fitted on
STUDENTS = (
    "alone",
    "bpkd paper",
    "bpkd edge 10 body 5",
    "bpkd edge 1 body 2",
    "bpkd with kd kd 5 edge 10 body 5",
    "cwd logit 5",
    "cwd logit 1",
    "canonical logit 5",
)


class LevelledNetwork(nn.Module):
    """A network with a number added to the logits of each class."""

    def __init__(self, network: nn.Module, levels: Tensor) -> None:
        super().__init__()
        self.network, self.levels, self.spec = network, levels, get_spec(network)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + self.levels


def measure_levels(study: Study) -> None:
    """Score tuned students before and after their levels are fitted on training images."""
    fitted, held_out = study.open_tuning_data()
    for name in STUDENTS:
        if f"levels/{name}" in study.records():
            continue
        student = study.load_student(study.runs / "tune" / name / "seed0")
        runtime = TorchRuntime(student)
        samples = [fitted[index] for index in range(0, len(fitted), IMAGE_STRIDE)]
        logits = torch.cat([runtime.logits(image[None])[:, :, ::4, ::4] for image, _ in samples])
        labels = torch.stack([label for _, label in samples])[:, ::4, ::4].long()
        levels = fit_levels(logits, labels, held_out.ignore_index)
        before = bpkd_sdk.evaluate(student, held_out)
        after = bpkd_sdk.evaluate(LevelledNetwork(student, levels), held_out)
        record = {"levels": levels.flatten().tolist(), "before": before.to_dict(), "after": after.to_dict()}
        study.save({f"levels/{name}": record})


def fit_levels(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the numbers, (1, C, 1, 1), that minimise the cross-entropy when added to the logits of each class."""
    levels = torch.zeros(1, logits.shape[1], 1, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([levels], line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits + levels, labels, ignore_index=ignore_index)
        value.backward()
        return value

    optimizer.step(loss)
    return levels.detach()
