"""Skip rules and the one local Ray that tests share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":  # `make test-vllm-v2`: the interpreter stands in for Triton's CPU backend
    import types

    import triton.backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends.setdefault("cpu", types.SimpleNamespace(driver=driver, compiler=None))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts jobs in the background so; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # its processes have a terminal of 80 columns that nobody looks at
    os.environ.pop("COLUMNS", None)
    os.environ.pop("LINES", None)

INTEGRATION_S = 1200  # of one test: processes, models and Ray start slowly on a busy machine
LONG_S, TOGETHER_S = 60.0, 540.0  # of one test that is not marked slow, and of all of them
RAY_CPUS = 4  # logical: more actors than the machine has cores may run side by side


def pytest_collection_modifyitems(items):
    missing = {}
    wanted = any(item.get_closest_marker("gpu") for item in items)
    if wanted and os.environ.get("LATENT_GRPO_GPU_TESTS_ON") != "cpu" and not _has_cuda():
        missing["gpu"] = "needs CUDA; torch sees no GPU (LATENT_GRPO_GPU_TESTS_ON=cpu tries what a CPU can)"
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "needs vLLM: make vllm (CPU), or pip install '.[vllm]' (CUDA)"
    for item in items:
        if item.get_closest_marker("integration") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(INTEGRATION_S))
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    """Names what would make `make test` too long. A hint and no failure: a busy machine is several times slower."""
    ran = [report for report in terminalreporter.getreports("passed") if "slow" not in report.keywords]
    long = [f"{report.duration:.0f} s {report.nodeid}" for report in ran if report.duration > LONG_S]
    if long or sum(report.duration for report in ran) > TOGETHER_S:
        terminalreporter.section("make test should stay below ten minutes: mark as slow what a quicker test covers")
        for line in long:
            terminalreporter.write_line(line)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`importable(folder)`: what is in it can be imported until the test ends."""
    return lambda folder: monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    """`stand_in(name, module)`: what is imported as `name` until the test ends; None: it is not installed."""
    return lambda name, module: monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="session")
def ray_session():
    """A private local Ray: own home (for the authentication token), own folder, free ports, gone afterwards."""
    import ray

    home = tempfile.mkdtemp(prefix="lgt-")  # short: Unix socket paths end at 107 bytes
    path = os.pathsep.join([str(Path(__file__).parent / "integration"), os.environ.get("PYTHONPATH", "")])
    changed = {"HOME": home, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": None, "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in changed}
    _set_environment(changed)
    try:
        ray.init(
            address="local",  # never an address that a Ray of somebody else has left on this machine
            num_cpus=RAY_CPUS,
            num_gpus=1 if _has_cuda() else 0,
            include_dashboard=False,
            object_store_memory=256 * 2**20,
            log_to_driver=True,
            logging_level="warning",
            _temp_dir=os.path.join(home, "r"),
            _system_config={"metrics_report_interval_ms": 1000},  # else a test of metrics waits ten seconds for each
        )
        yield ray
    finally:
        ray.shutdown()
        _set_environment(before)
        shutil.rmtree(home, ignore_errors=True)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory) -> Path:
    """The folder of a model as a run leaves it, with its chain file; its weights are random."""
    from latent_grpo.common.config import load_config
    from latent_grpo.common.model_chain import exported_chain, write_chain
    from latent_grpo.common.models import make_model, make_tokenizer, save_model

    config = load_config("quickstart", ["model.new.hidden_size=64", "model.new.num_heads=2"])
    tokenizer = make_tokenizer(config.model.new)
    path = tmp_path_factory.mktemp("trained") / "m"
    save_model(path, make_model(config.model.new, tokenizer, 0), tokenizer)
    write_chain(path, exported_chain(config, tokenizer))
    return path
