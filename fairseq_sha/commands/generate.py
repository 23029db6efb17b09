"""Let a trained model go on from a prompt.

    fairseq-sha generate --path checkpoint.pt --prompt "The history of" --length 300

Writes the prompt and what follows it, any bytes, and a newline to standard output. A newline ends
no text, and symbols that stand for no byte are never chosen.
"""

import sys
from pathlib import Path

import torch

from fairseq_sha.commands.common import load, model_parser
from fairseq_sha.errors import UserError


def main(argv=None):
    parser = model_parser("generate", __doc__)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="(default: none)")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="any bytes; - is standard input"
    )
    parser.add_argument("--length", type=int, default=500, help="bytes (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of random numbers (default: another each time)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest bytes")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest bytes of probability P"
    )
    parser.add_argument(
        "--beam", type=int, metavar="N", help="do not draw, but search with N hypotheses; 1: greedy"
    )
    args = parser.parse_args(argv)
    options = options_of(args)
    if args.prompt_file is None:
        text = args.prompt.encode("utf-8", "surrogateescape")
    elif args.prompt_file == Path("-"):
        text = sys.stdin.buffer.read()
    else:
        text = args.prompt_file.read_bytes()
    model = load(args)
    if (args.beam or 1) >= len(model.dictionary) // 2:
        raise UserError(f"--beam {args.beam}: too many for {len(model.dictionary)} symbols")
    if args.top_k:
        options["sampling_topk"] = min(args.top_k, len(model.dictionary))
    if args.seed is not None:
        torch.manual_seed(args.seed)
    for _ in range(args.samples):
        out = sys.stdout.buffer
        out.write(text + model.continuation(text, args.length, **options) + b"\n")
        out.flush()


def options_of(args):
    """fairseq's generation options."""
    for name in ("length", "samples", "temperature", "top_k", "top_p", "beam"):
        value = getattr(args, name)
        if value is not None and not (0 < value <= 1 if name == "top_p" else value > 0):
            limits = "above 0, 1 at most" if name == "top_p" else "positive"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {limits}")
    if args.top_k and args.top_p:
        raise UserError("--top-k and --top-p: choose one")
    if args.beam is not None:
        if args.top_k or args.top_p:
            raise UserError("--beam does not draw; leave --top-k and --top-p out")
        return {"beam": args.beam, "temperature": args.temperature}
    return {
        "beam": 1,
        "sampling": True,
        "sampling_topp": args.top_p or -1.0,
        "temperature": args.temperature,
    }


if __name__ == "__main__":
    sys.exit(main())
