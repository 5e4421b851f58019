"""The estimate of a rank's memory, against what the model itself saves and holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latent_grpo.common.config import ConfigError, LearnerConfig, LoRAConfig, load_config
from latent_grpo.common.models import make_model, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.deploy.checks.memory import (
    ModelShape,
    in_parts,
    machine_bytes,
    rank_memory,
    staged_bytes,
    worker_memory,
)
from latent_grpo.learner.logprobs import chunk_size
from latent_grpo.learner.lora import add_lora

TOKENIZER = make_arithmetic_tokenizer()
NEW = ["model.new.hidden_size=256", "model.new.intermediate_size=640", "model.new.num_layers=3", "learner.ranks=1"]


def identity(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage, on any device."""
    return tensor.untyped_storage()._cdata  # torch has no public name for it


def saved_bytes(model, tokens: int) -> int:
    """Bytes of all storages that a forward pass saves, its parameters left out."""
    own = {identity(t) for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        if identity(tensor) not in own:
            saved[identity(tensor)] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    inputs = torch.randn(1, tokens, model.config.hidden_size, dtype=model.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(inputs_embeds=inputs, use_cache=False)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_a_forward_pass_saves(architecture, dtype):
    config = load_config("quickstart", [*NEW, f"model.new.architecture={architecture}"])
    shape = ModelShape.of(config, None, TOKENIZER)
    model = make_model(config.model.new, TOKENIZER, 0).to(getattr(torch, dtype))
    found = saved_bytes(model, 128) / 128
    assert shape.saved_bytes(dtype, checkpointing=False) == pytest.approx(found, rel=0.25)
    assert shape.saved_bytes(dtype, checkpointing=True) < found / 2


def test_the_shape_is_the_models_and_makes_no_weights(tmp_path):
    config = load_config("quickstart", [*NEW, "model.new.tie_embeddings=true"])
    model = make_model(config.model.new, TOKENIZER, 0)
    save_model(tmp_path / "m", model, TOKENIZER)
    (tmp_path / "m" / "model.safetensors").unlink()
    for shape in (ModelShape.of(config, None, TOKENIZER), ModelShape.of(config, tmp_path / "m", TOKENIZER)):
        assert (shape.parameters, shape.tied) == (model.num_parameters(), True)
        assert (shape.layers, shape.width, shape.mlp_width, shape.rows) == (3, 256, 640, len(TOKENIZER))


def test_states_are_partitioned_by_stage():
    shape = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)
    n, e = shape.parameters, shape.embeddings

    def states(stage: int, ranks: int, dtype: str = "float32", frozen: bool = False) -> float:
        config = load_config(
            "quickstart", [*NEW, f"learner.zero_stage={stage}", f"learner.ranks={ranks}", f"model.dtype={dtype}"]
        )
        return rank_memory(config, shape, 1000, frozen_embeddings=frozen).states

    assert states(0, 1) == 16 * n
    assert states(1, 1) == states(3, 1) == 20 * n
    assert states(1, 4) == 8 * n + 3 * n
    assert states(2, 4) == 4 * n + 4 * n
    assert states(3, 4) == 5 * n
    assert states(3, 4, "bfloat16") == 4 * n + n // 2
    assert states(2, 1, "bfloat16", frozen=True) == 2 * n + 16 * (n - e)


def test_the_collective_holds_copies_of_each_version_that_may_be_asked_for():
    shape = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)

    def staged(*changes: str) -> int:
        return staged_bytes(load_config("quickstart", [*NEW, *changes]), shape)

    assert staged() == staged("weights.transport=shared_memory") == 0
    assert staged("weights.transport=collective") == 2 * 4 * shape.parameters
    assert staged("weights.transport=collective", "model.dtype=bfloat16") == 2 * 2 * shape.parameters
    assert staged("weights.transport=collective", "max_staleness=2") > 2 * 4 * shape.parameters


