"""The import name of the project: `latent_grpo.common`, `latent_grpo.reward`, and so on.

In a checkout the packages are the folders beside this one, which this file adds to the search path of `latent_grpo`;
in a wheel they are folders of this one, and nothing is added. Either way a module has one name.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "rollout_workers").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
