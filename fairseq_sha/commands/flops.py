"""Count the parameters and the floating-point operations of the model of a config.

    fairseq-sha flops --config examples/head_to_head/sha_rnn.yaml

The config is a complete YAML for fairseq-hydra-train with a task of this package; the model may be
one of fairseq's own. Settings of evaluation are taken from a file of the same name in the folder
`evaluation` beside it, if there is one, as by `fairseq-sha compare`.

Matrix products, attention, convolutions and LSTMs are counted, a multiplication and an addition as
2; elementwise work is not. Attention counts hidden scores too. A training update is a forward and
a backward pass over segments of full length, with the state that earlier segments leave and the
weights that training starts with. (Adaptive Span's cost grows with its spans.)
"""

import argparse
import json
import logging
from pathlib import Path

from fairseq_sha.commands.common import check_new, import_plugin, read_config
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically


def add_arguments(parser):
    """Declare the options."""
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="YAML for fairseq-hydra-train"
    )
    parser.add_argument("--data", metavar="DIR", help="data folder (default: the config's)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to a file, too"
    )


def run(args):
    """Count, and print."""
    if args.json:
        check_new([args.json])
    figures, parts = count(args.config, args.data)
    print(table(figures, parts))
    if args.json:
        write_atomically(args.json, json.dumps(figures) + "\n")


def count(path, data=None):
    """The figures of a config: a dict as ``--json`` writes it, and parameters by part.

    Args:
        path (Path): YAML for fairseq-hydra-train
        data (str): data folder, which replaces the config's

    Raises:
        UserError: the config is missing, or nothing can be made of it
    """
    from fairseq_sha.compare import recipe

    config = read_config(path)
    for section in ("task", "model", "dataset"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{path}: {section} {config[section]}: not a section; correct it")
    if data:
        config.setdefault("task", {})["data"] = str(data)
    for needed in ("task.data", "task.tokens_per_sample", "dataset.batch_size"):
        value = recipe.lookup(config, needed)
        if value is None:
            raise UserError(f"{path}: {needed} is missing; add it")
        if needed != "task.data" and not (isinstance(value, int) and value > 0):
            raise UserError(f"{path}: {needed} {value}: must be a whole number of at least 1")
    beside = path.parent / "evaluation" / path.name
    evaluation = read_config(beside) if beside.is_file() else {}
    tokens = recipe.tokens_per_update(recipe.Recipe(path.stem, config, evaluation))

    from fairseq_sha import flops

    logging.getLogger().setLevel(logging.WARNING)  # fairseq has every package log everything
    import_plugin(argparse.Namespace(user_dir=recipe.user_dir(config)))
    try:
        counted = flops.count(config, evaluation)
    except UserError as error:
        raise UserError(f"{path}: {error}")
    figures = {
        "parameters": sum(counted.parameters.values()),
        "training_flops_per_token": counted.training_per_token,
        "evaluation_flops_per_token": counted.evaluation_per_token,
        "tokens_per_update": tokens,
    }
    return figures, counted.parameters


def table(figures, parts):
    """The figures as text."""
    per_token = figures["training_flops_per_token"]
    per_update = per_token * figures["tokens_per_update"]
    lines = [("parameters", f"{figures['parameters']:,}")]
    lines += [(f"  {part}", f"{number:,}") for part, number in parts.items()]
    lines += [
        ("tokens per update", f"{figures['tokens_per_update']:,.0f}"),
        ("FLOPs per token, training", f"{per_token:,.0f}"),
        ("FLOPs per update", f"{per_update:,.0f}"),
        ("FLOPs per token, evaluation", f"{figures['evaluation_flops_per_token']:,.0f}"),
    ]
    first, second = (max(len(line[i]) for line in lines) for i in (0, 1))
    return "\n".join(f"{name:{first}}  {number:>{second}}" for name, number in lines)
