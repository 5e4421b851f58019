"""A program whose Ray node dies under it: the raylet is stopped, as where the kernel does not run it."""

import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil
import ray
import scripted_worker
from test_rollout_pool import publication

from latent_grpo.common.config import ActorResources, DeadlineConfig, RolloutConfig
from latent_grpo.common.errors import RayLost
from latent_grpo.rollout_workers.pool import RolloutPool

LIMIT_S = 240


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lgt-") as place:
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**27, _temp_dir=place)
        (raylet,) = [p for p in psutil.Process().children() if p.name() == "raylet"]
        config = RolloutConfig(workers=1, resources=ActorResources(num_cpus=0.1))
        try:
            with RolloutPool(scripted_worker.Script(folder, 0.02), config, DeadlineConfig()) as pool:
                pool.publish(publication(1))
                raylet.send_signal(signal.SIGSTOP)
                end = time.monotonic() + LIMIT_S
                while time.monotonic() < end:
                    pool.poll(0.2)
        except RayLost as error:
            print(f"RayLost: {error}", flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            raylet.kill()
            for process in psutil.Process().children(recursive=True):
                process.kill()
            os._exit(0)  # Ray would wait for the raylet


if __name__ == "__main__":
    main(Path(sys.argv[1]))
