"""``fairseq-sha`` with a stand-in for portable models, where torch and fairseq cannot be imported.

    python -m tests.stand_in_compress compress --path MODEL FILE

MODEL may be anything. If its name is ``store``, blocks are stored as they are.
"""

import re
import sys
import types
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


class StoringCoder(StandInCoder):
    """Makes nothing smaller."""

    def encode(self, data, streams, progress=None):
        return data


def portable():
    """A module in the place of ``fairseq_sha.portable``."""
    module = types.ModuleType("fairseq_sha.portable")
    module.is_portable_file = lambda path: True
    module.load = lambda path: StoringCoder() if path == "store" else StandInCoder()
    return module


def main():
    for name in ("torch", "fairseq", "constriction"):
        sys.modules[name] = None
    import fairseq_sha
    from fairseq_sha import commands

    fairseq_sha.portable = sys.modules["fairseq_sha.portable"] = portable()
    status = commands.main()
    with open("/proc/self/status", encoding="utf-8") as file:
        most = re.search(r"VmHWM:\s*(\d+) kB", file.read())[1]
    print("maximum KB:", most, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
