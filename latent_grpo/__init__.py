"""Latent reasoning: `LatentModel` runs a trained model, `open_run` reads a run; `latent_grpo.deploy` trains one.

In a checkout the packages are the folders beside this one, which this file adds to the search path of `latent_grpo`;
in a wheel they are folders of this one, and nothing is added. Either way a module has one name.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_grpo.deploy.view.run_data import open_run
    from latent_grpo.rollout_workers.latent_model import LatentModel, LatentStep, Response

__all__ = ["LatentModel", "LatentStep", "Response", "open_run"]

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "rollout_workers").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, since it needs torch and transformers, which take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "open_run":
        from latent_grpo.deploy.view import run_data

        return run_data.open_run
    from latent_grpo.rollout_workers import latent_model

    return getattr(latent_model, name)
