"""A program whose Ray takes its disk for full, so that it cannot spill: it puts more than the object store holds."""

import tempfile

import numpy as np
import ray

from latent_grpo.common.errors import RunError
from latent_grpo.common.ray_calls import put_within

MIB = 2**20


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lgt-") as place:
        full = {"local_fs_capacity_threshold": 1e-6}  # of the disk
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * MIB, _temp_dir=place,
            _system_config=full,
        )  # fmt: skip
        kept = [put_within(np.zeros(30 * MIB, np.uint8), 60, "deadlines.learner_s") for _ in range(2)]
        print(f"{len(kept)} fit", flush=True)
        try:
            kept.append(put_within(np.zeros(30 * MIB, np.uint8), 60, "deadlines.learner_s"))
        except RunError as error:
            print(f"RunError: {error}", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
