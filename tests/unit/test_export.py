"""`latent-grpo export`: which model it takes, what the folder holds, the upload, and one line for what cannot work."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_run import fake_config
from foreign_state import foreign_state
from safetensors.torch import save_file

from latent_grpo import LatentModel
from latent_grpo.common.config import ConfigError, config_as_json, load_config
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.model_chain import read_chain
from latent_grpo.common.models import load_model, load_tokenizer, save_model
from latent_grpo.deploy.export.export import export
from latent_grpo.deploy.export.upload import UploadError
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.learner.best_checkpoint import Scores
from latent_grpo.learner.checkpoint import CheckpointError, list_checkpoints, write_checkpoint
from latent_grpo.learner.export import export_checkpoint, model_parameters
from latent_grpo.learner.lora import add_lora
from latent_grpo.learner.policy import freeze_lower_layers
from latent_grpo.learner.state import FACTS, OLD_TAG, OldFacts, SavedParameter, StateFacts

SHARD = "00000.safetensors"
CARD = "---\nlicense: apache-2.0\n---\n# The start\n"


def state(model, prefix="model."):
    """`fill` of a checkpoint as a learner leaves it: what is trained, in float32."""

    def fill(folder):
        (folder / "learner").mkdir(parents=True)
        trained = {f"{prefix}{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
        save_file({f"weight/{name}": tensor for name, tensor in trained.items()}, folder / "learner" / SHARD)
        saved = {name: SavedParameter(shape=tuple(tensor.shape), file=SHARD) for name, tensor in trained.items()}
        facts = StateFacts(ranks=1, zero_stage=0, dtype="float32", steps=1, bad_in_a_row=0, parameters=saved)
        (folder / "learner" / FACTS).write_text(facts.model_dump_json())

    return fill


def old_state(model, folder):
    """A state of ZeRO stage 0 as versions before 0.3 wrote it: all parameters, tied ones twice."""
    (folder / OLD_TAG).mkdir(parents=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"module": weights}, folder / OLD_TAG / "mp_rank_00_model_states.pt")
    (folder / FACTS).write_text(OldFacts(ranks=1, zero_stage=0, dtype="float32").model_dump_json())
    return folder


def shifted(folder, by):
    """The model of a folder with other weights."""
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)
    return model


@pytest.fixture
def run(prepared, tmp_path):
    """A run that has ended after step 30, with checkpoints of steps 10, 20 (the best) and 30."""
    return RunFolder(shutil.copytree(prepared, tmp_path / "my-run"))


@pytest.fixture(scope="module")
def prepared(trained_folder, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("prepared") / "my-run")
    folder.path.mkdir()
    shutil.copytree(trained_folder, folder.base_model)
    (folder.base_model / "README.md").write_text(CARD)
    ends = json.loads((folder.base_model / "generation_config.json").read_text())
    (folder.base_model / "generation_config.json").write_text(json.dumps({**ends, "max_length": 77}))
    (folder.path / "config.json").write_text(config_as_json(fake_config()))
    folder.write_json("run.json", {"kind": "train", "lineage": 0})
    folder.write_json("summary.json", {"minutes": 1.0, "after": {"chains/pass_at_1": 0.75, "chains/chain_length": 9.0}})
    scores = None
    for step, score in ((10, 0.1), (20, 0.9), (30, 0.3)):
        write_checkpoint(folder.checkpoints, step, state(shifted(trained_folder, step / 1000)), {"step": step}, 3)
        scores = scores or Scores(folder.checkpoints, "evaluation/pass_at_1")
        scores.record(list_checkpoints(folder.checkpoints)[-1][1].name, score)
        with MetricsWriter(folder.path) as metrics:
            values = {"chains/pass_at_1": score, "chains/reference/pass_at_1": score / 2}
            metrics.write(step, values, kind="evaluation")
    save_model(folder.model, shifted(trained_folder, 0.03), load_tokenizer(trained_folder))
    return folder.path


def shift(exported, trained_folder):
    """By how much the weights of an exported model differ from the start's."""
    one, other = (dict(load_model(path).named_parameters()) for path in (exported, trained_folder))
    gaps = torch.cat([(one[name] - other[name]).detach().flatten() for name in other])
    assert gaps.max() - gaps.min() < 1e-5
    return round(float(gaps.mean()), 5)


