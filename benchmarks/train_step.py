"""A training step and an evaluation step of SHA-RNN beside a straightforward transcription.

The transcription is what the paper says in plain PyTorch: gates on the keys and values of the whole
memory, scores and mask that are materialised, torch's own dropout, and GELU in four operations.
Both have the same weights, state and tokens. The floor is the time of the LSTM and the matrix
products alone.

    python benchmarks/train_step.py
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from kernels import FLOOR, Recording
from models import build, random_tokens, steady_state
from timing import arguments, compare, describe_machine

P = 0.1
SIZES = [  # width, window, length of segments, streams, layers that attend
    (256, 1000, 256, 16, [2]),
    (256, 5000, 256, 16, [2]),
    (256, 5000, 256, 16, [0, 1, 2, 3]),
    (1024, 1000, 128, 8, [2]),
]


def transcription(decoder, tokens, state, training):
    """Logits ``[T, B, V]`` and state, with the weights of ``decoder``."""

    def drop(x):
        return F.dropout(x, P, training)

    length = len(tokens)
    h = drop(F.embedding(tokens, decoder.embedding.weight))
    new_state = []
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
        new_state.append(after)
    return F.linear(drop(h), decoder.embedding.weight, decoder.head.bias), new_state


def main(argv=None):
    parser = arguments(__doc__)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for sizes in SIZES:
        torch.manual_seed(1)
        width, window, length, streams, attention_layers = sizes
        print(
            f"\n{describe_machine()}; width {width}, window {window}, {streams} streams, segments "
            f"of {length}, {len(attention_layers)} of 4 layers attend"
        )
        compare_steps(*sizes, args.repeats)


def compare_steps(width, window, length, streams, attention_layers, repeats):
    section = {
        "_name": "sha_rnn",
        "width": width,
        "window": window,
        "attention_layers": attention_layers,
    }
    decoder = build(section).decoder
    tokens, targets = (random_tokens(length, streams) for _ in range(2))
    state = steady_state(decoder, tokens)

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
        compare({**cases, "floor": recording.replay(*FLOOR)}, repeats, baseline="ours")


def ours(decoder, tokens, state, training):
    features, new_state = decoder.read(tokens, state, training)
    return decoder.head.logits(features), new_state


if __name__ == "__main__":
    main()
