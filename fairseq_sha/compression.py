"""Lossless compression: a trained model predicts bytes or pieces, and a range coder stores what it
did not expect."""

import hashlib
import logging
import platform
import re
import struct
import zlib
from importlib import metadata

import numpy as np
import torch
from tqdm import tqdm

import fairseq_sha
from fairseq_sha.errors import UserError
from fairseq_sha.trained_model import threads as use_threads

logger = logging.getLogger(__name__)

MAGIC = b"SHAC\x01"  # the last byte is the version of the format
# After the magic: identity of the model; identity of the machine and build; size of the file in
# bytes, and its CRC-32; streams; threads. Then the coded bytes, and a CRC-32 of everything.
HEADER = struct.Struct("<8s8sQIHH")
CHECKSUM = struct.Struct("<I")
BYTES_PER_STREAM = 1 << 15
MOST_STREAMS = 64


def compress(model, data, streams=None, threads=1, progress=False):
    """Pack bytes.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what predicts them
        data (bytes): any bytes, even those that the model's dictionary lacks
        streams (int): parts that are coded side by side
        threads (int): number of torch's threads, for packing and for unpacking
        progress (bool): whether to show a progress bar on standard error

    Returns:
        bytes

    Raises:
        UserError: impossible numbers of streams or threads; a model whose codec is not
            lossless
    """
    check_numbers(streams, threads)
    check_codec(model)
    if streams is None:
        streams = min(MOST_STREAMS, -(-len(data) // BYTES_PER_STREAM))
    coder = _constriction().stream.queue.RangeEncoder()

    def encode(symbols, *distribution):
        coder.encode(symbols, *distribution)
        return symbols

    build = identity_of_build(model)
    header = HEADER.pack(model.identity, build, len(data), zlib.crc32(data), streams, threads)
    alphabet = _Alphabet(model.task.codec)
    length = stream_length(len(data), streams)
    parts = [data[i * length : (i + 1) * length] for i in range(streams)]
    symbols = [alphabet.symbols(part) for part in parts]
    sizes = [len(part) for part in parts]
    _code(model, alphabet, symbols, sizes, threads, encode, progress)
    packed = MAGIC + header + coder.get_compressed().astype("<u4").tobytes()
    return packed + CHECKSUM.pack(zlib.crc32(packed))


def check_numbers(streams, threads):
    """Raise a UserError for impossible numbers of streams (None: the default) or threads."""
    for option, value, most in (("streams", streams, 65535), ("threads", threads, 1024)):
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{option} {value}: must be from 1 to {most}")


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


def read_header(model, packed):
    """What :func:`compress` wrote before the coded bytes: a tuple, as in ``HEADER``.

    Raises:
        UserError: packed by something else or with another model, or damaged
    """
    start = len(MAGIC) + HEADER.size
    if packed[: len(MAGIC)] != MAGIC:
        raise UserError("not a file that fairseq-sha compress wrote, or one of another version")
    (checksum,) = CHECKSUM.unpack(packed[-CHECKSUM.size :])
    if len(packed) < start + CHECKSUM.size or zlib.crc32(packed[: -CHECKSUM.size]) != checksum:
        raise UserError("damaged or cut off; copy it again")
    header = HEADER.unpack(packed[len(MAGIC) : start])
    if header[0] != model.identity:
        raise UserError("was compressed with another model; name its checkpoint")
    return header


def decompress(model, packed, progress=False):
    """The bytes that :func:`compress` packed. Arguments as there.

    Raises:
        UserError: as :func:`read_header`; a model whose codec is not lossless; the model computes
            other last digits than when the bytes were packed
    """
    check_codec(model)
    _, build, size, checksum, streams, threads = read_header(model, packed)
    if build != identity_of_build(model):
        logger.warning("compressed with another installation or device: it may not be decodable")
    words = np.frombuffer(packed[len(MAGIC) + HEADER.size : -CHECKSUM.size], "<u4").astype(
        np.uint32
    )
    coder = _constriction().stream.queue.RangeDecoder(words)

    def decode(placeholders, family, *parameters):
        return coder.decode(family, *(parameters or [len(placeholders)]))

    length = stream_length(size, streams)
    sizes = [min(length, max(0, size - i * length)) for i in range(streams)]
    alphabet = _Alphabet(model.task.codec)
    try:
        data = b"".join(_code(model, alphabet, None, sizes, threads, decode, progress))
    except AssertionError:  # how constriction refuses what no coder wrote
        data = b""
    if zlib.crc32(data) != checksum or len(data) != size:
        raise UserError(
            "cannot be decoded: the model computes other last digits here; use the machine and "
            "installation that compressed it, and the same choice of --cpu"
        )
    return data


def stream_length(size, streams):
    """Bytes of each stream but the last ones, which may be shorter or empty."""
    return -(-size // streams) if streams else 0


def _code(model, alphabet, parts, sizes, threads, code_symbols, progress):
    """Go through all streams side by side, one token of each at a time. Packing and unpacking must
    compute the same to the last digit, so both are done here.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what predicts the tokens
        alphabet (_Alphabet): the symbols
        parts (list of ndarray): the symbols of each stream; None to unpack
        sizes (list of int): bytes of each stream
        threads (int): see :func:`compress`
        code_symbols (callable): takes an int32 array of symbols and their distribution, as one
            argument or two, codes them, and returns them. Unpacking takes only the number of
            symbols from the array, and returns those that were packed
        progress (bool): whether to show a progress bar on standard error

    Returns:
        the text of each stream: a list of bytearray
    """
    families = _constriction().stream.model
    categorical = families.Categorical(perfect=False)
    ids, missing, known = alphabet.ids, alphabet.missing, len(alphabet.ids)
    texts = [bytearray() for _ in sizes]
    tokens, state = torch.full((1, len(sizes)), model.task.codec.start), None
    step = coded = escaped_before = 0
    with use_threads(threads), tqdm(
        total=sum(sizes), unit="B", unit_scale=True, disable=not progress
    ) as bar:
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
            for stream, symbol in zip(active, symbols.tolist()):
                texts[stream] += alphabet.texts[symbol]
                bar.update(len(alphabet.texts[symbol]))
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
