"""`AutoConfig`, `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` know us once `dynamic_llava` is imported.

Registering a class needs the class, and ours need torch and transformers, which `import dynamic_llava` shall not load.
So two stand-ins are registered, by transformers' public `register`, as soon as somebody else has loaded its Auto
classes. The configuration's stand-in loads the real classes and registers them when it is first asked for anything: in
the middle of a call, never in the middle of an import. The processor's stays, and passes every call on.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class DynamicLlavaConfig:
    """Stands for `dynamic_llava.DynamicLlavaConfig` in AutoConfig until it is first used."""

    model_type = "dynamic_llava"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a real configuration."""
        return _load_config()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a real configuration; AutoConfig.from_pretrained asks for it."""
        return _load_config().from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a real configuration."""
        return _load_config().from_pretrained(*args, **kwargs)


class DynamicLlavaProcessor:
    """Stands for `dynamic_llava.DynamicLlavaProcessor` in AutoProcessor, which looks for it by its name."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a real processor."""
        from dynamic_llava.processing import DynamicLlavaProcessor

        return DynamicLlavaProcessor.from_pretrained(*args, **kwargs)


def _load_config() -> Any:
    """Return the real configuration class; loading it registers it and the models, and the processor follows here."""
    from transformers import AutoProcessor

    from dynamic_llava.model import DynamicLlavaConfig
    from dynamic_llava.processing import DynamicLlavaProcessor

    AutoProcessor.register(DynamicLlavaConfig, DynamicLlavaProcessor, exist_ok=True)
    return DynamicLlavaConfig


def _register_config(module: ModuleType) -> None:
    module.AutoConfig.register(DynamicLlavaConfig.model_type, DynamicLlavaConfig)


def _register_processor(module: ModuleType) -> None:
    module.AutoProcessor.register(DynamicLlavaConfig, DynamicLlavaProcessor)


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.processing_auto": _register_processor,
}
"""What to do when a module of transformers has been loaded."""


class _AfterLoading(MetaPathFinder):
    """Finds nothing itself: it lets the other finders find, and adds our registration to the end of the loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders say of a module that we wait for; None for all the others."""
        if fullname not in _REGISTRATIONS:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _REGISTRATIONS[fullname](module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]  # this spec's own loader
        return spec


def register_auto_classes() -> None:
    """Make transformers' Auto classes know this package, now or when they are loaded; loads nothing itself."""
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _AfterLoading) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterLoading())
