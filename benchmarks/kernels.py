"""Record the kernels that a piece of work starts, to run them by themselves.

The floor of a training step is the time of its recurrent kernels and matrix products alone, forward
and backward, with the same arguments.
"""

import sys
from collections import defaultdict
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

RECURRENCES = "mkldnn_rnn_layer", "_cudnn_rnn"  # each has a _backward, too
KINDS = {
    "recurrence": RECURRENCES,
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "fused attention": ("_scaled_dot_product",),
    "softmax": ("_softmax",),
    "dropout": ("native_dropout",),
}
FLOOR = "recurrence", "products", "fused attention"
# Functions that are recorded as one kernel: many small operations on a CPU, or Triton on a GPU.
COMPOSED = {
    **dict.fromkeys(("scan", "sru_steps", "sru_forward", "sru_backward"), "recurrence"),
    "dropout": "dropout",
}


class Recording(TorchDispatchMode):
    """While active, keeps every call of the kernels of :data:`KINDS` with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = defaultdict(list)
        self.flop = 0  # floating-point operations in recurrent kernels and products
        self._inside = False  # whether one of the composed functions is running

    def __enter__(self):
        self._patches = ExitStack()
        for name, module in list(sys.modules.items()):
            for function in COMPOSED:
                if name.startswith("fairseq_sha.") and callable(vars(module).get(function)):
                    wrapped = self._recorded(vars(module)[function], COMPOSED[function])
                    self._patches.enter_context(mock.patch.object(module, function, wrapped))
        super().__enter__()
        return self

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        for kind, names in KINDS.items():
            if not self._inside and name.startswith(names):
                self.calls[kind].append((func, args, kwargs or {}))
                self.flop += flop(func, name, args, kwargs or {}, out)
        return out

    def _recorded(self, function, kind):
        def call(*args, **kwargs):
            if self._inside:
                return function(*args, **kwargs)
            self.calls[kind].append((function, args, kwargs))
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call

    def replay(self, *kinds):
        """A function that repeats the recorded calls of some kinds."""
        calls = [call for kind in kinds for call in self.calls[kind]]

        def run():
            with torch.no_grad():
                for function, args, kwargs in calls:
                    function(*args, **kwargs)

        return run


def flop(func, name, args, kwargs, out):
    """Floating-point operations of a call; a multiplication and an addition are two."""
    backward = 2 if name.endswith("_backward") else 1
    if name.startswith(RECURRENCES):
        weights = args[1] if isinstance(args[1], (list, tuple)) else args[1:3]
        matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
        return 2 * backward * matrices * args[0].size(0) * args[0].size(1)
    if name.startswith("_scaled_dot_product"):
        q, k = args[backward - 1 : backward + 1]
        return (4 if backward == 1 else 10) * q.numel() * k.size(-2)
    counter = flop_registry.get(func.overloadpacket)
    return counter(*args, **kwargs, out_val=out) if counter else 0
