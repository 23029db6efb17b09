"""Have a trained model continue a prompt.

    fairseq-sha generate --path checkpoint.pt --prompt "The history of" --length 300

Writes the prompt, its continuation and a newline to standard output. A newline ends no text, and
symbols that stand for no text are never chosen.

--path may name a file of fairseq-sha quantize. Then no torch is needed, tokens are bytes, and a
seed gives the same text on every machine.
"""

from fairseq_sha.commands.common import (
    add_model_arguments,
    load_model,
    load_portable,
    path_or_standard,
    read_text,
    standard_output,
)
from fairseq_sha.errors import UserError


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser, what="MODEL")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="(default: none)")
    prompt.add_argument(
        "--prompt-file",
        type=path_or_standard,
        metavar="FILE",
        help="any bytes; - is standard input",
    )
    parser.add_argument(
        "--length", type=int, default=500, help="tokens to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=1, help="number of continuations (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of random numbers (default: a random one)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K most probable tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the most probable tokens whose probabilities sum up to P",
    )
    parser.add_argument(
        "--beam",
        type=int,
        metavar="N",
        help="search with N hypotheses instead of drawing; 1: greedy",
    )


def run(args):
    """Generate and print."""
    options = generation_options(args)
    prompt = args.prompt.encode("utf-8", "surrogateescape")
    if args.prompt_file is not None:
        prompt = read_text(args.prompt_file)
    portable = load_portable(args)
    if portable is not None:
        return generate_in_integers(portable, args, prompt)
    model = load_model(args)
    symbols = len(model.dictionary)
    if (args.beam or 1) >= symbols // 2:
        raise UserError(f"--beam {args.beam}: too many for {symbols} symbols")
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    # The prompt as the model reads it: words are followed by a space.
    shown = model.codec.decode(model.encode(prompt))
    for _ in range(args.samples):
        with standard_output() as out:
            out.write(shown + model.continuation(prompt, args.length, **options) + b"\n")


def generate_in_integers(model, args, prompt):
    """What :func:`run` does with a :class:`~fairseq_sha.portable.PortableModel`."""
    for name in ("top_k", "top_p", "beam"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}: not for a model in integers; leave it out, or name "
                "the checkpoint"
            )
    for sample in range(args.samples):
        seed = None if args.seed is None else args.seed + sample
        drawn = model.generate(prompt, args.length, seed, args.temperature)
        with standard_output() as out:
            out.write(prompt + drawn + b"\n")


def generation_options(args):
    """fairseq's options of generation.

    Raises:
        UserError: a value that makes no sense, or options that exclude each other
    """
    from fairseq_sha.portable import check_temperature

    for name in ("length", "samples", "top_k", "top_p", "beam"):
        value = getattr(args, name)
        if value is not None and not (0 < value <= 1 if name == "top_p" else value > 0):
            limits = "above 0 and at most 1" if name == "top_p" else "positive"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {limits}")
    check_temperature(args.temperature)
    if args.top_k and args.top_p:
        raise UserError("--top-k and --top-p: choose one")
    if args.beam is not None:
        if args.top_k or args.top_p:
            raise UserError("--beam does not draw; leave --top-k and --top-p out")
        return {"beam": args.beam, "temperature": args.temperature}
    return {
        "beam": 1,
        "sampling": True,
        "sampling_topk": args.top_k or -1,
        "sampling_topp": args.top_p or -1.0,
        "temperature": args.temperature,
    }
