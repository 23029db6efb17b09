"""Make a checkpoint from weights that a model's reference implementation was trained with.

    fairseq-sha import-weights FAMILY --weights FILE --symbols FILE --data-bin DIR \\
        --save checkpoint.pt [--codec words|pieces] [--set name=value]...

FILE of --weights is a state dict under the reference's names, saved by torch. FILE of --symbols
lists what the rows of its vocabulary stand for, one symbol a line. With --codec bytes, these are
decimal byte values, 10 for newline; with --codec words, they are words, </s>, <eos> or <S> for the
end of a line and <unk> or <UNK> for unknown words. With --codec pieces, FILE may be the tokenizer
itself, such as the pieces.json of the data folder, if the rows are in the order of its ids;
otherwise it lists pieces as dict.txt writes them. Sizes are read off the shapes of the tensors;
--set gives what no shape shows, under the reference's names: --set mem_len=640 --set clamp_len=400,
or lists: --set cutoffs=20000,40000,200000. Symbols of the data folder that are missing from the
weights get probability zero. An adaptive softmax has no place for such symbols: it needs words, and
a data folder whose dictionary is in the order of the weights.
"""

from pathlib import Path

from fairseq_sha.commands.common import check_new


def add_arguments(parser):
    """Declare the options."""
    parser.add_argument("family", metavar="FAMILY", help="model family, such as transformer_xl")
    parser.add_argument("--weights", required=True, metavar="FILE", help="state dict (.pt)")
    parser.add_argument("--symbols", required=True, metavar="FILE", help="symbol of each row")
    parser.add_argument("--data-bin", required=True, metavar="DIR", help="data folder")
    parser.add_argument("--save", required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument(
        "--codec",
        choices=["bytes", "words", "pieces"],
        default="bytes",
        help="what symbols are (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the reference",
    )


def run(args):
    """Write the checkpoint."""
    import logging

    check_new([Path(args.save)])
    logging.getLogger().setLevel(logging.WARNING)  # fairseq makes the log of all packages verbose
    from fairseq_sha import weights_import
    from fairseq_sha.models.embeddings import AdaptiveConfig

    family = weights_import.family(args.family)
    cfg = weights_import.import_weights(
        args.family, args.weights, args.symbols, args.data_bin, args.save, args.set, args.codec
    )
    fields = dict.fromkeys(setting.field for setting in family.published.settings.values())
    if not getattr(cfg, "cutoffs", []):
        fields = [field for field in fields if field not in vars(AdaptiveConfig())]
    settings = " ".join(f"{field}={cfg[field]}" for field in fields)
    print(f"{args.save}: {args.family} with {settings}, for {args.data_bin}")
