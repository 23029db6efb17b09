"""RAdam (arXiv 1908.03265) with decoupled weight decay, which SRU++ is trained with."""

from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II

from fairseq_sha.checks import require_at_least, require_betas
from fairseq_sha.optim.own_options import OwnOptionsOptimizer


class DecoupledRAdam(torch.optim.RAdam):
    """torch's RAdam, before each step of which weights shrink by ``lr * shrink`` (as
    ``decoupled_weight_decay`` does, which torch has since 2.1 only)."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, shrink=0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps)
        for group in self.param_groups:
            group["shrink"] = shrink  # torch's own weight_decay is not decoupled

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["shrink"] != 0:
                torch._foreach_mul_(params, 1 - group["lr"] * group["shrink"])
        return super().step(closure)


@dataclass
class RAdamConfig(FairseqDataclass):
    radam_betas: List[float] = field(
        default_factory=lambda: [0.9, 0.999], metadata={"help": "betas of RAdam (default: paper's)"}
    )
    radam_eps: float = field(default=1e-8, metadata={"help": "epsilon of RAdam (default: torch's)"})
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "part by which weights shrink in each update, times the learning rate"},
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("radam", dataclass=RAdamConfig)
class FairseqRAdam(OwnOptionsOptimizer):
    """Registers :class:`DecoupledRAdam` with fairseq."""

    def __init__(self, cfg, params):
        super().__init__(cfg)
        require_betas(cfg, "radam_betas")
        require_at_least(0, cfg, "radam_eps", "weight_decay")
        self._optimizer = DecoupledRAdam(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {
            "lr": self.cfg.lr[0],
            "betas": tuple(self.cfg.radam_betas),
            "eps": self.cfg.radam_eps,
            "shrink": self.cfg.weight_decay,
        }
