"""Seeds for all sources of random numbers that a data set or a transform may use, so that each draw can be repeated."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

_MAX_DEPTH = 8  # the search goes no deeper into objects within objects
_MAX_ITEMS = 64  # longer lists are not searched: transforms are in short lists, samples in long ones


def mixed_seed(*parts: int) -> int:
    """Derive one 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int, generators: Sequence[Any] = ()) -> Iterator[None]:
    """Seed torch, numpy and random, and further generators; restore the state of the first three afterwards.

    Args:
        seed: Seed, at least 0.
        generators: Result of `find_generators`.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, which takes longer
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for generator in generators:
        _seed(generator, seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def find_generators(*roots: object) -> list[Any]:
    """Find the generators of random numbers that data sets and transforms contain.

    These are generators of numpy, random and torch, and transforms of Albumentations, which have a generator of their
    own. Attributes, short lists, and the variables that functions use are searched.

    Args:
        *roots: Data sets, transforms or functions.
    """
    found: list[Any] = []
    seen: set[int] = set()
    pending = [(root, 0) for root in roots]
    while pending:
        value, depth = pending.pop()
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(value))
        if _is_generator(value):
            found.append(value)
        else:
            pending.extend((part, depth + 1) for part in _parts(value))
    return found


def _is_generator(value: object) -> bool:
    is_own = isinstance(value, (np.random.Generator, np.random.RandomState, random.Random, torch.Generator))
    return is_own or (not isinstance(value, type) and callable(getattr(value, "set_random_seed", None)))


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        generator.set_random_seed(seed % 2**32)


def _parts(value: object) -> list[object]:
    """Return the objects that an object contains or uses."""
    if isinstance(value, (str, bytes, int, float, np.ndarray, torch.Tensor, type)) or inspect.ismodule(value):
        return []
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _MAX_ITEMS else []
    if isinstance(value, (list, tuple, set)):
        return list(value) if len(value) <= _MAX_ITEMS else []
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (MethodType, BuiltinMethodType)):
        return [value.__self__, getattr(value, "__func__", None)]
    if isinstance(value, FunctionType):
        used = inspect.getclosurevars(value)
        return [*used.nonlocals.values(), *used.globals.values()]
    return [*getattr(value, "__dict__", {}).values(), *_methods(value)]


def _methods(value: object) -> list[object]:
    """Return the methods of an object with which it is called or indexed, whose global variables may be transforms."""
    names = ("__call__", "__getitem__")
    return [getattr(type(value), name) for name in names if isinstance(getattr(type(value), name, None), FunctionType)]
