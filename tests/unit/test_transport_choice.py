"""Which transport a run takes, and which is refused: the reason is said."""

import pytest

from latent_grpo.common.config import ConfigError, WeightsConfig, load_config
from latent_grpo.common.transport import choose_transport


@pytest.mark.parametrize(
    ("wanted", "nodes", "may_grow", "chosen", "reason"),
    [
        ("auto", 1, False, "shared_memory", "share this machine"),
        ("auto", 2, True, "object_store", "Ray has 2 nodes"),
        ("auto", 1, True, "object_store", "nodes may join"),
        ("object_store", 1, False, "object_store", "weights.transport"),
        ("shared_memory", 1, True, "shared_memory", "weights.transport"),
        ("collective", 3, True, "collective", "weights.backend gloo"),
    ],
)
def test_the_choice_says_its_reason(wanted, nodes, may_grow, chosen, reason):
    choice = choose_transport(WeightsConfig(transport=wanted), nodes, may_grow=may_grow)
    assert choice.name == chosen
    assert reason in choice.sentence


def test_shared_memory_on_several_nodes_is_refused_where_it_is_named():
    with pytest.raises(ConfigError, match=r"Ray has 3 nodes.*auto or object_store"):
        choose_transport(WeightsConfig(transport="shared_memory"), 3, may_grow=True)


def test_a_collective_that_this_torch_cannot_have_is_refused_where_it_is_named():
    import torch.distributed as dist

    if dist.is_nccl_available():
        pytest.skip("this build of torch has NCCL")
    with pytest.raises(ConfigError, match=r"this build of torch has no NCCL; set it to auto or object_store"):
        choose_transport(WeightsConfig(transport="collective", backend="nccl"), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["weights.interface=eth0"], "weights.interface has no effect with weights.transport auto"),
        (["weights.timeout_s=5"], "weights.timeout_s has no effect with weights.transport auto"),
        (
            ["weights.transport=collective", "weights.nccl={NCCL_DEBUG: INFO}"],
            "weights.nccl has no effect with weights.backend gloo",
        ),
        (
            ["weights.transport=collective", "weights.backend=nccl", "learner.resources.num_gpus=1"],
            "weights.backend nccl needs GPUs at both ends, and rollout have none; set rollout.resources.num_gpus",
        ),
        (["weights.transport=collective", "weights.nccl={PATH: here}"], "NCCL_"),
    ],
)
def test_settings_that_cannot_work_or_have_no_effect_are_refused(changes, message):
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", changes)
    assert message in str(refused.value)


def test_nccls_variables_and_interface_are_in_the_environment_of_both_ends():
    weights = WeightsConfig(transport="collective", backend="nccl", interface="eth1", nccl={"NCCL_IB_HCA": "mlx5_0"})
    assert weights.environment == {"NCCL_SOCKET_IFNAME": "eth1", "NCCL_IB_HCA": "mlx5_0"}
    assert WeightsConfig(transport="collective", interface="eth1").environment == {}
