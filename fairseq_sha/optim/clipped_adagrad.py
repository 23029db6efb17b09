"""Adagrad with steps that are clipped tensor by tensor, as Adaptive Span was trained
(arXiv 1905.07799, section 3.1, and its published code)."""

from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II

from fairseq_sha.checks import require_not_negative, require_positive
from fairseq_sha.optim.base import PerTensorNormOptimizer


class ClippedAdagrad(torch.optim.Optimizer):
    """Adagrad that scales down the steps of large gradients, computed for lists of tensors at once.

    Where the norm of a tensor's gradient exceeds ``clip``, its step is computed from the gradient
    scaled down to this norm. The sum of squares takes the gradient as it is.

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
            # A branch would read the norms and so make the CPU wait for the GPU.
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
class FairseqClippedAdagrad(PerTensorNormOptimizer):
    """Registers :class:`ClippedAdagrad` with fairseq.

    Raises:
        UserError: a setting with which training cannot work
    """

    def __init__(self, cfg, params):
        super().__init__(cfg)
        require_not_negative(cfg, "adagrad_clip")
        # Weights that have had no gradient yet are divided by it.
        require_positive(cfg, "adagrad_eps")
        self._optimizer = ClippedAdagrad(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {
            "lr": self.cfg.lr[0],
            "eps": self.cfg.adagrad_eps,
            "clip": self.cfg.adagrad_clip,
        }
