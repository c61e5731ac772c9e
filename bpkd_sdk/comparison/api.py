"""`bpkd_sdk.compare`: trains every method and the student alone under one budget, seed by seed, and resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from bpkd_sdk.class_map import ClassMap
from bpkd_sdk.comparison.report import Comparison
from bpkd_sdk.comparison.run import RESULT_FILE, SCORES, Run, other_version, read_run, run_one
from bpkd_sdk.comparison.setup import (
    LOG_EVERY,
    Budget,
    ComparisonSetup,
    Methods,
    StudentSource,
    named_methods,
    time_per_step,
)
from bpkd_sdk.data.checks import check_for_training, check_samples
from bpkd_sdk.errors import format_list, import_optional, list_differences
from bpkd_sdk.evaluation import evaluate
from bpkd_sdk.files import find_network, read_json, write_json
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.method import method_arguments
from bpkd_sdk.progress import format_rows, print_fact, print_line
from bpkd_sdk.runtime import Runtime, TorchRuntime
from bpkd_sdk.training.accelerator import create_accelerator
from bpkd_sdk.training.augmentation import Augmentation, Transform, check_transform
from bpkd_sdk.training.augmentation_check import check_augmentation, check_validation_data
from bpkd_sdk.training.compatibility import describe_left_out, match_teacher, student_order
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.crop import default_crop
from bpkd_sdk.training.freezing import find_encoder
from bpkd_sdk.training.label_losses import balanced_class_weights, check_class_weights
from bpkd_sdk.training.monitor import check_trackers
from bpkd_sdk.training.normalization import choose_spec
from bpkd_sdk.training.origin import check_names, describe_origin, format_origin
from bpkd_sdk.training.prepare import DataSource, open_splits
from bpkd_sdk.training.summary import describe_cost, describe_data
from bpkd_sdk.training.teacher import NetworkSource

LOCK_FILE = "lock"  # locked by the process that trains in this folder

RunFolders = Mapping[tuple[int, str], Path]  # folder of each run, by seed and method


def compare(
    teacher: NetworkSource,
    student: StudentSource,
    data: DataSource,
    *,
    class_names: Sequence[str] | None = None,
    transform: Transform = "paper",
    methods: Methods = "all",
    steps: int | None = None,
    seconds: float | None = None,
    seeds: int = 3,
    class_map: ClassMap | None = None,
    output_dir: str | Path = "runs/comparison",
    **options: Any,
) -> Comparison:
    """Distil one student by several methods, and train it without a teacher, on equal terms.

    With the same seed all methods start from the same weights of the student and see the same crops in the same order.
    A second call with the same arguments resumes a comparison that was stopped; methods and seeds can be added. Several
    processes that call it at the same time, each with its own GPU or cores, share the runs.

    Args:
        teacher: Module in eval mode, its checkpoint, or an exported file that `distill` accepts.
        student: Name that `create_model` accepts, or function from a number of classes to a module: a new network for
            each run, whose random weights depend only on the seed; by name, its encoder starts from ImageNet weights
            (see `backbone_weights` of `TrainingConfig`). Or a module or a checkpoint that every run starts from.
        data: "shapes", path of a folder (see `open_dataset`), pair (train, val) of data sets of any library (see
            `as_dataset`), or mapping of splits such as a `DatasetDict`.
        class_names: Names of the classes in the order of their ids, for data that do not state them.
        transform: Augmentation of the training data for all runs, as `distill` accepts it.
        methods: "all"; names, in a list or separated by commas, where "bpkd+cwd" combines two methods; or a mapping
            from names to methods as `distill` accepts them: ``{"no edges": BPKDLoss(edge_weight=0)}``.
        steps: Budget of each run in optimiser steps. Pass either `steps` or `seconds`.
        seconds: Budget of each run in seconds of training, without evaluation. Every method is timed first, on this
            machine and in the real training loop, and gets the number of steps that fit.
        seeds: Number of runs of each method; their seeds are 0, 1, ...
        class_map: Names or ids of the teacher's classes for each class of the data, as in `distill`.
        output_dir: Folder of the comparison, see `Comparison`.
        **options: Fields of `TrainingConfig` for all runs, for example ``evaluate_every=50``.

    Raises:
        TypeError: For an unknown option.
        ValueError: For arguments out of their range, networks that do not fit the data, or a folder that contains runs
            with other settings; the differences are named.
        FileNotFoundError: If the teacher's file does not exist.
        RuntimeError: If the device does not exist.
        ImportError: If matplotlib or scipy is not installed.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    for package in ("matplotlib", "scipy"):
        import_optional(package, "compare")
    if seeds < 1:
        raise ValueError(f"Expected `seeds` to be at least 1, but got {seeds}.")
    budget = Budget.create(steps, seconds)
    setup, choices = _create_setup(teacher, student, data, class_names, transform, budget, class_map, options)
    num_classes = setup.train.num_classes if setup.classes is None else len(setup.classes.taught)
    losses = named_methods(methods, num_classes, setup.train.ignore_index)
    new_student = setup.new_student(0)
    if options.get("check_data", True):
        check_for_training(setup.train)
        check_samples(setup.val)
        check_validation_data(setup.val)
        config = TrainingConfig.from_options(setup.options)
        spec, _ = choose_spec(new_student, setup.train, config.seed)
        check_augmentation(Augmentation(transform, setup.train, config, config.crop_size, spec))
    check_class_weights(setup.train, TrainingConfig.from_options(options))
    if setup.options["freeze_encoder_steps"]:
        find_encoder(new_student)
    if options.get("class_weights") == "balanced":  # read the labels once for all runs
        setup.options["class_weights"] = list(balanced_class_weights(setup.train))
    student_order(new_student, setup.train, TrainingConfig.from_options(options))
    if options.get("check_teacher", True):
        setup.check_teacher()

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print_fact(_describe(setup, list(losses), seeds, choices, folder))
    folders = {(seed, name): folder / name / f"seed{seed}" for seed, name in product(range(seeds), losses)}
    with FileLock(folder / LOCK_FILE):
        settings = _write_or_compare(folder / "settings.json", setup.settings())
        arguments = {
            name: _write_or_compare(folder / name / "method.json", method_arguments(loss))
            for name, loss in losses.items()
        }
        comparison = Comparison(settings, _teacher_scores(setup, folder / "teacher.json"), [], folder)
    _finished_runs(folders)  # raises the error of a result that cannot be read
    try:
        setup.teach(features=any(loss is not None and loss.needs_features for loss in losses.values()))
        with FileLock(folder / LOCK_FILE):
            plans = {name: _plan(setup, name, loss, folder) for name, loss in losses.items()}
        with closing(_claim_runs(folders)) as claimed:
            for (seed, name), run_folder in claimed:
                number = 1 + list(folders).index((seed, name))
                title = f"Run {number} of {len(folders)}: {name}, seed {seed}, {plans[name]['steps']} steps"
                print_line(title)
                result_settings = settings | {"method": arguments[name], "plan": plans[name]}
                run_one(setup, name, losses[name], seed=seed, folder=run_folder, settings=result_settings)
    except KeyboardInterrupt:
        finished = len(_finished_runs(folders))
        raise KeyboardInterrupt(
            f"{finished} of {len(folders)} runs are finished in {folder}; repeat the same call to resume"
        ) from None
    finally:
        comparison.runs.extend(_finished_runs(folders))
        if comparison.runs:
            comparison.write()
    return comparison


