"""RAdam (arXiv 1908.03265) with decoupled weight decay, as SRU++ was trained."""

from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II

from fairseq_sha.checks import require_betas, require_not_negative, require_positive
from fairseq_sha.errors import UserError
from fairseq_sha.optim.base import ConfiguredOptimizer


@dataclass
class RAdamConfig(FairseqDataclass):
    radam_betas: List[float] = field(
        default_factory=lambda: [0.9, 0.999], metadata={"help": "betas of RAdam (default: paper's)"}
    )
    radam_eps: float = field(default=1e-8, metadata={"help": "epsilon of RAdam (default: torch's)"})
    weight_decay: float = field(
        default=0.0,
        metadata={
            "help": "decoupled weight decay: each update multiplies weights by 1 - lr * this"
        },
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("radam", dataclass=RAdamConfig)
class FairseqRAdam(ConfiguredOptimizer):
    """Registers :class:`torch.optim.RAdam` with fairseq, its weight decay decoupled.

    Raises:
        UserError: a setting with which training cannot work
    """

    def __init__(self, cfg, params):
        super().__init__(cfg)
        require_betas(cfg, "radam_betas")
        require_positive(cfg, "radam_eps")
        require_not_negative(cfg, "weight_decay")
        if max(cfg.lr) * cfg.weight_decay >= 1:
            raise UserError(
                f"--weight-decay {cfg.weight_decay}: times --lr {max(cfg.lr)} it must be below 1, "
                "or each update turns the sign of the weights"
            )
        self._optimizer = torch.optim.RAdam(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {
            "lr": self.cfg.lr[0],
            "betas": tuple(self.cfg.radam_betas),
            "eps": self.cfg.radam_eps,
            "weight_decay": self.cfg.weight_decay,
            "decoupled_weight_decay": True,
        }
