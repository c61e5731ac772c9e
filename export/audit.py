"""The precision that TensorRT's layers really have, against the one that was asked for.

TensorRT 11 takes an FP16 flag and builds FP32 without a word; so nothing here asks what was requested. In a strongly
typed network the types of the parsed layers are those of the engine, which any machine can read; where there is a GPU,
the finished engine is read as well.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bpkd_sdk.errors import listed

WEIGHTED = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")

_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}
# Layers that only pass on what a dequantisation gives them.
_TRANSPARENT = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "CAST")
# How the engine inspector of one release or another spells a type. As whole words: UINT8 is an image's or a mask's.
_SPELLINGS = {"INT8": r"\bint8\b", "HALF": r"\b(half|fp16)\b", "FLOAT": r"\b(float|fp32)\b"}


def network_layers(network: Any) -> dict[str, dict[str, int]]:
    """Number of layers with weights by kind and type, of a parsed network.

    Args:
        network: A TensorRT `INetworkDefinition`.

    Returns:
        For example ``{"CONVOLUTION": {"HALF": 67}}``.
    """
    counts: dict[str, Counter[str]] = {}
    for layer, type_ in _weighted(network):
        counts.setdefault(layer.type.name, Counter())[type_] += 1
    return {kind: dict(types) for kind, types in counts.items()}


def network_types(network: Any) -> dict[str, str]:
    """The type of each layer with weights of a parsed network, by its name."""
    return {layer.name: type_ for layer, type_ in _weighted(network)}


def _weighted(network: Any) -> Iterator[tuple[Any, str]]:
    """Every layer with weights, and its type.

    The type is that of the layer's output, or INT8 where all its inputs come from int8 through a dequantisation, which
    is how a strongly typed network says that the layer computes in int8.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    for layer in layers:
        if layer.type.name in WEIGHTED:
            yield layer, _type(layer, makers)


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
    wanted["FLOAT" if precision == "int8" else _TYPES[precision]] = found.total() - wanted.total()
    if found != wanted:
        raise RuntimeError(
            f"The ONNX file says that it is {precision}, for which TensorRT's layers with weights would be "
            f"{_counted(wanted)}, but they are {_counted(found)}. No engine was written. Export the network again with "
            "bpkd_sdk.export (and quantize it, for int8); a file changed by another program keeps its old label."
        )


def _counted(types: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(types.items()) if count) or "none"


def engine_layers(inspector_json: str, names: Iterable[str]) -> dict[str, str]:
    """The type of each layer with weights in a finished engine, as far as its inspector tells.

    Args:
        inspector_json: ``EngineInspector.get_engine_information(LayerInformationFormat.JSON)`` of an engine built with
            detailed profiling verbosity.
        names: Of the layers with weights in the network.

    Returns:
        INT8, HALF or FLOAT by name: the type of the weights of the kernel which a layer became a part of, or else the
        narrowest type that enters or leaves it. Layers whose type the inspector does not tell are absent.
    """
    kernels = [layer for layer in json.loads(inspector_json).get("Layers", ()) if isinstance(layer, dict)]
    found = {}
    for kernel in kernels:
        if type_ := _kernel_type(kernel):
            found.update(dict.fromkeys((name for name in names if _holds(kernel, name)), type_))
    return found


def _holds(kernel: dict[str, Any], name: str) -> bool:
    return kernel.get("Name") == name or f"[ONNX Layer: {name}]" in kernel.get("Metadata", "")


def _kernel_type(kernel: dict[str, Any]) -> str | None:
    weights = kernel.get("Weights")
    if isinstance(weights, dict) and (type_ := _narrowest(str(weights.get("Type")))):
        return type_
    # Of an engine with a range of shapes it says "N/A due to dynamic shapes" here.
    tensors = [tensor for side in ("Inputs", "Outputs") for tensor in kernel.get(side, ())]
    return _narrowest(" ".join(str(tensor.get("Format/Datatype")) for tensor in tensors))


def _narrowest(told: str) -> str | None:
    return next((type_ for type_, word in _SPELLINGS.items() if re.search(word, told, re.IGNORECASE)), None)


def check_engine_layers(found: Mapping[str, str], parsed: Mapping[str, str], precision: str) -> None:
    """Raise RuntimeError if a finished engine computes in another precision than was asked for, or does not tell.

    Args:
        found: As `engine_layers` reads them.
        parsed: As `network_types` gives them.
        precision: As asked for. At least one layer of its type must be found; which layers an int8 engine keeps in
            float32, the parsed network says.
    """
    # The kernel of a float layer that tells no weights may take or give what its neighbours have in int8.
    allowed = {"FLOAT": ("FLOAT", "INT8")} if precision == "int8" else {}
    wrong = [
        f"{name}: {type_}" for name, type_ in found.items() if type_ not in allowed.get(parsed[name], (parsed[name],))
    ]
    if wrong:
        raise RuntimeError(
            f"The engine is not {precision} as asked for; no engine was written. Its layers run as\n{listed(wrong)}\n"
            "This is TensorRT's choice of kernels on this GPU: try another build of it, or the next wider precision."
        )
    if _TYPES[precision] not in found.values():
        raise RuntimeError(
            f"The engine's inspector names no {_TYPES[precision]} layer among {len(parsed)} with weights, so nothing "
            f"shows that the engine is {precision}; no engine was written. Try another build of TensorRT."
        )
