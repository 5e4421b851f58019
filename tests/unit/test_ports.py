"""A port that is none, is in use or is privileged is said in words, wherever a user names one."""

from __future__ import annotations

import os
import socket

import pytest

from latent_grpo.common.ports import address_port_fault, bind_fault, port_fault
from latent_grpo.deploy.cluster.staging import SubmitError
from latent_grpo.deploy.cluster.submit import submit
from latent_grpo.deploy.run.machine import ray_faults


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", "", "80.5", "\u0661"])
def test_what_is_no_port_is_refused_for_every_command(port):
    assert port_fault(port) == f"the port {port!r} is none: ports are 1 to 65535"
    address = f"http://head:{port}"
    assert address_port_fault(address) == port_fault(port)
    with pytest.raises(SubmitError, match=f"address {address}: the port '{port}' is none: .*a job server's is 8265"):
        submit(["train"], address)
    (fault,) = ray_faults({"RAY_ADDRESS": f"head:{port}", "RAY_AUTH_TOKEN": "x"}, 1.0, lambda address, limit_s: False)
    assert f"RAY_ADDRESS=head:{port}: the port {port!r} is none" in str(fault)


@pytest.mark.parametrize(
    "address",
    [
        "auto",
        "head",
        "http://head",
        "http://head:8265",
        "https://head:8265/x:y",
        "[::1]:6379",
        "ray://h:10001",
        "http://user:secret@head:8265",
        "http://head:8265?x=1",
        "head:1#a",
    ],
)
def test_other_addresses_have_no_fault(address):
    assert address_port_fault(address) is None


def test_a_port_in_use_is_found_and_a_free_one_is_not():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert bind_fault("127.0.0.1", port) == f"the port {port} is in use by another program"
    assert bind_fault("127.0.0.1", port) is None
    assert "nothing can listen at 203.0.113.1" in bind_fault("203.0.113.1", port)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every port")
def test_a_privileged_port_is_called_so():
    assert (
        bind_fault("127.0.0.1", 80)
        == f"the port 80 is privileged: this user (id {os.geteuid()}) may use those from 1024 on"
    )