def test_what_is_offloaded_counts_for_the_machine_and_not_for_its_gpu():
    shape = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)

    def memory(offload: str, gpus: int):
        keys = [f"learner.offload={offload}", f"learner.resources.num_gpus={gpus}", "learner.zero_stage=3"]
        return rank_memory(
            load_config("quickstart", [*NEW, *keys, "deterministic=false", "checkpoint.background=false"]),
            shape,
            900,
            frozen_embeddings=False,
        )

    n, whole = shape.parameters, memory("none", 1)
    assert (whole.host, memory("optimizer", 0)) == (0, memory("none", 0))
    assert (memory("optimizer", 1).host, memory("optimizer", 1).states) == (16 * n, whole.states - 16 * n)
    assert (memory("parameters", 1).host, memory("parameters", 1).states) == (20 * n, 0)
    assert "of the machine's memory besides" in str(memory("optimizer", 1))
    with pytest.raises(ConfigError, match=r"offload parameters needs learner\.zero_stage 3, got 2"):
        load_config("quickstart", [*NEW, "learner.offload=parameters", "learner.zero_stage=2"])


def test_layers_that_are_computed_again_keep_their_input_alone():
    shape = ModelShape.of(load_config("quickstart", [*NEW, "model.new.num_layers=4"]), None, TOKENIZER)

    def saved(which, layers=None):
        return shape.saved_bytes("float32", checkpointing=which, layers=layers)

    layer = saved(False) // 4
    assert saved(True) == saved(4) == saved(9) == 4 * 4 * shape.width + layer
    assert saved(1) == 3 * layer + 4 * shape.width
    assert saved(1, layers=2) == layer + 4 * shape.width, "frozen layers save nothing"
    assert saved(False, layers=2) == 2 * layer


def test_frozen_layers_have_no_states_and_save_nothing():
    shape = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)
    config = load_config("quickstart", [*NEW, "model.train_layers=1"])
    whole, one = (rank_memory(c, shape, 900, frozen_embeddings=True) for c in (load_config("quickstart", NEW), config))
    assert one.activations * 3 == whole.activations
    assert shape.trained(3, frozen_embeddings=True) == shape.trained(None, frozen_embeddings=True)
    assert whole.states - one.states == pytest.approx(16 * (shape.parameters - 2 * shape.embeddings) * 2 / 3, rel=1e-6)


def test_a_micro_batch_is_no_larger_than_the_step():
    config = load_config("quickstart", [*NEW, "learner.tokens_per_microbatch=1000", "learner.logprob_chunk_tokens=300"])
    shape = ModelShape.of(config, None, TOKENIZER)
    small, full = (rank_memory(config, shape, tokens, frozen_embeddings=False) for tokens in (500, 50_000))
    assert full.activations == 2 * small.activations
    assert small.logits == full.logits == 4 * shape.rows * 300
    assert str(full).startswith(f"about {full.total / 2**20:.0f} MiB: 9 weights, 9 gradients, 26 optimizer, ")
    assert in_parts(3 * 2**30, {"weights": 2 * 2**30, "logits": 2**20}) == "about 3.0 GiB: 2.0 weights"
    assert machine_bytes() > 2**28


