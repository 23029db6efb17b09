"""Dynamic evaluation: score a segment, then learn from it (B. Krause et al., "Dynamic Evaluation of
Neural Sequence Models", arXiv 1709.07432).

With the trained weights ``w0``, the current ones ``w``, and the gradient ``g`` of a segment's mean
cost in nats, the weights become, once the segment has been scored::

    w + d (w0 - w) - lr g            SGD, with optional decay
    w + r (w0 - w) - lr g / (G + e)  RMS, with RMS-normalised decay

``G`` is the root of the mean square of the gradients of segments of the training text at ``w0``, of
each weight by itself, and ``r = min(d G / mean(G), 1)``. The mean is that of the published code,
github.com/benkrause/dynamic-evaluation: over the means of all parameter tensors. A weight whose
gradient was always zero does not decay, and its step is ``lr g / e``.

The gradient goes through one segment only; the state that it starts from is a constant. Dropout is
off. A model learns from the cost of the text alone, without auxiliary losses.
"""

import contextlib
import itertools
import json
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from fairseq_sha.data.segments import stream_bounds
from fairseq_sha.errors import UserError
from fairseq_sha.evaluation.evaluate import token_losses
from fairseq_sha.evaluation.policies import Policy, Tokens
from fairseq_sha.files import unfinished


@dataclass(frozen=True)
class SGD:
    """Plain stochastic gradient descent, one step after each segment.

    Args:
        lr (float): learning rate
        decay (float): the share of the way back to the trained weights at each step, 0 to 1
    """

    lr: float
    decay: float = 0.0
    name: ClassVar[str] = "sgd"

    def decays(self, names):
        """The share of the way back to the trained weights, of each parameter."""
        return self.decay

    def denominators(self, names):
        """What each parameter's gradient is divided by: a list of Tensors, or None."""
        return None

    def __str__(self):
        return f"SGD, learning rate {self.lr:g}, decay {self.decay:g}"


@dataclass(frozen=True)
class RMS:
    """Gradients are divided by their usual size, and parameters with large gradients decay faster.

    Args:
        lr (float): learning rate
        decay (float): of a parameter of average gradient, see the module
        epsilon (float): what is added to the usual size of a gradient
        roots (dict of str to Tensor): by parameter, ``G``: see :class:`Statistics`
    """

    lr: float
    decay: float
    epsilon: float
    roots: dict = field(repr=False, compare=False)
    name: ClassVar[str] = "rms"

    def decays(self, names):
        """As :meth:`SGD.decays`: a list of Tensors, or 0."""
        if self.decay == 0:
            return 0
        roots = [self.roots[name] for name in names]
        mean = torch.stack([root.mean() for root in roots]).mean()
        return [(self.decay * root / mean).clamp(max=1) for root in roots]

    def denominators(self, names):
        """As :meth:`SGD.denominators`."""
        return [self.roots[name] + self.epsilon for name in names]

    def __str__(self):
        return (
            f"RMS, learning rate {self.lr:g}, decay {self.decay:g}, epsilon {self.epsilon:g}, "
            "statistics of train"
        )


@dataclass(frozen=True)
class Dynamic(Policy):
    """Segments follow each other; the model scores each, then learns from it.

    Of a window that slides, the model learns from the predictions that are new in it. The gradient
    goes through the window's context too, as it does where a model with a window reads text again.

    Several parts of the text are independent: each is read from its beginning to its end before
    the next one, and starts from nothing and from the trained weights. (Parts side by side would
    share their weights.)

    Args:
        text (Carried or Sliding): how a part is cut up: one stream, or one window at a time
        rule (SGD or RMS): how the weights learn. With a learning rate of 0 they stay as they are,
            and the model is evaluated without gradients
        parts (int): equal parts of the text
    """

    text: Policy
    rule: object
    parts: int = 1

    @property
    def length(self):
        """As that of ``text``."""
        return self.text.length

    def after(self, segments):
        """As :meth:`~fairseq_sha.evaluation.policies.Carried.after`, for a text of one part."""
        return replace(self, text=self.text.after(segments))

    def batches(self, corpus, split, codec):
        return _Parts(self, corpus, split, codec)

    @contextlib.contextmanager
    def reading(self, model, losses):
        if self.rule.lr == 0:
            with super().reading(model, losses) as read:
                yield read
            return
        learner = Learner(model, self.rule)

        def read(batch):
            if batch["begins"]:
                learner.restore()
            with torch.enable_grad():
                costs = losses(model, batch)
                learner.learn(mean_of_scored(costs, batch["rows"]))
            return costs.detach()

        try:
            yield read
        finally:
            learner.restore()

    def __str__(self):
        parts = f", {self.parts} parts, each with its own weights" if self.parts > 1 else ""
        return f"dynamic evaluation, {self.rule}; {self.text}{parts}"


