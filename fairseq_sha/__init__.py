"""Language models that carry state from one segment of text to the next: a plug-in for fairseq.

``--user-dir fairseq_sha`` registers the tasks, models, optimisers and criterion with fairseq's own
commands. From Python, call :func:`register`. Importing the package alone registers nothing,
changes nothing in the process, and imports neither torch nor fairseq.
"""

from fairseq_sha.errors import UserError

__all__ = ["UserError", "__version__", "register"]

__version__ = "0.1.0"


def register():
    """Register the tasks, models, optimisers and criterion with fairseq.

    Call it before fairseq is given ``--user-dir`` in a process that has already imported the
    package: fairseq takes an imported package for a registered one.
    """
    from fairseq_sha import tasks  # noqa: F401
