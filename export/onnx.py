"""A network as one ONNX file, pre- and post-processing inside, checked against torch before it is kept."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.data.shapes import render
from bpkd_sdk.errors import check_choice, import_optional
from bpkd_sdk.evaluation.inference import full_size_logits, to_mask
from bpkd_sdk.models import NetworkSpec, get_spec
from bpkd_sdk.models.checkpoint import content_hash
from bpkd_sdk.runtime import METADATA_KEY

Precision = Literal["fp32", "fp16"]

# Share of pixels whose class must be the same in ONNX Runtime and torch. Half precision moves pixels between two
# classes whose logits are nearly equal, so some differ in any network.
LEAST_AGREEMENT = {"fp32": 0.9999, "fp16": 0.99}


@dataclass(frozen=True)
class ExportReport:
    """What `to_onnx` wrote.

    Attributes:
        path: The file.
        size: In bytes.
        agreement: Share of pixels (0..1) with the same class in ONNX Runtime and torch (fp32), over batches that were
            not traced; for files without argmax, of the argmax of both.
        largest_difference: Between both networks' logits over the largest logit; None where the file returns masks.
    """

    path: Path
    size: int
    agreement: float
    largest_difference: float | None


class _Deployable(nn.Module):
    """A network from image to mask, as it goes into the file."""

    def __init__(self, network: nn.Module, spec: NetworkSpec, preprocess: bool, argmax: bool) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.preprocess = preprocess
        self.argmax = argmax

    def forward(self, images: Tensor) -> Tensor:
        # Cast before transposing: TensorRT's parser takes no operator but Cast on uint8.
        inputs = self.spec.normalize(images.float().permute(0, 3, 1, 2)) if self.preprocess else images
        logits = full_size_logits(self.network, inputs, self.spec.size_divisor)
        return to_mask(logits).to(torch.uint8) if self.argmax else logits


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int],
    dynamic_batch: bool = True,
    precision: Precision = "fp32",
    preprocess: bool = True,
    argmax: bool = True,
    opset: int = 18,
) -> ExportReport:
    """Export a network to one ONNX file, compare it with torch, and keep it only if the two agree.

    Logits are resized to the input size and only then turned into classes. The file carries the network's facts
    (classes, palette, normalisation, size, versions, hash, agreement) in its metadata, so that it can be used alone.

    Args:
        model: A network; it is not changed.
        path: Ends in ``.onnx``.
        input_size: (H, W) of the images.
        dynamic_batch: Take any number of images; otherwise one.
        precision: "fp32", or "fp16" inside the network with float32 around it.
        preprocess: Take uint8 RGB images (N, H, W, 3) and normalise inside; otherwise normalised float32 (N, 3, H, W).
        argmax: Return uint8 masks (N, H, W); otherwise float32 logits (N, C, H, W).
        opset: ONNX operator set; 18 is the newest whose Resize older CUDA builds of ONNX Runtime know.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is missing.
        ValueError: For an argument out of its range.
        RuntimeError: If ONNX Runtime and torch disagree; no file is left then.
    """
    import_optional("onnxscript", "export")
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(f"Expected a path that ends in '.onnx', but got {str(path)!r}.")
    check_choice("precision", precision, get_args(Precision))
    if min(input_size) < 32:
        raise ValueError(f"Expected `input_size` to be (height, width) of at least 32 pixels, but got {input_size}.")
    reference = _Deployable(copy.deepcopy(model).cpu().float(), get_spec(model), preprocess, argmax).eval()
    exported = copy.deepcopy(reference)
    if precision == "fp16":
        exported.network.half()
    samples = _samples(reference.spec, input_size, preprocess, count=4 if dynamic_batch else 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        draft = Path(folder) / target.name
        proto = _trace(exported, samples[: 2 if dynamic_batch else 1], dynamic_batch, opset)
        _save(proto, draft)
        agreement, difference = _compare(draft, reference, samples, dynamic_batch)
        if agreement < LEAST_AGREEMENT[precision]:
            raise RuntimeError(
                f"The exported network disagrees with torch: {agreement:.4%} of the pixels have the same class, "
                f"{LEAST_AGREEMENT[precision]:.2%} are required. No file was written."
            )
        facts = {
            "network": reference.spec.to_dict(),
            "input_size": list(input_size),
            "dynamic_batch": dynamic_batch,
            "precision": precision,
            "preprocess": preprocess,
            "argmax": argmax,
            "agreement": agreement,
            "largest_difference": difference,
            "sha256": content_hash(reference.network.state_dict()),
            "versions": {package: version(package) for package in ("torch", "onnx", "bpkd-sdk")},
        }
        entry = proto.metadata_props.add()
        entry.key, entry.value = METADATA_KEY, json.dumps(facts)
        _save(proto, draft)
        draft.replace(target)
    return ExportReport(target, target.stat().st_size, agreement, difference)


def _samples(spec: NetworkSpec, size: tuple[int, int], preprocess: bool, count: int) -> Tensor:
    images = torch.from_numpy(np.stack([render(0, "export", index, size)[0] for index in range(count)]))
    return images if preprocess else spec.normalize(images.permute(0, 3, 1, 2))


def _trace(model: nn.Module, samples: Tensor, dynamic_batch: bool, opset: int) -> Any:
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}} if dynamic_batch else None
    program = torch.onnx.export(
        model,
        (samples,),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["masks" if model.argmax else "logits"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program.")
    return program.model_proto


def _save(proto: Any, path: Path) -> None:
    import onnx

    onnx.checker.check_model(proto)
    onnx.save_model(proto, path, save_as_external_data=False)


@torch.inference_mode()
def _compare(path: Path, reference: _Deployable, samples: Tensor, dynamic_batch: bool) -> tuple[float, float | None]:
    """Run both on a batch of one and on all samples, neither of which is the batch that was traced."""
    onnxruntime = import_optional("onnxruntime", "export")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    same, differences = [], []
    for batch in (samples[:1], samples) if dynamic_batch else (samples,):
        ours = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
        theirs = reference(batch)
        if not reference.argmax:
            differences.append(((ours - theirs).abs().max() / theirs.abs().max()).item())
            ours, theirs = to_mask(ours), to_mask(theirs)
        same.append((ours == theirs).double().mean().item())
    return min(same), max(differences, default=None)
