"""Corpora whose exact bytes are known: unpack, verify and convert them."""

import hashlib
import io
import zipfile
import zlib
from typing import NamedTuple

from fairseq_sha.data import data_bin
from fairseq_sha.errors import UserError


class KnownCorpus(NamedTuple):
    """What a corpus must look like once it is unpacked."""

    name: str
    size: int  # bytes
    sha1: str
    valid: int  # bytes
    test: int  # bytes


def unpack(packed, path, corpus, remedy):
    """The bytes of a compressed stream as a stream in memory; known corpora are small enough.

    packed: binary stream that decompresses
    path, remedy: for messages: the name of the file, and what to do if it is damaged or wrong
    Stops one byte after the corpus's size, since a wrong file may have any size.
    UserError: the compressed data is damaged or ends early.
    """
    unpacked = io.BytesIO()
    try:
        while unpacked.tell() <= corpus.size:
            data = packed.read(min(data_bin.CHUNK, corpus.size + 1 - unpacked.tell()))
            if not data:
                break
            unpacked.write(data)
    # zipfile raises RuntimeError for an encrypted member, and NotImplementedError, a subclass, for
    # a compression method that Python lacks. No real corpus has either, so both are damage.
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise damaged(path, error, remedy) from error
    return unpacked


def damaged(path, reason, remedy):
    """The error for a file that cannot be unpacked."""
    return UserError(f"{path} is damaged ({reason}); {remedy}")


def verify(stream, path, corpus, remedy):
    """Check that a seekable stream holds exactly the corpus; UserError if not."""
    size = stream.seek(0, io.SEEK_END)
    if size != corpus.size:
        found = f"{size:,}" if size < corpus.size else "more"
        problem = f"it has {found} bytes unpacked, not {corpus.size:,}"
    else:
        stream.seek(0)
        digest = hashlib.sha1()
        for data in iter(lambda: stream.read(data_bin.CHUNK), b""):
            digest.update(data)
        if digest.hexdigest() == corpus.sha1:
            return
        problem = f"its SHA-1 is {digest.hexdigest()}, not {corpus.sha1}"
    raise UserError(f"{path} is not {corpus.name}: {problem}; {remedy}")


def convert(stream, path, corpus, remedy, dest, all_bytes):
    """Verify the corpus and write its data-bin folder; see ``data_bin.convert``."""
    verify(stream, path, corpus, remedy)
    data_bin.convert(stream, path, dest, corpus.valid, corpus.test, all_bytes)
