"""Train and evaluate models under one budget, and report.

    fairseq-sha compare --data data-bin/enwiki6 --configs examples/head_to_head/*.yaml \\
        --seconds 720 --seeds 1 2 --out runs/head_to_head

Each config is a complete YAML for fairseq-hydra-train. Its schedule, all that lr_scheduler counts
in updates, is scaled from its own optimization.max_update to the budget. A file of the same name
in the folder `evaluation` beside it holds the settings that differ in evaluation
(tokens_per_sample, batch_size, context_window, model_overrides). Commands run in the current
directory.

A budget in seconds of training is converted into updates once, by training each model for a short
time; one in bytes by the mean number of tokens per update on one device, and, unless tokens are
bytes, by how many bytes they stand for in that time.

--vary makes a grid over one setting: each of its values, such as model.attention_layers=[0], is a
variant of each config, and a model of its own that is called by it. A value may hold several
changes, as 'model.attention_layers=[] model.width=268' does to keep the number of parameters; the
first of them gives the name.

With --space, each model is tuned first: its recipe and --trials points of one Sobol sequence, the
same for all models, are trained with one seed. The best on valid is trained again with the seeds of
--seeds, beside the recipe as it was given. Trials are in OUT/tuning, an Optuna storage: several
processes or machines can share them, and optuna-dashboard shows them.
The chosen recipes are in OUT/tuning/chosen.

Models of bytes, pieces and words may be compared if their data folders are made of the same text:
give the folder in each config (task.data) instead of --data.

OUT gets table.md, results.json and pictures of learning curves, which are rewritten after each
run; OUT/MODEL/seedN gets logs, a checkpoint and result.json. After an interruption, repeat the
command to continue.
"""

import argparse
from pathlib import Path

from fairseq_sha.compare import DEFAULT_TRIALS


def add_arguments(parser):
    """Declare the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument(
        "--data", type=Path, help="data folder of all models (default: that of each config)"
    )
    parser.add_argument(
        "--configs", required=True, nargs="+", type=Path, help="one YAML file per model"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for results")
    parser.add_argument(
        "--seeds",
        nargs="*",
        type=int,
        default=[1],
        help="one run per seed (default: 1; none after --seeds: only tune)",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="budget: seconds of training")
    budget.add_argument("--updates", type=int, help="budget: updates")
    budget.add_argument("--bytes", type=int, help="budget: bytes of text to train on")
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument(
        "--space", type=Path, help="YAML file of the settings to tune (default: no tuning)"
    )
    tuning.add_argument(
        "--trials",
        type=int,
        help=f"trials of each model, beside its recipe (default: {DEFAULT_TRIALS})",
    )
    tuning.add_argument(
        "--tuning",
        type=Path,
        help="folder for trials, which comparisons may share (default: OUT/tuning)",
    )
    trial = tuning.add_mutually_exclusive_group()
    trial.add_argument("--trial-seconds", type=float, help="budget of a trial (default: as above)")
    trial.add_argument("--trial-updates", type=int, help="the same, in updates")
    trial.add_argument("--trial-bytes", type=int, help="the same, in bytes of text")
    tuning.add_argument(
        "--paper-seeds",
        nargs="*",
        type=int,
        help="seeds for the recipes as they were given (default: those of --seeds)",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="runs at once, each with its share of the CPU's threads; speeds are measured before, "
        "alone (default: %(default)s)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: that of each config)")
    parser.add_argument(
        "--calibration-seconds",
        type=float,
        default=20,
        help="how long each model is trained to measure its speed (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-rounds",
        type=int,
        default=2,
        metavar="N",
        help="how often the speeds are measured, in rounds through all models; the fastest counts, "
        "since other work only makes a model slower (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-streams",
        type=int,
        default=8,
        help="batch size of evaluation, unless the config sets its own (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change a setting of all configs",
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="CHANGES",
        help="variants of each config: SECTION.FIELD=VALUE, or several with spaces between",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="YAML file of whole sections, such as optimizer, that replace those of all configs",
    )
    parser.add_argument(
        "--launcher",
        metavar="NAME",
        help="train all seeds of a model in one Hydra multirun with this launcher, such as "
        "submitit_slurm; by default they are trained one after the other on this machine",
    )
    parser.add_argument(
        "--rivals",
        nargs="+",
        metavar="NAME",
        help="classical compressors in the table, see `fairseq-sha rivals --help`; none: without "
        "them (default: all that are installed)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")


def run(args):
    """Run the comparison; returns the exit status."""
    from fairseq_sha.compare import runner

    return runner.run(args)
