"""The import of a user's code by its import path `package.module:Name`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from os.path import samefile
from typing import Any

from latent_grpo.common.errors import ConfigError

FORMER_PACKAGES = ("common", "reward", "rollout_workers", "learner", "deploy")
"""Top-level packages of this program up to 0.1.0: stored settings may name what is in them."""
_MOVED = {"common.metrics": "common.sinks"}  # module of 0.1.0 -> where its plug-ins are now


class PluginError(ConfigError):
    """An import path that cannot be imported; the message says what was tried, and the caller adds its purpose."""


def is_import_path(text: str) -> bool:
    """Whether it has the form `package.module:Name`."""
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), attribute])


def load_plugin(path: str) -> Any:
    """Returns the object that the import path names. Raises :class:`PluginError`."""
    module_name, _, attribute = path.partition(":")
    if not is_import_path(path):
        raise PluginError(f"{path!r} is no import path; expected package.module:Name")
    if _is_ours(module_name.partition(".")[0]):
        raise PluginError(
            f"{path!r} is in a checkout of this program, which is imported as 'latent_grpo'{former_path_hint([path])}"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise PluginError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}); install its package, start "
            f"in its folder, or put its folder on PYTHONPATH{former_path_hint([path])}"
        ) from error
    if not hasattr(module, attribute):
        raise PluginError(
            f"module {module_name!r} ({getattr(module, '__file__', None)}) has no attribute {attribute!r}"
            f"{former_path_hint([path])}"
        )
    return getattr(module, attribute)


def former_path_hint(paths: Iterable[str]) -> str:
    """Returns the end of an error's sentence that says how import paths of 0.1.0 are written now; empty without one."""
    now = {path: new for path in paths if (new := _new_path(path)) is not None}
    return "".join(f"; {path!r} of version 0.1.0 is {new!r} now" for path, new in now.items())


def _is_ours(name: str) -> bool:
    """Whether a top-level name is a package of this program, which would be loaded twice, under two names."""
    if name not in FORMER_PACKAGES:
        return False
    spec = importlib.util.find_spec(name)
    ours = importlib.import_module(f"latent_grpo.{name}").__file__
    return spec is not None and spec.origin is not None and ours is not None and samefile(spec.origin, ours)


def _new_path(path: str) -> str | None:
    module, _, attribute = path.partition(":")
    if module.partition(".")[0] not in FORMER_PACKAGES or not is_import_path(path):
        return None
    for new in dict.fromkeys([module, _MOVED.get(module, module)]):
        try:
            found = hasattr(importlib.import_module(f"latent_grpo.{new}"), attribute)
        except ImportError:
            continue
        if found:
            return f"latent_grpo.{new}:{attribute}"
    return None
