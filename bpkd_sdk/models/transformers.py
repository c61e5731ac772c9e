"""Networks of Hugging Face transformers, by names of the form ``transformers/<folder or hub id>[@<revision>]``.

Weights are read from safetensors files only, and code of a repository is never executed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpkd_sdk.errors import import_optional, warn
from bpkd_sdk.hub import read_license, without_retries
from bpkd_sdk.models import weights
from bpkd_sdk.models.mask_classification import (
    MASK_CLASSIFIERS,
    ONEFORMER,
    PREFIX,
    MaskClassificationNetwork,
    classifies_masks,
)
from bpkd_sdk.models.spec import class_names_of_config, get_provenance, get_spec, set_provenance, set_spec
from bpkd_sdk.spec import IMAGENET_MEAN, IMAGENET_STD, NetworkSpec

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of images in 0..1

HAS_AUX_HEADS, TAKES_OTHER_CHANNELS = False, False

# Networks whose position embeddings or attention are for square images of one size.
_FIXED_SIZE = ("dpt", "eomt", "eomt_dinov3")
_STRIDE = 32

# Arguments of a configuration that can be a path or a repository, from which the library loads files or code.
_SOURCES = {"backbone", "attn_implementation", "_attn_implementation", "experts_implementation"}


def check_weights(name: str, backbone_weights: str) -> None:
    """Raise an error for a folder without a configuration, or for weights other than "none" and "imagenet".

    Args:
        name: ``transformers/<folder or hub id>``.
        backbone_weights: "none" or "imagenet".
    """
    _read_config(name)
    if weights.is_file(backbone_weights):
        raise ValueError(
            f"{name!r} starts with all weights of its folder or repository (backbone_weights={weights.IMAGENET!r}) or "
            f"with random ones ({weights.NONE!r}), but got {backbone_weights!r}. Put the file into a folder with its "
            "config.json, and name that folder."
        )
    weights.check_known_weights(backbone_weights)


def build_network(name: str, num_classes: int, *, backbone_weights: str = weights.NONE) -> nn.Module:
    """Build a network of the library for a number of classes, in training mode.

    Args:
        name: ``transformers/<folder or hub id>``; a revision can follow after an ``@``.
        num_classes: C, the number of classes. If the folder has another number, the classifier has random weights.
        backbone_weights: "none" for random weights, or "imagenet" for the weights in the folder or repository, which
            may belong to more than the encoder.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the configuration is not one of a segmentation network, or an argument does not fit it.
        RuntimeError: If the files can neither be found nor downloaded.
    """
    check_weights(name, backbone_weights)
    config = _read_config(name)
    if backbone_weights == weights.NONE:
        config.id2label = None  # random weights have no classes yet
    config.num_labels = num_classes  # names the classes LABEL_0, LABEL_1, ... if they are not known
    if backbone_weights == weights.NONE:
        return _finish(name, _network_class(config)(config)).train()
    return _load(name, config).train()


def load_pretrained(name: str) -> nn.Module:
    """Open a network of the library with all of its weights, in eval mode.

    Args:
        name: ``transformers/<folder or hub id>``; a revision can follow after an ``@``.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the configuration is not one of a segmentation network, or its files lack weights.
        RuntimeError: If the files can neither be found nor downloaded.
    """
    model = _load(name, _read_config(name))
    facts = get_provenance(model)["weights"]
    if facts.get("random"):
        raise ValueError(
            f"{name!r} has no weights for {', '.join(facts['random'])}: it is not trained for segmentation. "
            f"Train it by its name, or pass create_model({name!r}, num_classes, backbone_weights={weights.IMAGENET!r})."
        )
    return model.eval()


def _parse(name: str) -> tuple[str, str | None]:
    """Return the folder or id of a name, and the revision after an ``@``."""
    source = name.removeprefix(PREFIX)
    if not source:
        raise ValueError(f"Expected a name like '{PREFIX}<folder or hub id>', but got {name!r}.")
    if Path(source).is_dir() or "@" not in source:
        return source, None
    source, _, revision = source.rpartition("@")
    return source, revision


def _options(name: str) -> dict[str, Any]:
    """Return the arguments of the library's `from_pretrained` that open a name without executing its code."""
    source, revision = _parse(name)
    return {"pretrained_model_name_or_path": source, "revision": revision or "main", "trust_remote_code": False}


def _read_config(name: str) -> Any:
    transformers = import_optional("transformers")
    config = _open(name, transformers.AutoConfig.from_pretrained)
    _network_class(config, name)
    return config


