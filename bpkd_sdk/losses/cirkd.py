"""CIRKD: cross-image relational distillation (Yang et al., CVPR 2022, arXiv 2204.06986).

The method distils relations between positions of different images: the similarities of a position's feature to all
positions of every image in the batch, and to a memory of features and class means from earlier batches. A softmax makes
these similarities distributions, and the student is trained to match the teacher's distributions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.boundary import check_labels
from bpkd_sdk.losses.divergence import pixel_kl
from bpkd_sdk.losses.method import OutputPair, WeightedLoss, check_positive, require_prepared
from bpkd_sdk.losses.similarity import MIN_TEMPERATURE, contrast_kl, relation_kl
from bpkd_sdk.losses.tensors import downsample_labels, gather_rows

PIXEL_CONTRASTS, REGION_CONTRASTS = 4096, 1024  # memory entries per step, over all classes, as in the official code
PIXELS_PER_CLASS = 16  # positions of a class and image that enter the memory in one step


def minibatch_pixel(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Compute the mini-batch term: KL of similarities, mean over positions and over all ordered pairs of images.

    For images i and j (including j = i), each position of i has a distribution over the positions of j: the softmax of
    the cosines divided by `temperature`. This is equation (1) of docs/methods/cirkd.md.

    Args:
        student: Features (N, D_S, h, w), float32 or float64.
        teacher: Features (N, D_T, h, w); they receive no gradient.
        temperature: tau, 0.025 or above.

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> student = torch.ones(2, 2, 1, 2)
        >>> teacher = torch.eye(2).view(1, 2, 1, 2).repeat(2, 1, 1, 1)
        >>> round(minibatch_pixel(student, teacher, temperature=1.0).item(), 4)
        0.1109
    """
    s, t = (F.normalize(features.flatten(2).mT, dim=2) for features in (student, teacher))
    return relation_kl(s, t, temperature=temperature)


