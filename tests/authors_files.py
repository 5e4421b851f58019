"""Checkpoints and data files in the layouts that the paper's authors release (METHOD §8), made here: none is theirs.

A checkpoint is a Llama or Qwen2 whose next token depends on the last one alone, by the table `NEXT`: its MLP is a table
of transitions, and attention adds nothing. So its latent chains end, its answers stand in boxes or not, and its samples
differ, without any training.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER_LINE = "Please provide the option letter (A, B, C, or D) as your final answer."
EOS = "<eos>"
NEXT = {
    ">": {"4": 0.35, "7": 0.3, "\\": 0.2, "B": 0.15},
    "\\": {"boxed": 1.0}, "boxed": {"{": 1.0}, "{": {"4": 0.5, "7": 0.3, "B": 0.2},
    **{answer: {"</": 0.4, "}": 0.25, EOS: 0.35} for answer in "47B"},
    "}": {EOS: 0.6, "</": 0.4},
    "</": {"think": 1.0}, "think": {">": 1.0}, EOS: {"</": 1.0},
}  # fmt: skip
"""Token -> tokens that may follow it, with their probabilities at temperature 1."""
LLAMA_TEMPLATE = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}"
    "{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
QWEN_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
}
ROW_OF_GPQA = {"Question": "Which letter?", "Correct Answer": "this one"} | {
    f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)
}


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the instruction is few tokens, and the texts of `NEXT` are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        f"{INSTRUCTION}\n{LETTER_LINE}",
        "system user assistant\n\nToday Date: 26 Jul 2024",
        "<think></think>",
        "boxed",
    ]
    special = SPECIAL[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[1], bos_token=special[0], pad_token=special[1],
        chat_template=LLAMA_TEMPLATE if kind == "llama" else QWEN_TEMPLATE,
    )  # fmt: skip


def _transitions(tokenizer: PreTrainedTokenizerFast, width: int, scale: float) -> torch.Tensor:
    """The MLP's output weights, [width, width]: column i holds what follows token i, so that logits give `NEXT`."""

    def id_of(text: str) -> int:
        (found,) = [tokenizer.eos_token_id] if text == EOS else tokenizer.encode(text, add_special_tokens=False)
        return found

    table = torch.zeros(width, width)
    for token, following in NEXT.items():
        for text, p in following.items():
            table[id_of(text), id_of(token)] = 1 + math.log(p) / (scale * math.sqrt(width / len(following)))
    return table


def checkpoint(folder: Path, kind: str) -> Path:
    """Writes a checkpoint as released: `llama` tied, with a token beyond the rows; `qwen` untied, with padded rows."""
    tokenizer = _tokenizer(kind)
    rows = len(tokenizer) + (0 if kind == "llama" else 8)
    width = -(-rows // 8) * 8
    shared = {
        "vocab_size": rows, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 8192,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shared))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **shared))
    scale = 2.0
    one_hot = scale * torch.eye(width)[:rows]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(one_hot)
        model.lm_head.weight.copy_(one_hot)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.gate_proj.weight.copy_(5 * torch.eye(width))
        layer.mlp.up_proj.weight.copy_(torch.eye(width))
        layer.mlp.down_proj.weight.copy_(_transitions(tokenizer, width, scale))
    model.to(torch.bfloat16).save_pretrained(folder)
    if kind == "llama":
        tokenizer.add_tokens([AddedToken("<|compress_token|>", special=True)], special_tokens=True)
        assert tokenizer.convert_tokens_to_ids("<|compress_token|>") == rows
    tokenizer.save_pretrained(folder)
    return folder


# --- data ----------------------------------------------------------------------------------------------------------


def in_verls_layout(row: dict, *, high: bool) -> dict:
    """Low rows hold the instruction inside the user message, high rows in a system message."""
    user = {"role": "user", "content": row["problem"] if high else f"{INSTRUCTION}\n{row['problem']}"}
    system = [{"role": "system", "content": INSTRUCTION}] if high else []
    return {
        "data_source": "x", "prompt": [*system, user], "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]}, "extra_info": {"index": 0, "split": "test"},
    }  # fmt: skip


def data(folder: Path, problems: int = 4) -> Path:
    """Writes the tests as `.jsonl` and, in verl's layout, as `.parquet`, and the two training sets, by their names."""
    folder.mkdir()
    answers = itertools.cycle("47")
    for stem in ("GSM8k-Aug", "GSM8k-Hard", "Svamp", "Multiarith", "Math-500", "AIME-2024", "AIME-2025"):
        rows = [{"problem": f"What is {i} and {i}?", "answer": next(answers)} for i in range(problems)]
        _jsonl(folder / f"{stem}-test.jsonl", rows)
        high = stem.startswith(("Math", "AIME"))
        _parquet(folder / f"{stem}-test.parquet", [in_verls_layout(row, high=high) for row in rows])
    _jsonl(folder / "GPQA-test.jsonl", [{**ROW_OF_GPQA, "Record ID": str(i)} for i in range(problems)])
    solutions = [("1+1", "It is \\boxed{4}."), ("2+2", "So \\boxed{7}")] * 4
    train = [{"problem": f"What is {i}?", "cot": cot, "cot_answer": s} for i, (cot, s) in enumerate(solutions)]
    _parquet(folder / "GSM8k-Aug-oss-dup-all.parquet", train)
    high = [{"problem": f"Find {i}.", "answer": next(answers)} for i in range(8)]
    _parquet(folder / "DAPO-Math-17k-en-train.parquet", [in_verls_layout(row, high=True) for row in high])
    return folder


def _jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)
