"""Decode steps as graphs: when they are captured, repeated and dropped. What they draw is in tests/contracts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from step_recorder import StepRecorder

from latent_grpo.common.config import load_config
from latent_grpo.common.errors import ConfigError
from latent_grpo.rollout_workers.decoding import COLUMNS, ROW
from latent_grpo.rollout_workers.requests import Rows, on_device
from latent_grpo.rollout_workers.step_graphs import MOST_GRAPHS, StepGraphs

D = 3
LAYOUTS = (object(), object())


def rows_of(size: int, **settings: float) -> Rows:
    host = np.zeros(size, dtype=ROW)
    for name, value in ({"temperature": 1.0, "k": 2, "latent": 1} | settings).items():
        host[name] = value
    host["key"] = np.arange(size)
    return Rows(host, on_device(host, torch.device("cpu")), torch.arange(size) + 10)


class Engine:
    """A step that adds up all that it is given, and says how often its Python ran."""

    def __init__(self, max_rows: int = 64, most: int = MOST_GRAPHS):
        self.recorder, self.calls, self.columns = StepRecorder(), 0, []
        self.graphs = StepGraphs(self.step, self.recorder, max_rows=max_rows, most=most)

    def step(self, inputs, positions, complete, rows, columns):
        self.calls += 1
        self.columns.append(columns)
        assert rows.every_row
        total = positions + rows.slot + rows.column("key") + complete
        return inputs + total.unsqueeze(-1), total

    def take(self, count, rows, position=5, layouts=LAYOUTS, capacity=1000):
        size = len(rows.host)
        inputs = torch.arange(float(count * D)).view(count, D)
        positions, complete = np.full(size, position), np.arange(size) < count
        following, codes = self.graphs.take(inputs, positions, complete, rows, capacity, layouts)
        expected = torch.arange(count) * 2 + 10 + position + 1
        assert torch.equal(codes, expected)
        assert torch.equal(following, inputs + expected.unsqueeze(-1))


def test_a_step_with_the_same_decisions_is_repeated_on_other_values() -> None:
    engine = Engine()
    engine.take(5, rows_of(8))
    engine.take(7, rows_of(8), position=6)
    engine.take(8, rows_of(8, key=3), position=90)
    assert (engine.recorder.captured, engine.recorder.replayed, engine.calls) == (1, 2, 2)


@pytest.mark.parametrize(
    "other",
    [{"temperature": 0.7}, {"k": 3}, {"latent": 0}, {"noisy": 1}, {"top_p": 0.5}, {"top_k": 9}, {"one_sided": 1}],
    ids=str,
)
def test_other_decisions_are_another_graph(other: dict[str, float]) -> None:
    engine = Engine()
    for rows in (rows_of(8), rows_of(8, **other), rows_of(8)):
        engine.take(8, rows)
    assert (engine.recorder.captured, engine.recorder.replayed) == (2, 1)


def test_every_setting_is_a_decision_or_read_on_the_device() -> None:
    """A new column of a row belongs to `Rows.decisions`, unless no code on the host decides by it."""
    on_the_device = {"prompt_len", "key", "budget", "careful"}  # the engine takes no careful step as a graph
    plain = rows_of(4)
    for name in {name for name, _ in COLUMNS} - on_the_device:
        other = rows_of(4, **{name: 1 - plain.host[name][0] or 3})
        assert other.decisions != plain.decisions, name


def test_columns_are_a_power_of_two_within_the_cache() -> None:
    engine = Engine()
    for position, columns in ((5, 128), (127, 128), (128, 256), (600, 700)):
        engine.take(8, rows_of(8), position=position, capacity=700)
        assert engine.columns[-1] == columns


def test_rows_are_a_power_of_two_within_the_engine() -> None:
    graphs = Engine(max_rows=40).graphs
    assert [graphs.rows(count) for count in (1, 8, 9, 32, 33, 40)] == [8, 8, 16, 32, 40, 40]


def test_memory_that_has_moved_is_captured_again() -> None:
    engine, rows = Engine(), rows_of(8)
    for layouts in (LAYOUTS, (LAYOUTS[0], object()), LAYOUTS):
        engine.take(8, rows, layouts=layouts)
    assert (engine.recorder.captured, engine.recorder.replayed) == (3, 0)


def test_there_is_a_limit_to_graphs() -> None:
    engine = Engine(most=2)
    for top_k in (1, 2, 1, 3, 1, 2):  # the third takes the place of the second, which was not used for longer
        engine.take(8, rows_of(8, top_k=top_k))
    assert (engine.recorder.captured, engine.recorder.replayed) == (4, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.resources.num_gpus=0", "a GPU for each rollout worker; set rollout.resources.num_gpus"),
        ("rollout.device=cpu", "rollout.device auto or cuda, got cpu"),
        ("deterministic=true", "deterministic: false"),
        ("rollout.engine=vllm", "vLLM captures its own"),
        ("rollout.engine=auto", "vLLM captures its own"),
    ],
)
def test_graphs_where_there_can_be_none_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", ["rollout.compile=on", "rollout.resources.num_gpus=1", override])
