"""Adam (arXiv 1412.6980) with L2 regularisation, as AWD-LSTM was trained on enwik8."""

from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II

from fairseq_sha.checks import require_betas, require_not_negative, require_positive
from fairseq_sha.optim.base import ConfiguredOptimizer


@dataclass
class L2AdamConfig(FairseqDataclass):
    l2_adam_betas: List[float] = field(
        default_factory=lambda: [0.9, 0.999], metadata={"help": "betas of Adam (default: paper's)"}
    )
    l2_adam_eps: float = field(
        default=1e-8, metadata={"help": "epsilon of Adam (default: torch's)"}
    )
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "times the weights, this is added to the gradient, after clipping"},
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("l2_adam", dataclass=L2AdamConfig)
class FairseqL2Adam(ConfiguredOptimizer):
    """Registers :class:`torch.optim.Adam` with fairseq, whose own ``adam`` decays weights without
    the scale of the gradient.

    Raises:
        UserError: a setting with which training cannot work
    """

    def __init__(self, cfg, params):
        super().__init__(cfg)
        require_betas(cfg, "l2_adam_betas")
        require_positive(cfg, "l2_adam_eps")
        require_not_negative(cfg, "weight_decay")
        self._optimizer = torch.optim.Adam(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {
            "lr": self.cfg.lr[0],
            "betas": tuple(self.cfg.l2_adam_betas),
            "eps": self.cfg.l2_adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }
