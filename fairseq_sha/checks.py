"""Checks of configs, which raise a UserError that names the option, and of torch."""

import torch

from fairseq_sha.errors import UserError


def require_at_least(minimum, cfg, *names):
    for name in names:
        if not getattr(cfg, name) >= minimum:
            raise UserError(f"{_option(name)} {getattr(cfg, name)}: must be at least {minimum}")


def require_dropouts(cfg, *names):
    for name in names:
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"{_option(name)} {getattr(cfg, name)}: must be at least 0 and below 1")


def require_betas(cfg, name):
    betas = list(getattr(cfg, name))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{_option(name)} {betas}: give two numbers of at least 0 and below 1")


def require_heads_that_divide(cfg):
    if cfg.width % cfg.n_head:
        raise UserError(
            f"--n-head {cfg.n_head}: does not divide --width {cfg.width}; heads share it evenly"
        )


def _option(name):
    return "--" + name.replace("_", "-")


def torch_is_at_least(major, minor):
    """Whether torch has this version or a newer one."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (major, minor)


# Optimisers compute in float32, where positive numbers beyond these become 0 or infinity.
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def require_positive(cfg, *names):
    """Each value is positive and finite, in float32 too."""
    for name in names:
        value = getattr(cfg, name)
        if not _SMALLEST <= value <= _LARGEST:
            raise UserError(f"{_option(name)} {value}: must be positive and finite in float32")


def require_not_negative(cfg, *names):
    """Each value, or each item of a list, is 0 or positive and finite, in float32 too."""
    for name in names:
        values = getattr(cfg, name)
        for value in [values] if isinstance(values, (int, float)) else values:
            if not (value == 0 or _SMALLEST <= value <= _LARGEST):
                raise UserError(
                    f"{_option(name)} {value}: must be 0, or positive and finite in float32"
                )
