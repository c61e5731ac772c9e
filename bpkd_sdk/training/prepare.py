"""Preparation of a run: data, networks and folder are opened and checked before anything is trained or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from bpkd_sdk.class_map import ClassGroups, ClassMap
from bpkd_sdk.data import DatasetSubset, SegmentationDataset, as_dataset, open_dataset
from bpkd_sdk.data.adapt import AdaptedDataset
from bpkd_sdk.data.checks import check_for_training, check_reports, check_samples, inspect_sample, inspect_samples
from bpkd_sdk.errors import format_list, warn
from bpkd_sdk.evaluation import EvaluationProtocol, evaluate
from bpkd_sdk.features import feature_path
from bpkd_sdk.files import check_no_run, is_pretrained_name
from bpkd_sdk.losses import Method, create_method
from bpkd_sdk.models import get_spec
from bpkd_sdk.output import comparable_outputs
from bpkd_sdk.pixels import check_pixels
from bpkd_sdk.progress import print_fact, working
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.training.accelerator import broadcast_from_main, create_accelerator, teacher_dtype
from bpkd_sdk.training.augmentation import Augmentation, Transform, check_transform, describe_crops
from bpkd_sdk.training.augmentation_check import check_augmentation, check_validation_data
from bpkd_sdk.training.cache_writer import data_facts, fill_cache, plan_cache
from bpkd_sdk.training.compatibility import (
    check_trainable,
    describe_left_out,
    feature_paths,
    in_classes_of_data,
    match_student,
    match_teacher,
    run_on_black_crops,
    student_order,
)
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.crop import default_crop
from bpkd_sdk.training.freezing import find_encoder
from bpkd_sdk.training.label_losses import balanced_class_weights, check_class_weights
from bpkd_sdk.training.monitor import check_trackers
from bpkd_sdk.training.normalization import check_teacher_images, choose_spec, using_spec
from bpkd_sdk.training.origin import check_names, describe_origin
from bpkd_sdk.training.records import Task
from bpkd_sdk.training.state import STATE_FILE, check_checkpoint
from bpkd_sdk.training.summary import describe_run
from bpkd_sdk.training.teacher import NetworkSource, TeacherModel, add_views, is_name, open_network, open_teacher
from bpkd_sdk.training.teacher_cache import TeacherCache, identify_teacher
from bpkd_sdk.training.teacher_check import warn_about_teacher

# Name or path of a data set, any data set that `as_dataset` accepts, a mapping of splits, or a pair (train, val).
DataSource = Any
VALIDATION_SPLITS = ("val", "validation", "valid")


def prepare(
    teacher: NetworkSource | Runtime | None,
    student: NetworkSource,
    method: Method | None,
    data: DataSource,
    config: TrainingConfig,
    protocol: EvaluationProtocol,
    output_dir: str | Path | None,
    resume: bool,
    class_names: Sequence[str] | None = None,
    transform: Transform = "paper",
    class_map: ClassMap | None = None,
) -> Task:
    """Open and check everything that a run needs; arguments and errors as `bpkd_sdk.distill`.

    The checks go from the cheapest to those that read all of the data. The student is changed, and the folder of the
    run created, only after all of them have passed.
    """
    if not isinstance(protocol, EvaluationProtocol):
        raise TypeError(f"Expected `protocol` to be an EvaluationProtocol, but got {type(protocol).__name__}.")
    if output_dir is not None and not resume:
        check_no_run(output_dir)
    check_trackers(config.trackers)
    check_transform(transform, config)
    sources = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    check_names(sources, config.backbone_weights)
    accelerator = create_accelerator(config)
    train_set, val_set = _open_data(data, class_names, config)
    check_class_weights(train_set, config)
    torch.manual_seed(config.seed)
    opened = teacher_model = classes = None
    cache = part = None
    identity = dict[str, Any]()
    if teacher is not None and config.teacher_cache is not None:
        identity, part = _identify(teacher, config), TeacherCache.find(config.teacher_cache)
        if part is not None:
            config = part.adopt_options(config)
            cache = part if part.is_complete else None
    if teacher is not None and (cache is None or config.labels == "teacher"):  # which validates with the teacher
        opened = open_teacher(teacher, train_set.num_classes, config, accelerator.device, train_set.pixels)
        teacher_model = add_views(opened, config.teacher_scale, config.teacher_augment)
    taught_by = cache or opened
    if taught_by is not None:
        classes = match_teacher(taught_by, train_set, config, class_map)
    torch.manual_seed(config.seed)  # whether or not the teacher was opened, the student has the same random weights
    network = open_network(student, train_set.num_classes, config.backbone_weights, train_set.pixels)
    origin = {"student": describe_origin(student, network)}
    if cache is not None:
        origin["teacher"] = cache.facts.origin
    elif teacher is not None and opened is not None:
        origin["teacher"] = describe_origin(teacher, opened)
    choices: dict[str, str] = {}
    if val_set is None:
        choices["Validation"] = "No validation data: there will be no scores. Pass data=(train, val) for scores."
    if class_map is None and classes is not None and classes.class_map is not None:
        choices["Teacher's classes"] = describe_left_out(classes, train_set)
    for dataset in filter(None, (train_set, val_set)):
        _check_first_sample(dataset, config)
    spec, measured = choose_spec(network, train_set, config.seed)
    if measured:
        choices["Images"] = measured
    if taught_by is not None:
        check_teacher_images(taught_by, train_set)

    if config.freeze_encoder_steps:
        find_encoder(network)
        if origin["student"].keys() == {"network", "built"}:
            warn(
                f"freeze_encoder_steps={config.freeze_encoder_steps} freezes random weights: the encoder of {student} "
                "is not pretrained. Pass backbone_weights='imagenet', or leave freeze_encoder_steps out."
            )
    networks = [model for model in (network, teacher_model) if model is not None]
    augmentation = Augmentation(transform, train_set, config)
    crop_size = config.crop_size or augmentation.result_size()
    if crop_size is None:
        crop_size, choices["Crops"] = default_crop(train_set, networks, config.base_size)
    loss = None
    if method is not None:
        count = train_set.num_classes if classes is None else len(classes.taught)
        loss = create_method(method, count, ignore_index=train_set.ignore_index)
    features = feature_paths(network, part or teacher_model, loss, config)
    images = config.batch_size // (config.accumulate * accelerator.num_processes)
    raw = None if cache is None else cache.example()
    kept_feature = features[1] if part is None else part.facts.feature
    with working("Running the networks on black images"):
        student_output = run_on_black_crops("student", network, features[0], train_set, crop_size, images)
        if teacher_model is not None:
            raw = run_on_black_crops("teacher", teacher_model, kept_feature, train_set, crop_size, images)
    student_output = in_classes_of_data("student", student_output, train_set, None)
    check_trainable(network, student_output.logits)
    if loss is not None and raw is not None:
        outputs = student_output, in_classes_of_data("teacher", raw, train_set, classes)
        loss.prepare(*comparable_outputs(*(outputs if classes is None else map(classes.select, outputs))))
    labels_from_teacher = _labels_from_teacher(train_set, val_set, classes, config)
    if config.teacher_cache is not None:
        crops = describe_crops(transform, config, crop_size)
        if cache is not None:
            cache.check_run(identity, data_facts(train_set), crops, config)
        elif teacher_model is not None and raw is not None:
            cache = plan_cache(
                teacher_model,
                identity,
                origin["teacher"],
                raw,
                train_set,
                crops,
                kept_feature,
                config,
                accelerator,
                part,
            )
            config = cache.adopt_options(config)

    order = student_order(network, train_set, config)
    if accelerator.is_main_process:  # the other processes wait in _open_folder
        largest = _check_data(train_set, val_set, config, need_labels=not labels_from_teacher)
        if config.check_data:
            check_augmentation(Augmentation(transform, train_set, config, crop_size, spec))
        if opened is not None and config.check_teacher:
            _check_teacher(opened, train_set, crop_size, classes, config, accelerator)
        if val_set is not None:
            reference = teacher_model if labels_from_teacher else None
            sample = DatasetSubset(val_set, [largest])
            reference_map = classes.class_map if classes is not None and labels_from_teacher else None
            with using_spec(network, spec), working("Evaluating one image"):
                _try_validation(network, sample, reference, reference_map, config, protocol, accelerator.device)

    class_weights = None if config.class_weights == "balanced" else config.class_weights
    if config.class_weights == "balanced":
        counted = None
        if accelerator.is_main_process:
            counted = balanced_class_weights(train_set)
            weights = zip(train_set.class_names, counted, strict=True)
            choices["Class weights"] = ", ".join(f"{name} {weight:.3g}" for name, weight in weights)
        class_weights = broadcast_from_main(counted)

    match_student(network, spec, train_set, crop_size, order, student_output.logits.shape[1])
    verb = "train" if loss is None else loss.name
    title = f"{verb} {get_spec(network).name or type(network).__name__}"
    folder, is_new = _open_folder(output_dir, title, accelerator)
    if accelerator.is_main_process:
        try:
            check_checkpoint(network, folder)
        except Exception:
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
            raise
    task = Task(
        title=title,
        student=network,
        teacher=teacher_model,
        cache=cache,
        origin=origin,
        classes=classes,
        method=loss,
        features=features,
        train=train_set,
        val=val_set,
        labels_from_teacher=labels_from_teacher,
        crop_size=crop_size,
        transform=transform,
        class_weights=class_weights,
        config=config,
        protocol=protocol,
        output_dir=folder,
        accelerator=accelerator,
    )
    print_fact(lambda: describe_run(task, choices, resumes=(folder / STATE_FILE).is_file()))
    return task


def write_cache(
    teacher: NetworkSource | Runtime,
    data: DataSource,
    config: TrainingConfig,
    class_names: Sequence[str] | None,
    transform: Transform,
    class_map: ClassMap | None,
    *,
    features: bool,
) -> Path:
    """Check a teacher and its data, and write the teacher's cache; arguments and errors as `bpkd_sdk.teach`."""
    check_transform(transform, config)
    identity, part = _identify(teacher, config), TeacherCache.find(str(config.teacher_cache))
    config = config if part is None else part.adopt_options(config)
    check_names({"teacher": teacher}, config.backbone_weights)
    accelerator = create_accelerator(config)
    dataset, _ = open_splits(data, class_names)
    dataset.check_classes()
    opened = open_teacher(teacher, dataset.num_classes, config, accelerator.device, dataset.pixels)
    viewed = add_views(opened, config.teacher_scale, config.teacher_augment)
    classes = match_teacher(opened, dataset, config, class_map)
    check_teacher_images(opened, dataset)
    _check_first_sample(dataset, config)
    crop_size = config.crop_size or Augmentation(transform, dataset, config).result_size()
    if crop_size is None:
        crop_size, reason = default_crop(dataset, [viewed], config.base_size)
        print_fact(f"Crops: {reason}")
    feature = None
    if features:
        if not isinstance(viewed, nn.Module):
            raise ValueError(f"features=True needs a module or a checkpoint, but {viewed.name} returns logits only.")
        feature = config.teacher_feature or feature_path(viewed)
    images = config.batch_size // (config.accumulate * accelerator.num_processes)
    with working("Running the teacher on black images"):
        raw = run_on_black_crops("teacher", viewed, feature, dataset, crop_size, images)
    in_classes_of_data("teacher", raw, dataset, classes)
    if accelerator.is_main_process:
        if config.check_data:
            check_samples(dataset)
        if config.check_teacher and dataset.has_labels:
            _check_teacher(opened, dataset, crop_size, classes, config, accelerator)
    crops, origin = describe_crops(transform, config, crop_size), describe_origin(teacher, opened)
    cache = plan_cache(viewed, identity, origin, raw, dataset, crops, feature, config, accelerator, part)
    fill_cache(cache, viewed, dataset, transform, config, accelerator, use_labels=config.labels == "dataset")
    return cache.folder


