"""Which engine a run's rollout workers have: the one of `rollout.engine`, or what `auto` takes.

The choice is a function of the settings and this program alone, so that every worker and the driver make the same one.
It imports neither torch nor vLLM, so that `validate` can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_grpo.common.config import RunConfig
from latent_grpo.rollout_workers.vllm_plugin.support import PROVEN_ON_CUDA


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """The engine, and why it is that one."""

    asked: str  # rollout.engine
    name: Literal["transformers", "vllm"]
    why: str

    @property
    def sentence(self) -> str:
        """`transformers (rollout.engine auto: ...)`, or the engine's name where the settings name it."""
        return self.name if self.asked == self.name else f"{self.name} (rollout.engine {self.asked}: {self.why})"


def choose_engine(config: RunConfig, *, proven: bool = PROVEN_ON_CUDA) -> EngineChoice:
    """Returns the run's engine. `auto` takes vLLM on GPUs once its CUDA build is `proven`, else transformers."""
    asked = config.rollout.engine
    if asked != "auto":
        return EngineChoice(asked=asked, name=asked, why="rollout.engine names it")
    if not config.rollout.resources.num_gpus:
        return EngineChoice(asked=asked, name="transformers", why="its workers have no GPU")
    if config.deterministic:
        return EngineChoice(asked=asked, name="transformers", why="vLLM's batches depend on timing")
    if not proven:
        why = "vLLM's latent steps have not been run on a GPU yet; rollout.engine=vllm takes it nevertheless"
        return EngineChoice(asked=asked, name="transformers", why=why)
    return EngineChoice(asked=asked, name="vllm", why="its latent steps were proven on CUDA, docs/gpu.md")
