"""Prompts for frozen T5 models: train, evaluate and use them with JAX.

Public names load on first use, so that importing the package stays instant.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxprompt.api import generate, load_prompt, logits, score, stream
    from jaxprompt.backbone import load_backbone
    from jaxprompt.config import load_config
    from jaxprompt.sweep import sweep
    from jaxprompt.sweep_config import load_sweep
    from jaxprompt.train import train

__version__ = "0.1.0"

_ROOMS = {
    "generate": "jaxprompt.api",
    "load_backbone": "jaxprompt.backbone",
    "load_config": "jaxprompt.config",
    "load_prompt": "jaxprompt.api",
    "load_sweep": "jaxprompt.sweep_config",
    "logits": "jaxprompt.api",
    "score": "jaxprompt.api",
    "stream": "jaxprompt.api",
    "sweep": "jaxprompt.sweep",
    "train": "jaxprompt.train",
}

__all__ = [
    "__version__",
    "generate",
    "load_backbone",
    "load_config",
    "load_prompt",
    "load_sweep",
    "logits",
    "score",
    "stream",
    "sweep",
    "train",
]


class _Package(types.ModuleType):
    """Keeps `jaxprompt.train` the function although a submodule has that name too.

    Importing a submodule sets it as an attribute of its package; here a public name wins. The
    submodule itself is reached with `from jaxprompt.train import ...`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ROOMS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
