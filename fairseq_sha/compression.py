"""Lossless compression: a trained model predicts bytes or pieces, and a range coder stores what it
did not expect."""

import hashlib
import io
import platform
import re
import struct
from importlib import metadata

import numpy as np
import torch

import fairseq_sha
from fairseq_sha import packed_file
from fairseq_sha.errors import UserError
from fairseq_sha.packed_file import MOST_THREADS, stream_sizes
from fairseq_sha.trained_model import threads as use_threads

THREADS = struct.Struct("<H")


def compress(model, data, streams=None, threads=1):
    """Pack bytes as one :mod:`~fairseq_sha.packed_file`.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what predicts them
        data (bytes): any bytes, even those that the model's dictionary lacks
        streams (int): parts of a block that are coded side by side
        threads (int): number of torch's threads, for packing and for unpacking

    Returns:
        bytes

    Raises:
        UserError: as :class:`ModelCoder`; impossible numbers of streams
    """
    packed = io.BytesIO()
    packed_file.pack(ModelCoder(model, threads), io.BytesIO(data), packed, streams=streams)
    return packed.getvalue()


def decompress(model, packed):
    """The bytes that :func:`compress` packed.

    Raises:
        UserError: packed by something else or with another model, or damaged; a model whose codec
            is not lossless; the model computes other last digits than when the bytes were packed
    """
    coder = ModelCoder(model)
    reader = packed_file.Reader(io.BytesIO(packed))
    reader.check(coder)
    data = io.BytesIO()
    reader.unpack(coder, data)
    return data.getvalue()


class ModelCoder:
    """Packs blocks with a trained model: a :class:`~fairseq_sha.packed_file.BlockCoder`. It is
    bound to its build, since other builds may compute other last digits.

    A packed block is the number of threads (2 bytes, little endian) and the words of the range
    coder (4 bytes each, little endian).

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what predicts
        threads (int): number of torch's threads, for packing and for unpacking

    Raises:
        UserError: the model's codec is not lossless; impossible number of threads; the range coder
            is not installed
    """

    def __init__(self, model, threads=1):
        packed_file.check_numbers(threads=threads)
        check_codec(model)
        check_packages()
        self.model = model
        self.threads = threads
        self.identity = model.identity
        self.build = identity_of_build(model)
        self._alphabet = _Alphabet(model.task.codec)

    def encode(self, data, streams, progress=None):
        """Pack a block."""
        coder = _constriction().stream.queue.RangeEncoder()

        def encode(symbols, *distribution):
            coder.encode(symbols, *distribution)
            return symbols

        sizes = stream_sizes(len(data), streams)
        parts, start = [], 0
        for size in sizes:
            parts.append(self._alphabet.symbols(data[start : start + size]))
            start += size
        _code(self.model, self._alphabet, parts, sizes, self.threads, encode, progress)
        return THREADS.pack(self.threads) + coder.get_compressed().astype("<u4").tobytes()

    def decode(self, payload, size, streams, progress=None):
        """The bytes of a block.

        Raises:
            ValueError: :meth:`encode` did not pack it here
        """
        if len(payload) % 4 != THREADS.size:
            raise ValueError("not a packed block")
        (threads,) = THREADS.unpack_from(payload)
        if not 0 < threads <= MOST_THREADS:
            raise ValueError("not a packed block")
        words = np.frombuffer(payload, "<u4", offset=THREADS.size).astype(np.uint32)
        coder = _constriction().stream.queue.RangeDecoder(words)

        def decode(placeholders, family, *parameters):
            return coder.decode(family, *(parameters or [len(placeholders)]))

        sizes = stream_sizes(size, streams)
        try:
            texts = _code(self.model, self._alphabet, None, sizes, threads, decode, progress)
        except AssertionError:  # how constriction refuses what no coder wrote
            return b""
        return b"".join(texts)


def check_codec(model):
    """Raise a UserError if the tokens of a model do not bring back every byte."""
    codec = model.task.codec
    if not codec.lossless:
        raise UserError(
            f"the model's codec is {codec.name}, which does not restore every byte; compress with "
            "a model that was trained with --codec bytes or pieces"
        )


