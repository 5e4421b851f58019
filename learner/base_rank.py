"""The base of every learner rank: a process with a ZeRO engine that publishes, saves, loads and exports.

These are plain classes; `learner.group` puts them into Ray actors.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from latent_grpo.common.config import LoRAConfig, ModelConfig, OptimizerConfig, RunConfig
from latent_grpo.common.models import extend_positions
from latent_grpo.common.stacks import ProcessAddress, serve_stacks
from latent_grpo.common.transport import TRANSPORTS, WeightTransport
from latent_grpo.common.weights import Publication
from latent_grpo.learner.lora import Addition, add_lora, plain_name, plain_parameters
from latent_grpo.learner.policy import freeze_lower_layers, load_policy_model
from latent_grpo.learner.publication import Publisher
from latent_grpo.learner.state import StateShare
from latent_grpo.learner.stored_weights import StoredWeights
from latent_grpo.learner.zero_engine import UpdateResult, ZeroEngine, init_distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE_FILES = (  # what comes with a model besides its weights and configuration
    "LICENSE*",
    "README*",
    "additional_chat_templates",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


class TrainingEngine(Protocol):
    """The engine that trains a rank's module: :class:`learner.zero_engine.ZeroEngine`, or one with its interface."""

    def forward(self, *inputs: Any) -> Any:
        """Runs the module on a micro-batch and returns what it returns."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's loss, a scalar that is already normalised over the whole mini-batch."""

    def step(self, lr: float) -> UpdateResult:
        """Clips the gradient and makes one update at a learning rate, or skips it where the gradient is not finite."""

    def ensure_finite(self) -> None:
        """Raises LearnerDiverged after too many updates in a row that were not applied."""

    frozen: frozenset[str]
    """The parameters that never change, by their names in the model folder."""

    def full_parameters(
        self, bucket_bytes: int, without: Collection[str] = (), device: str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name in the model folder, whole tensor), gathered in buckets of `bucket_bytes`; all ranks call it.

        `device` is where copies lie, if it must make any.
        """

    def save(self, folder: str | Path) -> None:
        """Writes this rank's share of weights and optimizer state."""

    def load(self, folder: str | Path) -> None:
        """Reads what `save` has written. Raises LearnerStateMismatch for a state that does not fit."""


