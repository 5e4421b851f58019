"""Suites: what is refused before anything runs, who starts from what, and the shipped ones."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from latent_grpo.common.config import NewModelConfig
from latent_grpo.common.interrupts import sigterm_as_interrupt
from latent_grpo.common.model_chain import ChainSettings, write_chain
from latent_grpo.common.models import make_model, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.tasks.sources import load_task
from latent_grpo.common.tasks.tables import KNOWN
from latent_grpo.deploy.reproduce.gpus import Devices
from latent_grpo.deploy.reproduce.manifest import (
    HASHED_PROBLEMS,
    SAME_VERDICTS,
    check_session,
    data_hashes,
    grader_hash,
    this_session,
)
from latent_grpo.deploy.reproduce.scheduler import (
    check,
    max_parallel_units,
    next_unit,
    open_folder,
    reproduce,
    run_units,
)
from latent_grpo.deploy.reproduce.suite import (
    SuiteError,
    Unit,
    changes,
    load_suite,
    resolved,
    suites_folder,
    unit_config,
    unit_folder,
    units,
    units_of,
)
from latent_grpo.deploy.reproduce.unit import Request, run_unit
from latent_grpo.deploy.run.folder import FolderInUse, run_lock
from latent_grpo.deploy.run.manifest import problems_hash
from latent_grpo.deploy.run.progress import Reporter

ROOT = Path(__file__).resolve().parents[2]
PROFILE = {
    "steps": 3, "k": 3, "group_size": 2, "prompts_per_step": 4, "minibatch_prompts": 2,
    "model": {"new": {}}, "warm_start": {"compression": 3},
    "tasks": [{"name": "t", "path": "builtin:chain_arithmetic", "max_prompt_tokens": 20, "max_response_tokens": 18}],
    "evaluation": {"tasks": [{"name": "e", "path": "builtin:chain_arithmetic", "options": {"size": 4},
                              "max_prompt_tokens": 20, "max_response_tokens": 44}]},
}  # fmt: skip
SUITE = {
    "title": "a suite", "seeds": [3, 5],
    "starts": {"latent": {"title": "latent"}, "explicit": {"title": "explicit", "overrides": ["algorithm=grpo"]}},
    "arms": {
        "mixture": {"title": "mixture", "start": "latent"},
        "uniform": {"title": "uniform", "start": "latent", "overrides": ["component_weighting=uniform"]},
        "grpo": {"title": "explicit GRPO", "start": "explicit", "overrides": ["steps=9"]},
    },
    "claims": {"gain": {"text": "it gains", "test": {"kind": "difference", "arm": "mixture", "than": "latent"}}},
    "quick": {"seeds": [3], "arms": ["grpo"]},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(PROFILE, sort_keys=False))

    def written(**changed):
        path = tmp_path / "s.yaml"
        path.write_text(yaml.safe_dump({**SUITE, "profile": str(tmp_path / "p.yaml"), **changed}, sort_keys=False))
        return path

    return written


def config_of(suite, name, seed, folder):
    return unit_config(suite, next(u for u in units(suite) if (u.name, u.seed) == (name, seed)), folder)


def test_arms_of_a_seed_begin_from_that_seeds_start(write, tmp_path):
    suite = load_suite(write())
    assert [u.key for u in units(suite)][:5] == [
        "latent-seed3", "mixture-seed3", "uniform-seed3", "explicit-seed3", "grpo-seed3",
    ]  # fmt: skip
    uniform = config_of(suite, "uniform", 5, tmp_path)
    assert uniform.model.path == str(tmp_path / "starts" / "latent-seed5" / "base")
    assert (uniform.seed, uniform.component_weighting, uniform.warm_start) == (5, "uniform", None)
    grpo = config_of(suite, "grpo", 3, tmp_path)
    assert (grpo.algorithm, grpo.steps) == ("grpo", 9)
    assert grpo.model.path.endswith("explicit-seed3/base")
    start = config_of(suite, "explicit", 3, tmp_path)
    assert start.warm_start.chain == "explicit"
    assert start.model.path is None


def test_a_finished_model_needs_no_warm_start(write, tmp_path):
    suite = load_suite(write(starts={**SUITE["starts"], "latent": {"title": "released", "path": "/models/released"}}))
    assert config_of(suite, "mixture", 3, tmp_path).model.path == "/models/released"
    assert config_of(suite, "latent", 3, tmp_path).warm_start is None
    bare = load_suite(write(overrides=["warm_start=null"]))
    with pytest.raises(SuiteError, match=r"latent-seed3: a start needs a warm start .*starts.latent.path"):
        resolved(bare, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": {"a": {"title": "a", "start": "nowhere"}}, "quick": None}, r"no start 'nowhere'; the starts are"),
        (
            {"claims": {"c": {"text": "c", "test": {"kind": "no_decline", "arm": "gone"}}}},
            r"no start or arm \['gone'\]",
        ),
        ({"quick": {"arms": ["gone"]}}, r"quick.arms: no arm \['gone'\]"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"seeds": []}, "seeds"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_suite_that_contradicts_itself_is_refused(write, changed, message):
    with pytest.raises(SuiteError, match=message):
        load_suite(write(**changed))


def test_settings_that_cannot_work_are_named_with_their_unit_before_anything_runs(write, tmp_path):
    suite = load_suite(write(), overrides=["minibatch_prompts=3"])
    with pytest.raises(SuiteError, match=r"latent-seed3: .*minibatch_prompts"):
        resolved(suite, tmp_path)
    narrow = load_suite(write(), overrides=["warm_start.compression=4"])
    with pytest.raises(SuiteError, match=r"k \(3\) is smaller than warm_start.compression \(4\)"):
        resolved(narrow, tmp_path)


def test_another_configuration_is_refused_and_the_same_one_goes_on(write, tmp_path):
    request = Request(source=str(write()), folder=tmp_path / "out")
    open_folder(request, request.load())
    open_folder(request, request.load())
    other = Request(source=request.source, folder=request.folder, overrides=["temperature=0.5"])
    with pytest.raises(SuiteError, match=r"another configuration: .*temperature: 0.6 -> 0.5"):
        open_folder(other, other.load())
    write(title="a better title", claims={})
    open_folder(request, request.load())
    quick = Request(source=request.source, folder=request.folder, quick=True)
    with pytest.raises(SuiteError, match=r"also holds latent-seed3, .* which this command leaves out"):
        open_folder(quick, quick.load())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(SuiteError, match="not empty and holds no suite"):
        open_folder(Request(source=request.source, folder=tmp_path / "foreign"), request.load())


def test_check_compares_with_the_folder_as_a_run_does_and_writes_nothing(write, tmp_path):
    request = Request(source=str(write()), folder=tmp_path / "out")
    check(request)
    assert not request.folder.exists()
    open_folder(request, request.load())
    kept = {path.name: path.read_bytes() for path in request.folder.iterdir()}
    check(request)
    other = Request(source=request.source, folder=request.folder, overrides=["steps=80"])
    for ask in (check, reproduce):
        with pytest.raises(SuiteError, match=r"another configuration: .*mixture-seed3\.steps: 3 -> 80"):
            ask(other)
    assert {path.name: path.read_bytes() for path in request.folder.iterdir()} == kept
    with run_lock(request.folder):
        assert [line for line in check(request) if f"{request.folder} is locked by process {os.getpid()} on" in line]
    assert not [line for line in check(request) if "in use" in line]


def test_arms_may_be_added_to_a_folder_and_settings_to_the_program(write, tmp_path):
    request = Request(source=str(write()), folder=tmp_path / "out")
    open_folder(request, request.load())
    known = request.folder / "suite.json"
    stored = json.loads(known.read_text())
    for config in stored["units"].values():
        del config["centering_draws"]  # as a version wrote it that had no such setting
    known.write_text(json.dumps(stored))
    hot = {"title": "hot", "start": "latent", "overrides": ["temperature=0.9"]}
    write(arms={**SUITE["arms"], "hot": hot})
    open_folder(request, request.load())
    assert "hot-seed3" in json.loads(known.read_text())["units"]
    write(arms={**SUITE["arms"], "hot": {**hot, "overrides": ["temperature=0.8"]}})
    with pytest.raises(SuiteError, match=r"hot-seed3.temperature: 0.9 -> 0.8"):
        open_folder(request, request.load())
    write()
    with pytest.raises(
        SuiteError,
        match=r"also holds hot-seed3, hot-seed5, which this command leaves out: include those seeds and arms",
    ):
        open_folder(request, request.load())


@pytest.fixture
def on_a_file(write, tmp_path):
    """A suite that is evaluated on a file of its own, in a new folder."""
    (tmp_path / "held.jsonl").write_text('{"problem": "3+4?", "answer": "7"}\n')
    tasks = [{"name": "held", "path": str(tmp_path / "held.jsonl")}]
    return Request(source=str(write(overrides=[f"evaluation.tasks={json.dumps(tasks)}"])), folder=tmp_path / "out")


def test_another_grader_or_other_data_are_refused_before_anything_is_written(on_a_file, tmp_path):
    open_folder(on_a_file, on_a_file.load())
    open_folder(on_a_file, on_a_file.load())
    kept = (on_a_file.folder / "manifest.json").read_bytes()
    (tmp_path / "held.jsonl").write_text('{"problem": "3+5?", "answer": "8"}\n')
    with pytest.raises(SuiteError, match=r"data of held \(.*held.jsonl\) was [0-9a-f]{32}, now .*--folder"):
        open_folder(on_a_file, on_a_file.load())
    (tmp_path / "held.jsonl").write_text('{"problem": "3+4?", "answer": "7"}\n')
    suite = on_a_file.load()
    session = this_session(unit_config(suite, unit, on_a_file.folder) for unit in units(suite))
    check_session(on_a_file.folder, session)
    with pytest.raises(SuiteError, match=r"the grader .* was [0-9a-f]{32}, now 0{32}\. .*program \(commit "):
        check_session(on_a_file.folder, dataclasses.replace(session, grader="0" * 32))
    with pytest.raises(SuiteError, match=r"sympy, which grades, was [0-9.]+, now 0\.1"):
        check_session(on_a_file.folder, dataclasses.replace(session, graded_with={"sympy": "0.1"}))
    assert (on_a_file.folder / "manifest.json").read_bytes() == kept


@pytest.mark.parametrize("earlier", SAME_VERDICTS)
def test_a_suite_of_an_earlier_grader_with_the_same_verdicts_goes_on(on_a_file, earlier):
    """A failure here means that `reward/` changed: compare it with the earlier graders again, or drop their entries."""
    assert set(SAME_VERDICTS.values()) == {grader_hash()}
    open_folder(on_a_file, on_a_file.load())
    path = on_a_file.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for session in manifest["sessions"]:
        session["grader"] = earlier
    path.write_text(json.dumps(manifest))
    open_folder(on_a_file, on_a_file.load())
    assert len(json.loads(path.read_text())["sessions"]) == 2


def test_a_unit_that_another_process_is_at_is_left_alone(write, tmp_path):
    request = Request(source=str(write(runner="in_process")), folder=tmp_path / "out")
    unit = next(iter(units(request.load())))
    folder = unit_folder(request.folder, unit)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("of the other\n")
    with run_lock(folder), pytest.raises(FolderInUse, match="locked by process"):
        run_unit(request, unit.key)
    assert (folder / "metrics.jsonl").read_text() == "of the other\n"


def test_a_manifest_of_hashes_that_cannot_be_compared_is_not_refused(write, tmp_path):
    request = Request(source=str(write()), folder=tmp_path / "out")
    open_folder(request, request.load())
    path = request.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    (first,) = manifest["sessions"]
    first["data"] = dict.fromkeys([*first["data"], "e (builtin:chain_arithmetic)"], f"generated by sources {'0' * 32}")
    path.write_text(json.dumps(manifest))
    open_folder(request, request.load())


class WithOtherAnswers:
    """The problems of a source as a generator with another idea of their answers makes them."""

    def __init__(self, source):
        self.source = source

    def problem(self, index):
        return dataclasses.replace(self.source.problem(index), answer="another")


def test_generated_data_have_the_hash_of_their_problems(write, tmp_path):
    suite = load_suite(write(), overrides=["tasks.0.options.shortest=2"])
    configs = [unit_config(suite, unit, tmp_path) for unit in units(suite)]
    found = data_hashes(configs)
    assert list(found) == ["t (builtin:chain_arithmetic shortest=2)", "e (builtin:chain_arithmetic)"]
    assert len(set(found.values())) == 2
    more = [c.model_copy(update={"evaluation": c.evaluation.model_copy(update={"tasks": []})}) for c in configs[::-1]]
    assert data_hashes(more).items() <= found.items(), "neither the order nor what else there is decides a hash"
    source = load_task(configs[0].tasks[0], seed=0)
    assert found["t (builtin:chain_arithmetic shortest=2)"] == problems_hash(source, HASHED_PROBLEMS)
    assert problems_hash(WithOtherAnswers(source), HASHED_PROBLEMS) not in found.values()


def test_a_manifest_is_made_without_torch():
    program = (
        "import sys; from latent_grpo.common.config import load_config; "
        "from latent_grpo.deploy.reproduce.manifest import this_session; "
        "print(len(this_session([load_config('quickstart')]).data), 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["2", "False"]


def test_seeds_are_chosen_and_may_be_added_to_a_folder(write, tmp_path):
    source, folder = str(write()), tmp_path / "out"
    one = Request(source=source, folder=folder, seeds=[7])
    assert {unit.seed for unit in units(one.load())} == {7}
    open_folder(one, one.load())
    both = Request(source=source, folder=folder, seeds=[7, 8])
    open_folder(both, both.load())
    assert json.loads((folder / "manifest.json").read_text())["seeds"] == [7, 8]
    with pytest.raises(SuiteError, match=r"also holds .*-seed8, which this command leaves out"):
        open_folder(one, one.load())
    with pytest.raises(SuiteError, match=r"distinct, got \[7, 7\]"):
        load_suite(source, seeds=[7, 7])


def test_all_that_is_missing_is_named_at_once_before_anything_runs(write, tmp_path):
    held = json.dumps([{"name": "held", "path": "nowhere/held.jsonl"}, {"name": "gsm8k"}])
    starts = {
        "latent": {"title": "released", "path": str(tmp_path / "gone")},
        "explicit": {**SUITE["starts"]["explicit"], "path": "owner/name"},
    }
    source = str(write(overrides=[f"evaluation.tasks={held}"], starts=starts))
    request = Request(source=source, folder=tmp_path / "out")
    for ask in (check, reproduce):
        with pytest.raises(SuiteError) as error:
            ask(request)
        title, *faults, note = str(error.value).splitlines()
        assert title == "suite a suite cannot start here:"
        assert [fault.partition(";")[0] for fault in faults] == [
            "task held: nowhere/held.jsonl does not exist",
            f"task gsm8k: set its `path` ({KNOWN}, hf:..., builtin:... or python:...) (latent-seed3 and 9 more)",
            f"starts.latent.path: there is no folder {tmp_path / 'gone'}",
        ]
        assert faults[2].endswith("(latent-seed3 and 5 more)")
        assert "owner/name is no folder here; it was taken for a hub id" in note
    assert not request.folder.exists()


def test_a_given_model_whose_tokenizer_does_not_fit_is_refused_once_for_its_units(write, tmp_path, monkeypatch):
    tokenizer = make_arithmetic_tokenizer()
    new = NewModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2)
    save_model(tmp_path / "given", make_model(new, tokenizer, seed=0), tokenizer)
    chain = {"chain": "latent", "source": "uniform", "k": 3, "compression": 3, "tau": 1.0, "think_end": "</think>"}
    ids = tokenizer.encode("</think>", add_special_tokens=False)
    starts = {**SUITE["starts"], "latent": {"title": "given", "path": str(tmp_path / "given")}}
    request = Request(source=str(write(starts=starts)), folder=tmp_path / "out")

    write_chain(tmp_path / "given", ChainSettings(**chain, think_end_ids=ids))
    loaded = []
    monkeypatch.setattr("latent_grpo.common.models.load_tokenizer", lambda path: loaded.append(path) or tokenizer)
    assert "all settings valid" in check(request)[0]
    assert loaded == [str(tmp_path / "given")], "six units share it"

    write_chain(tmp_path / "given", ChainSettings(**chain, think_end_ids=[4, 5]))
    for ask in (check, reproduce):
        with pytest.raises(SuiteError) as error:
            ask(request)
        (line,) = str(error.value).splitlines()[1:]
        assert line.startswith(
            f"starts.latent.path, {tmp_path / 'given'}: the tokenizer of {tmp_path / 'given'} splits"
        )
        assert line.endswith("(latent-seed3 and 5 more)")
    assert not request.folder.exists()


def test_a_fault_of_one_arm_is_reported_for_that_arm(write, tmp_path):
    """Arms share what was read of their tokenizer, and nothing else."""
    spare = ["verifiers.spare={kind: number}"]
    arms = {**SUITE["arms"], "mixture": {**SUITE["arms"]["mixture"], "overrides": spare}}
    starts = {name: {**start, "path": "owner/name"} for name, start in SUITE["starts"].items()}
    request = Request(source=str(write(arms=arms, starts=starts)), folder=tmp_path / "out")
    with pytest.raises(SuiteError, match=r"verifiers\.spare: no task uses it.*\(mixture-seed3 and 1 more\)"):
        check(request)


@pytest.mark.parametrize("ask", [check, reproduce])
def test_generated_chains_that_fill_no_latent_step_are_refused(write, tmp_path, ask):
    short = ["k=7", "warm_start.compression=7", "tasks.0.options.operations=1"]
    starts = {**SUITE["starts"], "latent": {"title": "latent", "overrides": short}}
    request = Request(source=str(write(starts=starts)), folder=tmp_path / "out")
    with pytest.raises(SuiteError, match=r"(?m)^problem t/0: .* has 6 token\(s\).*compression 7.*\(latent-seed3\)$"):
        ask(request)
    assert not request.folder.exists()


@pytest.mark.parametrize("ask", [check, reproduce])
def test_evaluation_files_are_read_as_the_units_read_them(on_a_file, tmp_path, ask):
    (tmp_path / "held.jsonl").write_text('{"problem": "3+4?", "answer": "7"}\n{"problem": "5+4?", "answer": null}\n')
    with pytest.raises(
        SuiteError, match=r"evaluation task held: .*1 empty answer \(row 1\).*\(latent-seed3 and 9 more\)$"
    ):
        ask(on_a_file)
    (tmp_path / "held.jsonl").write_text('{"question": "3+4?", "answer": "7"}\n')
    with pytest.raises(SuiteError, match=r"has no column 'problem'; its columns are answer, question\."):
        ask(on_a_file)
    assert not on_a_file.folder.exists()


def test_a_hub_id_is_let_through_and_said_and_a_start_to_be_made_is_not_missed(write, tmp_path):
    starts = {**SUITE["starts"], "explicit": {**SUITE["starts"]["explicit"], "path": "owner/name"}}
    lines = check(Request(source=str(write(starts=starts)), folder=tmp_path / "out"))
    assert lines[0].startswith("suite a suite: 10 units, all settings valid")
    assert [line for line in lines if "owner/name" in line] == [
        "starts.explicit.path: owner/name is no folder here; it was taken for a hub id and not checked"
    ]
    elsewhere = Request(source=str(write()), folder=tmp_path, overrides=["model.path=./gone", "model.new=null"])
    with pytest.raises(
        SuiteError, match=r"model.path \(profile .*\): there is no folder ./gone.*\(latent-seed3 and 3 more\)"
    ):
        check(elsewhere)


def test_arms_chosen_bring_their_starts_and_no_others(write):
    suite = load_suite(write(), seeds=[3])
    assert [unit.key for unit in units_of(suite, ["grpo"])] == ["explicit-seed3", "grpo-seed3"]
    assert [*units_of(suite, [])] == [*units(suite)]
    with pytest.raises(SuiteError, match=r"--arms: no arm gpro; the suite has mixture, uniform, grpo"):
        units_of(suite, ["gpro"])


@pytest.mark.parametrize(("runner", "expected"), [("pipeline", 5.0), ("in_process", 2.0)])
def test_a_resumed_units_minutes_are_those_of_all_its_sessions(write, tmp_path, monkeypatch, runner, expected):
    """One that has no checkpoints begins again, and so do its minutes."""
    request = Request(source=str(write(runner=runner)), folder=tmp_path / "out")
    clock, stopped = [0.0], []

    def work(folder, *rest, **options):
        assert folder.read_json("run.json")["kind"] == "sft", "a start is no training run"
        clock[0] += 120.0 if stopped else 180.0
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        after = {"e/pass_at_1": 0.5, "e/chain_length": 4.0, "e/latent_length": 2.0}
        folder.write_json("summary.json", {"after": after})
        (folder.path / "metrics.jsonl").touch()

    monkeypatch.setattr("latent_grpo.deploy.reproduce.unit._make_start", work)  # what runs is not the subject
    monkeypatch.setattr("latent_grpo.deploy.reproduce.in_process.start_in_process", work)
    with pytest.raises(KeyboardInterrupt):
        run_unit(request, "latent-seed3", clock=lambda: clock[0])
    assert run_unit(request, "latent-seed3", clock=lambda: clock[0]).minutes == expected


def test_quick_keeps_the_starts_that_its_arms_need(write):
    quick = load_suite(write(), quick=True)
    assert (quick.seeds, list(quick.arms), list(quick.starts)) == ([3], ["grpo"], ["explicit"])
    with pytest.raises(SuiteError, match="no section quick"):
        load_suite(write(quick=None), quick=True)


def test_an_arm_waits_for_its_start_only(write):
    suite = load_suite(write(seeds=[3]))
    latent, explicit = Unit("latent", 3, True), Unit("explicit", 3, True)
    mixture, grpo = Unit("mixture", 3, False), Unit("grpo", 3, False)
    assert next_unit(suite, [latent, explicit, mixture], []) == latent
    assert next_unit(suite, [mixture, grpo], [latent]) == grpo
    assert next_unit(suite, [mixture], [latent]) is None


def test_units_run_side_by_side_as_far_as_the_neediest_allows(write, tmp_path):
    suite = load_suite(write(), overrides=["rollout.resources.num_cpus=0.5", "learner.resources.num_cpus=0.5"])
    configs = [unit_config(suite, unit, tmp_path) for unit in units(suite)]
    there = {"CPU": 2.0, "GPU": 1.0}
    assert max_parallel_units(configs, "pipeline", there, {}) == 2
    needy = [c.model_copy(update={"rollout": c.rollout.model_copy(update={"workers": 9})}) for c in configs[:1]]
    assert max_parallel_units([*configs, *needy], "pipeline", there, {}) == 1


@pytest.fixture
def on_gpus(write, tmp_path):
    """A suite whose units ask for 0.6 of a GPU each."""
    shares = [
        f"{actor}.resources.{what}" for actor in ("rollout", "learner") for what in ("num_gpus=0.3", "num_cpus=0")
    ]
    return Request(source=str(write(overrides=["rollout.workers=1", *shares])), folder=tmp_path / "out")


def test_no_more_units_run_side_by_side_than_their_gpus_hold(on_gpus):
    suite = on_gpus.load()
    configs = [unit_config(suite, unit, on_gpus.folder) for unit in units(suite)]
    there = {"CPU": 9.0, "GPU": 2.0}
    assert max_parallel_units(configs, "pipeline", there, {}) == 2, "3 by their sum, but no two of them fit one GPU"
    cluster = {"RAY_ADDRESS": "ray://head"}
    assert max_parallel_units(configs, "pipeline", there, cluster) == 3, "a cluster hands out its own"


def test_units_of_one_machine_see_gpus_of_their_own(on_gpus):
    running, seen = [], []

    class Child:
        def __init__(self, request, unit, gpus):
            (self.gpu,), self.polls = gpus, 0
            assert self.gpu not in running, f"two units at once on GPU {self.gpu}"
            running.append(self.gpu)
            seen.append(self.gpu)

        def poll(self):
            self.polls += 1
            if self.polls < 3:
                return None
            running.remove(self.gpu)
            return 1

    suite = on_gpus.load()
    starts = [unit for unit in units(suite) if unit.is_start]
    there = Devices(["0", "1"])
    failed = run_units(on_gpus, suite, starts, 9, Reporter(), start=Child, devices=there, environment={})
    assert list(failed) == starts, "this child leaves no result"
    assert sorted(seen) == ["0", "0", "1", "1"]


def test_a_unit_that_fails_is_named_with_the_error_in_its_log_and_the_others_go_on(write, tmp_path):
    request = Request(source=str(write()), folder=tmp_path / "out")
    suite = request.load()
    begun = []

    class Child:
        def __init__(self, request, unit, gpus):
            folder = unit_folder(request.folder, unit)
            folder.mkdir(parents=True)
            (folder / "log.txt").write_text(f"reading\nerror torn.jsonl of {unit.key}: not valid JSON\n")
            begun.append(unit.key)

        def poll(self):
            return 1

    failed = run_units(request, suite, [*units(suite)], 1, Reporter(), start=Child, devices=Devices([]), environment={})
    reasons = {unit.key: reason for unit, reason in failed.items()}
    assert begun == ["latent-seed3", "explicit-seed3", "latent-seed5", "explicit-seed5"], "no arm without its start"
    assert "error torn.jsonl of latent-seed3: not valid JSON" in reasons["latent-seed3"]
    assert "reading" not in reasons["latent-seed3"]
    assert reasons["mixture-seed5"] == "its start latent-seed5 failed"
    assert reasons.keys() == {unit.key for unit in units(suite)}


@pytest.mark.parametrize(
    ("numbers", "seconds"),
    [((signal.SIGINT,), 700), ((signal.SIGTERM,), 100), ((signal.SIGINT, signal.SIGINT), 0)],
)
def test_a_stopped_suite_passes_the_signal_on_and_waits_as_long_as_a_step_may_take(write, tmp_path, numbers, seconds):
    """A second one ends the units at once: it is passed on as well."""
    begun, first, second = [], numbers[0], numbers[1:]

    class Child:
        def __init__(self, request, unit, gpus):
            self.sent, self.waits = [], []
            begun.append(self)

        def poll(self):
            if len(begun) == 1 and not self.sent:
                signal.raise_signal(first)

        def send_signal(self, number):
            self.sent.append(number)

        def wait(self, timeout):
            self.waits.append(timeout)
            if second and len(self.waits) == 1:
                signal.raise_signal(second[0])

    deadlines = ["deadlines.learner_s=700", "deadlines.terminate_s=100"]
    request = Request(source=str(write(overrides=deadlines)), folder=tmp_path / "out")
    suite = request.load()
    todo, devices = list(units(suite))[:1], Devices([])

    def stopped():
        with sigterm_as_interrupt():
            run_units(request, suite, todo, 1, Reporter(), start=Child, devices=devices, environment={})

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (child,) = begun
    assert child.sent == list(numbers)
    assert child.waits[-1] == pytest.approx(seconds + 30, abs=20)


def test_changes_name_the_key_and_both_values():
    before, after = {"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": [1]}, "d": 3}
    assert list(changes(before, after)) == ["a.b: 1 -> 2", "d: None -> 3"]


@pytest.mark.parametrize("name", sorted(path.stem for path in suites_folder().glob("*.yaml")))
def test_every_shipped_suite_is_valid(name, tmp_path):
    for quick in (False, True):
        suite = load_suite(name)
        if quick and suite.quick is None:
            continue
        resolved(load_suite(name, quick=quick), tmp_path)


@pytest.mark.parametrize("name", ["miniature", "gsm8k"])
def test_the_long_arms_train_longer_than_their_siblings(name, tmp_path):
    suite = load_suite(name, seeds=[0])
    steps = {arm: config_of(suite, arm, 0, tmp_path).steps for arm in suite.arms}
    assert steps["mixture-400"] == steps["centered-400"] == 2.5 * steps["mixture"] == 2.5 * steps["centered"]
