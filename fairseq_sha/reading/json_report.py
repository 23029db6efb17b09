"""The figures of a text as strict JSON."""

import contextlib
import json
import math

import fairseq_sha
from fairseq_sha.files import unfinished


class Report:
    """A JSON object that is written while the text is read, so that a long list of lines need not
    be in memory. Numbers that are not finite become null."""

    def __init__(self, file):
        self._file = file
        self._items = 0
        file.write('{"lines": [')

    def add_line(self, **fields):
        """Write an entry of ``lines``."""
        self._file.write(("" if not self._items else ",") + "\n" + dumps(fields))
        self._items += 1

    def finish(self, **fields):
        """Write the other fields."""
        self._file.write("]")
        for name, value in fields.items():
            self._file.write(f",\n{dumps(name)}: {dumps(value)}")
        self._file.write("}\n")


@contextlib.contextmanager
def written(path):
    """A :class:`Report` that becomes a file at the end of the block.

    Args:
        path (Path): the file; None for no report

    Yields:
        the report, or None
    """
    if path is None:
        yield None
        return
    with unfinished(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            yield Report(file)


def dumps(value):
    """Strict JSON, in which what is not finite is null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def of_model(path, trained):
    """What says which model it was."""
    return {
        "path": path,
        "identity": trained.identity.hex(),
        "arch": trained.cfg.model._name,
        "codec": trained.codec.name,
        "vocabulary": len(trained.dictionary),
        "fairseq_sha": fairseq_sha.__version__,
    }


def of_score(score, bits, unknown):
    """What a model's :class:`~fairseq_sha.evaluation.evaluate.Score` says.

    Args:
        score (Score): None for a text without tokens
        bits (float): in all
        unknown (int): words that the model does not know; None if it knows all text
    """
    names = "words", "bits_per_byte", "perplexity", "perplexity_per_word", "policy"
    return {
        "tokens": score.tokens if score else 0,
        "unknown_words": unknown,
        "nats": score.nats if score else 0.0,
        "bits": bits,
        **{name: getattr(score, name, None) for name in names},
    }
