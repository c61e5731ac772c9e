"""Class maps: a network with other classes than the data, whose logits are merged into the data's classes.

A map states for each class of the data the names or ids of the network's classes that belong to it:

    {"road": ["road", "parking"], "car": "car", "train": [], "background": "*"}

"*" stands for all classes that the map does not name. Without it, these classes are left out. An empty list states that
the network has no such class.

The logit of a merged class c is L_c, the logsumexp of its columns z_k. exp(L_c) is the sum of all exp(z_k), so that the
softmax of L adds up the probabilities of the network's softmax: softmax(L)_c = sum of p_k. If columns are left out, the
same softmax is p renormalised over the classes that are kept: the probability of c, given that it is one of them. A
class of a single column keeps its logit, so that losses over positions compare the same quantity as without a map.

In training:

- A distillation method gets only the classes that the teacher has, of teacher and student. Labels of all other classes
  are void for it, and its softmax over classes is renormalised. A class with an empty list is not distilled: only the
  cross-entropy of the labels trains it.
- Where classes of the teacher that are left out are likelier than all others, the method still compares the
  renormalised probabilities. The student has to choose one of its classes there too, and this is the teacher's choice
  among them; void pixels are distilled in the same way. A loss over positions (CWD, the body term of BPKD) gives such
  pixels little weight, because the kept logits are usually low there.
- With labels="teacher", such pixels are void, because a label would state what the teacher does not. The validation
  leaves them out as well.
- Feature maps are not mapped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Protocol

from bpkd_sdk.arrays import Array, array_namespace, at_least_float32, logsumexp, select_channels
from bpkd_sdk.classes import ClassFacts, ClassMismatchError, is_unnamed, plain_name, two_class_logits
from bpkd_sdk.errors import did_you_mean, format_list

if TYPE_CHECKING:
    from torch import Tensor

    from bpkd_sdk.output import SegmentationOutput

ClassMap = Mapping[str, str | int | Collection[str | int]]

ALL_OTHERS = "*"
ABSENT_LOGIT = -1e4  # logit of a class that the network lacks; its probability is 0 in every precision
REST_NAMES = ("background", "bg", "other", "others", "rest", "misc", "unknown")


@contextmanager
def class_map_advice(advice: str, network: ClassFacts, data: ClassFacts) -> Iterator[None]:
    """Add to an error about other classes how a class map is passed.

    Args:
        advice: Sentence that introduces the map, such as "If the classes differ, pass".
        network: Class names of the network.
        data: Class names of the data.
    """
    try:
        yield
    except ClassMismatchError as error:
        first = network.class_names[0] if network.class_names else 0
        raise ClassMismatchError(
            f"{error} {advice} class_map (--class-map): the network's classes for each class of the data, such as "
            f"{{{data.class_names[0]!r}: [{first!r}], ...}}."
        ) from error


class NetworkFacts(ClassFacts, Protocol):
    """Class names, palette and number of logits of a network; 0 where the number is unknown."""

    @property
    def num_classes(self) -> int:
        """Number of channels of the logits."""


@dataclass(frozen=True)
class ClassGroups:
    """The columns of a network's logits that belong to each class of the data.

    A single logit z counts as the two columns [0, z].

    Attributes:
        columns: Columns of each class of the data; empty for a class that the network lacks.
        rest: Class of the data that takes all columns which `columns` does not contain; None leaves them out.
        channels: Number of columns of the network; None if it is not known before the first call.
        class_map: Map that the groups were made from, in plain JSON values; None if only the order differs.
    """

    columns: tuple[tuple[int, ...], ...]
    rest: int | None = None
    channels: int | None = None
    class_map: Mapping[str, list[str | int]] | None = None

    @property
    def taught(self) -> tuple[int, ...]:
        """Classes of the data that the network has; only these are distilled."""
        return tuple(index for index, group in enumerate(self.columns) if group or index == self.rest)

    def merge(self, logits: Array, *, others: bool = False) -> Array:
        """Merge the logits of a network into the data's classes.

        Args:
            logits: (N, K, h, w), or (N, 1, h, w) for two classes, a numpy array or a torch tensor.
            others: Whether a channel C is appended for the columns that are left out, if there are any.

        Returns:
            (N, C, h, w), or (N, C + 1, h, w) with the channel of the others; one logit remains one logit if the data
            have two classes. A class that the network lacks has `ABSENT_LOGIT`.

        Raises:
            ValueError: If the network has another number of columns than its class names or the map state.

        Examples:
            >>> import numpy as np
            >>> groups = ClassGroups(((0, 2), (1,)))
            >>> logits = np.log([0.5, 0.2, 0.3]).reshape(1, 3, 1, 1)
            >>> np.exp(groups.merge(logits)).flatten().round(4).tolist()
            [0.8, 0.2]
        """
        one_logit = logits.shape[1] == 1
        groups = self._groups(2 if one_logit else logits.shape[1], others=others)
        if one_logit and len(groups) == 2:
            return logits if groups == [(0,), (1,)] else -logits
        if one_logit:
            logits = two_class_logits(logits)
        if all(len(group) == 1 for group in groups):
            return select_channels(logits, tuple(column for (column,) in groups))
        xp = array_namespace(logits)
        logits = at_least_float32(logits)
        absent = xp.full_like(logits[:, :1], ABSENT_LOGIT)
        merged = [logsumexp(select_channels(logits, group), 1, keepdims=True) if group else absent for group in groups]
        result: Array = xp.concat(merged, axis=1)
        return result

    def left_out(self, channels: int) -> list[int]:
        """Return the columns of a network with this number of columns that belong to no class."""
        named = {column for group in self.columns for column in group}
        if channels != (self.channels or channels) or channels <= max(named):
            stated = f"its classes are {self.channels}" if self.channels else f"class_map uses its class {max(named)}"
            raise ValueError(
                f"The network returns logits of {channels} classes, but {stated}. Correct class_map, or the network's "
                "class names."
            )
        return [] if self.rest is not None else [column for column in range(channels) if column not in named]

    def _groups(self, channels: int, *, others: bool) -> list[tuple[int, ...]]:
        """Return the columns of each class, with those of the rest class, and the group of the others."""
        groups, left = list(self.columns), tuple(self.left_out(channels))
        if self.rest is not None:
            named = {column for group in groups for column in group}
            groups[self.rest] += tuple(column for column in range(channels) if column not in named)
        return [*groups, left] if others and left else groups

    def select(self, output: SegmentationOutput) -> SegmentationOutput:
        """Return an output whose logits are those of the `taught` classes only, for a distillation method."""
        if output.logits.shape[1] == len(self.taught) or output.logits.shape[1] == 1:
            return output
        return replace(output, logits=select_channels(output.logits, self.taught))

    def select_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Number the `taught` classes from 0, in labels (N, H, W) of int64; all other classes become void."""
        if len(self.taught) == len(self.columns):
            return labels
        ids = labels.new_full((len(self.columns),), ignore_index)
        ids[list(self.taught)] = labels.new_tensor(range(len(self.taught)))
        known = labels != ignore_index
        return ids[labels.where(known, 0)].where(known, ignore_index)


