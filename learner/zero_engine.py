"""DeepSpeed ZeRO around a module: the update of one rank, its guard against non-finite values, and full weights.

The caller normalises gradients: the loss of a micro-batch is already divided by the update's global count, and
DeepSpeed's averaging over ranks is undone here. A parameter's gradient is therefore the sum over all micro-batches of
all ranks, whatever the number of ranks, the stage and the packing.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so

from latent_grpo.common.config import LearnerConfig, OptimizerConfig
from latent_grpo.common.errors import RunError
from latent_grpo.common.network import interface_towards, serve_store
from latent_grpo.learner.state import (
    OLD_TAG,
    LearnerStateMismatch,
    OldFacts,
    StateShare,
    in_buckets,
    load_state,
    read_facts,
    share_of,
    weights_only,
)
from latent_grpo.learner.stored_weights import StoredWeights

FUSED_PROVEN_ON_CUDA = False
"""Whether AdamW's fused step was run on a GPU (docs/gpu.md). It makes no copies of the parameters' size."""
OVERLAP_PROVEN_ON_CUDA = False
"""Whether ranks on several GPUs have trained with communication beside the backward pass (docs/gpu.md)."""
SMALL_BUCKET, LARGE_BUCKET = 5_000_000, 50_000_000  # elements; the larger one for several GPUs
LIVE_PARAMETERS = 100_000_000  # whole ones, that a rank of ZeRO-3 keeps at most
RANKS_TIMEOUT = timedelta(minutes=30)  # for a rank to join, and for a collective
log = logging.getLogger(__name__)


class LearnerDiverged(RunError):
    """Too many non-finite updates in a row."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did."""

    grad_norm: float  # before clipping; NaN for an update that was not applied
    applied: bool
    bad_in_a_row: int  # updates that were not applied, up to and with this one


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then constant or decayed to zero at `decay_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps or total_steps
    done = min(max(step - config.warmup_steps, 0) / max(end - config.warmup_steps, 1), 1.0)
    return config.lr * ((1.0 - done) if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that can skip a step.

    ZeRO calls it for every partition; a skipped step leaves parameters and moments as they were, while DeepSpeed clears
    gradients and buffers as usual, at every stage. `max_norm` is for stage 0, where DeepSpeed reports no norm.
    """

    skip = False
    max_norm: float | None = None
    grad_norm = math.nan

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # two overloads
        if self.skip:
            return None
        if self.max_norm is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.max_norm))
        return super().step(closure)


def init_distributed(*, rank: int, world: int, address: str, port: int, device: str) -> None:
    """Joins the ranks' process group. Must run before anything imports deepspeed.

    Its store listens on rank 0's own address alone: it has no authentication, and torch would take all interfaces.
    """
    settings = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()})  # without one DeepSpeed looks for MPI
    os.environ["DS_ACCELERATOR"] = device
    if device == "cpu" and (interface := interface_towards(address, port)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger as deepspeed_log

    deepspeed_log.setLevel(logging.ERROR)  # its warnings are about choices made here: the optimizer, the guard
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    if device == "cpu":
        __compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at start, a minute
    backend, pinned = ("nccl", torch.device("cuda", 0) if world > 1 else None) if device == "cuda" else ("gloo", None)
    torch.distributed.init_process_group(
        backend,
        store=rendezvous(rank, world, address, port),
        rank=rank,
        world_size=world,
        timeout=RANKS_TIMEOUT,
        device_id=pinned,  # as DeepSpeed would say
    )
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def rendezvous(rank: int, world: int, address: str, port: int) -> TCPStore:
    """Returns the store by which ranks find each other; rank 0 serves it, on `address` alone."""
    if rank:
        return TCPStore(address, port, world, False, RANKS_TIMEOUT)
    return serve_store(address, port, RANKS_TIMEOUT)


class ZeroEngine:
    """`module` under ZeRO. All methods are collective: every rank calls them in the same order."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        learner: LearnerConfig,
        dtype: str,
        device: str = "cpu",
        stored: StoredWeights | None = None,
    ):
        """Takes the module's weights from where they are, or with ZeRO-3 from `stored`, if it was made without them."""
        import deepspeed

        if dtype == "bfloat16" and learner.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage 0 with model.dtype bfloat16 has no float32 master weights; set learner.zero_stage "
                "to 1 (the same memory with one rank) or model.dtype to float32"
            )
        self.stage, self.dtype, self.device = learner.zero_stage, dtype, torch.device(device)
        self._max_bad, self._bad_in_a_row = optimizer.max_bad_updates, 0
        trainable = [p for p in module.parameters() if p.requires_grad]
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)
        for parameter in trainable:
            parameter.register_hook(self._watch)
        self._optimizer = GuardedAdamW(
            trainable,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=self.device.type == "cpu" or learner.offload != "none" or FUSED_PROVEN_ON_CUDA,
        )
        if self.stage == 0:
            self._optimizer.max_norm = optimizer.grad_clip
        config = _deepspeed_config(learner, dtype, self.device, optimizer.grad_clip)
        if stored is not None:
            stored.shard(module, dtype=getattr(torch, dtype), device=self.device, config=config)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, model_parameters=trainable, config=config
        )
        module.train(False)
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.frozen = frozenset(
            name.removeprefix("model.") for name, p in module.named_parameters() if not p.requires_grad
        )

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this rank's share of the update's loss; shares add up over ranks and calls."""
        self._bad.logical_or_(~torch.isfinite(loss.detach()))
        self._engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, lr: float) -> UpdateResult:
        """Takes the optimizer's step, unless any rank has seen a non-finite value: then no rank's parameters change.

        A caller that can continue checks `bad_in_a_row` against `optimizer.max_bad_updates`; others call
        `ensure_finite`.
        """
        bad = self._bad.int()
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        skipped = bool(bad)
        self._bad.zero_()
        self._optimizer.skip = skipped
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        self._optimizer.skip = False
        if not skipped:
            self._bad_in_a_row = 0
            norm = self._optimizer.grad_norm if self.stage == 0 else self._engine.get_global_grad_norm()
            return UpdateResult(float(norm), True, 0)
        self._bad_in_a_row += 1
        log.warning("a non-finite loss or gradient: update not applied (%d in a row)", self._bad_in_a_row)
        return UpdateResult(math.nan, False, self._bad_in_a_row)

    def ensure_finite(self) -> None:
        """Raises :class:`LearnerDiverged` after `max_bad_updates` updates in a row that were not applied."""
        if self._bad_in_a_row >= self._max_bad:
            raise LearnerDiverged(
                f"{self._bad_in_a_row} non-finite updates in a row (optimizer.max_bad_updates {self._max_bad}); none "
                "of them was applied. Lower optimizer.lr, or resume from an earlier checkpoint"
            )

    def _watch(self, gradient: torch.Tensor) -> None:
        self._bad.logical_or_(~torch.isfinite(gradient).all())

    # -- full weights

    def full_parameters(
        self, bucket_bytes: int, without: Collection[str] = (), device: str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) for every parameter of `module.model`, tied ones once, in the model's dtype.

        Those named in `without` are left out. Tensors are the rank's own, where they lie, except with ZeRO-3: then all
        ranks gather, bucket by bucket, and must iterate; only rank 0 gets copies, on `device`.
        """
        named = [(name.removeprefix("model."), p) for name, p in self.module.named_parameters()]
        named = [(name, p) for name, p in named if name not in without]
        if self.stage < 3:
            yield from ((name, p.detach()) for name, p in named)
            return
        import deepspeed

        # ds_numel: ZeRO-3's size of the whole, not of this part
        sized = ((item, getattr(item[1], "ds_numel") * item[1].element_size()) for item in named)  # noqa: B009
        for bucket in in_buckets(sized, bucket_bytes):
            with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
                copies = [(name, p.detach().to(device, copy=True)) for name, p in bucket] if self.rank == 0 else []
            yield from copies

    # -- state

    def save(self, folder: str | Path) -> None:
        """Saves the trained parameters' float32 masters and moments (`learner.state`); each rank writes a share."""
        self._share().write(Path(folder))
        torch.distributed.barrier()

    def copy_state(self) -> StateShare:
        """Copies this rank's share of what :meth:`save` writes; all ranks call it. Later steps leave the copy alone."""
        return self._share().copied()

    def _share(self) -> StateShare:
        return share_of(
            self._trained(),
            self._optimizer,
            zero_stage=self.stage,
            dtype=self.dtype,
            bad_in_a_row=self._bad_in_a_row,
            device=self.device,
        )

    def load(self, folder: str | Path) -> None:
        """Loads what :meth:`save` wrote, with any ranks, stage and dtype; bit-equal with the same ones.

        Raises :class:`LearnerStateMismatch` for a state of other parameters, or one of DeepSpeed's own (which were
        written before version 0.3) of other ranks, another stage or another dtype.
        """
        folder = Path(folder)
        facts = read_facts(folder)
        if isinstance(facts, OldFacts):
            self._bad_in_a_row = self._load_old(folder, facts)
            return
        if self.stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()  # frees gathered copies, which would stay as they were
        load_state(folder, facts, self._trained(), self._optimizer)
        if self.stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        self._bad_in_a_row = facts.bad_in_a_row

    def _load_old(self, folder: Path, facts: OldFacts) -> int:
        own = OldFacts(ranks=self.world, zero_stage=self.stage, dtype=self.dtype)
        if facts != own:
            raise LearnerStateMismatch(
                f"{folder} was written before version 0.3 with {facts}, this learner has {own}; resume with the same "
                "learner.ranks, learner.zero_stage and model.dtype"
            )
        with weights_only(folder):
            path, state = self._engine.load_checkpoint(str(folder), tag=OLD_TAG)
        if path is None:
            raise LearnerStateMismatch(f"{folder}: DeepSpeed found no state {OLD_TAG!r} in it")
        return int(state["bad_in_a_row"])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


class ShardedModule:
    """A frozen module under ZeRO-3, of whose parameters a rank holds a share; all ranks call it equally often."""

    def __init__(self, module: nn.Module, learner: LearnerConfig, dtype: str, device: str, stored: StoredWeights):
        import deepspeed

        on = torch.device(device)
        config = _deepspeed_config(learner, dtype, on)
        stored.shard(module.requires_grad_(False), dtype=getattr(torch, dtype), device=on, config=config)
        self._engine, *_ = deepspeed.initialize(model=module, config=config)
        module.train(False)

    def __call__(self, *inputs: Any) -> Any:
        """Returns what the module returns, without a gradient."""
        with torch.no_grad():
            return self._engine(*inputs)


def communication(learner: LearnerConfig, on_gpus: bool) -> tuple[int, bool]:
    """Returns how many elements ranks exchange at once, and whether they do while the backward pass goes on."""
    proven = on_gpus and learner.ranks > 1 and OVERLAP_PROVEN_ON_CUDA
    bucket, overlap = learner.bucket_elements, learner.overlap_communication
    return (LARGE_BUCKET if proven else SMALL_BUCKET) if bucket == "auto" else bucket, (
        proven if overlap == "auto" else overlap
    )


def _deepspeed_config(
    learner: LearnerConfig, dtype: str, device: torch.device, grad_clip: float = 0.0
) -> dict[str, Any]:
    stage = learner.zero_stage
    bucket, overlap = communication(learner, device.type == "cuda")
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if learner.offload != "none":
        zero["offload_optimizer"] = host
    if learner.offload == "parameters":
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # step() is the boundary, however many backward passes came before
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload too: DeepSpeed's is compiled at the start, and skips no step
        "gradient_clipping": grad_clip if stage else 0.0,  # at stage 0 GuardedAdamW clips
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config
