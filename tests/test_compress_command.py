"""``fairseq-sha compress`` and ``decompress``, with a stand-in for the model."""

import errno
import fcntl
import io
import os
import pty
import re
import resource
import signal
import stat
import struct
import subprocess
import sys
import termios
import time

import pytest

import fairseq_sha
from fairseq_sha import commands, packed_file
from tests import stand_in_compress
from tests.commands import REPOSITORY
from tests.tiny_corpus import text

PROGRAM = [sys.executable, "-m", "tests.stand_in_compress"]
CONTENT = text(3000)
BLOCK = "1024"


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    module = stand_in_compress.portable()
    monkeypatch.setitem(sys.modules, "fairseq_sha.portable", module)
    monkeypatch.setattr(fairseq_sha, "portable", module, raising=False)
    return module


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


def run(*argv):
    command, *rest = (str(word) for word in argv)
    return commands.main([command, "--path", "model", *rest])


@pytest.fixture
def packed(file):
    """The file is gone."""
    assert run("compress", "--block-size", BLOCK, file) == 0
    file.unlink()
    return file.with_name("file.shac")


def damage(path, *places):
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 1
    path.write_bytes(content)


def in_process(*argv, **options):
    command, *rest = (str(word) for word in argv)
    return subprocess.run(
        [*PROGRAM, command, "--path", "model", *rest],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        **{"cwd": str(REPOSITORY), **options},
    )


# Files


def test_file_comes_back(file, capsys):
    file.chmod(0o640)
    os.utime(file, (10**9, 10**9))
    assert run("compress", "--block-size", "1K", "--streams", 2, file) == 0
    assert file.read_bytes() == CONTENT  # kept
    packed = file.with_name("file.shac")
    assert stat.S_IMODE(packed.stat().st_mode) == 0o640 and packed.stat().st_mtime == 10**9
    file.unlink()
    assert run("decompress", packed) == 0
    assert file.read_bytes() == CONTENT and packed.exists()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and file.stat().st_mtime == 10**9
    size = packed.stat().st_size
    rate = f"{8 * size / 3000:.3f}"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{file}: 3,000 to {size:,} bytes, {rate} bits per byte",
        f"{packed}: {size:,} to 3,000 bytes",
    ]
    assert sorted(os.listdir(file.parent)) == ["file", "file.shac"]


def test_named_pipe_is_read_once(tmp_path):
    """A writer must not see its reader go away."""
    pipe = tmp_path / "pipe"
    os.mkfifo(str(pipe))
    writer = subprocess.Popen(["sh", "-c", f"printf abc > '{pipe}'"])
    assert run("compress", pipe) == 0 and writer.wait(10) == 0
    pipe.unlink()
    assert run("decompress", tmp_path / "pipe.shac") == 0 and pipe.read_bytes() == b"abc"


def test_group_may_not_read_what_another_group_could(file, monkeypatch):
    def refuse(path, owner, group):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600  # nobody else could read meanwhile
        raise PermissionError(errno.EPERM, "Operation not permitted")

    file.chmod(0o664)
    monkeypatch.setattr(os, "chown", refuse)
    assert run("compress", file) == 0
    assert stat.S_IMODE(file.with_name("file.shac").stat().st_mode) == 0o604


