"""The files of a model's folder: which there are, whether each is what its name says, and which tensors they hold.

Only names, sizes and headers are read, no weights. What is found here is compared with what the model's configuration
asks for in `common.model_check`.
"""

from __future__ import annotations

import json
import struct
import textwrap
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from latent_grpo.common.errors import ConfigError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # GPTQ, AWQ, ModelOpt
FOREIGN = {
    "*.gguf": "GGUF (llama.cpp)",
    "tf_model.h5": "TensorFlow",
    "flax_model*": "Flax",
    "consolidated*": "Meta's or Mistral's own layout",
    "weights*.npz": "MLX",
    "*.onnx": "ONNX",
    "*.pth": "a plain PyTorch file",
}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece*.model", "vocab.json", "vocab.txt",
    "*.tiktoken", "tekken.json", "*.vocab",
)  # fmt: skip
STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull` in the folder it came from",
    b"# xet version": "a Xet pointer, not the file itself; download the model again",
    b"<!DOCTYPE": "a web page, perhaps of a failed download; download the model again",
    b"<html": "a web page, perhaps of a failed download; download the model again",
    b"GGUF": "a GGUF file under another name; give the Hugging Face folder of the model",
    b"\x80\x02": "a pickled file of PyTorch under another name; download the model again",
    b"PK\x03\x04": "a pickled file of PyTorch under another name; download the model again",
    b"\xef\xbb\xbf": "a text with a byte order mark, which transformers cannot read; save it as UTF-8 without one",
}
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST_HEADER = 100 * 2**20  # bytes, safetensors' own limit
NAMED = 3  # names in a message
REASON = 160  # characters of another library's message


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint as its file's header states it."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, U8, ...
    file: str


def named(names: Iterable[object]) -> str:
    """Returns `a, b, c and 5 more` for names in an error."""
    found = [str(name) for name in names]
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


def refused(model: str | Path, why: str) -> ConfigError:
    """Returns the error that a model cannot be used: its place, and `why`."""
    return ConfigError(f"model {str(model)!r}: {why}")


def words(error: object) -> str:
    """Returns an error's words as one line, without its end where that is long."""
    return textwrap.shorten(str(error) or type(error).__name__, REASON, placeholder=" ...")


def check_kind(folder: Path) -> None:
    """Raises ConfigError for a folder that holds something else than the files of a whole, plain model.

    These are an empty folder, an adapter, quantised weights, a GGUF file, the files of a diffusion or
    sentence-embedding model, and a folder without a `config.json`.
    """
    if not any(folder.iterdir()):
        raise refused(folder, "the folder is empty: it has no config.json; give a Hugging Face model folder")
    adapters = [name for name in ADAPTER_FILES if (folder / name).exists()]
    if adapters:
        base = _base_of(folder / ADAPTER_FILES[0])
        raise refused(
            folder,
            f"it holds {adapters[0]}, a PEFT adapter, which is never applied here: merge it into its base model{base} "
            "first (`merge_and_unload`), and give the folder of the merged model",
        )
    if not (folder / "config.json").exists():
        foreign = _foreign(folder)
        below = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f"; did you mean {below[0]}?" if below else ""
        what = f", but {foreign}" if foreign else ""
        how = "; examples/real_model/convert.py shows how a GGUF file becomes one" if "GGUF" in foreign else ""
        raise refused(folder, f"it has no config.json{what}{hint or '; give a Hugging Face model folder'}{how}")
    for name in QUANTISED_FILES:
        if (folder / name).exists():
            raise refused(folder, _quantised(f"it has a {name}"))


def _quantised(how: str) -> str:
    return (
        f"{how}, so its weights are quantised; training and verified weights need whole ones: give the unquantised "
        "model"
    )


def check_settings(folder: Path) -> dict[str, Any]:
    """Returns the contents of `config.json`. Raises ConfigError where it is no model's, or that of quantised weights.

    Foreign code is found in `common.model_check`, which knows the library's own.
    """
    settings = read_json(folder / "config.json", folder)
    for key in ("quantization_config", "compression_config"):
        if settings.get(key) is not None:
            method = settings[key].get("quant_method") if isinstance(settings[key], dict) else None
            raise refused(folder, _quantised(f"its config.json has a {key}{f' ({method})' if method else ''}"))
    kind = settings.get("model_type")
    if not isinstance(kind, str) or not kind:
        had = f" (got {kind!r})" if "model_type" in settings else ""
        raise refused(
            folder, f"its config.json names no model_type{had}, such as llama; give a Hugging Face model folder"
        )
    return settings


def check_tokenizer_files(folder: Path) -> None:
    """Raises ConfigError for a folder without a tokenizer, or with one whose files are pointers or no JSON.

    Without its files some tokenizers would be made with an empty vocabulary.
    """
    found = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern))]
    if not found:
        raise refused(
            folder,
            "it has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy the tokenizer's files of the "
            "original model into it",
        )
    others = (
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "merges.txt",
        "chat_template.jinja", "chat_template.json",
    )  # fmt: skip
    for file in (*found, *(folder / name for name in others if (folder / name).exists())):
        if file.suffix == ".json":
            read_json(file, folder)
        else:
            check_bytes(file, folder)


def read_json(file: Path, model: str | Path) -> dict[str, Any]:
    """Reads a file of one JSON object. Raises ConfigError, which names the file and what it is instead."""
    check_bytes(file, model)
    try:
        found = json.loads(file.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise refused(model, f"{file.name} is not UTF-8 ({error.reason}); copy it again from the original") from error
    except (ValueError, RecursionError) as error:
        raise refused(model, f"{file.name} is not valid JSON ({error}); copy it again from the original") from error
    if not isinstance(found, dict):
        raise refused(model, f"{file.name}: expected a JSON object, got {type(found).__name__}; copy it again")
    return found


def check_bytes(file: Path, model: str | Path) -> bytes:
    """Returns the first bytes of a file. Raises ConfigError for one that is missing, empty, a pointer or a web page."""
    if file.exists() and not (file.is_file() or file.is_dir()):  # to open a pipe is to wait for its writer
        raise refused(model, f"{file.name} is a pipe or a device; download the model again")
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except FileNotFoundError:
        what = "is a link to a file that is not there" if file.is_symlink() else "is missing"
        raise refused(model, f"{file.name} {what}; download the model again") from None
    except OSError as error:
        raise refused(model, f"{file.name} cannot be read: {error.strerror}; check its kind and its rights") from error
    if not start:
        raise refused(model, f"{file.name} is empty (0 bytes); download the model again")
    pickled = file.suffix == ".bin"
    for beginning, what in STARTS.items():
        if start.startswith(beginning) and not (pickled and "pickled" in what):
            raise refused(model, f"{file.name} is {what}")
    return start


# --- weights -----------------------------------------------------------------------------------------------------


def stored_tensors(folder: Path, settings: dict[str, Any] | None = None) -> dict[str, StoredTensor]:
    """Returns the tensors of a folder's checkpoint by name, from headers alone.

    The files are those that transformers loads: `model.safetensors`, else the shards of its index, else the pickled
    ones. `settings` are those of `config.json`, which may name another file. Raises ConfigError for files that are
    missing, cut off or something else, and for quantised weights.
    """
    files, wanted = _weight_files(folder, settings or {})
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= _pickled_tensors(file, folder) if file.suffix == ".bin" else _safetensors(file, folder)
    absent = [name for name, file in wanted.items() if name not in found or found[name].file != file]
    if absent:
        raise refused(
            folder,
            f"{wanted[absent[0]]} has no tensor {named(absent)}, which its index places there; download the model "
            "again",
        )
    packed = [name for name, tensor in found.items() if name.endswith("weight") and tensor.dtype not in FLOATS]
    if packed:
        raise refused(folder, _quantised(f"{packed[0]} is stored as {found[packed[0]].dtype}"))
    return found


def has_weights(folder: Path) -> bool:
    """Whether a folder has files of weights; a hub's snapshot may have the settings alone."""
    names = (SAFETENSORS, SAFETENSORS_INDEX, PICKLED, PICKLED_INDEX)
    return any((folder / name).exists() for name in names)


def _weight_files(folder: Path, settings: dict[str, Any]) -> tuple[list[Path], dict[str, str]]:
    """Returns the files of weights, and by the index the file of each tensor; the latter is empty without an index."""
    own = settings.get("transformers_weights")
    names = [own] if isinstance(own, str) else [SAFETENSORS, SAFETENSORS_INDEX, PICKLED, PICKLED_INDEX]
    chosen = next((folder / name for name in names if (folder / name).exists() or (folder / name).is_symlink()), None)
    if chosen is None:
        shards = sorted(folder.glob("*-of-*.safetensors")) or sorted(folder.glob("*-of-*.bin"))
        others = [file for file in sorted(folder.glob("*.safetensors")) if file not in shards]
        if shards:
            raise refused(folder, f"it has {shards[0].name}, but no index ({names[0]}.index.json); download it too")
        if others:
            raise refused(folder, f"its weights are {named(f.name for f in others)}; expected {' or '.join(names)}")
        foreign = _foreign(folder)
        raise refused(
            folder,
            f"it has no weights ({' or '.join(names)})"
            + (f", but {foreign}; convert them to safetensors" if foreign else "; download them too"),
        )
    if chosen.suffix != ".json":
        return [chosen], {}
    index = read_json(chosen, folder).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise refused(folder, f"{chosen.name} has no weight_map of tensors and files; download it again")
    shards = [folder / name for name in sorted(set(index.values()))]
    outside = [file.name for file in shards if file.parent != folder]
    if outside:
        raise refused(folder, f"{chosen.name} names a file outside of the folder ({outside[0]}); download it again")
    missing = [file.name for file in shards if not file.exists()]
    if missing:
        raise refused(
            folder,
            f"{len(missing)} of its {len(shards)} files of weights are missing: {named(missing)} (named in "
            f"{chosen.name}); download them too",
        )
    return shards, index


def _safetensors(file: Path, folder: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file. Raises ConfigError where the file is shorter than its header says."""
    check_bytes(file, folder)
    size = file.stat().st_size
    again = "download it again"
    with file.open("rb") as opened:
        length = int(struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))[0])
        if size < 8 or length > LARGEST_HEADER:
            raise refused(folder, f"{file.name} ({size:,} bytes) is no safetensors file; {again}")
        header = opened.read(length)
    if len(header) < length:
        raise refused(folder, f"{file.name} is cut off in its header, at {size:,} of {8 + length:,} bytes; {again}")
    try:
        stated = json.loads(header)
        ends = {name: int(stated[name]["data_offsets"][1]) for name in stated if name != "__metadata__"}
        found = {
            name: StoredTensor(tuple(int(n) for n in stated[name]["shape"]), str(stated[name]["dtype"]), file.name)
            for name in ends
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise refused(folder, f"{file.name} is no safetensors file, its header is damaged; {again}") from error
    have, needed = size - 8 - length, max(ends.values(), default=0)
    if have < needed:
        cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > have]
        raise refused(
            folder,
            f"{file.name} is cut off: it has {size:,} of {8 + length + needed:,} bytes, so {named(cut)} is not whole; "
            f"{again}",
        )
    if not found:
        raise refused(folder, f"{file.name} holds no tensors; {again}")
    try:
        with safe_open(file, framework="np"):  # which reads the header alone, and refuses gaps and bytes at the end
            pass
    except SafetensorError as error:
        raise refused(folder, f"{file.name} is no whole safetensors file ({words(error)}); {again}") from error
    return found


def _pickled_tensors(file: Path, folder: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file of `torch.save`; a zipped one is mapped, so that no weights are read."""
    import torch

    check_bytes(file, folder)
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # the unpickler raises what the bytes make it do
        raise refused(
            folder,
            f"{file.name} cannot be read as tensors alone ({type(error).__name__}): it is cut off, or holds code, "
            "which is never run; download it again, or give the model as safetensors",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise refused(folder, f"{file.name} is no state dict of tensors; give the model as safetensors")
    return {
        str(name): StoredTensor(tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), file.name)
        for name, tensor in content.items()
    }


def _foreign(folder: Path) -> str:
    """Returns what a folder holds of another layout, `model.gguf (GGUF)`; empty if nothing."""
    for pattern, what in FOREIGN.items():
        for file in sorted(folder.glob(pattern)):
            return f"{file.name} ({what})"
    return ""


def _base_of(file: Path) -> str:
    """Returns ` (NAME)` for the base model that an adapter's settings name; empty if they name none."""
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({base})" if base else ""
