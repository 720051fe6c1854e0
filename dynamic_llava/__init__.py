"""Dynamic-LLaVA: learned sparsification of image and output tokens, on transformers 5.

The public names below are loaded when they are first used. Importing the package loads neither torch nor transformers;
it adds an import finder (`auto_classes.py`), by which transformers' Auto classes know our checkpoints once somebody
loads them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto_classes import register_auto_classes as _register_auto_classes

if TYPE_CHECKING:
    from .chat.conversation import Conversation
    from .config import SparsityConfig
    from .layout import Packing, TokenLayout
    from .methods import METHODS, Method, get_method
    from .model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityRecord
    from .processing import DynamicLlavaProcessor
    from .projectors import PROJECTORS, Projector
    from .sparsity import ImagePredictor, OutputPredictor, masked_softmax_attention

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "PROJECTORS",
    "Conversation",
    "DynamicLlavaConfig",
    "DynamicLlavaForConditionalGeneration",
    "DynamicLlavaProcessor",
    "ImagePredictor",
    "Method",
    "OutputPredictor",
    "Packing",
    "Projector",
    "SparsityConfig",
    "SparsityRecord",
    "TokenLayout",
    "get_method",
    "masked_softmax_attention",
]

_HOME_OF = {
    "SparsityConfig": "config",
    "TokenLayout": "layout",
    "Packing": "layout",
    "ImagePredictor": "sparsity",
    "OutputPredictor": "sparsity",
    "masked_softmax_attention": "sparsity",
    "METHODS": "methods",
    "PROJECTORS": "projectors",
    "Projector": "projectors",
    "Method": "methods",
    "get_method": "methods",
    "DynamicLlavaConfig": "model",
    "DynamicLlavaForConditionalGeneration": "model",
    "SparsityRecord": "model",
    "DynamicLlavaProcessor": "processing",
    "Conversation": "chat.conversation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"{__name__} has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register_auto_classes()
