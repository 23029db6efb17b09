"""Packs blocks without a model, for tests of everything else."""

import zlib


class StandInCoder:
    """zlib, one part for each stream: a :class:`~fairseq_sha.packed_file.BlockCoder`."""

    def __init__(self, build=bytes(8), identity=b"stand-in"):
        self.build = build
        self.identity = identity

    def encode(self, data, streams, progress=None):
        assert 0 < streams <= len(data)
        length = -(-len(data) // streams)
        parts = [data[i * length : (i + 1) * length] for i in range(streams)]
        if progress:
            for part in parts:
                progress(len(part))
        return b"".join(zlib.compress(part) for part in parts)

    def decode(self, payload, size, streams, progress=None):
        data = bytearray()
        for _ in range(streams):
            decoder = zlib.decompressobj()
            try:
                part = decoder.decompress(payload, size - len(data) + 1)
            except zlib.error as error:
                raise ValueError(str(error))
            data += part
            payload = decoder.unused_data
            if progress:
                progress(len(part))
        return bytes(data)