def _identify(teacher: NetworkSource | Runtime, config: TrainingConfig) -> dict[str, Any]:
    if is_name(teacher) and not is_pretrained_name(teacher):
        raise ValueError(
            f"teacher_cache needs a trained teacher, but {str(teacher)!r} is built by name with a random decoder. Pass "
            "the checkpoint of a trained network."
        )
    return identify_teacher(teacher, config)


def _open_data(
    data: DataSource, class_names: Sequence[str] | None, config: TrainingConfig
) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """Open training and validation data; check their classes and sizes."""
    train_set, val_set = open_splits(data, class_names)
    for dataset in filter(None, (train_set, val_set)):
        dataset.check_classes()
        check_pixels(dataset.pixels, train_set.pixels, network_name=dataset.name, data_name=train_set.name)
    if len(train_set) < config.batch_size:
        raise ValueError(
            f"{train_set.name} has {len(train_set)} images, too few for a batch of {config.batch_size} different ones. "
            f"Pass batch_size={len(train_set)} or less, or more data."
        )
    if val_set is not None and not len(val_set):
        raise ValueError(f"{val_set.name} has no images to validate on; pass data=(train, None) to train without.")
    if val_set is not None and _source(val_set) is _source(train_set):
        warn(
            f"Training and validation data are the same, {train_set.name}, so the scores do not show how well the "
            "network does on new images. Pass other images as data[1]."
        )
    return train_set, val_set


