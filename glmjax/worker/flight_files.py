"""The flight recorder's files: what an engine has dispatched lately, kept where somebody may want to see it again."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from glmjax.serving.engine import Engine
from glmjax.serving.errors import ClosedError

MOST_FILES = 16
"""Recordings that are kept; the oldest make room."""
_LOG = logging.getLogger(__name__)


class FlightFiles:
    """Of one engine.

    Args:
        engine: whose.
        folder: for the files; made if it is not there.

    Raises:
        OSError: there is no such folder, and none can be made.
    """

    def __init__(self, engine: Engine, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._engine, self._folder, self._garbled = engine, folder, 0

    def look(self) -> Path | None:
        """Write one if an output has been garbled since the last look."""
        stats = self._engine.stats()
        before, self._garbled = self._garbled, stats.aborts + stats.restarts
        return self.write("garbled") if self._garbled > before else None

    def write(self, reason: str) -> Path | None:
        """Write one; None where that was not possible.

        Args:
            reason: part of the file's name.
        """
        path = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06d}-{reason}.json.gz"
        try:
            self._engine.record(path)
            for old in sorted(self._folder.glob("*.json.gz"))[:-MOST_FILES]:
                old.unlink(missing_ok=True)
        except (OSError, ClosedError):
            _LOG.exception("no recording was written")
            return None
        _LOG.warning("recorded: %s; python -m glmjax.serving.replay shows it again", path)
        return path
