"""Writes the teacher's cache: the teacher runs on every view of every image, and a shard is written once it is full."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock
from rich.filesize import decimal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image
from bpkd_sdk.data.dataset import default_workers, ignore_interrupts
from bpkd_sdk.data.randomness import seeded
from bpkd_sdk.features import Capture
from bpkd_sdk.files import write_json
from bpkd_sdk.output import SegmentationOutput
from bpkd_sdk.progress import format_seconds, print_line, track, working
from bpkd_sdk.training.accelerator import teacher_dtype
from bpkd_sdk.training.augmentation import Augmentation, Transform
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.records import fingerprint
from bpkd_sdk.training.teacher import Teacher, TeacherModel, teacher_spec
from bpkd_sdk.training.teacher_cache import (
    DEFAULT_VIEWS,
    FACTS_FILE,
    LAYOUT,
    LOCK_FILE,
    SHARD_BYTES,
    CacheFacts,
    TeacherCache,
    compression_error,
    kept_arrays,
    mean_error,
    pixel_grid,
    plain,
    restored_logits,
)

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def plan_cache(
    teacher: TeacherModel,
    identity: dict[str, Any],
    origin: dict[str, Any],
    output: SegmentationOutput,
    dataset: SegmentationDataset,
    crops: dict[str, Any],
    feature: str | None,
    config: TrainingConfig,
    accelerator: Accelerator,
    part: TeacherCache | None,
) -> TeacherCache:
    """Return the cache that the options of a run describe, to be written by `fill_cache`.

    Args:
        teacher: Teacher with all of its views.
        identity: Result of `identify_teacher`.
        origin: Origin of the teacher's weights.
        output: Output of the teacher for crops of this size, in its own classes.
        dataset: Training data.
        crops: Result of `describe_crops`.
        feature: Module path of the feature map to keep; None for none.
        config: Options of the run.
        accelerator: Device and precision.
        part: Unfinished cache in the folder; None if the folder is empty.

    Raises:
        ValueError: If an unfinished cache in the folder belongs to other facts, or `teacher_top_k` is too large.
    """
    count, top_k = output.logits.shape[1], config.teacher_top_k
    if top_k is not None and top_k >= count:
        raise ValueError(f"Expected `teacher_top_k` to be below the teacher's {count} classes, but got {top_k}.")
    arrays = {name: list(array.shape[1:]) for name, array in kept_arrays(output, top_k).items()}
    arrays["pixels"] = list(pixel_grid(torch.zeros(dataset.channels, *crops["crop_size"])).shape)
    facts = CacheFacts(
        layout=LAYOUT,
        teacher=identity,
        origin=origin,
        spec=teacher_spec(teacher).to_dict(),
        precision=_PRECISIONS[teacher_dtype(config, accelerator)] if isinstance(teacher, nn.Module) else "of the file",
        scale=config.teacher_scale,
        augment=list(config.teacher_augment),
        data=data_facts(dataset),
        crops=crops,
        views=config.views or DEFAULT_VIEWS,
        seed=0,
        top_k=top_k,
        num_classes=count,
        feature=feature,
        arrays=arrays,
        shard_views=1,
    )
    folder = Path(str(config.teacher_cache))
    shard_views = max(1, SHARD_BYTES // TeacherCache(folder, facts).view_bytes)
    planned = CacheFacts(**plain(dataclasses.asdict(facts) | {"shard_views": shard_views}))
    if part is None:
        return TeacherCache(folder, planned)
    part.check_same(planned)
    return part


def data_facts(dataset: SegmentationDataset) -> dict[str, Any]:
    """Return the facts of the data that a cache belongs to. The labels are not part of them."""
    return {"images": len(dataset), "fingerprint": fingerprint(dataset, with_labels=False)}


def fill_cache(
    cache: TeacherCache,
    teacher: TeacherModel,
    dataset: SegmentationDataset,
    transform: Transform,
    config: TrainingConfig,
    accelerator: Accelerator,
    *,
    use_labels: bool,
) -> None:
    """Write the shards that are missing. The next call continues after an interruption.

    The processes of a run share the work. If another call writes the same cache, this one waits for it.

    Args:
        cache: Result of `plan_cache`.
        teacher: Teacher with all of its views.
        dataset: Training data.
        transform: Augmentation of the training data, whose geometry makes the views.
        config: Options of the run.
        accelerator: Device, precision and processes.
        use_labels: Whether the choice of the crops depends on the labels, as in `training_loader`.

    Raises:
        OSError: If the disk is too small or full. Shards that are complete remain.
        ValueError: If an output does not fit into float16.
        KeyboardInterrupt: After Ctrl-C, once the shard that is being written is complete.
    """
    with ExitStack() as stack:
        if accelerator.is_main_process:
            cache.folder.mkdir(parents=True, exist_ok=True)
            with working(f"Waiting for another process that writes {cache.folder}"):
                stack.enter_context(FileLock(cache.folder / LOCK_FILE))
            if (existing := TeacherCache.find(cache.folder)) is not None:
                existing.check_same(cache.facts)
            _check_space(cache)
            if existing is None:
                write_json(cache.folder / FACTS_FILE, dataclasses.asdict(cache.facts))
        accelerator.wait_for_everyone()
        missing = cache.missing_shards()
        accelerator.wait_for_everyone()  # before the first process writes
        own = missing[accelerator.process_index :: accelerator.num_processes]
        augmentation = Augmentation(_without_colours(transform), dataset, config, cache.crop_size, cache.spec)
        views = _Views(cache, augmentation, use_labels)
        loader = _loader(views, [number for shard in own for number in cache.views_of(shard)], config, accelerator)
        capture = stack.enter_context(
            Capture(teacher, [cache.facts.feature])
            if isinstance(teacher, nn.Module) and cache.facts.feature
            else Capture(nn.Identity(), [])
        )
        dtype = teacher_dtype(config, accelerator)
        runner = Teacher(teacher, capture, config, accelerator.device, dtype, None)
        try:
            _write_shards(cache, own, _outputs(cache, runner, loader, accelerator.device))
        except KeyboardInterrupt as stop:
            done = cache.num_shards - len(cache.missing_shards())
            raise KeyboardInterrupt(
                f"{done} of {cache.num_shards} parts of the teacher's cache are in {cache.folder}; the same call "
                "continues"
            ) from stop
        accelerator.wait_for_everyone()
    if error := cache.error():
        print_line(
            f"Error of keeping {cache.facts.top_k} of {cache.facts.num_classes} logits: Kullback-Leibler divergence "
            f"{error['over classes']:.2g} over classes and {error['over positions']:.2g} over positions, largest "
            f"difference of a probability {error['largest']:.2g}."
        )


def _check_space(cache: TeacherCache) -> None:
    needed = cache.view_bytes * sum(len(cache.views_of(shard)) for shard in cache.missing_shards())
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise OSError(
            f"The teacher's cache needs {decimal(needed)} for {cache.facts.data['images']} images x "
            f"{cache.facts.views} views, but {cache.folder} has {decimal(free)} free. Pass fewer views, "
            "teacher_top_k=10 if there are many classes, or a folder on another disk."
        )


def _without_colours(transform: Transform) -> Transform:
    return "light" if transform == "paper" else transform


class _Views(Dataset[tuple[Tensor, Tensor]]):
    """The views by their numbers: the padded crop, and some of its pixels."""

    def __init__(self, cache: TeacherCache, augmentation: Augmentation, use_labels: bool) -> None:
        self.cache = cache
        self.augmentation = augmentation
        self.use_labels = use_labels

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        index, view = divmod(number, self.cache.facts.views)
        dataset = self.augmentation.dataset
        with seeded(self.cache.view_seed(index, view), self.augmentation.generators):
            image, label = dataset[index]
            image = checked_image(dataset, index, image)
            image, label = self.augmentation.crop(image, label if self.use_labels else torch.zeros_like(label))
        return self.augmentation.finish(image, label)[0], pixel_grid(image)


def _loader(
    views: _Views, numbers: list[int], config: TrainingConfig, accelerator: Accelerator
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a loader of full batches, because an exported teacher may take no other: the last view is repeated."""
    batch_size = config.batch_size // (config.accumulate * accelerator.num_processes)
    on_gpu = accelerator.device.type == "cuda"
    return DataLoader(
        views,
        sampler=numbers + numbers[-1:] * (-len(numbers) % batch_size),
        batch_size=batch_size,
        num_workers=config.workers if config.workers is not None else (default_workers() if on_gpu else 0),
        pin_memory=on_gpu,
        worker_init_fn=ignore_interrupts,
    )


