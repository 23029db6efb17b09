"""Lossless compression: a trained model predicts bytes, and a range coder stores what it did not
expect."""

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
        UserError: impossible numbers of streams or threads; a model of anything but bytes
    """
    check_numbers(streams, threads)
    byte_values(model)
    if streams is None:
        streams = min(MOST_STREAMS, -(-len(data) // BYTES_PER_STREAM))
    coder = _constriction().stream.queue.RangeEncoder()

    def encode(symbols, *distribution):
        coder.encode(symbols, *distribution)
        return symbols

    build = identity_of_build(model)
    header = HEADER.pack(model.identity, build, len(data), zlib.crc32(data), streams, threads)
    _code(model, np.frombuffer(data, np.uint8).copy(), streams, threads, encode, progress)
    packed = MAGIC + header + coder.get_compressed().astype("<u4").tobytes()
    return packed + CHECKSUM.pack(zlib.crc32(packed))


def check_numbers(streams, threads):
    """Raise a UserError for impossible numbers of streams (None: the default) or threads."""
    for option, value, most in (("streams", streams, 65535), ("threads", threads, 1024)):
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{option} {value}: must be from 1 to {most}")


def byte_values(model):
    """The byte that each token id of a model stands for, or None: a list.

    Raises:
        UserError: its tokens are not bytes, or do not bring back every byte
    """
    codec = model.task.codec
    if not codec.lossless or codec.bytes_per_token().max() > 1:
        raise UserError(
            f"the model's codec is {codec.name}, which does not restore every byte; compress with "
            "a model that was trained with --codec bytes"
        )
    return [(codec.decode([token]) or [None])[0] for token in range(len(codec.dictionary))]


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
        UserError: as :func:`read_header`; a model of anything but bytes; the model computes other
            last digits than when the bytes were packed
    """
    byte_values(model)
    _, build, size, checksum, streams, threads = read_header(model, packed)
    if build != identity_of_build(model):
        logger.warning("compressed with another installation or device: it may not be decodable")
    words = np.frombuffer(packed[len(MAGIC) + HEADER.size : -CHECKSUM.size], "<u4").astype(
        np.uint32
    )
    coder = _constriction().stream.queue.RangeDecoder(words)

    def decode(placeholders, family, *parameters):
        return coder.decode(family, *(parameters or [len(placeholders)]))

    data = np.zeros(size, np.uint8)
    try:
        _code(model, data, streams, threads, decode, progress)
    except AssertionError:  # how constriction refuses what no coder wrote
        data = np.zeros(0, np.uint8)
    if zlib.crc32(data.tobytes()) != checksum:
        raise UserError(
            "cannot be decoded: the model computes other last digits here; use the machine and "
            "installation that compressed it, and the same choice of --cpu"
        )
    return data.tobytes()


def _code(model, data, streams, threads, code_symbols, progress):
    """Go through all streams side by side, one byte of each at a time. Packing and unpacking must
    compute the same to the last digit, so both are done here.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what predicts the bytes
        data (ndarray): uint8, ``[size]``; unpacking fills it
        streams, threads (int): see :func:`compress`
        code_symbols (callable): takes an int32 array of symbols and their distribution, as one
            argument or two, codes them, and returns them. Unpacking takes only the number of
            symbols from the array, and returns those that were packed
        progress (bool): whether to show a progress bar on standard error
    """
    families = _constriction().stream.model
    categorical = families.Categorical(perfect=False)
    codec, values = model.task.codec, byte_values(model)
    ids = np.array([i for i, value in enumerate(values) if value is not None])
    known = np.array([values[i] for i in ids])
    missing = np.setdiff1d(np.arange(256), known)
    # Symbols of the coder: the bytes that the model knows, and one escape symbol for all others.
    symbol_of = np.full(256, len(known))
    symbol_of[known] = np.arange(len(known))
    token_of = np.full(256, codec.dictionary.unk())
    token_of[known] = ids

    length = -(-len(data) // streams) if streams else 0
    lengths = np.clip(len(data) - length * np.arange(streams), 0, length)
    offsets = length * np.arange(streams)
    tokens, state = torch.full((1, streams), codec.start), None
    coded = escaped_before = 0
    with use_threads(threads), tqdm(
        total=len(data), unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for step in range(length):
            logits, state = model.read(tokens, state)
            active = int((lengths > step).sum())  # shorter ones come last
            at = offsets[:active] + step
            rows = logits[0, :active].cpu()[:, ids].double().softmax(-1)
            if len(missing):
                share = (escaped_before + 1 / 256) / (coded + 1)
                rows = torch.cat([rows * (1 - share), rows.new_full((active, 1), share)], dim=1)
            symbols = symbol_of[data[at]].astype(np.int32)
            symbols = code_symbols(symbols, categorical, rows.float().numpy())
            coded_bytes = known[np.minimum(symbols, len(known) - 1)]
            escaped = np.flatnonzero(symbols == len(known))
            if len(escaped):
                which = np.searchsorted(missing, data[at[escaped]]).astype(np.int32)
                if len(missing) > 1:
                    which = code_symbols(which, families.Uniform(len(missing)))
                coded_bytes[escaped] = missing[which]
            data[at] = coded_bytes
            tokens[0, :active] = torch.from_numpy(token_of[coded_bytes])
            coded, escaped_before = coded + active, escaped_before + len(escaped)
            bar.update(active)


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
