"""Print what a text costs a trained model, given all of the text before each token.

    fairseq-sha score --path checkpoint.pt FILE [--per-line] [--html PICTURE.html] [--json FILE]
    fairseq-sha score --path A.pt --against B.pt FILE

FILE may be - for standard input, and of any size: it is read in parts. Prints nats per token, bits
per byte and perplexity of the whole text. For models of bytes also bits per byte of each kind of
byte: letters that begin a word, other letters, digits, markup of XML and wiki, white space, other
signs.

--against has a second model read the same text. Prints both scores and the difference with an
interval (bootstrap over blocks of 10,000 bytes; "not resolved" if zero is inside), the difference
for each kind of byte, and the lines in which either model saves most.

--html draws the text, each character coloured by its cost or by the difference of two models. A
text of more than 200,000 bytes becomes a folder of pages, PICTURE_pages, with an index.html.

--dynamic has the weights learn from the text while it is read, see fairseq-sha evaluate.
"""

from pathlib import Path

from fairseq_sha.commands.common import (
    add_model_arguments,
    check_new,
    load_model,
    path_or_standard,
)
from fairseq_sha.commands.dynamic_options import (
    add_dynamic_arguments,
    check_dynamic,
    dynamic_policy,
)
from fairseq_sha.errors import UserError


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser)
    parser.add_argument(
        "file", type=path_or_standard, metavar="FILE", help="the text; - is standard input"
    )
    parser.add_argument(
        "--against", metavar="CHECKPOINT", help="compare with this model, of any codec"
    )
    parser.add_argument(
        "--against-overrides",
        default="{}",
        metavar="DICT",
        help="--model-overrides of the model of --against",
    )
    each = parser.add_mutually_exclusive_group()
    each.add_argument("--per-line", action="store_true", help="print the cost of each line")
    each.add_argument("--per-token", action="store_true", help="print the cost of each token")
    parser.add_argument("--html", type=Path, metavar="PICTURE", help="the text, coloured by cost")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures, with --per-line of each line"
    )
    add_dynamic_arguments(parser)


def run(args):
    """Score and print."""
    if args.against and args.per_token:
        raise UserError("--per-token: --against compares bytes, not tokens; use --per-line")
    if args.against and args.dynamic:
        raise UserError("--dynamic: --against compares static scores; leave one out")
    if args.against_overrides != "{}" and not args.against:
        raise UserError("--against-overrides: is for the second model; name it with --against")
    if args.html and args.json and args.html.resolve() == args.json.resolve():
        raise UserError(f"--html {args.html}: is also --json; name two files")
    check_dynamic(args)
    check_new(path for path in (args.html, args.json) if path)
    from fairseq_sha.reading import picture, scoring, texts

    with texts.opened(args.file) as text:
        if args.html:
            check_new([picture.place_of(args.html, text.size)])
        model = load_model(args, allow_diverged=not args.dynamic)
        policy = dynamic_policy(args, model) if args.dynamic else None
        readers = [scoring.Reader(model, args.path, policy=policy)]
        if args.against:
            args.path, args.data_bin = args.against, None
            args.model_overrides = args.against_overrides
            readers.append(scoring.Reader(load_model(args, allow_diverged=True), args.path))
        for reader in readers:
            reader.codec.check(text.chunks())  # before hours of reading
        wanted = scoring.Wanted(args.per_line, args.per_token, args.html, args.json)
        if args.against:
            scoring.compare(text, *readers, wanted)
        else:
            scoring.score(text, *readers, wanted)
