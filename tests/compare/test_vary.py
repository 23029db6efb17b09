"""``fairseq-sha compare --vary``: a grid over one setting, without copies of configs."""

import pytest

from fairseq_sha.commands import parse
from fairseq_sha.compare import recipe as recipes
from fairseq_sha.compare import runner
from fairseq_sha.errors import UserError
from tests.compare.test_compare import GOOD, OTHER
from tests.tiny_corpus import write_folder


@pytest.fixture
def load(tmp_path):
    """From values of ``--vary`` and further options to the options and the models."""
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", test=833)
    for name, text in {"good": GOOD, "other": OTHER}.items():
        (tmp_path / f"{name}.yaml").write_text(text)

    def load(*variants, more=(), configs=("good",)):
        words = ["compare", "--data", tmp_path / "data", "--out", tmp_path / "out", "--updates", 9]
        words += ["--configs", *(tmp_path / f"{name}.yaml" for name in configs)]
        args = parse([*map(str, words), *more, "--vary", *variants])
        return args, runner.load(args)

    return load


def test_each_value_is_a_model_that_is_called_by_it(load):
    values = ["[]", "[0]", "[0,1]"]
    _, models = load(*(f"model.attention_layers={value}" for value in values))
    assert [model.name for model in models] == [
        f"good-attention_layers-{value}" for value in ("none", "0", "0-1")
    ]
    layers = [model.config["model"]["attention_layers"] for model in models]
    assert layers == [[], [0], [0, 1]]
    assert all(model.config["model"]["width"] == 16 for model in models)


def test_a_value_may_hold_what_keeps_the_size(load):
    more = ["--set", "model.width=20", "optimization.lr=[0.02]"]
    _, models = load(
        "model.attention_layers=[] model.width=24", "model.attention_layers=[1]", more=more
    )
    assert [model.name for model in models] == [
        "good-attention_layers-none",
        "good-attention_layers-1",
    ]
    assert [model.config["model"]["width"] for model in models] == [24, 20]
    assert all(model.config["optimization"]["lr"] == [0.02] for model in models)


def test_all_configs_are_varied(load):
    _, models = load(
        *(f"optimization.clip_norm={value}" for value in (0.5, 1)), configs=["good", "other"]
    )
    names = [model.name for model in models]
    assert names == [f"{c}-clip_norm-{v}" for c in ("good", "other") for v in ("0.5", "1")]
    assert [model.config["optimization"]["clip_norm"] for model in models] == [0.5, 1, 0.5, 1]


def test_commands_are_those_of_the_variant(load, capsys):
    args, models = load("model.window=70", "model.window=80", more=["--dry-run"])
    assert runner.compare(args) == 0
    output = capsys.readouterr().out
    for model in models:
        assert f"out/{model.name}/recipe.yaml" in output
        assert f"out/{model.name}/seed1/checkpoints" in output


def test_names_are_fit_for_folders():
    assert recipes.variant_name("optimizer.min_trust=0.25") == "min_trust-0.25"
    assert recipes.variant_name("optimizer.adam_betas='(0.9,0.99)'") == "adam_betas-0.9-0.99"
    assert recipes.variant_name("model.feed_forward=full") == "feed_forward-full"


@pytest.mark.parametrize(
    "variants, message",
    [
        (["window=3"], "--vary 'window=3': give SECTION.FIELD=VALUE"),
        (["model.attention_layers=[0, 1]"], "give SECTION.FIELD=VALUE"),
        ([""], "give SECTION.FIELD=VALUE"),
        (
            ["model.window=70", "model.window=70 model.width=8"],
            "another variant is called window-70 too",
        ),
    ],
)
def test_mistakes_are_named(load, variants, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load(*variants)


def test_tuning_must_not_replace_what_is_varied(load, tmp_path):
    pytest.importorskip("optuna")
    space = tmp_path / "space.yaml"
    clip = "clip: {log: [0.05, 1], fields: [optimization.clip_norm]}"
    rate = "lr: {factor: [0.1, 10], fields: [optimization.lr]}"
    warmup = "warmup: {choices: [0.1, 0.2], fields: [warmup_share]}"
    space.write_text(f"settings:\n  {clip}\n  {rate}\n  {warmup}\n")
    more = ["--space", str(space), "--dry-run"]
    for field in ("optimization.clip_norm", "lr_scheduler.warmup_updates"):
        args, _ = load(f"{field}=1", more=more)
        with pytest.raises(UserError, match=f"--vary {field}: .* gives it other values"):
            runner.compare(args)
    args, _ = load("optimization.lr=[0.1]", more=more)  # trials multiply it
    assert runner.compare(args) == 0
