"""A model that cannot be used is refused from its files, in one line that names what is wrong."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import (
    POINTER,
    both,
    broken,
    cut,
    keys,
    model,
    only,
    pickled,
    settings,
    text,
    tokenizer,
    whole,
    without,
)

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.config.loading import of_model
from latent_grpo.common.model_check import check_model
from latent_grpo.common.models import load_model, load_tokenizer, output_facts
from latent_grpo.deploy.checks.validate import validate
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.learner.export import export_checkpoint
from latent_grpo.learner.policy import load_policy_model
from latent_grpo.rollout_workers.latent_model import LatentModel
from latent_grpo.rollout_workers.vllm_plugin.support import argument_problem

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})


def pipe(file):
    return both(without(file), lambda folder: os.mkfifo(folder / file))


def marked(file):
    """A file that begins with a byte order mark."""
    return lambda folder: (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())


class RunsCode:
    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def prefixed(prefix):
    return keys(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})


def lacking(part):
    return keys(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def quantised_layer(tensors):
    return {name: t.to(torch.int8) if "mlp" in name else t for name, t in tensors.items()}


REFUSED = {
    # weights that are not there (transformers would draw them)
    "compiled": (prefixed("_orig_mod."), r"21 missing \(.* 18 more\); 21 unexpected .*prefix _orig_mod\. \(torch"),
    "wrapped": (prefixed("module."), r"21 missing .*prefix module\. \(DistributedDataParallel"),
    "trainer": (prefixed("policy.actor."), r"21 missing .*prefix policy\.actor\.; save"),
    "one missing": (lacking("layers.1.mlp.up"), r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)\."),
    "no head": (lacking("lm_head"), r"1 missing \(lm_head\.weight\)\. .*tie_word_embeddings to true"),
    "extra": (keys(lambda tensors: tensors | {"v_head.weight": torch.ones(3)}), r"1 unexpected \(v_head\.weight\)"),
    "more layers": (settings(num_hidden_layers=3), r"9 missing \(model\.layers\.2\."),
    "fewer layers": (settings(num_hidden_layers=1), r"9 unexpected \(model\.layers\.1\."),
    "other rows": (settings(vocab_size=400), r"2 of another shape \(lm_head\.weight \[320, 32\] instead of"),
    "other width": (settings(hidden_size=64), r"21 of another shape"),
    # files that are something else
    "empty file": (text("model.safetensors", ""), r"model\.safetensors is empty \(0 bytes\)"),
    "pointer": (text("model.safetensors", POINTER), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "web page": (text("model.safetensors", "<!DOCTYPE html>"), r"model\.safetensors is a web page"),
    "no safetensors": (text("model.safetensors", "x" * 99), r"model\.safetensors \(99 bytes\) is no safetensors file"),
    "cut in its header": (cut("model.safetensors", 100), r"cut off in its header, at 100 of 2,\d\d\d bytes"),
    "cut": (cut("model.safetensors", -9), r"is cut off: it has .* bytes, so model\.norm\.weight is not whole"),
    "cut in the middle": (cut("model.safetensors", 50_000), r"is cut off: .*more is not whole; download it again"),
    "dangling link": (
        both(without("model.safetensors"), lambda folder: (folder / "model.safetensors").symlink_to("gone")),
        r"model\.safetensors is a link to a file that is not there",
    ),
    "pickle renamed": (
        both(pickled(), lambda f: (f / "pytorch_model.bin").rename(f / "model.safetensors")),
        r"model\.safetensors is a pickled file of PyTorch under another name",
    ),
    "no weights": (without("model.safetensors"), r"it has no weights \(model\.safetensors or .*\); download them too"),
    "weights of another name": (
        lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
        r"its weights are weights\.safetensors; expected model\.safetensors",
    ),
    "TensorFlow": (both(without("model.safetensors"), text("tf_model.h5", "x")), r"no weights .* tf_model\.h5 \(Tens"),
    "pickle cut": (both(pickled(), cut("pytorch_model.bin", -3000)), r"pytorch_model\.bin cannot be read .* cut off"),
    "pickle with code": (
        pickled(lambda tensors: {"a": RunsCode()}),
        r"pytorch_model\.bin cannot be read .*holds code, which is never run",
    ),
    "pickle without a head": (
        pickled(lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"}),
        r"1 missing \(lm_head\.weight\)",
    ),
    "longer": (
        lambda f: os.truncate(f / "model.safetensors", 10**9),  # zeros that take no room
        r"model\.safetensors is no whole safetensors file \(.*not fully covered\)",
    ),
    "weights pipe": (pipe("model.safetensors"), r"model\.safetensors is a pipe or a device"),
    "config pipe": (pipe("config.json"), r"config\.json is a pipe or a device"),
    "tokenizer pipe": (pipe("tokenizer.json"), r"tokenizer\.json is a pipe or a device"),
    # what is no whole model
    "nothing": (without("*"), r"the folder is empty: it has no config\.json"),
    "adapter beside": (text("adapter_config.json", ADAPTER), r"PEFT adapter.*base model \(some/base\) first"),
    "adapter alone": (only(adapter_config_json=ADAPTER), r"holds adapter_config\.json, a PEFT adapter.*merge"),
    "adapter's weights": (text("adapter_model.safetensors", "x"), r"holds adapter_model\.safetensors, a PEFT adapter"),
    "GGUF alone": (only(model_gguf="GGUF"), r"no config\.json, but model\.gguf \(GGUF .*convert\.py"),
    "GGUF weights": (both(without("*.safetensors"), text("m.gguf", "GGUF")), r"no weights .* but m\.gguf \(GGUF"),
    "GPTQ": (settings(quantization_config={"quant_method": "gptq"}), r"quantization_config \(gptq\).*the unquantised"),
    "AWQ beside": (text("quant_config.json", "{}"), r"has a quant_config\.json, so its weights are quantised"),
    "int8": (keys(quantised_layer), r"model\.layers\.0\.mlp\.\w+\.weight is stored as I8, so .* quantised"),
    # its configuration
    "config pointer": (text("config.json", POINTER), r"config\.json is a Git LFS pointer"),
    "config empty": (text("config.json", ""), r"config\.json is empty"),
    "config cut": (cut("config.json", -20), r"config\.json is not valid JSON \(.*line \d+"),
    "config list": (text("config.json", "[]"), r"config\.json: expected a JSON object, got list"),
    "config Latin-1": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xe4"}'), r"config\.json is not UTF-8"),
    "config of nothing": (text("config.json", "{}"), r"its config\.json names no model_type"),
    "config impossible": (settings(num_attention_heads=0), r"its config\.json (cannot be used|makes no model) \("),
    "config of texts": (settings(hidden_size="wide"), r"its config\.json cannot be used \(.*hidden_size"),
    "config without end": (settings(num_hidden_layers=10**12), r"has num_hidden_layers 1,000,.* which no model"),
    "config of other types": (settings(logits_scaling={}), r"has logits_scaling \{\}, expected a number"),
    "config that looks ahead": (settings(is_causal="x"), r"its attention \(llama\) looks ahead"),
    "one architecture of no kind": (
        settings(architectures=5),
        r"names the architecture 5, which has no output layer|Field 'architectures' with value 5",  # older transformers
    ),
    "unknown": (settings(model_type="newmodel"), r"this transformers has no architecture 'newmodel'"),
    "classifier": (settings(architectures=["LlamaForSequenceClassification"]), r"no output layer .*expected LlamaForC"),
    "encoder-decoder": (settings(model_type="t5"), r"it is an encoder-decoder \(t5\)"),
    "vision": (settings(model_type="qwen2_vl"), r"it is a multimodal model \(qwen2_vl\)"),
    # code of its own
    "own code": (
        settings(model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}),
        r"needs code of its own folder \(auto_map, mine\), which is never run",
    ),
    "own class": (
        settings(architectures=["Mine"], auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        r"names the architecture Mine, which is code of its own folder and never run",
    ),
    "own tokenizer": (
        settings("tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        r"its tokenizer \(Mine\) is code of its own folder",
    ),
    "no quantisation": (settings(quantization_config={}), r"has a quantization_config, so its weights"),
    "config marked": (marked("config.json"), r"config\.json is a text with a byte order mark.*without one"),
    # its tokenizer
    "tokenizer marked": (marked("tokenizer.json"), r"tokenizer\.json is a text with a byte order mark"),
    "its settings marked": (marked("tokenizer_config.json"), r"_config\.json is a text with a byte order mark"),
    "ends marked": (marked("generation_config.json"), r"generation_config\.json is a text with a byte order mark"),
    "template marked": (marked("chat_template.jinja"), r"chat_template\.jinja is a text with a byte order mark"),
    "template a number": (settings("tokenizer_config.json", chat_template=5), r"the chat_template 5, expected a text"),
    "no tokenizer": (without("tokenizer*"), r"it has no tokenizer \(tokenizer\.json"),
    "tokenizer's settings alone": (without("tokenizer.json"), r"it has no tokenizer"),
    "tokenizer pointer": (text("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "template pointer": (text("chat_template.jinja", POINTER), r"chat_template\.jinja is a Git LFS pointer"),
    "tokenizer cut": (cut("tokenizer.json", -50), r"tokenizer\.json is not valid JSON"),
    "tokenizer settings cut": (cut("tokenizer_config.json", -5), r"tokenizer_config\.json is not valid JSON"),
}  # fmt: skip
SHARDS = {
    "shard missing": (without("model-00002*"), r"1 of its \d+ files .* missing: model-00002-of-0000\d\."),
    "index missing": (without("*.index.json"), r"model-00001-.*, but no index \(model\.safetensors\.index\.json"),
    "shard pointer": (text("model-00002-of-00003.safetensors", POINTER), r"model-00002-of-.* is a Git LFS"),
    "shard cut": (cut("model-00003-of-00003.safetensors", -7), r"model-00003-of-00003\.safetensors is cut off"),
    "index of more": (
        settings("model.safetensors.index.json", weight_map={"model.gone": "model-00001-of-00003.safetensors"}),
        r"has no tensor model\.gone, which its index places there",
    ),
    "index of nothing": (settings("model.safetensors.index.json", weight_map=None), r"has no weight_map"),
    "index outside": (
        settings("model.safetensors.index.json", weight_map={"a": "../other.safetensors"}),
        r"names a file outside of the folder \(other\.safetensors\)",
    ),
}  # fmt: skip


def refusal_of(call, *arguments):
    """The one line of what a call refuses."""
    with pytest.raises(ConfigError) as found:
        call(*arguments)
    line = str(found.value)
    assert line.startswith("model '"), line
    assert "\n" not in line
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_used_is_refused_from_its_files(folders, tmp_path, case, capfd):
    break_it, message = REFUSED[case]
    folder = broken(tmp_path / "m", whole(folders), break_it)
    line = refusal_of(check_model, folder)
    assert re.search(message, line), line
    assert "code of a checkpoint ran" not in capfd.readouterr().out


@pytest.mark.parametrize("case", SHARDS)
def test_shards_and_their_index_are_compared(folders, tmp_path, case):
    break_it, message = SHARDS[case]
    folder = broken(tmp_path / "m", whole(folders, shards=True), break_it)
    with pytest.raises(ConfigError, match=message):
        check_model(folder)


@pytest.mark.parametrize("change", [{"eos_token_id": "</s>"}, {"eos_token_id": [1, "2"]}, {"pad_token_id": "x"}])
def test_a_generation_config_of_other_types_is_refused(folders, tmp_path, change):
    folder = broken(tmp_path / "m", whole(folders), settings("generation_config.json", **change))
    assert "config" in refusal_of(output_facts, folder)


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "Nothing"}}'])
def test_a_tokenizer_of_another_format_is_refused(folders, tmp_path, content):
    folder = broken(tmp_path / "m", whole(folders), text("tokenizer.json", content))
    assert "tokenizer" in refusal_of(load_tokenizer, folder)


USABLE = {
    "as it was saved": (lambda folder: None, {}),
    "in shards": (lambda folder: None, {"shards": True}),
    "tied": (lambda folder: None, {"tied": True}),
    "tied, stored twice": (
        keys(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
        {"tied": True},
    ),
    "without the base model's prefix": (
        keys(lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()}),
        {},
    ),
    "half precision": (keys(lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}), {}),
    "constants of old versions": (
        keys(lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        {},
    ),
    "pickled": (pickled(), {}),
    "pickled by an old PyTorch": (pickled(zipped=False), {}),
    "no architectures": (settings(architectures=None), {}),
    "a GGUF beside it": (text("model.gguf", "GGUF"), {}),
}


@pytest.mark.parametrize("case", USABLE)
def test_a_whole_model_passes_and_is_loaded(folders, tmp_path, case):
    change, kind = USABLE[case]
    folder = broken(tmp_path / "m", whole(folders, **kind), change)
    assert check_model(folder) == []
    original = load_model(whole(folders, **kind)).state_dict()
    found = load_model(folder).state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-3) for name, tensor in original.items())


def test_weights_that_are_tied_and_differ_are_refused(folders, tmp_path):
    change = keys(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    folder = broken(tmp_path / "m", whole(folders, tied=True), change)
    assert "stored with different values; set tie_word_embeddings to false" in refusal_of(check_model, folder)


def test_a_missing_expert_is_named(tmp_path):
    model("mixtral", sliding_window=None, num_local_experts=4).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert check_model(tmp_path) == []
    lacking("layers.0.block_sparse_moe.experts.2.w1")(tmp_path)
    assert "1 missing (model.layers.0.block_sparse_moe.experts.2.w1.weight)" in refusal_of(check_model, tmp_path)


def test_the_size_of_weights_does_not_matter(folders, tmp_path):
    """Only headers are read: here of 80 GB that the disk does not have."""
    stated = {"a": {"dtype": "BF16", "shape": [40_000_000, 1000], "data_offsets": [0, 80_000_000_000]}}
    header = json.dumps(stated).encode()
    folder = broken(tmp_path / "m", whole(folders), without("model.safetensors"))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 80_000_000_000)
    assert "1 unexpected (a)" in refusal_of(check_model, folder)


RUN = [
    "tasks.0={name: t, path: 'builtin:chain_arithmetic', verifier: number, max_prompt_tokens: 96, "
    "max_response_tokens: 16}",
    "evaluation.tasks=[]",
]
OPENED_BY = {
    "load_model": load_model,
    "LatentModel": LatentModel,
    "validate": lambda folder: validate(load_config("quickstart", [*RUN, *of_model(str(folder))])),
    "train": lambda folder: prepare(load_config("quickstart", [*RUN, *of_model(str(folder))]), Reporter()),
    "the learner": lambda folder: load_policy_model(str(folder)),
    "export": lambda folder: export_checkpoint(Path("none"), folder, Path("none"), load_config("quickstart", RUN)),
}


@pytest.mark.parametrize("case", ["compiled", "adapter beside", "pointer", "own code", "GPTQ"])
@pytest.mark.parametrize("opened_by", OPENED_BY)
def test_whatever_opens_a_model_refuses_it_in_the_same_words(folders, tmp_path, opened_by, case):
    folder = broken(tmp_path / "m", whole(folders), REFUSED[case][0])
    (folder / "configuration_mine.py").write_text("raise SystemExit('foreign code ran')")
    assert re.search(REFUSED[case][1], refusal_of(OPENED_BY[opened_by], folder))


WINDOWED = {"use_sliding_window": True, "sliding_window": 112, "max_window_layers": 0}


@pytest.mark.parametrize("opened_by", ["validate", "train"])
def test_a_window_is_compared_with_the_longest_prompt_and_response(tmp_path, opened_by):
    model("qwen2", **WINDOWED).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    OPENED_BY[opened_by](tmp_path)  # 96 tokens and 16 steps fit
    for shorter in (111, 0):  # with 0 Hugging Face's own mask leaves nothing to attend to
        settings(sliding_window=shorter)(tmp_path)
        with pytest.raises(
            ConfigError,
            match=rf"task t: its longest prompt .* exceed the window .*sliding_window in its.* is {shorter},",
        ):
            OPENED_BY[opened_by](tmp_path)


def test_code_of_a_known_architecture_is_not_run_and_said(folders, tmp_path):
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.LlamaForCausalLM"}
    folder = broken(tmp_path / "m", whole(folders), settings(auto_map=own))
    settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Tokenizer", None]})(folder)
    settings("generation_config.json", auto_map={"generate": "mine.generate"}, custom_generate="mine")(folder)
    (folder / "mine.py").write_text("raise SystemExit('foreign code ran')")
    (warning,) = check_model(folder)
    assert "code of its own (auto_map), which is never run; transformers' LlamaForCausalLM is used" in warning
    load_model(folder)
    assert load_tokenizer(folder).encode("a")


def test_no_call_trusts_or_asks_about_code_of_a_model():
    calls = {}
    for folder in ("common", "reward", "rollout_workers", "learner", "deploy", "examples"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    given = {word.arg: word.value for word in node.keywords}
                    loads = node.func.attr in ("from_pretrained", "from_config")
                    if "trust_remote_code" in given or (loads and "GenerationConfig" not in ast.unparse(node.func)):
                        calls[f"{file.relative_to(ROOT)}:{node.lineno}"] = given.get("trust_remote_code")
    assert len(calls) >= 5
    trusting = [at for at, value in calls.items() if not (isinstance(value, ast.Constant) and value.value is False)]
    assert not trusting, f"pass trust_remote_code=False, or transformers asks on a terminal: {trusting}"


def test_vllm_is_not_told_to_run_a_models_code():
    assert "trust_remote_code: no code of a model's folder" in str(argument_problem({"trust_remote_code": True}))


def test_settings_in_the_hubs_cache_without_weights_are_refused_where_the_hub_cannot_be_asked(folders, tmp_path):
    """In a process of its own: the hub's package reads where its cache is when it is imported."""
    place = tmp_path / "models--me--m" / "snapshots" / "abc"
    shutil.copytree(whole(folders), place)
    (place.parents[1] / "refs").mkdir()
    (place.parents[1] / "refs" / "main").write_text("abc")
    (place / "model.safetensors").unlink()
    program = "from latent_grpo.common.model_check import check_model; check_model('me/m')"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert f"ConfigError: model 'me/m': the cache ({place}) has its settings and no weights" in found.stderr
    assert "download the model where there is a network (`hf download me/m`)" in found.stderr
