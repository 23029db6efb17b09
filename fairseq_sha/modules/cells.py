"""Recurrent cells.

A cell is called as ``cell(x, state)`` with ``x [T, B, H]`` and its state, a dict of tensors that is
empty at the start of a text. It returns its output ``[T, B, H]`` and the new state. The streams are
dimension 1 of every tensor of the state.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_sha.ops import dropout, layer_norm_lstm, linear_recurrence, lstm, sru


class LSTM(nn.LSTM):
    """torch's LSTM of one layer; the state holds ``h`` and ``c``, ``[1, B, hidden_width]``.

    Args:
        width (int): of the input
        hidden_width (int): of the output and the state; default: ``width``
        weight_dropout (float): dropout of the recurrent matrix ``W_hh`` in training, with one mask
            for the whole segment and all streams (DropConnect, arXiv 1708.02182, section 2)
    """

    recurrence = staticmethod(lstm)

    def __init__(self, width, hidden_width=None, weight_dropout=0.0):
        super().__init__(width, hidden_width or width)
        self.weight_dropout = weight_dropout

    def forward(self, x, state, training=False):
        """``training`` says whether to drop recurrent weights."""
        zeros = x.new_zeros(1, x.size(1), self.hidden_size)
        h0, c0 = (state["h"], state["c"]) if state else (zeros, zeros)
        # A run with automatic mixed precision leaves a state in half precision, and one without it
        # may go on from there.
        h0, c0 = h0.to(x.dtype), c0.to(x.dtype)
        weight_ih, weight_hh, *biases = self._flat_weights
        weight_hh = dropout(weight_hh, self.weight_dropout, training)
        out, h, c = self.recurrence(x, h0, c0, weight_ih, weight_hh, *biases)
        return out, {"h": h, "c": c}


class LayerNormLSTM(nn.Module):
    """An LSTM with layer normalisation of both contributions to the gates and of the cell
    (arXiv 1607.06450, equations 20 to 22); the state holds ``h`` and ``c``, ``[1, B, H]``, in
    float32 or wider. torch has no kernel for it."""

    recurrence = staticmethod(layer_norm_lstm)

    def __init__(self, width):
        super().__init__()
        # The norms have the biases of the equations.
        self.input = nn.Linear(width, 4 * width, bias=False)
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.norm_input = nn.LayerNorm(4 * width)
        self.norm_hidden = nn.LayerNorm(4 * width)
        self.norm_cell = nn.LayerNorm(width)

    def forward(self, x, state):
        from_input = self.norm_input(self.input(x))
        zeros = torch.zeros_like(x[0])
        h, c = (state["h"][0], state["c"][0]) if state else (zeros, zeros)
        norms = [(norm.weight, norm.bias) for norm in (self.norm_hidden, self.norm_cell)]
        out, h, c = self.recurrence(from_input, h, c, self.hidden.weight, *norms)
        return out, {"h": h.unsqueeze(0), "c": c.unsqueeze(0)}


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


class QRNN(nn.Module):
    """A quasi-recurrent layer with f- or fo-pooling (arXiv 1611.01576, section 2), whose gates see
    the last ``window`` inputs and not the state::

        z_t, f_t, o_t = W [x_t; x_(t-1)] + b      then tanh of z and sigmoid of f and o
        c_t = f_t * z_t + (1 - f_t) * c_(t-1)
        out_t = o_t * c_t

    As in the published code of AWD-QRNN, and unlike in the paper, ``f`` is the gate of the new
    value. The state holds ``c``, ``[1, B, hidden_width]``, in float32 or wider, and with a window
    of 2 the last input ``x``, ``[1, B, width]``; both are zero at a start.

    Args:
        width (int): of the input
        hidden_width (int): of the output and the state; default: ``width``
        window (int): how many inputs each step sees, 1 or 2
        output_gate (bool): whether there is ``o``; without it the output is ``c``
        weight_dropout (float): dropout of ``W`` in training, with one mask for the whole segment
            and all streams
    """

    recurrence = staticmethod(linear_recurrence)

    def __init__(self, width, hidden_width=None, window=2, output_gate=True, weight_dropout=0.0):
        super().__init__()
        self.window = window
        self.num_maps = 3 if output_gate else 2
        self.weight_dropout = weight_dropout
        self.input = nn.Linear(window * width, self.num_maps * (hidden_width or width))

    def forward(self, x, state, training=False):
        """``training`` says whether to drop weights."""
        new_state, seen = {}, x
        if self.window == 2:
            before = state["x"] if state else torch.zeros_like(x[:1])
            seen = torch.cat([x, torch.cat([before, x[:-1]])], -1)
            new_state["x"] = x[-1:].clone()
        weight = dropout(self.input.weight, self.weight_dropout, training)
        projected = F.linear(seen, weight, self.input.bias)
        # In half precision a gate near 0 would leave 1 - f at 1, and the state would never decay.
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        z, f, *o = wide.chunk(self.num_maps, -1)
        c0 = state["c"][0] if state else torch.zeros_like(z[0])
        out, c = self.recurrence(torch.sigmoid(-f), torch.sigmoid(f) * torch.tanh(z), c0)
        new_state["c"] = c.unsqueeze(0)
        for gate in o:
            out = torch.sigmoid(gate) * out
        return out.to(projected.dtype), new_state


class MinGRU(nn.Module):
    """The minimal GRU (arXiv 2410.01201, section 3.1), whose gate does not depend on the state::

        h_t = (1 - z_t) * h_(t-1) + z_t * g(candidate_t)    with z_t = sigmoid(W_z x_t)

    The state holds ``h``, ``[1, B, expansion * H]``, in float32 or wider.

    Args:
        width (int): ``H``
        expansion (float): width of the state in multiples of H, rounded down; unless it is 1, a
            linear map to width H follows
    """

    num_gates = 1
    recurrence = staticmethod(linear_recurrence)

    def __init__(self, width, expansion=1.0):
        super().__init__()
        inner = int(expansion * width)
        self.input = nn.Linear(width, (1 + self.num_gates) * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False) if expansion != 1 else None

    def forward(self, x, state):
        projected = self.input(x)
        # In half precision a gate near 1 is rounded to 1, and the state would never decay.
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        candidate, *gates = wide.chunk(1 + self.num_gates, -1)
        f, i = self.forget_and_input_gates(*gates)
        h0 = state["h"][0] if state else torch.zeros_like(candidate[0])
        out, h = self.recurrence(f, i * g(candidate), h0)
        out = out.to(projected.dtype)
        return out if self.output is None else self.output(out), {"h": h.unsqueeze(0)}

    def forget_and_input_gates(self, z):
        """The factors of the old state and of the candidate, which sum to 1; arguments are what the
        linear maps of the gates give."""
        return torch.sigmoid(-z), torch.sigmoid(z)


class MinLSTM(MinGRU):
    """The minimal LSTM (arXiv 2410.01201, section 3.2), whose gates are normalised::

        h_t = f_t / (f_t + i_t) * h_(t-1) + i_t / (f_t + i_t) * g(candidate_t)

    The state is that of :class:`MinGRU`.
    """

    num_gates = 2

    def forget_and_input_gates(self, f, i):
        # sigmoid(f) / (sigmoid(f) + sigmoid(i)), without the 0 / 0 of gates that are both shut.
        difference = F.logsigmoid(f) - F.logsigmoid(i)
        return torch.sigmoid(difference), torch.sigmoid(-difference)


def g(x):
    """The activation of candidate states that keeps them positive (arXiv 2410.01201, appendix B.3):
    ``g(x) = x + 0.5`` where ``x >= 0``, else ``sigmoid(x)``."""
    # A sum is faster than torch.where.
    return F.relu(x) + torch.sigmoid(x.clamp(max=0))
