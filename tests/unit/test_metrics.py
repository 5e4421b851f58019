"""Metrics: the record survives kills and bad sinks; a missing package is refused with what to install."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from latent_grpo.common.errors import MetricsError
from latent_grpo.common.metrics import FILE, MetricsWriter, read_metrics
from latent_grpo.common.sinks import MLflowSink, WandbSink, gauge_name, make_sink, register_sink


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_every_step_is_one_flushed_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"rollout/reward": np.float32(0.5), "learner/updates": 4})
        assert lines(tmp_path)[0]["metrics"] == {"rollout/reward": 0.5, "learner/updates": 4.0}
        writer.write(2, {"rollout/reward": 0.75})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_non_finite_value_is_recorded_as_null_and_named(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": 1.0})
    row = lines(tmp_path)[0]
    assert row["metrics"] == {"loss": None, "grad_norm": 1.0}
    assert row["non_finite"] == ["loss"]


def test_a_value_that_is_no_number_is_refused(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(TypeError, match="metric text: expected a number, got str"):
        writer.write(1, {"text": "hello"})


def test_a_torn_last_line_is_cut_when_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 2, "kind": "tr')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {"loss": 0.5})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


def test_repeated_steps_of_a_restart_count_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
        writer.write(2, {"loss": 0.5}, lineage=1)
    assert [(r["step"], r["lineage"]) for r in read_metrics(tmp_path)] == [(1, 0), (2, 1)]
    assert len(list(read_metrics(tmp_path, lineage=0))) == 3


@register_sink("broken")
class Broken:
    """Calls are kept in the class: a writer makes its sinks itself."""

    calls: ClassVar = []

    def __init__(self, run_folder):
        self.calls.clear()

    def write(self, step, values):
        self.calls.append(step)
        raise OSError("the network is down")

    def close(self):
        pass


def test_a_sink_that_fails_is_switched_off_and_the_record_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path, ["broken"]) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
    assert Broken.calls == [1]
    assert "broken switched off" in caplog.text
    assert len(lines(tmp_path)) == 2


class Recorder:
    """A user's own sink, named by its import path."""

    seen: ClassVar = []

    def __init__(self, run_folder):
        self.seen.clear()

    def write(self, step, values):
        self.seen.append(dict(values))

    def close(self):
        self.seen.append("closed")


def test_sinks_get_finite_values_only(tmp_path):
    with MetricsWriter(tmp_path, ["test_metrics:Recorder"]) as writer:
        writer.write(1, {"a": 1.0, "b": float("inf")})
        writer.write(1, {"a": 1.0}, kind="evaluation")
    assert Recorder.seen == [{"a": 1.0}, {"evaluation/a": 1.0}, "closed"]


def test_an_unknown_sink_names_the_known_ones(tmp_path):
    with pytest.raises(MetricsError, match="console, mlflow, prometheus, tensorboard, trackio, wandb, or package"):
        make_sink("tensorbord", tmp_path)


@pytest.mark.parametrize(("sink", "module"), [(name, name) for name in ("tensorboard", "wandb", "mlflow", "trackio")])
def test_a_missing_package_is_refused_with_what_to_install(tmp_path, stand_in, sink, module):
    stand_in(module, None)
    with pytest.raises(MetricsError, match=f"pip install {sink}"):
        MetricsWriter(tmp_path, [sink])


def test_a_sink_of_the_users_own_is_found_by_import_path(tmp_path):
    assert type(make_sink("latent_grpo.common.sinks:ConsoleSink", tmp_path)).__name__ == "ConsoleSink"
    with pytest.raises(MetricsError, match="has no attribute 'Nope'"):
        make_sink("latent_grpo.common.metrics:Nope", tmp_path)


def test_the_console_shows_the_important_figures_first(tmp_path, capsys):
    with MetricsWriter(tmp_path, ["console"]) as writer:
        writer.write(7, {**{f"a/filler_{i}": i for i in range(30)}, "rollout/reward": 0.25})
    shown = capsys.readouterr().out
    assert shown.startswith("step     7  rollout/reward 0.25")
    assert len(shown.splitlines()) == 1


