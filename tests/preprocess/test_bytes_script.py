"""preprocess/bytes.py: any file of bytes to a data-bin folder."""

import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time

import bytes as bytes_script
import pytest

from fairseq_sha.data import data_bin

from .helpers import PREPROCESS, REPOSITORY, read_back, split_lines

TEXT = b"".join(b"line %d\n" % i for i in range(100))


def convert(runner, data, valid, test, *options):
    """Run the script on ``data``; returns the folder."""
    sizes = ("--valid-bytes", valid, "--test-bytes", test)
    done = runner.script("bytes", "--input", runner.write(data), "--dest", "out", *sizes, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(os.listdir(str(runner.folder))) == ["input", "out"]
    return runner.folder / "out"


CASES = {
    "no newline at all": (b"abcabcabc", 3, 3),
    "nothing but newlines": (b"\n" * 9, 3, 2),
    "ends with a newline": (b"ab\nab\nab\n", 3, 3),
    "consecutive newlines": (b"\n\nab\n\n\nba\n\nab\n\n", 5, 4),
    "splits begin within a line": (b"abba\nabba\nabba", 6, 6),
    "splits of two bytes": (b"ab" * 3, 2, 2),
    "carriage returns are bytes like others": (b"\r\n\x0c\x1c\x85\r\n" * 3, 7, 7),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_round_trip(runner, case):
    data, valid, test = CASES[case]
    train = len(data) - valid - test
    parts = data[:train], data[train : train + valid], data[train + valid :]
    folder = convert(runner, data, valid, test)
    assert read_back(folder) == [split_lines(part) for part in parts]


def test_round_trip_of_random_bytes_and_many_chunks(runner):
    rng = random.Random(0)
    data = bytes(range(256)) + bytes(rng.choices(range(256), k=700000))
    parts = data[:-60002], data[-60002:-30001], data[-30001:]
    folder = convert(runner, data, 30001, 30001)
    assert read_back(folder) == [split_lines(part) for part in parts]


def test_same_input_gives_same_files(runner):
    folder = convert(runner, TEXT, 100, 100)
    again = runner.script(
        *("bytes", "--input", "input", "--dest", "again"),
        *("--valid-bytes", 100, "--test-bytes", 100),
    )
    assert again.returncode == 0
    names = ["dict.txt"] + [f"{s}.{e}" for s in ("train", "valid", "test") for e in ("bin", "idx")]
    assert sorted(os.listdir(str(folder))) == sorted(names)
    for name in names:
        assert (folder / name).read_bytes() == (runner.folder / "again" / name).read_bytes()


@pytest.mark.parametrize(
    "options, valid, test",
    [
        ((), 50, 50),
        (("--valid-percent", "2.57"), 25, 50),
        (("--valid-percent", "32.3", "--test-percent", "1/3"), 323, 3),
    ],
)
def test_percent_is_exact_and_rounds_down(runner, options, valid, test):
    done = runner.script("bytes", "--input", runner.write(b"ab" * 500), "--dest", "out", *options)
    assert done.returncode == 0, done.stderr
    sizes = [(runner.folder / "out" / f"{s}.bin").stat().st_size // 2 for s in ("valid", "test")]
    assert sizes == [valid, test]


def test_summary(runner):
    done = runner.script("bytes", "--input", runner.write(TEXT), "--dest", "a/b/out")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "train: 712 bytes, 91 lines"
    assert lines[3] == "dictionary: 24 symbols, 16 of them bytes"
    assert lines[4] == f"data-bin folder: {runner.folder / 'a/b/out'}"
    assert lines[5].startswith("took ")


def test_folder_has_ordinary_permissions(runner):
    folder = convert(runner, TEXT, 100, 100)
    (runner.folder / "ordinary").mkdir()
    mode = stat.S_IMODE((runner.folder / "ordinary").stat().st_mode)
    assert stat.S_IMODE(folder.stat().st_mode) == mode


# A dest that exists: an empty folder. It may be a mount point, such as a Docker volume.


def test_existing_folder_is_filled_and_not_replaced(runner):
    """Another folder in its place would lack its owner and permissions. A new file system has a
    folder lost+found, and a killed run leaves one of its own."""
    (runner.folder / "out").mkdir(mode=0o750)
    (runner.folder / "out" / "lost+found").mkdir()
    (runner.folder / "out" / ".out.0123.partial").mkdir()
    before = (runner.folder / "out").stat()
    splits = read_back(convert(runner, TEXT, 100, 100))
    assert b"".join(sum(splits, [])) == TEXT
    after = (runner.folder / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    names = ["dict.txt"] + [f"{s}.{e}" for s in ("train", "valid", "test") for e in ("bin", "idx")]
    names += ["lost+found", ".out.0123.partial"]
    assert sorted(os.listdir(str(runner.folder / "out"))) == sorted(names)


@pytest.mark.parametrize("place", [".", "o[u]t"])
def test_what_a_killed_run_has_left_is_named(tmp_path, capsys, place):
    left = tmp_path / place / ".o[u]t.0123.partial"
    left.mkdir(parents=True)
    (left.parent / ".other.0123.partial").mkdir()
    data_bin.checked_dest(tmp_path / "o[u]t")
    out = capsys.readouterr().out
    assert out.startswith(f"{left}: left by a command that was killed") and out.count("\n") == 1


def test_existing_folder_is_left_empty_by_a_failure(runner):
    (runner.folder / "out").mkdir()
    data = b"ab" * 50 + b"abab" + b"abZb"
    sizes = ("--valid-bytes", 4, "--test-bytes", 4)
    options = ["--input", runner.write(data), "--dest", "out", *sizes]
    runner.check_user_error(bytes_script.main, options, "byte 90", files=["input", "out"])
    assert os.listdir(str(runner.folder / "out")) == []


@pytest.mark.parametrize("failing", range(7))
def test_failure_while_an_existing_folder_is_filled(runner, monkeypatch, failing):
    """At each of the seven files; the dictionary, which fairseq reads first, is the last."""
    (runner.folder / "out").mkdir()
    rename, seen = os.rename, []

    def fail(source, target):
        assert "dict.txt" not in os.listdir(str(runner.folder / "out"))
        seen.append(target.name)
        if len(seen) > failing:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    options = ["--input", runner.write(TEXT), "--dest", "out"]
    words = ("cannot write", "Input/output error")
    runner.check_user_error(bytes_script.main, options, *words, files=["input", "out"])
    assert (seen[-1] == "dict.txt") == (failing == 6)
    assert os.listdir(str(runner.folder / "out")) == []


def test_folder_that_is_filled_meanwhile_is_left_alone(runner, monkeypatch):
    (runner.folder / "out").mkdir()
    write_dictionary = data_bin.write_dictionary

    def meanwhile(*args):
        runner.write(b"precious", "out/dict.txt")
        write_dictionary(*args)

    monkeypatch.setattr(data_bin, "write_dictionary", meanwhile)
    options = ["--input", runner.write(TEXT), "--dest", "out"]
    words = ("already exists", "holds dict.txt")
    runner.check_user_error(bytes_script.main, options, *words, files=["input", "out"])
    assert os.listdir(str(runner.folder / "out")) == ["dict.txt"]
    assert (runner.folder / "out" / "dict.txt").read_bytes() == b"precious"


@pytest.fixture
def mount(runner):
    """A function that mounts something on ``out``."""
    folder = runner.folder / "out"
    folder.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", *map(str, options), str(folder)], stderr=subprocess.PIPE)
        if done.returncode:
            pytest.skip(f"mount points need the right to mount: {done.stderr.decode().strip()}")

    yield mount
    # Lazily, since fairseq keeps the files that it read mapped into memory.
    subprocess.run(["umount", "--lazy", str(folder)], stderr=subprocess.DEVNULL)


def bind_options(runner):
    (runner.folder / "volume").mkdir()
    return ("--bind", runner.folder / "volume")


@pytest.mark.parametrize("kind", ["file system", "bind"])
def test_mount_point(runner, mount, kind):
    mount(*(bind_options(runner) if kind == "bind" else ("-t", "tmpfs", "none")))
    done = runner.script("bytes", "--input", runner.write(TEXT), "--dest", "out")
    assert done.returncode == 0, done.stderr
    assert b"".join(sum(read_back(runner.folder / "out"), [])) == TEXT
    assert len(os.listdir(str(runner.folder / "out"))) == 7


def test_mount_point_that_cannot_be_written_costs_no_work(runner, mount, monkeypatch):
    mount("-t", "tmpfs", "-o", "ro", "none")
    monkeypatch.setattr(data_bin, "convert", None)
    options = ["--input", runner.write(TEXT), "--dest", "out"]
    words = ("cannot write", "out is not writable", "another --dest")
    runner.check_user_error(bytes_script.main, options, *words, files=["input", "out"])


def test_memory_does_not_grow_with_the_input(runner):
    # Newlines are the worst case: an item of 12 bytes of index for each byte.
    runner.write(b"\n" * 20_000_000)
    done = runner.code(
        "import tracemalloc, bytes; tracemalloc.start(); bytes.main()\n"
        "print('peak', tracemalloc.get_traced_memory()[1])",
        *("--input", "input", "--dest", "out"),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("peak ")[1]) < 20_000_000


# Bytes that train lacks.


def test_unseen_byte(runner):
    data = b"ab" * 50 + b"abab" + b"abZb"
    done = runner.script(
        *("bytes", "--input", runner.write(data), "--dest", "out"),
        *("--valid-bytes", 4, "--test-bytes", 4),
    )
    runner.check_error(
        done, "byte 90 ", "offset 2 of the test split", "offset 106 of input", "--all-bytes"
    )


def test_unseen_byte_far_into_the_split(runner):
    data = b"ab" * 400000 + b"a" * 300000 + b"\xff" + b"a" * 99999 + b"ab"
    done = runner.script(
        *("bytes", "--input", runner.write(data), "--dest", "out"),
        *("--valid-bytes", 400000, "--test-bytes", 2),
    )
    runner.check_error(done, "byte 255 ", "offset 300000 of the valid split", "offset 1100000 of")


def test_all_bytes(runner):
    data = b"ab" * 50 + b"\x00\n\xff" + b"Zb"
    folder = convert(runner, data, 3, 2, "--all-bytes")
    assert read_back(folder) == [[data[:100]], [b"\x00\n", b"\xff"], [b"Zb"]]
    lines = (folder / "dict.txt").read_text().splitlines()
    assert len(lines) == 260  # 255 bytes and 5 for padding; with the 4 specials 264
    assert lines[:4] == ["97 50", "98 50", "0 0", "1 0"]
    assert lines[-1] == "madeupword0004 0"


# The user's mistakes.


@pytest.mark.parametrize(
    "options, words",
    [
        (("--input", "nowhere"), ("nowhere", "No such file")),
        (("--input", "."), ("folder", "give a file")),
        (("--input", "input/x"), ("input/x", "Not a directory")),
        (("--input", "/dev/null"), ("/dev/null", "not a regular file")),
        (("--input", "input", "--valid-bytes", "900", "--test-bytes", "1"), ("train -1", "test 1")),
        (("--input", "input", "--valid-bytes", "0", "--test-bytes", "10"), ("valid 0",)),
        (("--input", "input", "--valid-percent", "0.01"), ("valid 0", "at least 2")),
        (("--input", "input", "--valid-percent", "99.9"), ("train -4", "other sizes")),
        (("--input", "input", "--dest", "input"), ("already exists", "another --dest")),
        (("--input", "input", "--dest", "."), ("already exists", "another --dest")),
        (("--input", "input", "--dest", "input/x"), ("input is a file", "another --dest")),
        (("--input", "input", "--dest", "input/x/y"), ("input is a file", "another --dest")),
        (("--input", "input", "--dest", "/dev"), ("already exists",)),
        (("--input", "input", "--dest", "o" * 300), ("File name too long", "another --dest")),
    ],
)
def test_mistakes(runner, options, words):
    runner.write(b"a" * 900)
    runner.check_user_error(bytes_script.main, ["--dest", "out", *options], *words)


def test_mistake_as_the_user_sees_it(runner):
    options = ("bytes", "--input", "nowhere", "--dest", "out")
    done = runner.script(*options)
    runner.check_error(done, "cannot read nowhere", "No such file", "check the path", files=[])
    done = runner.script(*options, env={"FAIRSEQ_SHA_TRACEBACK": "1"})
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


@pytest.mark.parametrize("data", [b"", b"abcde"])
def test_input_too_small(runner, data):
    done = runner.script("bytes", "--input", runner.write(data), "--dest", "out")
    runner.check_error(done, "input", "empty" if not data else "5 bytes", "give a")


def test_pipe_is_refused_without_waiting(runner):
    os.mkfifo(str(runner.folder / "pipe"))
    done = runner.script("bytes", "--input", "pipe", "--dest", "out")
    runner.check_error(done, "pipe", "not a regular file", files=["pipe"])


def test_full_dest_is_left_alone(runner):
    runner.write(TEXT)
    (runner.folder / "out").mkdir()
    runner.write(b"precious", "out/mine")
    done = runner.script("bytes", "--input", "input", "--dest", "out")
    runner.check_error(done, "out", "already exists", "holds mine", files=["input", "out"])
    assert (runner.folder / "out" / "mine").read_bytes() == b"precious"


def test_disk_full(runner):
    runner.write(b"a" * 3_000_000)

    def limit():  # a file that grows beyond this is an OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = runner.script("bytes", "--input", "input", "--dest", "out", preexec_fn=limit)
    runner.check_error(done, "cannot write", "out", "File too large", "free some space")


def test_no_permission(runner):
    """Root may read and write everything, hence without the file system's help."""
    runner.write(TEXT)
    code = (
        "import builtins, sys, bytes\n"
        "from fairseq_sha.data import data_bin\n"
        "mode, real = sys.argv.pop(), open\n"
        "def refuse(path, how='r', *args, **options):\n"
        "    if how == mode: raise PermissionError(13, 'Permission denied', str(path))\n"
        "    return real(path, how, *args, **options)\n"
        "builtins.open = refuse\n"
        "data_bin.run(bytes.main)\n"
    )
    for mode, words in (("rb", "cannot read input"), ("wb", "cannot write")):
        done = runner.code(code, "--input", "input", "--dest", "out", mode)
        runner.check_error(done, words, "Permission denied")


@pytest.mark.skipif(
    os.geteuid() == 0,
    reason="root may open every file; run as another user, or see the test before",
)
def test_no_permission_in_the_file_system(runner):
    runner.write(TEXT)
    (runner.folder / "input").chmod(0)
    done = runner.script("bytes", "--input", "input", "--dest", "out")
    runner.check_error(done, "cannot read input", "Permission denied")
    (runner.folder / "input").chmod(0o600)
    (runner.folder / "locked").mkdir()
    (runner.folder / "locked").chmod(0o500)
    done = runner.script("bytes", "--input", "input", "--dest", "locked/out")
    runner.check_error(done, "cannot write", "locked is not writable", files=["input", "locked"])


@pytest.mark.parametrize("change", ["b.truncate(300)", "b.write(b'\\n' * 300)"])
def test_input_changes_meanwhile(runner, change):
    runner.write(TEXT)
    code = (
        "import bytes\nfrom fairseq_sha.data import data_bin\n"
        "real = data_bin.write_dictionary\n"
        "def write_dictionary(*args):\n"
        f"    with open('input', 'r+b') as b: {change}\n"
        "    real(*args)\n"
        "data_bin.write_dictionary = write_dictionary\n"
        "data_bin.run(bytes.main)\n"
    )
    done = runner.code(code, "--input", "input", "--dest", "out")
    runner.check_error(done, "changed while it was read", "run again")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--valid-bytes", "5", "--test-percent", "5"), "both in bytes or both in percent"),
        (("--valid-bytes", "5"), "need each other"),
        (("--valid-bytes", "5", "--test-bytes", "-5"), "--test-bytes"),
        (("--valid-bytes", "5", "--test-bytes", "1.5"), "not a number of bytes"),
        (("--valid-percent", "lots"), "not a number"),
        (("--valid-percent", "1/0"), "not a number"),
        (("--valid-percent", "0"), "between 0 and 100"),
        (("--valid-percent", "100"), "between 0 and 100"),
        (("--valid-percent", "nan"), "not a number"),
    ],
)
def test_wrong_options(runner, capsys, options, words):
    with pytest.raises(SystemExit) as caught:
        bytes_script.main(["--input", runner.write(TEXT), "--dest", "out", *options])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(str(runner.folder)) == ["input"]


@pytest.mark.parametrize("name", ["bytes", "enwik8", "enwiki6"])
def test_help_is_the_docstring(runner, name):
    done = runner.script(name, "--help")
    assert done.returncode == 0
    assert f"python preprocess/{name}.py --dest" in done.stdout.replace("--input FILE ", "")


# Interruption.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_nothing(runner, number):
    with open(str(runner.folder / "input"), "wb") as file:
        file.truncate(120_000_000)  # zeros that take no room on the disk
    process = subprocess.Popen(
        [sys.executable, str(PREPROCESS / "bytes.py"), "--input", "input", "--dest", "out"],
        cwd=str(runner.folder),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has them ignore SIGINT.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not list(runner.folder.glob(".out.*/train.bin")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err.decode() == f"error: stopped by {signal.Signals(number).name}\n"
    assert out == b""
    assert os.listdir(str(runner.folder)) == ["input"]


def test_ignored_signal_stays_ignored(runner):
    code = (
        "import os, signal, bytes\n"
        "from fairseq_sha.data import data_bin\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does
        "def main():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    bytes.main()\n"
        "data_bin.run(main)\n"
    )
    done = runner.code(code, "--input", runner.write(TEXT), "--dest", "out")
    assert done.returncode == 0, done.stderr
