"""Exported models compute what they were exported from."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fairseq_sha import UserError
from fairseq_sha.checks import torch_is_at_least
from fairseq_sha.commands import export
from fairseq_sha.trained_model import TrainedModel
from tests.commands import REPOSITORY
from tests.options import FAMILIES

NEEDED = ("onnx", "onnxscript", "onnxruntime")
CAN_EXPORT = torch_is_at_least(2, 6) and all(importlib.util.find_spec(name) for name in NEEDED)
pytestmark = pytest.mark.skipif(
    not CAN_EXPORT, reason="needs torch 2.6 or newer, onnx, onnxscript and onnxruntime"
)


def run_session(path, segments):
    """Logits of segments in turn, each ``[T, B]``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    shapes = json.loads(session.get_modelmeta().custom_metadata_map["state"])
    streams = segments[0].shape[1]
    state = {
        name: np.zeros([shape[0], streams, *shape[2:]], np.float32)
        for name, shape in shapes.items()
    }
    out = []
    for tokens in segments:
        logits, *left = session.run(None, {"tokens": tokens, **state})
        state = dict(zip(state, left))
        out.append(logits)
    return np.concatenate(out)


def read(model, segments):
    state, out = None, []
    for tokens in segments:
        logits, state = model.read(torch.from_numpy(tokens), state)
        out.append(logits.numpy())
    return np.concatenate(out)


@pytest.mark.parametrize(
    "family, length",
    [
        *((family, 1) for family in FAMILIES),
        ("SHARNN", 7),
        *(
            pytest.param(family, 7, marks=pytest.mark.long)
            for family in FAMILIES
            if family != "SHARNN"
        ),
    ],
)
def test_exported_model_gives_the_same_logits(checkpoints, tmp_path, family, length):
    """Over more tokens than any window or memory here holds, in another number of streams."""
    model = TrainedModel.load(checkpoints[family], cpu=True)
    export.export(model, tmp_path / "model.onnx", length)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    for streams in (1, 3):
        segments = np.split(np.random.randint(4, 12, (140, streams)), 140 // length)
        expected = read(model, segments)
        exported = run_session(tmp_path / "model.onnx", segments)
        np.testing.assert_allclose(exported, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_example_generates_the_same_text_without_torch(checkpoints, tmp_path, int8):
    path = str(checkpoints["SHARNN"])
    export.main(["--path", path, "--save", str(tmp_path / "model.onnx"), *["--int8"] * int8])
    code = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]\n"
    code += "exec(open(sys.argv[0]).read())"
    script = str(REPOSITORY / "examples" / "onnx" / "generate.py")
    options = ["--length", "50", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, script, str(tmp_path / "model.onnx"), "abc\nd", *options],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    model = TrainedModel.load(path, cpu=True)
    expected = b"abc\nd" + model.continuation(b"abc\nd", 50, beam=1)
    # Rounded weights choose another byte sooner or later.
    assert done.stdout.startswith(b"abc\nd" if int8 else expected)
    assert len(done.stdout) == len(expected)


@pytest.mark.parametrize("length", [1, 6])
def test_int8_model_is_close(checkpoints, tmp_path, length):
    import onnx

    model = TrainedModel.load(checkpoints["SHARNN"], cpu=True)
    for int8 in (False, True):
        export.export(model, tmp_path / f"{int8}.onnx", length, int8)
    graph = onnx.load(tmp_path / "True.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # only attention multiplies what is no weight
        assert node.op_type not in ("Gemm", "LSTM")
        assert node.op_type != "MatMul" or not weights & set(node.input)
    segments = np.split(np.random.randint(4, 12, (60, 1)), 60 // length)
    exact, rounded = (run_session(tmp_path / f"{int8}.onnx", segments) for int8 in (False, True))
    difference = np.abs(exact - rounded).mean()
    assert 1e-5 < difference < 0.1


def test_existing_file_is_kept(checkpoints, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"kept")
    options = ["--path", str(checkpoints["SHARNN"]), "--save", str(tmp_path / "model.onnx")]
    with pytest.raises(UserError, match="exists already"):
        export.main(options)
    with pytest.raises(UserError, match="--length 0: must be"):
        export.main([*options, "--length", "0"])
    assert (tmp_path / "model.onnx").read_bytes() == b"kept"
