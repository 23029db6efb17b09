"""Exported models compute what they were exported from."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError, commands, onnx_export
from fairseq_sha.checks import torch_is_at_least
from fairseq_sha.continuations import continue_until
from fairseq_sha.data import data_bin, piece_data_bin
from fairseq_sha.data.codecs import CODECS, WordCodec
from fairseq_sha.models.family import FAMILIES as BY_NAME
from fairseq_sha.trained_model import TrainedModel
from fairseq_sha.weights_import import make_checkpoint, make_task
from tests import random_checkpoint
from tests.commands import REPOSITORY
from tests.options import FAMILIES
from tests.tasks.test_words import write_words
from tests.tiny_corpus import text

NEEDED = ("onnx", "onnxscript", "onnxruntime")
CAN_EXPORT = torch_is_at_least(2, 6) and all(importlib.util.find_spec(name) for name in NEEDED)
pytestmark = pytest.mark.skipif(
    not CAN_EXPORT, reason="needs torch 2.6 or newer, onnx, onnxscript and onnxruntime"
)

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
#: The others begin a new window now and then, which a graph cannot.
EXPORTED = [f.model.__name__ for f in BY_NAME.values() if "eval_stride" not in f.tiny.model]


def run_session(path, segments):
    """Logits of segments in turn, each ``[T, B]``, from nothing but the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    shapes = json.loads(session.get_modelmeta().custom_metadata_map["state"])
    types = {tensor.name: tensor.type for tensor in session.get_inputs()}
    streams = segments[0].shape[1]
    state = {
        name: np.zeros([shape[0], streams, *shape[2:]], TYPES[types[name]])
        for name, shape in shapes.items()
    }
    out = []
    for tokens in segments:
        logits, *new_state = session.run(None, {"tokens": tokens, **state})
        state = dict(zip(state, new_state))
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
        *((family, 1) for family in EXPORTED),
        ("SHARNN", 7),
        *(
            pytest.param(family, 7, marks=pytest.mark.long)
            for family in EXPORTED
            if family != "SHARNN"
        ),
    ],
)
def test_exported_model_gives_the_same_logits(checkpoints, tmp_path, family, length):
    """Over more tokens than any window or memory here holds, in another number of streams."""
    model = TrainedModel.load(checkpoints[family], cpu=True)
    onnx_export.export(model, tmp_path / "model.onnx", length)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    for streams in (1, 3):
        segments = np.split(np.random.randint(4, 12, (140, streams)), 140 // length)
        expected = read(model, segments)
        exported = run_session(tmp_path / "model.onnx", segments)
        np.testing.assert_allclose(exported, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPORTED])
