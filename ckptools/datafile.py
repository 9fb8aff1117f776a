"""Typed reading of the package's own YAML files: what a family or a key map is written in.

Knows no keys of its own; a file that breaks its language is a ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptools.errors import nearest


def check_keys(data: Mapping[str, object], known: Iterable[str]) -> None:
    """Raise a ValueError for a key that is not known, naming the nearest one."""
    for key in sorted(data.keys() - set(known)):
        raise ValueError(f"unknown key {key!r}; {nearest(key, known)}")


def mapping(data: object) -> dict[str, object]:
    """A mapping with texts as keys; empty for None."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise TypeError(f"a mapping is wanted, not {data!r}")
    return {str(key): value for key, value in data.items()}


def items(data: object) -> list[object]:
    """A list; of one item where there is no list, empty for None."""
    if data is None:
        return []
    return data if isinstance(data, list) else [data]


def texts(data: object) -> tuple[str, ...]:
    """The items as texts."""
    return tuple(str(item) for item in items(data))
