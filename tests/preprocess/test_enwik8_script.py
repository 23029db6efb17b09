"""preprocess/enwik8.py, on a small corpus in enwik8's place and a web server on this machine."""

import hashlib
import http.server
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile

import enwik8
import pytest

from fairseq_sha.data import known_corpora

from .helpers import PREPROCESS, REPOSITORY, read_back, split_lines

CORPUS = bytes(range(256)) + bytes(random.Random(0).choices(range(256), k=800_000))
VALID, TEST = 4000, 5000
PARTS = CORPUS[: -VALID - TEST], CORPUS[-VALID - TEST : -TEST], CORPUS[-TEST:]
FAKE = ("enwik8", len(CORPUS), hashlib.sha1(CORPUS).hexdigest(), VALID, TEST)
CODE = (
    "import enwik8\nfrom fairseq_sha.data import data_bin, known_corpora\n"
    f"data_bin.run(lambda: enwik8.main(known=known_corpora.KnownCorpus(*{FAKE})))\n"
)


def main(argv):
    enwik8.main(argv, known=known_corpora.KnownCorpus(*FAKE))


def zipped(*members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, data in enumerate(members):
            archive.writestr(f"enwik8{i or ''}", data)
    return file.getvalue()


ZIP = zipped(CORPUS)


def convert(runner, *options):
    return runner.code(CODE, "--dest", "out", *options)


def check_folder(runner, done):
    assert done.returncode == 0, done.stderr
    assert read_back(runner.folder / "out") == [split_lines(part) for part in PARTS]


def test_customary_split():
    assert enwik8.ENWIK8 == (
        *("enwik8", 100_000_000, "57b8363b814821dc9d47aa4d41f58733519076b2"),
        *(5_000_000, 5_000_000),
    )


@pytest.mark.parametrize("data", [ZIP, CORPUS], ids=["zip", "raw"])
def test_input(runner, data):
    """What a file is shows in its bytes, not in its name."""
    done = convert(runner, "--input", runner.write(data))
    check_folder(runner, done)
    assert done.stderr == ""
    assert sorted(os.listdir(str(runner.folder))) == ["input", "out"]


def damaged_middle(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


MISTAKES = {
    "shorter": (CORPUS[:-1], "800,255 bytes"),
    "longer": (CORPUS + b"x", "more bytes"),
    "other bytes": (damaged_middle(CORPUS), "SHA-1"),
    "empty": (b"", "0 bytes"),
    "zip of a shorter one": (zipped(CORPUS[:-1]), "800,255 bytes"),
    "zip of a longer one": (zipped(CORPUS + b"x"), "more bytes"),
    "zip of other bytes": (zipped(damaged_middle(CORPUS)), "SHA-1"),
    "zip of two files": (zipped(CORPUS, CORPUS), "one file"),
    "zip of nothing": (b"PK\x03\x04" + zipped(), "one file"),
    "truncated zip": (ZIP[:-1000], "damaged"),
    "beginning of a zip": (ZIP[:1000], "damaged"),
    "zip with a wrong byte": (damaged_middle(ZIP), "damaged"),
}


@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_wrong_input(runner, case):
    data, words = MISTAKES[case]
    argv = ["--dest", "out", "--input", runner.write(data)]
    runner.check_user_error(main, argv, "input", words, "give another --input")


def test_missing_input(runner):
    runner.check_error(convert(runner, "--input", "input"), "input", "No such file", files=[])


# The download.


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.content``; ``server.mode`` says how well."""

    def do_GET(self):
        content, mode = self.server.content, self.server.mode
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if mode == "missing":
            self.send_error(404)
            return
        begin = int(wanted[len("bytes=") : -1]) if wanted and mode != "no ranges" else 0
        if begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if begin:
            self.send_response(206)
            shift = 1 if mode == "wrong range" else 0
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {begin - shift}-{last}/{len(content)}")
        else:
            self.send_response(200)
        body = content[begin:]
        if mode != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mode in ("breaks off", "stalls") else body)
        if mode == "stalls":
            self.server.tested.wait(30)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.tested = threading.Event()
    server.content, server.mode, server.ranges = ZIP, "", []
    server.url = f"http://127.0.0.1:{server.server_port}/enwik8.zip"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.tested.set()
    server.shutdown()
    thread.join()
    server.server_close()


def download(runner, url, *options):
    """Convert without --input; returns the completed process."""
    return runner.code(CODE, "--dest", "out", "--url", url, *options, env={"no_proxy": "*"})


@pytest.mark.parametrize("mode", ["", "no length"])
def test_download(runner, server, mode):
    server.mode = mode
    done = download(runner, server.url)
    check_folder(runner, done)
    assert server.ranges == [None]
    assert "downloading enwik8.zip" in done.stderr
    if not mode:
        assert "100%" in done.stderr.splitlines()[-1]
    assert (runner.folder / "enwik8.zip").read_bytes() == ZIP
    assert sorted(os.listdir(str(runner.folder))) == ["enwik8.zip", "out"]


def test_second_time_does_not_download(runner, server):
    runner.write(ZIP, "enwik8.zip")
    check_folder(runner, download(runner, server.url))
    assert server.ranges == []


def test_broken_download_goes_on(runner, server):
    server.mode = "breaks off"
    done = download(runner, server.url)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: cannot download {server.url}: the connection closed")
    assert "run again" in error and "--input" in error
    assert "Traceback" not in done.stderr
    assert os.listdir(str(runner.folder)) == ["enwik8.zip.part"]
    have = (runner.folder / "enwik8.zip.part").stat().st_size
    assert 0 < have < len(ZIP)

    server.mode = ""
    check_folder(runner, download(runner, server.url))
    assert server.ranges == [None, f"bytes={have}-"]
    assert sorted(os.listdir(str(runner.folder))) == ["enwik8.zip", "out"]


def test_server_that_stalls(runner, server):
    server.mode = "stalls"
    code = "from fairseq_sha.data import downloads; downloads.TIMEOUT = 0.5\n" + CODE
    done = runner.code(code, "--dest", "out", "--url", server.url, env={"no_proxy": "*"})
    assert done.returncode == 1
    assert "timed out; run again" in done.stderr.splitlines()[-1]
    assert os.listdir(str(runner.folder)) == ["enwik8.zip.part"]


def test_signal_during_download(runner, server):
    server.mode = "stalls"
    part = runner.folder / "enwik8.zip.part"
    half = len(ZIP) // 2
    process = subprocess.Popen(
        [sys.executable, str(PREPROCESS / "enwik8.py"), "--dest", "out", "--url", server.url],
        env={**os.environ, "no_proxy": "*", "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    # What arrives is written in large pieces, of which the first need not have come.
    while not (server.ranges and part.exists()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert error.splitlines()[-1] == "error: stopped by SIGTERM"
    assert "Traceback" not in error
    assert os.listdir(str(runner.folder)) == ["enwik8.zip.part"]
    assert part.stat().st_size <= half


def test_server_without_ranges_starts_over(runner, server):
    server.mode = "no ranges"
    runner.write(b"x" * 1000, "enwik8.zip.part")
    check_folder(runner, download(runner, server.url))
    assert server.ranges == ["bytes=1000-"]


def test_complete_part_is_used(runner, server):
    runner.write(ZIP, "enwik8.zip.part")
    check_folder(runner, download(runner, server.url))
    assert server.ranges == [f"bytes={len(ZIP)}-"]


def test_part_longer_than_the_file_starts_over(runner, server):
    runner.write(ZIP + b"x", "enwik8.zip.part")
    check_folder(runner, download(runner, server.url))
    assert server.ranges == [f"bytes={len(ZIP) + 1}-", None]


def test_wrong_range_is_an_error(runner, server):
    server.mode = "wrong range"
    runner.write(ZIP[:1000], "enwik8.zip.part")
    done = download(runner, server.url)
    runner.check_error(done, "another part", files=["enwik8.zip.part"])


def test_damaged_download(runner, server):
    server.content = damaged_middle(ZIP)
    done = download(runner, server.url)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "enwik8.zip is damaged" in error and "delete it and run again" in error
    assert os.listdir(str(runner.folder)) == ["enwik8.zip"]


def test_server_has_no_such_file(runner, server):
    server.mode = "missing"
    runner.check_error(download(runner, server.url), server.url, "Not Found", files=[])


def test_no_server(runner, server):
    url = server.url.replace(str(server.server_port), "1")
    done = download(runner, url)
    runner.check_error(done, url, "refused", "run again", "--input", files=[])


def test_url_that_is_none(runner):
    runner.check_error(download(runner, "enwik8.zip"), "unknown url type", files=[])


def test_dest_is_checked_before_the_download(runner, server):
    (runner.folder / "out").mkdir()
    runner.write(b"precious", "out/mine")
    runner.check_error(download(runner, server.url), "already exists", files=["out"])
    assert server.ranges == []


def test_download_goes_beside_dest(runner, server):
    done = download(runner, server.url, "--dest", "a/b/enwik8")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(str(runner.folder / "a" / "b"))) == ["enwik8", "enwik8.zip"]


def test_download_cannot_be_written_halfway(runner, server):
    """What is wrong is the disk, not the network."""
    code = (
        "import errno, io\n"
        "from fairseq_sha.data import downloads\n"
        "class Full(io.BytesIO):\n"
        "    def write(self, data): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "downloads.open_part = lambda part, mode: Full()\n"
    )
    done = runner.code(code + CODE, "--dest", "out", "--url", server.url, env={"no_proxy": "*"})
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: cannot write") and "No space left" in error
    assert "free some space" in error and "cannot download" not in error


def test_download_cannot_be_written(runner, server):
    runner.write(b"")
    done = download(runner, server.url, "--dest", "input/x/enwik8")
    runner.check_error(done, "cannot write", "input is a file", "another --dest")
