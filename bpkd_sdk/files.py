"""Files that are read from disk: JSON whose errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8, with or without a byte-order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Save it again as UTF-8.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). It may be cut short or damaged.") from error
