"""Gives libraries of C and C++ a decimal point, whatever locale the host program has set."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

LC_NUMERIC_MASK = 1 << (4 if sys.platform == "darwin" else 1)  # locale.h of macOS, and of Linux


@contextlib.contextmanager
def decimal_point() -> Iterator[None]:
    """Lets C functions in this thread write and read numbers with a decimal point during the block.

    Only this thread's locale changes, because `locale.setlocale` would change that of all threads.
    """
    libc = ctypes.CDLL(None)
    libc.newlocale.restype = libc.uselocale.restype = libc.duplocale.restype = ctypes.c_void_p
    libc.newlocale.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
    for function in (libc.uselocale, libc.duplocale, libc.freelocale):
        function.argtypes = [ctypes.c_void_p]
    before = libc.uselocale(None)
    pointed = libc.newlocale(LC_NUMERIC_MASK, b"C", libc.duplocale(before))
    libc.uselocale(pointed)
    try:
        yield
    finally:
        libc.uselocale(before)
        libc.freelocale(pointed)
