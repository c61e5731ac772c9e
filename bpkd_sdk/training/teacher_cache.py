"""The teacher's cache: the teacher's outputs for a fixed number of views of each training image, in a folder.

A view is a crop of an image: its scale, position and mirroring are drawn with a seed that depends only on the cache,
the image and the number of the view. The colours of a preset are not part of a view: the teacher sees the image as it
is, and the student's colours are drawn anew at every step. Runs of any student, method and seed share the cache, and
the teacher is not loaded for them.

The folder contains

- ``cache.json``: the `CacheFacts`, which state what the outputs belong to;
- ``shard-00000.safetensors`` and so on: the outputs of consecutive views, in float16, at the teacher's own stride. They
  are read through memory maps.

Each array of each view has a checksum, which finds damaged outputs, and each view has a coarse grid of the pixels that
the teacher saw, which finds most changes of images and crops. Both are compared whenever a view is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from bpkd_sdk.class_map import ClassGroups
from bpkd_sdk.data.randomness import mixed_seed
from bpkd_sdk.errors import format_list, list_differences
from bpkd_sdk.features import unwrap
from bpkd_sdk.files import (
    CHECKPOINT_SUFFIX,
    ENGINE_SUFFIXES,
    file_sha256,
    find_network,
    is_pretrained_name,
    parse_record,
    read_json,
)
from bpkd_sdk.models import get_spec, load_model
from bpkd_sdk.models.checkpoint import content_hash, read_header, write_tensors
from bpkd_sdk.output import SegmentationOutput
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.sizes import Size
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.config import TrainingConfig

DEFAULT_VIEWS = 12
FACTS_FILE = "cache.json"
LOCK_FILE = "lock"  # locked by the process that writes the cache
SHARD_BYTES = 64 * 2**20  # a shard is the unit of writing: work on an unfinished one is repeated
LAYOUT = "bpkd-sdk teacher cache/1"

_GRID = 16  # rows and columns of the pixels that are compared
_MAX_DIFFERENCE = 0.004  # largest mean difference of these pixels, as a share of their own range
_ROUNDING = 0.25  # the same for bytes, which another processor may round differently
_VIEWS_STREAM, _ORDER_STREAM = 4, 3  # numbers that separate these random streams from those of the training loader


@dataclass(frozen=True)
class CacheFacts:
    """Facts that identify the outputs in a cache, as plain JSON values.

    Attributes:
        layout: Version of the files.
        teacher: Identity of the teacher, see `identify_teacher`.
        origin: Origin of the teacher's weights, see `bpkd_sdk.training.origin`.
        spec: Facts of the teacher: its classes and its images.
        precision: Data type that the teacher ran in.
        scale: Factor on the size of the crops for the teacher, `TrainingConfig.teacher_scale`.
        augment: Further views that the teacher's outputs are averaged over, `TrainingConfig.teacher_augment`.
        data: Number of images, and the fingerprint of the images.
        crops: Size and random geometry of the crops.
        views: Number of views of each image.
        seed: Seed of the views.
        top_k: Number of largest logits that are kept for each position; None for all.
        num_classes: Number K of the teacher's logits.
        feature: Module path of the feature map that is kept; None for none.
        arrays: Shape of each array of one view.
        shard_views: Number of views in each shard but the last.
    """

    layout: str
    teacher: dict[str, Any]
    origin: dict[str, Any]
    spec: dict[str, Any]
    precision: str
    scale: float
    augment: list[Any]
    data: dict[str, Any]
    crops: dict[str, Any]
    views: int
    seed: int
    top_k: int | None
    num_classes: int
    feature: str | None
    arrays: dict[str, list[int]]
    shard_views: int


def identify_teacher(source: nn.Module | str | Path | Runtime, config: TrainingConfig) -> dict[str, Any]:
    """Return the SHA-256 of a teacher's weights or of its file, and its normalisation.

    A ``.safetensors`` checkpoint and an exported file are not loaded for this. The class of a module is not compared.

    Args:
        source: Teacher, as it was passed to `distill`.
        config: Options of the run: the normalisation of an ONNX file that does not state its own.
    """
    if not isinstance(source, (nn.Module, Runtime)) and not is_pretrained_name(source):
        path = Path(find_network(source))
        if path.suffix.lower() == CHECKPOINT_SUFFIX:
            header = read_header(path)
            return {
                "sha256": header.get("sha256"),
                **_normalisation(NetworkSpec.from_dict(header["network"], str(path))),
            }
        if path.suffix.lower() in (*ENGINE_SUFFIXES, ".onnx"):
            weights = path.with_name(f"{path.name}.data")  # torch can write the weights of an ONNX file to this one
            hashes = [file_sha256(part) for part in (path, weights) if part.is_file()]
            return {"sha256": " ".join(hashes), "mean": config.teacher_mean, "std": config.teacher_std}
    if isinstance(source, Runtime):
        if not Path(source.name).is_file():
            raise ValueError(f"The cache needs a teacher that can be identified, but {source.name} is not a file.")
        return {"sha256": file_sha256(source.name), "mean": None, "std": None}
    network = source if isinstance(source, nn.Module) else load_model(source)
    return {"sha256": content_hash(unwrap(network).state_dict()), **_normalisation(get_spec(network))}


def _normalisation(spec: NetworkSpec) -> dict[str, Any]:
    return {"mean": list(spec.mean), "std": list(spec.std)}


class TeacherCache:
    """A folder of a teacher's outputs. Networks are not needed to read it.

    Args:
        folder: Folder of the cache.
        facts: Teacher, data, crops and options of the outputs.
    """

    def __init__(self, folder: Path, facts: CacheFacts) -> None:
        self.folder = folder
        self.facts = facts
        text = json.dumps(dataclasses.asdict(facts), sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._opened: dict[int, Any] = {}

    @classmethod
    def find(cls, folder: str | Path) -> TeacherCache | None:
        """Open the cache in a folder; None if the folder does not exist or is empty.

        Raises:
            ValueError: If the folder contains something else, or a file of the cache is damaged.
        """
        folder = Path(folder)
        path = folder / FACTS_FILE
        if not path.is_file():
            if folder.exists() and (not folder.is_dir() or any(path.name != LOCK_FILE for path in folder.iterdir())):
                raise ValueError(
                    f"{folder} is not a teacher's cache: it has no {FACTS_FILE}. Pass a new or an empty folder as "
                    "teacher_cache."
                )
            return None
        facts = parse_record(CacheFacts, read_json(path), str(path))
        if facts.layout != LAYOUT:
            raise ValueError(f"{path} has the layout {facts.layout!r}, and this version of bpkd-sdk reads {LAYOUT!r}.")
        cache = cls(folder, facts)
        for shard in range(cache.num_shards):
            if cache.shard_path(shard).exists():
                cache._shard(shard)
        cache._opened.clear()
        return cache

    @property
    def is_complete(self) -> bool:
        """Whether all shards have been written."""
        return not self.missing_shards()

    @property
    def spec(self) -> NetworkSpec:
        """Facts of the teacher: its classes and its images."""
        return NetworkSpec.from_dict(self.facts.spec, str(self.folder / FACTS_FILE))

    @property
    def crop_size(self) -> Size:
        """(height, width) of the crops."""
        height, width = self.facts.crops["crop_size"]
        return height, width

    @property
    def num_views(self) -> int:
        """Number of views of all images together."""
        views: int = self.facts.data["images"] * self.facts.views
        return views

    @property
    def num_shards(self) -> int:
        """Number of shards of the finished cache."""
        return math.ceil(self.num_views / self.facts.shard_views)

    @property
    def view_bytes(self) -> int:
        """Size of one view in bytes."""
        sizes = {name: math.prod(shape) for name, shape in self.facts.arrays.items()}
        return sum(size * array_dtype(name, self.facts).itemsize + 8 for name, size in sizes.items())

    def shard_path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"shard-{shard:05}{CHECKPOINT_SUFFIX}"

    def views_of(self, shard: int) -> range:
        """Return the numbers of the views in a shard; view v of image i has the number i * views + v."""
        first = shard * self.facts.shard_views
        return range(first, min(first + self.facts.shard_views, self.num_views))

    def missing_shards(self) -> list[int]:
        """Return the shards that have not been written yet."""
        return [shard for shard in range(self.num_shards) if not self.shard_path(shard).is_file()]

    def adopt_options(self, config: TrainingConfig) -> TrainingConfig:
        """Return the options of a run, in which those of the cache replace default values."""
        facts, crops = self.facts, self.facts.crops
        kept: dict[str, Any] = {
            "teacher_scale": facts.scale,
            "teacher_augment": tuple(facts.augment),
            "views": facts.views,
            "teacher_top_k": facts.top_k,
            **{name: crops[name] for name in ("scale", "base_size", "max_class_share", "crop_size") if name in crops},
        }
        changed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in kept.items()
            if getattr(config, name) == getattr(TrainingConfig, name)
        }
        return dataclasses.replace(config, **changed)

    def check_run(
        self, teacher: Mapping[str, Any], data: Mapping[str, Any], crops: Mapping[str, Any], config: TrainingConfig
    ) -> None:
        """Check that the outputs are those of a run's teacher for the crops of a run.

        Args:
            teacher: Result of `identify_teacher`.
            data: Number of images, and their fingerprint.
            crops: Size and random geometry of the crops.
            config: Options of the run, see `adopt_options`.

        Raises:
            ValueError: If anything differs; the message names it.
        """
        known = plain(dataclasses.asdict(self.facts))
        now = {
            "teacher": teacher,
            "data": data,
            "crops": crops,
            "scale": config.teacher_scale,
            "augment": config.teacher_augment,
            "views": config.views,
            "top_k": config.teacher_top_k,
        }
        now |= {} if config.teacher_feature is None else {"feature": config.teacher_feature}
        now |= {} if config.teacher_precision is None else {"precision": config.teacher_precision}
        self._refuse(list_differences({name: known[name] for name in now}, plain(now)))

    def check_same(self, facts: CacheFacts) -> None:
        """Raise ValueError if this unfinished cache belongs to other facts than those that are now to be written."""
        known, now = (plain(dataclasses.asdict(each) | {"origin": None}) for each in (self.facts, facts))
        self._refuse(list_differences(known, now))

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise ValueError(
                f"The teacher's cache in {self.folder} does not belong to this run:\n{format_list(differences)}\n"
                "Pass the same teacher, data and options, or another folder as teacher_cache."
            )

    def example(self) -> SegmentationOutput:
        """Return an output of zeros with the shapes of one view."""
        logits = torch.zeros(1, self.facts.num_classes, *self.facts.arrays[logits_array(self.facts)][1:])
        features = {self.facts.feature: torch.zeros(1, *self.facts.arrays["features"])} if self.facts.feature else {}
        return SegmentationOutput(logits, features)

    def view_seed(self, index: int, view: int) -> int:
        """Return the seed of the geometry of a view of an image."""
        return mixed_seed(self.facts.seed, _VIEWS_STREAM, index, view)

    def choose_view(self, draw: int, index: int, seed: int) -> int:
        """Return the view of an image for a draw: all views in turn, one in each epoch, from a random first one.

        Args:
            draw: Number of samples that were drawn before in the run.
            index: Image.
            seed: Seed of the run.
        """
        epoch = draw // int(self.facts.data["images"])
        return (epoch + mixed_seed(seed, _ORDER_STREAM, index)) % self.facts.views

    def read(self, index: int, view: int, image: Tensor, *, with_features: bool) -> dict[str, Tensor]:
        """Read the outputs for a view.

        Args:
            index: Image.
            view: View of the image.
            image: The view, before its colours are changed and before it is padded.
            with_features: Whether the feature map is read too.

        Returns:
            The arrays in float16 by name, as `restored_logits` takes them.

        Raises:
            ValueError: If the outputs are damaged, or were computed for other pixels.
        """
        number = index * self.facts.views + view
        shard, row = divmod(number, self.facts.shard_views)
        file = self._shard(shard)
        arrays = {}
        for name in self.facts.arrays:
            if name == "features" and not with_features:
                continue
            array: Tensor = file.get_slice(name)[row : row + 1][0]
            if checksum(array) != file.get_slice(f"{name}.crc32")[row : row + 1].item():
                raise ValueError(
                    f"The teacher's cache is damaged: the {name} of view {view} of image {index} in "
                    f"{self.shard_path(shard)} do not have their checksum. Delete this file, and repeat the call, "
                    "which writes it again."
                )
            arrays[name] = array
        self._check_pixels(arrays.pop("pixels"), image, f"view {view} of image {index}")
        return arrays

    def _check_pixels(self, seen: Tensor, image: Tensor, name: str) -> None:
        difference = (pixel_grid(image).double() - seen.double()).abs().mean().item()
        allowed = _MAX_DIFFERENCE * (seen.max().item() - seen.min().item())
        if difference > allowed + (_ROUNDING if seen.dtype == torch.uint8 else 0):
            raise ValueError(
                f"The teacher's outputs in {self.folder} for {name} belong to other pixels: they differ by "
                f"{difference:.3g} on average. The images, or the transform that crops them, have changed since. Pass "
                "another folder as teacher_cache."
            )

    def _shard(self, shard: int) -> Any:
        """Open a shard as a memory map, and check its header."""
        if shard not in self._opened:
            path = self.shard_path(shard)
            problem, count = None, len(self.views_of(shard))
            if not path.is_file():
                raise ValueError(f"The teacher's cache lacks {path}. Repeat the call, which writes the file again.")
            try:
                file: Any = safetensors.safe_open(path, framework="pt", device="cpu")
                header = json.loads((file.metadata() or {}).get("bpkd", "{}"))
                if (header.get("cache"), header.get("shard")) != (self.digest, shard):
                    problem = "it belongs to another cache"
                elif any(file.get_slice(name).get_shape()[0] != count for name in self.facts.arrays):
                    problem = "it has another number of views"
            except (safetensors.SafetensorError, ValueError, OSError) as error:
                problem = str(error)
            if problem:
                raise ValueError(
                    f"{path} of the teacher's cache cannot be used: {problem}. Delete the file, and repeat the call, "
                    "which writes it again."
                )
            self._opened[shard] = file
        return self._opened[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a worker process, which opens the shards by itself."""
        return {**self.__dict__, "_opened": {}}

    def write_shard(self, shard: int, arrays: Mapping[str, Tensor], error: Mapping[str, float]) -> None:
        """Write a shard with its checksums, atomically.

        Args:
            shard: Number of the shard.
            arrays: Arrays of all of its views, by name.
            error: Result of `compression_error`, averaged over the views; empty if all logits are kept.
        """
        checksums = {
            f"{name}.crc32": torch.tensor([checksum(view) for view in array]) for name, array in arrays.items()
        }
        header = {"cache": self.digest, "shard": shard, "error": dict(error)}
        write_tensors(self.shard_path(shard), {**arrays, **checksums}, header)

    def error(self) -> dict[str, float]:
        """Return the error of the compression, averaged over all shards; empty if all logits are kept."""
        errors = [json.loads(self._shard(shard).metadata()["bpkd"])["error"] for shard in range(self.num_shards)]
        return mean_error(errors, [len(self.views_of(shard)) for shard in range(self.num_shards)])


