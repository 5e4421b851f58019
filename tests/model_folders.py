"""Tiny models of many architectures with their tokenizers, and ways to break their folders."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<think>", "</think>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = 320
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 270000\n"
Break = Callable[[Path], Any]


def tokenizer(template: str | None = TEMPLATE, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with the special tokens first."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.add_special_tokens(list(SPECIAL))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    given = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": template} | options
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **given)


def model(architecture: str = "llama", **settings: Any) -> PreTrainedModel:
    """A model of two narrow layers; `settings` are those of its configuration."""
    common = {
        "vocab_size": ROWS, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
        "initializer_range": 0.05,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = AutoConfig.for_model(architecture, **(common | sizes | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made.eval()


@functools.cache
def whole(root: Path, architecture: str = "llama", *, tied: bool = False, shards: bool = False) -> Path:
    """A folder that can be used, below `root`; made once."""
    folder = root / f"{architecture}-{tied}-{shards}"
    model(architecture, tie_word_embeddings=tied).save_pretrained(folder, max_shard_size="50KB" if shards else "1GB")
    tokenizer().save_pretrained(folder)
    return folder


def broken(target: Path, source: Path, break_it: Break) -> Path:
    """A copy of a folder after `break_it(folder)`."""
    shutil.copytree(source, target)
    break_it(target)
    return target


# --- ways to break a folder ----------------------------------------------------------------------------------------


def keys(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Break:
    """Other tensors in `model.safetensors`."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(change(tensors), file, {"format": "pt"})

    return apply


def settings(file: str = "config.json", **changes: Any) -> Break:
    """Other keys in a file of JSON; None removes a key."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return apply


def text(file: str, content: str) -> Break:
    return lambda folder: (folder / file).write_text(content)


def cut(file: str, size: int) -> Break:
    """A file of `size` bytes; below zero: so many fewer."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def without(*patterns: str) -> Break:
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def only(**files: str) -> Break:
    """A folder with nothing but these files, `name_json="{}"`."""

    def apply(folder: Path) -> None:
        without("*")(folder)
        for name, content in files.items():
            stem, _, suffix = name.rpartition("_")
            (folder / f"{stem}.{suffix}").write_text(content)

    return apply


def pickled(change: Callable[[dict[str, Any]], Any] = dict, *, zipped: bool = True) -> Break:
    """The weights as `pytorch_model.bin`."""

    def apply(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        (folder / "model.safetensors").unlink()
        torch.save(change(tensors), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    return apply


def both(*steps: Break) -> Break:
    return lambda folder: [step(folder) for step in steps]