def _outputs(
    cache: TeacherCache, teacher: Teacher, loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[dict[str, Tensor], dict[str, float]]]:
    """Run the teacher on batches of views; yield their arrays in float16, and the error of leaving out logits.

    After the second batch, a line states the size and the time of all of them.
    """
    started = monotonic()
    facts, (height, width) = cache.facts, cache.crop_size
    for number, (images, grids) in enumerate(track(loader, total=len(loader), description="Teacher's cache")):
        output = teacher(images.to(device, non_blocking=True), {})
        arrays = kept_arrays(output, cache.facts.top_k)
        error = {}
        if cache.facts.top_k is not None:
            error = compression_error(output.logits.float(), restored_logits(arrays, cache.facts))
        for name, array in arrays.items():
            if array.is_floating_point() and not torch.isfinite(array).all():
                raise ValueError(
                    f"The teacher's {name} are not finite in float16, whose largest number is 65504, for some of the "
                    "images. Check the teacher; to distil it without a cache, leave out teacher_cache."
                )
        kept = {name: array.cpu() for name, array in (arrays | {"pixels": grids}).items()}
        seconds, started = monotonic() - started, monotonic()
        if number == min(1, len(loader) - 1):  # the first batch takes longer
            print_line(
                f"Teacher's cache in {cache.folder}: {facts.data['images']} images x {facts.views} views of "
                f"{height}x{width}, {decimal(cache.view_bytes * cache.num_views)}; about "
                f"{format_seconds(seconds * (len(loader) - number))} to write."
            )
        yield kept, error


def _write_shards(
    cache: TeacherCache, shards: list[int], outputs: Iterator[tuple[dict[str, Tensor], dict[str, float]]]
) -> None:
    """Collect the arrays of each shard, and write it while the teacher runs on the next one."""
    kept: dict[str, list[Tensor]] = {}
    errors: list[dict[str, float]] = []
    counts: list[int] = []
    count = 0
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for shard in shards:
            needed = len(cache.views_of(shard))
            while count < needed:
                arrays, error = next(outputs)
                errors.append(error)
                counts.append(len(arrays["pixels"]))
                count += counts[-1]
                for name, array in arrays.items():
                    kept.setdefault(name, []).append(array)
            whole = {name: torch.cat(parts) for name, parts in kept.items()}
            if writing is not None:
                writing.result()
            written = {name: array[:needed] for name, array in whole.items()}
            writing = pool.submit(cache.write_shard, shard, written, mean_error(errors, counts))
            # The last batch may continue in the next shard.
            kept, errors, counts = {name: [array[needed:]] for name, array in whole.items()}, errors[-1:], counts[-1:]
            count -= needed
        if writing is not None:
            writing.result()
