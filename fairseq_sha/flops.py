"""How many floating-point operations a model takes, given its config for ``fairseq-hydra-train``.

Those of matrix products are counted, a multiplication and an addition as 2: of linear maps,
attention, convolutions and the matrices of LSTMs. Elementwise work is not: norms, activations,
softmax, dropout, the recurrences of SRU and of gated linear units, the optimiser. Attention counts
the scores of all pairs of positions that it reads, hidden ones too. What is computed again for its
gradient, to save memory, counts once.

Counting reads a few segments on the CPU. On a GPU, other kernels do the same work.
"""

import contextlib
import itertools
import math
from typing import Dict, NamedTuple

import numpy as np
import torch
from fairseq import tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.flop_counter import FlopCounterMode

import fairseq_sha
from fairseq_sha import compatibility
from fairseq_sha.data.segments import SegmentDataset
from fairseq_sha.errors import UserError
from fairseq_sha.evaluation.evaluate import token_losses
from fairseq_sha.models import heads
from fairseq_sha.models.segment_decoder import SegmentDecoder
from fairseq_sha.ops import attention, sparse_attention
from fairseq_sha.trained_model import TASKS

#: Streams in evaluation, unless its settings have a ``batch_size``: those of ``fairseq-sha
#: compare``.
EVALUATION_STREAMS = 8


class Flops(NamedTuple):
    """What a model has, and what it takes."""

    parameters: Dict[str, int]  # by part of the decoder, in training; tied ones once
    training_per_token: float  # forward and backward
    evaluation_per_token: float  # of a token that is scored


def count(config, evaluation=None):
    """Count the operations of training a model and of evaluating it.

    State is carried from earlier segments, as many as make it grow no more. Segments have the
    config's full length, and weights are those that training starts with.

    Args:
        config (dict): sections for ``fairseq-hydra-train``; its data folder must exist
        evaluation (dict): settings that differ in evaluation, as ``fairseq-sha compare`` has them:
            ``tokens_per_sample``, ``batch_size``, ``context_window``, ``model_overrides``

    Returns:
        Flops

    Raises:
        UserError: the task is none of ours, or the config names what does not exist
    """
    fairseq_sha.register()
    compatibility.apply()
    evaluation = evaluation or {}
    try:
        cfg = _complete(config)
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model, from_checkpoint=True)
        criterion = task.build_criterion(cfg.criterion)
        training = _training(task, model, criterion, cfg.dataset.batch_size or 1)
        parameters = parameters_by_part(model)
        overrides = evaluation.get("model_overrides") or {}
        if any(name.endswith("value_gate.linear.weight") for name in model.state_dict()):
            overrides = {**overrides, "collapse": True}  # as the commands load it
        if overrides:
            cfg.model = OmegaConf.merge(cfg.model, overrides)
            _check_model(cfg.model)
            model = task.build_model(cfg.model, from_checkpoint=True)
        length = evaluation.get("tokens_per_sample", task.cfg.tokens_per_sample)
        streams = evaluation.get("batch_size", EVALUATION_STREAMS)
        evaluation = _evaluation(task, model, streams, length, evaluation.get("context_window", 0))
    except OmegaConfBaseException as error:
        raise UserError(f"not a config for training: {' '.join(str(error).split())}; correct it")
    return Flops(parameters, training, evaluation)


def _complete(config):
    """The config with fairseq's defaults, and interpolations that resolve."""
    sections = {name: section for name, section in config.items() if name != "hydra"}
    sections.setdefault("criterion", {"_name": "cross_entropy"})
    for section, known in (("task", TASKS), ("model", MODEL_REGISTRY)):
        name = (sections.get(section) or {}).get("_name")
        if name not in known:
            choice = f"it must be {' or '.join(TASKS)}" if section == "task" else "name another"
            raise UserError(f"{section}._name {name}: is not known here; {choice}")
    _check_model(sections["model"])
    return OmegaConf.merge(OmegaConf.structured(FairseqConfig), sections)


def _check_model(section):
    """Fail for an unknown field, which fairseq would pass over in a checkpoint."""
    known = MODEL_DATACLASS_REGISTRY.get(section["_name"])
    if known is not None:
        OmegaConf.merge(OmegaConf.structured(known), section)


def parameters_by_part(model):
    """The number of parameters of each part of a model's decoder; tied ones count once."""
    parts = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[1]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _training(task, model, criterion, streams):
    model.train()
    criterion.train()
    length = task.cfg.tokens_per_sample

    def read(batch):
        loss, _, _ = criterion(model, batch)
        if torch.is_grad_enabled():
            loss.backward()

    carries_state = _carries_state(model) and not task.cfg.random_windows

    def count_streams(number):
        return _count(model, _batch(task, number, length, carries_state), read)

    return _of_streams(count_streams, streams) / (streams * length)


