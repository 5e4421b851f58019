"""One service alone: what cannot work is said before anything is started."""

import pytest
from fake_run import fake_config, fake_run
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.single_service import rollout_only, train_only


def test_the_modes_exclude_each_other():
    result = CliRunner().invoke(app, ["train", "--rollout-only", "--train-only", "runs/x"])
    assert isinstance(result.exception, ConfigError)
    assert "exclude each other" in str(result.exception)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warm_start": {"compression": 2}}, "warm_start=null"),
        ({"stop_on": {"metric": "rollout/reward", "above": 0.9}}, "stop_on has no effect with --rollout-only"),
    ],
)
def test_rollouts_alone_make_no_warm_start_and_take_all_their_steps(tmp_path, changes, said):
    config = fake_config(**changes, runs_folder=str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        rollout_only(config, "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prepare", "overrides", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), [], "no config.json"),
        (lambda folder: (folder / "trajectories").rename(folder / "gone"), [], "no dumped trajectories"),
        (lambda folder: None, ["k=4"], r"k \(4\) differs from that of the dumps \(3\)"),
    ],
)
def test_learning_alone_needs_dumps_of_the_same_kind(tmp_path, prepare, overrides, words):
    folder = fake_run(tmp_path / "run").path
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    prepare(folder)
    with pytest.raises(ConfigError, match=words):
        train_only(folder, [f"runs_folder={tmp_path / 'runs'}", *overrides])
    assert not (tmp_path / "runs").exists()
