"""Choice of the classes of converted annotations, and of the class of each category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpkd_sdk.data.annotations.labelme import BACKGROUND
from bpkd_sdk.data.annotations.model import Annotations
from bpkd_sdk.data.classes_file import VOID, read_classes
from bpkd_sdk.errors import did_you_mean, format_list
from bpkd_sdk.spec import Color

VOID_ID = 255

ClassMap = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class ClassChoice:
    """The classes of converted labels.

    Attributes:
        names: Names of the classes, in the order of their ids.
        ids: Class id of each category, 255 for void.
        background: Label of the pixels without an annotation.
        palette: Colour of each class; empty if the annotations do not state them.
    """

    names: tuple[str, ...]
    ids: Mapping[str, int]
    background: int
    palette: tuple[Color, ...] = ()


def choose_classes(
    annotations: Annotations, class_map: ClassMap | None, background: str | None, existing: Path
) -> ClassChoice:
    """Choose the classes of converted labels.

    Args:
        annotations: Annotations with their categories.
        class_map: Categories of each class; None: each category is a class.
        background: Class of the pixels without an annotation, or "void"; None: "background", or "void" for annotations
            of all pixels.
        existing: Path of a ``classes.json``. If it exists, it decides on the classes and their order.

    Raises:
        ValueError: If a category has no class, or if there are too few or too many classes.
    """
    rest = background or (VOID if annotations.is_complete else "background")
    target = _class_of_category(annotations.categories, class_map, rest)
    listed = list(target.values()) if class_map is None else list(class_map)
    names = tuple(dict.fromkeys(name for name in listed if not _is_void(name)))
    if not _is_void(rest) and rest not in names:
        names = (rest, *names)
    if existing.is_file():
        names = _existing_names(existing, names, exact=class_map is not None)
    similar = defaultdict(list)
    for name in names:
        similar[name.lower()].append(name)
    if typos := [" and ".join(map(repr, group)) for group in similar.values() if len(group) > 1]:
        raise ValueError(
            f"Classes differ only in upper and lower case: {', '.join(typos)}. Unite them by class_map (--class-map), "
            f'for example {{"{names[-1]}": {list(similar[names[-1].lower()])}, ...}}.'.replace("'", '"')
        )
    if not all(name.strip() for name in names):
        raise ValueError(f"Expected every category to have a name, but got {list(annotations.categories)}.")
    if len(names) < 2:
        raise ValueError(
            f"Expected at least 2 classes, but the annotations have {list(names)}, and pixels without annotation are "
            f"{rest!r}. Pass background='background' (--background background) to make these pixels a class."
        )
    if len(names) > VOID_ID:
        raise ValueError(
            f"Expected at most {VOID_ID} classes, since 255 is void, but the annotations have {len(names)}."
        )
    ids = {category: VOID_ID if _is_void(name) else names.index(name) for category, name in target.items()}
    color_of = {rest: (0, 0, 0)} | {target[name]: color for name, color in reversed(list(annotations.colors.items()))}
    palette = tuple(color_of[name] for name in names if name in color_of)
    is_whole = len(palette) == len(names) == len(set(palette))
    return ClassChoice(names, ids, VOID_ID if _is_void(rest) else names.index(rest), palette if is_whole else ())


def _class_of_category(categories: Sequence[str], class_map: ClassMap | None, rest: str) -> dict[str, str]:
    """Return the class of each category; LabelMe's background is the class of pixels without annotation."""
    own = {category: rest if category == BACKGROUND else category for category in categories}
    if class_map is None:
        return own | {VOID: VOID}
    if not isinstance(class_map, Mapping):
        raise ValueError(f'Expected class_map to be like {{"vehicle": ["car", "truck"]}}, but got {class_map!r:.80}.')
    target: dict[str, str] = {}
    for name, value in class_map.items():
        members = [value] if isinstance(value, str) else value
        if not isinstance(name, str) or not all(isinstance(member, str) for member in members):
            raise ValueError(
                f'Expected class_map to be like {{"vehicle": ["car", "truck"]}}, but got {name!r}: {value!r}.'
            )
        for member in members:
            if target.setdefault(member, name) != name:
                raise ValueError(f"class_map puts {member!r} into two classes, {target[member]!r} and {name!r}.")
    mapped = {*target, rest}
    if free := [category for category, name in own.items() if not {category, name} & mapped and not _is_void(name)]:
        raise ValueError(
            f"class_map has no class for these categories of the annotations; add each to a class, or to {VOID!r}:\n"
            f"{format_list(free, limit=20)}{did_you_mean(free[0], target)}"
        )
    return own | {VOID: VOID} | target


def _existing_names(file: Path, names: Sequence[str], *, exact: bool) -> tuple[str, ...]:
    """Return the classes of an existing ``classes.json``, if they contain the given ones."""
    classes = read_classes(file)
    if classes.ids is not None or classes.colors is not None or classes.ignore_index != VOID_ID:
        raise ValueError(
            f'{file} maps values with "ids", or has another "ignore_index", but converted labels contain class ids, '
            "and 255 for void. Convert into another folder."
        )
    lacking = [name for name in names if name not in classes.names]
    if lacking or (exact and classes.names != tuple(names)):
        raise ValueError(
            f"{file} has the classes {', '.join(classes.names)}; the annotations have {', '.join(names)}. Map them to "
            "the same classes in the same order with class_map (--class-map), or convert into another folder."
        )
    return classes.names


def _is_void(name: str) -> bool:
    return name.lower() == VOID
