"""Score a split of a data folder: nats, bits per byte and perplexity, with what was counted.

    fairseq-sha evaluate data-bin/enwik8 --path checkpoint.pt --split test --batch-size 8

Models that carry state read segments of --tokens-per-sample tokens in --batch-size parallel
streams. For models without state, --context-window gives each prediction at least so much context:
windows of --tokens-per-sample tokens, in which only the tokens after the context are scored.
The model may be one of fairseq's own, if it was trained with a task of this package.

--fit-temperature SPLIT reads SPLIT first, such as valid, and finds the factor between 0.80 and 1.06
by which all logits are multiplied best. The score with this factor is printed after the plain one.

--by-position also prints the bits per byte by how many tokens there are since the start of the
stream and of the segment, or of the window.

--answers-after MARK is for text each line of which is a question, a mark and an answer. It reads
the split once more and prints how many tokens of answers are the most probable ones.

--dynamic also scores the split with weights that learn from each segment once it has been scored:

    fairseq-sha evaluate DATA --path checkpoint.pt --dynamic sgd --dynamic-lr 0.05

This dynamic score is printed after the static one, and is never in its place. Each of the
--batch-size streams is read from its beginning to its end before the next one, and starts from the
trained weights. With --context-window, windows are read one after the other, and the weights learn
from the --dynamic-segment tokens after the context. rms needs statistics of train, which are
collected once. fairseq-sha tune-dynamic finds the learning rate and the decay.
"""

import hashlib
import json
import time
from pathlib import Path

from fairseq_sha.commands.common import (
    add_model_arguments,
    check_new,
    load_model,
    use_symbols_of_data,
)
from fairseq_sha.commands.dynamic_options import (
    add_dynamic_arguments,
    add_statistics_arguments,
    check_dynamic,
    dynamic_policy,
)
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

BLOCK = 10_000  # bytes of text behind each entry of the blocks in --json


def add_arguments(parser):
    """Declare the options."""
    parser.add_argument("data", help="data folder")
    add_model_arguments(parser)
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        help="parallel streams, each of which starts from nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-sample", type=int, help="tokens of a segment (default: as in training)"
    )
    parser.add_argument(
        "--context-window",
        type=int,
        default=0,
        help="for models without state: context of each prediction in tokens (default: none)",
    )
    parser.add_argument(
        "--fit-temperature",
        metavar="SPLIT",
        help="also score with a softmax temperature that is fitted on another split",
    )
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="also print the bits by distance from the start of what the model sees",
    )
    parser.add_argument(
        "--answers-after",
        metavar="MARK",
        help="also count the answers that are right: what follows this character in each line",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write the figures, and the bits of each {BLOCK:,} bytes of text, to a file",
    )
    add_dynamic_arguments(parser)
    add_statistics_arguments(parser)


def run(args):
    """Evaluate and print the score, then what else is wanted."""
    if args.json:
        check_new([args.json])
    check_fit(args)
    check_dynamic(args)
    if args.dynamic and args.fit_temperature:
        raise UserError(
            "--fit-temperature: is fitted to weights that stay as they are; leave it or --dynamic "
            "out"
        )
    use_symbols_of_data(args)
    only_scores = not (args.dynamic or args.fit_temperature)
    trained = load_model(args, allow_stock=True, allow_diverged=only_scores)
    # What is wrong is found before hours of reading.
    policy_of(trained.task, args)
    trained.task.load_dataset(args.split)
    answers = dynamic = None
    if args.fit_temperature:
        trained.task.load_dataset(args.fit_temperature)
    if args.answers_after is not None:
        answers = find_answers(trained, args)
    if args.dynamic:
        dynamic = dynamic_policy(args, trained, args.context_window, args.batch_size)
    score, costs, sizes, seconds = evaluate_split(trained, args)
    print(f"{args.split}: {score}")
    content = {
        **score._asdict(),
        "bits_per_byte": score.bits_per_byte,
        "sha256": args.json and sha256(trained.task, args),
        # Windows are independent of each other, however many are read side by side.
        "streams": None if args.context_window else args.batch_size,
        "seconds": round(seconds, 3),
        "by_position": bits_by_position(trained.task, args, costs, sizes)
        if args.by_position
        else None,
        "answers": answers and right_answers(trained, args, answers, costs),
        "dynamic": dynamic and evaluate_dynamic(trained, args, dynamic),
        "fitted_temperature": args.fit_temperature and evaluate_fitted(trained, args),
        "block_bytes": BLOCK,
        "block_bits": bits_of_blocks(costs, sizes),
    }
    if args.json:
        write_atomically(args.json, json.dumps(content) + "\n")