class RankActor:
    """A rank of a learner. Subclasses define the module to train (:meth:`build`) and their own step."""

    config: RunConfig
    rank: int
    world: int
    model_folder: str
    device: str
    engine: TrainingEngine
    stored: StoredWeights | None = None  # with ZeRO-3, until the module is sharded
    copy: StateShare | None = None
    published = False  # frozen weights are with the workers
    publisher: Publisher  # of rank 0, from the first publication on
    transport: WeightTransport | None = None  # the publisher's, which a loaded state leaves as it is
    additions: Mapping[str, Addition] = MappingProxyType({})  # of LoRA, by the layer's name

    def build(self, model: PreTrainedModel) -> tuple[nn.Module, OptimizerConfig]:
        """Returns the module around `model` that a step calls, and its optimizer's settings."""
        raise NotImplementedError

    @property
    def lora(self) -> LoRAConfig | None:
        """LoRA's settings; None: the weights themselves are trained."""
        return None

    @property
    def loaded_dtype(self) -> str:
        """The data type in which the model is loaded: float32 for weights that are trained, as master weights.

        Frozen ones, with LoRA, need none, and a large model in float32 would fill the node's memory.
        """
        return "float32" if self.lora is None else self.config.model.dtype

    def choose_trained(self, model: PreTrainedModel) -> None:
        """Freezes what `model.train_layers` and `lora` leave out, and puts LoRA's factors into the model."""
        layers = self.config.model.train_layers
        if self.lora is None:
            freeze_lower_layers(model, layers)
        else:
            self.additions = add_lora(model, self.lora, seed=self.config.seed, trained_layers=layers)

    def whereabouts(self) -> ProcessAddress:
        """Returns this process's address and makes it answer with its stacks on request."""
        return serve_stacks()

    def address(self) -> tuple[str, int]:
        """Returns the address for rank 0's process group: this node and a free port."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def setup(self, rank: int, world: int, address: str, port: int, config: str, model_folder: str) -> None:
        """Joins the group and loads the model. `config` is the run's, as JSON."""
        self.config = RunConfig.model_validate_json(config)
        learner = self.config.learner
        self.rank, self.world, self.model_folder = rank, world, model_folder
        self.device = learner.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(learner.resources.threads)
        init_distributed(rank=rank, world=world, address=address, port=port, device=self.device)
        self.make_engine()

    def make_engine(self) -> None:
        """Loads the model and puts the module around it under ZeRO."""
        learner = self.config.learner
        self.stored = StoredWeights() if learner.zero_stage == 3 else None
        module, optimizer = self.build(self.load_model(self.model_folder, self.loaded_dtype))
        self.engine = ZeroEngine(module, optimizer, learner, self.config.model.dtype, self.device, self.stored)

    def load_model(self, folder: str, dtype: str = "float32") -> PreTrainedModel:
        """Loads a model for a module under ZeRO; with ZeRO-3 its weights stay in their files until it is sharded."""
        return load_policy_model(folder, dtype) if self.stored is None else self.stored.load(folder, dtype)

    def policy_parameters(
        self, without: Collection[str] = (), device: str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the policy's weights, by their names in its model folder; every rank must iterate, rank 0 gets them.

        Those in `without`, some of :attr:`frozen`, are left out. They are a plain model's, whatever is trained.
        `device` is where ZeRO-3's copies lie.
        """
        left_out = {name for name in self.engine.frozen if plain_name(name) in without}
        own = self.engine.full_parameters(self.config.learner.weight_bucket_bytes, left_out, device)
        return plain_parameters(own, self.additions)

    @property
    def frozen(self) -> frozenset[str]:
        """The policy's weights that never change, by their names in its model folder."""
        changing = {f"{layer}.weight" for layer in self.additions}
        return frozenset(map(plain_name, self.engine.frozen)) - changing

    def publish(self, version: int, transport: str, kept: Collection[Any]) -> Publication | None:
        """Publishes the weights by a transport, on rank 0; the other ranks only help to gather.

        `kept` are the handles of buckets of earlier publications that may still be asked for. Frozen weights go with
        the first publication.
        """
        first, self.published = not self.published, True
        by_nccl = transport == "collective" and self.config.weights.backend == "nccl"
        parameters = self.policy_parameters(() if first else self.frozen, self.device if by_nccl else "cpu")
        if self.rank:
            for _ in parameters:
                pass
            return None
        if first:
            self.transport = self.transport or TRANSPORTS[transport](self.config.weights)
            self.publisher = Publisher(self.transport, self.config.learner.weight_bucket_bytes, self.frozen)
        return self.publisher.publish(parameters, version, kept)

    def save(self, folder: str) -> None:
        self.engine.save(folder)

    def copy_state(self) -> None:
        """Copies this rank's share of the state into its memory, for :meth:`write_copy`; all ranks call it."""
        if not isinstance(self.engine, ZeroEngine):
            raise TypeError(f"{type(self.engine).__name__} copies no state")
        self.copy = self.engine.copy_state()

    def write_copy(self, folder: str) -> None:
        """Writes the copy into `folder`, which exists, and frees it. It may run beside any other call."""
        if self.copy is None:
            raise RuntimeError("there is no copy of the state; call copy_state first")
        copy, self.copy = self.copy, None
        copy.write(Path(folder))

    def load(self, folder: str) -> None:
        self.published = False  # a state of version 0.2 holds frozen weights too
        self.engine.load(folder)

    def export(self, folder: str) -> None:
        """Writes the model in Hugging Face format, with the tokenizer and the licence that it came with."""
        parameters = dict(self.policy_parameters())
        if self.rank == 0:
            self.write_model(parameters, self.model_folder, Path(folder))

    def write_model(self, parameters: dict[str, torch.Tensor], source: str, folder: Path) -> None:
        """Writes a model folder like `source` (a folder or hub id) with these parameters and its other files."""
        write_model_folder(parameters, source, folder, self.config.model)


def write_model_folder(parameters: dict[str, torch.Tensor], source: str, folder: Path, config: ModelConfig) -> None:
    """Writes a model folder like `source` (a folder or hub id) with these parameters, in the run's dtype."""
    model = load_policy_model(source, config.dtype)
    names = dict(model.named_parameters())
    for name, tensor in parameters.items():
        if tensor.untyped_storage().nbytes() == tensor.nbytes:  # ZeRO-3's copies: one model in memory is enough
            names[name].data = tensor.to(names[name])
        else:  # a part of a buffer of all parameters, which safetensors would take for tied weights
            names[name].data.copy_(tensor)
    extend_positions(model.config, config.max_positions)
    model.save_pretrained(folder)
    if Path(source).is_dir():
        copy_side_files(Path(source), folder)
    else:
        from latent_grpo.common.models import load_tokenizer

        load_tokenizer(source).save_pretrained(folder)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies the tokenizer, chat templates, licence and model card of one model folder into another."""
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copy(path, folder / path.name)
