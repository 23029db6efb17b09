"""A uniform average of the weights after each update, from some validation on: NT-ASGD
(arXiv 1708.02182, section 3) and the averaging of the Mogrifier LSTM (arXiv 1909.01792)."""

import torch


def non_monotone(costs, patience):
    """Whether NT-ASGD starts after the last of these validations: its cost is above the least of
    those that came more than ``patience`` validations before it (published code of AWD-LSTM).

    Args:
        costs (list of float): of all validations until now
        patience (int): called ``nonmono`` in the published code
    """
    *before, last = costs
    return len(before) > patience and last > min(before[: len(before) - patience])


def stalled(costs, patience, latest=0):
    """Whether the cost has not improved for ``patience`` validations, or there have been ``latest``
    of them; 0 for no such limit (published code of the Mogrifier LSTM)."""
    since_best = len(costs) - 1 - costs.index(min(costs))
    return since_best >= patience or 0 < latest <= len(costs)


class AveragedWeights:
    """The average of a model's weights, and which of both the model holds at the moment.

    Training uses the weights as they are. Validation and checkpoints use the average, once there is
    one. The average never acts on training.

    Args:
        parameters (dict): by name; the model's own, in float32
        starts (callable): from the costs of all validations until now, a list of float, to whether
            averaging starts with the next update
        skipped (int): how many updates after the start are left out of the average again, as soon
            as there are later ones
    """

    def __init__(self, parameters, starts, skipped=0):
        self.parameters = parameters
        self.starts = starts
        self.skipped = skipped
        self.costs = []
        #: Updates since averaging started; None before.
        self.updates = None
        self.average = None
        self._trained = None  # the weights in training, while the model holds the average

    @torch.no_grad()
    def after_update(self):
        """Take the weights that an update has left into the average."""
        if self.updates is None:
            return
        self.updates += 1
        weights = list(self.parameters.values())
        if self.average is None:
            self.average = [weight.clone() for weight in weights]
        else:
            share = 1 / max(1, self.updates - self.skipped)
            torch._foreach_lerp_(self.average, weights, share)

    def after_validation(self, cost):
        """Note the cost (float) of a validation. Returns whether averaging starts now."""
        self.costs.append(cost)
        begins = self.updates is None and self.starts(self.costs)
        if begins:
            self.updates = 0
        return begins

    @torch.no_grad()
    def use_average(self):
        """Have the model hold the average, if there is one."""
        if self.average is not None and self._trained is None:
            weights = list(self.parameters.values())
            self._trained = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, self.average)

    @torch.no_grad()
    def use_trained(self):
        """Have the model hold the weights that are trained."""
        if self._trained is not None:
            torch._foreach_copy_(list(self.parameters.values()), self._trained)
            self._trained = None

    def state_dict(self):
        """For a checkpoint whose model holds the average (:meth:`use_average`)."""
        trained = None
        if self._trained is not None:
            trained = dict(zip(self.parameters, (weight.cpu() for weight in self._trained)))
        return {"costs": list(self.costs), "updates": self.updates, "trained": trained}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Go on from a checkpoint whose weights the model holds."""
        self.costs, self.updates = list(state["costs"]), state["updates"]
        self.average = self._trained = None
        if state["trained"] is not None:
            self.average = [weight.detach().clone() for weight in self.parameters.values()]
            for name, weight in self.parameters.items():
                weight.copy_(state["trained"][name])
