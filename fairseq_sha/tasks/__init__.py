"""Tasks, and everything else that fairseq's commands need to find by name.

``--user-dir`` imports this folder and ``models/``. The other folders are imported from here.
"""

from fairseq_sha import criterions, models, optim  # noqa: F401
from fairseq_sha.registrations import warn_of_taken_registrations
from fairseq_sha.tasks import (  # noqa: F401
    byte_language_modeling,
    segment_language_modeling,
)

warn_of_taken_registrations()
