"""Evaluate a trained model with EleutherAI's lm-evaluation-harness.

    fairseq-sha lm-eval --path checkpoint.pt -- --tasks TASK [--include_path DIR]

What comes after -- are the options of the harness's own command, lm-eval run; its --model and
--model_args are set here. Needs Python 3.10 or newer and pip install 'fairseq-sha[lm-eval]'.
"""

import json
import sys

from fairseq_sha.commands.common import add_model_arguments, import_plugin, model_overrides


def add_arguments(parser):
    """Declare the options."""
    add_model_arguments(parser)
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="of the harness")


def run(args):
    """Have the harness evaluate."""
    arguments = {
        "path": args.path,
        "data_bin": args.data_bin,
        "cpu": args.cpu,
        "model_overrides": model_overrides(args.model_overrides),
    }
    from fairseq_sha import lm_eval_adapter

    lm_eval_adapter.register()
    import_plugin(args)
    given = {key: value for key, value in arguments.items() if value}
    model = ["--model", lm_eval_adapter.NAME, "--model_args", json.dumps(given)]
    sys.argv = ["lm-eval", "run", *model, *args.options]
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
