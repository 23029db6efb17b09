"""Generation, one byte at a time: steps per second once a text has so many bytes.

Models of about 3.5M parameters, with the weights they start with, beside fairseq's transformer_lm,
which keeps the keys and values of all that came before. Times are of the model alone, under
fairseq's incremental decoding.

    python benchmarks/generation.py
"""

import statistics
import time
from pathlib import Path

import torch
from models import build, random_tokens, settings
from timing import arguments, describe_machine

from fairseq_sha.models.segment_decoder import SegmentDecoder

CONFIGS = [
    *(f"head_to_head/{name}" for name in ("sha_lstm", "sha_rnn", "adaptive_span")),
    *(f"head_to_head/{name}" for name in ("transformer_xl", "transformer_lm")),
    *(f"recurrences/{name}" for name in ("sha_sru", "srupp", "min_gru", "min_lstm")),
]
STEPS = 50  # that are timed, the last before each length
SEGMENT = 128  # tokens, when reading what comes before


def build_for(name, longest):
    section = settings(name)["model"]
    if section["_name"] == "transformer_lm":
        section.update(max_target_positions=longest + 1, tokens_per_sample=longest + 1)
    return build(section).eval()


@torch.no_grad()
def steps_per_second(model, length):
    """The median of the last steps up to a length."""
    state, times = {}, []
    tokens = random_tokens(length + 1, 1).t()
    first = 1
    if isinstance(model.decoder, SegmentDecoder):  # reads what comes before at once
        first = max(length - STEPS, 1)
        left = None
        if first > 1:
            for segment in tokens[:, : first - 1].split(SEGMENT, 1):
                _, left = model.decoder.read(segment.t(), left)
            model.decoder.set_generation_state(state, left)
    for now in range(first, length + 1):
        start = time.perf_counter()
        model.decoder(tokens[:, :now], incremental_state=state)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times[-STEPS:])


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 10000])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    print(describe_machine() + "; steps per second at a text of so many bytes\n")
    print("| model | parameters | " + " | ".join(f"{n:,}" for n in args.lengths) + " |")
    print("| --- " * (2 + len(args.lengths)) + "|")
    for name in CONFIGS:
        model = build_for(name, max(args.lengths))
        speeds = [steps_per_second(model, length) for length in args.lengths]
        parameters = sum(p.numel() for p in model.parameters())
        cells = " | ".join(f"{speed:.0f}" for speed in speeds)
        print(f"| {Path(name).name} | {parameters:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