def evaluate_split(trained, args, policy=None):
    """Read a split.

    Args:
        policy (~fairseq_sha.evaluation.policies.Policy): how (default: as the options say)

    Returns:
        the score, the cost of each prediction in nats, the bytes that each stands for, and the
        seconds that it took, without the time to load
    """
    from fairseq_sha.evaluation.evaluate import evaluate

    task, model = trained.task, trained.models[0]
    corpus, policy = task.dataset(args.split), policy or policy_of(task, args)
    started = time.perf_counter()
    score, costs = evaluate(model, corpus, args.split, task.codec, policy, progress=True)
    seconds = time.perf_counter() - started
    return score, costs, task.codec.bytes_per_token()[corpus.tokens[1:]], seconds


def bits_by_position(task, args, costs, sizes):
    """Print a table of bits for each start that distances are counted from, and return them."""
    from fairseq_sha.evaluation import positions

    corpus, policy = task.dataset(args.split), policy_of(task, args)
    batches = policy.batches(corpus, args.split, task.codec)
    found = {
        start: positions.by_position(distance, costs, sizes)
        for start, distance in positions.distances(policy, batches, len(corpus)).items()
    }
    for start, rows in found.items():
        print(f"\n{positions.table(start, rows)}\n")
    return found


def find_answers(trained, args):
    """The answers of the split, as :func:`fairseq_sha.evaluation.answers.find` gives them."""
    from fairseq_sha.evaluation import answers

    codec = trained.task.codec
    mark = answers.mark_of(codec, args.answers_after)
    return answers.find(trained.task.dataset(args.split), args.split, codec, mark)


def right_answers(trained, args, found, costs):
    """Print how many answers are right, and return the figures: a dict."""
    from fairseq_sha.evaluation import answers

    task, model = trained.task, trained.models[0]
    corpus, policy = task.dataset(args.split), policy_of(task, args)
    right = answers.count(model, corpus, args.split, task.codec, policy, found, costs)
    print(f"{args.split}: {right}")
    return right._asdict()


def evaluate_dynamic(trained, args, policy):
    """Print the score with weights that learn, and return the figures: a dict."""
    score, costs, sizes, seconds = evaluate_split(trained, args, policy)
    print(f"{args.split}, dynamic: {score}")
    return {
        "rule": args.dynamic,
        "lr": args.dynamic_lr,
        "decay": policy.rule.decay,
        "policy": score.policy,
        "nats": score.nats,
        "bits_per_byte": score.bits_per_byte,
        "seconds": round(seconds, 3),
        "block_bits": bits_of_blocks(costs, sizes),
    }


def check_fit(args):
    """Raise a UserError if the temperature would be fitted on what is scored, or on test."""
    split = args.fit_temperature
    if split and (split == args.split or split.startswith("test")):
        raise UserError(
            f"--fit-temperature {split}: a temperature fitted on the split that is scored, or on "
            "test, gives no honest score; name another, such as valid"
        )


def evaluate_fitted(trained, args):
    """Fit a temperature, print the score with it, and return the figures: a dict."""
    from fairseq_sha.evaluation.evaluate import evaluate
    from fairseq_sha.evaluation.temperature import fit_temperature

    task, model, split = trained.task, trained.models[0], args.fit_temperature
    policy = policy_of(task, args)
    fit = fit_temperature(model, task.dataset(split), split, task.codec, policy, progress=True)
    corpus = task.dataset(args.split)
    score, _ = evaluate(
        model, corpus, args.split, task.codec, policy, progress=True, losses=fit.losses()
    )
    print(f"{args.split}, {fit}: {score}")
    return {
        "split": fit.split,
        "factor": fit.factor,
        "nats": score.nats,
        "bits_per_byte": score.bits_per_byte,
    }


def policy_of(task, args):
    """How the options say that a split is read."""
    length = args.tokens_per_sample
    if length is None:
        length = task.cfg.tokens_per_sample
    for option, value, least in (
        ("batch-size", args.batch_size, 1),
        ("tokens-per-sample", length, 1),
        ("context-window", args.context_window, 0),
    ):
        if value < least:
            raise UserError(f"--{option} {value}: must be at least {least}")
    if args.context_window >= length:
        raise UserError(
            f"--context-window {args.context_window}: leaves nothing to score of "
            f"--tokens-per-sample {length}, which includes it; raise that"
        )
    return task.evaluation_policy(
        args.batch_size, length - args.context_window, args.context_window
    )


def sha256(task, args):
    """The SHA-256 of the split's text, by which scores of the same text are known; None if tokens
    are words, whose white space is lost."""
    if not task.codec.lossless:
        return None
    digest = hashlib.sha256()
    for _, tokens in task.dataset(args.split).parts():
        digest.update(task.codec.decode(tokens))
    return digest.hexdigest()


def bits_of_blocks(costs, sizes):
    """Bits of each stretch of ``BLOCK`` bytes of text, a token counting where it ends; the last
    stretch may be shorter.

    Args:
        costs (ndarray): in nats, ``[N]``
        sizes (ndarray): bytes that each token stands for, ``[N]``
    """
    import numpy as np

    block = np.maximum(np.cumsum(sizes) - 1, 0) // BLOCK
    bits = np.bincount(block, weights=costs / np.log(2))
    return [round(float(value), 3) for value in bits]
