"""Ports that a user names: whether they are any, and whether a server of this machine can have them."""

from __future__ import annotations

import errno
import os
import re
import socket

LARGEST = 65_535
_PORT = re.compile(r"(?:\[[^\]]*\]|[^:/\[\]]*):(?P<port>[^/]*)")


def port_fault(port: str) -> str | None:
    """Returns what is wrong with a port, such as `the port 99999 is none: ports are 1 to 65535`; None: nothing."""
    if port.isascii() and port.isdecimal() and 1 <= int(port) <= LARGEST:
        return None
    return f"the port {port!r} is none: ports are 1 to {LARGEST}"


def address_port_fault(address: str) -> str | None:
    """Returns what is wrong with the port of `HOST:PORT` or `http://HOST:PORT/...`; None: nothing, or it has none.

    What stands before an `@` may be a password, and is not looked at.
    """
    place = re.split(r"[/?#]", address.rpartition("://")[2], maxsplit=1)[0]
    found = _PORT.match(place.rpartition("@")[2])
    return None if found is None else port_fault(found["port"])


def bind_fault(host: str, port: int) -> str | None:
    """Returns why no server of this user can listen at a port now, in words; None: one can, or it takes a try."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as taken:
            taken.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as servers do: one that has just ended is free
            taken.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"the port {port} is in use by another program"
        if error.errno == errno.EACCES:
            return f"the port {port} is privileged: this user (id {os.geteuid()}) may use those from 1024 on"
        return None if isinstance(error, socket.gaierror) else f"nothing can listen at {host}:{port} ({error.strerror})"
    return None
