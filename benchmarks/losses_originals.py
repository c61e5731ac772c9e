"""Plain re-statements of the published algorithms, with which `benchmarks/losses.py` compares the losses.

They are written from the equations, with the methods of the original code: one-hot tensors, a loop over all classes,
and the whole matrix of similarities.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.losses import CIRKDLoss
from bpkd_sdk.output import SegmentationOutput

VOID = 255


@dataclass
class Batch:
    """The inputs of a loss."""

    student: SegmentationOutput
    teacher: SegmentationOutput
    labels: Tensor
    num_classes: int

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.student.logits, self.teacher.logits

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        return self.student.features["neck"], self.teacher.features["neck"]

    @property
    def small_labels(self) -> Tensor:
        stride = self.labels.shape[1] // self.student.logits.shape[2]
        return self.labels[:, ::stride, ::stride].long()


def make_batch(num_classes: int, device: str, *, quick: bool) -> Batch:
    """Return labels of random regions, and outputs that depend on the class, with noise.

    The features are not negative, as after a ReLU.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = (8, 16) if quick else (64, 128)
    coarse = torch.rand(2, num_classes, 8, 16, generator=generator)
    scores = F.interpolate(coarse, (height, width), mode="bilinear")
    labels = scores.argmax(1).repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    labels[:, : height // 4, : width // 4] = VOID
    outputs = []
    for channels, noise in ((128, 1.0), (512, 0.5)):
        logits = 8 * scores + noise * torch.randn(scores.shape, generator=generator)
        mix = torch.randn(channels, num_classes, 1, 1, generator=generator)
        feature = (F.conv2d(logits, mix) / num_classes**0.5).relu()
        outputs.append(SegmentationOutput(logits.to(device), {"neck": feature.to(device)}))
    for tensor in (outputs[0].logits, outputs[0].features["neck"]):
        tensor.requires_grad_()
    return Batch(outputs[0], outputs[1], labels.to(device), num_classes)


def bpkd(batch: Batch) -> Tensor:
    z_student, z_teacher = batch.logits
    known = batch.labels != VOID
    onehot = F.one_hot(batch.labels.long() * known, batch.num_classes).permute(0, 3, 1, 2).float() * known.unsqueeze(1)
    edge = F.max_pool2d(onehot, 7, 1, 3) - (1 - F.max_pool2d(1 - onehot, 7, 1, 3))
    mask = F.adaptive_avg_pool2d(edge * known.unsqueeze(1), z_student.shape[2:])
    p, log_q = (z_teacher * mask).softmax(1), (z_student * mask).log_softmax(1)
    phi = F.kl_div(log_q, p, reduction="none").sum(1, keepdim=True).repeat(1, batch.num_classes, 1, 1)
    edge_term = ((phi * mask).sum((1, 2, 3)) / (mask > 0).sum((1, 2, 3)).clamp(min=1)).sum() * 2 / len(z_student)
    p, log_q = (z_teacher * (1 - mask)).flatten(2).softmax(2), (z_student * (1 - mask)).flatten(2).log_softmax(2)
    body_term = F.kl_div(log_q, p, reduction="sum") / (len(z_student) * batch.num_classes)
    return 50 * edge_term + 20 * body_term


def cwd(batch: Batch) -> Tensor:
    z_student, z_teacher = (z.flatten(2) for z in batch.logits)
    p = z_teacher.softmax(2)
    return (p * (z_teacher.log_softmax(2) - z_student.log_softmax(2))).sum() / p.shape[:2].numel()


def skds_pair(batch: Batch) -> Tensor:
    grams = []
    for feature in batch.features:
        cells = F.max_pool2d(feature, 2, ceil_mode=True).flatten(2)
        cells = cells / cells.norm(dim=1, keepdim=True).clamp(min=1e-8)
        grams.append(torch.einsum("ncm,nck->nmk", cells, cells))
    return (grams[0] - grams[1]).square().mean()


def ifvd(batch: Batch) -> Tensor:
    """Expand the labels, and so every mask, to all channels of the features, as the official code does."""
    cosines = []
    for feature in batch.features:
        labels = batch.small_labels.unsqueeze(1).float().expand_as(feature)
        centres = feature.clone()
        for label in range(batch.num_classes):
            member = (labels == label).float()
            mean = (member * feature).sum((2, 3), keepdim=True) / (member.sum((2, 3), keepdim=True) + 1e-6)
            centres = (1 - member) * centres + member * mean
        cosines.append(F.cosine_similarity(feature, centres, dim=1))
    return (cosines[0] - cosines[1]).square().mean()


def cirkd_minibatch(batch: Batch) -> Tensor:
    s, t = (F.normalize(feature.flatten(2), dim=1) for feature in batch.features)
    loss = torch.zeros((), device=s.device)
    for i in range(len(s)):
        for j in range(len(s)):
            log_q, p = (s[i].T @ s[j] / 0.1).log_softmax(1), (t[i].T @ t[j] / 0.1).softmax(1)
            loss = loss + F.kl_div(log_q, p, reduction="batchmean")
    return loss / len(s) ** 2


class CIRKDMemory(nn.Module):
    """Both memory terms. The queues are as long as ours, so that 150 classes fit."""

    def __init__(self, like: CIRKDLoss) -> None:
        super().__init__()
        self.projection, self.num_classes = like.projection, like.num_classes
        self.pixels, self.regions = like.pixels.entries.clone(), like.regions.entries.clone()
        self.ends = [[0] * self.num_classes, [0] * self.num_classes]

    def forward(self, batch: Batch) -> Tensor:
        feature, labels = batch.features[1], batch.small_labels
        t = F.normalize(feature, dim=1)
        s = F.normalize(self.projection(batch.features[0]), dim=1)
        for image, classes in zip(t, labels, strict=True):
            for label in classes.unique().tolist():
                if label != VOID:
                    own = image[:, classes == label]
                    self.push(1, label, F.normalize(own.mean(1), dim=0).unsqueeze(0))
                    self.push(0, label, own[:, torch.randperm(own.shape[1], device=own.device)[:16]].T)
        rows = (labels != VOID).flatten()
        s, t = (x.permute(0, 2, 3, 1).flatten(0, 2)[rows] for x in (s, t))
        loss = torch.zeros((), device=s.device)
        for queue, total in ((self.pixels, 4096), (self.regions, 1024)):
            index = torch.randperm(queue.shape[1], device=queue.device)[: total // self.num_classes + 1]
            memory = queue[:, index].flatten(0, 1)
            loss = loss + F.kl_div(
                (s @ memory.T / 0.1).log_softmax(1), (t @ memory.T / 0.1).softmax(1), reduction="batchmean"
            )
        return loss

    def push(self, which: int, label: int, vectors: Tensor) -> None:
        queue, begin = (self.pixels, self.regions)[which][label], self.ends[which][label]
        if begin + len(vectors) >= len(queue):
            queue[-len(vectors) :], self.ends[which][label] = vectors, 0
        else:
            queue[begin : begin + len(vectors)], self.ends[which][label] = vectors, begin + len(vectors)


def canonical(batch: Batch, projection: nn.Module) -> Tensor:
    p, log_q = batch.logits[1].softmax(1), batch.logits[0].log_softmax(1)
    logit = F.kl_div(log_q, p, reduction="none").sum(1).mean()
    return logit + F.mse_loss(projection(batch.features[0]), batch.features[1])


def dist(batch: Batch) -> Tensor:
    student, teacher = (z.softmax(1).permute(0, 2, 3, 1).flatten(0, 2) for z in batch.logits)
    inter = 1 - pearson(student, teacher).mean()
    return inter + 1 - pearson(student.T, teacher.T).mean()


def pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)
