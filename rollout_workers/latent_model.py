"""A trained model in Python: problems in, responses with their thoughts out, on either engine.

    from latent_grpo import LatentModel

    model = LatentModel("runs/quickstart-.../model")
    for response in model.generate(["2 + 3 * 4 ="], samples=4, seed=1):
        print(response.answer, response.latent_steps)

What the caller leaves open is what the model was trained with (`latent_chain.json`). A response is a function of its
prompt, the seed, its sample index and the settings, never of what is generated beside it (METHOD §2.5).
"""

from __future__ import annotations

import json
import logging
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypedDict, Unpack

import numpy as np
import torch

from latent_grpo.common.config import ConfigError, VLLMConfig
from latent_grpo.common.config.section import SEED_LIMIT
from latent_grpo.common.latent import mixture_weights
from latent_grpo.common.models import DTYPES, load_model, stored_dtype
from latent_grpo.common.types import FinishReason, GroupRequest, PolicyVersion, SamplingSettings, Trajectory
from latent_grpo.common.weights import checksum
from latent_grpo.rollout_workers.engine import LatentEngine
from latent_grpo.rollout_workers.factory import ResponseText
from latent_grpo.rollout_workers.requests import SampleRecord
from latent_grpo.rollout_workers.trained_model import Chat, as_problem, prompt_uid, read_trained_model
from latent_grpo.rollout_workers.vllm_plugin import support

Engine = Literal["transformers", "vllm"]
MAX_ROWS = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentStep:
    """One thought: K vocabulary entries, the strongest first, whose embeddings were mixed and fed back."""

    texts: tuple[str, ...]  # of the K tokens
    ids: np.ndarray  # [K] int32
    weights: np.ndarray  # [K] float32, sum 1
    log_probs: np.ndarray  # [K] float32: the model's log-probs, without noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response to one problem."""

    problem: int  # its place in the list that was given
    sample: int  # from 0 to samples - 1
    text: str  # the visible steps, from the end of thinking on, without the end-of-sequence token (METHOD §1)
    answer: str  # of it what follows the end of thinking
    thoughts: tuple[LatentStep, ...]
    token_ids: np.ndarray  # [H] int32: the visible steps, from the latent-end token on
    finish_reason: FinishReason  # stop: by itself; length: the budget ended first
    prompt_tokens: int

    @property
    def latent_steps(self) -> int:
        """The number of latent steps."""
        return len(self.thoughts)

    @property
    def steps(self) -> int:
        """The number of response steps, latent and visible."""
        return len(self.thoughts) + len(self.token_ids)


class Sampling(TypedDict, total=False):
    """The settings of :meth:`LatentModel.generate` that decide how a step is drawn."""

    noise: float
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_tokens: int | None
    k: int | None
    tau: float | None


def vllm_refusal(model: str | Path, found: tuple[str, str] | None) -> str | None:
    """Returns why the engine vllm cannot serve a model here, in the words of :class:`LatentModel`'s options, or None.

    `found` is the installed vLLM (`vllm_plugin.support.installed`).
    """
    problem, settings = support.vllm_problem(found), Path(model, "config.json")
    if problem is None and found is not None and settings.is_file():
        problem = support.model_problem(json.loads(settings.read_text("utf-8")), found[0])
    if problem is None:
        return None
    return problem.replace("rollout.engine vllm", "engine vllm").replace("set rollout.engine to", "use the engine")


