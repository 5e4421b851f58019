"""The cluster engine: an unmodified vLLM that decodes latent rollouts through `vllm_plugin` (METHOD §2).

vLLM schedules, batches and caches; the plug-in decides inside vLLM's workers what a step is. A sample is one request;
its settings and the key of its randomness travel with it, and its record is fetched once, when it has finished.

vLLM's scheduler runs in this process (the rollout actor's own). With tensor parallelism vLLM starts one process a GPU.
"""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from latent_grpo.common.config import VLLMConfig
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.model_check import empty_model, read_settings
from latent_grpo.common.models import DTYPES, extend_positions
from latent_grpo.common.types import GroupRequest, PolicyVersion, TokenFacts, Trajectory
from latent_grpo.common.weights import combine_checksums, in_buckets
from latent_grpo.rollout_workers.decoding import Record
from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.requests import RunningGroup, SampleRecord, admit
from latent_grpo.rollout_workers.vllm_plugin.prefix_cache import keep_histories_apart
from latent_grpo.rollout_workers.vllm_plugin.settings import KEY, extra_args
from latent_grpo.rollout_workers.vllm_plugin.support import (
    argument_problem,
    head_problem,
    installed,
    model_problem,
    runner_problem,
    vllm_problem,
)
from latent_grpo.rollout_workers.weight_checks import TensorShape, check_checksum, checked_tensors

BUCKET_BYTES = 64 * 2**20  # weights per call to the workers, which copies them if the workers are processes
CACHE_ATTEMPTS = 3
CPU_CACHE_BYTES = 2**30  # keys and values, where a CPU run does not set their size
WORKERS = {
    "cpu": "latent_grpo.rollout_workers.vllm_plugin.cpu_worker.LatentCPUWorker",
    "cuda": "latent_grpo.rollout_workers.vllm_plugin.workers.LatentGPUWorker",
}