class _Parts:
    """The batches of one part after another."""

    def __init__(self, policy, corpus, split, codec):
        self.begun = getattr(policy.text, "begun", 0)
        bounds = [int(bound) for bound in stream_bounds(len(corpus), policy.parts)]
        spans = [span for span in zip(bounds, bounds[1:]) if span[0] < span[1]]
        self.firsts = [first for first, _ in spans]
        self.parts = [
            # Names of their own, so that no state is carried from one part to the next.
            policy.text.batches(Tokens(corpus.tokens[first : last + 1]), f"{split}, {i}", codec)
            for i, (first, last) in enumerate(spans)
        ]
        self.ends = list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def _find(self, index):
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - (self.ends[part - 1] if part else 0)

    def __getitem__(self, index):
        """A batch of the part, which also says what is scored (``rows``) and whether the part
        begins with it (``begins``)."""
        part, index = self._find(index)
        rows = self.parts[part].rows(index)
        return {**self.parts[part][index], "rows": rows, "begins": index + self.begun == 0}

    def rows(self, index):
        part, index = self._find(index)
        rows = self.parts[part].rows(index)
        return [(self.firsts[part] + first, context, count) for first, context, count in rows]


def mean_of_scored(costs, rows):
    """The mean cost of the targets that are scored.

    Args:
        costs (Tensor): of all targets, ``[B, T]``
        rows (list): ``(first, context, count)`` of each row, as a data set's ``rows`` gives them
    """
    scored = [costs[i, context : context + n] for i, (_, context, n) in enumerate(rows)]
    return torch.cat(scored).mean()


class Learner:
    """Weights that learn by a rule, and return to where they started.

    Args:
        model (~fairseq.models.FairseqLanguageModel): whose parameters learn, in place
        rule (SGD or RMS)
    """

    def __init__(self, model, rule):
        self.rule = rule
        # Tied parameters are listed once.
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.trained = [parameter.detach().clone() for parameter in self.parameters]
        self.decays = rule.decays(list(named))
        self.denominators = rule.denominators(list(named))
        self.bounded = getattr(model.decoder, "bounded_parameters", list)()

    def learn(self, loss):
        """Make a step.

        Args:
            loss (Tensor): with the graph that leads to the parameters, ``[]``
        """
        gradients = _gradients(loss, self.parameters)
        with torch.no_grad():
            # The gradient is known, so that the order of the two terms does not matter.
            if self.rule.decay:
                torch._foreach_lerp_(self.parameters, self.trained, self.decays)
            if self.denominators is None:
                torch._foreach_add_(self.parameters, gradients, alpha=-self.rule.lr)
            else:
                torch._foreach_addcdiv_(
                    self.parameters, gradients, self.denominators, -self.rule.lr
                )
            for parameter, low, high in self.bounded:
                parameter.clamp_(low, high)

    @torch.no_grad()
    def restore(self):
        """Put back the trained weights."""
        torch._foreach_copy_(self.parameters, self.trained)


def _gradients(loss, parameters):
    # Of a parameter that takes no part, such as a head for training only: zeros.
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


class Statistics(NamedTuple):
    """What :class:`RMS` needs to know of the training text, kept in a file beside the checkpoint.

    The file is in NumPy's format ``.npz``: ``G`` of each parameter by its name, and the settings as
    JSON. It holds no code.
    """

    roots: dict  # by parameter, G: a Tensor of the parameter's shape
    settings: dict  # what they were collected from and how, as collect() and its caller say

    def save(self, path):
        """Write a file, in one step.

        Args:
            path (str or Path)
        """
        arrays = {f"root/{name}": root.cpu().numpy() for name, root in self.roots.items()}
        with unfinished(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, settings=np.array(json.dumps(self.settings)), **arrays)

    @classmethod
    def load(cls, path, expected, device=None):
        """Read a file.

        Args:
            path (str or Path)
            expected (dict): settings that it must have; others may be as they are
            device (torch.device): where the roots are needed

        Raises:
            OSError: it cannot be opened
            UserError: it is damaged, or has other settings
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                settings = json.loads(str(file["settings"]))
                roots = {
                    name[len("root/") :]: torch.from_numpy(file[name]).to(device)
                    for name in file.files
                    if name.startswith("root/")
                }
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            raise UserError(
                f"{path}: not statistics for dynamic evaluation, or damaged ones; remove the file, "
                "and collect them anew with fairseq-sha evaluate --dynamic rms"
            )
        for key, value in expected.items():
            if settings.get(key) != value:
                raise UserError(
                    f"{path}: statistics with {key} {settings.get(key)}, not {value}; remove the "
                    "file, or name another with --dynamic-statistics"
                )
        return cls(roots, settings)


def collect(model, batches, losses=token_losses):
    """The root of the mean square of the gradients of segments, at the weights as they are. Each
    batch counts alike, with the gradient of the mean cost of all that is scored in it.

    Args:
        model (~fairseq.models.FairseqLanguageModel): in evaluation mode
        batches (iterable): of pairs: a batch, and its ``rows``
        losses (callable): as for :func:`~fairseq_sha.evaluation.evaluate.evaluate`

    Returns:
        dict of str to Tensor: ``G`` of each parameter
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0
    for batch, rows in batches:
        with torch.enable_grad():
            gradients = _gradients(mean_of_scored(losses(model, batch), rows), parameters)
        torch._foreach_addcmul_(squares, gradients, gradients)
        count += 1
    torch._foreach_div_(squares, count)
    torch._foreach_sqrt_(squares)
    return dict(zip(named, squares))