class CachedTeacher:
    """A teacher whose outputs are read from its cache, as they come with a batch.

    Args:
        cache: Cache of the teacher.
        classes: The teacher's classes for each class of the data; None for the same classes.
    """

    def __init__(self, cache: TeacherCache, classes: ClassGroups | None) -> None:
        self.facts = cache.facts
        self.classes = classes

    def __call__(self, images: Tensor, kept: Mapping[str, Tensor]) -> SegmentationOutput:
        """Return the output of the teacher, as `bpkd_sdk.training.teacher.Teacher` does.

        Args:
            images: (N, channels, h, w); not used.
            kept: Arrays of the cache for these images, on the device.
        """
        logits = restored_logits(kept, self.facts)
        features = {str(self.facts.feature): kept["features"].float()} if "features" in kept else {}
        return SegmentationOutput(logits if self.classes is None else self.classes.merge(logits, others=True), features)


def kept_arrays(output: SegmentationOutput, top_k: int | None) -> dict[str, Tensor]:
    """Return the arrays that the cache keeps of an output, in float16.

    With `top_k`, each position keeps its k largest logits and their classes. All others get one logit, so chosen that
    they keep their share of the probability together: r = log(sum of exp(z_j)) - log(K - k).

    Args:
        output: Output of the teacher in its own classes, logits (N, K, h, w), and at most one feature map.
        top_k: Number of logits that are kept, below K; None for all.
    """
    logits = output.logits.float()
    arrays = {"features": next(iter(output.features.values())).half()} if output.features else {}
    if top_k is None:
        return {"logits": logits.half(), **arrays}
    count = logits.shape[1]
    values, classes = logits.topk(top_k, dim=1)
    others = logits.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True) - math.log(count - top_k)
    return {"values": values.half(), "others": others.half(), "classes": classes.to(class_dtype(count)), **arrays}


