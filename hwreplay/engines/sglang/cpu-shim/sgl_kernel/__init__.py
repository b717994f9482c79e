"""Import-only stand-in for `sglang-kernel`, whose CPU build is on no package index.

Every name can be imported; calling one raises. On the paths a CPU pair takes, none is called.
"""

from __future__ import annotations

from collections.abc import Callable


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU implementation here")

    missing.__name__ = name
    return missing
