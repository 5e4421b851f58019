"""What of this machine keeps Ray from starting, found in its environment before a run has a folder.

Ray itself says these things late, after minutes of retries or in a traceback of sixty lines.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from latent_grpo.common.config import ConfigError
from latent_grpo.common.errors import RayLost
from latent_grpo.common.ports import address_port_fault
from latent_grpo.deploy.run import link

LONGEST_SOCKET = 107 if sys.platform == "linux" else 103  # bytes of a Unix socket's path
HEAD_S = 20.0  # for a head to answer that is only just starting
ADDRESS, TEMPORARY, TOKEN, TOKEN_PATH = "RAY_ADDRESS", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ON_OTHER_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True, slots=True)
class Fault:
    """A variable of the environment with which Ray cannot start, what is wrong with it, and what to set."""

    variable: str
    found: str
    fix: str
    passing: bool = False  # it may pass by itself

    def __str__(self) -> str:
        return f"Ray cannot start: {self.found}; {self.fix}"


def check_machine(limit_s: float) -> None:
    """Raises ConfigError with a line for each fault; a Ray that runs in this process already has none.

    `limit_s` bounds the wait for a cluster's head (`deadlines.start_s`). Raises RayLost where a run that recovers finds
    no head: it had one before, so another attempt may find it.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return
    if found := ray_faults(os.environ, limit_s):
        said = map(str, found)
        if link.recovering() and all(fault.passing for fault in found):
            raise RayLost(*said)
        raise ConfigError(*said)


def ray_faults(
    environment: Mapping[str, str], limit_s: float, answers: Callable[[str, float], bool] | None = None
) -> list[Fault]:
    """Returns what keeps Ray from starting. `answers` says whether a head answers within seconds (default: by gRPC)."""
    address = environment.get(ADDRESS, "")
    if address:
        found = [address_fault(address), _token_fault(environment, cluster=True)]
        if found[0] is None and address != "local" and not (answers or head_answers)(address, min(limit_s, HEAD_S)):
            return [
                Fault(
                    ADDRESS,
                    f"no Ray head answers at {ADDRESS}={address}",
                    f"set {ADDRESS} to HOST:PORT of `ray start --head` (port 6379), or unset it for a Ray of this "
                    "machine alone",
                    passing=True,
                )
            ]
    else:
        found = [temporary_fault(environment), _token_fault(environment)]
    return [fault for fault in found if fault is not None]


def address_fault(address: str) -> Fault | None:
    """A value of RAY_ADDRESS that is no address of a cluster's head."""
    if re.match(r"https?://", address):
        return Fault(
            ADDRESS,
            f"{ADDRESS}={address} is the address of a job server, not of a Ray head",
            f"unset {ADDRESS}; `latent-grpo submit --address {address}` makes the run a job there",
        )
    if (fault := address_port_fault(address)) is not None:
        return Fault(ADDRESS, f"{ADDRESS}={address}: {fault}", f"set {ADDRESS} to HOST:PORT of a Ray head, or unset it")
    if address in ("auto", "local") or re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", address):
        return None
    return Fault(
        ADDRESS, f"{ADDRESS}={address} is no address", f"set {ADDRESS} to HOST:PORT of a Ray head, or unset it"
    )


def found_head() -> str | None:
    """Returns the head that Ray takes for `auto`, perhaps another run's that only that run reaches; None: none runs."""
    from ray._private import services  # what ray.init does; it has no public name

    try:
        return str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError:
        return None


def head_answers(address: str, limit_s: float, auto: Callable[[], str | None] = found_head) -> bool:
    """Whether a gRPC server answers at HOST:PORT within `limit_s`; for `auto` at what that function says."""
    import grpc  # type: ignore[import-untyped]  # it has no types

    found = auto() if address == "auto" else address.removeprefix("ray://")
    if found is None:
        return False
    # without a proxy as Ray does, and with a connection of its own
    direct = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(found, options=direct) as channel:
        if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
            return True  # only Ray has its certificates
        try:
            grpc.channel_ready_future(channel).result(timeout=limit_s)
        except grpc.FutureTimeoutError:
            return False
    return True


