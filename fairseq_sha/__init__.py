"""fairseq-sha: language models that carry state from one segment of text to the next.

A fairseq plug-in: ``--user-dir fairseq_sha`` (or ``import fairseq_sha``) registers its task,
models, optimisers and criterion.
"""

import os

import torch

from fairseq_sha import criterions, models, optim, tasks  # noqa: F401
from fairseq_sha.checkpoints import (
    explain_unreadable_checkpoints,
    keep_last_checkpoint_whole,
    save_settings_as_plain_values,
)
from fairseq_sha.errors import UserError, show_user_errors_in_one_line
from fairseq_sha.optim.clipping import clip_on_cpu

__all__ = ["UserError"]

show_user_errors_in_one_line()
explain_unreadable_checkpoints()
keep_last_checkpoint_whole()
save_settings_as_plain_values()
clip_on_cpu()

# Below 2.6 torch runs whatever code a checkpoint holds, unless told not to.
os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")

# Attention weights that all but vanish are denormal numbers, with which a CPU computes many times
# more slowly. Threads inherit this if it is set before the first of them starts.
torch.set_flush_denormal(True)
