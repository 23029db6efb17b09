"""A training step of Adaptive Span beside fairseq's own example of it, with the same weights.

fairseq's is in the distribution ve-fairseq (Python 3.11 and 3.12). It does not renormalise the
masked attention weights as the paper does, so losses are compared at full spans only.

    python benchmarks/adaptive_span.py
"""

import importlib
import os
import sys
import types

import fairseq
import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from timing import arguments, compare, describe_machine

from fairseq_sha import UserError
from fairseq_sha.import_weights import FAMILIES
from fairseq_sha.models.adaptive_span import AdaptiveSpanConfig, AdaptiveSpanDecoder


def example():
    """The module of fairseq's example, without its registrations, whose names are ours too."""
    folder = os.path.join(os.path.dirname(fairseq.__file__), "examples", "adaptive_span")
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder}: no such folder; this fairseq lacks its examples: ve-fairseq has"
        )
    package = types.ModuleType("adaptive_span_example")
    package.__path__ = [folder]
    sys.modules[package.__name__] = package
    return importlib.import_module("adaptive_span_example.adaptive_span_model")


def main():
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--attn-span", type=int, default=512, help="tokens")
    parser.add_argument("--length", type=int, default=128, help="tokens of a segment")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument(
        "--span", type=float, default=0.0, help="spans, as a part of the longest (0: as at a start)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)

    dictionary = Dictionary()
    for i in range(204):
        dictionary.add_symbol(str(i))
    sizes = dict(n_head=4, d_inner=4 * args.width, attn_span=args.attn_span, dropout=0.0)
    cfg = AdaptiveSpanConfig(width=args.width, num_layers=args.layers, adapt_span_init=1.0, **sizes)
    ours = AdaptiveSpanDecoder(OmegaConf.structured(cfg), dictionary)
    theirs = example().TransformerSeq(
        vocab_size=len(dictionary),
        d_model=args.width,
        n_layer=args.layers,
        emb_dropout=0.0,
        adapt_span_ramp=cfg.adapt_span_ramp,
        adapt_span_init=1.0,
        aux_loss_scaler=cfg.adapt_span_loss,
        adapt_span_layer=False,
        **sizes,
    )
    weights = {}
    own = dict(ours.named_parameters())
    for reference, value in theirs.named_parameters():
        name = FAMILIES["adaptive_span"].our_name(reference)
        weights[name] = value.detach().reshape(own[name].shape)
    ours.load_state_dict(weights)

    tokens = torch.randint(len(dictionary), (args.streams, args.length))
    targets = torch.randint(len(dictionary), (args.streams * args.length,))
    cache = [torch.randn(args.streams, args.attn_span, args.width) for _ in range(args.layers)]
    state = [{"cache": layer.transpose(0, 1).contiguous()} for layer in cache]

    def our_loss():
        features, _ = ours.read(tokens.t(), state)
        logits = ours.output_layer(features).transpose(0, 1)
        spans = ours.extra()["auxiliary_losses"]["span_loss"]
        return F.cross_entropy(logits.flatten(0, 1), targets) + spans

    def their_loss():
        log_probabilities = theirs(x=tokens, h_cache=cache)[0]
        return F.nll_loss(log_probabilities.flatten(0, 1), targets) + theirs.get_aux_loss()

    def step(model, loss):
        def run():
            model.zero_grad()
            loss().backward()

        return run

    torch.testing.assert_close(our_loss(), their_loss())
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.span", "current_val")):
                parameter.data.fill_(args.span)
    print(
        f"{describe_machine()}; {args.layers} layers of {args.width}, span {args.span} of "
        f"{args.attn_span}, {args.streams} streams, segments of {args.length}\n"
    )
    compare(
        {"ours": step(ours, our_loss), "fairseq's example": step(theirs, their_loss)},
        args.repeats,
        baseline="ours",
    )


if __name__ == "__main__":
    main()
