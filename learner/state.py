"""The learner's state on disk: of each trained parameter its float32 master weight and AdamW's moments, whole.

    learner/learner.json            what the state holds, and which learner wrote it
    learner/00000.safetensors ...   tensors `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`

A learner of any number of ranks, any ZeRO stage and any dtype goes on from it, since each rank reads the pieces that
its own partition has. Frozen parameters are not in it: they are the initial model's. Nothing here can run code.

States that DeepSpeed wrote, before format 2, are pickles; they are read under :func:`weights_only`.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.files import check_is_file

FACTS = "learner.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHARD_BYTES = 2**30  # a rank holds one shard in memory while it writes
OLD_TAG = "zero"
T = TypeVar("T")


class LearnerStateMismatch(ConfigError):
    """A saved state that is not one of this learner's, or is damaged, or holds more than tensors."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ranks: PositiveInt
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    dtype: str


class OldFacts(_Facts):
    """The facts of a state that DeepSpeed wrote; it fits the same ranks, stage and dtype alone."""


class SavedParameter(BaseModel):
    """Where a state has a parameter: the whole tensor's shape, and the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[NonNegativeInt, ...]
    file: Annotated[str, Field(pattern=r"^\d{5}\.safetensors$")]  # in the state's own folder


class StateFacts(_Facts):
    """The facts of a state. `ranks`, `zero_stage` and `dtype` are those of its writer, for people."""

    format: Literal[2] = 2
    steps: NonNegativeInt  # of the optimizer
    bad_in_a_row: NonNegativeInt  # updates that were not applied, before the state was written
    parameters: dict[str, SavedParameter]  # the trained ones, in the module's order


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a trained parameter whose float32 master weight and moments this rank holds; it may be empty."""

    flat: torch.Tensor  # what AdamW updates: this rank's partition, or at stage 0 the parameter itself
    offset: int  # of the piece in `flat`, in elements
    start: int  # of the piece in the parameter
    length: int

    def of(self, kind: str, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Returns the piece's master weight or one of its moments as a view: [length]."""
        whole = self.flat.detach() if kind == "weight" else _moments(self.flat, optimizer)[kind]
        return whole.view(-1).narrow(0, self.offset, self.length)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.length)


def piece_of(parameter: Any, optimizer: torch.optim.Optimizer) -> Piece:
    """Finds this rank's piece of a trained parameter by what DeepSpeed has attached to it."""
    if hasattr(parameter, "ds_id"):  # stage 3: each parameter in equal shares, the last ones padded
        zero = parameter._z3_optimizer
        group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
        start = min(share * torch.distributed.get_rank(), parameter.ds_numel)
        return Piece(zero.fp32_partitioned_groups_flat[group], offset, start, min(share, parameter.ds_numel - start))
    if not hasattr(parameter, "_hp_mapping"):  # stage 0
        return Piece(parameter, 0, 0, parameter.numel())
    (flat,) = optimizer.param_groups[0]["params"]
    mapping = parameter._hp_mapping
    if mapping is None:  # stages 1 and 2: a range of all parameters in a row, and this one lies outside
        return Piece(flat, 0, 0, 0)
    held, own = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Piece(flat, held.start, own.start, own.numel)


