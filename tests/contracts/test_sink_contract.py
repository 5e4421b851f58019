"""The contract of metric sinks, on every built-in one and on a user's; and sinks that cannot be used."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from latent_grpo.common import sinks as registry
from latent_grpo.common.errors import MetricsError
from latent_grpo.common.sinks import make_sink
from latent_grpo.common.testing import check_sink

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "console": None, "mlflow": "mlflow", "prometheus": None, "tensorboard": "tensorboard", "trackio": None,
    "wandb": None,
}  # fmt: skip


@pytest.fixture
def stand_ins(stand_in):
    """For packages that would talk to a server or write outside of the test: wandb, Trackio, and Ray's metrics."""
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=lambda row: None, finish=lambda: None)
    trackio = SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    stand_in("trackio", SimpleNamespace(init=lambda **options: trackio))
    stand_in("wandb", SimpleNamespace(init=lambda **options: run))
    gauge = SimpleNamespace(set=lambda value, tags: None)
    stand_in("ray.util.metrics", SimpleNamespace(Gauge=lambda *a, **k: gauge))


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_built_in_sinks_keep_the_contract(name, stand_ins, tmp_path):
    if NEEDS[name] and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs the package {NEEDS[name]}")
    check_sink(name, tmp_path)


def test_every_registered_sink_is_here():
    sinks = registry._SINKS  # a public list of names would not say which are a user's
    built_in = {name for name, factory in sinks.items() if factory.__module__ == registry.__name__}
    assert set(NEEDS) == built_in


def test_the_example_keeps_the_contract_and_what_a_resume_finds(importable, tmp_path):
    importable(EXAMPLES / "own_sink")
    check_sink("csv_sink:CsvSink", tmp_path)
    header, *rows = csv.reader((tmp_path / "curve.csv").open())
    assert header[:2] == ["step", "rollout/reward"]
    assert [(row[0], row[1]) for row in rows] == [(step, "0.25") for step in "12334"]


# --- those that cannot be used


class Grumpy:
    def __init__(self, run_folder):
        raise OSError("no room")


class Silent:
    def __init__(self, run_folder):
        pass

    def close(self):
        pass


class Greedy:
    """Keeps the first names that it sees, and changes what it is given."""

    def __init__(self, run_folder):
        pass

    def write(self, step, values):
        values.pop("learner/loss", None)

    def close(self):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_sink_contract:Grumpy", "cannot be made with the run's folder: OSError: no room"),
        ("test_sink_contract:Silent", r"made a Silent, which lacks write\(step, values\) or close\(\)"),
        ("test_sink_contract:Nothing", "has no attribute 'Nothing'"),
        ("no_such_module:Sink", "module 'no_such_module' cannot be imported"),
        ("common.metrics:ConsoleSink", "of version 0.1.0 is 'latent_grpo.common.sinks:ConsoleSink' now"),
    ],
)
def test_a_sink_that_cannot_be_used_is_refused_in_a_sentence(name, message, tmp_path):
    with pytest.raises(MetricsError, match=f"metric sink '{name}'.*{message}"):
        make_sink(name, tmp_path)


def test_the_contract_finds_a_sink_that_changes_what_others_are_to_see(tmp_path):
    with pytest.raises(AssertionError, match="changed the values"):
        check_sink("test_sink_contract:Greedy", tmp_path)
