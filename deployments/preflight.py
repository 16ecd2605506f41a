"""What can be known to fail before anything starts, each said in one sentence."""

import errno
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

_MIN_SHM_BYTES = 256 << 20  # Ray's smallest workable object store, with room to spare


def find_problems(ports: Iterable[tuple[int, str]], shm: Path = Path("/dev/shm")) -> list[str]:  # noqa: S108 - Ray's own place
    """Return a sentence for each thing that would stop the service from starting.

    Args:
        ports: Loopback TCP ports that must be free, each with what it is for.
        shm: Where Ray keeps shared memory.
    """
    problems = [_port_problem(port, purpose) for port, purpose in ports]
    problems.append(_shm_problem(shm))
    return [problem for problem in problems if problem]


def _port_problem(port: int, purpose: str) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return (
                    f"Port {port} is in use, and it is needed for {purpose}. "
                    f"Stop what holds it (`ss -ltnp sport = :{port}` shows it) or choose another."
                )
            return f"Port {port}, for {purpose}, cannot be opened: {error.strerror}."
    return None


def _shm_problem(shm: Path) -> str | None:
    if not shm.is_dir():
        return None  # not Linux; Ray uses its temporary folder
    free = shutil.disk_usage(shm).free
    if free >= _MIN_SHM_BYTES or os.environ.get("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE") == "1":
        return None
    return (
        f"{shm} has {free >> 20} MB free and Ray needs {_MIN_SHM_BYTES >> 20}: in a container, "
        "start it with --shm-size=1g."
    )
