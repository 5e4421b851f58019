"""What a publication of weights costs beside a plain copy: rank 0 to the workers of this machine, by each transport.

A publication has two hops: learner to transport, transport to each worker's parameters. So has the copy that it is
compared with: the same bytes, in the same processes, by numpy alone, the workers at the same time; rounds of both take
turns. Parameters are random, in the shapes of a transformer's layers. `hashed bytes` is the way before version 0.3:
they are hashed as tensors, packed, hashed as buckets and put; each worker hashes the buckets, copies, hashes again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from rich.console import Console
from rich.table import Table

from latent_grpo.common.config import WeightsConfig, load_config
from latent_grpo.common.fingerprint import copy_with_fingerprint, fingerprint
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.common.transport import TRANSPORTS, WeightReceiver
from latent_grpo.common.weights import Publication, in_buckets, tensor_bytes, unpack
from latent_grpo.deploy.bench import figures
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.ray_session import ray_session
from latent_grpo.learner.publication import Publisher

BUCKET_BYTES = 64 * 2**20
OLD = "hashed bytes"
RING_BYTES = 512 * 2**20  # into which the plain copy goes round: more than caches hold
SHAPES = {  # name -> hidden size, layers, vocabulary, dtype
    "3M": (192, 4, 8192, torch.float32),
    "135M": (576, 30, 49152, torch.float32),
    "1B": (2048, 20, 49152, torch.bfloat16),
}
Parameters = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishCost:
    """Medians over rounds, in seconds, of one size and way; those of the workers are the slowest worker's."""

    size: str
    gigabytes: float
    workers: int
    way: str
    frozen: bool  # the embeddings are, and the round is not the first
    publish_s: float
    receive_s: float
    load_s: float
    whole_s: float  # from the call of the learner until all workers have the weights
    memcpy_s: float  # both copies
    fingerprint_s: float  # of all bytes alone, on one thread

    @property
    def ratio(self) -> float:
        return self.whole_s / self.memcpy_s


