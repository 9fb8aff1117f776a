"""The compiled kernels as a processor without fp16 conversions of its own runs them."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import ckptools.native
from ckptools.native import KERNELS, LIBRARY, Kernels


@cache
def portable_kernels() -> Kernels | None:
    """None where the package was built without a C compiler."""
    if KERNELS is None:
        return None
    path = Path(ckptools.native.__file__).with_name(LIBRARY)
    return Kernels(ctypes.CDLL(str(path)), portable=True)