def test_file_whose_name_is_that_of_standard_input(tmp_path):
    (tmp_path / "-").write_bytes(CONTENT)
    done = in_process("compress", "./-", input=b"", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(b"/")
    assert in_process("decompress", "-c", "./-.shac", cwd=tmp_path).stdout == CONTENT


def test_longest_names(tmp_path):
    path = tmp_path / ("\u00e9" * 125)
    path.write_bytes(CONTENT)
    assert run("compress", path) == 0
    assert path.with_name(path.name + ".shac").stat().st_size


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_nothing(tmp_path, number):
    os.mkfifo(str(tmp_path / "pipe"))
    process = subprocess.Popen(
        [*PROGRAM, "compress", "--path", "model", str(tmp_path / "pipe")],
        cwd=str(REPOSITORY),
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has them ignore SIGINT.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    with open(tmp_path / "pipe", "wb"):
        while process.poll() is None and not list(tmp_path.glob("*.unfinished")):
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert error.splitlines()[-1] == f"error: stopped by {signal.Signals(number).name}".encode()
    assert os.listdir(tmp_path) == ["pipe"]


def test_existing_files_are_left_alone_without_force(file, capsys):
    packed = file.with_name("file.shac")
    packed.write_bytes(b"old")
    assert run("compress", file) == 2
    assert f"warning: {packed}: exists already; move it away, or use --force" in _error(capsys)
    assert packed.read_bytes() == b"old"
    assert run("compress", "-f", file) == 0
    file.write_bytes(b"old")
    assert run("decompress", packed) == 2 and file.read_bytes() == b"old"
    assert run("decompress", "--force", packed) == 0 and file.read_bytes() == CONTENT
    file.unlink()
    file.mkdir()
    assert run("decompress", "--force", packed) == 2
    assert f"warning: {file}: exists already, and is a folder" in _error(capsys)


def _error(capsys):
    return capsys.readouterr().err


def test_files_that_are_skipped(packed, tmp_path, capsys):
    assert run("compress", packed) == 2
    assert f"warning: {packed}: ends in .shac already; --force packs it again" in _error(capsys)
    assert run("compress", tmp_path) == 2
    assert f"warning: {tmp_path}: is a folder; name the files in it" in _error(capsys)
    other = packed.rename(tmp_path / "other")
    assert run("decompress", other) == 2
    assert f"warning: {other}: does not end in .shac; rename it, or use" in _error(capsys)
    assert os.listdir(tmp_path) == ["other"]


def test_same_file_twice(packed, file, capsys):
    assert run("decompress", packed, packed) == 2
    assert _error(capsys).startswith(f"warning: {file}: exists already")
    assert file.read_bytes() == CONTENT


def test_exit_status_of_an_error_wins(file, tmp_path):
    missing = tmp_path / "missing"
    assert run("compress", missing, file) == 1
    assert run("compress", missing, file) == 1  # and a warning, since file.shac exists
    assert run("compress", file) == 2


def test_disk_that_is_full_names_the_file(file, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed_file, "pack", full)
    assert run("compress", file) == 1
    assert _error(capsys) == f"error: {file}: No space left on device\n"
    assert os.listdir(file.parent) == ["file"]


def test_another_installation_is_a_warning(file, portable, capsys):
    portable.load = lambda path: stand_in_compress.StandInCoder(build=b"here    ")
    assert run("compress", file) == 0
    portable.load = lambda path: stand_in_compress.StandInCoder(build=b"there   ")
    packed = file.with_name("file.shac")
    assert run("decompress", "--force", packed) == 2
    assert f"warning: {packed}: compressed with another installation" in _error(capsys)


# Standard input and output


@pytest.mark.parametrize("names", [[], ["-"]])
def test_standard_input_and_output(names):
    packed = in_process("compress", "--block-size", BLOCK, *names, input=CONTENT)
    assert packed.returncode == 0 and packed.stdout.startswith(b"SHAC\x02")
    assert in_process("decompress", *names, input=packed.stdout).stdout == CONTENT
    assert packed.stderr.startswith(b"maximum KB")  # and nothing else


def test_stdout(file):
    packed = in_process("compress", "-c", file)
    assert packed.returncode == 0 and os.listdir(file.parent) == ["file"]
    other = file.with_name("any name")
    other.write_bytes(packed.stdout)
    done = in_process("decompress", "--stdout", other, other)
    assert done.stdout == CONTENT * 2 and done.returncode == 0
    for names in (("-c", file, file), ("-", "-")):
        done = in_process("compress", *names)
        assert done.returncode == 1 and b"error: packed files cannot be joined" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("size", [1000, 2999])
def test_disk_that_is_full_is_an_error_of_standard_output(packed, unbuffered, size):
    def limit():  # a file that grows beyond this is an OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    with open(packed.with_name("out"), "wb") as out:
        done = subprocess.run(
            [*PROGRAM, "decompress", "--path", "model", "-c", str(packed)],
            cwd=str(REPOSITORY),
            stdout=out,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            preexec_fn=limit,
        )
    assert done.returncode == 1
    assert b"File too large" in done.stderr and b"Traceback" not in done.stderr


def test_pipe_that_gives_few_bytes_at_a_time(file):
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*PROGRAM, "compress", "--path", "model"],
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=str(REPOSITORY),
    )
    for start in range(0, len(CONTENT), 700):
        os.write(writing, CONTENT[start : start + 700])
    os.close(writing)
    out, _ = process.communicate()
    os.close(reading)
    assert run("compress", file) == 0
    assert out == file.with_name("file.shac").read_bytes()


