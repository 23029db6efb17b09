"""Stochastic gradient descent with momentum, as T12 and T64 were trained.

fairseq's ``sgd`` is the same, but declares its options with ``add_args``: configs of
``fairseq-hydra-train`` cannot name it, and torch refuses to load its checkpoints safely.
"""

from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II

from fairseq_sha.checks import require_dropouts, require_not_negative
from fairseq_sha.optim.base import ConfiguredOptimizer


@dataclass
class MomentumSGDConfig(FairseqDataclass):
    momentum: float = field(
        default=0.99,
        metadata={"help": "share of the last step that is added to each (default: paper of T64)"},
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay, added to gradients (default: none)"}
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("momentum_sgd", dataclass=MomentumSGDConfig)
class FairseqMomentumSGD(ConfiguredOptimizer):
    """Registers :class:`torch.optim.SGD` with fairseq.

    Raises:
        UserError: a setting with which training cannot work
    """

    def __init__(self, cfg, params):
        super().__init__(cfg)
        require_dropouts(cfg, "momentum")  # from 0 to below 1
        require_not_negative(cfg, "weight_decay")
        self._optimizer = torch.optim.SGD(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {
            "lr": self.cfg.lr[0],
            "momentum": self.cfg.momentum,
            "weight_decay": self.cfg.weight_decay,
        }
