"""Checkpoints of models that were never trained, written in a moment."""

import torch
from omegaconf import OmegaConf

from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.weights_import import make_checkpoint, make_task

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
#: Of the bytes of :func:`tests.tiny_corpus.text`.
BYTES = ByteCodec.from_symbols([*SPECIAL, *(str(byte) for byte in b"abcdefgh ")])


def write(path, codec=BYTES, seed=1, family="sha_rnn", tokens_per_sample=40, **fields):
    """Write the checkpoint of a tiny model that is sure of what it predicts; returns its path.
    ``fields`` are settings of the model that differ from the family's tiny ones."""
    torch.manual_seed(seed)
    chosen = FAMILIES[family]
    cfg = OmegaConf.structured(chosen.config(**{**chosen.tiny.model, **fields}))
    task = make_task(codec, "/nowhere")
    task.cfg.tokens_per_sample = tokens_per_sample
    model = chosen.model.build_model(cfg, task)
    with torch.no_grad():
        model.decoder.embedding.weight.mul_(5 / model.decoder.embedding.weight.std())
    torch.save(make_checkpoint(family, cfg, model, task), path)
    return str(path)
