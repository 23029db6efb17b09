"""``fairseq-sha rivals``, and the text of data folders that it reads."""

import bz2
import json
import subprocess
import sys

import numpy as np
import pytest

import fairseq_sha
from fairseq_sha import UserError
from fairseq_sha.commands import main
from fairseq_sha.compare import compressors
from fairseq_sha.compare.texts import read_text
from tests import stand_in_compress
from tests.commands import REPOSITORY
from tests.tiny_corpus import text, write_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def preprocess(script, tmp_path, content, *options):
    """A data folder made of these bytes by a script in preprocess/."""
    (tmp_path / "input").write_bytes(content)
    command = [sys.executable, REPOSITORY / "preprocess" / script, "--input", tmp_path / "input"]
    command += ["--dest", tmp_path / "made", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return tmp_path / "made"


def test_text_is_what_was_preprocessed(data, tmp_path):
    assert read_text(data, "train") == text(6000, 1) and read_text(data, "test") == text(833, 3)
    content = bytes(np.random.RandomState(1).permutation(np.arange(20_000) % 256).astype(np.uint8))
    made = preprocess("bytes.py", tmp_path, content, "--valid-percent", "5", "--test-percent", "5")
    parts = [read_text(made, split) for split in ("train", "valid", "test")]
    assert b"".join(parts) == content and len(parts[2]) == 1000


def test_text_of_pieces(tmp_path):
    pytest.importorskip("tokenizers")
    content = "naïve  text,\n\nand – so on 12 \n".encode() * 300
    options = "--vocabulary", "270", "--valid-percent", "5", "--test-percent", "5"
    made = preprocess("pieces.py", tmp_path, content, *options)
    assert b"".join(read_text(made, split) for split in ("train", "valid", "test")) == content


def test_reading_needs_neither_torch_nor_fairseq(data):
    code = (
        "import sys\nfrom fairseq_sha.commands import main\n"
        "assert main(['rivals', *sys.argv[1:]]) == 0\n"
        "assert not {'torch', 'fairseq'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, data, "--only", "gzip"]
    subprocess.run(command, cwd=str(REPOSITORY), check=True)


def test_what_is_printed_and_written(data, tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ["rivals", data, "--only", "bzip2", "xz", "--prime", "all", "3000"]
    words += ["--streams", "3", "--json", str(path), "--cache", str(tmp_path / "cache.json")]
    assert main(words) == 0
    out = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert [(row["name"], row["primed_with"]) for row in results] == [
        (name, count) for name in ("bzip2 -9", "xz -9e") for count in (0, 3000, 6000)
    ]
    train, test = text(6000, 1), text(833, 3)
    part = train[:1000] + train[2000:3000] + train[4000:5000]
    size = len(bz2.compress(part + test, 9)) - len(bz2.compress(part, 9))
    assert results[1]["bits"] == pytest.approx(8 * size / 833)
    assert f"| bzip2 -9 | {results[0]['bits']:.3f} | {results[1]['bits']:.3f} |" in out
    assert "after 3,000 bytes of train" in out and "test: 833 bytes" in out

    assert main([*words[:-4], "--prime", "0", "--split", "valid"]) == 0
    out = capsys.readouterr().out
    assert "after" not in out.splitlines()[0] and "valid: 701 bytes" in out


def test_a_model_is_measured_with_its_size_and_without(data, tmp_path, capsys, monkeypatch):
    portable = stand_in_compress.portable()
    monkeypatch.setitem(sys.modules, "fairseq_sha.portable", portable)
    monkeypatch.setattr(fairseq_sha, "portable", portable, raising=False)
    (tmp_path / "model").write_bytes(bytes(1234))
    (tmp_path / "test").write_bytes(text(833, 3))
    path = tmp_path / "rows.json"
    model = "--path", str(tmp_path / "model")
    words = ["rivals", data, "--only", "bzip2", *model, "--json", str(path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert main(["compress", *model, str(tmp_path / "test")]) == 0
    size = (tmp_path / "test.shac").stat().st_size
    rows = json.loads(path.read_text())[2:]
    assert [(row["name"], row["primed_with"], row["bits"]) for row in rows] == [
        ("model, a model of 1,234 bytes", 0, pytest.approx(8 * (1234 + size) / 833)),
        ("model, a model of 1,234 bytes", 6000, pytest.approx(8 * size / 833)),
    ]
    row = f"| model, a model of 1,234 bytes | {rows[0]['bits']:.3f} | {rows[1]['bits']:.3f} |"
    assert row in out and "A model: alone with the size of its file, after train without" in out

    capsys.readouterr()
    assert main([*words[:-2], "--prime", "0"]) == 0
    assert row[: -len(" 0.000 |")] in capsys.readouterr().out
    assert main([*words[:-2], "--prime", "2000"]) == 0
    assert "after 2,000 bytes of train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "zip"], "zip: no such compressor; known are gzip, "),
        (["--split", "other"], "{data}/other.idx: no such file"),
        (["--streams", "0"], "0 streams: "),
        (["--json", "/none/file"], "/none/file: its folder is missing"),
        (["--cache", "{data}/dict.txt"], "{data}/dict.txt: not a cache"),
    ],
)
def test_mistakes_are_one_line(data, capsys, words, message):
    words = [word.format(data=data) for word in words]
    assert main(["rivals", data, *([] if "--only" in words else ["--only", "gzip"]), *words]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: " + message.format(data=data))


@pytest.mark.parametrize("number", ["-5", "many", "1.5"])
def test_prime_is_a_number_or_all(data, capsys, number):
    with pytest.raises(SystemExit):
        main(["rivals", data, f"--prime={number}"])
    assert "is neither a number of bytes nor all" in capsys.readouterr().err


def test_what_is_not_installed_is_one_line(data, capsys, monkeypatch):
    monkeypatch.setattr(compressors.importlib.util, "find_spec", lambda name: None)
    assert main(["rivals", data, "--only", "gzip", "zpaq", "--prime", "0"]) == 0
    captured = capsys.readouterr()
    line = "not installed: ZPAQ, method 5; pip install 'fairseq-sha[compare]'\n"
    assert "gzip -9" in captured.out and captured.err == line
    assert main(["rivals", data, "--only", "zpaq"]) == 1
    assert capsys.readouterr().err == f"error: {line}"


def test_words_cannot_be_restored(data, tmp_path, capsys):
    for name in ("train.bin", "train.idx", "test.bin", "test.idx"):
        (tmp_path / name).write_bytes((REPOSITORY / data / name).read_bytes())
    (tmp_path / "dict.txt").write_text("the 5\nof 3\n")
    assert main(["rivals", str(tmp_path), "--only", "gzip"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/dict.txt: 'the' is not a byte, and the bytes of a")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("dict.txt", None, "dict.txt: no such file"),
        ("dict.txt", lambda old: b"\xff 3\n", "dict.txt: not UTF-8"),
        ("dict.txt", lambda old: old[: old.index(b"\n") + 1], "stands for no text"),
        ("test.bin", None, "test.bin: no such file"),
        ("test.bin", lambda old: old[:-2], "test.bin: its size differs"),
        ("test.idx", lambda old: old[:20], "test.idx: not an index"),
        ("test.idx", lambda old: b"X" + old[1:], "test.idx: not an index"),
        ("test.idx", lambda old: old[:-1400], "test.idx: not an index"),
    ],
)
def test_damaged_folder(tmp_path, name, change, message):
    folder = write_folder(tmp_path)
    path = tmp_path / name
    old = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(old))
    with pytest.raises(UserError, match=message):
        read_text(folder, "test")