class _Alphabet:
    """The symbols of the coder: first the tokens of a codec that stand for text, and then the bytes
    that no token stands for (``missing``), which only a codec of single bytes can have."""

    def __init__(self, codec):
        texts = codec.texts()
        self.codec = codec
        self.ids = np.array([token for token, text in enumerate(texts) if text])
        self.missing = np.setdiff1d(np.arange(256), [text[0] for text in texts if len(text) == 1])
        self.texts = [texts[token] for token in self.ids] + [bytes([b]) for b in self.missing]
        #: The token that the model reads for each symbol.
        self.tokens = np.append(self.ids, np.full_like(self.missing, codec.dictionary.unk()))

    def symbols(self, data):
        """A text as symbols: int64 array."""
        if max(map(len, self.texts)) == 1:
            symbol_of = np.empty(256, np.int64)
            symbol_of[[text[0] for text in self.texts]] = np.arange(len(self.texts))
            return symbol_of[np.frombuffer(data, np.uint8)]
        symbol_of = np.empty(len(self.codec.dictionary), np.int64)
        symbol_of[self.ids] = np.arange(len(self.ids))
        return symbol_of[self.codec.encode(data).numpy()]


def _code(model, alphabet, parts, sizes, threads, code_symbols, progress):
    """Go through all streams side by side, one token of each at a time. Packing and unpacking must
    compute the same to the last digit, so both are done here.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what predicts the tokens
        alphabet (_Alphabet): the symbols
        parts (list of ndarray): the symbols of each stream; None to unpack
        sizes (list of int): bytes of each stream
        threads (int): see :class:`ModelCoder`
        code_symbols (callable): takes an int32 array of symbols and their distribution, as one
            argument or two, codes them, and returns them. Unpacking takes only the number of
            symbols from the array, and returns those that were packed
        progress (callable): gets numbers of further bytes done

    Returns:
        the text of each stream: a list of bytearray
    """
    families = _constriction().stream.model
    categorical = families.Categorical(perfect=False)
    ids, missing, known = alphabet.ids, alphabet.missing, len(alphabet.ids)
    texts = [bytearray() for _ in sizes]
    tokens, state = torch.full((1, len(sizes)), model.task.codec.start), None
    step = coded = escaped_before = 0
    with use_threads(threads):
        while True:
            active = [i for i, text in enumerate(texts) if len(text) < sizes[i]]
            if not active:
                return texts
            logits, state = model.read(tokens, state)
            rows = logits[0, active].cpu()[:, ids].double().softmax(-1)
            if len(missing):
                share = (escaped_before + 1 / 256) / (coded + 1)
                rows = torch.cat(
                    [rows * (1 - share), rows.new_full((len(active), 1), share)], dim=1
                )
            wanted = np.zeros(len(active), np.int32)
            if parts is not None:
                wanted[:] = [parts[stream][step] for stream in active]
            symbols = np.minimum(wanted, known).astype(np.int32)
            symbols = code_symbols(symbols, categorical, rows.float().numpy()).copy()
            escaped = np.flatnonzero(symbols == known)
            if len(escaped):
                which = np.maximum(wanted[escaped] - known, 0)
                if len(missing) > 1:
                    which = code_symbols(which, families.Uniform(len(missing)))
                symbols[escaped] = known + which
            tokens[0, active] = torch.from_numpy(alphabet.tokens[symbols])
            done = [alphabet.texts[symbol] for symbol in symbols.tolist()]
            for stream, text in zip(active, done):
                texts[stream] += text
            if progress:
                progress(sum(map(len, done)))
            step, coded, escaped_before = (
                step + 1,
                coded + len(active),
                escaped_before + len(escaped),
            )


def identity_of_build(model):
    """8 bytes that differ between installations and machines that may compute other last digits."""
    cuda = model.device.type == "cuda"
    parts = (
        fairseq_sha.__version__,
        torch.__config__.show(),
        np.__version__,
        metadata.version("constriction"),
        processor(),
        torch.cuda.get_device_name(model.device) if cuda else "cpu",
    )
    return hashlib.sha256("\n".join(parts).encode()).digest()[:8]


def processor():
    """A description of the processor, by which libraries choose how to compute."""
    described = [platform.machine(), platform.processor()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first, _, _ = file.read().partition("\n\n")
    except OSError:  # not Linux
        return "\n".join(described)
    # x86 and Arm name different fields; the others, such as the frequency, change with time.
    wanted = "vendor_id|cpu family|model|model name|flags|CPU implementer|CPU part|Features"
    described += re.findall(rf"(?m)^(?:{wanted})\s*:.*$", first)
    return "\n".join(described)


def check_packages():
    """Raise a UserError if the range coder is not installed."""
    _constriction()


def _constriction():
    try:
        import constriction
    except ImportError:
        raise UserError("constriction is missing; pip install 'fairseq-sha[compress]'")
    return constriction
