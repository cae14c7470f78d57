"""`python keeper.py SESSION KEEPERS COMMAND...`: runs a server until the test session ends, however that ends.

SESSION is a file that pytest's first process holds locked as long as it lives. KEEPERS is one that each keeper
holds a share of, so that a lock on all of it waits until the servers are gone. Uses nothing but the standard
library, to start quickly.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path


def main() -> None:
    """Start the command; end its process group when SESSION is unlocked, and this process when it ends."""
    session, keepers, *command = sys.argv[1:]
    with Path(session).open() as lock, Path(keepers).open("a") as share:
        fcntl.flock(share, fcntl.LOCK_SH)
        server = subprocess.Popen(command, start_new_session=True)
        threading.Thread(target=_exit_with, args=(server,), daemon=True).start()
        fcntl.flock(lock, fcntl.LOCK_SH)  # granted when the session has ended
        _ending.set()
        for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(seconds)


_ending = threading.Event()


def _exit_with(server: subprocess.Popen[bytes]) -> None:
    server.wait()
    if not _ending.is_set():
        os._exit(1)


if __name__ == "__main__":
    main()
