"""The vLLM rows of `latent-grpo bench rollout`: the cost of a latent step in vLLM and in the Transformers engine.

Three engines run in one process, on the same model, prompts and lengths: vLLM with its own sampler and hard tokens,
vLLM with the latent plug-in, and the Transformers engine. Ordinary vLLM starts first, since the plug-in's CPU worker
keeps weights unpacked and must not prevent it from packing its own.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from latent_grpo.common.config import VLLMConfig
from latent_grpo.deploy.bench.timing import interleaved
from latent_grpo.deploy.bench.workload import (
    RESPONSE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Row,
    Workload,
    compared,
    facts_of,
    load_own_weights,
    requests_of,
    run_engine,
)
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine
from latent_grpo.rollout_workers.vllm_plugin.support import installed, vllm_problem

BATCHES = (32, 64, 128)
PROMPT = 32
CACHE_BYTES = 2**28
GOAL = ">= 0.9"


def vllm_missing() -> str | None:
    """Returns why there are no vLLM rows on this machine, or None."""
    return vllm_problem(installed())


def measure_vllm(model: PreTrainedModel, k: int, repeats: int) -> list[Row]:
    """Compares latent vLLM with ordinary vLLM (the goal) and with the Transformers engine, at every batch size."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # both run eagerly; tracing their small helpers takes minutes
    from latent_grpo.rollout_workers.vllm_engine import VLLMEngine, quiet_vllm

    quiet_vllm()
    facts, rng, rows = facts_of(model), np.random.default_rng(1), []
    with tempfile.TemporaryDirectory(prefix="lgb-") as folder:
        model.save_pretrained(folder)
        with ordinary_vllm(folder) as ordinary:
            engine = VLLMEngine(
                folder, facts, max_rows=max(BATCHES), max_length=PROMPT + RESPONSE,
                options=VLLMConfig(kv_cache_bytes=CACHE_BYTES),
            )  # fmt: skip
            own = TransformersEngine(model, facts, max_rows=max(BATCHES))
            for each in (engine, own):
                load_own_weights(each, model)
            for batch in BATCHES:
                prompts = rng.integers(2, model.config.vocab_size, (batch, PROMPT)).astype(np.int32)
                work = Workload(name=f"{batch} rows", prompts=prompts, samples=1, lengths=np.full(batch, RESPONSE))
                requests = requests_of(work, "latent", k)
                found = interleaved(
                    {
                        "latent": partial(run_engine, engine, requests),
                        "ordinary": partial(run_ordinary, ordinary, work),
                        "recorded": partial(run_ordinary, ordinary, work, logprobs=0),
                        "own": partial(run_engine, own, requests),
                    },
                    repeats,
                )
                latent = f"{work.name}, K = {k}: vLLM latent to"
                rows.append(compared(f"{latent} vLLM ordinary", found["latent"], found["ordinary"], GOAL))
                rows.append(
                    compared(f"{latent} vLLM ordinary with log-probs", found["latent"], found["recorded"], GOAL)
                )
                rows.append(compared(f"{latent} Transformers engine latent", found["latent"], found["own"], ""))
            engine.close()
    return rows


@contextlib.contextmanager
def ordinary_vllm(folder: str) -> Iterator[Any]:
    """Starts ordinary vLLM with the settings that the latent engine uses."""
    from vllm import LLM

    llm = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", max_model_len=PROMPT + RESPONSE, max_num_seqs=max(BATCHES),
        enforce_eager=True, kv_cache_memory_bytes=CACHE_BYTES, disable_log_stats=True,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def run_ordinary(llm: Any, work: Workload, logprobs: int | None = None) -> float:
    """Generates hard tokens with vLLM's own sampler, to each prompt's length."""
    from vllm import SamplingParams

    settings = [
        SamplingParams(
            n=work.samples, max_tokens=int(length), temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K, ignore_eos=True,
            logprobs=logprobs, detokenize=False,
        )
        for length in work.lengths
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in work.prompts]
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    return float(sum(len(completion.token_ids) for output in outputs for completion in output.outputs))