class VLLMEngine:
    """Implements :class:`~rollout_workers.engine.LatentEngine` on a model folder (or hub id) that vLLM can load.

    At most `max_rows` samples are decoded side by side. `max_length` limits prompt and response together (default: the
    model's). `max_tokens` (default: `max_length`) and `k` describe the largest expected request. Memory for the records
    of `max_rows` such samples is reserved from the start, as part of what vLLM may use; larger requests are served, and
    take more.
    With `streaming`, `partial` shows running samples; vLLM then reports every step.
    With `in_flight_updates`, `load_weights` does not wait for pending samples; their keys and values are
    recomputed under the new weights, and their trajectories name the first and the last version that sampled them.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        facts: TokenFacts,
        *,
        dtype: str = "float32",
        max_rows: int = 256,
        max_length: int | None = None,
        max_tokens: int | None = None,
        k: int = 10,
        options: VLLMConfig | None = None,
        in_flight_updates: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        max_positions: int | None = None,
        streaming: bool = False,
    ) -> None:
        self._facts, self._max_rows, self._options = facts, max_rows, options or VLLMConfig()
        self._bucket_bytes, self._streaming, self._in_flight_updates = bucket_bytes, streaming, in_flight_updates
        config = read_settings(model)
        self._expected = _published_parameters(config, dtype, model)
        self._version: PolicyVersion | None = None
        self._fingerprints: dict[str, str] = {}  # of the weights that it holds, once they are verified
        own, positions = config.max_position_embeddings, extend_positions(config, max_positions)
        positions = own if positions is None else positions
        # vLLM refuses a longer max_model_len, and its table of rotary positions has as many rows as this number
        longer = {} if positions == own else {"max_position_embeddings": positions}
        self._max_length = positions if max_length is None else min(max_length, positions)
        records = (min(max_tokens or self._max_length, self._max_length), k)
        self._llm = _start(model, facts, dtype, max_rows, self._max_length, records, self._options, longer)
        self.careful = self._llm.vllm_config.device_config.device_type == "cpu"
        """Whether draws may wait for the device, as they do on the CPU, where there is nothing to wait for."""
        self._uids = itertools.count()
        self._owner: dict[int, tuple[RunningGroup, int]] = {}  # uid -> group and position in it
        self._steps: dict[int, int] = {}  # uid -> response steps so far, with `streaming`

    @property
    def version(self) -> PolicyVersion | None:
        """The version of the weights that are loaded; None: none yet."""
        return self._version

    @property
    def pending(self) -> int:
        """The number of samples that are not finished."""
        return len(self._owner)

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: GroupRequest) -> None:
        """Queues a group; see :meth:`LatentEngine.add`."""
        group = admit(request, self._facts, self._version, max_rows=self._max_rows, max_length=self._max_length)
        for position in range(group.size):
            self._send(group, position, careful=self.careful)

    def _send(self, group: RunningGroup, position: int, careful: bool) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        uid = next(self._uids)
        self._owner[uid] = (group, position)
        params = SamplingParams(
            max_tokens=group.request.sampling.max_tokens,
            stop_token_ids=list(self._facts.eos_ids),
            ignore_eos=True,  # the run's EOS ids are the stop ids, not those of the model's folder
            temperature=0.0,  # vLLM's own sampler is not used
            detokenize=False,
            skip_clone=True,
            output_kind=RequestOutputKind.CUMULATIVE if self._streaming else RequestOutputKind.FINAL_ONLY,
            extra_args=extra_args(uid, group.settings[position], careful),
        )
        self._llm.add_request(str(uid), tokens_input(np.asarray(group.request.prompt_ids).tolist()), params)

    def step(self) -> list[tuple[Trajectory, ...]]:
        """Advances all running samples by one response step; see :meth:`LatentEngine.step`."""
        if not self._owner:
            return []
        if self._version is None:
            raise EngineError("the engine holds no verified weights; abort the pending samples and load_weights again")
        outputs = self._llm.step()
        if self._streaming:
            self._steps = {int(o.request_id): len(o.outputs[0].token_ids) for o in outputs if not o.finished}
        outputs = [output for output in outputs if output.finished]
        if not outputs:
            return []
        uids = [int(output.request_id) for output in outputs]
        completions = [output.outputs[0] for output in outputs]
        records = self._call_workers("take_records", uids, [len(c.token_ids) for c in completions])[0]
        completed = []
        for uid, completion, record in zip(uids, completions, records, strict=True):
            if completion.finish_reason not in ("stop", "length"):
                raise EngineError(f"vLLM ended a sample with {completion.finish_reason!r}, expected stop or length")
            group, position = self._owner.pop(uid)
            if not record.exact:
                self._send(group, position, careful=True)
                continue
            group.started = min(group.started or record.started, record.started)
            version, now = self._version.version, time.monotonic()
            done = group.finish(position, record, completion.finish_reason, engine=self.name, version=version, now=now)
            if done is not None:
                completed.append(done)
        return completed

    def partial(self, group_uid: str, position: int) -> SampleRecord | None:
        """Returns a running sample's record so far, of an engine made for `streaming`; None of another one."""
        for uid, (group, place) in self._owner.items():
            if (group.request.group_uid, place) == (group_uid, position) and uid in self._steps:
                record: Record = self._call_workers("look_at_record", uid, self._steps[uid])[0]
                return record if record.exact else None  # it will be sampled again
        return None

    def abort(self) -> None:
        """Drops all pending samples."""
        if self._owner:
            self._llm.abort_request([str(uid) for uid in self._owner])
            self._call_workers("forget", list(self._owner))
            self._owner.clear()

    def close(self) -> None:
        """Ends vLLM and its processes and frees the memory; the engine then holds no version. Idempotent."""
        if self._llm is None:
            return
        self._owner.clear()
        self._version = None
        self._llm.engine_core.shutdown()
        self._llm = None

    def _call_workers(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every worker process; returns one answer from each."""
        return self._llm.collective_rpc(method, args=args)

    # --- weights -------------------------------------------------------------------------------------------------

    def load_weights(
        self, version: PolicyVersion, tensors: Iterable[tuple[str, torch.Tensor]], unchanged: Collection[str] = ()
    ) -> None:
        """Replaces all parameters in place and verifies them; see :meth:`LatentEngine.load_weights`.

        vLLM's reload is of whole layers, fused ones included: those of which nothing has changed are left out, and vLLM
        puts their weights back as they were. What they hold is compared too.

        With `in_flight_updates` pending samples continue under the new weights. After a failure they stop until a
        publication is loaded whole, or they are aborted.
        """
        if self._llm is None:
            raise EngineError("the engine is closed; start another")
        if self.pending and not self._in_flight_updates:
            raise EngineError(
                f"cannot load version {version.version} while {self.pending} samples are pending: a sample never mixes "
                "versions; finish or abort them first, or set rollout.in_flight_updates"
            )
        self._version = None  # after any failure below the engine refuses to sample
        before, self._fingerprints = self._fingerprints, {}
        tensors = list(checked_tensors(version, tensors, self._expected))
        kept = before.keys() & set(unchanged)
        found = {name: before[name] if name in kept else fingerprint(name, tensor) for name, tensor in tensors}
        check_checksum(version, combine_checksums(found.values()))
        layers = dict(zip(found, self._call_workers("layers_of", list(found))[0], strict=True))
        changed = {layer for name, layer in layers.items() if name not in kept}
        buckets = list(in_buckets(tensors, self._bucket_bytes))
        try:
            self._apply([[pair for pair in bucket if layers[pair[0]] in changed] for bucket in buckets])
        except Exception as error:
            raise EngineError(f"version {version.version}: vLLM could not load it ({error}); publish again") from error
        differing = sorted(
            {name for bucket in buckets for names in self._call_workers("differing_weights", bucket) for name in names}
        )
        if differing:
            raise EngineError(
                f"version {version.version}: after loading, vLLM does not hold {len(differing)} parameters as "
                f"published, the first {differing[0]!r}; publish again"
            )
        self._drop_cache(version)
        self._version, self._fingerprints = version, found

    def _apply(self, buckets: list[list[tuple[str, torch.Tensor]]]) -> None:
        """Runs vLLM's reload in every worker. After a failure layers still compute, but with undefined weights."""
        self._call_workers("begin_weights")
        try:
            for bucket in filter(None, buckets):
                self._call_workers("add_weights", bucket)
        finally:
            self._call_workers("end_weights")

    def _drop_cache(self, version: PolicyVersion) -> None:
        """Drops keys and values of the old weights; running samples compute theirs again, mixtures included."""
        for _ in range(CACHE_ATTEMPTS):
            if self._llm.reset_prefix_cache(reset_running_requests=bool(self.pending)):
                return
            self._llm.step()  # a step that vLLM ran ahead of a finished sample still holds blocks
        raise EngineError(f"version {version.version}: vLLM could not drop the KV cache of the old weights")


def _published_parameters(config: PreTrainedConfig, dtype: str, model: str | Path) -> dict[str, TensorShape]:
    """Returns the parameters of a publication: all of the Transformers model, tied ones once."""
    skeleton = empty_model(config, model, DTYPES[dtype])
    return {name: TensorShape.of(parameter) for name, parameter in skeleton.named_parameters()}


def quiet_vllm() -> None:
    """Sets vLLM's environment, which it reads at import or later, and silences warnings about its own code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM on CPU starts a process even for one worker
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", "nobind"
    )  # Ray sets the number of threads; workers share a machine


def _start(
    model: str | Path,
    facts: TokenFacts,
    dtype: str,
    max_rows: int,
    max_length: int,
    records: tuple[int, int],
    options: VLLMConfig,
    overrides: dict[str, Any],
) -> Any:
    """Starts vLLM's engine with the latent plug-in in its workers. Weights are random until `load_weights`.

    `records` holds the response steps and components of the largest expected record; `overrides` are settings of the
    model that differ from its folder's.
    """
    found = installed()
    problem = vllm_problem(found) or argument_problem(options.engine_args)
    if problem or found is None:
        raise EngineError(problem)
    build = found[0]
    quiet_vllm()
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    forbidden = np.nonzero(~np.asarray(facts.allowed, dtype=bool))[0].tolist()
    end = facts.latent_end_id
    ordinary = next(i for i in range(facts.vocab_size) if i not in facts.eos_ids)
    args: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        # logits in float32 whatever the dtype (METHOD §5, common.head)
        "hf_overrides": {"head_dtype": "float32", **overrides},
        "seed": 0,
        "load_format": "dummy",
        "max_num_seqs": max_rows,
        "max_model_len": max_length,
        "max_num_batched_tokens": max(options.batched_tokens, max_rows),
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "enable_prompt_embeds": True,  # the runner then feeds embeddings, which mixtures are written into
        "tensor_parallel_size": options.tensor_parallel,
        "enable_batch_sharded_sampling": False,  # every rank feeds mixtures, so every rank draws them
        "enforce_eager": build == "cpu" if options.eager is None else options.eager,
        "worker_cls": WORKERS[build],
        "additional_config": {
            KEY: {  # read by `settings.new_core`
                "vocab_size": facts.vocab_size,
                "forbidden_ids": forbidden,
                "end_id": end,
                "placeholder": ordinary if end is None else end,
                "max_tokens": records[0],
                "k": records[1],
            }
        },
        "disable_log_stats": True,
        "generation_config": "vllm",
    }
    if options.memory_share is not None:
        args["gpu_memory_utilization"] = options.memory_share
    if options.kv_cache_bytes is not None or build == "cpu":
        args["kv_cache_memory_bytes"] = options.kv_cache_bytes or CPU_CACHE_BYTES
    config = EngineArgs(**{**args, **options.engine_args}).create_engine_config()
    problem = model_problem(config.model_config.hf_config.to_dict(), build)
    problem = problem or runner_problem(build, config.use_v2_model_runner)
    problem = problem or head_problem(str(config.model_config.head_dtype))
    if problem:
        raise EngineError(problem)
    llm = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
    core = llm.engine_core.engine_core
    if core.request_block_hasher is not None:  # None: no prefix cache
        core.request_block_hasher = keep_histories_apart(core.request_block_hasher, config.cache_config.block_size)
    return llm
