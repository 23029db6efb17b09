"""Files appear when they are complete, or not at all."""

import os
import resource
import stat
import subprocess
import sys

import pytest

from fairseq_sha.files import locked, try_lock, unfinished, write_atomically


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"\x00\xff\r\n", b"\x00\xff\r\n"),
        ("Zürich\n", b"Z\xc3\xbcrich\n"),
        (os.fsdecode(b"name \xe9"), b"name ?"),
        ("", b""),
    ],
)
def test_content(tmp_path, content, expected):
    for path in (tmp_path / "x", str(tmp_path / "x")):  # the second replaces the first
        write_atomically(path, content)
        assert (tmp_path / "x").read_bytes() == expected
        assert os.listdir(tmp_path) == ["x"]


def test_ordinary_permissions(tmp_path):
    write_atomically(tmp_path / "ours", "")
    (tmp_path / "ordinary").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "ordinary")]
    assert modes[0] == modes[1]


def test_two_writers_do_not_meet(tmp_path):
    """The last one to end wins. Nobody else's file is touched."""
    (tmp_path / "x.unfinished").write_bytes(b"another's")
    with unfinished(tmp_path / "x") as first:
        with unfinished(tmp_path / "x") as second:
            second.write_bytes(b"second")
            first.write_bytes(b"fir")
        with first.open("ab") as file:
            file.write(b"st")
        assert (tmp_path / "x").read_bytes() == b"second"
    assert (tmp_path / "x").read_bytes() == b"first"
    assert (tmp_path / "x.unfinished").read_bytes() == b"another's"
    assert sorted(os.listdir(tmp_path)) == ["x", "x.unfinished"]


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_what_was_there(tmp_path, old):
    if old:
        (tmp_path / "x").write_bytes(old)

    def limit():  # a file that grows beyond this is an OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fairseq_sha.files import write_atomically\n"
        "try: write_atomically('x', bytes(20_000))\n"
        "except OSError as error: print(error.strerror)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code, root], cwd=tmp_path, capture_output=True, preexec_fn=limit
    )
    assert done.stdout == b"File too large\n", done.stderr
    assert os.listdir(tmp_path) == (["x"] if old else [])
    assert not old or (tmp_path / "x").read_bytes() == old


def test_a_lock_is_held_against_threads_and_processes(tmp_path):
    path = tmp_path / "lock"
    script = f"from fairseq_sha.files import try_lock; print(try_lock({str(path)!r}) is None)"
    command = [sys.executable, "-c", script]

    def is_locked_elsewhere():
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"True\n"

    with try_lock(path):
        assert try_lock(path) is None and is_locked_elsewhere()
    with locked(path):
        assert try_lock(path) is None and is_locked_elsewhere()
    assert not is_locked_elsewhere()
