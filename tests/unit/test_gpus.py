"""Units side by side: each has its own GPUs, and a GPU is shared only by fractions that fit into it."""

import pytest

from latent_grpo.common.config import load_config
from latent_grpo.deploy.reproduce.gpus import NO_GPU, Devices, GpuNeed, at_once, gpu_need, place, visible_gpus


@pytest.mark.parametrize(
    ("workers", "of_worker", "ranks", "of_rank", "expected"),
    [
        (2, 0.0, 1, 0.0, NO_GPU),
        (1, 0.5, 1, 0.5, GpuNeed(1, 1.0)),
        (1, 0.25, 1, 0.25, GpuNeed(1, 0.5)),
        (2, 1.0, 2, 1.0, GpuNeed(4)),
        (1, 0.5, 1, 1.0, GpuNeed(2)),  # 1.5, rounded up
        (3, 0.6, 1, 0.0, GpuNeed(3)),  # 1.8, but no two of them fit into one
        (1, 2.0, 1, 1.0, GpuNeed(3)),
    ],
)
def test_a_runs_need_is_its_actors_sum_in_whole_gpus(workers, of_worker, ranks, of_rank, expected):
    chosen = [
        f"rollout.workers={workers}", f"rollout.resources.num_gpus={of_worker}",
        f"learner.ranks={ranks}", f"learner.resources.num_gpus={of_rank}",
    ]  # fmt: skip
    found = gpu_need(load_config("quickstart", chosen))
    assert (found.devices, found.share) == (expected.devices, pytest.approx(expected.share))


def test_whole_gpus_are_shared_with_nobody_and_fractions_only_where_they_fit():
    used = {"0": 0.5, "1": 0.0, "2": 0.0}
    assert place(GpuNeed(1, 0.5), used) == ("0",)
    assert place(GpuNeed(1, 0.6), used) == ("1",)
    assert place(GpuNeed(1), used) == ("1",)
    assert place(GpuNeed(2), used) == ("1", "2")
    assert place(GpuNeed(3), used) is None
    assert place(GpuNeed(1), {"0": 0.1}) is None


@pytest.mark.parametrize(
    "need", [GpuNeed(1), GpuNeed(1, 0.5), GpuNeed(1, 0.6), GpuNeed(1, 0.1), GpuNeed(2), GpuNeed(3)]
)
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_as_many_units_as_are_run_at_once_find_room(need, gpus):
    devices, given = Devices(map(str, range(gpus))), []
    if need.devices <= gpus:
        while (found := devices.take(len(given), need)) is not None:
            given.append(found)
    assert len(given) == at_once(need, gpus)
    if need.share > 0.5:
        assert len({name for names in given for name in names}) == sum(map(len, given)), "a GPU was given twice"


def test_a_gpu_is_free_again_when_its_unit_ends():
    devices = Devices(["0", "1"])
    assert devices.take("a", GpuNeed(1)) == ("0",)
    assert devices.take("b", GpuNeed(1)) == ("1",)
    assert devices.take("c", GpuNeed(1)) is None
    devices.give_back("a")
    assert devices.take("c", GpuNeed(1)) == ("0",)


def test_who_needs_none_is_left_alone_and_who_needs_more_than_there_are_gets_all():
    assert Devices(["0"]).take("a", NO_GPU) == ()
    assert Devices([]).take("a", GpuNeed(2)) == (), "its own Ray says what is short"
    assert Devices(["0", "1"]).take("a", GpuNeed(4)) == ("0", "1")


def test_a_choice_of_gpus_holds_for_units_too():
    assert visible_gpus(2, {}) == ["0", "1"]
    assert visible_gpus(2, {"CUDA_VISIBLE_DEVICES": "3,GPU-8932f937"}) == ["3", "GPU-8932f937"]
    assert visible_gpus(1, {"CUDA_VISIBLE_DEVICES": "2,-1,3"}) == ["2"], "what follows an invalid one is not seen"
