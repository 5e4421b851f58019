"""vLLM's workers with the decoder in their model runner, and the methods that the engine calls on them.

vLLM gets them as `worker_cls` and imports them in its own processes, so this package must be installed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from latent_grpo.rollout_workers.decoding import Decoder, Record
from latent_grpo.rollout_workers.vllm_plugin import weights
from latent_grpo.rollout_workers.vllm_plugin.serving import Served
from latent_grpo.rollout_workers.vllm_plugin.settings import new_core, served

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase
else:
    WorkerBase = object  # the subclass below adds vLLM's worker of its device


class LatentWorker(WorkerBase):
    """Adds the core to the runner that vLLM has chosen, and answers the engine (`collective_rpc`) on every rank.

    All ranks draw the same ids, since all have the same logits.
    """

    served: Served | None  # behind vLLM's server

    def layers_of(self, names: Sequence[str]) -> list[str]:
        """Returns the layer that holds each of these parameters; see `weights.py` for this and the next four."""
        return [weights.layer_of(self.get_model(), name) for name in names]

    def begin_weights(self) -> None:
        """Opens the model for new weights."""
        with set_current_vllm_config(self.vllm_config):
            weights.begin(self.get_model())

    def add_weights(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Loads some of the weights."""
        with set_current_vllm_config(self.vllm_config):
            weights.load(self.get_model(), tensors)

    def end_weights(self) -> None:
        """Closes the model, so that it can compute again."""
        with set_current_vllm_config(self.vllm_config):
            weights.end(self.get_model(), self.model_config)

    def differing_weights(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
        """Returns the names of those tensors that this rank does not hold."""
        return weights.differing(self.get_model(), tensors)

    def take_records(self, uids: Sequence[int], steps: Sequence[int]) -> list[Record] | None:
        """Returns records of finished samples and frees their state. The first rank answers, the others only free."""
        if self.rank == 0:
            return self.latent_core.take(uids, steps).records()
        self.latent_core.forget(uids)
        return None

    def look_at_record(self, uid: int, steps: int) -> Record | None:
        """Returns the first response steps of a running sample. The first rank answers."""
        return self.latent_core.look([uid], [steps]).records()[0] if self.rank == 0 else None

    def forget(self, uids: Sequence[int]) -> int:
        """Frees the state of aborted samples; returns the number of samples left."""
        self.latent_core.forget(uids)
        return len(self.latent_core.slots)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a step. Nobody fetches the records of a server's requests, so they are dropped at their end."""
        if self.served is not None:
            self.latent_core.forget(self.served.finished(scheduler_output.finished_req_ids))
        return super().execute_model(scheduler_output, *args, **kwargs)

    @property
    def latent_core(self) -> Decoder:
        core: Decoder = self.model_runner.latent
        return core

    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            from latent_grpo.rollout_workers.vllm_plugin.v1_runner import LatentRunner

            runner = self.model_runner
            runner.__class__ = type("LatentModelRunner", (LatentRunner, type(runner)), {})
            self.served = served(self.vllm_config)
            runner.latent, runner.slot_of = new_core(self.vllm_config, self.device, self.served), {}
            runner.served = self.served

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if self.use_v2_model_runner:
            from latent_grpo.rollout_workers.vllm_plugin.v2_state import install

            install(self.model_config)
        super().load_model(*args, **kwargs)
        if self.use_v2_model_runner:
            state = self.model_runner.model_state
            self.model_runner.latent, self.served = state.core, state.served

    def compile_or_warm_up_model(self) -> Any:
        """Warms the model up; on CUDA vLLM does so with requests of its own, which are not rollouts."""
        self.latent_core.warming = True
        try:
            return super().compile_or_warm_up_model()
        finally:
            self.latent_core.warming = False


class LatentGPUWorker(LatentWorker, GPUWorker):
    """A GPU worker; unquantised weights on a GPU are never packed."""
