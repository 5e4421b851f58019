"""The network interface that CPU ranks meet on, and that weights travel by."""

import re

import pytest

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.network import address_of, interface_towards, own_address


def test_this_host_is_reached_by_loopback_and_an_unknown_host_by_none():
    assert interface_towards("127.0.0.1", 1) == "lo"
    assert interface_towards("no.such.host.invalid", 1) is None


def test_an_interface_has_the_address_by_which_it_is_reached_and_an_unknown_one_is_refused():
    assert address_of("lo") == own_address("127.0.0.1", 1) == "127.0.0.1"
    with pytest.raises(ConfigError, match=re.compile(r"weights.interface eth77: .*it has .*\blo\b")):
        address_of("eth77")
