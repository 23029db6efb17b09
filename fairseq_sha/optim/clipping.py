"""Clipping of gradients on the CPU of a machine with a GPU."""

import functools

import torch
from fairseq import utils


def clip_on_cpu():
    """Make fairseq clip gradients where they are. Where there is a GPU, it collects their norms on
    it, and cannot then scale gradients on the CPU: ``--cpu`` would fail at the first update."""
    clip = utils.clip_grad_norm_

    @functools.wraps(clip)
    def clip_in_place(params, max_norm, aggregate_norm_fn=None):
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        on_cpu = all(p.device.type == "cpu" for p in params)
        if not (on_cpu and params and torch.cuda.is_available()) or aggregate_norm_fn is not None:
            return clip(params, max_norm, aggregate_norm_fn)
        if max_norm > 0:
            return torch.nn.utils.clip_grad_norm_(params, max_norm)
        return torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()

    utils.clip_grad_norm_ = clip_in_place
