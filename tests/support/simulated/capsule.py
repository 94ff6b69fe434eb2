"""Pointers in capsules, as TensorRT's bindings take them."""

from __future__ import annotations

import ctypes
from typing import Any


def capsule_pointer(capsule: Any) -> int:
    """Returns the pointer in a capsule with any name, like the bindings."""
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return pointer(capsule, name(capsule)) or 0
