"""A training step and an evaluation step of SHA-RNN beside a straightforward transcription.

The transcription says in plain PyTorch what the paper says: keys and values gated over the whole
memory, scores and mask materialised, torch's own dropout and GELU in four operations. Both have the
same weights, state and tokens. The floor is the time of the LSTM and the matrix products alone.

    python benchmarks/train_step.py
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from kernels import FLOOR, Recording
from models import build, random_tokens, steady_state
from timing import arguments, compare, describe_machine

P = 0.1


def transcription(decoder, tokens, state, training):
    """Logits ``[T, B, V]`` and state, with the weights of ``decoder``."""

    def drop(x):
        return F.dropout(x, P, training)

    length = len(tokens)
    h = drop(F.embedding(tokens, decoder.embedding.weight))
    left = []
    for layer, before in zip(decoder.layers, state or [{}] * len(decoder.layers)):
        h, after = layer.cell(layer.norm_start(h), before)
        after = {key: tensor.detach() for key, tensor in after.items()}
        h = drop(h)
        if layer.attention is not None:
            head = layer.attention
            memory = layer.norm_memory(h)
            h = layer.norm_mid(h)
            if before:
                old = before["memory"]
                memory = torch.cat([old[-max(layer.window - length, 0) :], memory])
            after["memory"] = memory[-layer.window :].detach()
            q = drop(torch.sigmoid(head.query_gate) * head.query_norm(head.query(h)))
            k = torch.sigmoid(head.key_gate) * memory
            v = drop(head.value_gate() * memory)
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            scores = q @ k.transpose(1, 2) / q.size(-1) ** 0.5
            mask = torch.full((length, k.size(1)), float("-inf")).triu(k.size(1) - length + 1)
            mix = drop(torch.softmax(scores + mask, -1)) @ v
            h = h + drop(mix.transpose(0, 1))
        wide = layer.boom.linear(layer.norm_boom(h))
        wide = drop(wide * torch.sigmoid(1.702 * wide))
        boom = wide.view(*h.shape[:2], -1, h.size(-1)).sum(-2)
        h = layer.norm_residual(h) + drop(boom)
        left.append(after)
    return F.linear(drop(h), decoder.embedding.weight, decoder.output_bias), left


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[256, 256, 1024])
    parser.add_argument("--window", type=int, nargs="+", default=[1000, 5000, 1000], help="tokens")
    parser.add_argument("--length", type=int, default=256, help="tokens of a segment")
    parser.add_argument("--streams", type=int, default=16)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for width, window in zip(args.width, args.window):
        torch.manual_seed(1)
        print(
            f"\n{describe_machine()}; width {width}, window {window}, {args.streams} streams, "
            f"segments of {args.length}"
        )
        compare_steps(width, window, args)


def compare_steps(width, window, args):
    section = {"_name": "sha_rnn_small", "width": width, "window": window}
    decoder = build(section).decoder
    tokens, targets = (random_tokens(args.length, args.streams) for _ in range(2))
    state = steady_state(decoder, tokens, window - args.length)

    def step(forward):
        def run():
            decoder.train()
            logits, _ = forward(decoder, tokens, state, True)
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            decoder.zero_grad()

        return run

    def evaluate(forward, decoder=decoder, state=state):
        def run():
            decoder.eval()
            with torch.no_grad():
                forward(decoder, tokens, state, False)

        return run

    half = deepcopy(decoder).bfloat16()
    half_state = [{k: v.bfloat16() for k, v in layer.items()} for layer in state]
    expected, _ = transcription(decoder.eval(), tokens, state, False)
    torch.testing.assert_close(
        ours(decoder, tokens, state, False)[0], expected, atol=1e-4, rtol=1e-3
    )
    for kind, cases in (
        ("training", {"ours": step(ours), "transcription": step(transcription)}),
        (
            "evaluation",
            {
                "ours": evaluate(ours),
                "transcription": evaluate(transcription),
                "ours, bfloat16": evaluate(ours, half, half_state),
            },
        ),
    ):
        recording = Recording()
        with recording:
            cases["ours"]()
        print(f"\n{kind}\n")
        compare({**cases, "floor": recording.replay(*FLOOR)}, args.repeats, baseline="ours")


def ours(decoder, tokens, state, training):
    features, left = decoder.read(tokens, state)
    return decoder.output_layer(features), left


if __name__ == "__main__":
    main()