def parameters(size: str) -> Parameters:
    """Returns random parameters in the shapes of a transformer with tied embeddings."""
    hidden, layers, vocabulary, dtype = SHAPES[size]
    made = [("embed", torch.empty(vocabulary, hidden))]
    for layer in range(layers):
        made += [(f"{layer}.{part}", torch.empty(hidden, hidden)) for part in "qo"]
        made += [(f"{layer}.{part}", torch.empty(hidden // 3, hidden)) for part in "kv"]
        made += [(f"{layer}.{part}", torch.empty(hidden * 8 // 3, hidden)) for part in ("gate", "up", "down")]
        made += [(f"{layer}.norm{part}", torch.empty(hidden)) for part in range(2)]
    return [(name, tensor.to(dtype).uniform_(-1, 1)) for name, tensor in made]


class Learner:
    """Rank 0, without a learner."""

    def __init__(self, size: str, way: str, frozen: bool):
        torch.set_num_threads(1)
        self._parameters = parameters(size)
        self._frozen = {"embed"} if frozen else set[str]()
        self._publisher = Publisher(
            TRANSPORTS["object_store" if way == OLD else way](WeightsConfig()), BUCKET_BYTES, self._frozen
        )
        self._way, self._version = way, 0

    def bytes_and_fingerprint(self) -> tuple[int, float]:
        """Returns the size, and the seconds of fingerprints alone."""
        took = _seconds(lambda: [fingerprint(name, tensor) for name, tensor in self._parameters])
        return sum(tensor.nbytes for _, tensor in self._parameters), took

    def publish(self, kept: Collection[Any]) -> tuple[Any, float]:
        """Changes what is not frozen, as a step does, and publishes; returns that and the seconds it took."""
        for name, tensor in self._parameters:
            if name not in self._frozen:
                tensor.view(-1)[0] += 1
        began = time.perf_counter()
        made = self._old() if self._way == OLD else self._new(kept)
        return made, time.perf_counter() - began

    def _new(self, kept: Collection[Any]) -> Publication:
        without = self._frozen if self._version else set[str]()
        self._version += 1
        return self._publisher.publish(((n, t) for n, t in self._parameters if n not in without), self._version, kept)

    def _old(self) -> list[tuple[str, list[tuple[str, int]], Any]]:
        made = []
        for bucket in in_buckets(self._parameters, BUCKET_BYTES):
            for _, tensor in bucket:
                xxhash.xxh3_128_hexdigest(tensor_bytes(tensor).data)
            data = np.zeros(sum(tensor.nbytes for _, tensor in bucket), np.uint8)
            offset = 0
            for _, tensor in bucket:
                data[offset : offset + tensor.nbytes] = tensor_bytes(tensor)
                offset += tensor.nbytes
            named = [(name, tensor.nbytes) for name, tensor in bucket]
            made.append((xxhash.xxh3_128_hexdigest(data.data), named, ray.put(data)))
        return made

    def copy(self) -> float:
        return _copied(self._parameters)


class Worker:
    """A worker's parameters, without an engine."""

    def __init__(self, size: str):
        torch.set_num_threads(1)
        self._parameters, self._receiver = dict(parameters(size)), WeightReceiver()
        self._held: dict[str, str] = {}

    def update(self, made: Any) -> tuple[float, float]:
        """Returns the seconds until the bytes were there, and those of loading them, verified."""
        began = time.perf_counter()
        if isinstance(made, Publication):
            data = self._receiver.receive(made.manifest, made.buckets)
            received, found = time.perf_counter(), made.manifest.fingerprints
            for bucket, parts in zip(made.manifest.buckets, data, strict=True):
                for name, tensor in unpack(bucket, parts):
                    if found[name] != self._held.get(name):
                        self._check(found[name], copy_with_fingerprint(name, tensor, self._parameters[name]))
            self._held = found
        else:
            arrays = ray.get([reference for _, _, reference in made])
            received = time.perf_counter()
            for (checksum, named, _), array in zip(made, arrays, strict=True):
                self._check(checksum, xxhash.xxh3_128_hexdigest(array.data))
                offset = 0
                for name, size in named:
                    tensor_bytes(self._parameters[name])[:] = array[offset : offset + size]
                    offset += size
            for tensor in self._parameters.values():
                xxhash.xxh3_128_hexdigest(tensor_bytes(tensor).data)
        return received - began, time.perf_counter() - received

    @staticmethod
    def _check(expected: str, found: str) -> None:
        if expected != found:
            raise RuntimeError(f"the weights that arrived are damaged: expected {expected}, got {found}")

    def copy(self) -> float:
        return _copied(list(self._parameters.items()))


def measure(
    sizes: Sequence[str] = ("135M", "1B"), workers: int = 2, rounds: int = 4, reporter: Reporter | None = None
) -> list[PublishCost]:
    """Measures each way at each size; `rounds` are counted after one that warms memory up."""
    config = load_config({
        "k": 1, "model": {"new": {}}, "checkpoint": {"keep_best": None}, "group_size": 2, "prompts_per_step": 1,
        "minibatch_prompts": 1, "tasks": [{"name": "none", "path": "builtin:chain_arithmetic", "max_prompt_tokens": 9,
                                          "max_response_tokens": 9}],
    })  # fmt: skip
    largest = max(sum(tensor.nbytes for _, tensor in _shapes(size)) for size in sizes)
    found = []
    with ray_session(config, reporter or Reporter(), "rollout", int(2 * largest)):
        for size in sizes:
            for way, frozen in (
                (OLD, False),
                *((name, frozen) for name in sorted(TRANSPORTS) for frozen in (False, True)),
            ):
                found.append(_measured(size, way, frozen, workers, rounds))
    return found


def _shapes(size: str) -> Parameters:
    with torch.device("meta"):
        return parameters(size)


def _measured(size: str, way: str, frozen: bool, workers: int, rounds: int) -> PublishCost:
    learner_class: Any = ray.remote(num_cpus=0)(Learner)
    worker_class: Any = ray.remote(num_cpus=0)(Worker)
    learner = learner_class.remote(size, way, frozen)
    actors = [worker_class.remote(size) for _ in range(workers)]
    rows: list[dict[str, float]] = []
    try:
        nbytes, hashing = ray.get(learner.bytes_and_fingerprint.remote(), timeout=600)
        made: Any = None
        for _ in range(rounds + 1):
            memcpy = ray.get(learner.copy.remote(), timeout=600)
            memcpy += max(ray.get([actor.copy.remote() for actor in actors], timeout=600))
            began = time.perf_counter()
            kept = made.buckets if isinstance(made, Publication) else ()
            new, publish_s = ray.get(learner.publish.remote(kept), timeout=600)
            updates = ray.get([actor.update.remote(new) for actor in actors], timeout=600)
            whole, made = time.perf_counter() - began, new
            rows.append({
                "publish_s": publish_s, "receive_s": max(u[0] for u in updates), "load_s": max(u[1] for u in updates),
                "whole_s": whole, "memcpy_s": memcpy,
            })  # fmt: skip
    finally:
        for actor in (learner, *actors):
            ray.kill(actor)
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
    return PublishCost(
        size=size, gigabytes=nbytes / 1e9, workers=workers, way=way, frozen=frozen, fingerprint_s=hashing, **medians
    )


def _copied(of: Parameters) -> float:
    """Returns the seconds of one copy of the tensors into memory that has been touched before."""
    place, at = np.ones(max(RING_BYTES, *(tensor.nbytes for _, tensor in of)), np.uint8), 0

    def copy() -> None:
        nonlocal at
        for _, tensor in of:
            at = at if at + tensor.nbytes <= len(place) else 0
            place[at : at + tensor.nbytes] = tensor_bytes(tensor)
            at += tensor.nbytes

    return _seconds(copy)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(found: Sequence[PublishCost], console: Console | None = None) -> None:
    """Prints a row for each size and way."""
    table = Table(title="a publication beside plain copies, median seconds")
    for column in ("size", "way", "publish", "receive", "load", "whole", "copies", "ratio", "fingerprint"):
        table.add_column(column, justify="left" if column in ("size", "way") else "right")
    for cost in found:
        numbers = (cost.publish_s, cost.receive_s, cost.load_s, cost.whole_s, cost.memcpy_s)
        table.add_row(
            f"{cost.size} ({cost.gigabytes:.2f} GB)",
            cost.way + (", frozen embeddings" if cost.frozen else ""),
            *(f"{number:.3f}" for number in numbers),
            f"{cost.ratio:.1f}x",
            f"{cost.fingerprint_s:.3f}",
        )
    (console or TextConsole()).print(table)


def write_json(found: Sequence[PublishCost], path: Path) -> None:
    """Writes all figures."""
    figures.write_json([{**asdict(cost), "ratio": cost.ratio} for cost in found], path)
