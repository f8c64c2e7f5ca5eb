"""Flux Attention: a small router picks full or sparse attention per layer and request, on a frozen language model.

Public names load on first use, so that importing the package costs nothing and needs no optional dependency.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_attention.cache import FluxCache
    from flux_attention.config import FluxConfig
    from flux_attention.generation import generate
    from flux_attention.models.adapter import load_adapter, save_adapter
    from flux_attention.models.attach import attach, detach
    from flux_attention.models.backbones import load_backbone
    from flux_attention.route import Route
    from flux_attention.router import LayerRouter

__version__ = "0.1.0"

__all__ = [
    "FluxCache",
    "FluxConfig",
    "LayerRouter",
    "Route",
    "attach",
    "detach",
    "generate",
    "load_adapter",
    "load_backbone",
    "save_adapter",
]

_HOME = {
    "FluxCache": "cache",
    "FluxConfig": "config",
    "LayerRouter": "router",
    "Route": "route",
    "attach": "models.attach",
    "detach": "models.attach",
    "generate": "generation",
    "load_adapter": "models.adapter",
    "load_backbone": "models.backbones",
    "save_adapter": "models.adapter",
}


def __getattr__(name: str) -> Any:
    """Import the module a public name lives in (PEP 562), once: the result is kept in the module's namespace."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
