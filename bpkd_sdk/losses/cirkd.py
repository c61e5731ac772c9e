"""CIRKD: cross-image relational distillation (Yang et al., CVPR 2022).

Relations between positions of different images: the similarities of a position's feature to all positions of every
image of the batch, and to a memory of features and class means of earlier batches. The teacher's relations, made
distributions by a softmax, are what the student learns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.boundary import check_labels
from bpkd_sdk.losses.method import (
    DistillationLoss,
    built,
    check_batch,
    check_not_negative,
    check_positive,
    full_precision,
    labels_at,
    paired_features,
    paired_logits,
)
from bpkd_sdk.losses.pixel import pixel_kl
from bpkd_sdk.losses.processes import rows_of_all_processes
from bpkd_sdk.losses.queue import ClassQueue, class_means, rank_within, sample_positions
from bpkd_sdk.losses.similarity import MIN_TEMPERATURE, contrast_kl, relation_kl
from bpkd_sdk.output import SegmentationOutput

PIXEL_CONTRASTS, REGION_CONTRASTS = 4096, 1024  # of all classes together, from the official code
PIXELS_PER_CLASS = 16


def minibatch_pixel(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """The mini-batch term: KL of similarities, mean over positions and over all ordered pairs of images.

    For images i and j (j = i included), a position of i has a distribution over the positions of j: the softmax of the
    cosines over `temperature`.

    Args:
        student: Features (N, D_S, h, w), float32 or float64.
        teacher: Features (N, D_T, h, w), constant.
        temperature: 0.025 or above.

    Returns:
        Scalar, 0 or above.

    Example:
        >>> student = torch.ones(2, 2, 1, 2)
        >>> teacher = torch.eye(2).view(1, 2, 1, 2).repeat(2, 1, 1, 1)
        >>> round(minibatch_pixel(student, teacher, temperature=1.0).item(), 4)
        0.1109
    """
    s, t = (F.normalize(features.flatten(2).mT, dim=2) for features in (student, teacher))
    return relation_kl(s, t, temperature=temperature)


def memory_contrast(student: Tensor, teacher: Tensor, memory: Tensor, *, temperature: float = 0.1) -> Tensor:
    """A memory term: KL of the distributions over the memory's entries, mean over positions.

    Args:
        student: Features (M, D), projected to the teacher's channels, float32 or float64.
        teacher: Features (M, D), constant.
        memory: Unit vectors (K, D), constant.
        temperature: Above 0.

    Returns:
        Scalar, 0 or above; 0 with zero gradient without positions.
    """
    return contrast_kl(F.normalize(student), F.normalize(teacher), memory, temperature=temperature)


def _rows(features: Tensor) -> Tensor:
    """(N, D, h, w) -> (N h w, D)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class CIRKDLoss(DistillationLoss):
    """Cross-image relational distillation: {"kd", "minibatch_pixel", "memory_pixel", "memory_region"}.

    The memory belongs to the method: it is in its state dict, bounded by `pixel_queue` and `region_queue`.

    Args:
        num_classes: C.
        kd_weight: Of `pixel_kl`; a weight of 0 leaves a term out. As in `CanonicalKDLoss`; officially 1.
        minibatch_weight: Of `minibatch_pixel`. The official 1 made 0.3 (student trained alone) to 0.8 (fresh student)
            on CamVid.
        pixel_weight: Of the term on the memory of single positions. Ten times the official 0.1, which is known to leave
            next to nothing; 1 made 4 at first, and 0.2 to 0.6 once the projection had learned, on CamVid.
        region_weight: Of the term on the memory of class means; as `pixel_weight`.
        temperature: T of the logits' term.
        contrast_temperature: Of all softmaxes over similarities.
        pool: The mini-batch term averages features over pool x pool positions first; its time
            and memory (two matrices of all pairs of positions of two images) fall with pool^4.
        pixel_queue: Most entries in the memory of positions, all classes together. The official 20,000 a class are
            6 GB for 150 classes and a teacher of 512 channels; 40,960 are 84 MB.
        region_queue: Most entries in the memory of class means, all classes together; officially 2,000 a class.
        whole_map: Take the positions that are remembered for a class of n positions from the first n of the image,
            whatever their class, as the official code does; otherwise from the class's own.
        ignore_index: The void label.

    Raises:
        ValueError: For a value out of its range.

    Example:
        >>> torch.manual_seed(0) and None
        >>> output = SegmentationOutput(torch.zeros(2, 3, 4, 4), {"neck": torch.rand(2, 8, 4, 4)})
        >>> method = CIRKDLoss(3)
        >>> method.prepare(output, output)
        >>> list(method(output, output, torch.zeros(2, 8, 8, dtype=torch.uint8)))
        ['kd', 'minibatch_pixel', 'memory_pixel', 'memory_region']
    """

    def __init__(
        self,
        num_classes: int,
        *,
        kd_weight: float = 5.0,
        minibatch_weight: float = 1.0,
        pixel_weight: float = 1.0,
        region_weight: float = 1.0,
        temperature: float = 1.0,
        contrast_temperature: float = 0.1,
        pool: int = 2,
        pixel_queue: int = 40_960,
        region_queue: int = 10_240,
        whole_map: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_not_negative(
            kd_weight=kd_weight,
            minibatch_weight=minibatch_weight,
            pixel_weight=pixel_weight,
            region_weight=region_weight,
        )
        check_positive(temperature=temperature, pool=pool)
        if not MIN_TEMPERATURE <= contrast_temperature < float("inf"):
            raise ValueError(
                f"Expected `contrast_temperature` to be {MIN_TEMPERATURE} or above, but got {contrast_temperature}."
            )
        for name, entries in (("pixel_queue", pixel_queue), ("region_queue", region_queue)):
            if entries < num_classes:
                raise ValueError(f"Expected `{name}` to be at least the {num_classes} classes, but got {entries}.")
        self.num_classes = num_classes
        self.kd_weight = kd_weight
        self.minibatch_weight = minibatch_weight
        self.pixel_weight = pixel_weight
        self.region_weight = region_weight
        self.temperature = temperature
        self.contrast_temperature = contrast_temperature
        self.pool = pool
        self.pixel_queue = pixel_queue
        self.region_queue = region_queue
        self.whole_map = whole_map
        self.ignore_index = ignore_index
        self.needs_features = max(minibatch_weight, pixel_weight, region_weight) > 0
        self.projection: nn.Sequential | None = None
        self.pixels: ClassQueue | None = None
        self.regions: ClassQueue | None = None

    @classmethod
    def paper(cls, num_classes: int, *, ignore_index: int = 255) -> CIRKDLoss:
        """The first release: weights 1, 1, 0.1 and 0.1, no pooling, 20,000 and 2,000 entries a class, whole map."""
        return cls(
            num_classes,
            kd_weight=1,
            minibatch_weight=1,
            pixel_weight=0.1,
            region_weight=0.1,
            pool=1,
            pixel_queue=20_000 * num_classes,
            region_queue=2_000 * num_classes,
            whole_map=True,
            ignore_index=ignore_index,
        )

    def prepare(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        """Build the student's projection head and the memory; see `DistillationLoss.prepare`."""
        if not (self.pixel_weight or self.region_weight):
            return
        f_student, f_teacher = paired_features(student, teacher)
        width, device = f_teacher.shape[1], f_student.device
        self.projection = nn.Sequential(
            nn.Conv2d(f_student.shape[1], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        ).to(device)
        if self.pixel_weight:
            self.pixels = ClassQueue(self.num_classes, self.pixel_queue // self.num_classes, width, device)
        if self.region_weight:
            self.regions = ClassQueue(self.num_classes, self.region_queue // self.num_classes, width, device)

    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`. In training mode the batch enters the memory first."""
        z_student, z_teacher = paired_logits(student, teacher)
        check_batch(z_student, labels, self.num_classes)
        terms = {}
        with full_precision(z_student):
            if self.kd_weight:
                terms["kd"] = self.kd_weight * pixel_kl(z_student, z_teacher, temperature=self.temperature)
            if self.needs_features:
                f_student, f_teacher = paired_features(student, teacher)
                if self.minibatch_weight:
                    pooled = (F.avg_pool2d(features, self.pool, ceil_mode=True) for features in (f_student, f_teacher))
                    minibatch = minibatch_pixel(*pooled, temperature=self.contrast_temperature)
                    terms["minibatch_pixel"] = self.minibatch_weight * minibatch
                if self.pixel_weight or self.region_weight:
                    terms |= self._memory_terms(f_student, f_teacher, labels)
        return terms

    def _memory_terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        check_labels(labels, self.num_classes, self.ignore_index)
        classes = labels_at(labels, (student.shape[2], student.shape[3]))
        known = classes.flatten() != self.ignore_index
        embedded, target = _rows(built(self.projection, self)(student))[known], F.normalize(_rows(teacher))
        if self.training:
            self._remember(target, classes)
        terms = {}
        for name, weight, queue, contrasts in (
            ("memory_pixel", self.pixel_weight, self.pixels, PIXEL_CONTRASTS),
            ("memory_region", self.region_weight, self.regions, REGION_CONTRASTS),
        ):
            if queue is not None:
                memory = queue.sample(contrasts // self.num_classes + 1)
                term = memory_contrast(embedded, target[known], memory, temperature=self.contrast_temperature)
                terms[name] = weight * term
        return terms

    def _remember(self, features: Tensor, classes: Tensor) -> None:
        """Add features (N h w, D) and the mean of each image's classes (N, h, w) to the memory, of all processes."""
        image = torch.arange(len(classes), device=classes.device).view(-1, 1, 1)
        positions = (classes != self.ignore_index).flatten().nonzero().squeeze(1)
        group = (image * self.num_classes + classes).flatten()[positions]
        groups = len(classes) * self.num_classes
        if self.pixels is not None:
            chosen = sample_positions(group, PIXELS_PER_CLASS, groups)
            rank = rank_within(group, groups)[0]
            first = group // self.num_classes * classes[0].numel()
            where = (first + rank if self.whole_map else positions)[chosen]
            self._push(self.pixels, features[where], group[chosen])
        if self.regions is not None:
            self._push(self.regions, *class_means(features[positions], group, groups))

    def _push(self, queue: ClassQueue, vectors: Tensor, group: Tensor) -> None:
        queue.push(rows_of_all_processes(vectors), rows_of_all_processes(group % self.num_classes))