def _open(name: str, read: Any, **options: Any) -> Any:
    """Call a function of the library that reads files; state what to do if it does not find them."""
    source, _ = _parse(name)
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise FileNotFoundError(f"There is no folder {source}. Pass '{PREFIX}<folder with config.json>'.")
    try:
        with _connection(source):
            return read(**_options(name), **options)
    except OSError as error:
        raise RuntimeError(
            f"transformers cannot open {source!r}, which is {'a' if Path(source).is_dir() else 'no'} local folder: "
            f"{str(error).splitlines()[0]}\nPass a folder with config.json and model.safetensors, or connect to the "
            f"internet once; the files of the hub are then in {weights.hub_cache()}, a folder that can be copied to "
            "other machines. Weights in pickles (pytorch_model.bin) are not loaded: convert them to safetensors."
        ) from error


def _connection(source: str) -> AbstractContextManager[Any]:
    """Return a context that opens files of a folder or of the Hub, which must answer within seconds."""
    return nullcontext() if Path(source).is_dir() else without_retries()


def _network_class(config: Any, name: str = "") -> Any:
    """Return the library's class for a configuration: one with logits per pixel, or one that classifies masks."""
    transformers = import_optional("transformers")
    classes = _class_names()
    if config.model_type not in classes:
        raise ValueError(
            f"{name or config.model_type!r} is a network of the type {config.model_type!r}, which does not segment "
            f"images. The types are: {', '.join(sorted(classes))}."
        )
    return getattr(transformers, classes[config.model_type])


def _class_names() -> dict[str, str]:
    """Return the library's segmentation networks by type."""
    from transformers.models.auto import modeling_auto

    masks = modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
    pixels = modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    return {**{key: value for key, value in masks.items() if value in MASK_CLASSIFIERS}, **pixels}


def _load(name: str, config: Any) -> nn.Module:
    cls = _network_class(config)
    model, report = _open(
        name,
        cls.from_pretrained,
        config=config,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
    )
    source, revision = _parse(name)
    commit = _read_commit(source, revision)
    random = {".".join(str(key).split(".")[:2]) for key in report["missing_keys"]}
    random |= {str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"]}
    facts = {
        "source": source,
        "revision": commit,
        "license": read_license(source, commit),
        "random": sorted(random),
    }
    network = _finish(name, model)
    set_provenance(network, {"weights": {key: value for key, value in facts.items() if value}})
    return network


def _finish(name: str, network: Any) -> nn.Module:
    """Set the spec of a network of the library, and turn classes of masks into logits per pixel."""
    source, _ = _parse(name)
    set_spec(network, _spec(network, None, *_read_normalization(name, network.config)))
    model: nn.Module = network
    if classifies_masks(network):
        task = _read_task(name, network.config) if type(network).__name__ == ONEFORMER else None
        model = MaskClassificationNetwork(network, task)
    fields = recognize(model) or {}
    fields["name"] = PREFIX + (Path(source).resolve().name if Path(source).is_dir() else source)
    set_spec(model, replace(get_spec(model), **fields))
    return model


def _read_task(name: str, config: Any) -> Tensor:
    """Return the token ids (1, L) of the text that OneFormer's authors use for semantic segmentation."""
    transformers = import_optional("transformers")
    tokenizer = _open(name, transformers.AutoTokenizer.from_pretrained)
    tokens = tokenizer(
        ["the task is semantic"],
        padding="max_length",
        max_length=config.task_seq_len,
        truncation=True,
        return_tensors="pt",
    )
    task: Tensor = tokens["input_ids"] * tokens["attention_mask"]
    return task


def derive_spec(network: Any) -> NetworkSpec:
    """Return the spec of a module of the library that was given as an instance.

    Its normalisation is that of the image processor in the folder or repository that it was loaded from, as far as that
    is on this machine; otherwise the default of the library for networks of its type.
    """
    source = str(getattr(network, "name_or_path", ""))
    return _spec(network, None, *_local_normalization(source, network.config.model_type))


def _spec(network: Any, name: str | None, mean: Sequence[float], std: Sequence[float]) -> NetworkSpec:
    return NetworkSpec(
        name,
        num_classes=network.config.num_labels,
        class_names=class_names_of_config(network),
        mean=tuple(mean),
        std=tuple(std),
        size_divisor=_size_divisor(network.config),
    )


def _size_divisor(config: Any) -> int:
    """Return a number that both sides of an image must be multiples of, so that no part of it is cut off."""
    return fixed_side(config) or _STRIDE


def fixed_side(config: Any) -> int | None:
    """Return the side of the square images that a network is made for; None if it accepts images of any size."""
    is_fixed = config.model_type in _FIXED_SIZE or getattr(config, "use_relative_position_bias", False)
    return int(config.image_size) if is_fixed and isinstance(getattr(config, "image_size", None), int) else None


def _read_normalization(name: str, config: Any) -> Normalization:
    """Return mean and standard deviation (for images in 0..1) of the image processor in a folder or repository."""
    transformers = import_optional("transformers")
    try:
        with _connection(_parse(name)[0]):
            processor = transformers.AutoImageProcessor.from_pretrained(**_options(name))
        return _normalization(processor, name)
    except OSError:
        mean, std = _default_normalization(config.model_type)
        warn(
            f"{name!r} has no preprocessor_config.json, so its images are normalised by the default of its type, "
            f"mean {mean} and standard deviation {std}. If that is wrong, add the file."
        )
        return mean, std


@functools.cache
def _local_normalization(source: str, model_type: str) -> Normalization:
    transformers = import_optional("transformers")
    if source:
        with suppress(OSError):
            processor = transformers.AutoImageProcessor.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
            return _normalization(processor, source)
    return _default_normalization(model_type)


def _default_normalization(model_type: str) -> Normalization:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    with suppress(KeyError):
        default = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[model_type]]["torchvision"]
        if getattr(default, "do_normalize", False):
            return tuple(default.image_mean), tuple(default.image_std)
    return IMAGENET_MEAN, IMAGENET_STD