def _source(dataset: SegmentationDataset) -> object:
    return dataset.data if isinstance(dataset, AdaptedDataset) else dataset


def open_splits(
    data: DataSource, class_names: Sequence[str] | None = None
) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """Open training and validation data.

    Args:
        data: Name or path of a data set, data set, mapping of splits, or pair (train, val).
        class_names: Class names of data that do not state them.

    Raises:
        TypeError: For other objects.
        ValueError: If the classes are not known, or differ between training and validation data.
    """
    if isinstance(data, (str, Path)):
        data = (open_dataset(data, split="train"), open_dataset(data, split="val"))
    if isinstance(data, Mapping):
        data = _named_splits(data)
    if isinstance(data, list) and len(data) == 2 and all(isinstance(part, Dataset) for part in data):
        data = (data[0], data[1])  # as random_split returns it
    if not isinstance(data, tuple):
        return as_dataset(data, class_names=class_names), None
    if len(data) != 2:
        raise ValueError(f"Expected `data` to be a pair (train, val), but got {len(data)} entries.")
    train_set = as_dataset(data[0], class_names=class_names)
    val_set = None if data[1] is None else as_dataset(data[1], class_names=class_names)
    if val_set is not None and val_set.class_names != train_set.class_names:
        raise ValueError(
            f"Training and validation data have different classes: {train_set.class_names} and {val_set.class_names}."
        )
    return train_set, val_set


