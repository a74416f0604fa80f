"""Where things are kept that could be made again. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$PACKTRAIN_CACHE``, else ``~/.cache/packtrain``."""
    return Path(os.environ.get("PACKTRAIN_CACHE") or "~/.cache/packtrain").expanduser()
