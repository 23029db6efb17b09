"""Files that appear when they are complete: written under another name, then renamed."""

import os
import shutil


def copy_atomically(source, destination):
    """Copy a file. At any time the destination is the old file or the whole new one."""
    unfinished = f"{destination}.unfinished"
    try:
        shutil.copyfile(source, unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, destination)
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)