def _named_splits(splits: Mapping[Any, Any]) -> tuple[Any, Any]:
    """Return the training and the validation split of a mapping, such as a `DatasetDict`; None without validation."""
    names = [name for name in VALIDATION_SPLITS if name in splits]
    if "train" not in splits or (not names and len(splits) > 1):
        raise ValueError(
            f"Expected splits 'train' and 'val' or 'validation', but `data` has {', '.join(map(repr, splits))}. Pass a "
            "pair (train, val) of splits, or (train, None) to train without validation."
        )
    return splits["train"], splits[names[0]] if names else None


def _check_first_sample(dataset: SegmentationDataset, config: TrainingConfig) -> None:
    report = inspect_sample(dataset, 0)
    if not report.problem:
        return
    if config.check_data:
        check_samples(dataset)  # raises an error that lists all problems
    raise ValueError(
        f"{dataset.name} cannot be used:\n{format_list([report.problem])}{dataset.label_advice(report.labels)}"
    )


def _labels_from_teacher(
    train_set: SegmentationDataset,
    val_set: SegmentationDataset | None,
    classes: ClassGroups | None,
    config: TrainingConfig,
) -> bool:
    """Return whether the teacher's predictions replace the labels; raise ValueError if labels are needed and missing.

    The steps of a run read `Task.labels_from_teacher`, and not `TrainingConfig.labels`.
    """
    if config.labels == "teacher":
        if classes is not None and len(classes.taught) < len(classes.columns):
            names = [name for index, name in enumerate(train_set.class_names) if index not in classes.taught]
            raise ValueError(
                f"With labels='teacher', nothing trains the classes that class_map has no class of the teacher for: "
                f"{', '.join(names)}. Leave them out of the data's class names, or pass labels='dataset'."
            )
        return True
    if not train_set.has_labels:
        raise ValueError(
            f"{train_set.name} has no labels. Use distill(..., labels='teacher') to learn from the teacher."
        )
    if val_set is not None and not val_set.has_labels:
        raise ValueError(f"{val_set.name} has no labels to validate with; pass (train, None) to train without.")
    return False


