"""CIRKD: cross-image relational distillation (Yang et al., CVPR 2022).

Relations between positions of different images: the similarities of a position's feature to all positions of every
image of the batch, and to a memory of features and class means of earlier batches. The teacher's relations, made
distributions by a softmax, are what the student learns.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.boundary import check_labels
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import (
    Outputs,
    Terms,
    WeightedTerms,
    built,
    check_positive,
    labels_at,
    rows_of_all_processes,
)
from bpkd_sdk.losses.similarity import MIN_TEMPERATURE, contrast_kl, relation_kl


class ClassQueue(nn.Module):
    """A ring of unit vectors for every class, random at first; all of it is in the state dict.

    The official code overwrites a ring's end and starts over when new entries do not fit before it; here a ring is
    written through the end, so that every entry grows equally old.

    Args:
        num_classes: C.
        size: Entries of a class.
        channels: D.
        device: Where it lies.

    Attributes:
        entries: (C, size, D) float32.
        pointer: (C,) int64, the slot that is overwritten next.

    Example:
        >>> queue = ClassQueue(num_classes=2, size=3, channels=4)
        >>> queue.push(torch.eye(4)[:2], torch.tensor([1, 1]))
        >>> queue.pointer.tolist(), queue.entries[1, :2].argmax(1).tolist()
        ([0, 2], [0, 1])
    """

    def __init__(self, num_classes: int, size: int, channels: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.entries: Tensor
        self.pointer: Tensor
        self.register_buffer("entries", F.normalize(torch.randn(num_classes, size, channels, device=device), dim=2))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.int64, device=device))

    def push(self, vectors: Tensor, classes: Tensor) -> None:
        """Add vectors (M, D) of classes (M,), in their order; the oldest go."""
        num_classes, size = self.entries.shape[:2]
        rank, count = rank_within(classes, num_classes)
        slot = (self.pointer[classes] + rank) % size
        newest = rank >= count[classes] - size
        self.entries[classes[newest], slot[newest]] = vectors[newest].to(self.entries.dtype)
        self.pointer.add_(count).remainder_(size)

    def sample(self, per_class: int) -> Tensor:
        """(C * per_class, D): the entries at the same random slots of every class; all if there are no more."""
        size = self.entries.shape[1]
        slots = torch.randperm(size, device=self.entries.device)[:per_class]
        return self.entries[:, slots].flatten(0, 1)


def rank_within(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """How many elements of the same group come before each.

    Args:
        group: (M,) int64 in [0, num_groups).
        num_groups: How many groups there may be.

    Returns:
        The ranks (M,), and the size of each group (num_groups,), int64.

    Example:
        >>> rank_within(torch.tensor([2, 0, 2, 2]), 3)[0].tolist()
        [0, 0, 1, 2]
    """
    order = group.argsort(stable=True)
    count = torch.bincount(group, minlength=num_groups)
    start = count.cumsum(0) - count
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start[group[order]]
    return rank, count


def class_means(vectors: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The mean direction of each group that has a member.

    Args:
        vectors: (M, D).
        group: (M,) int64 in [0, num_groups).
        num_groups: How many groups there may be.

    Returns:
        Unit vectors (G, D), and their groups (G,) in ascending order.
    """
    sums = vectors.new_zeros(num_groups, vectors.shape[1]).index_add_(0, group, vectors)
    present = torch.bincount(group, minlength=num_groups).nonzero().squeeze(1)
    return F.normalize(sums[present]), present


def sample_positions(group: Tensor, per_group: int, num_groups: int) -> Tensor:
    """Up to `per_group` random members of each group.

    Args:
        group: (M,) int64 in [0, num_groups).
        per_group: At most so many.
        num_groups: How many groups there may be.

    Returns:
        Indices into `group`, ordered by group.
    """
    shuffled = torch.randperm(len(group), device=group.device)
    chosen = shuffled[rank_within(group[shuffled], num_groups)[0] < per_group]
    return chosen[group[chosen].argsort(stable=True)]


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


