"""Named benchmarks: their files, GPQA from the user's own copy, and files that would give figures of something else."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import DATA, MISSING

from latent_grpo.common.config import ConfigError, TaskConfig, load_config
from latent_grpo.common.config.problems_and_model import BENCHMARK_DEFAULTS
from latent_grpo.common.tasks import gpqa
from latent_grpo.common.tasks.benchmarks import BENCHMARKS, benchmark_tasks
from latent_grpo.common.tasks.cells import cell_text
from latent_grpo.common.tasks.sources import TaskError, load_task
from latent_grpo.common.tasks.tables import KNOWN
from latent_grpo.deploy.run.preparation import file_faults
from latent_grpo.deploy.run.problems import Sources, read_task
from latent_grpo.reward.answers import gold_is_parsable

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "Question": "What is heavier?",
    "Correct Answer": "lead",
    "Incorrect Answer 1": "a feather, or two",
    "Incorrect Answer 2": "air",
    "Incorrect Answer 3": "nothing",
}


def write_gpqa(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, [*ROW, "Record ID"])
        writer.writeheader()
        writer.writerows({**row, "Record ID": "x"} for row in rows)


def test_every_name_is_found_in_the_folder_and_an_unknown_one_is_named(tmp_path):
    for benchmark in BENCHMARKS.values():
        (tmp_path / benchmark.files[0]).touch()
    tasks = benchmark_tasks([*BENCHMARKS, "svamp"], tmp_path)
    assert [task.name for task in tasks] == list(BENCHMARKS)
    assert tasks[2].path == str(tmp_path / "svamp.parquet")
    with pytest.raises(ConfigError, match=r"unknown benchmark\(s\) gsm9k; known are gsm8k-aug, gsm-hard"):
        benchmark_tasks(["gsm9k", "svamp"], tmp_path)


def test_a_missing_file_says_where_it_was_looked_for_and_gpqa_how_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match=r"no svamp\.parquet or svamp\.jsonl or .* in .*github\.com/arkilpatel/SVAMP"):
        benchmark_tasks(["svamp"], tmp_path)
    how = r"its authors ask.*huggingface\.co/datasets/Idavidrein/gpqa.*put it into the data folder as it is"
    with pytest.raises(ConfigError, match=rf"no gpqa_diamond\.csv or .*{how}"):
        benchmark_tasks(["gpqa"], tmp_path)
    with pytest.raises(TaskError, match=how):
        load_task(TaskConfig(name="gpqa", path=str(tmp_path / "mine.csv")), 0)


def test_gpqas_raw_columns_are_preferred_to_whole_prompts(tmp_path):
    for name in ("GPQA-test.parquet", "GPQA-test.jsonl", "Math-500-test.parquet", "Math-500-test.jsonl"):
        (tmp_path / name).touch()
    found = [Path(str(task.path)).name for task in benchmark_tasks(["gpqa", "math500"], tmp_path)]
    assert found == ["GPQA-test.jsonl", "Math-500-test.parquet"]


def test_a_profiles_missing_files_are_one_command_and_name_the_authors(tmp_path):
    config = load_config("paper-low")
    tasks = [task.model_copy(update={"path": f"nowhere/{Path(str(task.path)).name}"}) for task in config.tasks]
    tests = [t.model_copy(update={"path": f"nowhere/{Path(str(t.path)).name}"}) for t in config.evaluation.tasks]
    evaluation = config.evaluation.model_copy(update={"tasks": tests})
    command, *faults = file_faults(config.model_copy(update={"tasks": tasks, "evaluation": evaluation}))
    assert command == ("latent-grpo data fetch gsm8k-aug-oss-dup-all gsm8k-aug gsm-hard svamp multiarith --to nowhere")
    assert len(faults) == len(tasks) + len(tests)
    (svamp,) = [fault for fault in faults if fault.startswith("task svamp: ")]
    assert svamp == (
        "task svamp: nowhere/svamp.parquet does not exist (nor, beside it, svamp.jsonl, Svamp-test.parquet, "
        f"Svamp-test.jsonl); set its `path` to {KNOWN}. A .parquet or .jsonl file with the "
        "columns problem and answer is expected (published at https://github.com/arkilpatel/SVAMP)"
    )


def test_the_page_has_every_benchmark_with_both_names_of_its_file():
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)`.* \| `(\S+)` \| (\w+) \| ([\d,]+) / ([\d,]+) \| ([\d,]+) \|$",
                      (ROOT / "docs" / "evaluate.md").read_text(), re.MULTILINE)  # fmt: skip
    assert rows == [
        (name, known.files[0], known.authors_stem, default["verifier"], f"{default['max_prompt_tokens']:,}",
         f"{default['max_response_tokens']:,}", f"{known.problems:,}")
        for name, known in BENCHMARKS.items() if (default := BENCHMARK_DEFAULTS[name])
    ]  # fmt: skip


def test_the_authors_page_evaluates_what_it_has_fetched():
    """GPQA is none of the hub's: a command without a word about its file would be refused."""
    page = (ROOT / "docs" / "authors.md").read_text()
    fetched = {
        name for line in re.findall(r"data fetch ([^#\n]*)", page) if "--from" not in line for name in line.split()
    }
    asked = [line for line in page.splitlines() if re.match(r" +--tasks ", line)]
    assert len(asked) == 3
    for line in asked:
        names = set(line.split("--tasks ")[1].split()[0].split(","))
        assert names - fetched == ({"gpqa"} if "leave gpqa out without its file" in line else set())


