"""Files that appear when they are complete: written under another name, then renamed."""

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path

UNFINISHED = ".unfinished"
#: Of a name, in bytes: what is added is 21 more, and file systems allow 255.
LONGEST = 230


@contextlib.contextmanager
def unfinished(path):
    """Yield the name of an empty file beside ``path``. At the end of the block, what was written
    there takes the place of ``path``; if the block fails, it is removed.

    At any time ``path`` is the old file, if there was one, or the whole new one. If several
    processes write it, the last one to end wins.

    Args:
        path (str or Path): what to write; its folder must exist

    Raises:
        OSError: the file cannot be written
    """
    temporary = _temporary_name(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # otherwise a power cut could leave an empty file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def unfinished_folder(path):
    """As :func:`unfinished`, for a folder that does not exist yet: yield a new folder beside it,
    which takes the name ``path`` at the end of the block.

    Raises:
        OSError: the folder cannot be made, or ``path`` exists by then
    """
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(path):
    """A name beside ``path`` that nobody else has: a rename cannot leave the file system."""
    path = Path(path)
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST])
    return path.with_name(f".{name}.{secrets.token_hex(4)}{UNFINISHED}")


def write_atomically(path, content):
    """Write a file in one step, see :func:`unfinished`.

    Args:
        path (str or Path): what to write; its folder must exist
        content (bytes or str): text is written in UTF-8, with ``?`` for what UTF-8 cannot encode
            (the undecodable bytes of a file name)
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    with unfinished(path) as temporary:
        temporary.write_bytes(content)


def copy_atomically(source, destination):
    """Copy a file in one step, see :func:`unfinished`."""
    with unfinished(destination) as temporary:
        shutil.copyfile(source, temporary)


def try_lock(path):
    """Lock a file among all processes and threads, without waiting.

    Args:
        path (str or Path): the file, which is made if it is missing, and not changed otherwise;
            its folder must exist

    Returns:
        an open file that holds the lock until it is closed; None if another one has it
    """
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def locked(path):
    """Hold the lock of a file, see :func:`try_lock`; wait for it."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
