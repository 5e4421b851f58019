"""Metric sinks: console, TensorBoard, Weights & Biases, MLflow, Trackio, Prometheus, a user's own by import path."""

from __future__ import annotations

import importlib
import logging
import netrc
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from latent_grpo.common.errors import MetricsError
from latent_grpo.common.plugins import PluginError, load_plugin

log = logging.getLogger(__name__)


@runtime_checkable
class MetricSink(Protocol):
    """A place to show metrics, made once per run with the run's folder.

    `values` are finite floats; names have the form `section/name` (`rollout/reward`). A resumed run makes a new sink
    on the same folder and repeats the steps after its checkpoint. `latent_grpo.common.testing.check_sink` is the
    contract.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step, finite numbers by name; what it raises switches it off with a warning."""

    def close(self) -> None:
        """Called once, when the run ends, for whatever is still to be written."""


SinkFactory = Callable[[Path], MetricSink]
_SINKS: dict[str, SinkFactory] = {}


def register_sink(name: str) -> Callable[[SinkFactory], SinkFactory]:
    """Returns a class decorator that makes a sink available as `metrics.sinks: [name]`."""

    def add(factory: SinkFactory) -> SinkFactory:
        _SINKS[name] = factory
        return factory

    return add


def make_sink(name: str, run_folder: Path) -> MetricSink:
    """Makes the sink registered as `name`, or of an import path `package.module:Name`. Raises :class:`MetricsError`."""
    if name in _SINKS:
        return _SINKS[name](run_folder)
    if ":" not in name:
        raise MetricsError(f"no metric sink {name!r}; known: {', '.join(sorted(_SINKS))}, or package.module:Name")
    try:
        factory = load_plugin(name)
    except PluginError as error:
        raise MetricsError(f"metric sink {name!r}: {error}") from error
    try:
        sink = factory(run_folder)
    except MetricsError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        raise MetricsError(
            f"metric sink {name!r} cannot be made with the run's folder: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(sink, MetricSink):
        raise MetricsError(
            f"metric sink {name!r} made a {type(sink).__name__}, which lacks write(step, values) or close()"
        )
    return sink


@register_sink("console")
class ConsoleSink:
    """A sink that prints one line per step: figures of the run's health, and more if the terminal is wide."""

    FIRST = ("reward", "pass_at_1", "loss", "grad_norm", "steps", "latent_steps", "invalid_share", "step_s")

    def __init__(self, run_folder: Path):
        from latent_grpo.common.terminal_text import TextConsole

        self._console = TextConsole(soft_wrap=False, highlight=False)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Prints a line with the metrics that fit its width, the most important first."""
        ranked = sorted(values, key=self._rank)
        line, width = f"step {step:>5}", max(self._console.width, 80)
        for name in ranked:
            figure = f"  {name} {_short(values[name])}"
            if len(line) + len(figure) > width:
                break
            line += figure
        self._console.print(line, overflow="crop", no_wrap=True)

    def close(self) -> None:
        """Does nothing: each line is written at once."""

    @classmethod
    def _rank(cls, name: str) -> int:
        leaf = name.rpartition("/")[2]
        return cls.FIRST.index(leaf) if leaf in cls.FIRST else len(cls.FIRST)


def _short(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def _needs(module: str, sink: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MetricsError(
            f"metric sink {sink} needs the package {package}: pip install {package}, or drop it from metrics.sinks"
        ) from error


@register_sink("tensorboard")
class TensorBoardSink:
    """Writes event files for TensorBoard."""

    def __init__(self, run_folder: Path):
        _needs("tensorboard", "tensorboard", "tensorboard")
        self._writer = _needs("torch.utils.tensorboard", "tensorboard", "tensorboard").SummaryWriter(
            str(run_folder / "tensorboard")
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


@register_sink("wandb")
class WandbSink:
    """A sink for Weights & Biases; its own settings (WANDB_PROJECT, WANDB_API_KEY, ...) give project and key.

    Without a key, and unless WANDB_MODE says otherwise, it records offline below `RUN/wandb`, for `wandb sync` later.
    """

    def __init__(self, run_folder: Path, environment: Mapping[str, str] = os.environ):
        wandb = _needs("wandb", "wandb", "wandb")
        mode = environment.get("WANDB_MODE") or ("online" if _has_wandb_key(environment) else "offline")
        if mode == "offline":
            log.warning("wandb records offline; upload with: wandb sync %s", run_folder / "wandb" / "offline-run-*")
        self._run = wandb.init(dir=str(run_folder), name=run_folder.name, resume="allow", id=run_folder.name, mode=mode)
        # wandb's own counter only rises, while a resumed run's step goes back
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics, with the step as a value of its own, so that a resumed run goes on in the same curve."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Ends the run of Weights & Biases, which waits for the upload."""
        self._run.finish()


def _has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether wandb can log in: its variable, or an entry of the netrc file."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(environment.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


PROJECT = "latent-grpo"  # of MLflow and Trackio, unless their own variables name another


@register_sink("mlflow")
class MLflowSink:
    """A sink for MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, its own variables, say where.

    Without a URI it records in `RUN/mlflow.db`, which `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows. A
    resumed run finds its MLflow run by the folder, which is a tag of it, and goes on with the same curves.
    """

    FOLDER_TAG = "latent_grpo.folder"
    MOST_AT_ONCE = 1000  # metrics that MLflow takes in one request

    def __init__(self, run_folder: Path, environment: Mapping[str, str] = os.environ):
        mlflow = _needs("mlflow", "mlflow", "mlflow")
        self._metric = _needs("mlflow.entities", "mlflow", "mlflow").Metric
        folder = run_folder.resolve()
        uri = environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            name = environment.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            self._run = self._resumed(experiment, folder) or self._client.create_run(
                experiment, run_name=folder.name, tags={self.FOLDER_TAG: str(folder)}
            )
        except mlflow.exceptions.MlflowException as error:
            raise MetricsError(f"metric sink mlflow cannot record at {uri}: {_first_line(error)}") from error
        self._client.update_run(self._run.info.run_id, status="RUNNING")

    def _resumed(self, experiment: str, folder: Path) -> Any:
        """Returns the MLflow run of this folder, or None."""
        runs = self._client.search_runs([experiment], f"tags.`{self.FOLDER_TAG}` = {_quoted(str(folder))}")
        return runs[0] if runs else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics in batches of what the server takes at once."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), self.MOST_AT_ONCE):
            self._client.log_batch(self._run.info.run_id, metrics[start : start + self.MOST_AT_ONCE])

    def close(self) -> None:
        """Marks the run of MLflow as ended."""
        self._client.set_terminated(self._run.info.run_id)


def _mlflow_name(metric: str) -> str:
    """MLflow allows letters, digits, and `_-./: `; anything else of a task's name becomes `_`."""
    return re.sub(r"[^\w\-./: ]", "_", metric, flags=re.ASCII)


def _quoted(text: str) -> str:
    """A string of MLflow's filters, which know no escapes. Raises MetricsError for one with both kinds of quotes."""
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    raise MetricsError(f"metric sink mlflow: the run's folder {text} has both kinds of quotes in its path; rename it")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@register_sink("trackio")
class TrackioSink:
    """A sink for Trackio; TRACKIO_PROJECT, and its own TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, say where.

    Without them it records on this machine, and `trackio show --project latent-grpo` shows it. The Trackio run has the
    name of the run's folder, and a resumed run goes on in it.
    """

    def __init__(self, run_folder: Path, environment: Mapping[str, str] = os.environ):
        trackio = _needs("trackio", "trackio", "trackio")
        self._run = trackio.init(
            project=environment.get("TRACKIO_PROJECT") or PROJECT, name=run_folder.name, resume="allow", embed=False,
            auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics at their step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run of Trackio."""
        self._run.finish()


@register_sink("prometheus")
class PrometheusSink:
    """A sink for Ray's metrics: gauges with the run's name, such as `ray_latent_grpo_rollout_reward`.

    Every node's Ray serves them on its metrics port, which KubeRay and `ray metrics launch-prometheus` scrape;
    `deploy/cluster/grafana-dashboard.json` shows them.
    """

    def __init__(self, run_folder: Path):
        self._make = _needs("ray.util.metrics", "prometheus", "ray").Gauge
        self._run = run_folder.name
        self._gauges: dict[str, Any] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sets a gauge per metric, and one for the step."""
        for name, value in {"step": float(step), **values}.items():
            if name not in self._gauges:
                self._gauges[name] = self._make(gauge_name(name), description=name, tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run})

    def close(self) -> None:
        """Forgets the gauges; Ray's agent serves their last values for a while."""
        self._gauges.clear()


def gauge_name(metric: str) -> str:
    """`rollout/reward` -> `latent_grpo_rollout_reward`; Ray puts `ray_` in front."""
    return "latent_grpo_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in metric)