def test_models_that_begin_new_windows_are_refused(checkpoints, tmp_path, family):
    model = TrainedModel.load(checkpoints[family], cpu=True)
    with pytest.raises(UserError, match="cannot be exported: this model begins a new window"):
        onnx_export.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_example_generates_from_an_exported_model_with_ngrams(tmp_path):
    """Their state is the tokens before, which are no floats."""
    path = random_checkpoint.write(tmp_path / "model.pt", ngram_orders=[2, 3], ngram_buckets=50)
    model = TrainedModel.load(path, cpu=True)
    onnx_export.export(model, tmp_path / "model.onnx")
    segments = np.split(np.random.randint(4, 12, (12, 3)), 12)
    exported = run_session(tmp_path / "model.onnx", segments)
    np.testing.assert_allclose(exported, read(model, segments), atol=1e-4, rtol=1e-4)
    words = [sys.executable, "examples/onnx/generate.py", tmp_path / "model.onnx", "abc"]
    words += ["--length", 20, "--temperature", 0]
    done = subprocess.run([str(word) for word in words], cwd=str(REPOSITORY), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"abc" + continue_until(model, b"abc", [], 20, beam=1)


def test_example_reads_the_words_of_a_prompt_as_the_model_does(tmp_path):
    """Ends of lines are tokens, and so are unknown words."""
    codec = WordCodec.from_symbols([*random_checkpoint.SPECIAL, "the", "river"])
    path = random_checkpoint.write(tmp_path / "model.pt", codec)
    model = TrainedModel.load(path, cpu=True)
    onnx_export.export(model, tmp_path / "model.onnx")
    words = [sys.executable, "examples/onnx/generate.py", tmp_path / "model.onnx"]
    words += ["the\nriver zebra", "--length", 0]
    done = subprocess.run([str(word) for word in words], cwd=str(REPOSITORY), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == model.codec.decode(model.encode("the\nriver zebra"))


def altered(checkpoint, folder, **fields):
    """A trained model with other settings."""
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"].update(fields)
    if "attn_span" in fields:
        positions = state["model"]["decoder.key_positions"]
        state["model"]["decoder.key_positions"] = positions[:, -fields["attn_span"] :].clone()
    torch.save(state, folder / "altered.pt")
    return TrainedModel.load(folder / "altered.pt", cpu=True)


@pytest.mark.parametrize(
    "family, setting, length",
    [
        ("TransformerXL", {"mem_len": 1}, 1),
        ("TransformerXL", {"mem_len": 2}, 1),
        ("SRUpp", {"eval_unroll": 1}, 1),
        ("SHARNN", {"window": 1}, 1),
        ("SHARNN", {"window": 2}, 1),
        ("SHARNN", {"window": 4}, 3),
        ("AdaptiveSpan", {"attn_span": 1}, 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("TransformerXL", {"mem_len": 0}, 1),
                ("TransformerXL", {"mem_len": 1, "same_length": True}, 1),
                ("TransformerXL", {"mem_len": 1}, 7),
                ("TransformerXL", {"mem_len": 3}, 1),
                ("TransformerXL", {"mem_len": 8}, 7),
                ("SRUpp", {"eval_unroll": 2}, 1),
                ("SRUpp", {"eval_unroll": 9}, 7),
                ("SHARNN", {"window": 3}, 1),
                ("SHARNN", {"window": 2}, 7),
                ("AdaptiveSpan", {"attn_span": 2}, 7),
            ]
        ),
    ],
)
def test_shortest_windows(checkpoints, tmp_path, family, setting, length):
    """After one token, and as the text goes on: a memory of one token has the shape of a
    recurrence's state, and windows that a call just fills or does not fill."""
    model = altered(checkpoints[family], tmp_path, **setting)
    for parameter in model.decoder.parameters():  # so that every part shows in the logits
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.numel() == 1:
            torch.nn.init.ones_(parameter)  # SRU++'s alpha
    onnx_export.export(model, tmp_path / "model.onnx", length)
    segments = np.split(np.random.randint(4, 12, (12 * length, 3)), 12)
    expected = read(model, segments)
    exported = run_session(tmp_path / "model.onnx", segments)
    np.testing.assert_allclose(exported, expected, atol=1e-4, rtol=1e-4)


def test_no_start_has_keys_without_values(checkpoints, tmp_path, monkeypatch):
    """torch's fused attention does not compare their numbers of rows, and reads other memory."""
    model = altered(checkpoints["SRUpp"], tmp_path, eval_unroll=1)
    starts, read = [], model.read
    monkeypatch.setattr(
        model, "read", lambda tokens, *state: starts.extend(state) or read(tokens, *state)
    )
    onnx_export.find_state(model, 1)
    pairs = [
        (layer["keys"], layer["values"]) for start in starts for layer in start if "keys" in layer
    ]
    assert pairs and all(len(keys) == len(values) for keys, values in pairs)


def test_large_weights_go_to_a_file_beside(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "MAX_BYTES_IN_ONE_FILE", 5000)
    out = tmp_path / "out"
    out.mkdir()
    options = ["--path", str(checkpoints["SHARNN"]), "--save", str(out / "large.onnx")]
    assert commands.main(["export", *options, "--int8"]) == 1
    assert "--int8: the model's weights take" in capsys.readouterr().err
    assert not list(out.iterdir())
    (out / "large.onnx.data").write_bytes(b"kept")
    assert commands.main(["export", *options]) == 1
    assert "large.onnx.data: exists already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["large.onnx.data"]
    (out / "large.onnx.data").unlink()

    assert commands.main(["export", *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    out = out.rename(tmp_path / "moved")
    segments = np.split(np.random.randint(4, 12, (20, 2)), 20)
    model = TrainedModel.load(checkpoints["SHARNN"], cpu=True)
    exported = run_session(out / "large.onnx", segments)
    np.testing.assert_allclose(exported, read(model, segments), atol=1e-4, rtol=1e-4)


def test_metadata_say_what_symbols_stand_for(checkpoints):
    codec = TrainedModel.load(checkpoints["SHARNN"], cpu=True).task.codec
    about = onnx_export.metadata(codec)
    symbols, excluded = json.loads(about["symbols"]), json.loads(about["not_generated"])
    assert about["codec"] == "bytes" and len(symbols) == len(codec.dictionary)
    assert sorted(filter(None, symbols)) == sorted("abcdefgh \n")
    assert {i for i, symbol in enumerate(symbols) if not symbol} <= set(excluded)
    assert not [i for i in excluded if symbols[i]] and symbols[json.loads(about["start"])] == "\n"

    codec = WordCodec.from_symbols(["<s>", "<pad>", "</s>", "<unk>", "the", "é"])
    symbols = json.loads(onnx_export.metadata(codec)["symbols"])
    assert symbols[4:] == ["the ", "é ".encode().decode("latin-1")] and symbols[2] == "\n"


# Words and pieces


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data folder of each codec."""
    words, of_pieces = (tmp_path_factory.mktemp(name) for name in ("words", "pieces"))
    write_words(words)
    source = of_pieces / "input"
    source.write_bytes(text(9000))
    if importlib.util.find_spec("tokenizers"):
        with data_bin.open_input(source) as stream:
            piece_data_bin.convert(stream, "input", of_pieces / "data", 901, 1003, 290)
    return {"words": words, "pieces": of_pieces / "data"}


def untrained(name, codec, folders, path, **fields):
    """A tiny model of a family whose weights are large enough to show every part in the logits."""
    if codec == "pieces":
        pytest.importorskip("tokenizers")
    family = BY_NAME[name]
    cfg = OmegaConf.structured(family.config(**{**family.tiny.model, **fields}))
    task = make_task(CODECS[codec].load(str(folders[codec])), folders[codec])
    model = family.model.build_model(cfg, task)
    for parameter in model.decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.save(make_checkpoint(name, cfg, model, task), path)
    return TrainedModel.load(path, cpu=True)


@pytest.mark.parametrize(
    "family, codec, length, fields",
    [
        ("sha_rnn", "pieces", 1, {}),
        ("sha_rnn", "pieces", 7, {"cutoffs": [50, 120], "div_val": 2.0}),
        ("transformer_xl", "words", 1, {"cutoffs": [3, 6], "div_val": 2.0}),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("sha_rnn", "words", 1, {"cutoffs": [3, 6], "div_val": 2.0}),
                ("sha_rnn", "words", 1, {"cutoffs": [4], "cluster_space": "hidden"}),
                ("srupp", "words", 1, {"cutoffs": [3, 6], "band_biases": False}),
                ("transformer_xl", "pieces", 1, {}),
                ("srupp", "pieces", 1, {}),
                ("transformer_xl", "words", 7, {"cutoffs": [3, 6], "tied_projections": "none"}),
                ("srupp", "words", 7, {"cutoffs": [3, 6], "div_val": 2.0}),
            ]
        ),
    ],
)
def test_words_and_pieces_have_the_same_log_probabilities(
    folders, tmp_path, family, codec, length, fields
):
    """Over more tokens than any window or memory here holds. All tokens occur, so all bands do."""
    model = untrained(family, codec, folders, tmp_path / "model.pt", **fields)
    onnx_export.export(model, tmp_path / "model.onnx", length)
    # The export changes the model for its graph.
    model = TrainedModel.load(tmp_path / "model.pt", cpu=True)
    symbols = np.arange(2, len(model.dictionary))
    tokens = np.random.permutation(np.resize(symbols, max(140, 7 * (len(symbols) // 7)) * 3))
    segments = np.split(tokens.reshape(-1, 3), len(tokens) // 3 // length)
    expected, exported = read(model, segments), run_session(tmp_path / "model.onnx", segments)
    assert expected.std() > 0.2
    for scores in (expected, exported):
        scores -= np.logaddexp.reduce(scores, -1, keepdims=True)
    np.testing.assert_allclose(exported, expected, atol=1e-4, rtol=1e-4)


def test_example_continues_pieces(folders, tmp_path):
    prompt = "the é\nab  c"
    path, save = tmp_path / "model.pt", tmp_path / "model.onnx"
    model = untrained("sha_rnn", "pieces", folders, path)
    assert commands.main(["export", "--path", str(path), "--save", str(save)]) == 0
    script = REPOSITORY / "examples" / "onnx" / "generate.py"
    argv = [sys.executable, script, save, prompt, "--length", "20", "--temperature", "0"]
    done = subprocess.run([str(word) for word in argv], capture_output=True)
    assert done.returncode == 0, done.stderr
    expected = prompt.encode() + model.continuation(prompt.encode(), 20, beam=1)
    assert done.stdout == expected


@pytest.mark.parametrize("int8", [False, True])
def test_example_generates_the_same_text_without_torch(checkpoints, tmp_path, int8):
    path = str(checkpoints["SHARNN"])
    options = ["--path", path, "--save", str(tmp_path / "model.onnx"), *["--int8"] * int8]
    assert commands.main(["export", *options]) == 0
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
        onnx_export.export(model, tmp_path / f"{int8}.onnx", length, int8)
    graph = onnx.load(tmp_path / "True.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # only attention multiplies what is no weight
        assert node.op_type not in ("Gemm", "LSTM")
        assert node.op_type != "MatMul" or not weights & set(node.input)
    segments = np.split(np.random.randint(4, 12, (60, 1)), 60 // length)
    exact, rounded = (run_session(tmp_path / f"{int8}.onnx", segments) for int8 in (False, True))
    difference = np.abs(exact - rounded).mean()
    assert 1e-5 < difference < 0.1


def test_existing_file_is_kept(checkpoints, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(b"kept")
    options = ["--path", str(checkpoints["SHARNN"]), "--save", str(tmp_path / "model.onnx")]
    assert commands.main(["export", *options]) == 1
    assert "exists already" in capsys.readouterr().err
    assert commands.main(["export", *options, "--length", "0"]) == 1
    assert "--length 0: must be" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_bytes() == b"kept"
