"""The sections about the services of a run: actors' resources, rollout workers, verifiers, learner, deadlines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from latent_grpo.common.config.rules import Rule
from latent_grpo.common.config.section import Section, Share


class ActorResources(Section):
    """Ray reserves this for one actor; fractions share a device."""

    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    """The actor gets this many CPUs."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """The actor gets this many GPUs; 0.5: two actors share one."""
    threads: Annotated[PositiveInt, Rule.LAST_BIT] = 1
    """Torch computes with this many threads; the number is fixed so that results do not depend on the machine."""
    custom: dict[str, float] = Field(default_factory=dict)
    """The actor gets these amounts of custom Ray resources, by name."""


class VerifierConfig(Section):
    """Each rollout worker grades its responses in processes of its own (docs/verifiers.md)."""

    processes: Annotated[PositiveInt, Rule.MAY_CHANGE] = 1
    """A rollout worker has this many grader processes."""
    time_limit_s: Annotated[float, Field(gt=0)] = 5.0
    """A response that is not graded within this many seconds has reward 0, and its process is replaced."""
    memory_limit_bytes: PositiveInt = 2**30
    """A grader process may address this many bytes; a response that needs more has reward 0."""
    fallback: Literal["none", "last_number"] = "none"
    """A response without a box has no answer (`none`), or its last number is the answer (`last_number`)."""
    max_ungraded_share: Annotated[Share, Rule.MAY_CHANGE] = 0.1
    """The run stops where the share of ungraded samples of a step is above this: a failure of the infrastructure is
    never reward 0."""


class VLLMConfig(Section):
    """These keys are for the engine `vllm` (docs/vllm.md)."""

    tensor_parallel: PositiveInt = 1
    """One engine spans this many GPUs; `rollout.resources.num_gpus` must be as many."""
    kv_cache_bytes: PositiveInt | None = None
    """Keys and values take this many bytes on each GPU; null: what `memory_share` leaves, and 1 GiB on CPU."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """An engine takes this share of a GPU's memory, weights included; null: 0.9 of what `rollout.resources.num_gpus`
    reserves."""
    batched_tokens: PositiveInt = 8192
    """One forward pass has at most this many tokens: longer prompts are prefilled in chunks."""
    eager: bool | None = None
    """Neither torch.compile nor CUDA graphs are used if this is true; null: true on CPU, false on GPUs."""
    in_flight_updates: bool = False
    """New weights are applied at once, in the middle of rollouts; `max_staleness` must be 1 or more."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """These further arguments go unchanged to vLLM's EngineArgs; docs/vllm.md lists the accepted ones."""


class RolloutConfig(Section):
    """Rollout workers sample responses and grade them (METHOD §2)."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Responses are decoded by a loop of this program's own (`transformers`), or by vLLM (`vllm`)."""
    vllm: VLLMConfig = VLLMConfig()
    workers: Annotated[PositiveInt, Rule.MAY_CHANGE] = 1
    """The run has this many rollout workers."""
    resources: Annotated[ActorResources, Rule.MAY_CHANGE] = ActorResources()
    """Each rollout worker is one actor."""
    device: Annotated[str, Rule.MAY_CHANGE] = "auto"
    """The engine `transformers` computes on this torch device; `auto`: cuda where the actor has a GPU, else cpu."""
    max_rows: Annotated[PositiveInt, Rule.MAY_CHANGE] = 256
    """One worker decodes this many samples side by side; a group must fit."""
    max_restarts: Annotated[int, Field(ge=0), Rule.MAY_CHANGE] = 10
    """This many workers may die over the whole run, and are replaced; one more stops it."""
    verifier: VerifierConfig = VerifierConfig()


class LearnerConfig(Section):
    """The learner trains the policy, on one or more ranks with DeepSpeed ZeRO."""

    ranks: PositiveInt = 1
    """The learner has this many ranks: actors that share each batch."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO partitions nothing (0), optimizer states (1), gradients too (2), or parameters too (3); bfloat16 needs at
    least 1."""
    resources: Annotated[ActorResources, Rule.MAY_CHANGE] = ActorResources()
    """Each learner rank is one actor."""
    device: Annotated[str, Rule.MAY_CHANGE] = "auto"
    """Learner ranks compute on this torch device; `auto`: cuda where the actor has a GPU, else cpu."""
    tokens_per_microbatch: Annotated[PositiveInt, Rule.MAY_CHANGE, Rule.LAST_BIT] = 16384
    """One forward pass of a rank has at most this many tokens of prompts and responses, padding included."""
    logprob_chunk_tokens: Annotated[PositiveInt, Rule.MAY_CHANGE, Rule.LAST_BIT] = 2048
    """The float32 logits [.., V] of this many positions exist at once; fewer need less memory."""
    gradient_checkpointing: Annotated[bool, Rule.MAY_CHANGE, Rule.LAST_BIT] = False
    """Activations are computed again in the backward pass if true, which needs less memory and more time."""
    weight_bucket_bytes: Annotated[PositiveInt, Rule.MAY_CHANGE] = 64 * 2**20
    """Weights are published in buckets of this many bytes."""


class DeadlineConfig(Section):
    """Every wait has a deadline, in seconds. A component that misses its deadline is restarted, or the run stops with
    an error that names it."""

    start_s: Annotated[float, Field(gt=0)] = 300.0
    """An actor has this many seconds to be scheduled, to load its model and to answer."""
    rollout_s: Annotated[float, Field(gt=0)] = 600.0
    """A worker that has work may go this many seconds without any progress."""
    learner_s: Annotated[float, Field(gt=0)] = 1800.0
    """The learner has this many seconds for one step."""
    weights_s: Annotated[float, Field(gt=0)] = 300.0
    """A worker has this many seconds to fetch and verify one publication."""
    dump_s: Annotated[float, Field(gt=0)] = 600.0
    """The disk has this many seconds to write the dumps that wait for it."""