def restored_logits(arrays: Mapping[str, Tensor], facts: CacheFacts) -> Tensor:
    """Return the float32 logits (N, K, h, w) that the arrays of a batch keep."""
    if facts.top_k is None:
        return arrays["logits"].float()
    others = arrays["others"].float().repeat(1, facts.num_classes, 1, 1)
    return others.scatter_(1, arrays["classes"].long(), arrays["values"].float())


def compression_error(logits: Tensor, restored: Tensor) -> dict[str, float]:
    """Measure the error of compressed logits (N, K, h, w).

    Returns:
        "over classes": mean Kullback-Leibler divergence of the softmax over classes, in nats, which losses per pixel
        compare; "over positions": the same of each class's softmax over positions, which CWD and BPKD's body term
        compare; "largest": the largest difference of a probability.
    """
    log_p, log_q = logits.log_softmax(1), restored.log_softmax(1)
    p_space, q_space = logits.flatten(2).log_softmax(2), restored.flatten(2).log_softmax(2)
    return {
        "over classes": (log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
        "over positions": (p_space.exp() * (p_space - q_space)).sum(2).mean().item(),
        "largest": (log_p.exp() - log_q.exp()).abs().max().item(),
    }


def mean_error(errors: Sequence[Mapping[str, float]], counts: Sequence[int]) -> dict[str, float]:
    """Return the mean of results of `compression_error`, weighted by their numbers of views, and the largest "largest".

    The result is empty if the errors are.
    """
    total = sum(counts)
    means = {
        name: math.fsum(error[name] * count for error, count in zip(errors, counts, strict=True)) / total
        for name in errors[0]
    }
    return means | ({"largest": max(error["largest"] for error in errors)} if means else {})


def class_dtype(count: int) -> torch.dtype:
    """Return the integer type of class ids below a count."""
    return torch.uint8 if count <= 256 else torch.int16


def array_dtype(name: str, facts: CacheFacts) -> torch.dtype:
    """Return the data type of an array."""
    if name == "pixels":
        return torch.uint8 if NetworkSpec.from_dict(facts.spec, "").pixels.is_uint8 else torch.float32
    return class_dtype(facts.num_classes) if name == "classes" else torch.float16


def logits_array(facts: CacheFacts) -> str:
    """Return the name of the array with the resolution of the logits."""
    return "logits" if facts.top_k is None else "values"


def pixel_grid(image: Tensor) -> Tensor:
    """Return 16x16 pixels of an image (channels, H, W), spread evenly over it."""
    rows, columns = (torch.linspace(0, side - 1, _GRID).round().long() for side in image.shape[1:])
    return image[:, rows][:, :, columns].contiguous()


def checksum(array: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(array.contiguous().numpy().tobytes())


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as JSON restores them: lists for tuples."""
    restored: dict[str, Any] = json.loads(json.dumps(facts))
    return restored
