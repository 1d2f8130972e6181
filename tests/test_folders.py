"""Folders that appear complete or not at all, and what killed runs leave of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest

from ptqkit import _folders
from ptqkit._folders import atomic_directory, check_path, new_parents, recover, resolve
from ptqkit.errors import UsageError

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone exchanges folders")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


def anything(target):
    """Let everything be replaced."""


def write(target, text):
    with atomic_directory(target, check=anything) as folder:
        (folder / "file").write_text(text)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@linux
def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    write(tmp_path / "x", "old")

    def renamed(*paths):
        raise AssertionError("the name was free for a moment")

    monkeypatch.setattr(_folders.os, "rename", renamed)
    write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "file").read_text() == "new" and names(tmp_path) == ["x"]


def test_a_folder_is_replaced_where_nothing_can_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(_folders, "_exchange", lambda one, other: False)
    for text in ("old", "new"):
        write(tmp_path / "x", text)
        assert (tmp_path / "x" / "file").read_text() == text and names(tmp_path) == ["x"]


def test_an_error_leaves_no_new_parents(tmp_path):
    (tmp_path / "mine").mkdir()
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), atomic_directory(tmp_path / "mine/a/b/x", check=anything):
            raise error
        with pytest.raises(error), new_parents(tmp_path / "mine/a/b"):
            raise error
        assert names(tmp_path / "mine") == []


CHILD = """
import sys, time
from pathlib import Path
from ptqkit import _folders

target, exchange, where = Path(sys.argv[1]), sys.argv[2] == "exchange", sys.argv[3]
if not exchange:
    _folders._exchange = lambda one, other: False

def stop(*paths, call=None, **options):
    done = call(*paths, **options) if call else None
    print("here", flush=True)
    time.sleep(60)

if where == "between":
    real = _folders.os.rename
    _folders.os.rename = lambda *paths: stop(*paths, call=real)
if where == "after":
    _folders.shutil.rmtree = stop
with _folders.atomic_directory(target, check=lambda path: None) as folder:
    (folder / "file").write_text("new")
    if where == "write":
        stop()
"""


def killed(target, exchange, where):
    """Run a writer that is killed at a certain point."""
    arguments = [str(target), "exchange" if exchange else "rename", where]
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), *arguments], stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"here\n"
    yield
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    yield


@posix
@pytest.mark.parametrize(
    ("exchange", "where", "kept"),
    [
        (True, "write", "old"),
        (False, "write", "old"),
        pytest.param(True, "after", "new", marks=linux),
        (False, "between", "old"),
    ],
)
def test_what_a_killed_run_left_is_cleared_up(tmp_path, exchange, where, kept):
    target = tmp_path / "x"
    write(target, "old")
    steps = killed(target, exchange, where)
    next(steps)
    left = names(tmp_path)
    assert len(left) == 2
    if where != "after":  # then only what has been replaced is left
        recover(target)
        assert names(tmp_path) == left  # of a living process
    next(steps)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recover(target)
    assert names(tmp_path) == ["x"] and (target / "file").read_text() == kept
    assert [str(w.message).split(" is back")[0] for w in told] == (
        [str(target)] if where == "between" else []
    )


def test_leftovers_that_may_be_needed_are_named(tmp_path, monkeypatch):
    write(tmp_path / "x", "mine")
    (tmp_path / ".x.01234567.old").mkdir()
    with pytest.warns(UserWarning, match="x.01234567.old seems to be what a run that was killed"):
        recover(tmp_path / "x")
    (tmp_path / ".x.01234567.old").rmdir()
    # Without locks nobody can tell whether its process lives.
    (tmp_path / ".x.01234567.tmp").mkdir()
    monkeypatch.setattr(_folders, "fcntl", None)
    with pytest.warns(UserWarning, match="x.01234567.tmp seems to be what a run that was killed"):
        recover(tmp_path / "x")
    assert names(tmp_path) == [".x.01234567.tmp", "x"]


def test_names_of_others_are_left_alone(tmp_path):
    for name in (".x.tmp", ".x.old", ".y.01234567.tmp", ".x.0123456.tmp", "x.01234567.tmp"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    recover(tmp_path / "x")
    assert names(tmp_path) == before


@posix
def test_two_writers_at_once(tmp_path):
    target = tmp_path / "x"
    write(target, "old")
    steps = killed(target, True, "write")
    next(steps)
    started = time.perf_counter()
    write(target, "second")
    assert time.perf_counter() - started < 20
    next(steps)
    write(target, "third")
    assert names(tmp_path) == ["x"] and (target / "file").read_text() == "third"


@posix
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("file", FileExistsError, "is a file: give another name"),
        ("/dev/null", FileExistsError, "is a device or the like"),
        ("file/x", NotADirectoryError, "file is a file; give another name"),
        ("n" * 250, UsageError, "the name is too long, 241 bytes at most"),
        ("d/" * 2500 + "x", UsageError, "the path is too long"),
        ("loop", UsageError, "lead in a circle"),
        ("loop/x", UsageError, "lead in a circle"),
        ("a\0b", UsageError, "cannot be the name of a folder"),
        ("/proc/x", PermissionError, "cannot be created in /proc"),
    ],
)
def test_names_that_cannot_be(tmp_path, name, kind, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    with pytest.raises(kind, match=message):
        check_path(resolve(tmp_path / name))
    with pytest.raises(kind, match=f"^--out.*{message}"):
        check_path(resolve(tmp_path / name, "--out"), "--out")
    assert names(tmp_path) == before


def test_links_are_followed(tmp_path):
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/file").read_text() == "text"
