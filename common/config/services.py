"""The sections about the services of a run: actors' resources, rollout workers, verifiers, learner, deadlines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from latent_grpo.common.config.rules import Rule
from latent_grpo.common.config.section import Section, Share

IN_FLIGHT = "in_flight_updates"


class ActorResources(Section):
    """Resources that Ray reserves for an actor; fractions share a device."""

    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    """Number of CPUs per actor."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """Number of GPUs per actor; with 0.5, two actors share one."""
    threads: Annotated[PositiveInt, Rule.LAST_BIT] = 1
    """Number of torch threads per actor, fixed so that results do not depend on the machine."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Amounts of custom Ray resources per actor, by name."""


class VerifierConfig(Section):
    """Grading of responses, by processes that belong to each rollout worker (docs/verifiers.md)."""

    processes: Annotated[PositiveInt, Rule.MAY_CHANGE] = 1
    """Number of grader processes per rollout worker."""
    time_limit_s: Annotated[float, Field(gt=0)] = 5.0
    """Time limit for grading a response, in seconds. A response that exceeds it has reward 0, and its process is
    replaced."""
    memory_limit_bytes: PositiveInt = 2**30
    """Upper bound on the address space of a grader process, in bytes. A response that needs more has reward 0."""
    fallback: Literal["none", "last_number"] = "none"
    """Answer read from a response without a box: none (`none`), or its last number (`last_number`)."""
    max_ungraded_share: Annotated[Share, Rule.MAY_CHANGE] = 0.1
    """Upper bound on the share of ungraded samples in a step. Above it the run stops: a failure of the infrastructure
    is never reward 0."""


class VLLMConfig(Section):
    """Settings of the engine `vllm` (docs/vllm.md)."""

    tensor_parallel: PositiveInt = 1
    """Number of GPUs per engine; if above 1, `rollout.resources.num_gpus` must be the same number."""
    kv_cache_bytes: PositiveInt | None = None
    """Size of the KV cache on each GPU, in bytes; null: what `memory_share` leaves, and 1 GiB on CPU."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a GPU's memory that an engine takes, weights included; null: 0.9 of what `rollout.resources.num_gpus`
    reserves."""
    batched_tokens: PositiveInt = 8192
    """Maximum number of tokens per forward pass; longer prompts are prefilled in chunks."""
    eager: bool | None = None
    """Whether to run without torch.compile and CUDA graphs; null: true on CPU, false on GPUs."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments, passed unchanged to vLLM's EngineArgs; docs/vllm.md lists the accepted ones."""


class RolloutConfig(Section):
    """Rollout workers, which sample responses and grade them (METHOD §2)."""

    engine: Literal["transformers", "vllm", "auto"] = "transformers"
    """Inference engine: a decoding loop of this program's own (`transformers`), or vLLM (`vllm`). `auto`: vllm on GPUs
    once its latent steps were proven there (docs/gpu.md), else transformers; the run says what it took and why."""
    vllm: VLLMConfig = VLLMConfig()
    in_flight_updates: bool = False
    """Whether new weights are applied at once, in the middle of rollouts: what a running sample has drawn stays, its
    keys and values are computed again, and its trajectory names the first and the last version that drew it. Needs
    `max_staleness` of 1 or more."""
    workers: Annotated[PositiveInt, Rule.MAY_CHANGE] = 1
    """Number of rollout workers. `latent-grpo scale` changes it while a run goes on."""
    min_workers: Annotated[PositiveInt, Rule.MAY_CHANGE] = 1
    """Number of rollout workers without which a run does not begin or go on: room for them is reserved together with
    the learner's. The others join as the cluster has room for them."""
    max_workers: Annotated[PositiveInt | None, Rule.MAY_CHANGE] = None
    """Number of rollout workers up to which the run adds workers by itself, and down to `min_workers` takes them away,
    by the learner's wait and the workers' idle time; null: the number stays that of `workers`."""
    resources: Annotated[ActorResources, Rule.MAY_CHANGE] = ActorResources()
    """Each rollout worker is one actor."""
    device: Annotated[str, Rule.MAY_CHANGE] = "auto"
    """Torch device of the engine `transformers`; `auto`: cuda if the actor has a GPU, else cpu."""
    compile: Annotated[Literal["auto", "on", "off"], Rule.MAY_CHANGE] = "auto"
    """Whether the engine `transformers` takes decode steps as CUDA graphs: a forward pass, a draw and the mixture of
    a step in one launch. `auto`: on a GPU, once that was run on one (docs/gpu.md), for models whose steps can be
    captured; `on`: always, which needs a GPU."""
    max_rows: Annotated[PositiveInt, Rule.MAY_CHANGE] = 256
    """Maximum number of samples that a worker decodes side by side; a group must fit."""
    max_restarts: Annotated[int, Field(ge=0), Rule.MAY_CHANGE] = 10
    """Maximum number of workers that may be lost and replaced within an hour; one more stops the run. Before any worker
    has served, three whose processes end while they start do, since the next one would end too."""
    verifier: VerifierConfig = VerifierConfig()

    @model_validator(mode="before")
    @classmethod
    def _earlier_place(cls, data: Any) -> Any:
        """Reads `vllm.in_flight_updates`, where the key was while one engine had it, unless it is given here too."""
        vllm = data.get("vllm") if isinstance(data, dict) else None
        if not isinstance(vllm, dict) or IN_FLIGHT not in vllm:
            return data
        rest = {key: value for key, value in vllm.items() if key != IN_FLIGHT}
        return {IN_FLIGHT: vllm[IN_FLIGHT], **data, "vllm": rest}


