"""Small models with an integer form."""

from types import SimpleNamespace

import torch
from omegaconf import OmegaConf
from torch import nn

from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.models.sha_rnn import SHARNNConfig, SHARNNDecoder
from fairseq_sha.portable import convert, model

KNOWN = b"abcdefgh "  # and the newline
#: One with attention and one without of each cell; the widths are no multiples of a vector.
MODELS = {
    "lstm": dict(cell="lstm", attention_layers=[1], width=24),
    "sru": dict(cell="sru", attention_layers=[0, 1], width=40),
    "min_gru": dict(cell="min_gru", attention_layers=[], width=17),
    "ngrams": dict(
        cell="sru", attention_layers=[1], width=40, ngram_orders=[4, 2], ngram_buckets=50
    ),
}


def trained(**settings):
    """As a :class:`~fairseq_sha.trained_model.TrainedModel`, with large random weights."""
    torch.manual_seed(1)
    dictionary = ByteDictionary()
    for byte in KNOWN:
        dictionary.add_symbol(str(byte))
    small = dict(num_layers=2, window=14, collapse=True)
    cfg = OmegaConf.structured(SHARNNConfig(**{**small, **settings}))
    decoder = SHARNNDecoder(cfg, dictionary).eval()
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1 and "cell.weight" not in name:
                nn.init.normal_(parameter, std=1.5 * parameter.size(-1) ** -0.5)
            elif "gate" in name or name.endswith("head.bias"):
                nn.init.normal_(parameter)

    def read(tokens, state):
        features, state = decoder.read(tokens, state)
        return decoder.head.logits(features), state

    return SimpleNamespace(
        cfg=SimpleNamespace(model=cfg, task=SimpleNamespace(tokens_per_sample=16)),
        decoder=decoder,
        codec=ByteCodec(dictionary),
        dictionary=dictionary,
        read=torch.no_grad()(read),
    )


def text(size, seed=1):
    """Bytes that the models know."""
    generator = torch.Generator().manual_seed(seed)
    return bytes((KNOWN + b"\n")[i] for i in torch.randint(10, (size,), generator=generator))


def integer_model(**settings):
    """The integer form of such a model."""
    model_ = trained(**settings)
    sizes, arrays = convert.convert(model_, convert.columns(model_, text(640, 2), 4))
    return model.unpack(model.pack(sizes, arrays), "a model")