@pytest.fixture
def wandb(stand_in):
    """Stands for the package, which need not be installed; remembers how the run was opened and what was logged."""
    calls = SimpleNamespace(opened=None, logged=[], finished=False)

    def init(**options):
        calls.opened = options
        return SimpleNamespace(
            define_metric=lambda *a, **k: None,
            log=calls.logged.append,
            finish=lambda: setattr(calls, "finished", True),
        )

    stand_in("wandb", SimpleNamespace(init=init))
    return calls


def test_wandb_without_a_key_records_offline_and_says_how_to_upload(tmp_path, wandb, caplog):
    with caplog.at_level(logging.WARNING):
        sink = WandbSink(tmp_path / "run", {"NETRC": str(tmp_path / "none")})
    sink.write(3, {"loss": 1.0})
    sink.close()
    assert wandb.opened["mode"] == "offline"
    assert "wandb sync" in caplog.text
    assert wandb.logged == [{"step": 3, "loss": 1.0}]
    assert wandb.finished


def test_wandb_with_a_key_is_online_unless_told_otherwise(tmp_path, wandb):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret")
    netrc.chmod(0o600)
    WandbSink(tmp_path, {"NETRC": str(netrc)})
    assert wandb.opened["mode"] == "online"
    WandbSink(tmp_path, {"WANDB_API_KEY": "secret"})
    assert wandb.opened["mode"] == "online"
    WandbSink(tmp_path, {"NETRC": str(netrc), "WANDB_MODE": "disabled"})
    assert wandb.opened["mode"] == "disabled"


def test_a_run_without_a_record_is_a_sentence(tmp_path):
    with pytest.raises(MetricsError, match=r"is .* the folder of a run"):
        list(read_metrics(tmp_path))


def dashboard():
    return json.loads((Path(__file__).parents[2] / "deploy/cluster/grafana-dashboard.json").read_text())


def test_panels_of_the_grafana_dashboard_do_not_overlap_and_name_one_run():
    panels = dashboard()["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert re.fullmatch(r'ray_latent_grpo_\w+\{run=~"\$run"\}', target["expr"])


def test_a_metric_has_one_name_in_prometheus():
    assert gauge_name("rollout/reward") == "latent_grpo_rollout_reward"
    assert gauge_name("evaluation/gsm8k-aug/pass_at_1") == "latent_grpo_evaluation_gsm8k_aug_pass_at_1"


def test_a_resumed_run_goes_on_in_its_mlflow_run(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow")
    folder, elsewhere = tmp_path / "it's a run", {"MLFLOW_TRACKING_URI": ""}
    folder.mkdir()
    for steps in ((1, 2), (2, 3)):
        sink = MLflowSink(folder, elsewhere)
        for step in steps:
            sink.write(step, {"rollout/reward": 0.5, "task [a]/pass_at_1": 0.25})
        sink.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("latent-grpo").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == folder.name
    assert [m.step for m in client.get_metric_history(run.info.run_id, "rollout/reward")] == [1, 2, 2, 3]
    assert run.data.metrics["task _a_/pass_at_1"] == 0.25


def test_mlflow_at_an_address_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    pytest.importorskip("mlflow", reason="needs the package mlflow")
    with pytest.raises(MetricsError, match="metric sink mlflow cannot record at nowhere:") as found:
        MLflowSink(tmp_path, {"MLFLOW_TRACKING_URI": "nowhere://x"})
    assert "\n" not in str(found.value)


def test_a_resumed_run_goes_on_in_its_trackio_run(tmp_path):
    pytest.importorskip("trackio", reason="needs the package trackio")
    code = (
        "import sys; from pathlib import Path; from latent_grpo.common.sinks import TrackioSink\n"
        "sink = TrackioSink(Path(sys.argv[1]))\n"
        "for step in sys.argv[2:]: sink.write(int(step), {'rollout/reward': int(step) / 8})\n"
        "sink.close()"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}  # read at its import
    for steps in (("1", "2"), ("3",)):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), *steps], env=environment, check=True)
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps([[r['step'], r['rollout/reward']] for r in S.get_logs('latent-grpo', 'run')]))"
    )
    shown = subprocess.run([sys.executable, "-c", read], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout.splitlines()[-1]) == [[1, 0.125], [2, 0.25], [3, 0.375]]