class LearnerConfig(Section):
    """The learner, which trains the policy on one or more ranks with DeepSpeed ZeRO."""

    ranks: Annotated[PositiveInt, Rule.MAY_CHANGE, Rule.LAST_BIT] = 1
    """Number of learner ranks: actors that share each batch."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], Rule.MAY_CHANGE, Rule.LAST_BIT] = 2
    """DeepSpeed ZeRO stage: partitions nothing (0), optimizer states (1), gradients too (2), or parameters too (3).
    bfloat16 needs at least 1."""
    resources: Annotated[ActorResources, Rule.MAY_CHANGE] = ActorResources()
    """Each learner rank is one actor."""
    device: Annotated[str, Rule.MAY_CHANGE] = "auto"
    """Torch device of the learner ranks; `auto`: cuda if the actor has a GPU, else cpu."""
    tokens_per_microbatch: Annotated[PositiveInt, Rule.MAY_CHANGE, Rule.LAST_BIT] = 16384
    """Maximum number of tokens per forward pass of a rank: prompts and responses, padding included."""
    logprob_chunk_tokens: Annotated[PositiveInt | Literal["auto"], Rule.MAY_CHANGE, Rule.LAST_BIT] = "auto"
    """Number of positions whose float32 logits [.., V] exist at once; fewer need less memory. `auto`: as many as take
    128 MiB, from 16 to 2,048."""
    gradient_checkpointing: Annotated[bool | PositiveInt, Rule.MAY_CHANGE, Rule.LAST_BIT] = False
    """Whether activations are recomputed in the backward pass, which takes less memory and more time: of all layers
    (`true`), of so many of the lowest ones that are trained (a number), or of none."""
    offload: Annotated[Literal["none", "optimizer", "parameters"], Rule.MAY_CHANGE, Rule.LAST_BIT] = "none"
    """What a rank keeps in the machine's memory instead of its GPU's, which takes time: nothing (`none`), float32
    weights and the optimizer's state (`optimizer`), or the parameters as well (`parameters`). It is DeepSpeed's
    offload, needs `zero_stage` 3, and has not been run on a GPU yet (docs/gpu.md); on a CPU it changes nothing."""
    bucket_elements: Annotated[PositiveInt | Literal["auto"], Rule.MAY_CHANGE, Rule.LAST_BIT] = "auto"
    """Number of gradients or weights that ranks exchange at once; larger buckets need more memory and fewer calls.
    `auto`: 5,000,000, and 50,000,000 with ranks on several GPUs once that was run (docs/gpu.md)."""
    overlap_communication: Annotated[bool | Literal["auto"], Rule.MAY_CHANGE, Rule.LAST_BIT] = "auto"
    """Whether ranks exchange gradients while the backward pass goes on, which takes GPUs. `auto`: with ranks on several
    GPUs, once that was run (docs/gpu.md)."""
    share_prompts: Annotated[bool | Literal["auto"], Rule.MAY_CHANGE, Rule.LAST_BIT] = "auto"
    """Whether a group's prompt is computed once for several of its samples, wherever that takes less arithmetic;
    `auto`: on a CPU. On a GPU this has not been run yet (docs/gpu.md)."""
    weight_bucket_bytes: Annotated[PositiveInt, Rule.MAY_CHANGE] = 64 * 2**20
    """Size of the buckets in which weights are published, in bytes; a larger tensor has a bucket of its own."""


class WeightsConfig(Section):
    """How new weights travel from learner rank 0 to the rollout workers."""

    transport: Annotated[Literal["auto", "object_store", "shared_memory", "collective"], Rule.MAY_CHANGE] = "auto"
    """What carries the weights: Ray's object store (`object_store`), to any node; memory that learner and workers
    map (`shared_memory`), on one machine with Linux; or process groups of torch.distributed, one for each worker
    (`collective`), to any node, for networks and GPUs that gloo or NCCL use better; rank 0 then holds copies of two
    versions, more with `max_staleness`, in host memory, or with `backend: nccl` on its GPU. `auto`: shared memory on a
    Ray that this machine has alone, else the object store; the run says which and why."""
    backend: Annotated[Literal["gloo", "nccl"], Rule.MAY_CHANGE] = "gloo"
    """Backend of `transport: collective`: `gloo` from host memory to host memory, or `nccl` from GPU to GPU, which no
    GPU has run yet (docs/gpu.md)."""
    interface: Annotated[str | None, Rule.MAY_CHANGE] = None
    """Network interface of `transport: collective`, such as `eth0`, on learner rank 0's node and on the workers'; null:
    the node's address in Ray, and the interface towards it."""
    timeout_s: Annotated[float, Field(gt=0), Rule.MAY_CHANGE] = 60.0
    """Deadline of `transport: collective` for a bucket of weights to pass from rank 0 to a worker, in seconds. A group
    that misses it is given up, and the worker makes another and asks again."""
    nccl: Annotated[dict[Annotated[str, Field(pattern="^NCCL_")], str], Rule.MAY_CHANGE] = Field(default_factory=dict)
    """More variables for NCCL, such as `{NCCL_IB_HCA: mlx5_0}`, in the environment of learner ranks and workers, whose
    other groups see them too."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the processes at both ends."""
        if self.backend != "nccl":
            return {}
        return {**({"NCCL_SOCKET_IFNAME": self.interface} if self.interface else {}), **self.nccl}


