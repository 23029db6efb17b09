"""The options of dynamic evaluation, and the policy that they ask for."""

import math
from pathlib import Path

from fairseq_sha.commands.common import check_new
from fairseq_sha.errors import UserError

#: Tokens of a segment, and what is added to the roots of the statistics.
SEGMENT = 32
EPSILON = 1e-5
#: What the statistics are collected from: batches of train, and segments of each.
BATCHES = 500
STREAMS = 16


def add_dynamic_arguments(parser, several=False):
    """Declare the options of dynamic evaluation, which :func:`check_dynamic` checks and
    :func:`dynamic_policy` turns into a policy.

    Args:
        several (bool): whether several rules, learning rates and decays may be given
    """
    group = parser.add_argument_group(
        "dynamic evaluation", "score a segment, then learn from it; the score is not a static one"
    )
    number = {"type": float, "nargs": "+" if several else None}
    group.add_argument(
        "--dynamic",
        choices=["sgd", "rms"],
        required=several,
        nargs="+" if several else None,
        help="how the weights learn: plain SGD, or RMS with decay to the trained weights "
        "(arXiv 1709.07432)",
    )
    group.add_argument(
        "--dynamic-lr",
        metavar="LR",
        help="learning rate; 0 leaves the weights as they are",
        **number,
    )
    group.add_argument(
        "--dynamic-decay",
        metavar="DECAY",
        help="share of the way back to the trained weights at each step; for rms, of a parameter "
        "of average gradient",
        **number,
    )
    group.add_argument(
        "--dynamic-epsilon",
        type=float,
        metavar="EPSILON",
        help="for rms: what is added to the usual size of a gradient (default: 1e-5, as published "
        "for WikiText-103 in arXiv 1904.08378)",
    )
    group.add_argument(
        "--dynamic-segment",
        type=int,
        metavar="N",
        help=f"tokens that are scored before each step (default: {SEGMENT})",
    )
    group.add_argument(
        "--dynamic-statistics",
        type=Path,
        metavar="FILE",
        help="for rms: sizes of the gradients of train, which evaluate collects where the file is "
        "missing (default: CHECKPOINT.dynamic.npz)",
    )


def add_statistics_arguments(parser):
    """Declare how the statistics of :func:`add_dynamic_arguments` are collected."""
    parser.add_argument(
        "--statistics-segments",
        type=int,
        metavar="N",
        help="for rms: batches of train whose gradients are measured "
        f"(default: {BATCHES}, or as in the file)",
    )
    parser.add_argument(
        "--statistics-streams",
        type=int,
        metavar="N",
        help="segments of each of them, from as many parts of train; with --context-window, "
        f"windows that follow one another (default: {STREAMS}, or as in the file)",
    )


def check_dynamic(args):
    """Raise a UserError for options of dynamic evaluation that are wrong, or that lack others."""
    rules, rates, decays = (
        value if isinstance(value, list) or value is None else [value]
        for value in (args.dynamic, args.dynamic_lr, args.dynamic_decay)
    )
    for option, needs in (
        ("dynamic-lr", ("sgd", "rms")),
        ("dynamic-decay", ("sgd", "rms")),
        ("dynamic-segment", ("sgd", "rms")),
        ("dynamic-epsilon", ("rms",)),
        ("dynamic-statistics", ("rms",)),
        ("statistics-segments", ("rms",)),
        ("statistics-streams", ("rms",)),
    ):
        value = getattr(args, option.replace("-", "_"), None)
        if value is not None and not set(needs) & set(rules or ()):
            raise UserError(f"--{option}: needs --dynamic {' or '.join(needs)}; add it")
    for option, values in (("lr", rates), ("decay", decays), ("epsilon", [args.dynamic_epsilon])):
        for value in values or ():
            if value is not None and not (0 <= value < math.inf):
                raise UserError(f"--dynamic-{option} {value}: must be 0 or positive, and finite")
    if args.dynamic_epsilon == 0:
        raise UserError("--dynamic-epsilon 0: must be positive, since gradients of train may be 0")
    if "sgd" in (rules or ()) and max(decays or [0]) > 1:
        raise UserError(f"--dynamic-decay {max(decays)}: must be at most 1; it is a share")
    for option in ("dynamic_segment", "statistics_segments", "statistics_streams"):
        value = getattr(args, option, None)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be at least 1")


def dynamic_policy(args, trained, context=0, parts=1):
    """How the options of :func:`add_dynamic_arguments` say that a text is read.

    Args:
        args: the command's options, with one rule, learning rate and decay
        trained (~fairseq_sha.trained_model.TrainedModel): the model, not collapsed
        context (int): for models without state: context of each prediction in tokens
        parts (int): equal parts of the text, each of which starts from the trained weights

    Raises:
        UserError: there is no learning rate, or there are no statistics and nothing to collect them
            from, or they are of another model
    """
    from fairseq_sha.evaluation.dynamic import RMS, SGD, Dynamic

    if args.dynamic_lr is None:
        raise UserError(
            f"--dynamic {args.dynamic}: needs --dynamic-lr; fairseq-sha tune-dynamic finds one"
        )
    text = trained.task.evaluation_policy(1, args.dynamic_segment or SEGMENT, context)
    rate, decay = args.dynamic_lr, args.dynamic_decay or 0.0
    if args.dynamic == "sgd":
        return Dynamic(text, SGD(rate, decay), parts)
    epsilon = EPSILON if args.dynamic_epsilon is None else args.dynamic_epsilon
    roots = gradient_statistics(args, trained, context).roots
    return Dynamic(text, RMS(rate, decay, epsilon, roots), parts)


def statistics_path(args):
    """Where the statistics are that the options name."""
    return args.dynamic_statistics or Path(f"{args.path}.dynamic.npz")


def gradient_statistics(args, trained, context=0):
    """The statistics that the options name, which are collected from the data folder where the file
    is missing.

    Returns:
        :class:`~fairseq_sha.evaluation.dynamic.Statistics`

    Raises:
        UserError: the file is missing and there is no data folder, or is of another model
    """
    from fairseq_sha.evaluation.dynamic import Statistics, collect

    path = statistics_path(args)
    segment = args.dynamic_segment or SEGMENT
    settings = {
        "checkpoint": trained.identity.hex(),
        "segment length": segment,
        "context": context,
    }
    task, model = trained.task, trained.models[0]
    collects = hasattr(args, "statistics_segments")
    asked = {}
    if collects:
        task.load_dataset("train")
        train = task.dataset("train")
        settings["training text"] = train.fingerprint()
        asked = {"streams": args.statistics_streams, "segments": args.statistics_segments}
    if path.exists():
        settings.update({name: value for name, value in asked.items() if value is not None})
        return Statistics.load(path, settings, trained.device)
    if not collects:
        raise UserError(
            f"{path}: no such file; collect statistics of train with fairseq-sha evaluate "
            "--dynamic rms, which has the data folder"
        )
    check_new([path])
    settings["streams"] = asked["streams"] or STREAMS
    settings["segments"] = asked["segments"] or BATCHES
    policy = task.evaluation_policy(settings["streams"], segment, context)
    batches = policy.batches(train, "train", task.codec)
    number = min(settings["segments"], len(batches))
    pairs = ((batches[i], batches.rows(i)) for i in range(number))
    statistics = Statistics(collect(model, pairs), settings)
    statistics.save(path)
    return statistics