def gsm8k_files(folder):
    """Overrides: the files of the profiles in this folder."""
    return [f"tasks.0.path={folder}/gsm8k_train.parquet", f"evaluation.tasks.0.path={folder}/gsm8k_test.parquet"]


@pytest.mark.parametrize("profile", ["gsm8k-small", "gsm8k-scratch"])
def test_a_missing_gsm8k_file_says_its_columns_and_where_to_read_how_it_is_made(tmp_path, profile):
    train, test = file_faults(load_config(profile, gsm8k_files(tmp_path)))
    assert "gsm8k_train.parquet does not exist" in train
    assert "the columns problem, answer and cot (`<<48/2=24>> <<48+24=72>>`)" in train
    assert "gsm8k_test.parquet does not exist" in test
    assert "the columns problem and answer is expected" in test
    for fault in (train, test):
        assert "docs/latent_sft.md says how to make it from the text" in fault


def test_gsm8k_files_made_as_the_page_says_are_what_the_profiles_read(tmp_path):
    (tmp_path / "train.txt").write_text("Half of 48?||<<48/2=24>> <<48+24=72>> #### 72\n\u2028 6+1||<<6+1=7>> #### 7\n")
    (tmp_path / "test.txt").write_text("1+1?||<<1+1=2>> #### 2")
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "latent_sft.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    config = load_config("gsm8k-scratch")
    paths = [task.path for task in (*config.tasks, *config.evaluation.tasks)]
    assert paths == ["data/gsm8k_train.parquet", "data/gsm8k_test.parquet"]
    config = load_config("gsm8k-scratch", gsm8k_files(tmp_path / "data"))
    training, evaluation = (read_task(t, config, whole=True) for t in (config.tasks[0], config.evaluation.tasks[0]))
    assert (training.size, training.dropped, evaluation.size) == (2, {}, 1)
    problem = training.problem(0)
    assert (problem.messages[0][1], problem.cot) == ("Half of 48?", "<<48/2=24>> <<48+24=72>>")
    assert [training.problem(0).answer, training.problem(1).answer, evaluation.problem(0).answer] == ["72", "7", "2"]


# --- GPQA