def group_classes(
    class_map: ClassMap, network: NetworkFacts, data: ClassFacts, *, network_name: str, data_name: str
) -> ClassGroups:
    """Find the columns that a class map assigns to each class of the data.

    Names that differ only in case, spaces, hyphens and underscores count as equal.

    Args:
        class_map: Names or ids of the network's classes for each class of the data, see the docstring of this file.
        network: Class names of the network, and the number of its logits.
        data: Class names of the data.
        network_name: Name of the network in error messages.
        data_name: Name of the data in error messages.

    Raises:
        TypeError: If the map is not a mapping from names to names or ids.
        ValueError: If a class of the data is left out, a name is unknown, or a class of the network is used twice.

    Examples:
        >>> from bpkd_sdk import NetworkSpec
        >>> network = NetworkSpec(None, 3, class_names=("road", "parking", "tree"))
        >>> data = NetworkSpec(None, 2, class_names=("road", "other"))
        >>> class_map = {"road": ["road", "parking"], "other": "*"}
        >>> groups = group_classes(class_map, network, data, network_name="it", data_name="data")
        >>> groups.columns, groups.rest
        (((0, 1), ()), 1)
    """
    entries = _entries(class_map, data.class_names, data_name)
    names = list(network.class_names)
    if network.num_classes == 1 and len(names) == 1:  # of one logit; the name of its first class is not known
        names.insert(0, "")
    channels = 2 if network.num_classes == 1 else len(names) or network.num_classes or None
    if missing := [name for name in data.class_names if name not in entries]:
        raise ValueError(
            f"class_map leaves out {len(missing)} classes of {data_name}:\n"
            f"{format_list(f'{name!r}.{did_you_mean(name, names)}' for name in missing)}\n"
            f'Add each of them: its classes of {network_name}, "*" for all classes that the map does not name, or [] '
            "if it has none; such a class is not distilled."
        )
    owners: dict[int | str, str] = {}
    columns = []
    for class_name in data.class_names:
        group = []
        for entry in entries[class_name]:
            column = entry if entry == ALL_OTHERS else _column(entry, names, channels, network_name)
            if column in owners:
                raise ValueError(
                    f"class_map uses {entry!r} of {network_name} twice, for {owners[column]!r} and {class_name!r}. "
                    "Keep it in one of them."
                )
            owners[column] = class_name
            if isinstance(column, int):
                group.append(column)
        columns.append(tuple(group))
    if ALL_OTHERS in owners and len(owners) - 1 == channels:
        raise ValueError(
            f'class_map gives "*" to {owners[ALL_OTHERS]!r}, but it names all {channels} classes of {network_name}, so '
            'that none is left. Leave out "*".'
        )
    rest = list(data.class_names).index(owners[ALL_OTHERS]) if ALL_OTHERS in owners else None
    groups = ClassGroups(tuple(columns), rest, channels, {name: entries[name] for name in data.class_names})
    if len(groups.taught) < 2:
        raise ValueError(
            f"class_map has classes of {network_name} for {len(groups.taught)} class of {data_name}, but at least two "
            "are compared. Add classes."
        )
    return groups


