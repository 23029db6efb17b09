"""``fairseq-sha published``, and the page that holds what it prints."""

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from fairseq_sha.commands import main, parse
from fairseq_sha.commands.common import model_overrides
from fairseq_sha.commands.evaluate import policy_of
from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.evaluation.policies import Sliding

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "enwik8"


@pytest.fixture(scope="module")
def output():
    """What a user in the root of the repository sees."""
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(io.StringIO()) as printed:
        patched.chdir(ROOT)
        assert main(["published"]) == 0
    return printed.getvalue()


def tables(text):
    """The rows of all tables, by NAME: one dict with all their cells."""
    found = {}
    for table in re.findall(r"((?:^\|.*\n?)+)", text, re.MULTILINE):
        head, _, *lines = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        for line in lines:
            found.setdefault(line[0].strip("`"), {}).update(zip(head, line))
    return found


def commands(text):
    """The words of each command, by NAME: that to train, and that to evaluate."""
    block = re.search(r"```\n(.*?)```", text, re.DOTALL).group(1)
    pairs = [pair.replace("\\\n", " ").splitlines() for pair in block.strip().split("\n\n")]
    words = [[shlex.split(line) for line in pair] for pair in pairs]
    return {train[-1]: (train, evaluate) for train, evaluate in words}


TABLES = OmegaConf.load(str(FOLDER / "published" / "rows.yaml")).tables
ROWS = [row.name for table in TABLES for row in table.rows]


def test_page_holds_what_the_command_prints(output):
    assert output in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_each_config_of_the_folder_is_a_row(output):
    configs = {path.stem for path in FOLDER.glob("*.yaml")}
    assert set(ROWS) == configs == set(tables(output)) == set(commands(output))
    first, second, _ = TABLES
    assert (len(first.rows), len(second.rows)) == (13, 2)


@pytest.mark.parametrize("name", ROWS)
def test_config_says_what_the_table_says(output, name):
    row = tables(output)[name]
    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("hydra:")[0]
    for split in ("valid", "test"):
        figure = row[f"published {split}"]
        assert (f"{split} {figure}" in header) if figure else (f"{split} " not in header)
    assert row["published parameters"] in header and row["published in"].split()[-1] in header
    if row["published parameters"]:
        millions = int(row["published parameters"].rstrip("M"))
        assert int(row["parameters here"].replace(",", "")) / 1e6 == pytest.approx(
            millions, rel=0.02
        )


@pytest.mark.parametrize("name", ROWS)
def test_commands_are_complete(output, name):
    train, evaluate = commands(output)[name]
    config = OmegaConf.load(str(ROOT / train[2] / f"{train[4]}.yaml"))
    assert train == [
        "fairseq-hydra-train",
        "--config-dir",
        "examples/enwik8",
        "--config-name",
        name,
    ]
    assert evaluate[0] == "fairseq-sha"
    args = parse(evaluate[1:])
    assert args.data == config.task.data == "data-bin/enwik8" and args.split == "test"
    assert args.path == f"{config.checkpoint.save_dir}/checkpoint_best.pt"
    assert args.tokens_per_sample and not config.checkpoint.get("no_save")
    overrides = model_overrides(args.model_overrides)
    beside = FOLDER / "evaluation" / f"{name}.yaml"
    settings = OmegaConf.to_container(OmegaConf.load(str(beside))) if beside.is_file() else {}
    assert overrides == settings.pop("model_overrides", {})
    assert all(getattr(args, option) == value for option, value in settings.items())


@pytest.mark.parametrize(
    "name, context, stride",
    [("sparse_transformer_enwik8", 12_160, 128), ("t12_enwik8", 511, 1), ("t64_enwik8", 511, 1)],
)
def test_windows_have_the_published_context(output, name, context, stride):
    """What each byte of test sees, besides the one that is read."""
    args = parse(commands(output)[name][1][1:])
    codec = ByteCodec.from_symbols(["<s>", "<pad>", "</s>", "<unk>", "97"])
    task = SimpleNamespace(
        evaluation_policy=lambda streams, length, context: Sliding(streams, context, length)
    )
    batches = policy_of(task, args).batches(Corpus(40_000), "test", codec)
    scored = [row for i in range(len(batches)) for row in batches.rows(i) if row[2]]
    assert sum(count for _, _, count in scored) == 40_000
    assert all(count <= stride for _, _, count in scored)
    assert {seen for first, seen, _ in scored if first >= context} == {context}
    assert all(seen == first for first, seen, _ in scored if first < context)


class Corpus:
    def __init__(self, size):
        self.tokens = np.arange(size + 1)

    def __len__(self):
        return len(self.tokens) - 1


def test_folder_without_published_rows_is_named(tmp_path, capsys):
    assert main(["published", str(tmp_path)]) == 1
    assert "rows.yaml: no such file; give a folder" in capsys.readouterr().err
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "rows.yaml").write_text("rows: []")
    assert main(["published", str(tmp_path)]) == 1
    assert "rows.yaml: has no tables" in capsys.readouterr().err
