"""An over-parameterised vector (arXiv 1911.11423, section 3.3)."""

import torch
from torch import nn


class OverparameterisedVector(nn.Module):
    """``f(sigmoid(s))`` with ``f(u) = sigmoid(F u + b_F) * tanh(C u + b_C)``, of width ``H``.

    This is one step of a :class:`~fairseq_sha.modules.cells.QRNN` without output gate that reads
    ``sigmoid(s)`` from a state of zeros, as section 6.4.1 of the paper has it: the same function
    with the same parameters.

    The vector depends on no input, so it is a constant after training. With ``collapsed=True`` the
    module holds only this constant, as the parameter ``vector``; it is computed when weights that
    are not collapsed are loaded. ``linear`` holds C in its first H rows and F in the others.
    """

    def __init__(self, width, collapsed=False):
        super().__init__()
        if collapsed:
            self.vector = nn.Parameter(torch.zeros(width))
        else:
            self.seed = nn.Parameter(torch.zeros(width))
            self.linear = nn.Linear(width, 2 * width)

    def forward(self):
        """The vector: Tensor ``[H]``"""
        if hasattr(self, "vector"):
            return self.vector
        candidate, gate = self.linear(torch.sigmoid(self.seed)).chunk(2)
        return torch.sigmoid(gate) * torch.tanh(candidate)

    def upgrade_state_dict_named(self, state_dict, name):
        """fairseq's hook before loading: collapse the weights if this module is collapsed."""
        if hasattr(self, "vector") and f"{name}.seed" in state_dict:
            full = OverparameterisedVector(len(self.vector))
            full.load_state_dict(
                {key: state_dict.pop(f"{name}.{key}") for key in list(full.state_dict())}
            )
            with torch.no_grad():
                state_dict[f"{name}.vector"] = full()
