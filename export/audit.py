"""Checks the precision of a TensorRT network and of a finished engine against the precision that the file states.

TensorRT 11 accepts an FP16 flag and builds an FP32 engine without an error, so a requested precision proves nothing. In
a strongly typed network the types of the parsed layers are those of the engine, and any machine can read them. On a
machine with a GPU, the finished engine is inspected as well.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bpkd_sdk.errors import format_list

WEIGHTED = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")

_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}
# Layers that pass on the result of a dequantisation unchanged.
_TRANSPARENT = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "CAST")
# Spellings of a type in the engine inspector of different releases, as whole words: UINT8 is an image's or a mask's.
_SPELLINGS = {"INT8": r"\bint8\b", "HALF": r"\b(half|fp16)\b", "FLOAT": r"\b(float|fp32)\b"}


def network_layers(network: Any) -> dict[str, dict[str, int]]:
    """Count the layers with weights of a parsed network by kind and type.

    Args:
        network: TensorRT `INetworkDefinition`.

    Returns:
        For example ``{"CONVOLUTION": {"HALF": 67}}``.
    """
    counts: dict[str, Counter[str]] = {}
    for layer, type_ in _weighted_layers(network):
        counts.setdefault(layer.type.name, Counter())[type_] += 1
    return {kind: dict(types) for kind, types in counts.items()}


def network_types(network: Any) -> dict[str, str]:
    """Return the type of each layer with weights of a parsed network, by the layer's name."""
    return {layer.name: type_ for layer, type_ in _weighted_layers(network)}


def _weighted_layers(network: Any) -> Iterator[tuple[Any, str]]:
    """Yield every layer with weights, and its type.

    The type is that of the layer's output; or INT8 if all its inputs come from int8 through a dequantisation, which is
    how a strongly typed network states that a layer computes in int8.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    for layer in layers:
        if layer.type.name in WEIGHTED:
            yield layer, _layer_type(layer, producers)


def _layer_type(layer: Any, producers: dict[str, Any]) -> str:
    inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
    # A convolution without a second input holds its weights itself, in its own type.
    is_int8 = len(inputs) > 1 and all(_is_dequantized(tensor, producers) for tensor in inputs[:2])
    return "INT8" if is_int8 else str(layer.get_output(0).dtype.name)


def _is_dequantized(tensor: Any, producers: dict[str, Any]) -> bool:
    producer = producers.get(tensor.name)
    while producer is not None and producer.type.name in _TRANSPARENT:
        producer = producers.get(producer.get_input(0).name)
    return producer is not None and producer.type.name == "DEQUANTIZE" and producer.get_input(0).dtype.name == "INT8"


def check_network(layers: dict[str, dict[str, int]], metadata: dict[str, Any]) -> None:
    """Raise RuntimeError unless a parsed network has the precision that its ONNX file states.

    Args:
        layers: Counts of `network_layers`.
        metadata: The ONNX file's metadata: `precision`, and for "int8" the number of quantised layers.
    """
    counts: Counter[str] = Counter()
    for types in layers.values():
        counts.update(types)
    precision = metadata["precision"]
    expected = Counter({"INT8": metadata["quantization"]["quantized"]} if precision == "int8" else {})
    expected["FLOAT" if precision == "int8" else _TYPES[precision]] = counts.total() - expected.total()
    if counts != expected:
        raise RuntimeError(
            f"The ONNX file states that it is {precision}, for which TensorRT's layers with weights would be "
            f"{_format_counts(expected)}, but they are {_format_counts(counts)}. No engine was written. Export the "
            "network again with bpkd_sdk.export (and quantize it, for int8); a file changed by another program keeps "
            "its old label."
        )


def _format_counts(types: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(types.items()) if count) or "none"


def engine_layers(inspector_json: str, names: Iterable[str]) -> dict[str, str]:
    """Read the type of each layer with weights in a finished engine, as far as its inspector states it.

    Args:
        inspector_json: ``EngineInspector.get_engine_information(LayerInformationFormat.JSON)`` of an engine built with
            detailed profiling verbosity.
        names: Names of the layers with weights in the network.

    Returns:
        INT8, HALF or FLOAT by the layer's name: the type of the weights of the kernel that contains the layer, or else
        the narrowest type of the kernel's inputs and outputs. Layers without a stated type are absent.
    """
    kernels = [layer for layer in json.loads(inspector_json).get("Layers", ()) if isinstance(layer, dict)]
    types = {}
    for kernel in kernels:
        if type_ := _kernel_type(kernel):
            types.update(dict.fromkeys((name for name in names if _contains_layer(kernel, name)), type_))
    return types


def _contains_layer(kernel: dict[str, Any], name: str) -> bool:
    return kernel.get("Name") == name or f"[ONNX Layer: {name}]" in kernel.get("Metadata", "")


def _kernel_type(kernel: dict[str, Any]) -> str | None:
    weights = kernel.get("Weights")
    if isinstance(weights, dict) and (type_ := _narrowest_type(str(weights.get("Type")))):
        return type_
    # For an engine with a range of shapes the inspector states "N/A due to dynamic shapes" here.
    tensors = [tensor for side in ("Inputs", "Outputs") for tensor in kernel.get(side, ())]
    return _narrowest_type(" ".join(str(tensor.get("Format/Datatype")) for tensor in tensors))


def _narrowest_type(text: str) -> str | None:
    return next((type_ for type_, word in _SPELLINGS.items() if re.search(word, text, re.IGNORECASE)), None)


def check_engine_layers(inspected: Mapping[str, str], parsed: Mapping[str, str], precision: str) -> None:
    """Raise RuntimeError if a finished engine computes in another precision, or if its inspector does not show it.

    Args:
        inspected: Types of `engine_layers`.
        parsed: Types of `network_types`; they state which layers an int8 engine keeps in float32.
        precision: Precision of the ONNX file. At least one layer of its type must be inspected.
    """
    # The kernel of a float layer without stated weights may read or write its neighbours' int8.
    allowed = {"FLOAT": ("FLOAT", "INT8")} if precision == "int8" else {}
    wrong = [
        f"{name}: {type_}"
        for name, type_ in inspected.items()
        if type_ not in allowed.get(parsed[name], (parsed[name],))
    ]
    if wrong:
        raise RuntimeError(
            f"The engine is not {precision} as the ONNX file states; no engine was written. Its layers run as\n"
            f"{format_list(wrong)}\nTensorRT chose these kernels for this GPU: try another build of TensorRT, or the "
            "next wider precision."
        )
    if _TYPES[precision] not in inspected.values():
        raise RuntimeError(
            f"The engine's inspector names no {_TYPES[precision]} layer among {len(parsed)} with weights, so nothing "
            f"shows that the engine is {precision}; no engine was written. Try another build of TensorRT."
        )
