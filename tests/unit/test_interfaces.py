"""The network interface that CPU ranks meet on."""

from latent_grpo.learner.zero_engine import interface_towards


def test_this_host_is_reached_by_loopback_and_an_unknown_host_by_none():
    assert interface_towards("127.0.0.1", 1) == "lo"
    assert interface_towards("no.such.host.invalid", 1) is None
