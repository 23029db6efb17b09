"""Print published results as a table: beside each, the model's parameters here, the recipe, and the
commands that train and evaluate it.

    fairseq-sha published examples/enwik8

The folder holds a config for each row, settings of evaluation in `evaluation`, and the published
figures in `published/rows.yaml`. Figures are published ones, none is measured here. Parameters are
counted: each model is built without memory for its weights.
"""

import itertools
from pathlib import Path

from fairseq_sha.commands.common import read_config
from fairseq_sha.errors import UserError


def add_arguments(parser):
    """Declare the options."""
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("examples/enwik8"),
        help="of configs (default: %(default)s)",
    )


def run(args):
    """Print the tables and the commands."""
    print(page(args.folder))


def page(folder):
    """All tables and commands as Markdown.

    Raises:
        UserError: the folder has no published rows, or a row has no config
    """
    path = folder / "published" / "rows.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder of configs with published results")
    tables = read_config(path).get("tables")
    if not tables:
        raise UserError(f"{path}: has no tables; list the published rows under tables")
    parts, rows = [], []
    for table in tables:
        own = [Row(folder, row) for row in table["rows"]]
        parts.append(f"### {table['title']}\n\n{markdown(RESULTS, [row.results() for row in own])}")
        rows += own
    parts.append(f"### Recipes\n\n{markdown(RECIPES, [row.recipe() for row in rows])}")
    commands = "\n\n".join(row.commands() for row in rows)
    parts.append(f"### Commands\n\n```\n{commands}\n```")
    return "\n\n".join(parts)


RESULTS = [
    *("NAME", "model", "published in", "published valid", "published test"),
    *("published parameters", "parameters here", "symbols", "checked against"),
]
RECIPES = ["NAME", "optimiser", "learning rate", "clip", "length", "streams x tokens", "evaluation"]

#: Of an evaluation, unless its settings say otherwise: as in ``fairseq-sha compare``.
STREAMS = 8


def markdown(head, lines):
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


class Row:
    """A published result, and the config that makes its model.

    Args:
        folder (Path): of configs
        row (dict): as in ``published/rows.yaml``
    """

    def __init__(self, folder, row):
        self.folder, self.row = folder, row
        name = f"{row['name']}.yaml"
        self.config = read_config(folder / name)
        beside = folder / "evaluation" / name
        tokens = self.config["task"]["tokens_per_sample"]
        self.evaluation = {"batch_size": STREAMS, "tokens_per_sample": tokens}
        self.evaluation.update(read_config(beside) if beside.is_file() else {})

    def __getitem__(self, key):
        return self.row.get(key, "")

    def results(self):
        """The cells of :data:`RESULTS`."""
        keys = "model", "source", "valid", "test", "parameters"
        cells = [self[key] for key in keys]
        counted = f"{count(self.config['model'], self['symbols'], self['count'] or {}):,}"
        return [f"`{self['name']}`", *cells, counted, str(self["symbols"]), self["checked"]]

    def recipe(self):
        """The cells of :data:`RECIPES`."""
        optimization, task = self.config["optimization"], self.config["task"]
        schedule = {k: v for k, v in self.config["lr_scheduler"].items() if v not in (0, "fixed")}
        rate = "; ".join(filter(None, [rates(optimization["lr"]), settings(schedule)]))
        if "max_update" in optimization:
            length = f"{optimization['max_update']:,} updates"
        else:
            length = f"{optimization['max_epoch']} epochs"
        return [
            f"`{self['name']}`",
            settings(self.config["optimizer"]),
            rate,
            f"{optimization['clip_norm']:g}" if optimization.get("clip_norm") else "none",
            length,
            f"{self.config['dataset']['batch_size']} x {task['tokens_per_sample']:,}",
            self.policy(),
        ]

    def policy(self):
        """How the test set is read, in words."""
        length, context = (
            self.evaluation["tokens_per_sample"],
            self.evaluation.get("context_window"),
        )
        if context:
            return f"sliding windows of {length:,}, stride {length - context:,}"
        streams = self.evaluation["batch_size"]
        words = f"state carried, {streams} x {length:,}"
        overrides = self.evaluation.get("model_overrides", {})
        words += "".join(f", `{name}` {value}" for name, value in overrides.items())
        return words + ", fitted temperature" * bool(self["fit_temperature"])

    def commands(self):
        """The commands that train and evaluate the model."""
        name, data = self["name"], self.config["task"]["data"]
        options = [f"--batch-size {self.evaluation['batch_size']}"]
        options.append(f"--tokens-per-sample {self.evaluation['tokens_per_sample']}")
        if self.evaluation.get("context_window"):
            options.append(f"--context-window {self.evaluation['context_window']}")
        if self.evaluation.get("model_overrides"):
            options.append(f'--model-overrides "{self.evaluation["model_overrides"]}"')
        if self["fit_temperature"]:
            options.append("--fit-temperature valid")
        checkpoint = f"{self.config['checkpoint']['save_dir']}/checkpoint_best.pt"
        return (
            f"fairseq-hydra-train --config-dir {self.folder} --config-name {name}\n"
            f"fairseq-sha evaluate {data} --split test --path {checkpoint} \\\n"
            f"  {' '.join(options)}"
        )


def settings(section):
    """An optimiser or a schedule in words."""
    words = [f"{key} {value}" for key, value in section.items() if key != "_name"]
    return ", ".join([f"`{section['_name']}`", *words] if "_name" in section else words)


def rates(values):
    """The learning rates of the epochs, the last of which holds for all further ones, in words."""
    *before, (last, _) = [(rate, len(list(same))) for rate, same in itertools.groupby(values)]
    words = "".join(f"{rate:g} for {epochs} epochs, " for rate, epochs in before)
    return f"{words}then {last:g}" if before else f"{last:g}"


def count(section, symbols, changes):
    """The number of parameters of a model.

    Args:
        section (dict): ``model`` of a config
        symbols (int): rows of the vocabulary
        changes (dict): settings of the model that is counted
    """
    from types import SimpleNamespace

    import torch
    from fairseq import models
    from fairseq.data import Dictionary
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from omegaconf import OmegaConf

    import fairseq_sha

    fairseq_sha.register()
    dictionary = Dictionary()
    while len(dictionary) < symbols:
        dictionary.add_symbol(str(len(dictionary)))
    known = OmegaConf.structured(MODEL_DATACLASS_REGISTRY[section["_name"]])
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, cfg=None)
    with torch.device("meta"):
        model = models.build_model(OmegaConf.merge(known, section, changes), task)
    return sum(parameter.numel() for parameter in model.parameters())