def _entries(class_map: ClassMap, class_names: Iterable[str], data_name: str) -> dict[str, list[str | int]]:
    """Return the list of names and ids for each class of the data that the map contains."""
    if not isinstance(class_map, Mapping):
        raise TypeError(
            'Expected `class_map` to be a mapping from classes of the data to classes of the network, such as {"road": '
            f'["road", "parking"]}}, but got {type(class_map).__name__}.'
        )
    known = list(class_names)
    entries: dict[str, list[str | int]] = {}
    for key, value in class_map.items():
        matches = [name for name in known if name == key] or [
            name for name in known if isinstance(key, str) and plain_name(name) == plain_name(key)
        ]
        if len(matches) != 1:
            raise ValueError(
                f"class_map has the key {key!r}, which is not a class of {data_name}.{did_you_mean(key, known)} Its "
                f"classes are: {', '.join(known)}. A key is a class of the data, its values are classes of the network."
            )
        if matches[0] in entries:
            raise ValueError(f"class_map has two keys for the class {matches[0]!r} of {data_name}. Join their lists.")
        values = [value] if isinstance(value, (str, Integral)) else value
        if not isinstance(values, Collection) or isinstance(values, (Mapping, bytes)):
            raise TypeError(f"Expected class_map[{key!r}] to be a name, an id or a list of both, but got {value!r}.")
        for item in values:
            if isinstance(item, bool) or not isinstance(item, (str, Integral)):
                raise TypeError(f"Expected class_map[{key!r}] to contain names and ids only, but got {item!r}.")
        ordered = sorted(values, key=str) if isinstance(values, Set) else values
        entries[matches[0]] = [item if isinstance(item, str) else int(item) for item in ordered]
    return entries


def _column(entry: str | int, names: list[str], channels: int | None, network_name: str) -> int:
    """Return the column of a class of the network."""
    if isinstance(entry, int):
        if entry < 0 or (channels is not None and entry >= channels):
            last = "" if channels is None else f" and end at {channels - 1}"
            raise ValueError(f"class_map uses the id {entry} of {network_name}, but its ids start at 0{last}.")
        return entry
    if not names:
        raise ValueError(
            f"class_map names the class {entry!r} of {network_name}, which states no class names. Use ids, or state "
            "the names: set_spec(teacher, NetworkSpec(None, num_classes=..., class_names=(...)))."
        )
    for matches in (
        [index for index, name in enumerate(names) if name == entry],
        [index for index, name in enumerate(names) if plain_name(name) == plain_name(entry)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(
                f"class_map names the class {entry!r}, but {network_name} has {len(matches)} classes of this name. Use "
                f"their ids: {', '.join(map(str, matches))}."
            )
    raise ValueError(
        f"class_map names the class {entry!r}, which {network_name} does not have.{did_you_mean(entry, names)} Its "
        f"{len(names)} classes are: {', '.join(names)}."
    )


def map_by_name(network: ClassFacts, data: ClassFacts, *, network_name: str, data_name: str) -> ClassMap | None:
    """Return the class map by equal names, if the network has all classes of the data and more; otherwise None.

    Raises:
        ValueError: If a class of the data is named like a rest ("background", "other"), because it is not certain
            whether it contains the other classes of the network.
    """
    ours, theirs = network.class_names, data.class_names
    if len(ours) <= len(theirs) or is_unnamed(ours) or is_unnamed(theirs):
        return None
    class_map: dict[str, str] = {}
    for name in theirs:
        matches = [own for own in ours if own == name] or [own for own in ours if plain_name(own) == plain_name(name)]
        if len(matches) != 1:
            return None
        class_map[name] = matches[0]
    for name in theirs:
        if plain_name(name) in REST_NAMES:
            raise ValueError(
                f"{network_name} has {len(ours)} classes, and {data_name} has {len(theirs)} of them, among them "
                f"{name!r}. State whether it contains the {len(ours) - len(theirs)} others: pass class_map with "
                f'{{{name!r}: ["*", {class_map[name]!r}]}} and the other classes, or with {{{name!r}: '
                f"[{class_map[name]!r}]}} to leave them out."
            )
    return class_map
