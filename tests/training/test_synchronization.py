"""The host waits for the device only where a record is printed.

The CPU stands in for the device: every operation that reads values of a tensor, or copies values of the host into one,
counts. Batches are loaded on the host, so that the loader does not count. CIRKD's memory, and the losses of
segmentation-models-pytorch (Dice, focal, Lovasz), select positions by their values, and wait in every step.
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import bpkd
from bpkd_sdk.training import loop
from tests.networks import tiny

TRAIN = ShapesDataset("train", length=8, size=(48, 48))
OPTIONS = {
    "batch_size": 4,
    "crop_size": (32, 32),
    "device": "cpu",
    "check_data": False,
    "log_every": 6,
    "steps": 6,
    "evaluate_every": 6,
}

# Their results are numbers on the host, or have a size that depends on values.
READS = {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "unique_consecutive", "_unique2"}
METHODS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
COPIES = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}


class Transfers:
    """Transfers between host and device, by the step in which they happen.

    Attributes:
        step: Number of the step, from 1; None outside of the steps.
        found: Step and operation of each transfer, with the line of the package that it comes from.
    """

    def __init__(self):
        self.step = None
        self.found = []

    def add(self, name):
        if self.step is not None:
            lines = [line for line in traceback.extract_stack() if "bpkd_sdk" in Path(line.filename).parts]
            self.found.append((self.step, f"{name} in {lines[-1].filename}:{lines[-1].lineno}"))


class Operations(TorchDispatchMode):
    """Counter of the operations of torch's dispatcher, those of a backward pass included."""

    def __init__(self, transfers):
        super().__init__()
        self.transfers = transfers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = [index for index in args[1] if index is not None] if name in ("index", "index_put_") else []
        if name in READS or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.transfers.add(name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Counter of the functions that bypass the dispatcher."""

    def __init__(self, transfers):
        super().__init__()
        self.transfers = transfers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS or (func in COPIES and not isinstance(args[0], torch.Tensor)):
            self.transfers.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def transfers(monkeypatch):
    found = Transfers()
    batches = loop._Trainer._batches

    def counted(trainer):
        remaining = batches(trainer)
        while (batch := next(remaining, None)) is not None:
            found.step = trainer.position.step + 1
            yield batch
            found.step = None

    monkeypatch.setattr(loop._Trainer, "_batches", counted)
    # The values of labels are checked on the CPU only, which also skips what masks leave out. This name is not that of
    # the CPU, and the other function is that of all devices.
    monkeypatch.setattr("bpkd_sdk.boundary.device", lambda _: torch.device("cpu:0"))
    monkeypatch.setattr(bpkd, "masked_class_kl", bpkd.dense_class_kl)
    with Operations(found), Functions(found):
        yield found


CASES = {
    "alone": (None, {}),
    "clipped": (None, {"gradient_clip": 1.0, "accumulate": 2}),
    "bpkd": ("bpkd", {}),
    "cwd": ("cwd", {}),
    "composition": (["canonical", "bpkd"], {}),
    "skds": ("skds", {}),
    "ifvd": ("ifvd", {}),
    "labels of the teacher": ("bpkd", {"labels": "teacher", "teacher_augment": ("flip",)}),
    "cache": (["canonical", "bpkd"], {"teacher_cache": True, "views": 1}),
    "class map": ("bpkd", {"class_map": {name: [i] for i, name in enumerate(TRAIN.class_names)}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_device_is_waited_for_only_where_a_record_is_printed(tmp_path, transfers, case):
    method, options = CASES[case]
    student = tiny(9)
    if method is None:
        bpkd_sdk.train(student, (TRAIN, None), output_dir=tmp_path, **OPTIONS | options)
    else:
        if "teacher_cache" in options:
            options = options | {"teacher_cache": str(tmp_path / "cache")}
        teacher = tiny(10 if "class_map" in options else 9, width=12, seed=1).eval()
        options = OPTIONS | options | {"method": method, "output_dir": tmp_path / "run"}
        bpkd_sdk.distill(teacher, student, (TRAIN, None), **options)
    # The first step fills caches of constants, and the record of the last one is read.
    between = [text for step, text in transfers.found if 1 < step < 6]
    assert not between
    assert any(text.startswith("tolist") for step, text in transfers.found if step == 6)
