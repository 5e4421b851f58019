"""Every setting of a run. The key names are a public interface: profiles, `config.json` and the documents use them.

It imports neither torch, Ray nor transformers, so that `latent-grpo validate` answers in a second.
"""

from __future__ import annotations

from latent_grpo.common.config.conflicts import conflicts
from latent_grpo.common.config.learning import (
    ClipConfig,
    InductionConfig,
    InductionOptimizerConfig,
    LatentSFTConfig,
    LoRAConfig,
    NoiseConfig,
    OptimizerConfig,
    SFTOptimizerConfig,
)
from latent_grpo.common.config.loading import (
    config_as_json,
    load_config,
    of_model,
    parse_config,
    profiles_folder,
    read_profile,
)
from latent_grpo.common.config.monitoring_and_checkpoints import (
    PASS_AT_K,
    CheckpointConfig,
    DumpConfig,
    EvaluationConfig,
    HealthConfig,
    Limit,
    MetricsConfig,
)
from latent_grpo.common.config.problems_and_model import (
    DATE_FORMAT,
    DEFAULT_DATE,
    Columns,
    Dtype,
    ModelConfig,
    NewModelConfig,
    PromptConfig,
    TaskConfig,
    VerifierDefinition,
)
from latent_grpo.common.config.run import (
    ALGORITHM_DEFAULTS,
    LATENT_ONLY_KEYS,
    OBJECTIVE_KEYS,
    Algorithm,
    RunConfig,
)
from latent_grpo.common.config.section import Section, Share
from latent_grpo.common.config.services import (
    ActorResources,
    DeadlineConfig,
    LearnerConfig,
    RolloutConfig,
    VerifierConfig,
    VLLMConfig,
    WeightsConfig,
)
from latent_grpo.common.config.stopping import StopConfig
from latent_grpo.common.config.yaml_files import parse_override, read_mapping, with_value
from latent_grpo.common.errors import ConfigError
from latent_grpo.common.types import NoiseMode

__all__ = [
    "ALGORITHM_DEFAULTS",
    "DATE_FORMAT",
    "DEFAULT_DATE",
    "LATENT_ONLY_KEYS",
    "OBJECTIVE_KEYS",
    "PASS_AT_K",
    "ActorResources",
    "Algorithm",
    "CheckpointConfig",
    "ClipConfig",
    "Columns",
    "ConfigError",
    "DeadlineConfig",
    "Dtype",
    "DumpConfig",
    "EvaluationConfig",
    "HealthConfig",
    "InductionConfig",
    "InductionOptimizerConfig",
    "LatentSFTConfig",
    "LearnerConfig",
    "Limit",
    "LoRAConfig",
    "MetricsConfig",
    "ModelConfig",
    "NewModelConfig",
    "NoiseConfig",
    "NoiseMode",
    "OptimizerConfig",
    "PromptConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTOptimizerConfig",
    "Section",
    "Share",
    "StopConfig",
    "TaskConfig",
    "VLLMConfig",
    "VerifierConfig",
    "VerifierDefinition",
    "WeightsConfig",
    "config_as_json",
    "conflicts",
    "load_config",
    "of_model",
    "parse_config",
    "parse_override",
    "profiles_folder",
    "read_mapping",
    "read_profile",
    "with_value",
]
