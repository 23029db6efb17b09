"""LAMB (arXiv 1904.00962) without bias correction, and with a lower bound on the trust ratio
(arXiv 1911.11423, section 4.2)."""

from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.optim import register_optimizer
from omegaconf import II

from fairseq_sha.checks import require_betas, require_not_negative, require_positive
from fairseq_sha.optim.base import PerTensorNormOptimizer

MAX_WEIGHT_NORM = 10.0


class MinTrustLAMB(torch.optim.Optimizer):
    """Min-trust LAMB, computed for lists of tensors at once::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        update = m / (sqrt(v) + eps) + weight_decay * w
        trust = max(min(|w|, 10) / |update|, min_trust)
        w = w - lr * trust * update

    A ratio without meaning, because one of the norms is 0, counts as 1.

    Args:
        params: as for any torch optimiser
        lr (float): learning rate
        betas (tuple of float): decay of the running means of the gradient and its square
        eps (float): added to the root of the mean square
        weight_decay (float): added to the update before its norm is taken
        min_trust (float): lower bound on each tensor's trust ratio; 0 is plain LAMB
    """

    def __init__(
        self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, min_trust=0.0
    ):
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, min_trust=min_trust
        )
        super().__init__(params, defaults)
        self.trust_ratios = None  # in the latest step: Tensor [number of parameter tensors]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ratios = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # All tensors at once save launches on a GPU. One at a time stays in a CPU's cache.
            on_cpu = all(p.device.type == "cpu" for p in params)
            batches = [[p] for p in params] if on_cpu else [params]
            ratios += [self._step(batch, group) for batch in batches]
        self.trust_ratios = torch.cat(ratios) if ratios else None
        return loss

    def _step(self, params, group):
        for p in params:
            if not self.state[p]:
                self.state[p]["mean"] = torch.zeros_like(p)
                self.state[p]["mean_square"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        means = [self.state[p]["mean"] for p in params]
        squares = [self.state[p]["mean_square"] for p in params]
        beta1, beta2 = group["betas"]

        if all(map(suits_fused_kernel, params)):
            updates = fused_adam_updates(params, grads, means, squares, beta1, beta2, group["eps"])
        else:
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            updates = torch._foreach_sqrt(squares)
            torch._foreach_add_(updates, group["eps"])
            updates = torch._foreach_div(means, updates)
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])

        weight_norms = torch.stack(torch._foreach_norm(params)).clamp(max=MAX_WEIGHT_NORM)
        update_norms = torch.stack(torch._foreach_norm(updates))
        degenerate = (weight_norms == 0) | (update_norms == 0)
        ratios = torch.where(degenerate, torch.ones_like(weight_norms), weight_norms / update_norms)
        ratios = ratios.clamp(min=group["min_trust"])
        # Kept as tensors: reading them out would make the CPU wait for the GPU.
        torch._foreach_addcmul_(params, updates, list(ratios.unbind()), -group["lr"])
        return ratios


def suits_fused_kernel(p):
    """The kernel runs on a CPU and pairs weights and gradients by their place in memory."""
    same_kind = p.grad.layout == torch.strided and p.grad.dtype == p.dtype
    return p.device.type == "cpu" and same_kind and p.grad.stride() == p.stride()


def fused_adam_updates(params, grads, means, squares, beta1, beta2, eps):
    """``m / (sqrt(v) + eps)`` by torch's fused kernel of Adam, which on a CPU is several times as
    fast as one operation after another. The kernel takes a step with learning rate -1 from 0, as if
    after infinitely many steps, so that its bias correction is 1."""
    updates = [torch.zeros_like(p) for p in params]
    steps = [torch.tensor(float("inf")) for _ in params]
    torch._fused_adam_(
        updates,
        grads,
        means,
        squares,
        [],
        steps,
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return updates


@dataclass
class MinTrustLAMBConfig(FairseqDataclass):
    lamb_betas: List[float] = field(
        default_factory=lambda: [0.9, 0.999],
        metadata={"help": "betas of LAMB (default: author's published code)"},
    )
    lamb_eps: float = field(
        default=1e-6, metadata={"help": "epsilon of LAMB (default: author's published code)"}
    )
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "weight decay, a part of the update that the trust ratio scales"},
    )
    min_trust: float = field(
        default=0.0,
        metadata={
            "help": "lower bound on each tensor's trust ratio; 0 is plain LAMB (paper: 0.25)"
        },
    )
    log_trust_ratios: bool = field(
        default=False,
        metadata={
            "help": "log the smallest, mean and largest trust ratio of all tensors, and the "
            "percentage of tensors at the lower bound (costs a synchronisation on GPU)"
        },
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("min_trust_lamb", dataclass=MinTrustLAMBConfig)
class FairseqMinTrustLAMB(PerTensorNormOptimizer):
    """Registers :class:`MinTrustLAMB` with fairseq.

    Raises:
        UserError: a setting with which training cannot work
    """

    def __init__(self, cfg, params):
        super().__init__(cfg)
        require_betas(cfg, "lamb_betas")
        require_positive(cfg, "lamb_eps")
        require_not_negative(cfg, "weight_decay", "min_trust")
        self._optimizer = MinTrustLAMB(params, **self.optimizer_config)
        if cfg.log_trust_ratios:
            # A hook, because mixed precision does not call this class's step().
            self._optimizer.register_step_post_hook(lambda *_: self.log())

    @property
    def optimizer_config(self):
        return {
            "lr": self.cfg.lr[0],
            "betas": tuple(self.cfg.lamb_betas),
            "eps": self.cfg.lamb_eps,
            "weight_decay": self.cfg.weight_decay,
            "min_trust": self.cfg.min_trust,
        }

    def log(self):
        ratios = self.optimizer.trust_ratios
        if ratios is None:
            return
        ratios = ratios.float()
        at_bound = (ratios <= self.cfg.min_trust).float().mean() * 100
        for name, value in (
            ("trust_min", ratios.min()),
            ("trust_mean", ratios.mean()),
            ("trust_max", ratios.max()),
            ("trust_at_bound", at_bound),
        ):
            # Without a minimum, some ratios are below 0.0001.
            metrics.log_scalar(name, value.item(), priority=450, round=8)