def test_a_pretrained_model_of_135m_needs_what_was_measured():
    """SmolLM2-135M: 1.28 MiB of saved activations a token in float32 (its own forward pass, 2026-11-28)."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9}
    config = load_config("quickstart", [f"model.new.{key}={value}" for key, value in sizes.items()])
    shape = ModelShape.of(config, None, TOKENIZER)
    assert shape.saved_bytes("float32", checkpointing=False) / 2**20 == pytest.approx(1.28, rel=0.1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [None, 1])
def test_lora_has_gradients_and_states_for_its_factors_alone(architecture, layers):
    config = load_config("quickstart", [*NEW, f"model.new.architecture={architecture}", "learner.zero_stage=1"])
    shape = ModelShape.of(config, None, TOKENIZER)
    settings = LoRAConfig(rank=4)
    model = make_model(config.model.new, TOKENIZER, 0)
    add_lora(model, settings, seed=0, trained_layers=layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.factors(settings, layers) == trained
    found = rank_memory(config, shape, 1000, frozen_embeddings=False, lora=settings)
    if layers is None:
        assert found.states == 4 * (shape.parameters + trained) + 16 * trained
    assert shape.factors(LoRAConfig(rank=4, targets=["none"]), layers) == 0


def test_the_initial_model_is_counted_with_a_kl_term_and_a_long_row_is_never_split():
    config = load_config("quickstart", [*NEW, "learner.tokens_per_microbatch=100", "learner.zero_stage=3"])
    shape = ModelShape.of(config, None, TOKENIZER)
    with_kl = rank_memory(config, shape, 4000, frozen_embeddings=True, reference=True)
    without = rank_memory(config, shape, 4000, frozen_embeddings=True)
    assert with_kl.total - without.total == 4 * shape.parameters

    def initial(stage: int) -> int:
        keys = ["learner.ranks=2", f"learner.zero_stage={stage}"]
        return rank_memory(
            load_config("quickstart", [*NEW, *keys]), shape, 4000, frozen_embeddings=True, reference=True
        ).reference

    assert (initial(2), initial(3)) == (4 * shape.parameters, 2 * shape.parameters), "ZeRO-3 shares it too"
    long = rank_memory(config, shape, 4000, frozen_embeddings=True, longest=300)
    assert long.activations == 3 * without.activations


def test_a_worker_holds_weights_and_the_keys_and_values_of_its_samples():
    config = load_config("quickstart", [*NEW, "rollout.max_rows=8"])
    shape = ModelShape.of(config, None, TOKENIZER)
    longest = max(t.max_prompt_tokens + t.max_response_tokens for t in (*config.tasks, *config.evaluation.tasks))
    memory = worker_memory(config, shape)
    assert memory.weights == 4 * shape.parameters
    assert memory.kept == 8 * longest * 2 * 3 * 256 * 4, "keys and values of three layers of width 256, in float32"


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("DJCheng/Qwen2.5-Math-7B-Latent-SFT-4k-Top10", 7_615_616_512),
        ("DJCheng/LLaMA3.2-1B-Instruct-Latent-SFT-Top10", 1_235_814_400),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("Qwen/Qwen2.5-Math-72B", None),
    ],
)
def test_the_papers_models_are_known_by_name(path, parameters):
    found = ModelShape.published(path)
    assert (None if found is None else found[1].parameters) == parameters


def test_the_peak_is_a_micro_batch_or_the_optimizers_step_and_a_checkpoint_comes_on_top():
    keys = [*NEW, "learner.tokens_per_microbatch=8", "learner.ranks=2"]
    shape = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)

    def memory(*changes: str):
        config = load_config("quickstart", [*keys, "checkpoint.background=false", *changes])
        return rank_memory(config, shape, 8, frozen_embeddings=False)

    n = shape.parameters
    for stage, gradients in ((0, 0), (1, 2 * n), (2, 2 * n), (3, 0)):
        found = memory(f"learner.zero_stage={stage}")
        assert found.update == gradients, "ZeRO-1 and 2 put the gradients of a rank's share in a row"
        assert found.gathered == (4 * n if stage == 3 else 0), "ZeRO-3 keeps what it has gathered, up to a limit"
        batch = found.activations + found.logits + found.output_gradient + found.bucket + found.gathered
        assert found.total == found.states + max(batch, found.update)
    assert memory("checkpoint.background=true").total - memory().total == 12 * n // 2
    assert "copy of the state (checkpoint.background)" in str(memory("checkpoint.background=true"))
    on_gpus = memory("checkpoint.background=true", "learner.resources.num_gpus=1", "deterministic=false")
    assert (on_gpus.checkpoint, on_gpus.host) == (0, 12 * n // 2), "it is in the machine's memory"


def rank_of(*changes: str, shape: ModelShape | None = None, latent_sft: bool = False, **options):
    config = load_config("quickstart", [*NEW, "deterministic=false", *changes])
    shape = shape or ModelShape.of(config, None, TOKENIZER)
    return rank_memory(config, shape, 8000, frozen_embeddings=False, latent_sft=latent_sft, **options)


def test_latent_sft_writes_its_checkpoints_between_its_steps():
    assert rank_of("checkpoint.background=true").checkpoint > 0
    assert rank_of("checkpoint.background=true", latent_sft=True).checkpoint == 0
    on_gpu = ["checkpoint.background=true", "learner.resources.num_gpus=1"]
    assert rank_of(*on_gpu).host > 0
    assert rank_of(*on_gpu, latent_sft=True).host == 0


def test_latent_sft_has_three_copies_of_the_logits_of_a_call_and_the_encoder_of_induced_labels():
    shape = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)
    row = 4 * shape.rows
    assert rank_of("learner.logprob_chunk_tokens=100").logits == 100 * row
    assert rank_of("learner.logprob_chunk_tokens=100", latent_sft=True).logits == 3 * 100 * row
    large = replace(shape, rows=150_000)
    assert rank_of("learner.zero_stage=3", shape=large).logits == 4 * 150_000 * chunk_size(LearnerConfig(), 150_000)
    assert rank_of("learner.zero_stage=3", shape=large, latent_sft=True).logits == 3 * 4 * 150_000 * 2048

    induced = ["warm_start.source=induced"]
    with_encoder, without = rank_of(*induced, latent_sft=True), rank_of(latent_sft=True)
    assert with_encoder.total - without.total == 4 * shape.parameters, "in float32, and whole"
    assert rank_of(*induced, "learner.zero_stage=3", "learner.ranks=2", latent_sft=True).encoder == 4 * shape.parameters
    assert rank_of(*induced).encoder == 0, "RL has no encoder"
    assert "encoder (warm_start.source)" in str(with_encoder)


def test_zero_3_gathers_a_parameter_whole_that_is_larger_than_its_limit():
    small = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)
    assert small.largest == 256 * 640, "of a layer's MLP; the vocabulary is small"
    large = replace(small, parameters=900_000_000, largest=500_000_000)
    keys = ["learner.zero_stage=3", "learner.ranks=2", "model.dtype=bfloat16"]
    assert rank_of(*keys, shape=large).gathered == 2 * 500_000_000
    assert rank_of(*keys, shape=replace(large, largest=1)).gathered == 2 * 100_000_000


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 6)])
def test_a_trained_output_layer_has_a_gradient_in_float32_that_is_cast(dtype, bytes_each):
    keys = [f"model.dtype={dtype}", "learner.logprob_chunk_tokens=1"]
    shape = ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER)
    weights = shape.rows * shape.width
    assert not shape.tied
    assert rank_of(*keys).output_gradient == bytes_each * weights
    assert rank_of(*keys, shape=replace(shape, tied=True)).output_gradient == bytes_each * weights
    assert rank_of(*keys, lora=LoRAConfig(rank=4)).output_gradient == 0
    assert rank_of(*keys, "model.train_layers=1", shape=replace(shape, tied=True)).output_gradient == 0
    sft, own = rank_of(*keys, latent_sft=True), 4 if dtype == "float32" else 2
    chunk = 4 * shape.rows
    assert sft.logits + sft.output_gradient == chunk + 3 * own * weights, "autograd's sum over the chunks"
    frozen = rank_memory(load_config("quickstart", keys), replace(shape, tied=True), 8000, frozen_embeddings=True)
    assert frozen.output_gradient == 0


@pytest.mark.parametrize(
    ("stage", "dtype", "buffers", "size"),
    [
        (0, "float32", 0, 4),
        (1, "float32", 2, 4),
        (1, "bfloat16", 2, 4),
        (2, "bfloat16", 2, 2),
        (3, "float32", 1, 4),
        (3, "bfloat16", 1, 2),
    ],
)
def test_the_bucket_of_gradients_is_there_twice_to_overlap_but_with_zero_3(stage, dtype, buffers, size):
    keys = [f"learner.zero_stage={stage}", f"model.dtype={dtype}", "learner.bucket_elements=1000", "learner.ranks=2"]
    keys.append("learner.resources.num_gpus=1")
    assert rank_of(*keys, "learner.overlap_communication=true").bucket == buffers * 1000 * size
    assert rank_of(*keys, "learner.overlap_communication=false").bucket == min(buffers, 1) * 1000 * size


def test_the_initial_model_goes_where_the_parameters_go():
    keys = ["learner.zero_stage=3", "learner.resources.num_gpus=1", "checkpoint.background=false"]
    for offload, on_host in (("optimizer", 0), ("parameters", 1)):
        without, with_kl = (rank_of(*keys, f"learner.offload={offload}", reference=kl) for kl in (False, True))
        size = 4 * ModelShape.of(load_config("quickstart", NEW), None, TOKENIZER).parameters
        assert with_kl.reference == size * (1 - on_host)
        assert with_kl.host - without.host == size * on_host