@pytest.mark.parametrize(
    ("options", "by", "named"),
    [
        ({}, 0.03, "the trained model"),
        ({"step": 10}, 0.01, "the checkpoint of step 10"),
        ({"best": True}, 0.02, "step 20, the best by evaluation/pass_at_1 (0.900)"),
    ],
)
def test_a_model_and_any_checkpoint_become_a_folder_that_runs(run, trained_folder, tmp_path, options, by, named):
    said = []
    out = tmp_path / "deep" / "out"
    assert export(run.path, str(out), say=said.append, **options) == str(out)
    assert named in said[-1]
    assert shift(out, trained_folder) == by
    assert named in (out / "README.md").read_text()
    assert read_chain(out).k == 3
    assert load_config(json.loads((out / "run_config.json").read_text())) == run.config()
    assert len(LatentModel(out).generate(["1+2*3?"])) == 1
    assert not [path for path in out.parent.iterdir() if path != out], "nothing unfinished is left"


def test_what_the_start_had_is_kept(run, tmp_path):
    export(run.path, str(tmp_path / "out"), step=30)
    assert (tmp_path / "out" / "README.start.md").read_text() == CARD
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 77
    own = load_tokenizer(run.base_model)
    assert load_tokenizer(tmp_path / "out").chat_template == own.chat_template


def test_the_card_has_the_figures_of_the_step_with_their_protocol(run, tmp_path):
    export(run.path, str(tmp_path / "end"))
    assert "| chains | ours | 0.750 | 9.000 | - | - |" in (tmp_path / "end" / "README.md").read_text()
    export(run.path, str(tmp_path / "out"), step=20)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| chains | ours | 0.900 |" in card
    assert "| chains | reference, noise off | 0.450 |" in card
    assert str(tmp_path) not in card, "folders of a machine are nobody's business"
    assert "latent-grpo generate --model" in card


def test_a_run_that_goes_on_exports_its_last_checkpoint(run, trained_folder, tmp_path):
    run.write_json("summary.json", {"sessions": [1.0]})  # as a resumed run has it
    export(run.path, str(tmp_path / "out"))
    assert shift(tmp_path / "out", trained_folder) == 0.03
    said = []
    (list_checkpoints(run.checkpoints)[-1][1] / "state.json").unlink()
    export(run.path, str(tmp_path / "before"), say=said.append)
    assert "00002-step-000030 skipped: state.json is missing" in said[0]
    assert shift(tmp_path / "before", trained_folder) == 0.02


def test_a_damaged_best_checkpoint_gives_way_to_the_next(run, trained_folder, tmp_path):
    said = []
    (list_checkpoints(run.checkpoints)[1][1] / "learner" / "learner.json").unlink()
    export(run.path, str(tmp_path / "out"), best=True, say=said.append)
    assert "00001-step-000020, which was better, skipped: learner/learner.json is missing" in said[0]
    assert shift(tmp_path / "out", trained_folder) == 0.03
    with pytest.raises(CheckpointError, match=r"00001-step-000020 is damaged: .* of step 10, 20, 30"):
        export(run.path, str(tmp_path / "again"), step=20)


def test_lora_is_merged(trained_folder, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs the extra lora")
    config = load_config(
        "quickstart", ["warm_start.lora={rank: 2, alpha: 6}", "model.path=x", "model.new=null", "deterministic=false"]
    )
    model = load_model(trained_folder)
    add_lora(model, config.warm_start.lora, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    (tmp_path / "state").mkdir()
    state(model)(tmp_path / "state")
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(trained_folder)})})
    export_checkpoint(tmp_path / "state" / "learner", trained_folder, tmp_path / "out", config, config.warm_start.lora)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        merged, before = load_model(tmp_path / "out")(ids).logits, load_model(trained_folder)(ids).logits
        assert torch.allclose(merged, model(ids).logits, atol=1e-5)
        assert not torch.allclose(merged, before, atol=1e-3)


