"""An LSTM layer, computed by whichever of torch's kernels is fast and exists on this processor."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)


def lstm(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
    """torch's LSTM of one layer::

        i, f, g, o = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh
        c_t = sigmoid(f) * c_(t-1) + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t)

    Args:
        x (Tensor): ``[T, B, I]``
        h0, c0 (Tensor): the state before the first step, ``[1, B, H]``
        weight_ih, weight_hh, bias_ih, bias_hh (Tensor): as in :class:`torch.nn.LSTM`; the rows of
            i, f, g and o follow one another

    Returns:
        all h ``[T, B, H]``, and the last h and c, ``[1, B, H]``
    """
    weights = [weight_ih, weight_hh, bias_ih, bias_hh]
    if _is_one_step_without_gradient(x):
        # The kernel of whole segments takes longer to set up than one step takes to run.
        h, c = torch.lstm_cell(x[0], (h0[0], c0[0]), *weights)
        return h.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0)
    if x.device.type == "cpu":
        autocast = _cpu_autocast_dtype()
        dtype = autocast or x.dtype
        if dtype in (torch.bfloat16, torch.float16) and not _has_kernel(dtype, bool(autocast)):
            with torch.autocast("cpu", enabled=False):
                wide = [tensor.float() for tensor in (x, h0, c0, *weights)]
                return tuple(tensor.to(dtype) for tensor in _whole_segment(*wide))
    return _whole_segment(x, h0, c0, *weights)


def _whole_segment(x, h0, c0, *weights):
    # cuDNN has gradients only for what it computed "in training", which dynamic evaluation and
    # others want of a module in evaluation mode too.
    in_training = torch.is_grad_enabled()
    has_biases, num_layers, dropout, bidirectional, batch_first = True, 1, 0.0, False, False
    options = has_biases, num_layers, dropout, in_training, bidirectional, batch_first
    return torch._VF.lstm(x, (h0, c0), weights, *options)


def _is_one_step_without_gradient(x):
    return x.size(0) == 1 and not torch.is_grad_enabled()


def _cpu_autocast_dtype():
    """The type that autocast computes in on the CPU, or None where it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@functools.lru_cache(maxsize=None)
def _has_kernel(dtype, autocast):
    """Whether torch can run an LSTM in a half-precision type on this processor.

    Only a trial tells: torch leaves it to oneDNN, whose kernels for these types need AVX-512, and
    does not ask oneDNN first whether it has one.
    """
    ones = torch.ones(4, 1, dtype=torch.float32 if autocast else dtype)
    state = ones[:1].unsqueeze(0)
    try:
        with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            _whole_segment(state, state, state, ones, ones, ones[:, 0], ones[:, 0])
    except RuntimeError as error:
        reason, _, _ = str(error).partition(".")
        _warn_once(
            f"torch has no LSTM in {str(dtype).partition('.')[2]} for this processor ({reason}); "
            "LSTMs are computed in float32"
        )
        return False
    return True


_warn_once = functools.lru_cache(maxsize=None)(logger.warning)
