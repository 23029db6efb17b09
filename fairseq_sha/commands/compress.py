"""Compress files with a trained model and arithmetic coding.

    fairseq-sha compress --path checkpoint.pt FILE...

Writes FILE.shac for each. fairseq-sha decompress brings the files back, bit for bit, with
the same checkpoint, on the same machine with the same installation, and --cpu or not, as before:
the last digit of a probability decides, and that is not the same everywhere. A file is cut into
streams that are read side by side. More of them are faster and compress worse: each begins without
knowing what came before.
"""

import hashlib
import logging
import struct
import sys
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fairseq_sha.commands.common import check_new, load, model_parser, write
from fairseq_sha.errors import UserError
from fairseq_sha.trained_model import threads as use_threads

logger = logging.getLogger(__name__)

SUFFIX = ".shac"
MAGIC = b"SHAC\x01"  # the last byte is the version of the format
# After the magic: identity of the model, of the machine and build, bytes of the file, their CRC-32,
# streams, threads. Then the coded bytes, and a CRC-32 of everything.
HEADER = struct.Struct("<8s8sQIHH")
CHECKSUM = struct.Struct("<I")
BYTES_PER_STREAM = 1 << 15
MOST_STREAMS = 64


def main(argv=None):
    parser = model_parser("compress", __doc__)
    parser.add_argument("--streams", type=int, help="(default: one for each 32 KB, 64 at most)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    check_numbers(args.streams, args.threads)
    contents = [(path, path.read_bytes()) for path in args.files]
    check_new(path.with_name(path.name + SUFFIX) for path in args.files)
    model = load(args)
    for path, content in contents:
        packed = compress(model, content, args.streams, args.threads, progress=True)
        write(path.with_name(path.name + SUFFIX), packed)
        share = f", {8 * len(packed) / len(content):.3f} bits per byte" if content else ""
        print(f"{path}: {len(content):,} to {len(packed):,} bytes{share}")


def compress(model, data, streams=None, threads=1, progress=False):
    """Pack bytes.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what predicts them
        data (bytes): any bytes, those that the model's dictionary lacks included
        streams (int): parts that are coded side by side
        threads (int): of torch, while it is packed and unpacked
        progress (bool): whether to show on standard error how far it is

    Raises:
        UserError: impossible numbers of streams or threads
    """
    check_numbers(streams, threads)
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
    """Raise a UserError for those that are impossible."""
    for option, value, most in (("streams", streams, 65535), ("threads", threads, 1024)):
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{option} {value}: must be from 1 to {most}")


def read_header(model, packed):
    """What :func:`compress` wrote before the coded bytes: a tuple, as in ``HEADER``.

    Raises:
        UserError: they were packed by something else, with another model, or are damaged
    """
    start = len(MAGIC) + HEADER.size
    if packed[: len(MAGIC)] != MAGIC:
        raise UserError(
            "not a file that fairseq_sha.commands.compress wrote, or one of another version"
        )
    (checksum,) = CHECKSUM.unpack(packed[-CHECKSUM.size :])
    if len(packed) < start + CHECKSUM.size or zlib.crc32(packed[: -CHECKSUM.size]) != checksum:
        raise UserError("damaged or cut off; copy it anew")
    header = HEADER.unpack(packed[len(MAGIC) : start])
    if header[0] != model.identity:
        raise UserError("was compressed with another model; name its checkpoint")
    return header


def decompress(model, packed, progress=False):
    """The bytes that :func:`compress` packed. Arguments as there.

    Raises:
        UserError: as :func:`read_header`, and where the model computes other last digits
    """
    _, build, size, checksum, streams, threads = read_header(model, packed)
    if build != identity_of_build(model):
        logger.warning("compressed with another installation or device: it may not be decodable")
    words = np.frombuffer(packed[len(MAGIC) + HEADER.size : -CHECKSUM.size], "<u4").astype(
        np.uint32
    )
    coder = _constriction().stream.queue.RangeDecoder(words)

    def decode(symbols, family, *parameters):
        return coder.decode(family, *(parameters or [len(symbols)]))

    data = np.zeros(size, np.uint8)
    try:
        _code(model, data, streams, threads, decode, progress)
    except AssertionError:  # how constriction refuses what no coder wrote
        data = np.zeros(0, np.uint8)
    if zlib.crc32(data.tobytes()) != checksum:
        raise UserError(
            "cannot be decoded: the model computes other last digits here; use the machine and the "
            "installation that compressed it, and --cpu or not, as then"
        )
    return data.tobytes()


def _code(model, data, streams, threads, exchange, progress):
    """Go through all streams side by side, a byte of each at a time. Packing and unpacking must
    compute the same to the last digit, and so both do it here.

    Args:
        data (ndarray): uint8, ``[size]``. When unpacking, this is filled
        exchange (callable): takes symbols (of which only the number is meant, when unpacking) and
            their distribution, codes them, and returns them
    """
    families = _constriction().stream.model
    categorical = families.Categorical(perfect=False)
    dictionary = model.dictionary
    values = dictionary.bytes_by_id()
    ids = np.array([i for i, value in enumerate(values) if value is not None])
    known = np.array([values[i] for i in ids])
    lacking = np.setdiff1d(np.arange(256), known)
    # Symbols of the coder: the bytes that the model knows, and one for all others.
    symbol_of = np.full(256, len(known))
    symbol_of[known] = np.arange(len(known))
    token_of = np.full(256, dictionary.unk())
    token_of[known] = ids

    length = -(-len(data) // streams) if streams else 0
    lengths = np.clip(len(data) - length * np.arange(streams), 0, length)
    offsets = length * np.arange(streams)
    tokens, state = torch.full((1, streams), dictionary.eos()), None
    coded = unknown = 0
    with use_threads(threads), tqdm(
        total=len(data), unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for step in range(length):
            logits, state = model.read(tokens, state)
            active = int((lengths > step).sum())  # shorter ones come last
            at = offsets[:active] + step
            rows = logits[0, :active].cpu()[:, ids].double().softmax(-1)
            if len(lacking):
                share = (unknown + 1 / 256) / (coded + 1)
                rows = torch.cat([rows * (1 - share), rows.new_full((active, 1), share)], dim=1)
            symbols = symbol_of[data[at]].astype(np.int32)
            symbols = exchange(symbols, categorical, rows.float().numpy())
            now = known[np.minimum(symbols, len(known) - 1)]
            escaped = np.flatnonzero(symbols == len(known))
            if len(escaped):
                which = np.searchsorted(lacking, data[at[escaped]]).astype(np.int32)
                if len(lacking) > 1:
                    which = exchange(which, families.Uniform(len(lacking)))
                now[escaped] = lacking[which]
            data[at] = now
            tokens[0, :active] = torch.from_numpy(token_of[now])
            coded, unknown = coded + active, unknown + len(escaped)
            bar.update(active)


def identity_of_build(model):
    """8 bytes that differ between installations that may compute other last digits."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    text = torch.__config__.show() + device + metadata.version("constriction")
    return hashlib.sha256(text.encode()).digest()[:8]


def _constriction():
    try:
        import constriction
    except ImportError:
        raise UserError("constriction is missing; pip install 'fairseq-sha[compress]'")
    return constriction


if __name__ == "__main__":
    sys.exit(main())