def test_frozen_parameters_are_those_of_the_start(run, trained_folder, tmp_path):
    model = shifted(trained_folder, 0.05)
    freeze_lower_layers(model, 1)
    (tmp_path / "state").mkdir()
    state(model)(tmp_path / "state")
    export_checkpoint(tmp_path / "state" / "learner", trained_folder, tmp_path / "out", run.config())
    got, start = (dict(load_model(folder).named_parameters()) for folder in (tmp_path / "out", trained_folder))
    changed = {name for name in start if not torch.equal(got[name], start[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(changed) < len(start)


@pytest.mark.parametrize("other", ["name", "shape"])
def test_a_state_of_another_model_is_refused(run, trained_folder, tmp_path, other):
    model = load_model(trained_folder)
    if other == "shape":
        model.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(3, 3))
    (tmp_path / "state").mkdir()
    state(model, prefix="model." if other == "shape" else "model.other.")(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"has no parameter like its .*; was the model changed"):
        export_checkpoint(tmp_path / "state" / "learner", trained_folder, tmp_path / "out", run.config())


def test_a_state_from_before_is_exported(run, trained_folder, tmp_path):
    old = old_state(shifted(trained_folder, 0.02), tmp_path / "old")
    export_checkpoint(old, trained_folder, tmp_path / "out", run.config())
    assert shift(tmp_path / "out", trained_folder) == 0.02


@pytest.mark.parametrize("stage", [0, 3])
def test_a_foreign_pickle_does_not_run(run, trained_folder, tmp_path, stage):
    with pytest.raises(CheckpointError, match="could run code; it was refused"):
        export_checkpoint(foreign_state(tmp_path, stage), trained_folder, tmp_path / "out", run.config())
    assert not (tmp_path / "touched").exists()
    if stage == 0:
        shutil.rmtree(tmp_path / "foreign" / OLD_TAG)
        with pytest.raises(CheckpointError, match="was the state removed"):
            model_parameters(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ("", "learner.json: the file: "),
        ('{"ranks": 1}', "learner.json: zero_stage: Field required"),
        ('{"ranks": 1, "zero_stage": 0, "dtype": "float32", "format": 3}', "learner.json: format: Input should be 2"),
        (
            '{"ranks": 1, "zero_stage": 0, "dtype": "float32", "format": 2, "steps": 1, "bad_in_a_row": 0, '
            '"parameters": {"a": {"shape": [1], "file": "../00000.safetensors"}}}',
            "learner.json: parameters.a.file: String should match",
        ),
    ],
)
def test_facts_that_no_learner_wrote_are_one_line(tmp_path, facts, said):
    (tmp_path / FACTS).write_text(facts)
    with pytest.raises(CheckpointError, match=said) as error:
        model_parameters(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "to", "options", "said"),
    [
        (None, "out", {"step": 7}, "--step 7: .* has no checkpoint of that step. There are checkpoints of step 10, 20"),
        ("scores", "out", {"best": True}, "--best: no checkpoint of .* has a score; it takes evaluations"),
        (None, "out", {"best": True, "step": 10}, "--step and --best exclude each other"),
        (None, "my-run", {}, "exists already; give a folder that does not, or remove it"),
        (None, "out", {"public": True}, "--public has no effect on a folder"),
        (None, "hf:name", {}, "expected hf:OWNER/NAME"),
        ("config", "out", {}, "it has no config.json and run.json; give a run folder"),
        ("kind", "out", {}, "this is an evaluation, which trains no model; give the folder of the run that trained it"),
        ("everything", "out", {}, "has neither a trained model nor a checkpoint"),
        ("everything", "out", {"step": 1}, "There is no checkpoint at all"),
        (None, "my-run/config.json/out", {}, r"--to \S+/config.json/out cannot be written: File exists"),
        ("base", "out", {"step": 10}, "the model that the run started from is not there"),
    ],
)
def test_what_cannot_be_exported_is_one_line(run, tmp_path, change, to, options, said):
    gone = {
        "scores": [run.checkpoints / "scores.json"], "config": [run.path / "config.json"], "base": [run.base_model],
        "everything": [run.checkpoints, run.model, run.base_model],
    }  # fmt: skip
    if change == "kind":
        run.write_json("run.json", {"kind": "evaluate", "lineage": 0})
    for path in gone.get(change, []):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ConfigError, match=said) as error:
        export(run.path, to if to.startswith("hf:") else str(tmp_path / to), **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_error_is_printed_as_it_is(run):
    """Rich would turn `:x:` into a symbol."""
    command = [sys.executable, "-m", "latent_grpo.deploy", "export", str(run.path), "--to", "hf:x"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert "--to hf:x: expected hf:OWNER/NAME" in found.stderr


# --- the hub


@dataclasses.dataclass
class FakeHub:
    """A hub that takes everything, or fails at a call with an error."""

    fails: dict = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)
    files: list = dataclasses.field(default_factory=list)

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.fails:
            raise self.fails[name]

    def whoami(self):
        self._call("whoami")

    def create_repo(self, repo_id, *, private, exist_ok):
        self._call("create_repo", repo_id, private, exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.files = sorted(path.name for path in Path(folder_path).iterdir())
        self._call("upload_folder", repo_id, commit_message)


@pytest.mark.parametrize("public", [False, True])
def test_an_upload_makes_a_private_repository_unless_asked(run, public):
    hub = FakeHub()
    assert export(run.path, "hf:me/latent", best=True, public=public, hub=lambda: hub) == "hf:me/latent"
    message = "Export the checkpoint of step 20, the best by evaluation/pass_at_1 (0.900) of my-run"
    assert hub.calls == [
        ("whoami",), ("create_repo", "me/latent", not public, True), ("upload_folder", "me/latent", message)
    ]  # fmt: skip
    assert {"README.md", "latent_chain.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)


def refusal(status):
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError(f"status {status}", response=SimpleNamespace(status_code=status, request=None, headers={}))


@pytest.mark.parametrize(
    ("fails", "kind", "said"),
    [
        ({"whoami": 401}, ConfigError, r"refuses these credentials \(status 401\); give a token that may write"),
        ({"create_repo": 403}, ConfigError, r"refuses these credentials \(status 403\)"),
        ({"upload_folder": 500}, UploadError, "status 500; try again, or export to a folder"),
        ({"whoami": OSError("no route")}, UploadError, r"cannot be reached from here \(no route\); export to a folder"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line(run, fails, kind, said):
    hub = FakeHub({name: refusal(error) if isinstance(error, int) else error for name, error in fails.items()})
    with pytest.raises(kind, match=said) as error:
        export(run.path, "hf:me/latent", hub=lambda: hub)
    assert "\n" not in str(error.value)


def test_the_real_client_without_network_or_credentials_is_one_line(run):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    closed = "http://127.0.0.1:9"
    with pytest.raises(UploadError, match="cannot be reached from here"):
        export(run.path, "hf:me/latent", hub=lambda: HfApi(endpoint=closed, token="hf_none"))
    with pytest.raises(ConfigError, match="there are no credentials for the hub; run `hf auth login`"):
        export(run.path, "hf:me/latent", hub=lambda: FakeHub({"whoami": LocalTokenNotFoundError("none")}))


def test_what_somebody_elses_model_links_to_elsewhere_is_not_exported(run, tmp_path):
    (tmp_path / "key").write_text("secret")
    run.path.chmod(0o777)
    (run.path / "model" / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ConfigError, match=r"notes.txt leads out of .*; put the file itself there"):
        export(run.path, str(tmp_path / "out"), say=print)
    assert not (tmp_path / "out").exists()
    assert export(run.path, str(tmp_path / "out"), step=10), "which copies nothing of model/"
    (run.path / "base" / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ConfigError, match=r"base/notes.txt leads out of"):
        export(run.path, str(tmp_path / "again"), step=10)


def test_the_users_own_model_may_lie_on_another_disk(run, tmp_path):
    run.model.rename(tmp_path / "disk")
    run.model.symlink_to(tmp_path / "disk")
    export(run.path, str(tmp_path / "out"))
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "disk" / "model.safetensors"
    ).read_bytes()
