"""Export a trained model to ONNX, for programs without torch.

    fairseq-sha export --path checkpoint.pt --save model.onnx [--length 1] [--int8]

The graph takes tokens, int64 [length, streams], and the state that the text before left. It returns
logits, float32 [length, streams, symbols], and NAME.next for each NAME of the state. An adaptive
softmax returns log-probabilities, which are logits too.
The metadata of the file hold the rest, in JSON:

  codec          what symbols are: bytes, words or pieces
  symbols        what each symbol stands for, a string with one Latin-1 character per byte; it is
                 empty for symbols that stand for nothing
  not_generated  symbols that must not be generated
  start          the symbol that comes before a text
  tokenizer      of pieces: the file of Hugging Face's package tokenizers that cuts a text into
                 them; its ids are the numbers of the symbols
  state          by NAME, the shape of the state at the start of a text, when all of it is zero; the
                 number of streams is given as 0. The graph tells the type of each input

examples/onnx/generate.py shows how to use them. --int8 rounds weights to 8 bits, by onnxruntime's
dynamic quantisation. The weights of models beyond 1.5 GB go to a second file, FILE.data, which
belongs beside FILE.
"""

from pathlib import Path

from fairseq_sha.commands.common import add_model_arguments, check_new, load_model
from fairseq_sha.errors import UserError


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser)
    parser.add_argument("--save", required=True, type=Path, metavar="FILE", help="to write")
    parser.add_argument(
        "--length", type=int, default=1, help="tokens of each call (default: %(default)s)"
    )
    parser.add_argument("--int8", action="store_true", help="quantise the weights")


def run(args):
    """Write the file."""
    if args.length < 1:
        raise UserError(f"--length {args.length}: must be at least 1")
    check_new([args.save])

    from fairseq_sha import onnx_export

    onnx_export.check_packages(args.int8)
    args.cpu = True
    for path in onnx_export.export(load_model(args), args.save, args.length, args.int8):
        print(f"{path}: {path.stat().st_size:,} bytes")
