"""Tasks, and everything else that fairseq's commands need to find by name.

``--user-dir`` imports this folder and ``models/``. The other folders are imported from here.
"""

from fairseq_sha import criterions, models, optim  # noqa: F401
from fairseq_sha.models.family import architecture_names
from fairseq_sha.registrations import taken_names, warn_of_taken_names
from fairseq_sha.tasks import (  # noqa: F401
    byte_language_modeling,
    segment_language_modeling,
)

warn_of_taken_names(
    taken_names(
        models=architecture_names(),
        tasks=("segment_language_modeling", "byte_language_modeling"),
    )
)
