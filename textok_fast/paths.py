"""Where the library keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$TEXTOK_CACHE``, else ``$XDG_CACHE_HOME/textok-fast``, else ``~/.cache/textok-fast``. Not created here.

    The environment is read at every call, so a test or a job may redirect it. An empty variable counts as unset.
    """
    if chosen := os.environ.get("TEXTOK_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "textok-fast"
    return Path.home() / ".cache" / "textok-fast"