def _moments(flat: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns AdamW's state of a tensor, which AdamW itself would make at its first step."""
    state: dict[str, torch.Tensor] = optimizer.state[flat]
    if not state:
        zeros = {kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in KINDS[1:]}
        step = torch.zeros((), device=flat.device if optimizer.defaults.get("fused") else "cpu")
        state |= {"step": step} | {kind: tensor.detach() for kind, tensor in zeros.items()}
    return state


@dataclass(frozen=True, slots=True)
class StateShare:
    """A rank's share of a state: its shards by file name, and on rank 0 the facts, which come after them.

    `shards` may be an iterator that gathers each shard when it is asked for, in which all ranks take part.
    """

    shards: Iterable[tuple[str, dict[str, torch.Tensor]]]
    facts: Callable[[], StateFacts | None]

    def write(self, folder: Path) -> None:
        """Writes the share. `folder` must exist."""
        for file, tensors in self.shards:
            save_file(tensors, folder / file)
        if (facts := self.facts()) is not None:
            (folder / FACTS).write_text(facts.model_dump_json(indent=1), encoding="utf-8")

    def copied(self) -> StateShare:
        """Gathers all of it into this process's memory: 12 bytes for each trained parameter, over all ranks."""
        shards, facts = tuple(self.shards), self.facts()
        return StateShare(shards, lambda: facts)


def share_of(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    zero_stage: int,
    dtype: str,
    bad_in_a_row: int,
    device: torch.device,
    shard_bytes: int = SHARD_BYTES,
) -> StateShare:
    """Returns this rank's share of the state of the `trained` parameters; all ranks call it, and go through it at once.

    One parameter at a time is gathered, on `device`, and a rank that writes shards as they come holds at most one.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained.items()}
    sizes = {name: 4 * len(KINDS) * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards = list(in_buckets(sizes.items(), min(shard_bytes, -(-sum(sizes.values()) // ranks))))

    def gathered() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for first in range(0, len(shards), ranks):
            mine = {}
            for writer, names in enumerate(shards[first : first + ranks]):
                for name in names:
                    piece = piece_of(trained[name], optimizer)
                    for kind in KINDS:
                        whole = torch.zeros(shapes[name], dtype=torch.float32, device=device)
                        whole.view(-1)[piece.slice] = piece.of(kind, optimizer)
                        if zero_stage:  # at stage 0 every rank has all of it
                            # sums integers, since a sum of floats loses the sign of a zero
                            torch.distributed.reduce(whole.view(torch.int32), writer)
                        if writer == rank:
                            mine[f"{kind}/{name}"] = whole.cpu()
            if mine:
                yield _file(first + rank), mine

    def facts() -> StateFacts | None:
        if rank:
            return None
        piece = piece_of(next(iter(trained.values())), optimizer)  # rank 0 has the beginning of each partition
        return StateFacts(
            ranks=ranks,
            zero_stage=zero_stage,
            dtype=dtype,
            steps=int(_moments(piece.flat, optimizer)["step"]),
            bad_in_a_row=bad_in_a_row,
            parameters={
                name: SavedParameter(shape=shapes[name], file=_file(index))
                for index, names in enumerate(shards)
                for name in names
            },
        )

    return StateShare(gathered(), facts)


def load_state(
    folder: Path, facts: StateFacts, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Loads this rank's pieces: master weights, moments, and at stage 3 the copies that the forward pass takes.

    Below stage 3 the caller refreshes those copies. Raises :class:`LearnerStateMismatch`, before anything is changed
    if the state has other parameters.
    """
    own = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained.items()}
    saved = {name: parameter.shape for name, parameter in facts.parameters.items()}
    if differing := [name for name in own | saved if own.get(name) != saved.get(name)]:
        name = differing[0]
        raise LearnerStateMismatch(
            f"{folder}: of {len(differing)} parameter(s) it has another shape or not the same are trained, first "
            f"{name} (saved {saved.get(name)}, now {own.get(name)}); resume with the model and settings of the run"
        )
    for name, tensors in read_tensors(folder, facts):
        parameter: Any = trained[name]
        piece = piece_of(parameter, optimizer)
        for kind, tensor in tensors.items():
            piece.of(kind, optimizer).copy_(tensor.view(-1)[piece.slice])
        _moments(piece.flat, optimizer)["step"].fill_(facts.steps)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.detach().narrow(0, 0, piece.length).copy_(piece.of("weight", optimizer))


def read_facts(folder: str | Path) -> StateFacts | OldFacts:
    """Reads what a learner's state holds. Raises :class:`LearnerStateMismatch`."""
    path = Path(folder, FACTS)
    if not path.is_file():
        raise LearnerStateMismatch(f"{folder}: it has no {FACTS}; give a folder that the learner has written")
    try:
        content = path.read_bytes()
        return (StateFacts if "format" in json.loads(content) else OldFacts).model_validate_json(content)
    except (ValidationError, ValueError, TypeError) as error:
        why = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, why["loc"])) or "the file"
        raise LearnerStateMismatch(
            f"{path}: {where}: {why['msg']}; give a folder that the learner of this version, or one before, has written"
        ) from error


def read_tensors(
    folder: Path, facts: StateFacts, kinds: Iterable[str] = KINDS
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yields the name of each trained parameter and its tensors by kind, float32 on the CPU.

    Files are mapped: only what a caller touches is read. Raises :class:`LearnerStateMismatch` for a damaged file.
    """
    for file, parameters in groupby(facts.parameters.items(), lambda item: item[1].file):
        path = folder / file
        try:
            check_is_file(path)
            with safe_open(path, framework="pt") as shard:
                for name, saved in parameters:
                    tensors = {kind: shard.get_tensor(f"{kind}/{name}") for kind in kinds}
                    if any(t.dtype != torch.float32 or t.shape != saved.shape for t in tensors.values()):
                        raise LearnerStateMismatch(f"{path}: {name} is not float32 of shape {saved.shape}")
                    yield name, tensors
        except (SafetensorError, OSError) as error:
            raise LearnerStateMismatch(f"{path} is damaged ({error}); resume from an earlier checkpoint") from error


def in_buckets(sized: Iterable[tuple[T, int]], most: int) -> Iterator[list[T]]:
    """Yields runs of items whose sizes add up to at most `most`; a larger item has a run of its own."""
    bucket: list[T] = []
    filled = 0
    for item, size in sized:
        if bucket and filled + size > most:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size
    if bucket:
        yield bucket


def _file(index: int) -> str:
    return f"{index:05d}.safetensors"


# -- states that DeepSpeed wrote


@contextmanager
def weights_only(folder: Path) -> Iterator[None]:
    """Makes every `torch.load` inside refuse all but tensors and the few classes that DeepSpeed's states have.

    DeepSpeed asks for full unpickling; torch's own variable overrules it. Raises :class:`LearnerStateMismatch` for a
    file that holds anything else: it could run code.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        raise LearnerStateMismatch(
            f"{folder} holds more than a learner's tensors, and reading it could run code; it was refused. Take a "
            "checkpoint that this program has written"
        ) from error
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