def _create_setup(
    teacher: NetworkSource,
    student: StudentSource,
    data: DataSource,
    class_names: Sequence[str] | None,
    transform: Transform,
    budget: Budget,
    class_map: ClassMap | None,
    options: dict[str, Any],
) -> tuple[ComparisonSetup, dict[str, str]]:
    """Return the setup, and texts on what was chosen for it, by the name of their line in the summary."""
    if "seed" in options:
        raise TypeError("The seeds of the runs are 0 to `seeds` - 1; pass `seeds` instead of `seed`.")
    config = TrainingConfig.from_options(options)
    check_trackers(config.trackers)
    check_transform(transform, config)
    if config.labels != "dataset":
        raise ValueError("compare() needs ground-truth labels for its baseline without a teacher.")
    find_network(teacher)  # raises an error for a path that does not exist
    if not callable(student) or isinstance(student, nn.Module):
        check_names({"student": student}, config.backbone_weights)
    accelerator = create_accelerator(config)
    if accelerator.num_processes > 1:
        raise ValueError("compare() measures the time of a single process; start it without a launcher.")
    train, val = open_splits(data, class_names)
    if val is None:
        raise ValueError("compare() needs validation data. Pass a name, a folder, or a pair (train, val) of data sets.")
    for dataset in (train, val):
        dataset.check_classes()
    shared = {name: value for name, value in config.to_dict().items() if name not in ("steps", "seed")}
    shared |= {"check_data": False, "check_teacher": False}  # both are checked once, before the first run
    setup = ComparisonSetup(
        teacher=teacher,
        student=student,
        train=train,
        val=val,
        budget=budget,
        device=accelerator.device,
        transform=transform,
        options=shared,
    )
    opened, new_student, choices = setup.open_teacher(), setup.new_student(0), dict[str, str]()
    classes = match_teacher(opened, train, config, class_map)
    if class_map is None and classes is not None and classes.class_map is not None:
        choices["Teacher's classes"] = describe_left_out(classes, train)
    if config.crop_size is None:
        # All runs use one size; the default of the student alone may not be accepted by the teacher.
        crop_size = Augmentation(transform, train, config).result_size()
        if crop_size is None:
            crop_size, choices["Crops"] = default_crop(train, [new_student, opened], config.base_size)
        setup.options["crop_size"] = crop_size
    size = setup.options["crop_size"]
    source = student if isinstance(student, (str, Path)) else new_student
    choices["Student"] = format_origin(describe_origin(source, new_student)) + describe_cost(new_student, size)
    choices["Teacher"] = format_origin(describe_origin(teacher, opened)) + describe_cost(opened, size)
    return dataclasses.replace(setup, classes=classes), choices


