"""A training step of Adaptive Span beside fairseq's own example of it, with the same weights.

fairseq's is in the distribution ve-fairseq (Python 3.11 and 3.12). It does not renormalise the
masked attention weights as the paper does, so losses are compared at full spans only.

Trained weights make attention weights that almost vanish. These are denormal numbers, with which a
CPU computes slowly unless it is told to flush them to 0, as this project does and fairseq does not.
That is a setting of a process, so each measurement has a process of its own, in turn.

    python benchmarks/adaptive_span.py
    python benchmarks/adaptive_span.py --checkpoint RUN/checkpoint_last.pt --data data-bin/enwiki6
"""

import importlib
import multiprocessing
import os
import statistics
import sys
import time
import types

import fairseq
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from timing import arguments, describe_machine

from fairseq_sha.data.corpus import Corpus
from fairseq_sha.errors import UserError
from fairseq_sha.models.adaptive_span import PUBLISHED, AdaptiveSpanConfig, AdaptiveSpanDecoder

STEPS = 5  # timed in each process, after two to warm up


def example():
    """The module of fairseq's example, without its registrations, whose names collide with ours."""
    folder = os.path.join(os.path.dirname(fairseq.__file__), "examples", "adaptive_span")
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder}: no such folder; install ve-fairseq, which contains fairseq's examples"
        )
    package = types.ModuleType("adaptive_span_example")
    package.__path__ = [folder]
    sys.modules[package.__name__] = package
    return importlib.import_module("adaptive_span_example.adaptive_span_model")


def build(args):
    """Our decoder and the example's model with the same weights."""
    if args.checkpoint:
        (model,), saved, _ = checkpoint_utils.load_model_ensemble_and_task(
            [args.checkpoint], arg_overrides={"data": args.data, "dropout": 0.0}
        )
        ours, cfg = model.decoder, saved.model
    else:
        dictionary = Dictionary()
        for i in range(204):
            dictionary.add_symbol(str(i))
        cfg = OmegaConf.structured(
            AdaptiveSpanConfig(
                width=256, num_layers=4, n_head=4, d_inner=1024, attn_span=512, dropout=0.0
            )
        )
        ours = AdaptiveSpanDecoder(cfg, dictionary)
    theirs = example().TransformerSeq(
        vocab_size=len(ours.embedding.weight),
        d_model=cfg.width,
        n_layer=cfg.num_layers,
        n_head=cfg.n_head,
        d_inner=cfg.d_inner,
        attn_span=cfg.attn_span,
        dropout=0.0,
        emb_dropout=0.0,
        adapt_span_ramp=cfg.adapt_span_ramp,
        adapt_span_init=1.0,
        aux_loss_scaler=cfg.adapt_span_loss,
        adapt_span_layer=False,
    )
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for reference, value in theirs.named_parameters():
            value.copy_(own[PUBLISHED.our_name(reference)].reshape(value.shape))
    return ours.train(), theirs


def steps(args, ours, theirs):
    """The loss of the segment that follows some text, by both: model and function by name."""
    if args.checkpoint:
        text = Corpus(os.path.join(args.data, "train")).tokens[: args.streams * 8 * args.length]
        text = torch.from_numpy(text.astype("int64")).view(args.streams, -1)
    else:
        text = torch.randint(len(ours.embedding.weight), (args.streams, 8 * args.length))
    *before, tokens = text[:, :-1].split(args.length, 1)
    targets = text[:, -tokens.size(1) :].flatten()
    state = None
    with torch.no_grad():
        for piece in before:
            _, state = ours.read(piece.t(), state)
    cache = [layer["cache"].transpose(0, 1).contiguous() for layer in state]

    def our_loss():
        features, _ = ours.read(tokens.t(), state)
        logits = ours.output_layer(features).transpose(0, 1)
        spans = ours.extra()["auxiliary_losses"]["span_loss"]
        return F.cross_entropy(logits.flatten(0, 1), targets) + spans

    def their_loss():
        log_probabilities = theirs(x=tokens, h_cache=cache)[0]
        return F.nll_loss(log_probabilities.flatten(0, 1), targets) + theirs.get_aux_loss()

    return {"ours": (ours, our_loss), "fairseq's example": (theirs, their_loss)}


def measure(name, args):
    """Median milliseconds of a step, in this process."""
    torch.set_flush_denormal(name == "ours")
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    ours, theirs = build(args)
    if args.span is not None:
        for model in (ours, theirs):
            for key, parameter in model.named_parameters():
                if key.endswith(("attention.span", "current_val")):
                    parameter.data.fill_(args.span)
    model, loss = steps(args, ours, theirs)[name]
    times = []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        model.zero_grad()
        loss().backward()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def check(args):
    """Check that both compute the same loss where spans are full."""
    torch.manual_seed(1)
    ours, theirs = build(args)
    for layer in ours.layers:
        layer.attention.span.data.fill_(1.0)
    for key, parameter in theirs.named_parameters():
        if key.endswith("current_val"):
            parameter.data.fill_(1.0)
    (_, our_loss), (_, their_loss) = steps(args, ours, theirs).values()
    torch.testing.assert_close(our_loss(), their_loss(), atol=1e-4, rtol=1e-4)


def main():
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--length", type=int, default=128, help="tokens of a segment")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--span", type=float, help="spans, as a part of the longest (default: 0)")
    parser.add_argument("--checkpoint", help="of a trained model of ours; default: random weights")
    parser.add_argument("--data", default="data-bin/enwiki6", help="text for a trained model")
    args = parser.parse_args()
    check(args)
    pool = multiprocessing.get_context("spawn")
    times = {"ours": [], "fairseq's example": []}
    for _ in range(args.repeats):
        for name in times:
            with pool.Pool(1) as process:
                times[name].append(process.apply(measure, (name, args)))
    ours = statistics.median(times["ours"])
    print(f"{describe_machine()}; {args.streams} streams, segments of {args.length}\n")
    print("| case | median ms | fastest to slowest | time / ours |\n| --- | --- | --- | --- |")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"| {name} | {median:.0f} | {spread} | {median / ours:.2f} |")


if __name__ == "__main__":
    main()