class CIRKDLoss(WeightedTerms):
    """Cross-image relational distillation: {"kd", "minibatch_pixel", "memory_pixel", "memory_region"}.

    The memory belongs to the method: it is in its state dict, bounded by `pixel_queue` and `region_queue`. Positions
    enter it under the labels that floor-nearest gives them, as in the authors' code: at stride s the label's pixel lies
    (s - 1) / 2 pixels above and to the left of the position's centre, see `bpkd_sdk.losses.method.labels_at`.

    Args:
        num_classes: C; None: that of the first logits.
        kd_weight: Of `pixel_kl`; a weight of 0 leaves a term out. As in `CanonicalKDLoss`; officially 1.
        minibatch_weight: Of `minibatch_pixel`. The official 1 made 0.5 (student trained alone) to 0.7 (fresh student)
            on CamVid.
        pixel_weight: Of the term on the memory of single positions. Ten times the official 0.1, which is known to leave
            next to nothing; 1 made 3 at first, and 0.8 when the projection had learned for 20 steps, on CamVid.
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
        >>> from bpkd_sdk import SegmentationOutput
        >>> torch.manual_seed(0) and None
        >>> output = SegmentationOutput(torch.zeros(2, 3, 4, 4), {"neck": torch.rand(2, 8, 4, 4)})
        >>> method = CIRKDLoss(3)
        >>> method.prepare(output, output)
        >>> list(method(output, output, torch.zeros(2, 8, 8, dtype=torch.uint8)))
        ['kd', 'minibatch_pixel', 'memory_pixel', 'memory_region']
    """

    name = "cirkd"
    feature_terms = ("minibatch_pixel", "memory_pixel", "memory_region")

    def __init__(
        self,
        num_classes: int | None = None,
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
        weights = {
            "kd": kd_weight,
            "minibatch_pixel": minibatch_weight,
            "memory_pixel": pixel_weight,
            "memory_region": region_weight,
        }
        super().__init__(num_classes, ignore_index, weights)
        check_positive(temperature=temperature, pool=pool)
        if not MIN_TEMPERATURE <= contrast_temperature < float("inf"):
            raise ValueError(
                f"Expected `contrast_temperature` to be {MIN_TEMPERATURE} or above, but got {contrast_temperature}."
            )
        self.temperature = temperature
        self.contrast_temperature = contrast_temperature
        self.pool = pool
        self.pixel_queue = pixel_queue
        self.region_queue = region_queue
        self.whole_map = whole_map
        self.projection: nn.Sequential | None = None
        self.pixels: ClassQueue | None = None
        self.regions: ClassQueue | None = None
        self.check_classes(num_classes or 1)

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

    def check_classes(self, num_classes: int) -> None:
        """Each class has room in the memory."""
        for name, entries in (("pixel_queue", self.pixel_queue), ("region_queue", self.region_queue)):
            if entries < num_classes:
                raise ValueError(f"Expected `{name}` to be at least the {num_classes} classes, but got {entries}.")

    def build(self, outputs: Outputs) -> None:
        """The student's projection head and the memory; see `DistillationLoss.prepare`."""
        classes = outputs.num_classes
        if not (self.weights["memory_pixel"] or self.weights["memory_region"]):
            return
        student, teacher = outputs.features
        width, device = teacher.shape[1], student.device
        self.projection = nn.Sequential(
            nn.Conv2d(student.shape[1], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        ).to(device)
        if self.weights["memory_pixel"]:
            self.pixels = ClassQueue(classes, self.pixel_queue // classes, width, device)
        if self.weights["memory_region"]:
            self.regions = ClassQueue(classes, self.region_queue // classes, width, device)

    def terms(self, outputs: Outputs, labels: Tensor) -> Terms:
        """See `WeightedTerms.terms`. In training mode the batch enters the memory first."""
        rows = cache(lambda: self._known_rows(outputs, labels))
        return {
            "kd": lambda: pixel_kl(*outputs.logits, temperature=self.temperature),
            "minibatch_pixel": lambda: minibatch_pixel(
                *(F.avg_pool2d(features, self.pool, ceil_mode=True) for features in outputs.features),
                temperature=self.contrast_temperature,
            ),
            "memory_pixel": lambda: self._contrast(self.pixels, PIXEL_CONTRASTS, *rows()),
            "memory_region": lambda: self._contrast(self.regions, REGION_CONTRASTS, *rows()),
        }

    def _contrast(self, queue: ClassQueue | None, contrasts: int, student: Tensor, teacher: Tensor) -> Tensor:
        queue = built(queue, self)
        memory = queue.sample(contrasts // len(queue.entries) + 1)
        return memory_contrast(student, teacher, memory, temperature=self.contrast_temperature)

    def _known_rows(self, outputs: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The student's projected and the teacher's features (M, D) where the class is known."""
        student, teacher = outputs.features
        check_labels(labels, outputs.num_classes, self.ignore_index)
        classes = labels_at(labels, (student.shape[2], student.shape[3]))
        known = classes.flatten() != self.ignore_index
        embedded, target = _rows(built(self.projection, self)(student))[known], F.normalize(_rows(teacher))
        if self.training:
            self._remember(target, classes, outputs.num_classes)
        return embedded, target[known]

    def _remember(self, features: Tensor, classes: Tensor, num_classes: int) -> None:
        """Add features (N h w, D) and the mean of each image's classes (N, h, w) to the memory, of all processes."""
        image = torch.arange(len(classes), device=classes.device).view(-1, 1, 1)
        positions = (classes != self.ignore_index).flatten().nonzero().squeeze(1)
        group = (image * num_classes + classes).flatten()[positions]
        groups = len(classes) * num_classes
        if self.pixels is not None:
            chosen = sample_positions(group, PIXELS_PER_CLASS, groups)
            rank = rank_within(group, groups)[0]
            first = group // num_classes * classes[0].numel()
            where = (first + rank if self.whole_map else positions)[chosen]
            _push(self.pixels, features[where], group[chosen] % num_classes)
        if self.regions is not None:
            means, present = class_means(features[positions], group, groups)
            _push(self.regions, means, present % num_classes)


def _push(queue: ClassQueue, vectors: Tensor, classes: Tensor) -> None:
    queue.push(rows_of_all_processes(vectors), rows_of_all_processes(classes))


def _rows(features: Tensor) -> Tensor:
    """(N, D, h, w) -> (N h w, D)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)
