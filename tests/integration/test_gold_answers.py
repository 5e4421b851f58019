"""Gold answers of the benchmark files: each grades correct against itself in its usual spellings; traps are named."""

from __future__ import annotations

import pytest
from benchmark_files import DATA, MISSING

from latent_grpo.common.config import TaskConfig
from latent_grpo.common.tasks.sources import StoredTask, load_task
from latent_grpo.deploy.grading.answer_file import read_answers
from latent_grpo.deploy.grading.gold_check import check_golds
from latent_grpo.deploy.run.findings import notes
from latent_grpo.reward.answers import grade
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import load_verifier

pytestmark = pytest.mark.integration

NUMBER = (
    "gsm8k_train", "gsm8k_test", "gsm8k_aug_train_noaug", "gsm8k_aug_valid", "gsm8k_aug_test", "gsm_hard", "svamp",
    "multiarith", "multiarith_test180",
)  # fmt: skip
MATH = ("math500", "math_train", "aime_1983_2023_train", "aime2024", "aime2025")
MISLABELLED = {"svamp": [679], "gsm8k_test": [1309], "gsm8k_aug_test": [1309]}
UNREADABLE = {"math_train": [886]}  # gold "None"; row 1008 has the same. Both problems have answers, 2 and 9
EVERY = {"math_train": 5}  # in `make test`; all of them in `make test-all`


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(processes=2) as pool:
        yield pool


def rows_of(name: str):
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path.name}: {MISSING}")
    return read_answers(path, golds_only=True).rows


def check(pool: VerifierPool, name: str, rows, repeated: int) -> None:
    report = check_golds(rows, "number" if name in NUMBER else "math", pool)
    lost = {row.number for row in rows} & set(UNREADABLE.get(name, []))
    assert [issue.row for issue in report.unreadable] == sorted(lost)
    assert report.refused == []
    assert [issue.row for issue in report.mislabelled] == MISLABELLED.get(name, [])
    assert report.contradictory == []
    assert report.repeated == repeated


@pytest.mark.parametrize("name", [*NUMBER, *MATH])
def test_golds_grade_correct_against_themselves_and_mislabelled_rows_are_listed(pool, name):
    check(pool, name, rows_of(name)[:: EVERY.get(name, 1)], {"multiarith": 20, "multiarith_test180": 2}.get(name, 0))


@pytest.mark.slow
def test_every_gold_of_the_large_file_too(pool):
    check(pool, "math_train", rows_of("math_train"), repeated=2)


def test_tiny_golds_are_not_zero_and_leading_zeros_are_no_difference():
    tiny = [row.gold for row in rows_of("gsm_hard") if 0 < abs(float(row.gold)) < 1e-6]
    assert len(tiny) == 2
    assert [grade("number", r"\boxed{0}", gold).reason for gold in tiny] == ["wrong", "wrong"]
    assert grade("number", r"\boxed{025}", "25").reason == grade("math", r"\boxed{025}", "25").reason == "correct"


def stored(name: str) -> StoredTask:
    rows_of(name)
    return load_task(TaskConfig(name=name, path=str(DATA / f"{name}.parquet")), 0)


def test_problems_in_two_files_and_their_differing_answers_are_told():
    (gsm8k_fault, line) = notes([stored("gsm8k_test")], [stored("gsm_hard")], load_verifier)
    assert (
        gsm8k_fault
        == "gsm8k_test: 1 row is known to be mislabelled, kept as published: row 1309, answer 2280, right 2180"
    )
    assert line.startswith("gsm8k_test and gsm_hard share 329 problems, 1 of them")
    assert "row 1309: 2280, row 1318: 2180" in line
    (line,) = notes([stored("math_train"), stored("aime_1983_2023_train")], [], load_verifier)
    assert line.startswith("math_train and aime_1983_2023_train share 316 problems, 2 of them")
