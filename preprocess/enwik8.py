"""Make the data-bin folder of enwik8, the first 100,000,000 bytes of an English Wikipedia dump.

The split is the usual one: the first 90 million bytes are train, the next 5 million valid, the last
5 million test. Size and SHA-1 of the corpus are checked.

    python preprocess/enwik8.py --dest data-bin/enwik8

downloads enwik8.zip (36 MB) to data-bin/enwik8.zip, unless that file exists. An interrupted
download continues where it stopped when the command is run again.

    python preprocess/enwik8.py --dest data-bin/enwik8 --input enwik8.zip

uses a file that you have, zipped or not.
"""

import contextlib
import http.client
import os
import sys
import urllib.error
import urllib.request
import zipfile

from fairseq_sha.data import data_bin, known_corpora
from fairseq_sha.data.data_bin import explained
from fairseq_sha.errors import UserError

ENWIK8 = known_corpora.KnownCorpus(
    name="enwik8",
    size=100_000_000,
    sha1="57b8363b814821dc9d47aa4d41f58733519076b2",
    valid=5_000_000,
    test=5_000_000,
)
URL = "http://mattmahoney.net/dc/enwik8.zip"
TIMEOUT = 30  # seconds without an answer
ZIP_MAGIC = b"PK\x03\x04"


def main(argv=None, known=ENWIK8):
    parser = data_bin.argument_parser(__doc__)
    parser.add_argument("--input", help="enwik8 or enwik8.zip (default: download it)")
    parser.add_argument("--url", default=URL, help="where to download from (default: %(default)s)")
    args = parser.parse_args(argv)
    dest = data_bin.checked_dest(args.dest)
    path = args.input or download(args.url, dest.with_name("enwik8.zip"))
    remedy = "give another --input" if args.input else "delete it and run again"
    with data_bin.open_input(path) as file, unzipped(file, path, known, remedy) as stream:
        known_corpora.convert(stream, path, known, remedy, dest, args.all_bytes)


@contextlib.contextmanager
def unzipped(file, path, known, remedy):
    """Yield the content of ``file``: its only member if it is a zip, the file itself if not."""
    magic = file.read(len(ZIP_MAGIC))
    file.seek(0)
    # zipfile.is_zipfile would not recognise a truncated zip.
    if magic != ZIP_MAGIC:
        yield file
        return
    try:
        archive = zipfile.ZipFile(file)
        (member,) = archive.namelist()
        packed = archive.open(member)
    except ValueError:
        raise UserError(f"{path} does not hold exactly one file; {remedy}") from None
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise known_corpora.damaged(path, error, remedy) from error
    with archive, packed:
        yield known_corpora.unpack(packed, path, known, remedy)


def download(url, path):
    """Download ``url`` to ``path``, or continue where an earlier call stopped; returns ``path``.

    The file is called ``path``.part until it is complete. UserError: the network fails, or the
    folder cannot be written to.
    """
    if path.exists():
        print(f"using {path}")
        return path
    part = path.with_name(path.name + ".part")
    with explained(f"cannot write {part}", "free some space or choose another --dest"):
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
    try:
        with request(url, have) as response:
            if response.getcode() != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                receive(response, part, have)
    except UserError:
        raise
    # HTTPException: the connection breaks. ValueError: --url is not a URL.
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download {url}: {reason}; run again to continue the download, "
            "or get the file some other way and give --input"
        ) from error
    with explained(f"cannot write {path}", "choose another --dest"):
        os.rename(part, path)
    return path


def request(url, have):
    """Request ``url`` from byte ``have`` on. The response has status 416 if it ends there."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return error
    return request(url, 0)  # what we have is longer than the file


def receive(response, part, have):
    """Write the body of ``response`` to ``part``, after its first ``have`` bytes if that is the
    range that was sent.

    OSError: the network fails, or the body is shorter than announced. UserError: cannot write.
    """
    if response.getcode() != http.client.PARTIAL_CONTENT:
        have = 0  # the server does not support ranges and sends everything
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise OSError("the server sent another part of the file than the one requested")
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    with open_part(part, "ab" if have else "wb") as file:
        shown = None
        while True:
            data = response.read(data_bin.CHUNK)
            if not data:
                break
            with explained(f"cannot write {part}", "free some space and run again"):
                file.write(data)
                file.flush()
            have += len(data)
            shown = show(have, total, shown)
    if total is not None and have < total:
        raise OSError(f"the connection closed after {have:,} of {total:,} bytes")


def open_part(part, mode):
    with explained(f"cannot write {part}", "choose another --dest"):
        return open(part, mode)


def show(have, total, shown):
    """Print the progress on stderr if it differs from ``shown``, and return it.

    A terminal shows every percent, on one line; a log gets one line per 10 percent.
    """
    terminal = sys.stderr.isatty()
    if total is None:
        progress = f"{have // 1_000_000} MB"
    else:
        percent = 100 * have // total
        progress = f"{percent if terminal else percent // 10 * 10}% of {total / 1e6:.1f} MB"
    if progress != shown:
        end = "\r" if terminal and have != total else "\n"
        print(f"downloading enwik8.zip: {progress}", end=end, file=sys.stderr, flush=True)
    return progress


if __name__ == "__main__":
    data_bin.run(main)
