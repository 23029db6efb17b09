"""A model, a text and what it was packed to, kept for ever: every machine, environment and version
must restore the text and pack it to the same bytes.

``python -m tests.portable.test_golden`` made the file. To make it anew is to break the format.
"""

import io
import lzma
from pathlib import Path

import numpy as np
import pytest

from fairseq_sha import portable
from fairseq_sha.portable import model as form
from fairseq_sha.portable.numpy_form import NumpyForm

FILE = Path(__file__).with_name("golden.npz.xz")
FORMS = {"numba": None, "numpy": NumpyForm}


@pytest.fixture(scope="module")
def golden():
    with np.load(io.BytesIO(lzma.decompress(FILE.read_bytes()))) as file:
        return {name: file[name].tobytes() for name in file.files}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", [*form.CELLS, "ngrams"])
def test_golden_text_is_restored_and_packed_the_same(golden, kind, name):
    if name == "numba":
        pytest.importorskip("numba")
    model = portable.PortableModel(form.unpack(golden[kind], kind), FORMS[name])
    text = golden["text"]
    for streams in (1, 3):
        packed = golden[f"{kind}/{streams}"]
        assert model.decode(packed, len(text), streams) == text
        assert model.encode(text, streams) == packed
    assert model.generate(b"abc", 40, seed=1) == golden[f"{kind}/drawn"]


def write():
    from tests.portable.helpers import integer_model, text

    content = {"text": text(150) + bytes(range(256))[::5] + text(60, 4)}
    models = {
        "lstm": dict(cell="lstm", attention_layers=[1]),
        "sru": dict(cell="sru", attention_layers=[0]),
        "min_gru": dict(cell="min_gru", attention_layers=[0, 1]),
        "ngrams": dict(cell="sru", attention_layers=[], ngram_orders=[2, 3], ngram_buckets=20),
    }
    for name, settings in models.items():
        model = integer_model(width=10, boom_multiple=2, **settings)
        content[name] = form.pack(model.sizes, model.arrays)
        ours = portable.PortableModel(model, NumpyForm)
        for streams in (1, 3):
            content[f"{name}/{streams}"] = ours.encode(content["text"], streams)
        content[f"{name}/drawn"] = ours.generate(b"abc", 40, seed=1)
    plain = io.BytesIO()
    np.savez(plain, **{name: np.frombuffer(value, np.uint8) for name, value in content.items()})
    FILE.write_bytes(lzma.compress(plain.getvalue(), preset=9))  # the models share their tables


if __name__ == "__main__":
    write()