class RayConfig(Section):
    """The Ray that a run starts on its machine. A cluster's is set where it is started."""

    object_store_bytes: Annotated[int, Field(ge=100_000_000)] | None = None
    """Size of the object store of a local Ray, in bytes, through which weights and trajectories pass; null: two
    published versions of the weights, more with `max_staleness`, and the trajectories of a step. Without effect on a
    cluster (`ray start --object-store-memory`)."""


class DeadlineConfig(Section):
    """Deadlines of all waits, in seconds. A component that misses its deadline is restarted, or the run stops with an
    error that names it."""

    place_s: Annotated[float, Field(gt=0)] = 1800.0
    """Time to wait for room in the cluster, in seconds: at the start for all ranks and `rollout.min_workers`, and later
    whenever fewer workers than that are left."""
    driver_s: Annotated[float, Field(gt=0)] = 120.0
    """Time without a sign of life of the run's controller, or of its Ray's head, until its supervisor starts it again,
    in seconds."""
    loop_s: Annotated[float, Field(gt=0)] = 1800.0
    """Time that the run's controller may spend on one thing without a look at the others until its supervisor starts it
    again, in seconds. Its waits do not count: each looks again and again, and has a deadline of its own. What counts is
    for example a checkpoint's check, a report, or a metric sink that does not come back."""
    start_s: Annotated[float, Field(gt=0)] = 300.0
    """Time for an actor that has a place in the cluster to load its model and answer, and for a Ray of this machine
    alone to start, in seconds."""
    rollout_s: Annotated[float, Field(gt=0)] = 600.0
    """Time that a worker with work may go without any progress, in seconds. Time in which the driver itself is stopped
    or busy does not count."""
    learner_s: Annotated[float, Field(gt=0)] = 1800.0
    """Time for one step of the learner, in seconds."""
    weights_s: Annotated[float, Field(gt=0)] = 300.0
    """Time for the learner to publish weights, for a worker to fetch them, and for it to verify and load them, in
    seconds. The groups that a worker has before new weights do not count."""
    dump_s: Annotated[float, Field(gt=0)] = 600.0
    """Time for the disk to write the dumps that wait for it, in seconds."""
    upload_s: Annotated[float, Field(gt=0)] = 1800.0
    """Time that the end of a run waits for the rest of its upload, in seconds, where `runs_folder` is a URL. After
    SIGTERM it is what is left of `terminate_s`."""
    settle_s: Annotated[float, Field(gt=0)] | None = None
    """Time for the running step to end after Ctrl-C (SIGINT), in seconds; null: that of `learner_s`. A step that takes
    longer is given up."""
    terminate_s: Annotated[float, Field(gt=0)] = 100.0
    """Time for the running step to end and its state to be saved after SIGTERM, in seconds; the machine must wait 30 s
    longer before it kills. The state gets twice what the last one took, or half of it all before one was written; while
    steps last so long that one may not end in the rest, a checkpoint is written after every step."""

    def after_signal(self, terminated: bool) -> tuple[float, str]:
        """Returns how long a running step may go on after a SIGTERM (`terminated`) or SIGINT, and the key that says so.

        The time is in seconds.
        """
        if terminated:
            return self.terminate_s, "deadlines.terminate_s"
        if self.settle_s is not None:
            return self.settle_s, "deadlines.settle_s"
        return self.learner_s, "deadlines.learner_s"
