"""The precision that TensorRT's layers really have, against the one that was asked for.

TensorRT 11 takes an FP16 flag and builds FP32 without a word; so nothing here asks what was requested. In a strongly
typed network the types of the parsed layers are those of the engine, which any machine can read; where there is a GPU,
the finished engine is read as well.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from bpkd_sdk.errors import listed

WEIGHTED = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")

_TYPES = {"fp32": "FLOAT", "fp16": "HALF"}
# Layers that only pass on what a dequantisation gives them.
_TRANSPARENT = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "CAST")
# How the engine inspector of one release or another spells a type.
_SPELLINGS = {"INT8": ("int8",), "HALF": ("half", "fp16"), "FLOAT": ("float", "fp32")}


def network_layers(network: Any) -> dict[str, dict[str, int]]:
    """Number of layers with weights by kind and type, of a parsed network.

    The type is that of a layer's output, or INT8 where all its inputs come from int8 through a dequantisation, which is
    how a strongly typed network says that the layer computes in int8.

    Args:
        network: A TensorRT `INetworkDefinition`.

    Returns:
        For example ``{"CONVOLUTION": {"HALF": 67}}``.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    counts: dict[str, Counter[str]] = {}
    for layer in layers:
        if layer.type.name in WEIGHTED:
            counts.setdefault(layer.type.name, Counter())[_type(layer, makers)] += 1
    return {kind: dict(types) for kind, types in counts.items()}


def weighted_names(network: Any) -> list[str]:
    """Names of the layers with weights."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [layer.name for layer in layers if layer.type.name in WEIGHTED]


def _type(layer: Any, makers: dict[str, Any]) -> str:
    inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
    # A convolution without a second input holds its weights itself, in its own type.
    integer = len(inputs) > 1 and all(_is_dequantized(tensor, makers) for tensor in inputs[:2])
    return "INT8" if integer else str(layer.get_output(0).dtype.name)


def _is_dequantized(tensor: Any, makers: dict[str, Any]) -> bool:
    maker = makers.get(tensor.name)
    while maker is not None and maker.type.name in _TRANSPARENT:
        maker = makers.get(maker.get_input(0).name)
    return maker is not None and maker.type.name == "DEQUANTIZE" and maker.get_input(0).dtype.name == "INT8"


def check_network(layers: dict[str, dict[str, int]], facts: dict[str, Any]) -> None:
    """Raise RuntimeError unless a parsed network has the precision that its ONNX file states.

    Args:
        layers: As `network_layers` counts them.
        facts: The ONNX file's metadata: `precision`, and for "int8" how many layers were quantised.
    """
    found: Counter[str] = Counter()
    for types in layers.values():
        found.update(types)
    precision = facts["precision"]
    wanted = Counter({"INT8": facts["quantization"]["quantized"]} if precision == "int8" else {})
    wanted[_TYPES.get(precision, "FLOAT")] = found.total() - wanted.total()
    if found != wanted:
        raise RuntimeError(
            f"The ONNX file says that it is {precision}, for which TensorRT's layers with weights would be "
            f"{_counted(wanted)}, but they are {_counted(found)}. No engine was written. Export the network again with "
            "bpkd_sdk.export (and quantize it, for int8); a file changed by another program keeps its old label."
        )


def _counted(types: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(types.items()) if count) or "none"


def engine_layers(inspector_json: str, names: list[str]) -> dict[str, str]:
    """The type of each layer with weights in a finished engine, as far as its inspector tells.

    Args:
        inspector_json: ``EngineInspector.get_engine_information(LayerInformationFormat.JSON)`` of an engine built with
            detailed profiling verbosity.
        names: Of the layers with weights in the network.

    Returns:
        INT8, HALF or FLOAT by name: the narrowest type that enters or leaves the kernel which a layer became a part of.
        Layers that the inspector does not name are absent.
    """
    kernels = [layer for layer in json.loads(inspector_json).get("Layers", ()) if isinstance(layer, dict)]
    found = {}
    for kernel in kernels:
        if type_ := _narrowest(kernel):
            found.update(dict.fromkeys((name for name in names if _holds(kernel, name)), type_))
    return found


def _holds(kernel: dict[str, Any], name: str) -> bool:
    return kernel.get("Name") == name or f"[ONNX Layer: {name}]" in kernel.get("Metadata", "")


def _narrowest(kernel: dict[str, Any]) -> str | None:
    formats = " ".join(_formats(kernel)).lower()
    return next((type_ for type_, words in _SPELLINGS.items() if any(word in formats for word in words)), None)


def _formats(kernel: dict[str, Any]) -> Iterator[str]:
    for side in ("Inputs", "Outputs"):
        for tensor in kernel.get(side, ()):
            yield str(tensor.get("Format/Datatype", ""))


def check_engine_layers(found: dict[str, str], precision: str) -> None:
    """Raise RuntimeError if a finished engine computes in another precision than was asked for.

    An int8 engine keeps its sensitive layers in float32, so it must only have some int8 layers; otherwise every layer
    that the inspector names counts.
    """
    if precision == "int8":
        wrong = [] if not found or "INT8" in found.values() else [f"{name}: {type_}" for name, type_ in found.items()]
    else:
        wrong = [f"{name}: {type_}" for name, type_ in found.items() if type_ != _TYPES[precision]]
    if wrong:
        raise RuntimeError(
            f"The engine is not {precision} as asked for; no engine was written. Its layers run as\n{listed(wrong)}\n"
            "This is TensorRT's choice of kernels on this GPU: try another build of it, or the next wider precision."
        )