def _evaluation(task, model, streams, length, context):
    model.eval()
    task.evaluation_policy(1, length - context, context)  # raises an error if it cannot be so

    @torch.no_grad()
    def read(batch):
        token_losses(model, batch)

    def count_streams(number):
        carries_state = _carries_state(model) and context == 0
        return _count(model, _batch(task, number, length, carries_state), read)

    # A window that is not the first of a text scores what comes after its context.
    return _of_streams(count_streams, streams) / (streams * (length - context))


def _of_streams(count_streams, streams):
    """The operations of so many streams, from those of one and of two: each costs the same, beside
    what a model computes once for all of them."""
    one = count_streams(1)
    return one if streams == 1 else one + (streams - 1) * (count_streams(2) - one)


def _carries_state(model):
    return isinstance(model.decoder, SegmentDecoder)


def _batch(task, streams, length, carries_state):
    """A full segment of so many streams, from the beginning of train.

    Args:
        carries_state (bool): whether it has an identity, by which the decoder finds its state
    """
    task.load_dataset("train")
    return SegmentDataset(
        _Beginning(task.dataset("train").tokens, streams * length),
        "train" if carries_state else None,
        1,
        task.source_dictionary.pad(),
        batch_size=streams,
        tokens_per_sample=length,
        codec=task.codec,
        num_targets=getattr(task.model.decoder, "num_targets", 1),
    )[0]


class _Beginning:
    """The first ``size`` predictions of a corpus, which is repeated where it is shorter."""

    def __init__(self, tokens, size):
        self.tokens = np.resize(tokens[: size + 1], size + 1)

    def __len__(self):
        return len(self.tokens) - 1


def _count(model, batch, read):
    """The operations of a function that reads a batch, once the state that the model carries from
    earlier segments grows no more. That of a window that moves may repeat after several segments
    only; the mean over these counts."""
    if "segment" not in batch["net_input"]:
        return operations(lambda: read(batch))
    seen, counts = [], []
    for index in itertools.count():
        batch["net_input"]["segment"] = f"train:1:{index}"
        with torch.no_grad():
            read(batch)
        following = f"train:1:{index + 1}"
        state = model.decoder.carried.before(following, model.training)
        shapes = [t.shape for layer in state for t in layer.values()]
        if shapes in seen:
            break
        seen.append(shapes)
    period = len(seen) - seen.index(shapes)
    for number in range(index + 1, index + 1 + period):
        batch["net_input"]["segment"] = f"train:1:{number}"
        counts.append(operations(lambda: read(batch)))
    return sum(counts) / period


def operations(function):
    """The floating-point operations of a function without arguments, backward passes in it
    included."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter, _recomputation(counter) as again:
        function()
    return counter.get_total_flops() - sum(again)


@contextlib.contextmanager
def _recomputation(counter):
    """Collect, in a list, the operations of whatever this package computes again for its gradient
    while the block runs."""
    again = []

    def observed(checkpoint):
        def run(function, *args, **options):
            passes = itertools.count()

            def counted(*args):
                first, before = next(passes) == 0, counter.get_total_flops()
                try:
                    return function(*args)
                finally:  # torch leaves a second pass by an exception when it has what it needs
                    if not first:
                        again.append(counter.get_total_flops() - before)

            return checkpoint(counted, *args, **options)

        return run

    originals = {module: module.checkpoint for module in (attention, heads, sparse_attention)}
    try:
        for module, checkpoint in originals.items():
            module.checkpoint = observed(checkpoint)
        yield again
    finally:
        for module, checkpoint in originals.items():
            module.checkpoint = checkpoint


# Formulas for what torch does not count, or counts otherwise. They get shapes instead of tensors.


def _lstm(x, weight_ih, weight_hh, *rest, **options):
    return 2 * x[0] * x[1] * (math.prod(weight_ih) + math.prod(weight_hh))


def _attention(q, k, v, *rest, **options):
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _convolution(out, weight):
    # Each output is a sum over one filter. torch's formula for the gradient ignores groups.
    return 2 * math.prod(out) * math.prod(weight[1:])


def _convolution_backward(grad, x, weight, *rest, **options):
    if rest[4]:  # transposed: x and the output change places
        grad = x
    return _convolution(grad, weight) * sum(rest[-1][:2])


aten = torch.ops.aten
FORMULAS = {
    aten.mv: lambda a, x, **out: 2 * math.prod(a),
    aten.addmv: lambda bias, a, x, **out: 2 * math.prod(a),
    aten.dot: lambda x, y, **out: 2 * math.prod(x),
    aten.mkldnn_rnn_layer: _lstm,
    aten.mkldnn_rnn_layer_backward: lambda *args, **options: 2 * _lstm(*args),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, *args, **options: 2 * _attention(*args)
    ),
    aten.convolution_backward: _convolution_backward,
    aten.conv_tbc: lambda x, weight, *rest, out_shape: (
        2 * math.prod(out_shape) * math.prod(weight[:2])
    ),
    aten.addmm_: lambda c, a, b, **options: 2 * math.prod(a) * b[1],  # the gradient of conv_tbc
}
