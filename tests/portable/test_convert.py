"""The integer form predicts what the float model predicts; what has no integer form is refused."""

import re

import numpy as np
import pytest
import torch

from fairseq_sha import UserError
from fairseq_sha.commands import main
from fairseq_sha.portable import PortableModel, convert
from fairseq_sha.portable import model as form
from fairseq_sha.portable.numpy_form import Reader
from tests import tiny_corpus
from tests.portable.helpers import MODELS, integer_model, text, trained

STEPS = 40  # more than the window


def log_probabilities(logits):
    return torch.from_numpy(np.asarray(logits, np.float64)).log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_the_float_model(name):
    ours, theirs = integer_model(**MODELS[name]), trained(**MODELS[name])
    parts = [text(STEPS, seed) for seed in (5, 6)]
    reader, before = Reader(ours, 2), np.array([10, 10])
    tokens, state = torch.full((1, 2), theirs.codec.start), None
    order = [theirs.codec.texts().index(bytes([byte])) for byte in ours.sizes.known]
    differences = []
    for now in zip(*parts):
        logits, state = theirs.read(tokens, state)
        got = log_probabilities(reader.step(before) / 2.0**ours.sizes.fraction)
        differences.append(got - log_probabilities(logits[0, :, order]))
        tokens = theirs.codec.encode(bytes(now))[None]
        before = np.array(now)
    spread = log_probabilities(logits[0, :, order]).std()
    # Weights have 8 bits, so that what is not in the float model is a hundredth of what is.
    assert torch.stack(differences).pow(2).mean().sqrt() < 0.03 * spread


@pytest.mark.parametrize("name", MODELS)
def test_packed_bytes_are_about_what_the_float_model_promises(name):
    ours, theirs = integer_model(**MODELS[name]), trained(**MODELS[name])
    parts = [text(STEPS, seed) for seed in range(20, 36)]
    expected = convert.float_bits(theirs, parts)
    packed = PortableModel(ours).encode(b"".join(parts), len(parts))
    # Up to three bytes for the end; 1/256 and less of the beginning for unknown bytes.
    assert abs(8 * len(packed) - expected) < 0.01 * expected + 40


def test_large_states_get_fewer_bits_after_the_point():
    model = trained(**MODELS["sru"])
    sample = convert.columns(model, text(640, 2), 4)
    before, _ = convert.convert(model, sample)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.cell.input.weight[: layer.cell.input.weight.size(0) // 3] *= 40
    after, arrays = convert.convert(model, sample)
    assert after.fraction < before.fraction == 16
    form.unpack(form.pack(after, arrays), "x")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cell": "qrnn"}, "--cell qrnn has no integer form"),
        ({"cell": "layer_norm_lstm"}, "--cell layer_norm_lstm has no integer form"),
        ({"ngram_orders": [2, 33]}, "at most 8 lengths of at most 32 bytes"),
        ({"ngram_buckets": 1 << 24, "ngram_orders": [2, 3]}, "16,777,216 rows in all"),
        ({"feed_forward": "full"}, "--feed-forward full has no integer form"),
        ({"width": 8192, "num_layers": 1}, "--width 8192: the integer form has at most 4096"),
        ({"boom_multiple": 17}, "--boom-multiple 17: the integer form has at most 16"),
    ],
)
def test_models_without_integer_form_are_refused(settings, message):
    numbers = ("width", "boom_multiple", "ngram_orders", "ngram_buckets")
    kinds = {k: v for k, v in settings.items() if k not in numbers}
    model = trained(width=8, attention_layers=[], **kinds)
    for name, value in settings.items():
        model.cfg.model[name] = value
    with pytest.raises(UserError, match=message):
        convert.check(model)


# What users type.


def run(capfdbinary, *argv):
    """The exit status, and what was printed."""
    status = main([str(arg) for arg in argv])
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()


def test_quantize_and_generate(checkpoints, tmp_path, capfdbinary):
    data, out = tiny_corpus.write_folder(tmp_path / "data"), tmp_path / "model.shai"
    path = checkpoints["SHARNN"]
    quantize = ["quantize", "--path", path, "--data", data, "--out", out]
    status, printed, _ = run(capfdbinary, *quantize)
    assert status == 0 and f"{out}: {out.stat().st_size:,} bytes" in printed
    before, after = map(float, re.findall(r"([\d.]+) in (?:float|integers)", printed))
    assert abs(after / before - 1) < 0.01
    assert run(capfdbinary, *quantize)[2] == f"error: {out}: exists already; move it away\n"

    generate = ["generate", "--path", out, "--prompt", "ab", "--length", 30, "--seed", 3]
    status, printed, _ = run(capfdbinary, *generate, "--samples", 2)
    assert status == 0 and printed.startswith("ab")
    first = printed[:32]
    assert run(capfdbinary, *generate)[1] == first + "\n"
    assert printed[33:35] == "ab" and printed[33:65] != first
    status, _, err = run(capfdbinary, *generate, "--top-k", 3)
    assert status == 1 and err.startswith("error: --top-k: not for a model in integers")
    status, _, err = run(capfdbinary, *generate, "--model-overrides", "{'window': 2}")
    assert status == 1 and err.startswith("error: --model-overrides: a portable model holds")


def test_quantize_names_what_has_an_integer_form(checkpoints, tmp_path, capfdbinary):
    data = tiny_corpus.write_folder(tmp_path / "data")
    quantize = ["quantize", "--data", data, "--out", tmp_path / "out", "--path"]
    _, _, err = run(capfdbinary, *quantize, checkpoints["TransformerXL"])
    assert err == (
        "error: --arch transformer_xl has no integer form; SHA-RNN of bytes with --cell lstm, sru "
        "or min_gru has one\n"
    )
    assert not (tmp_path / "out").exists()
