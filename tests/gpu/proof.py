"""`make gpu-proof`: everything that this project can show on one GPU, in order of worth, within a given time.

It needs Python with the project's packages on its path, and neither `.venv`, network nor installation. Each part is a
process with a time limit. When it ends, `OUT/NN-NAME.json` is written, so that a proof that is cut off still gives
something; `OUT/proof.json` has one line a part. `--device cpu` tries the same parts without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 12.0  # that the parts' limits are made for
TAIL = 60  # lines of a part's output that its file keeps
MODEL = "LATENT_GRPO_MODEL"
"""Environment variable with the folder of a real pretrained model, for the agreement of engine and learner on it."""

MACHINE = """
import json, sys, tempfile, time
import torch, transformers, pyarrow, pydantic, deepspeed, ray
facts = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "pyarrow", "deepspeed", "ray")}
facts |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
if torch.cuda.is_available():
    facts |= {"card": torch.cuda.get_device_name(0), "memory GiB": round(torch.cuda.mem_get_info()[1] / 2**30, 1)}
    facts["bfloat16 product with float32 output"] = hasattr(torch.ops.aten.mm, "dtype")
began = time.time()
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", object_store_memory=2**28,
         _temp_dir=tempfile.mkdtemp(prefix="lgp"))
assert ray.get(ray.remote(lambda: 42).remote(), timeout=120) == 42
facts["ray started s"] = round(time.time() - began, 1)
ray.shutdown()
print(json.dumps(facts))
"""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the proof."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    skipped: str = ""  # why it is not run


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a part; `state`: passed, failed, over its time limit, or not run."""

    name: str
    state: str
    seconds: float
    last: str  # the last line of its output, or why it was not run


def parts(device: str, out: Path) -> list[Part]:
    """The parts in order of worth."""

    def tests(name: str, limit_s: float, *arguments: str, skipped: str = "") -> Part:
        command = (sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", f"tests/gpu/test_{name}.py")
        return Part(name, (*command, *arguments), limit_s, skipped)

    def latent_grpo(name: str, limit_s: float, *arguments: str, skipped: str = "") -> Part:
        return Part(name, (sys.executable, "-m", "latent_grpo.deploy", *arguments), limit_s, skipped)

    model, groups = os.environ.get(MODEL, ""), "4" if device == "cpu" else "64"
    agreement = [
        latent_grpo(
            f"agreement-{dtype}", 120.0, "bench", "agreement", "--profile", "quickstart", "--groups", groups,
            "--json", str(out / f"agreement-{dtype}-found.json"), f"model.path={model}", "model.new=null",
            "warm_start=null", f"model.dtype={dtype}", "k=10", "tasks.0.max_prompt_tokens=192",
            "tasks.0.max_response_tokens=32", "evaluation.tasks=[]",
            skipped="" if model else f"{MODEL} names no model folder",
        )
        for dtype in ("bfloat16", "float32")
    ]  # fmt: skip
    has_vllm = device != "cpu" and importlib.util.find_spec("vllm") is not None
    return [
        Part("machine", (sys.executable, "-c", MACHINE), 120.0),
        tests("engine_gpu", 120.0),
        tests("learner_gpu", 300.0),
        *agreement,
        latent_grpo(
            "bench", 300.0, "bench", "gpu", "--minutes", "3.5", "--device", "cpu" if device == "cpu" else "cuda",
            "--json-folder", str(out / "bench"),
        ),
        tests("run_gpu", 240.0),
        tests("collective_gpu", 60.0),
        tests("vllm_gpu", 400.0, skipped="" if has_vllm else "no CUDA build of vLLM is here"),
    ]  # fmt: skip


def prove(todo: Sequence[Part], minutes: float, out: Path, environment: dict[str, str]) -> list[Outcome]:
    """Runs the parts while there is time, writes a file for each as it ends, and returns what came of them."""
    out.mkdir(parents=True, exist_ok=True)
    deadline, outcomes = time.monotonic() + 60 * minutes, []
    scale = max(minutes / MINUTES, 1.0)  # a slow machine gets more time for all of it and for each part
    for number, part in enumerate(todo, start=1):
        left = deadline - time.monotonic()
        if part.skipped or left <= 0:
            why = part.skipped or f"{minutes:g} minutes were over"
            outcome, output = Outcome(name=part.name, state="not run", seconds=0.0, last=why), ""
        else:
            outcome, output = _run(part, min(part.limit_s * scale, left), environment)
        outcomes.append(outcome)
        content = asdict(outcome) | {"command": list(part.command), "output": output.splitlines()[-TAIL:]}
        _write(out / f"{number:02d}-{part.name}.json", content)
        _write(out / "proof.json", [asdict(o) for o in outcomes])
        print(f"{outcome.state:8s} {outcome.seconds:6.1f} s  {part.name}: {outcome.last}", flush=True)
    return outcomes


def _run(part: Part, limit_s: float, environment: dict[str, str]) -> tuple[Outcome, str]:
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        printed.seek(0)
        output = printed.read()
    state = "passed" if code == 0 else "failed" if code is not None else "too long"
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    return Outcome(name=part.name, state=state, seconds=round(time.monotonic() - began, 1), last=last), output


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the part and its descendants: Ray's daemons outlive a driver that is killed, in sessions of their own."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=MINUTES)
    options.add_argument("--out", type=Path, default=ROOT / "gpu-proof")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = options.parse_args()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if given.device == "cpu":
        environment["LATENT_GRPO_GPU_TESTS_ON"] = "cpu"
    out = given.out.resolve()
    outcomes = prove(parts(given.device, out), given.minutes, out, environment)
    return 0 if all(outcome.state in ("passed", "not run") for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