def temporary_fault(environment: Mapping[str, str]) -> Fault | None:
    """A folder of temporary files that is missing, or whose path is too long for Ray's sockets."""
    given = environment.get(TEMPORARY)
    if given and not (os.path.isdir(given) and os.access(given, os.W_OK | os.X_OK)):
        return Fault(
            TEMPORARY,
            f"{TEMPORARY}={given} is no folder that this user can write",
            f"make it, or set {TEMPORARY} to another folder with a short path, such as /tmp",
        )
    try:
        folder = given or tempfile.gettempdir()
    except FileNotFoundError as error:
        return Fault(TEMPORARY, str(error.strerror), f"set {TEMPORARY} to a folder that can be written")
    socket = os.path.join(folder, "lg-12345678", f"session_2026-01-01_00-00-00_000000_{os.getpid()}", "sockets")
    length = len(os.fsencode(os.path.join(socket, "plasma_store")))
    if length <= LONGEST_SOCKET:
        return None
    room = len(os.fsencode(folder)) - (length - LONGEST_SOCKET)
    return Fault(
        TEMPORARY,
        f"the path of {TEMPORARY}={folder} has {len(os.fsencode(folder))} bytes, and Ray's sockets in it allow {room}",
        f"set {TEMPORARY} to a folder with a shorter path, such as /tmp",
    )


def keep_local(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes a Ray of this machine alone listen on the loopback interface alone; a cluster's is left as it is.

    It would listen on all interfaces. The variable, by which Ray does so on macOS and Windows, counts when `ray` is
    imported, and in all its processes.
    """
    if not environment.get(ADDRESS):
        environment.setdefault(ON_OTHER_MACHINES, "0")


def private_token(environment: Mapping[str, str] = os.environ, *, make: bool = True) -> None:
    """Makes Ray's token file one that only its owner reads: whoever has the token may run code in every Ray process.

    Ray writes it with the permissions of any file. With `make` one that is missing is written here; nothing is done
    where the token is a variable, or the file is another user's.
    """
    if environment.get("RAY_AUTH_MODE", "token") != "token" or environment.get(TOKEN):
        return
    home = environment.get("HOME") or os.path.expanduser("~")
    token = Path(environment.get(TOKEN_PATH) or Path(home, ".ray", "auth_token"))
    with contextlib.suppress(OSError):  # Ray says what is wrong with it
        if token.exists():
            status = token.stat()
            if status.st_uid == os.geteuid() and status.st_mode & 0o077:
                token.chmod(0o600)
        elif make:
            token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(file, "w", encoding="ascii") as opened:
                opened.write(secrets.token_hex(32))


def _token_fault(environment: Mapping[str, str], *, cluster: bool = False) -> Fault | None:
    """A home folder that cannot hold the token by which Ray's processes know each other."""
    if environment.get("RAY_AUTH_MODE", "token") != "token" or environment.get(TOKEN):
        return None
    if given := environment.get(TOKEN_PATH):
        if os.access(given, os.R_OK) and Path(given).is_file():
            return None
        return Fault(TOKEN_PATH, f"{TOKEN_PATH}={given} is no file that can be read", "write Ray's token into it")
    home = environment.get("HOME") or os.path.expanduser("~")
    token = Path(home, ".ray", "auth_token")
    if cluster or os.access(token, os.R_OK):
        return None  # a cluster's own token is its to give, and Ray says that it is missing
    present = next(path for path in (token.parent, *token.parents) if path.exists())
    if present.is_dir() and os.access(present, os.W_OK | os.X_OK):
        return None
    return Fault(
        "HOME",
        f"its token cannot be written to {token}, since {present} cannot be written (HOME={home})",
        f"set HOME to a folder that can be written, or {TOKEN_PATH} to a file with a token "
        "(python -c 'import secrets; print(secrets.token_hex(32))' > FILE)",
    )
