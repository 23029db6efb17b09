"""Adagrad with steps that are clipped tensor by tensor, which Adaptive Span was trained with
(arXiv 1905.07799, section 3.1, and its published code)."""

from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II

from fairseq_sha.checks import require_at_least
from fairseq_sha.errors import UserError
from fairseq_sha.optim.own_options import PerTensorOptimizer


def clipped_adagrad_reference(w, g, total, lr, eps, clip):
    """One step for one tensor, written out: returns new ``w`` and ``total``."""
    total = total + g**2
    norm = g.norm()
    scale = clip / norm if 0 < clip < norm else 1.0
    return w - lr * scale * g / (total.sqrt() + eps), total


class ClippedAdagrad(torch.optim.Optimizer):
    """Adagrad over lists of tensors at once, the steps of large gradients scaled down.

    Where the norm of a tensor's gradient exceeds ``clip``, its step is that of the gradient scaled
    to this norm, but the sum of squares takes the gradient as it is.

    Args:
        params: as for any torch optimiser
        lr (float): learning rate
        eps (float): added to the root of the sum of squared gradients
        clip (float): largest norm of a tensor's gradient; 0 for no clipping
    """

    def __init__(self, params, lr=0.07, eps=1e-10, clip=0.03):
        super().__init__(params, dict(lr=lr, eps=eps, clip=clip))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step(params, group)
        return loss

    def _step(self, params, group):
        for p in params:
            if not self.state[p]:
                self.state[p]["total"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        totals = [self.state[p]["total"] for p in params]
        torch._foreach_addcmul_(totals, grads, grads)
        roots = torch._foreach_sqrt(totals)
        torch._foreach_add_(roots, group["eps"])
        if group["clip"] > 0:
            norms = torch.stack(torch._foreach_norm(grads))
            # A divisor and no branch: reading the norms would make the CPU wait for the GPU.
            excess = (norms / group["clip"]).clamp(min=1.0)
            torch._foreach_mul_(roots, list(excess.unbind()))
        torch._foreach_addcdiv_(params, grads, roots, -group["lr"])


@dataclass
class ClippedAdagradConfig(FairseqDataclass):
    adagrad_clip: float = field(
        default=0.03,
        metadata={
            "help": "norm above which the step of a parameter tensor is scaled down; 0 for none "
            "(default: published script of Adaptive Span)"
        },
    )
    adagrad_eps: float = field(
        default=1e-10, metadata={"help": "epsilon of Adagrad (default: torch's)"}
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("clipped_adagrad", dataclass=ClippedAdagradConfig)
class FairseqClippedAdagrad(PerTensorOptimizer):
    """Registers :class:`ClippedAdagrad` with fairseq."""

    def __init__(self, cfg, params):
        super().__init__(cfg)
        require_at_least(0, cfg, "adagrad_clip")
        if not cfg.adagrad_eps > 0:
            raise UserError(
                f"--adagrad-eps {cfg.adagrad_eps}: must be positive; what has had no gradient yet "
                "is divided by it"
            )
        self._optimizer = ClippedAdagrad(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {
            "lr": self.cfg.lr[0],
            "eps": self.cfg.adagrad_eps,
            "clip": self.cfg.adagrad_clip,
        }