def _check_data(
    train_set: SegmentationDataset, val_set: SegmentationDataset | None, config: TrainingConfig, *, need_labels: bool
) -> int:
    """Read and check all the data, if configured.

    Returns:
        The index of the largest validation image; 0 if the data were not read.
    """
    if not config.check_data:
        return 0
    if need_labels:
        check_for_training(train_set)
    else:
        check_samples(train_set)
    if val_set is None:
        return 0
    reports = inspect_samples(val_set)
    check_reports(val_set, reports)
    check_validation_data(val_set)
    sizes = [report.size or (0, 0) for report in reports]
    return max(range(len(sizes)), key=lambda index: sizes[index][0] * sizes[index][1])


def _check_teacher(
    teacher: TeacherModel,
    dataset: SegmentationDataset,
    crop_size: tuple[int, int],
    classes: ClassGroups | None,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> None:
    """Warn about findings of the check of the teacher's main view on a few images."""
    viewed, dtype = add_views(teacher, config.teacher_scale), teacher_dtype(config, accelerator)
    with working("Checking the teacher"):
        warn_about_teacher(viewed, dataset, crop_size, accelerator.device, dtype, config.base_size, classes)


def _try_validation(
    network: nn.Module,
    sample: SegmentationDataset,
    reference: TeacherModel | None,
    class_map: ClassMap | None,
    config: TrainingConfig,
    protocol: EvaluationProtocol,
    device: torch.device,
) -> None:
    """Segment and score one validation image, so that errors of the validation surface before the first step."""
    size = tuple(sample[0][0].shape[1:])
    try:
        evaluate(
            network,
            sample,
            protocol=protocol,
            boundary_width=config.boundary_width,
            reference=reference,
            match_classes=config.match_classes,
            class_map=class_map,
            device=device,
        )
    except Exception as error:  # a network may raise any exception for a size that it does not accept
        raise ValueError(
            f"The validation image {sample.sample_name(0)} of {size} cannot be segmented and scored: {error}\n"
            "If the network accepts only images of the crops' size, pass protocol=EvaluationProtocol(crop_size="
            "(height, width)) with that size; to train without validation, pass data=(train, None)."
        ) from error


def _create_default_folder(title: str) -> Path:
    """Create a new folder in runs/, also if another run of the same title starts in the same second."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{title.replace('/', '-').replace(' ', '-')}"
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _open_folder(output_dir: str | Path | None, title: str, accelerator: Accelerator) -> tuple[Path, bool]:
    """Create the folder of the run if it does not exist; return it, and whether it is new."""
    if output_dir is None:
        new_folder = _create_default_folder(title) if accelerator.is_main_process else None
        return Path(broadcast_from_main(str(new_folder))), True
    folder = Path(broadcast_from_main(str(output_dir)))
    accelerator.wait_for_everyone()  # all processes have read the folder before the main process creates it
    is_new = not folder.exists()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    return folder, is_new
