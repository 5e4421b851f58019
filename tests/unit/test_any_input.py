"""Whatever a user gives, a command answers in one line: no traceback, exit code 0 or 2, and nothing left behind.

Hypothesis makes configuration files, problem files, model folders and run folders that are wrong somewhere, and the
commands read them through their own entry point. The same examples each time in `make test`; others, and many more,
in the slow tests. A run's folder with one damaged file is in `test_damaged_runs.py`, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_run import fake_run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from model_folders import whole

from latent_grpo.common import __version__
from latent_grpo.common.config.reference import reference
from latent_grpo.deploy.cli.app import run_command
from latent_grpo.deploy.cli.faults import debugging, exit_code_of, unexpected

KEYS = sorted(key.name for section in reference() for key in section.keys)
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
SAMPLE = settings(
    max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=SHARED,
    phases=[Phase.generate],  # smaller examples are searched for in the slow tests
)  # fmt: skip
WHOLE = settings(max_examples=400, deadline=None, suppress_health_check=SHARED)


# --- what is given -------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
ODD_TEXT = TEXT | st.sampled_from(
    ["", " ", "~", "~/x", "/", ".", "..", "nan", "-inf", "1e999", "0x10", "012", "1:30", "null", "yes", "[", "{", "!!x",
     "&a *a", "builtin:x", "python:os:path", "os:getcwd", "hf:x/y", "s3://x/y", "a\x00b", "\ud83d\ude00", "%", "{}"]
)  # fmt: skip
NUMBERS = st.integers() | st.sampled_from([2**31, 2**63, 2**64, -1, 0, 10**30]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | ODD_TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3), max_leaves=5
)
NAMES = st.sampled_from(["problem", "answer", "question", "solution", "cot", "messages", "prompt", "images", "id"])
GRADED = st.sampled_from(["response", "gold", "answer", "problem", "reward_model", "id"])
CELLS = VALUES | st.lists(st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), VALUES), max_size=3)
ROWS = st.lists(st.dictionaries(NAMES, CELLS, max_size=4), max_size=4)
GRADED_ROWS = st.lists(st.dictionaries(GRADED, CELLS | st.just("\\boxed{7}"), max_size=4), max_size=4)


@st.composite
def profiles(draw: st.DrawFn) -> bytes:
    """A profile: keys that exist with any values upon the quickstart, or bytes that are no profile."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=60) | VALUES.map(lambda value: repr(value).encode("utf-8", "surrogatepass")))
    profile: dict[str, object] = {"extends": "quickstart"}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        node = profile
        *parents, last = key.split(".")
        for parent in parents:
            inner = node.setdefault(parent, {})
            node = inner if isinstance(inner, dict) else node
        node[last] = draw(VALUES)
    return yaml.safe_dump(profile, allow_unicode=True).encode("utf-8", "surrogatepass")


@st.composite
def problem_files(draw: st.DrawFn, rows_of: st.SearchStrategy[list] = ROWS) -> tuple[str, bytes]:
    """The name and the bytes of a file of problems, or of other rows."""
    rows, kind = draw(rows_of), draw(st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz", "bytes"]))
    if kind == "bytes":
        return draw(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])), draw(st.binary())
    if kind == "parquet":
        with contextlib.suppress(pa.ArrowException, OverflowError, ValueError):  # rows that no Parquet file can hold
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            return "a.parquet", sink.getvalue().to_pybytes()
    if kind == "csv":
        lines = [",".join(sorted({name for row in rows for name in row}))]
        lines += [",".join(str(value) for value in row.values()) for row in rows]
        return "a.csv", "\n".join(lines).encode("utf-8", "surrogatepass")
    text = json.dumps(rows) if kind == "json" else "\n".join(json.dumps(row) for row in rows)
    return f"a.{kind}", text.encode("utf-8", "surrogatepass")  # a .gz that is none, too


