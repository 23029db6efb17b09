"""Recurrent cells. Each takes ``x [T, B, H]`` and its state, a dict that is empty at a start, and
returns its output ``[T, B, H]`` and the state that it leaves, streams on dimension 1."""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_sha.ops import linear_recurrence, sru


class LSTM(nn.LSTM):
    """torch's; the state holds ``h`` and ``c``, ``[1, B, H]``."""

    def __init__(self, width):
        super().__init__(width, width)

    def forward(self, x, state):
        if len(x) == 1 and state and not torch.is_grad_enabled():
            # For one step the kernel of segments takes longer to set up than to run.
            start = state["h"][0], state["c"][0]
            h, c = torch.lstm_cell(x[0], start, *self._flat_weights)
            return h.unsqueeze(0), {"h": h.unsqueeze(0), "c": c.unsqueeze(0)}
        start = (state["h"], state["c"]) if state else None
        out, (h, c) = super().forward(x, start)
        return out, {"h": h, "c": c}


class LayerNormLSTM(nn.Module):
    """An LSTM with layer normalisation of both contributions to the gates and of the cell
    (arXiv 1607.06450, equations 20 to 22); the state holds ``h`` and ``c``, ``[1, B, H]``.

    torch has no kernel for it: it is a loop over time, and slow.
    """

    def __init__(self, width):
        super().__init__()
        # The bias of the equations is that of the norms.
        self.input = nn.Linear(width, 4 * width, bias=False)
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.norm_input = nn.LayerNorm(4 * width)
        self.norm_hidden = nn.LayerNorm(4 * width)
        self.norm_cell = nn.LayerNorm(width)

    def forward(self, x, state):
        of_inputs = self.norm_input(self.input(x))
        h = state["h"][0] if state else torch.zeros_like(x[0])
        c = state["c"][0] if state else torch.zeros_like(x[0])
        return self.recurrence(of_inputs, h, c)

    def recurrence(self, of_inputs, h, c):
        outputs = []
        for of_input in of_inputs.unbind():
            i, f, g, o = (of_input + self.norm_hidden(self.hidden(h))).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(self.norm_cell(c))
            outputs.append(h)
        return torch.stack(outputs), {"h": h.unsqueeze(0), "c": c.unsqueeze(0)}


class SRU(nn.Module):
    """A simple recurrent unit with a highway connection (arXiv 1709.02755); the state holds ``c``,
    ``[1, B, H]``, in float32 or wider."""

    recurrence = staticmethod(sru)

    def __init__(self, width):
        super().__init__()
        self.input = nn.Linear(width, 3 * width, bias=False)
        self.weight = nn.Parameter(torch.empty(2, width).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.zeros(2, width))

    def forward(self, x, state):
        u = self.input(x).unflatten(-1, (3, -1))
        c0 = state["c"][0] if state else torch.zeros_like(x[0])
        out, c = self.recurrence(u, x, self.weight, self.bias, c0)
        return out, {"c": c.unsqueeze(0)}


class MinGRU(nn.Module):
    """The minimal GRU (arXiv 2410.01201, section 3.1): gates do not read the state.

    The state holds ``h``, ``[1, B, expansion * H]``, in float32 or wider.

    Args:
        width (int): ``H``
        expansion (float): width of the state in multiples of H, rounded down; unless it is 1, a
            linear map follows
    """

    gates = 1
    recurrence = staticmethod(linear_recurrence)

    def __init__(self, width, expansion=1.0):
        super().__init__()
        inner = int(expansion * width)
        self.input = nn.Linear(width, (1 + self.gates) * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False) if expansion != 1 else None

    def forward(self, x, state):
        projected = self.input(x)
        # Near 1, a gate in half precision is 1: the state would never decay.
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        candidate, *gates = wide.chunk(1 + self.gates, -1)
        keep, take = self.keep_and_take(*gates)
        h0 = state["h"][0] if state else torch.zeros_like(candidate[0])
        out, h = self.recurrence(keep, take * positive(candidate), h0)
        out = out.to(projected.dtype)
        return out if self.output is None else self.output(out), {"h": h.unsqueeze(0)}

    def keep_and_take(self, z):
        """How much of the old state is kept and of the candidate is taken, which sum to 1."""
        return torch.sigmoid(-z), torch.sigmoid(z)


class MinLSTM(MinGRU):
    """The minimal LSTM (arXiv 2410.01201, section 3.2), its gates normalised to a sum of 1."""

    gates = 2

    def keep_and_take(self, f, i):
        # sigmoid(f) / (sigmoid(f) + sigmoid(i)), which is not 0 / 0 for gates that are both shut.
        difference = F.logsigmoid(f) - F.logsigmoid(i)
        return torch.sigmoid(difference), torch.sigmoid(-difference)


def positive(x):
    """``x + 0.5`` for x of at least 0, else ``sigmoid(x)`` (arXiv 2410.01201, appendix B.3)."""
    # As a sum, since torch.where takes longer than all of this.
    return F.relu(x) + torch.sigmoid(x.clamp(max=0))
