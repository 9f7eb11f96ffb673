"""What lies in the file of ``--use_cache``."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any


def stored(cache: Any, **options: Any) -> dict[str, bytes]:
    """Key to value of all that a cache holds, the fingerprint among it; ``options`` are those of ``sqlite3.connect``.

    Whatever was being written is rolled back when the file is opened.
    """
    with closing(sqlite3.connect(cache, **options)) as database:
        return dict(database.execute("select key, value from unnamed"))
