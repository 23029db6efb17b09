"""The learning rate of torch's CosineAnnealingLR under a linear warm-up, as SRU++ was trained
(arXiv 2102.12459, its published code)."""

import math
from dataclasses import dataclass, field
from typing import List

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from fairseq_sha.checks import require_at_least, require_not_negative
from fairseq_sha.errors import UserError


@dataclass
class CosineAnnealingConfig(FairseqDataclass):
    warmup_updates: int = field(
        default=0,
        metadata={"help": "warm the learning rate up linearly for so many updates (default: none)"},
    )
    warmup_skips_zero: bool = field(
        default=False,
        metadata={
            "help": "warm up from lr / warmup_updates to lr; otherwise warm-up is one update "
            "behind, and the first update has learning rate 0 (default: as fairseq's cosine)"
        },
    )
    lr: List[float] = II("optimization.lr")
    max_update: int = II("optimization.max_update")


@register_lr_scheduler("cosine_annealing", dataclass=CosineAnnealingConfig)
class CosineAnnealing(FairseqLRScheduler):
    """Half a cosine over the whole run, from update 0 on, scaled to meet the end of warm-up.

    After n of N updates, with W updates of warm-up::

        lr(n) = lr * n / W                                 n < W, or lr * (n + 1) / W
        lr(n) = lr(W - 1) * half(n) / half(W - 1)          otherwise
        half(n) = (1 + cos(pi * n / N)) / 2

    torch's CosineAnnealingLR derives each rate from the one before. This is what it gives if
    warm-up overwrites the rate. fairseq's ``cosine`` begins its half period after warm-up, and so
    stays higher: by 6 % in the middle of SRU++'s run of 400,000 updates.

    Raises:
        UserError: no number of updates, several learning rates, or a negative setting
    """

    def __init__(self, cfg, optimizer):
        super().__init__(cfg, optimizer)
        require_not_negative(cfg, "lr")
        require_at_least(0, cfg, "warmup_updates")
        if len(cfg.lr) > 1:
            raise UserError(
                f"--lr {list(cfg.lr)}: --lr-scheduler cosine_annealing takes one; for one an "
                "epoch use --lr-scheduler fixed"
            )
        if cfg.warmup_updates == 1 and not cfg.warmup_skips_zero:
            raise UserError(
                "--warmup-updates 1: all learning rates would be 0, as that of the first update "
                "is; add --warmup-skips-zero, or give 0 or at least 2"
            )
        if cfg.max_update <= 0:
            raise UserError(
                f"--max-update {cfg.max_update}: --lr-scheduler cosine_annealing needs the number "
                "of updates; give it"
            )

    def step_update(self, num_updates):
        """Set the learning rate of the update that follows ``num_updates`` updates; return it."""
        self.optimizer.set_lr(self._rate(num_updates))
        return self.optimizer.get_lr()

    def _rate(self, n):
        warmup = self.cfg.warmup_updates
        if n < warmup:
            return self._warm(n)
        if n >= self.cfg.max_update:
            return 0.0
        if warmup == 0:
            return self.cfg.lr[0] * self._half(n)
        return self._warm(warmup - 1) * self._half(n) / self._half(warmup - 1)

    def _warm(self, n):
        return self.cfg.lr[0] * (n + self.cfg.warmup_skips_zero) / self.cfg.warmup_updates

    def _half(self, n):
        return (1 + math.cos(math.pi * n / self.cfg.max_update)) / 2