def broken_json(text: str, choice: random.Random, value: object) -> str:
    """Puts a value at a random place of a JSON file, or takes away what is there."""
    whole_file = json.loads(text)
    node, places = whole_file, 0
    while isinstance(node, (dict, list)) and node and places < 6:
        key = choice.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or choice.random() < 0.3:
            if choice.random() < 0.3:
                del node[key]
            else:
                node[key] = value
            break
        node, places = node[key], places + 1
    return json.dumps(whole_file)


def break_a_file(folder: Path, choice: random.Random, value: object) -> None:
    """Makes one file of a folder wrong: cut, emptied, replaced, removed, a folder, or JSON with another value."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = choice.choice(files)
    how = choice.choice(["cut", "empty", "bytes", "remove", "folder", "json", "json", "json"])
    if how == "json":
        file = choice.choice([path for path in files if path.suffix == ".json"])
        file.write_text(broken_json(file.read_text(encoding="utf-8"), choice, value), encoding="utf-8")
    elif how in ("remove", "folder"):
        file.unlink()
        if how == "folder":
            file.mkdir()
    else:
        content = file.read_bytes()
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "bytes": b"\xff\x00{" + content[3:]}[how])


# --- what must hold ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def answer_in_one_line(folder: Path, *arguments: str, codes: tuple[int, ...] = (0, 2), made: str | None = None) -> str:
    """Runs a command in a folder, and holds that it ends as it should and leaves the folder as it was.

    `made` is what it leaves where it succeeds, and is removed. Returns what it has said, in one line.
    """
    before = sorted(folder.rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    with inside(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(list(arguments))
    said = [line for line in err.getvalue().splitlines() if line.strip()]
    assert code in codes, (code, said)
    assert not any("traceback" in line.lower() for line in said), said  # nor a file with one, of an unexpected fault
    if code == 2:
        first = next((place for place, line in enumerate(said) if line.startswith("error ")), None)
        assert first is not None, said  # after what was said while it went well
        keys = said[first + 1 :]
        assert all(re.match(r"""[\w.-]+: |['"]""", line) for line in keys), f"one line a faulty key, got {said}"
    if code == 0 and made is not None:
        shutil.rmtree(folder / made) if (folder / made).is_dir() else (folder / made).unlink()
    assert sorted(folder.rglob("*")) == before, "something was left behind"
    return " ".join(f"{out.getvalue()} {err.getvalue()}".split())


def of_a_profile(folder: Path, content: bytes) -> None:
    (folder / "mine.yaml").write_bytes(content)
    answer_in_one_line(folder, "validate", "--profile", "mine.yaml")


def of_problems(folder: Path, given_file: tuple[str, bytes]) -> None:
    name, content = given_file
    file = folder / name
    file.write_bytes(content)
    task = [f"tasks=[{{name: mine, path: {file}, max_prompt_tokens: 32, max_response_tokens: 18}}]", "warm_start=null"]
    answer_in_one_line(folder, "validate", "--files", *task)
    file.unlink()


def of_answers(folder: Path, given_file: tuple[str, bytes]) -> None:
    name, content = given_file
    file = folder / name
    file.write_bytes(content)
    answer_in_one_line(folder, "grade", name, "--kind", "number", "--json")
    answer_in_one_line(folder, "grade", name, "--kind", "math", "--golds")
    file.unlink()


def of_a_model(folder: Path, source: Path, seed: int, value: object) -> None:
    model = folder / "m"
    shutil.copytree(source, model, dirs_exist_ok=True)
    break_a_file(model, random.Random(seed), value)
    answer_in_one_line(folder, "validate", f"model={{path: {model}}}", "warm_start=null")
    shutil.rmtree(model)


def of_a_trained_model(folder: Path, source: Path, seed: int, value: object) -> None:
    """Evaluation, training and Latent-SFT end where their run would begin: its folder is to be in a file."""
    model, taken = folder / "m", folder / "taken"
    shutil.copytree(source, model, dirs_exist_ok=True)
    taken.touch()
    break_a_file(model, random.Random(seed), value)
    here = ("runs_folder=taken", "rollout.engine=transformers")
    answer_in_one_line(folder, "generate", "--model", "m", "--prompt", "1+2?", "--max-tokens", "2")
    answer_in_one_line(folder, "evaluate", "--model", "m", "--profile", "quickstart", *here, codes=(2,))
    answer_in_one_line(folder, "train", "--rollout-only", "model={path: m}", "warm_start=null", *here, codes=(2,))
    shutil.rmtree(model)
    taken.unlink()


def of_problems_of_a_run(folder: Path, model: Path, given_file: tuple[str, bytes]) -> None:
    name, content = given_file
    file, taken = folder / name, folder / "taken"
    file.write_bytes(content)
    taken.touch()
    task = f"[{{name: mine, path: {name}, max_prompt_tokens: 32, max_response_tokens: 18}}]"
    here = (f"tasks={task}", f"evaluation.tasks={task}", "runs_folder=taken")
    answer_in_one_line(folder, "sft", *here, codes=(2,))
    answer_in_one_line(folder, "evaluate", "--model", str(model), "--profile", "quickstart", *here, codes=(2,))
    answer_in_one_line(folder, "generate", "--model", str(model), "--file", name, "--max-tokens", "2")
    file.unlink()
    taken.unlink()


def of_a_run(folder: Path, source: Path, seed: int, value: object) -> None:
    run = folder / "r"
    shutil.copytree(source, run, dirs_exist_ok=True)
    break_a_file(run, random.Random(seed), value)
    answer_in_one_line(folder, "inspect", "r", codes=(0, 1, 2))
    answer_in_one_line(folder, "inspect", "r", "--failed", "--json", codes=(0, 1, 2))
    answer_in_one_line(folder, "status", "r", codes=(0, 1, 2))
    answer_in_one_line(folder, "runs", ".", codes=(0, 1, 2))
    answer_in_one_line(folder, "report", "r", "--sample", "4", codes=(0, 1, 2), made="r/report.html")
    answer_in_one_line(folder, "export", "r", "--to", "out", codes=(0, 1, 2), made="out")
    shutil.rmtree(run)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, trained_folder):
    folder = tmp_path_factory.mktemp("runs") / "fake"
    fake_run(folder)
    for name in ("model", "base"):
        shutil.copytree(trained_folder, folder / name)
    return folder


SEEDS = st.integers(0, 2**32)


@SAMPLE
@given(profiles())
def test_a_profile(tmp_path, content):
    of_a_profile(tmp_path, content)


@SAMPLE
@given(problem_files())
def test_a_file_of_problems(tmp_path, file):
    of_problems(tmp_path, file)


@SAMPLE
@given(SEEDS, VALUES)
def test_a_model(tmp_path, models, seed, value):
    of_a_model(tmp_path, models, seed, value)


@SAMPLE
@given(problem_files(GRADED_ROWS))
def test_a_file_of_answers(tmp_path, file):
    of_answers(tmp_path, file)


@SAMPLE
@given(SEEDS, VALUES)
def test_a_trained_model(tmp_path, trained_folder, seed, value):
    of_a_trained_model(tmp_path, trained_folder, seed, value)


@SAMPLE
@given(problem_files())
def test_the_problems_of_a_run(tmp_path, trained_folder, file):
    of_problems_of_a_run(tmp_path, trained_folder, file)


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestManyMore:
    """The same with other inputs each time; a failure names the smallest one that fails."""

    @WHOLE
    @given(profiles())
    def test_a_profile(self, tmp_path, content):
        of_a_profile(tmp_path, content)

    @WHOLE
    @given(problem_files())
    def test_a_file_of_problems(self, tmp_path, file):
        of_problems(tmp_path, file)

    @WHOLE
    @given(SEEDS, VALUES)
    def test_a_model(self, tmp_path, models, seed, value):
        of_a_model(tmp_path, models, seed, value)

    @WHOLE
    @given(problem_files(GRADED_ROWS))
    def test_a_file_of_answers(self, tmp_path, file):
        of_answers(tmp_path, file)

    @WHOLE
    @given(SEEDS, VALUES)
    def test_a_trained_model(self, tmp_path, trained_folder, seed, value):
        of_a_trained_model(tmp_path, trained_folder, seed, value)

    @WHOLE
    @given(problem_files())
    def test_the_problems_of_a_run(self, tmp_path, trained_folder, file):
        of_problems_of_a_run(tmp_path, trained_folder, file)

    @WHOLE
    @given(SEEDS, VALUES)
    def test_a_run(self, tmp_path, runs, seed, value):
        of_a_run(tmp_path, runs, seed, value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["grade"], "Missing argument 'file'; `latent-grpo grade --help` says what it takes"),
        (["status", "--nothing"], "No such option: --nothing; `latent-grpo status --help` says what it takes"),
        (["statsu"], "No such command 'statsu'"),
        (["generate", "--model", "m", "--seed", "x"], "Invalid value for '--seed'"),
        (["bench"], "give one of the commands above"),
        (["push", "loop"], "Symlink loop"),
    ],
)
def test_arguments_that_a_command_does_not_take_are_one_line(tmp_path, capsys, arguments, line):
    (tmp_path / "loop").symlink_to("loop")
    with inside(tmp_path):
        assert run_command(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error ")
    assert line in said


def task(name: str, path: str) -> str:
    return f"tasks=[{{name: {name}, path: {path}, max_prompt_tokens: 32, max_response_tokens: 18}}]"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["status", "a\nb"], r"a\nb: no such run folder"),
        (["report", "a\u2028b"], r"a\u2028b: no such run folder"),
        (["validate", "--profile", "a\nb.yaml"], r"a\nb.yaml"),
        (["validate", "--files", task("mine", r'"/no/a\nb.jsonl"')], r"/no/a\nb.jsonl"),
        (["validate", "--files", task(r'"a\nb"', "/no/c.jsonl")], r"a\nb"),
        (["validate", r'run_name="a\nb"'], "run_name: "),
        (["grade", "a\rb.jsonl", "--kind", "number"], r"a\rb.jsonl"),
    ],
)
def test_a_name_with_a_line_break_makes_no_second_line(tmp_path, capsys, arguments, shown):
    with inside(tmp_path):
        assert run_command(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error ")
    assert shown in said


def test_every_faulty_key_has_a_line_of_its_own(capsys):
    assert run_command(["validate", "seed=x", "steps=0", "k=x"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("error ").partition(":")[0] for line in said] == ["seed", "steps", "k"]


# --- faults that nobody expected -----------------------------------------------------------------------------------


def test_an_unexpected_fault_is_a_line_with_the_path_of_its_traceback():
    try:
        raise KeyError("first\nsecond")
    except KeyError as error:
        sentence, code = unexpected(error, ["train", "a b"]), exit_code_of(error)
    assert code == 1
    path = Path(sentence.partition("the traceback is in ")[2].partition(",")[0])
    kept = path.read_text(encoding="utf-8")
    path.unlink()
    assert sentence.startswith("unexpected KeyError: 'first")
    assert len(sentence.splitlines()) == 1
    assert kept.startswith("latent-grpo train 'a b'\n")
    assert "Traceback (most recent call last)" in kept


def test_a_fault_while_the_input_was_read_has_the_exit_code_of_wrong_input():
    with pytest.raises(AttributeError) as found:
        reference(7)  # a mistake of ours within the package of the settings
    assert exit_code_of(found.value) == 2


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_tracebacks_are_shown_on_demand(value, shown):
    assert debugging({"LATENT_GRPO_DEBUG": value}) is shown
    assert not debugging({})


def test_the_version_is_said(capfd):
    assert run_command(["--version"]) == 0
    assert capfd.readouterr().out == f"latent-grpo {__version__}\n"