class LatentModel:
    """A model folder or hub id, ready to generate. Raises ConfigError for one that cannot be read or served.

    `dtype` is that of the weights (None: as they are stored), `device` of the engine `transformers` (`auto`: a GPU if
    there is one). At most `max_rows` responses are decoded side by side. `say` is called with a sentence about each
    thing that had to be assumed. It is a context manager; :meth:`close` frees the memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        engine: Engine = "transformers",
        dtype: Literal["float32", "bfloat16"] | None = None,
        device: str = "auto",
        max_rows: int = MAX_ROWS,
        vllm: VLLMConfig | None = None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        path = os.path.expanduser(path)  # in Python no shell has done it
        self.model = read_trained_model(path, say)
        self._max_rows, self._requests = max_rows, 0
        self._decode = ResponseText(self.model.tokenizer, self.model.facts.eos_ids)
        self._engine = self._start(engine, dtype or stored_dtype(path), device, vllm)

    # --- generating ----------------------------------------------------------------------------------------------

    def generate(
        self,
        problems: str | Sequence[str | Chat],
        *,
        samples: int = 1,
        seed: int = 0,
        noise: float = 0.0,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        k: int | None = None,
        tau: float | None = None,
    ) -> list[Response]:
        """Returns `samples` responses to each problem, in the order of `problems`.

        A problem is a text, which gets the prompt of the model's training, or a whole chat, which is used as it is.
        `noise` is the scale of the one-sided Gumbel noise in latent steps; 0 turns it off, as in evaluations of pass@1
        (METHOD §2.1, §2.2). It is one-sided whatever noise the model was trained with. `temperature`, `top_p` and
        `top_k` are of visible steps, `max_tokens` limits latent and visible steps together. None: the model's own.
        Raises ConfigError for settings that cannot work, and for a prompt that leaves no room for `max_tokens`.
        """
        settings = self._settings(
            noise=noise, temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, k=k, tau=tau
        )
        given: Sequence[str | Chat] = [problems] if isinstance(problems, str) else problems
        requests = [
            self._request(place, problem, samples, seed, settings, max_tokens is not None)
            for place, problem in enumerate(given)
        ]
        places = {request.group_uid: place for place, request in enumerate(requests)}
        found: dict[int, list[Response]] = {}
        for group in self._run(requests):
            place = places[group[0].group_uid]
            found[place] = [self._response(place, trajectory) for trajectory in group]
        return [response for place in range(len(requests)) for response in found[place]]

    def stream(
        self, problem: str | Chat, *, seed: int = 0, **sampling: Unpack[Sampling]
    ) -> Iterator[LatentStep | str | Response]:
        """Yields the steps of one response as they are made, and at the end the :class:`Response` itself.

        A latent step comes as a :class:`LatentStep`, visible text in pieces of whole characters. The settings are those
        of :meth:`generate`.
        """
        settings = self._settings(**sampling)
        request = self._request(0, problem, 1, seed, settings, sampling.get("max_tokens") is not None)
        thoughts, written = 0, ""
        for group in self._run([request], partly=True):
            record: SampleRecord | Trajectory | None
            record = group[0] if group else self._engine.partial(request.group_uid, 0)
            if record is None:
                continue
            finish: FinishReason = group[0].finish_reason if group else "length"
            for thought in self._thoughts(record, settings.tau, first=thoughts):
                yield thought
                thoughts += 1
            text = self._decode(record.hard_ids, finish)
            if not group:
                text = text.rstrip("\ufffd")  # of a character whose other tokens are still to come
            if len(text) > len(written) and text.startswith(written):
                yield text[len(written) :]
                written = text
            if group:
                yield self._response(0, group[0])

    def close(self) -> None:
        """Frees the engine's memory and processes. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- requests ------------------------------------------------------------------------------------------------

    def _settings(
        self,
        *,
        noise: float = 0.0,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        k: int | None = None,
        tau: float | None = None,
    ) -> SamplingSettings:
        defaults, chain = self.model.defaults, self.model.chain
        bounds: dict[str, tuple[float | None, bool, str]] = {
            "noise": (noise, noise >= 0, "0 (off) or more"),
            "temperature": (temperature, temperature is None or temperature > 0, "above 0; for greedy text top_k=1"),
            "top_p": (top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
            "top_k": (top_k, top_k is None or top_k >= 0, "0 (no bound) or more"),
            "max_tokens": (max_tokens, max_tokens is None or max_tokens >= 1, "1 or more"),
            "k": (k, k is None or 1 <= k <= int(self.model.facts.allowed.sum()), "from 1 to the number of tokens"),
            "tau": (tau, tau is None or tau > 0, "above 0"),
        }
        for name, (value, good, allowed) in bounds.items():
            if not good:
                raise ConfigError(f"{name} must be {allowed}, got {value:g}")
        if not self.model.latent and (noise or k is not None or tau is not None):
            raise ConfigError(
                f"model {self.model.path} has an explicit chain, without latent steps: leave out noise, k, tau"
            )

        return SamplingSettings(
            mode="latent" if self.model.latent else "visible",
            max_tokens=defaults.max_tokens if max_tokens is None else max_tokens,
            temperature=defaults.temperature if temperature is None else temperature,
            top_p=defaults.top_p if top_p is None else top_p,
            top_k=defaults.top_k if top_k is None else top_k,
            k=(chain.k or 1) if k is None else k,
            tau=(chain.tau or 1.0) if tau is None else tau,
            noise_mode="one_sided" if noise else "off",
            noise_scale=noise or 1.0,
            latent_exit=chain.latent_exit or "argmax_or_first",
        )

    def _request(
        self, place: int, problem: str | Chat, samples: int, seed: int, settings: SamplingSettings, exact: bool
    ) -> GroupRequest:
        if not 0 <= operator.index(seed) < SEED_LIMIT:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {seed}")
        if not 1 <= samples <= self._max_rows:
            raise ConfigError(f"samples must be from 1 to max_rows ({self._max_rows}) of this model, got {samples}")
        ids = self.model.renderer.encode(as_problem(problem, place))
        room = None if self.model.positions is None else self.model.positions - len(ids)
        if room is not None and (room < 1 or (exact and settings.max_tokens > room)):
            wanted = f" and max_tokens {settings.max_tokens:,}" if exact else ""
            raise ConfigError(
                f"problem {place}: its prompt of {len(ids):,} tokens{wanted} do not fit into the model's "
                f"{self.model.positions:,} positions; shorten the problem" + (" or lower max_tokens" if exact else "")
            )
        budget = settings.max_tokens if room is None else min(settings.max_tokens, room)
        self._requests += 1
        return GroupRequest(
            group_uid=str(self._requests),
            problem_uid=prompt_uid(ids),
            task="generate",
            prompt_ids=ids,
            sample_indices=tuple(range(samples)),
            sampling=replace(settings, max_tokens=budget),
            purpose="evaluation",
            epoch=0,
            run_seed=seed,
            verifier="",
            gold_answer="",
        )

    def _run(self, requests: Sequence[GroupRequest], partly: bool = False) -> Iterator[tuple[Trajectory, ...]]:
        """Yields the groups as they are complete; `partly`: an empty tuple after each step without one."""
        engine = self._engine
        try:
            for request in requests:
                engine.add(request)
            while engine.pending:
                completed = engine.step()
                yield from completed
                if partly and not completed:
                    yield ()
        finally:
            if engine.pending:  # interrupted, or no further step was asked for
                engine.abort()

    # --- responses -----------------------------------------------------------------------------------------------

    def _response(self, place: int, trajectory: Trajectory) -> Response:
        text = self._decode(trajectory.hard_ids, trajectory.finish_reason)
        _, end, answer = text.partition(self.model.chain.think_end)
        return Response(
            problem=place,
            sample=trajectory.sample_index,
            text=text,
            answer=answer.strip() if end else "",
            thoughts=tuple(self._thoughts(trajectory, trajectory.sampling.tau)),
            token_ids=trajectory.hard_ids,
            finish_reason=trajectory.finish_reason,
            prompt_tokens=len(trajectory.prompt_ids),
        )

    def _thoughts(self, record: SampleRecord | Trajectory, tau: float, first: int = 0) -> Iterator[LatentStep]:
        scores = torch.from_numpy(record.latent_scores[first:].copy())
        weights = mixture_weights(scores, tau).numpy()
        for ids, mixed, log_probs in zip(
            record.latent_ids[first:], weights, record.latent_log_probs[first:], strict=True
        ):
            texts = tuple(str(self.model.tokenizer.decode([i])) for i in ids.tolist())
            yield LatentStep(texts=texts, ids=ids, weights=mixed, log_probs=log_probs)

    # --- the engine ----------------------------------------------------------------------------------------------

    def _start(self, engine: Engine, dtype: str, device: str, vllm: VLLMConfig | None) -> LatentEngine:
        if engine not in ("transformers", "vllm"):
            raise ConfigError(f"engine must be transformers or vllm, got {engine!r}")
        if engine == "transformers" and vllm is not None:
            raise ConfigError("vllm has no effect with engine transformers; leave it out, or set engine='vllm'")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if engine == "vllm" and (problem := vllm_refusal(self.model.path, support.installed())) is not None:
            raise ConfigError(problem)
        model = load_model(self.model.path, dtype, self.model.defaults.max_positions)
        made: LatentEngine
        if engine == "vllm":
            from latent_grpo.rollout_workers.vllm_engine import VLLMEngine

            made = VLLMEngine(
                self.model.path,
                self.model.facts,
                dtype=dtype,
                max_rows=self._max_rows,
                max_tokens=self.model.defaults.max_tokens,
                k=self.model.chain.k or 1,
                options=vllm,
                max_positions=self.model.defaults.max_positions,
                streaming=True,
            )
        else:
            from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

            made = TransformersEngine(model, self.model.facts, max_rows=self._max_rows, device=device)
        weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        made.load_weights(PolicyVersion(version=0, checksum=checksum(weights)), weights)
        return made
