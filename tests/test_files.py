"""Writing: whole or not at all, with a sentence that says what is amiss."""

from __future__ import annotations

import errno
import json

import pytest

from helpers import files


def test_an_interrupted_write_changes_nothing(tmp_path):
    path = tmp_path / "new" / "list.txt"
    files.write_lines(path, ["one\n", "two\n"])
    assert path.read_bytes() == b"one\ntwo\n"

    def breaks():
        yield "three\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_lines(path, breaks())
    assert path.read_bytes() == b"one\ntwo\n" and list(path.parent.iterdir()) == [path]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    with pytest.raises(OSError, match=r"list\.txt could not be written \(.*\): may files be written there\?"):
        files.write_text(tmp_path / "taken" / "list.txt", "text")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch, number):
    def full(_descriptor):
        raise OSError(number, "no more")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"\(no more\): make room on the disk"):
        files.write_text(tmp_path / "list.txt", "text")
    assert not list(tmp_path.iterdir())


def test_json_takes_only_what_it_has_a_form_for(tmp_path):
    path = tmp_path / "facts.json"
    files.write_json(path, {"a": [1, "ä"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "ä"]}
    with pytest.raises(TypeError, match=r"PosixPath|WindowsPath"):
        files.write_json(path, {"a": tmp_path})
    assert files.read_json(path, "") == {"a": [1, "ä"]}
    path.write_bytes(b"{")
    with pytest.raises(ValueError, match=r"facts\.json is damaged .*: make it again"):
        files.read_json(path, "make it again")


def test_a_checksum_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4's example
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