def test_gpqa_is_read_as_its_authors_publish_it(tmp_path):
    write_gpqa(tmp_path / "gpqa_diamond.csv", [ROW] * 40)
    (task,) = benchmark_tasks(["gpqa"], tmp_path)
    source = load_task(task, 0, lambda gold: gold_is_parsable("choice", gold))
    problems = [source.problem(i) for i in range(40)]
    assert (source.size, source.dropped, source.config.verifier) == (40, {}, "choice")
    for problem in problems:
        text = problem.messages[0][1]
        assert text.startswith("What is heavier?\n\nA. ")
        assert f"\n{problem.answer}. lead" in text
        assert sorted(line[3:] for line in text.splitlines()[2:]) == sorted(
            v for k, v in ROW.items() if k != "Question"
        )
    assert {p.answer for p in problems} == set("ABCD")  # the position of the right answer says nothing
    again = load_task(task, seed=99)
    assert [again.problem(i).messages for i in range(40)] == [p.messages for p in problems]


@pytest.mark.parametrize("missing", [None, float("nan"), " "])
def test_gpqa_row_without_an_answer_has_no_letter(missing):
    assert gpqa.with_letters(0, {**ROW, "Incorrect Answer 2": missing}) == ("What is heavier?", "")


def test_a_csv_that_is_none_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('problem,answer\n"1+1?",2\nand so on, and on,3\n')
    with pytest.raises(TaskError, match=r"row 1 has more or fewer cells than the header"):
        load_task(TaskConfig(name="t", path=str(path)), 0)
    path.write_text("problem,answer\n1+1?,2\n")
    assert load_task(TaskConfig(name="t", path=str(path)), 0).problem(0).answer == "2"


# --- whole files only


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("svamp", ["1", "", "3", None], r"2 empty answer \(rows 1, 3\)"),
        ("svamp", [1.0, NAN, 3.0], r"1 empty answer \(row 1\)"),
        ("svamp", ["1", "two apples", "3", "nan"], r"2 unreadable gold answer \(rows 1, 3\)"),
        ("aime2024", ["1", "", "3", None], r"2 empty answer \(rows 1, 3\)"),
        ("aime2024", [1.0, NAN, 3.0], r"1 empty answer \(row 1\)"),
        ("aime2024", ["1", "NaN", "None", "null", "N/A"], r"4 unreadable gold answer \(rows 1, 2, 3, 4\)"),
        ("gpqa", ["A", "", "C", None], r"2 empty answer \(rows 1, 3\)"),
        ("gpqa", ["A", "nan", "None"], r"2 unreadable gold answer \(rows 1, 2\)"),
    ],
)
def test_a_benchmark_file_with_missing_answers_is_refused(tmp_path, name, answers, message):
    """Whatever the file writes for a missing answer, and whichever verifier reads it: number, math, choice."""
    path = tmp_path / f"{name}.parquet"
    pq.write_table(pa.table({"problem": ["1+1?"] * len(answers), "answer": answers}), path)
    task = TaskConfig(name=name, path=str(path))
    config = load_config("quickstart")
    evaluation = config.evaluation.model_copy(update={"tasks": [task]})
    with pytest.raises(TaskError, match=rf"evaluation task {name}: .*{message}.*would not be this benchmark's"):
        Sources.read(config.model_copy(update={"evaluation": evaluation}))


@pytest.mark.parametrize("value", [None, NAN, np.float32("nan"), Decimal("nan"), pytest.param("NA", id="pandas")])
def test_a_missing_value_is_an_empty_text(value):
    if value == "NA":
        value = pytest.importorskip("pandas").NA
    assert cell_text(value) == ""


def test_a_value_that_is_there_is_its_text():
    assert [cell_text(value) for value in (0, 1.5, "nan", "")] == ["0", "1.5", "nan", ""]


def test_evaluation_tasks_of_the_same_name_are_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: names must be distinct"):
        load_config("quickstart", ["evaluation.tasks=[{name: a, path: x}, {name: a, path: y}]"])


@pytest.mark.skipif(not DATA.is_dir(), reason=MISSING)
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "gpqa"])
def test_every_row_of_the_published_files_can_be_graded(name):
    (task,) = benchmark_tasks([name], DATA)
    verifier = BENCHMARK_DEFAULTS[name]["verifier"]
    source = load_task(task, 0, lambda gold: gold_is_parsable(verifier, gold))
    assert (source.size, source.dropped) == (BENCHMARKS[name].problems, {})
