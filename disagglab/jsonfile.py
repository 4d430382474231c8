"""A file that holds one JSON object: read, or refused in one way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from disagglab.errors import ConfigError, Problem


def read(path: Path, mend: str) -> dict[str, Any]:
    """The object of a JSON file; one that ends in ``.gz`` is unpacked.

    Args:
        mend: what to do about a file that is missing, damaged or something else.

    Raises:
        ConfigError: if it cannot be read, is not JSON, or holds another kind of value.
    """

    def refused(wrong: str) -> ConfigError:
        return ConfigError([Problem(str(path), "(whole file)", wrong, mend)])

    try:
        content = path.read_bytes()
        raw = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except FileNotFoundError as error:
        raise refused("missing") from error
    except (OSError, EOFError) as error:
        raise refused(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, RecursionError) as error:
        raise refused(f"not JSON, cut off perhaps: {error}") from error
    if not isinstance(raw, dict):
        raise refused(f"holds a {type(raw).__name__}, not an object")
    return raw
