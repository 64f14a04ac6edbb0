"""``python -m textok_fast`` and the ``textok-fast`` script."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def run() -> None:
    """Runs :func:`textok_fast.cli.main` and exits with its status.

    Until the libraries are loaded nothing is at stake, and an exception in the middle of a C extension's import does harm:
    there Ctrl-C leaves at once. Afterwards it is a KeyboardInterrupt again.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from textok_fast.cli import main

    sys.exit(main())


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted before anything was begun\n")
    os._exit(130)


if __name__ == "__main__":
    run()
