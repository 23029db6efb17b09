"""A training step and an evaluation step of SHA-RNN beside a straightforward transcription.

The transcription says in plain PyTorch what the paper says: keys and values gated over the whole
memory, scores and mask materialised, torch's own dropout and GELU in four operations. Both have the
same weights, state and tokens. The floor is the time of the LSTM and the matrix products alone.

    python benchmarks/train_step.py
"""

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from timing import arguments, compare, describe_machine

from fairseq_sha.models.sha_rnn import SHARNNConfig, SHARNNDecoder

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


def detached(state):
    return [{key: tensor.detach() for key, tensor in layer.items()} for layer in state]


def floor(decoder, length, streams, rows, backward):
    """A function that runs the LSTMs and matrix products of a segment, and nothing else."""
    width = decoder.embedding.weight.size(1)

    def leaf(*shape):
        return torch.randn(*shape, requires_grad=backward)

    x, queries = leaf(length, streams, width), leaf(streams, length, width)
    memory, weights = leaf(streams, rows, width), leaf(streams, length, rows)

    def run():
        outputs = []
        for layer in decoder.layers:
            outputs += [layer.cell(x, {})[0], layer.boom.linear(x)]
            if layer.attention is not None:
                outputs += [layer.attention.query(x), queries @ memory.transpose(1, 2)]
                outputs += [weights @ memory]
        outputs.append(F.linear(x, decoder.embedding.weight))
        if backward:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return run


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--window", type=int, default=1000, help="tokens")
    parser.add_argument("--length", type=int, default=256, help="tokens of a segment")
    parser.add_argument("--streams", type=int, default=16)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)

    dictionary = Dictionary()
    for i in range(204):
        dictionary.add_symbol(str(i))
    cfg = SHARNNConfig(width=args.width, window=args.window)
    decoder = SHARNNDecoder(OmegaConf.structured(cfg), dictionary)
    tokens = torch.randint(len(dictionary), (args.length, args.streams))
    targets = torch.randint(len(dictionary), (args.length * args.streams,))
    state = None
    with torch.no_grad():
        while state is None or len(state[2]["memory"]) < args.window:
            _, state = decoder.read(tokens, state)

    def ours(training):
        features, left = decoder.read(tokens, state)
        return decoder.output_layer(features), detached(left)

    def plain(training):
        return transcription(decoder, tokens, state, training)

    def step(forward):
        def run():
            decoder.train()
            decoder.zero_grad()
            logits, _ = forward(True)
            F.cross_entropy(logits.flatten(0, 1), targets).backward()

        return run

    def evaluate(forward):
        def run():
            decoder.eval()
            with torch.no_grad():
                forward(False)

        return run

    sizes = (args.length, args.streams, args.window)
    training_floor = floor(decoder, *sizes, backward=True)
    evaluation_floor = torch.no_grad()(floor(decoder, *sizes, backward=False))

    decoder.eval()
    torch.testing.assert_close(ours(False)[0], plain(False)[0], atol=1e-4, rtol=1e-3)
    print(
        f"{describe_machine()}; width {args.width}, window {args.window}, {args.streams} streams, "
        f"segments of {args.length}\n"
    )
    for kind, cases in (
        ("training", {"floor": training_floor, "ours": step(ours), "transcription": step(plain)}),
        (
            "evaluation",
            {
                "floor": evaluation_floor,
                "ours": evaluate(ours),
                "transcription": evaluate(plain),
            },
        ),
    ):
        print(f"\n{kind}\n")
        compare(cases, args.repeats, baseline="ours")


if __name__ == "__main__":
    main()
