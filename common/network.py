"""Addresses of this host, and stores of torch.distributed that listen on one of them alone."""

from __future__ import annotations

import socket
from datetime import timedelta

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so

from latent_grpo.common.errors import ConfigError


def serve_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Serves a store on `address` alone: it has no authentication, and torch would take all interfaces.

    Port 0 is any free one; `timeout` is that of calls to it from here.
    """
    listener = socket.create_server((address, port), family=_family(address))
    port = listener.getsockname()[1]
    return TCPStore(address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def own_address(towards: str, port: int) -> str | None:
    """Returns the address by which this host reaches another, or None for a host unknown."""
    try:
        with socket.socket(_family(towards), socket.SOCK_DGRAM) as probe:
            probe.connect((towards, port))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(address: str, port: int) -> str | None:
    """Returns the name of the network interface by which this host reaches another, or None for a host unknown.

    Gloo would take the one of the host's own name, which Debian's /etc/hosts makes 127.0.1.1: others cannot reach it.
    """
    own = own_address(address, port)
    of = [name for name, given in psutil.net_if_addrs().items() if any(a.address == own for a in given)]
    return of[0] if of else None


def address_of(interface: str) -> str:
    """Returns the IP address of this host's network interface, IPv4 if it has one. Raises ConfigError without one."""
    all_of = psutil.net_if_addrs()
    kinds = (socket.AF_INET, socket.AF_INET6)
    found = sorted((kinds.index(a.family), a.address) for a in all_of.get(interface, []) if a.family in kinds)
    if not found:
        raise ConfigError(
            f"weights.interface {interface}: {socket.gethostname()} has no such interface with an IP address; it has "
            f"{', '.join(sorted(all_of))}"
        )
    return found[0][1]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
