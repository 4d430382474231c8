"""JSON files: read as an object, or refused with file and mend."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from disagglab import jsonfile
from disagglab.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.json", b"{", "not JSON, cut off perhaps"),
        ("a.json", b"[]", "holds a list, not an object"),
        ("a.json", b"\xff\xfe\x00", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json.gz", b"{}", "cannot be read"),
        ("a.json.gz", gzip.compress(b'{"a": 1}')[:-9], "cannot be read"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path: Path, name: str, content: bytes, wrong: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        jsonfile.read(path, "copy it again")
    (problem,) = caught.value.problems
    assert (problem.file, problem.key, problem.mend) == (str(path), "(whole file)", "copy it again")
    assert problem.wrong.startswith(wrong)


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    """A folder is something else: it is there."""
    for path, wrong in ((tmp_path / "none.json", "missing"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(ConfigError) as caught:
            jsonfile.read(path, "name a file")
        assert caught.value.problems[0].wrong == wrong


def test_an_object_is_read_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": 1}')
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"a": 1}'))
    assert jsonfile.read(tmp_path / "a.json", "") == jsonfile.read(tmp_path / "a.json.gz", "") == {"a": 1}
