"""The models that are measured, as the configs in ``examples/`` have them."""

from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from fairseq import models
from fairseq.data import Dictionary
from omegaconf import OmegaConf

import fairseq_sha
from fairseq_sha import compatibility
from fairseq_sha.models.family import architecture_names

fairseq_sha.register()
compatibility.flush_denormals()  # as in training

EXAMPLES = Path(__file__).parent.parent / "examples"
SYMBOLS = 204  # byte values, as many as enwik8's


def configs(folder):
    """Names of the configs in a folder of ``examples/`` whose model is one of ours."""
    ours = architecture_names()
    names = [f"{folder}/{path.stem}" for path in sorted((EXAMPLES / folder).glob("*.yaml"))]
    return [name for name in names if settings(name)["model"]["_name"] in ours]


def settings(name):
    """A config, such as ``head_to_head/sha_rnn``: a dict of sections."""
    return yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))


def build(section):
    """A model with the weights it starts with, from the ``model`` section of a config."""
    dictionary = Dictionary()
    for i in range(SYMBOLS):
        dictionary.add_symbol(str(i))
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, cfg=None)
    parent = {"model": section, "task": {"add_bos_token": False}, "common": {"tpu": False}}
    return models.build_model(OmegaConf.create(parent).model, task)


def random_tokens(length, streams, device="cpu"):
    """``[T, B]``, no special symbols among them."""
    return torch.randint(4, 4 + SYMBOLS, (length, streams), device=device)


@torch.no_grad()
def steady_state(decoder, tokens):
    """The state that a decoder has once its memory is full: segments are read until the state grows
    no more.

    Args:
        tokens (LongTensor): a segment, ``[T, B]``
    """
    state, shapes = None, None
    while True:
        _, state = decoder.read(tokens, state, decoder.training)
        before, shapes = shapes, [t.shape for layer in state for t in layer.values()]
        if shapes == before:
            return state
