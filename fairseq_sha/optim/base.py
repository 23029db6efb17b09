"""What the optimisers of this package have in common as fairseq sees them."""

from fairseq.optim import FairseqOptimizer

from fairseq_sha.checks import require_not_negative


class ConfiguredOptimizer(FairseqOptimizer):
    """An optimiser whose settings always come from the config.

    fairseq would replace them by those of the checkpoint when a run is resumed. The learning rate
    is left to the scheduler. A subclass defines ``optimizer_config``, the settings of the torch
    optimiser, and sets ``_optimizer``.

    Raises:
        UserError: a learning rate is negative or not finite
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        require_not_negative(cfg, "lr")

    @property
    def supports_flat_params(self):
        """True: each number has a step of its own."""
        return True

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        settings = {key: value for key, value in self.optimizer_config.items() if key != "lr"}
        super().load_state_dict(state_dict, {**settings, **(optimizer_overrides or {})})


class PerTensorNormOptimizer(ConfiguredOptimizer):
    """An optimiser that takes the norm of each parameter tensor."""

    @property
    def supports_flat_params(self):
        """False, because these optimisers need per-tensor norms, which flattened fp16 parameters
        lose. fairseq then refuses ``--fp16`` and names ``--fp16-no-flatten-grads``."""
        return False
