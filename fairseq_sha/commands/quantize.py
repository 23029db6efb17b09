"""Write a model in integers, which computes the same on every machine.

    fairseq-sha quantize --path checkpoint.pt --data data-bin/enwiki6

Writes checkpoint.shai, with weights of 8 bits: one small file that generate, compress and
decompress take as --path, without torch and fairseq. How large activations become is seen on text
of train. Then the float model and the integer model are scored on the beginning of valid, and the
bits per byte of both are printed.

SHA-RNN of bytes with --cell lstm, sru or min_gru has an integer form.
"""

from pathlib import Path

from fairseq_sha.commands.common import (
    add_model_arguments,
    check_new,
    load_model,
    use_symbols_of_data,
)
from fairseq_sha.errors import UserError

SUFFIX = ".shai"
#: Streams that are read side by side, to calibrate and to score.
STREAMS = 16
#: Bytes of each stream to calibrate.
CALIBRATION = 1024


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="data folder with train and valid"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"(default: the checkpoint's name with {SUFFIX})"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=32768,
        metavar="BYTES",
        help="how much of valid to score; 0 for none (default: %(default)s)",
    )


def run(args):
    """Convert, write and score."""
    if args.sample < 0:
        raise UserError(f"--sample {args.sample}: must be at least 0")
    out = args.out or Path(args.path).with_suffix(SUFFIX)
    check_new([out])
    args.cpu = True
    use_symbols_of_data(args)
    trained = load_model(args)
    from fairseq_sha.portable import PortableModel, convert, model

    convert.check(trained)
    train = convert.text_of(trained, "train", STREAMS * CALIBRATION)
    valid = convert.text_of(trained, "valid", args.sample)
    sizes, arrays = convert.convert(trained, convert.columns(trained, train, STREAMS))
    written = model.write(out, sizes, arrays)
    print(f"{out}: {out.stat().st_size:,} bytes")
    length = len(valid) // STREAMS
    if not length:
        return
    valid = valid[: length * STREAMS]
    parts = [valid[i * length : (i + 1) * length] for i in range(STREAMS)]
    before = convert.float_bits(trained, parts) / len(valid)
    after = 8 * len(PortableModel(written).encode(valid, STREAMS)) / len(valid)
    print(
        f"{len(valid):,} bytes of valid in {STREAMS} streams, bits per byte: "
        f"{before:.4f} in float, {after:.4f} in integers ({after / before - 1:+.2%})"
    )
