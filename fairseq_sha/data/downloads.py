"""Download a file, or the rest of it."""

import http.client
import os
import sys
import urllib.error
import urllib.request

import fairseq_sha
from fairseq_sha.data import data_bin
from fairseq_sha.data.data_bin import explained
from fairseq_sha.errors import UserError

TIMEOUT = 30  # seconds without an answer
# Some servers refuse the name that urllib gives itself.
USER_AGENT = f"fairseq-sha/{fairseq_sha.__version__}"


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
                receive(response, part, have, path.name)
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
    headers = {"User-Agent": USER_AGENT}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return error
    return request(url, 0)  # what we have is longer than the file


def receive(response, part, have, name):
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
            shown = show(name, have, total, shown)
    if total is not None and have < total:
        raise OSError(f"the connection closed after {have:,} of {total:,} bytes")


def open_part(part, mode):
    with explained(f"cannot write {part}", "choose another --dest"):
        return open(part, mode)


def show(name, have, total, shown):
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
        print(f"downloading {name}: {progress}", end=end, file=sys.stderr, flush=True)
    return progress