def _normalization(processor: Any, name: str) -> Normalization:
    if getattr(processor, "do_flip_channel_order", False):
        raise ValueError(
            f"The image processor of {name!r} turns RGB into BGR (do_flip_channel_order), which the network's spec "
            "cannot state. Reverse the input channels of its first convolution, and save both with "
            "do_flip_channel_order=False."
        )
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0, 0, 0), (1, 1, 1))
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def instance_origin(network: Any) -> dict[str, Any]:
    """Return the folder or repository that an instance of the library was loaded from; empty for a new network."""
    source, revision = str(network.name_or_path), getattr(network.config, "_commit_hash", None)
    if not source:
        return {}
    facts = {"source": source, "revision": revision, "license": read_license(source, revision, local_files_only=True)}
    return {key: value for key, value in facts.items() if value}


def _read_commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a revision of a repository whose files are on this machine; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return None
    file = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def recognize(model: nn.Module) -> dict[str, Any] | None:
    """Return the fields of `NetworkSpec` that build a module again; None if it does not segment images."""
    network: Any = model.network if isinstance(model, MaskClassificationNetwork) else model
    if type(network).__name__ not in _class_names().values():
        return None
    source = Path(str(network.name_or_path or type(network).__name__))
    name = source.name if source.is_absolute() or source.is_dir() else str(source)
    config = {"class": type(network).__name__, "arguments": json.loads(network.config.to_json_string(use_diff=False))}
    config["arguments"].pop("_name_or_path", None)
    if isinstance(model, MaskClassificationNetwork) and model.task_inputs is not None:
        config["task_inputs"] = model.task_inputs.flatten().tolist()
    return {"name": PREFIX + name, "num_classes": network.config.num_labels, "config": config}


def rebuild(spec: NetworkSpec) -> nn.Module:
    """Build the network of a spec that `recognize` returned, with random weights.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the configuration is not one of a segmentation network of the library, or names files or code,
            which the library would load.
    """
    transformers = import_optional("transformers")
    content = spec.config or {}
    try:
        config = transformers.AutoConfig.for_model(**_without_sources(content["arguments"]))
        cls = _network_class(config)
        if cls.__name__ != content["class"]:
            raise ValueError(f"networks of the type {config.model_type!r} are {cls.__name__}")
        network: nn.Module = cls(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"transformers {transformers.__version__} cannot build {spec.name!r} from its configuration: {error}. "
            "Install the version that wrote it, or pass an instance: load_model(path, model=...)."
        ) from error
    if not classifies_masks(network):
        return network
    task = content.get("task_inputs")
    return MaskClassificationNetwork(network, None if task is None else torch.tensor([task]))


def _without_sources(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, which may be of an untrusted file, without the request to load other weights.

    Raises:
        ValueError: If it names a path or a repository.
    """
    # The library looks for the name of a backbone on the hub, except for one of timm, whose configuration has a type.
    is_timm = arguments.get("model_type") == "timm_backbone"
    for key in _SOURCES & arguments.keys():
        is_looked_up = key == "backbone" and not is_timm and arguments[key] is not None
        if is_looked_up or any(mark in str(arguments[key]) for mark in "/\\:"):
            raise ValueError(f"{key!r} is {arguments[key]!r}, from which files or code would be loaded")
    safe = {
        key: _without_sources(value) if isinstance(value, Mapping) else value
        for key, value in arguments.items()
        if key not in ("_name_or_path", "name_or_path")  # the folder or repository of the image processor
    }
    return safe | ({"use_pretrained_backbone": False} if "use_pretrained_backbone" in safe else {})