def _describe(setup: ComparisonSetup, methods: Sequence[str], seeds: int, choices: dict[str, str], folder: Path) -> str:
    """Describe a comparison before its first run, as `describe_run` describes a run."""
    height, width = setup.options["crop_size"]
    rows = describe_data(setup.train, setup.val) | {
        "Student": "",
        "Teacher": "",
        "Methods": ", ".join(methods),
        "Runs": f"{len(methods) * seeds}, one for each method and each of {seeds} seeds",
        "Budget": f"{setup.budget.amount:.15g} {setup.budget.unit} per run, batches of {setup.options['batch_size']}",
        "Crops": f"{height}x{width} pixels (height x width)",
        "Device": setup.device.type,
    }
    return format_rows({**rows, **choices, "Output": str(folder)})


def _write_or_compare(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write settings to a new file, or raise ValueError if they differ from those in an existing one."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, plain)
        return plain
    before = read_json(path)
    if "options" in plain:
        if keys := sorted(before.keys() ^ plain.keys()):
            raise other_version(path, keys)
        # Settings of an earlier version lack newer options; they had their default values.
        defaults = json.loads(json.dumps(TrainingConfig().to_dict()))
        before["options"] = {key: defaults[key] for key in plain["options"]} | before["options"]
    if changed := list_differences(before, plain):
        raise ValueError(
            f"{path.parent} contains runs with other settings, which cannot be in one table with these:\n"
            f"{format_list(changed)}\nPass the same settings, or another output_dir."
        )
    return plain


def _teacher_scores(setup: ComparisonSetup, path: Path) -> dict[str, float]:
    """Score the teacher on the validation data, once; later calls read the scores from the file."""
    if not path.is_file():
        teacher = setup.open_teacher()
        metrics = evaluate(
            teacher if isinstance(teacher, Runtime) else TorchRuntime(teacher, setup.device, name="the teacher"),
            setup.val,
            boundary_width=setup.options["boundary_width"],
            device=setup.device,
            match_classes=setup.options["match_classes"],
            class_map=setup.class_map,
        )
        write_json(path, metrics.to_dict())
    scores = read_json(path)
    if missing := sorted(set(SCORES) - scores.keys()):
        raise other_version(path, missing)
    return {name: scores[name] for name in SCORES}


def _plan(setup: ComparisonSetup, name: str, method: DistillationLoss | None, folder: Path) -> dict[str, Any]:
    """Run a short trial so that errors surface early; a time budget also times it. Return the steps of each run."""
    path, budget = folder / name / "plan.json", setup.budget
    if not path.is_file():
        print_line(f"Trying {name}")
        if budget.unit == "steps":
            _run_trial(setup, method, 1)
            write_json(path, {"steps": int(budget.amount)})
        else:
            ms_per_step = time_per_step(lambda steps: _run_trial(setup, method, steps), budget.amount)
            write_json(path, {"steps": budget.steps(ms_per_step), "ms_per_step": ms_per_step})
    plan: dict[str, Any] = read_json(path)
    if "steps" not in plan:
        raise other_version(path, ["steps"])
    return plan


def _run_trial(setup: ComparisonSetup, method: DistillationLoss | None, steps: int) -> list[dict[str, Any]]:
    """Train for a few steps in a temporary folder, without evaluation, and return the history."""
    with TemporaryDirectory() as scratch:
        options = {"steps": steps, "log_every": LOG_EVERY, "evaluate_every": steps, "trackers": (), "seed": 0}
        return setup.train_student(method, setup.new_student(0), None, Path(scratch), **options).history


def _claim_runs(folders: RunFolders) -> Generator[tuple[tuple[int, str], Path]]:
    """Yield the unfinished runs, each locked for other processes while it is trained.

    Runs that another process has locked come last. They are waited for, because that process may stop before it has
    finished them.
    """
    remaining = dict(folders)
    for timeout in (0, -1):
        for run, folder in list(remaining.items()):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(folder / LOCK_FILE, timeout=timeout):
                    if not (folder / RESULT_FILE).is_file():
                        yield run, folder
            except Timeout:
                continue
            del remaining[run]


def _finished_runs(folders: RunFolders) -> list[Run]:
    return [read_run(folder) for folder in folders.values() if (folder / RESULT_FILE).is_file()]
