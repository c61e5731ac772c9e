"""Runtimes whose classes are put in the order of a data set's classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bpkd_sdk.arrays import Array
from bpkd_sdk.class_map import ClassGroups, ClassMap, group_classes
from bpkd_sdk.classes import ClassFacts, Order, check_class_count, class_order, reorder_logits, reorder_masks
from bpkd_sdk.runtime.base import Runtime
from bpkd_sdk.runtime.inference import check_logits


def match_runtime(
    runtime: Runtime,
    data: ClassFacts,
    data_name: str,
    *,
    match_classes: bool = True,
    class_map: ClassMap | None = None,
    others: bool = False,
) -> MatchedRuntime:
    """Compare the classes of a runtime with those of data, and put them in the data's order.

    Args:
        runtime: Any runtime; it is not changed.
        data: Class names and palette of a data set, or of another network.
        data_name: Name of the data in error messages.
        match_classes: Whether class names are compared; False takes the runtime's classes by position.
        class_map: Classes of the runtime for each class of the data, see `bpkd_sdk.class_map`; None: the same classes.
        others: Whether logits have a further channel, and masks a further id, for classes that the map leaves out.

    Raises:
        ValueError: If the number of classes or their names differ, or do not fit the map. For a module, and for a file
            that does not state its number of classes, the first call raises it.
    """
    if class_map is not None:
        if runtime.metadata["argmax"]:
            raise ValueError(f"class_map merges logits, but {runtime.name} returns masks. Export it with argmax=False.")
        groups = group_classes(class_map, runtime.spec, data, network_name=runtime.name, data_name=data_name)
        return MatchedRuntime(runtime, data, data_name, None, groups, others=others)
    # The spec of a module may be older than its classifier, so the first call checks the number of classes.
    if runtime.spec.num_classes and not runtime.is_module:
        check_class_count(
            runtime.spec.num_classes, len(data.class_names), network_name=runtime.name, data_name=data_name
        )
    order = class_order(runtime.spec, data, network_name=runtime.name, data_name=data_name, match_classes=match_classes)
    return MatchedRuntime(runtime, data, data_name, order)


class MatchedRuntime(Runtime):
    """A runtime whose outputs are in the order of the data's classes.

    Args:
        runtime: Runtime that is wrapped.
        data: Class names and palette of the data.
        data_name: Name of the data in error messages.
        order: The runtime's class for each class of the data; None for the same order.
        groups: The runtime's classes for each class of the data, if they are merged.
        others: Whether a further channel contains the classes that the groups leave out.
    """

    def __init__(
        self,
        runtime: Runtime,
        data: ClassFacts,
        data_name: str,
        order: Order | None,
        groups: ClassGroups | None = None,
        *,
        others: bool = False,
    ) -> None:
        names, palette = tuple(data.class_names), tuple(data.palette)
        one_logit = runtime.spec.num_classes == 1 and len(names) == 2
        spec = replace(runtime.spec, num_classes=1 if one_logit else len(names), class_names=names, palette=palette)
        super().__init__(runtime.name, spec, runtime.metadata, runtime.device, runtime.accepts)
        self.runtime = runtime
        self.data_name = data_name
        self.order = order
        self.groups = groups
        self.others = others
        self.is_checked = False

    def prepare(self, images: Any) -> Any:
        """Prepare images as the wrapped runtime does."""
        return self.runtime.prepare(images)

    def infer(self, inputs: Any) -> Any:
        """Run the wrapped runtime, and put its logits or masks in the data's order."""
        return self._reordered(self.runtime.infer(inputs))

    def logits_at_stride(self, images: Any) -> Any:
        """Return logits as the wrapped runtime does, in the data's order."""
        return self._reordered(self.runtime.logits_at_stride(images))

    def _reordered(self, outputs: Array) -> Array:
        if outputs.ndim == 3:
            return reorder_masks(outputs, self.order)
        if self.groups is None:
            check_class_count(
                outputs.shape[1], len(self.spec.class_names), network_name=self.name, data_name=self.data_name
            )
        if not self.is_checked:  # only once, because the check waits for the device
            check_logits(outputs, self.name)
            self.is_checked = True
        if self.groups is not None:
            return self.groups.merge(outputs, others=self.others)
        return reorder_logits(outputs, self.order)