def test_terminals(file, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for names in ([], ["-"], ["-c", file]):
        assert run("compress", *names) == 1
        error = capfdbinary.readouterr().err
        assert b"error: packed data is not written to a terminal; redirect" in error
    assert run("compress", "-c", "--force", file) == 0
    assert b"SHAC" in capfdbinary.readouterr().out
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert run("decompress") == 1
    error = capfdbinary.readouterr().err
    assert b"error: packed data is not read from a terminal; redirect" in error


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal_only(file, shown):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # lines, columns
    command = [*PROGRAM, "compress", "--path", "model", str(file)]
    stderr = theirs if shown else subprocess.PIPE
    done = subprocess.run(command, cwd=str(REPOSITORY), stderr=stderr, stdout=subprocess.PIPE)
    os.write(theirs, b"the end")
    seen = b""
    while not seen.endswith(b"the end"):
        seen += os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1
    assert (b"3.00k/3.00k" in seen) == shown and (b"3.00k" in (done.stderr or b"")) is False


# Damage


def test_damaged_file_is_not_restored(packed, capsys):
    damage(packed, 100)
    assert run("decompress", packed) == 1
    assert _error(capsys) == (
        f"error: {packed}: block 1 (bytes 0 to 1,023) damaged; --recover writes what is left\n"
    )
    assert os.listdir(packed.parent) == ["file.shac"]


def test_much_damage_is_one_line(packed, capsys):
    content = packed.read_bytes()
    starts = [match.start() for match in re.finditer(packed_file.BLOCK_MARKER, content)]
    packed.write_bytes(content + b"x")
    damage(packed, starts[0] + 40, starts[1] + 40)
    assert run("decompress", packed) == 1
    error = _error(capsys)
    assert error.count("\n") == 1 and error.count("damaged; ") == 2 and "after the end" in error


def test_recover(packed, file, capsys):
    damage(packed, 100)
    assert run("decompress", "--recover", packed) == 1
    printed = capsys.readouterr()
    assert file.read_bytes() == CONTENT[1024:]
    assert printed.err == f"error: {packed}: block 1 (bytes 0 to 1,023) damaged\n"
    assert printed.out.endswith(" to 1,976 bytes\n")
    packed.write_bytes(packed.read_bytes()[:100])
    assert run("decompress", "--recover", "--force", packed) == 1
    assert "bytes from 0 on are missing; nothing is left" in _error(capsys)
    assert file.read_bytes() == CONTENT[1024:]
    file.unlink()
    assert run("decompress", "--recover", packed) == 1 and not file.exists()


def test_damage_on_standard_input(packed):
    damage(packed, 100)
    whole = packed.read_bytes()
    for options, expected in (((), b""), (("--recover",), CONTENT[1024:])):
        done = in_process("decompress", *options, input=whole)
        assert done.returncode == 1 and done.stdout == expected
        assert b"error: standard input: block 1 (bytes 0 to 1,023) damaged" in done.stderr


def test_standard_input_that_begins_in_the_middle(packed):
    """It may be a file that another program has begun to read."""
    packed.write_bytes(b"12345" + packed.read_bytes())
    with open(packed, "rb") as source:
        source.seek(5)
        os.lseek(source.fileno(), 5, os.SEEK_SET)
        command = [*PROGRAM, "decompress", "--path", "model"]
        done = subprocess.run(command, stdin=source, stdout=subprocess.PIPE, cwd=str(REPOSITORY))
    assert done.stdout == CONTENT


def test_test(packed, tmp_path, capsys):
    capsys.readouterr()
    other = packed.with_name("any name")
    other.write_bytes(packed.read_bytes())
    assert run("decompress", "-t", packed, other) == 0
    printed = capsys.readouterr()
    assert printed.out == (f"{packed}: 3,000 bytes, undamaged\n{other}: 3,000 bytes, undamaged\n")
    damage(packed, 100)
    assert run("decompress", "--test", packed, other) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {packed}: block 1 (bytes 0 to 1,023) damaged\n"
    assert printed.out == f"{other}: 3,000 bytes, undamaged\n"
    assert sorted(os.listdir(tmp_path)) == ["any name", "file.shac"]


def test_content_that_decodes_to_something_else(packed, portable, capsys):
    """The packed bytes are intact, and their content is not what was packed."""

    class Wrong(stand_in_compress.StandInCoder):
        def decode(self, *args):
            return super().decode(*args)[::-1]

    portable.load = lambda path: Wrong()
    for options in ((), ("-t",), ("--recover",)):
        assert run("decompress", *options, packed) == 1
        assert "block 1 (bytes 0 to 1,023): its content does not have" in _error(capsys)
        assert os.listdir(packed.parent) == ["file.shac"]


def test_other_files(tmp_path, capsys):
    path = tmp_path / "x.shac"
    for content, message in (
        (b"SHAC\x01" + bytes(60), "has version 1 of the format"),
        (b"PK\x03\x04", "not a file that fairseq-sha compress wrote"),
        (b"", "not a file that fairseq-sha compress wrote"),
    ):
        path.write_bytes(content)
        assert run("decompress", path) == 1
        assert f"error: {path}: {message}" in _error(capsys)


def test_memory_limit(packed, capsys):
    assert run("decompress", "--memory-limit", "4K", packed) == 0
    assert run("decompress", "-f", "--memory-limit", "3K", packed) == 1
    assert "allow it with --memory-limit 4096\n" in _error(capsys)


# Models and options


@pytest.mark.parametrize("command", ["compress", "decompress"])
@pytest.mark.parametrize(
    "option", [["--data-bin", "x"], ["--user-dir", "x"], ["--model-overrides", "{'a': 1}"]]
)
def test_portable_model_has_no_settings(packed, file, command, option, capsys):
    file.write_bytes(CONTENT)
    name = file if command == "compress" else packed
    assert run(command, "--force", *option, name) == 1
    assert f"error: {option[0]}: a portable model holds all of its settings" in _error(capsys)


@pytest.mark.parametrize("number", ["", "K", "1.5M", "-1", "4T", "many"])
def test_byte_counts(number, capsys):
    with pytest.raises(SystemExit, match="^1$"):  # 2 is a warning
        run("compress", f"--block-size={number}", "x")
    assert "is not a number of bytes, such as 4096 or 4M" in _error(capsys)


# Memory


@pytest.mark.parametrize(
    "size, limit", [(1 << 26, 90), pytest.param(1 << 30, 90, marks=pytest.mark.long)]
)
def test_memory_does_not_grow_with_the_file(tmp_path, size, limit):
    """Compress a file of so many bytes, and unpack it; limit in MB."""
    path = tmp_path / "zeros"
    with open(path, "wb") as file:
        file.truncate(size)
    program = [*PROGRAM, "compress", "--path", "store", "-c", str(path)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": str(REPOSITORY)}
    packing = subprocess.Popen(program, **pipe)
    unpacking = subprocess.run(
        [*PROGRAM, "decompress", "--path", "store", "-t"], stdin=packing.stdout, **pipe
    )
    packing.stdout.close()
    errors = packing.stderr.read()
    assert packing.wait() == 0
    assert unpacking.stdout == f"standard input: {size:,} bytes, undamaged\n".encode()
    for output in (errors, unpacking.stderr):
        assert int(output.split()[-1]) < 1024 * limit


def test_big_block_needs_no_more_memory_than_it_says():
    """Unpacking needs ``MEMORY_PER_BYTE`` for each byte of a block, beside the program itself."""
    size = 1 << 25
    for path in ("zlib", "store"):
        coder = stand_in_compress.portable().load(path)
        packed = io.BytesIO()
        packed_file.pack(coder, io.BytesIO(bytes(2 * size)), packed, block_size=size)
        command = [*PROGRAM, "decompress", "--path", path, "-t"]
        done = subprocess.run(
            command, input=packed.getvalue(), capture_output=True, cwd=str(REPOSITORY)
        )
        assert done.returncode == 0
        used = 1024 * int(done.stderr.split()[-1])
        assert used < packed_file.MEMORY_PER_BYTE * size + (40 << 20)
