"""`bench memory` runs real ranks; how close a prediction is shows at the size of a real model alone."""

import multiprocessing

import pytest
from rich.console import Console

from latent_grpo.common.errors import RunError
from latent_grpo.deploy.bench.memory import CASES, Case, measure, settings, show
from latent_grpo.deploy.bench.own_process import side_by_side


def test_every_case_is_a_run_that_can_be(tmp_path):
    assert [settings(str(tmp_path), keys).group_size for keys in CASES.values()] == [4] * len(CASES)


def test_the_table_has_the_ratio():
    console = Console(record=True, width=120)
    show([Case(name="float32", predicted_mib=90.0, measured_mib=100.0)], console)
    assert "0.90" in console.export_text()


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", RunError, "a measured process was killed"),
        ("raise ValueError('this one')", ValueError, "this one"),
    ],
)
def test_a_rank_that_fails_ends_the_ranks_that_wait_for_it(fault, error, message):
    before = set(multiprocessing.active_children())
    with pytest.raises(error, match=message):
        side_by_side(exec, [("import time; time.sleep(3600)",), (fault,)])
    assert set(multiprocessing.active_children()) == before


def test_the_results_of_processes_come_in_the_order_of_their_calls():
    assert side_by_side(divmod, [(7, 2), (9, 4)]) == [(3, 1), (2, 1)]


@pytest.mark.slow
def test_a_rank_is_measured_in_a_process_of_its_own():
    sizes = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 8192}
    (case,) = measure(["float32"], sizes)
    assert 0.5 < case.ratio < 2.0
