"""What the optimisers here share as fairseq sees them."""

from fairseq.optim import FairseqOptimizer


class OwnOptionsOptimizer(FairseqOptimizer):
    """Registers a torch optimiser with fairseq; a resumed run takes its settings from its own
    options, not from the checkpoint. The learning rate is the scheduler's business.

    A subclass gives ``optimizer_config``, the settings of the torch optimiser.
    """

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        own = {key: value for key, value in self.optimizer_config.items() if key != "lr"}
        super().load_state_dict(state_dict, {**own, **(optimizer_overrides or {})})


class PerTensorOptimizer(OwnOptionsOptimizer):
    """One that computes a norm of each parameter tensor."""

    @property
    def supports_flat_params(self):
        """A norm of one tensor's gradient or update means something else over all parameters in
        one. fairseq refuses ``--fp16`` then, and names ``--fp16-no-flatten-grads``."""
        return False