def memory_contrast(student: Tensor, teacher: Tensor, memory: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Compute a memory term: KL of the distributions over the memory's entries, mean over positions.

    This is equation (2) of docs/methods/cirkd.md.

    Args:
        student: Features (M, D), projected to the teacher's channels, float32 or float64.
        teacher: Features (M, D); they receive no gradient.
        memory: Unit vectors (K, D); they receive no gradient.
        temperature: tau, above 0.

    Returns:
        Scalar, 0 or above; 0 with zero gradient if M is 0.

    Examples:
        >>> student, teacher = torch.ones(2, 2), torch.eye(2)
        >>> round(memory_contrast(student, teacher, memory=torch.eye(2), temperature=1.0).item(), 4)
        0.1109
    """
    return contrast_kl(F.normalize(student), F.normalize(teacher), memory, temperature=temperature)


class CIRKDLoss(WeightedLoss):
    """Cross-image relational distillation: {"kd", "minibatch_pixel", "memory_pixel", "memory_region"}.

    The memory belongs to the method: it is part of the state dict, and `pixel_queue` and `region_queue` bound its size.
    The label of a position is the floor-nearest one, as in the authors' code: at stride s it lies (s - 1) / 2 pixels
    above and to the left of the position's centre, see `bpkd_sdk.losses.tensors.downsample_labels`.

    Args:
        num_classes: C, the number of classes; None takes it from the first logits.
        kd_weight: Weight of `pixel_kl`; 0 leaves the term out. The default is that of `CanonicalKDLoss`; the official
            weight is 1.
        minibatch_weight: Weight of `minibatch_pixel`; 0 leaves the term out. With the official 1 the term was 0.5
            (student trained alone before) to 0.7 (fresh student) on CamVid.
        pixel_weight: Weight of the term on the memory of single positions; 0 leaves the term out. The default is ten
            times the official 0.1, which is known to have almost no effect. With 1 the term was 3 at first on CamVid,
            and 0.8 after 20 steps of the projection.
        region_weight: Weight of the term on the memory of class means; 0 leaves the term out. The official weight and
            the sizes are those of `pixel_weight`.
        temperature: T of the term on logits, above 0.
        contrast_temperature: tau of all softmaxes over similarities, 0.025 or above.
        pool: Side of the cells, in positions, over which the mini-batch term averages features first. Time and memory
            of that term (two matrices of all pairs of positions of two images) fall with pool^4.
        pixel_queue: Maximum number of entries in the memory of positions, over all classes. The official 20,000 per
            class take 6 GB for 150 classes and a teacher of 512 channels; 40,960 entries take 84 MB.
        region_queue: Maximum number of entries in the memory of class means, over all classes. The official number is
            2,000 per class.
        whole_map: Whether the positions that enter the memory for a class of n positions are drawn from the first n
            positions of the image, of any class, as in the official code. False draws them from the positions of the
            class.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
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
        self.check_num_classes(num_classes or 1)

    @classmethod
    def paper(cls, num_classes: int, *, ignore_index: int = 255) -> CIRKDLoss:
        """Create the method with the setting of the first release.

        The weights are 1, 1, 0.1 and 0.1, features are not pooled, the memory has 20,000 and 2,000 entries per class,
        and `whole_map` is True.
        """
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

    def check_num_classes(self, num_classes: int) -> None:
        """Raise ValueError if the memory has no room for every class."""
        for name, entries in (("pixel_queue", self.pixel_queue), ("region_queue", self.region_queue)):
            if entries < num_classes:
                raise ValueError(
                    f"Expected `{name}` to be at least {num_classes}, one entry for each class, but got {entries}."
                )

    def build(self, outputs: OutputPair) -> None:
        """Build the student's projection head and the memory, see `DistillationLoss.prepare`."""
        num_classes = outputs.num_classes
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
            self.pixels = ClassQueue(num_classes, self.pixel_queue // num_classes, width, device)
        if self.weights["memory_region"]:
            self.regions = ClassQueue(num_classes, self.region_queue // num_classes, width, device)

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms, see `WeightedLoss.terms`. In training mode the batch enters the memory first."""
        terms = {}
        if self.weights["kd"]:
            terms["kd"] = pixel_kl(*outputs.logits, temperature=self.temperature)
        if self.weights["minibatch_pixel"]:
            pooled = (F.avg_pool2d(features, self.pool, ceil_mode=True) for features in outputs.features)
            terms["minibatch_pixel"] = minibatch_pixel(*pooled, temperature=self.contrast_temperature)
        if self.weights["memory_pixel"] or self.weights["memory_region"]:
            student, teacher = self._labelled_rows(outputs, labels)
            if self.weights["memory_pixel"]:
                terms["memory_pixel"] = self._contrast(student, teacher, self.pixels, PIXEL_CONTRASTS)
            if self.weights["memory_region"]:
                terms["memory_region"] = self._contrast(student, teacher, self.regions, REGION_CONTRASTS)
        return terms

    def _contrast(self, student: Tensor, teacher: Tensor, queue: ClassQueue | None, contrasts: int) -> Tensor:
        queue = require_prepared(queue, self)
        memory = queue.sample(contrasts // len(queue.entries) + 1)
        return memory_contrast(student, teacher, memory, temperature=self.contrast_temperature)

    def _labelled_rows(self, outputs: OutputPair, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's projected and the teacher's features (M, D) at the positions that are not void."""
        student, teacher = outputs.features
        check_labels(labels, outputs.num_classes, self.ignore_index)
        classes = downsample_labels(labels, (student.shape[2], student.shape[3]))
        labelled = classes.flatten() != self.ignore_index
        embedded = _rows(require_prepared(self.projection, self)(student))[labelled]
        target = F.normalize(_rows(teacher))
        if self.training:
            self._remember(target, classes, outputs.num_classes)
        return embedded, target[labelled]

    def _remember(self, features: Tensor, classes: Tensor, num_classes: int) -> None:
        """Add features of all processes to the memory.

        Args:
            features: (N h w, D) unit vectors of the teacher.
            classes: (N, h, w) int64.
            num_classes: C.
        """
        image = torch.arange(len(classes), device=classes.device).view(-1, 1, 1)
        positions = (classes != self.ignore_index).flatten().nonzero().squeeze(1)
        group = (image * num_classes + classes).flatten()[positions]
        groups = len(classes) * num_classes
        if self.pixels is not None:
            chosen = sample_positions(group, PIXELS_PER_CLASS, groups)
            rank = rank_within(group, groups)[0]
            first = group // num_classes * classes[0].numel()
            source = (first + rank if self.whole_map else positions)[chosen]
            _push(self.pixels, features[source], group[chosen] % num_classes)
        if self.regions is not None:
            means, present = class_means(features[positions], group, groups)
            _push(self.regions, means, present % num_classes)


def _push(queue: ClassQueue, vectors: Tensor, classes: Tensor) -> None:
    queue.push(gather_rows(vectors), gather_rows(classes))


def _rows(features: Tensor) -> Tensor:
    """Reshape (N, D, h, w) to (N h w, D)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class ClassQueue(nn.Module):
    """A ring buffer of unit vectors for each class, filled with random vectors at first.

    The official code overwrites the end of a ring and starts over if new entries do not fit before it. Here writing
    continues at the start of the ring, so that all entries are replaced at the same age.

    Args:
        num_classes: C, the number of rings.
        size: Number of entries per class.
        channels: D, the length of the vectors.
        device: Device of the buffers.

    Attributes:
        entries: (C, size, D) float32 unit vectors, part of the state dict.
        pointer: (C,) int64, the slot that is overwritten next, part of the state dict.

    Examples:
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
        """Add vectors in their order; they replace the oldest entries.

        Args:
            vectors: (M, D) unit vectors.
            classes: (M,) int64 in [0, C).
        """
        num_classes, size = self.entries.shape[:2]
        rank, count = rank_within(classes, num_classes)
        slot = (self.pointer[classes] + rank) % size
        newest = rank >= count[classes] - size
        self.entries[classes[newest], slot[newest]] = vectors[newest].to(self.entries.dtype)
        self.pointer.add_(count).remainder_(size)

    def sample(self, per_class: int) -> Tensor:
        """Draw random slots, the same for every class.

        Args:
            per_class: Number of slots; all slots if the ring has fewer.

        Returns:
            (C * per_class, D) unit vectors.
        """
        size = self.entries.shape[1]
        slots = torch.randperm(size, device=self.entries.device)[:per_class]
        return self.entries[:, slots].flatten(0, 1)


def rank_within(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Count, for each element, the elements of the same group before it.

    Args:
        group: Group of each element, (M,) int64 in [0, num_groups).
        num_groups: Number of groups.

    Returns:
        Ranks (M,) and sizes of the groups (num_groups,), int64.

    Examples:
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
    """Compute the mean direction of each group that has a member.

    Args:
        vectors: (M, D).
        group: Group of each vector, (M,) int64 in [0, num_groups).
        num_groups: Number of groups.

    Returns:
        Unit vectors (G, D) of the G groups that have a member, and these groups (G,) in ascending order.

    Examples:
        >>> means, groups = class_means(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([2, 2]), 4)
        >>> means.tolist(), groups.tolist()
        ([[1.0, 0.0]], [2])
    """
    sums = vectors.new_zeros(num_groups, vectors.shape[1]).index_add_(0, group, vectors)
    present = torch.bincount(group, minlength=num_groups).nonzero().squeeze(1)
    return F.normalize(sums[present]), present


def sample_positions(group: Tensor, per_group: int, num_groups: int) -> Tensor:
    """Draw random members of each group.

    Args:
        group: Group of each element, (M,) int64 in [0, num_groups).
        per_group: Number of members to draw from each group; all members if the group has fewer.
        num_groups: Number of groups.

    Returns:
        Indices into `group`, (K,) int64, ordered by group.

    Examples:
        >>> group = torch.tensor([1, 0, 1, 1])
        >>> group[sample_positions(group, per_group=2, num_groups=2)].tolist()
        [0, 1, 1]
    """
    shuffled = torch.randperm(len(group), device=group.device)
    chosen = shuffled[rank_within(group[shuffled], num_groups)[0] < per_group]
    return chosen[group[chosen].argsort(stable=True)]
