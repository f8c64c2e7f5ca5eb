"""triton's CPU interpreter for the tests that run in a process of their own with TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Let triton 3.6's interpreter turn scalars into integers under numpy >= 2.4.

    It keeps scalars as arrays of one element, and numpy no longer converts those with `int()`.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
