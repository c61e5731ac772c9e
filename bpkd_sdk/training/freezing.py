"""Freezing of the student's encoder for the first steps of a run."""

from __future__ import annotations

from torch import nn

from bpkd_sdk.features import unwrap

# Attributes of segmentation-models-pytorch; of the zoo, torchvision and some networks of transformers; and of its
# mask-classification networks. The other networks of transformers name their attribute in `base_model_prefix`.
_PATHS = ("encoder", "backbone", "model.pixel_level_module.encoder")
_WHOLE_NETWORKS = ("", "model")  # prefixes of networks whose base model contains the decoder


class FrozenEncoder:
    """The encoder of a network while it is frozen: its weights do not change, and its layers are in eval mode.

    Args:
        encoder: Part of the network that is frozen.
        keep_graph: Whether gradients are computed nevertheless and thrown away: DistributedDataParallel requires that
            the same weights have a gradient at every step.
    """

    def __init__(self, encoder: nn.Module, *, keep_graph: bool) -> None:
        self.encoder = encoder
        self.parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        self.training = [module for module in encoder.modules() if module.training]
        encoder.eval()
        if not keep_graph:
            self._require_gradients(False)

    def drop_gradients(self) -> None:
        """Remove the gradients, so that clipping does not count them and the optimiser leaves the weights unchanged."""
        for parameter in self.parameters:
            parameter.grad = None

    def release(self) -> None:
        """Let the encoder train again."""
        for module in self.training:
            module.training = True
        self._require_gradients(True)

    def _require_gradients(self, value: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(value)


def find_encoder(network: nn.Module) -> nn.Module:
    """Return the encoder of a network of the zoo, segmentation-models-pytorch, torchvision or transformers.

    In any other network, it is the module in the attribute `encoder` or `backbone`. A module with a single child is a
    wrapper, and the child is searched.

    Raises:
        ValueError: If there is no such module, or if no weight outside of it could be trained.
    """
    module = unwrap(network)
    prefix = getattr(module, "base_model_prefix", "")
    paths = _PATHS if prefix in _WHOLE_NETWORKS else (*_PATHS, str(prefix))
    modules: dict[str, nn.Module] = dict(module.named_modules())
    encoder = next((modules[path] for path in paths if path in modules), None)
    if encoder is None:
        children = list(module.children())
        if len(children) == 1:
            return find_encoder(children[0])
        names = ", ".join(name for name, _ in module.named_children()) or "none"
        raise ValueError(
            f"freeze_encoder_steps: the encoder of {type(module).__name__} is not known; its parts are: {names}. "
            "Name the attribute of its encoder `encoder` or `backbone`, or leave freeze_encoder_steps out."
        )
    inside = {id(parameter) for parameter in encoder.parameters()}
    if all(id(parameter) in inside for parameter in module.parameters() if parameter.requires_grad):
        raise ValueError(
            f"freeze_encoder_steps: {type(module).__name__} has no weights outside of its encoder that require a "
            "gradient, so nothing could be trained. Leave freeze_encoder_steps out."
        )
    return encoder
