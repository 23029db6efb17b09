"""What optimisers share that treat each parameter tensor as a whole."""

from fairseq.optim import FairseqOptimizer


class PerTensorOptimizer(FairseqOptimizer):
    """Registers with fairseq a torch optimiser that computes a norm of each tensor.

    A subclass gives ``optimizer_config``, the settings of the torch optimiser.
    """

    @property
    def supports_flat_params(self):
        """A norm of one tensor's gradient or update means something else over all parameters in
        one. fairseq refuses ``--fp16`` then, and names ``--fp16-no-flatten-grads``."""
        return False

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        """A resumed run takes its settings from its own options, not from the checkpoint."""
        super().load_state_dict(
            state_dict, {**self.optimizer_config, **(optimizer_overrides or {})}
        )
