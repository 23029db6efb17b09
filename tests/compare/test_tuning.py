"""The tuning stage: points, what they change, trials that fail, stop and resume, and the choice."""

import argparse
import json
import os
import threading
import time
from pathlib import Path

import pytest
import yaml

optuna = pytest.importorskip("optuna")

from fairseq_sha.compare import recipe as recipes  # noqa: E402
from fairseq_sha.compare import runner, runs, space, tuning  # noqa: E402
from fairseq_sha.compare.processes import Processes, RunFailed  # noqa: E402
from fairseq_sha.errors import UserError  # noqa: E402
from tests.compare.test_compare import GOOD, OTHER, start  # noqa: E402
from tests.tiny_corpus import write_folder  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SPACE = """
seed: 3
settings:
  lr: {factor: [0.1, 10], fields: [optimization.lr], widen: true}
  warmup: {choices: [0.02, 0.1], fields: [warmup_share]}
  dropout: {range: [0, 0.2], fields: [model.dropout_hidden, model.dropout]}
  streams: {multiples: [0.5, 2], fields: [dataset.batch_size], speed: true}
  clip: {log: [0.05, 1], fields: [optimization.clip_norm]}
own:
  sha_rnn_small: {choices: [60, 80], fields: [model.window], speed: true}
"""


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "data", test=833)
    (tmp_path / "space.yaml").write_text(SPACE)
    good = GOOD.replace("window: 60", "window: 60, dropout_hidden: 0.1")
    for name, text in {"good": good, "other": OTHER}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def make(folder, *options, configs=("good", "other"), budget=("--updates", 40)):
    """A tuning, from the options of ``fairseq-sha compare``."""
    from fairseq_sha.commands import parse

    words = ["compare", "--data", folder / "data", "--out", folder / "out", *budget]
    words += ["--configs", *(folder / f"{name}.yaml" for name in configs)]
    words += ["--space", folder / "space.yaml", *options]
    args = parse([str(word) for word in words])
    return tuning.Tuning(args, runner.load(args))


@pytest.fixture
def bits_of(monkeypatch):
    """Replaces training: trials get bits from a function of their config, the list of those done
    stays."""

    def install(function):
        done = []

        def train_and_evaluate(args, model, folder, seed, updates, title, splits, validate):
            assert seed == tuning.SEED and splits == ("valid",) and not validate
            written = yaml.safe_load((folder / "recipe.yaml").read_text())
            assert written["optimization"]["lr"] == model.config["optimization"]["lr"]
            done.append(title)
            return {"valid": {"bits": function(model)}, "updates": updates, "bytes": 7}

        monkeypatch.setattr(runs, "train_and_evaluate", train_and_evaluate)
        return done

    return install


def test_points_are_those_of_a_scrambled_sobol_sequence():
    qmc = pytest.importorskip("scipy.stats").qmc
    cube = space.Space(5, (space.Setting("a", "range", (0, 1), ("x.y",)),), {})
    points = space.sobol(cube, 8)
    assert points == space.sobol(cube, 16)[:8] != space.sobol(cube._replace(seed=6), 8)
    expected = qmc.Sobol(2, scramble=True, seed=5).random(8)
    # Optuna sorts the coordinates by name.
    assert [p["a"] for p in points] == pytest.approx(expected[:, 0])
    assert [p["own"] for p in points] == pytest.approx(expected[:, 1])
    assert sorted(int(8 * point["a"]) for point in points) == list(range(8))


def test_a_point_changes_the_fields_that_a_config_has(folder):
    tuned = make(folder)
    point = {"lr": 0.75, "warmup": 0.5, "dropout": 0.25, "streams": 0.0, "clip": 0.5, "own": 0.99}
    good, values = tuned.trial("good", point)
    assert good.config["optimization"]["lr"] == [pytest.approx(0.01 * 10**0.5, rel=1e-3)]
    assert good.config["optimization"]["clip_norm"] == pytest.approx(0.2236)
    assert good.config["lr_scheduler"]["warmup_updates"] == 80  # of 800, scaled to the run later
    assert (
        good.config["model"]["dropout_hidden"] == 0.05 and good.config["dataset"]["batch_size"] == 2
    )
    assert good.config["model"]["window"] == 80
    assert values == {
        "lr": 3.162,
        "warmup": 0.1,
        "dropout": 0.05,
        "streams": 0.5,
        "clip": 0.2236,
        "window": 80,
    }
    other, values = tuned.trial("other", point)
    assert "lr" in values and not {"warmup", "dropout", "clip", "window"} & set(values)
    assert other.config["optimization"]["lr"] == [pytest.approx(0.005 * 10**0.5, rel=1e-3)]
    recipe, values = tuned.trial("good", None)
    assert recipe == tuned.models["good"]
    assert values == {
        "lr": 1,
        "warmup": 0.05,
        "dropout": 0.1,
        "streams": 1,
        "clip": 0.25,
        "window": 60,
    }


def test_only_counts_stay_whole_numbers(folder):
    """YAML may write any number as a whole one."""
    config = {"model": {"dropout": 0, "width": 16}, "dataset": {"batch_size": 1}}
    model = make(folder).models["good"]
    model = model._replace(config={**config, "optimization": {"clip_norm": 1}})
    names = ("model.dropout", "model.width", "optimization.clip_norm", "dataset.batch_size")
    settings = tuple(space.Setting(name, "factor", (0.09, 1), (name,)) for name in names)
    changed, _ = space.Space(1, settings, {}).apply(model, dict.fromkeys(names, 0.5))
    assert changed.config["model"] == {"dropout": 0, "width": 5}
    assert changed.config["optimization"]["clip_norm"] == 0.3
    assert changed.config["dataset"]["batch_size"] == 1


def test_warmup_of_three_stages_leaves_the_end_where_it_is():
    scheduler = {"_name": "tri_stage", "warmup_steps": 100, "hold_steps": 800, "decay_steps": 100}
    config = {"lr_scheduler": scheduler, "optimization": {"max_update": 1000}}
    space.set_warmup(config, 0.2)
    assert config["lr_scheduler"] == {**scheduler, "warmup_steps": 200, "hold_steps": 700}


def test_the_space_of_the_examples_fits_their_configs(tmp_path):
    """Each setting is one of most configs, and trials differ from the recipe in it."""
    tuned = space.Space.load(EXAMPLES / "head_to_head" / "tuning" / "space.yaml")
    adamw = EXAMPLES / "head_to_head" / "tuning" / "adamw.yaml"
    names = [*(EXAMPLES / "head_to_head").glob("*.yaml"), EXAMPLES / "recurrences" / "srupp.yaml"]
    (point,) = space.sobol(tuned, 1)
    for path in names:
        for sections in (None, adamw):
            model = recipes.load(path, None, [], sections)
            expected = {"lr", "warmup", "dropout", "streams", "clip"}
            assert expected <= set(tuned.apply(model, point)[1]), (path, sections)
            if sections:
                assert model.config["optimizer"]["_name"] == "adam"
                assert "min_trust" not in model.config["optimizer"]


def test_the_best_on_valid_is_chosen_and_failed_trials_count(folder, bits_of, capsys):
    def bits(model):
        if "window" not in model.config["model"]:
            raise RunFailed("failed; the end of its log:\n  no memory")
        lr = model.config["optimization"]["lr"][0]
        return float("nan") if lr > 0.05 else abs(lr - 0.01)

    done = bits_of(bits)
    tuned = make(folder, "--trials", 7)
    tuned.run()
    assert len(done) == len(set(done)) == 2 * 8
    assert done[:2] == ["good, trial 0", "other, trial 0"]
    found = tuned.results()["models"]
    assert found["good"]["chosen"] == 0 and found["good"]["on_border"] == []
    diverged = [t["bits"] is None for t in found["good"]["trials"]]
    assert 0 < sum(diverged) < 4
    for trial, failed in zip(found["good"]["trials"], diverged):
        assert trial.get("failure") == ("diverged" if failed else None)
        assert (trial["settings"]["lr"] > 5) == failed and trial["updates"] == 40
    assert found["other"]["chosen"] is None
    assert all(t["failure"].startswith("failed; the end") for t in found["other"]["trials"])
    (chosen,) = tuned.chosen()
    assert chosen.config == tuned.models["good"].config and chosen.variant == "tuned"
    written = yaml.safe_load((folder / "out/tuning/chosen/good.yaml").read_text())
    assert written["optimization"]["lr"] == [0.01]
    assert not (folder / "out/tuning/chosen/other.yaml").exists()
    assert "other: all trials failed" in capsys.readouterr().out


def test_a_best_trial_at_the_border_gives_all_models_more_trials(folder, bits_of):
    done = bits_of(lambda model: 1 / model.config["optimization"]["lr"][0])
    tuned = make(folder, "--trials", 4)
    tuned.run()
    assert len(done) == 2 * (5 + 1 + 1)
    for name in ("good", "other"):
        trials = tuned.trials(name)
        factors = [trial["settings"]["lr"] for trial in trials]
        assert all(0.1 <= factor <= 10 for factor in factors[:5])
        assert 10 < factors[5] <= 20 < factors[6] <= 40
    assert tuned.results()["models"]["good"] == {
        "trials": tuned.trials("good"),
        "chosen": 6,
        "on_border": ["lr"],
    }
    again = make(folder, "--trials", 4)
    again.run()
    assert len(done) == 14 and again.results() == tuned.results()
    with pytest.raises(UserError, match="widened after 4 trials; keep that number"):
        make(folder, "--trials", 5).run()


def test_more_trials_are_the_next_points(folder, bits_of):
    def bits(model):
        return abs(model.config["optimization"]["lr"][0] / 0.01 - 1.1)

    bits_of(bits)
    tuned = make(folder, "--trials", 2, configs=["good"])
    tuned.run()
    first = tuned.trials("good")
    more = make(folder, "--trials", 4, configs=["good"])
    more.run()
    assert more.trials("good")[:3] == first and len(more.trials("good")) == 5


def test_a_stopped_trial_goes_on_and_others_are_left_alone(folder, bits_of):
    """The process that ran it is gone, and another process runs the next one."""

    def stop(model):
        raise KeyboardInterrupt

    bits_of(stop)
    tuned = make(folder, "--trials", 2, configs=["good"])
    with pytest.raises(KeyboardInterrupt):
        tuned.run()
    states = [trial.state.name for trial in tuned.study("good").get_trials()]
    assert states == ["RUNNING", "WAITING", "WAITING"]

    done = bits_of(lambda model: 2.0)
    other = make(folder, "--trials", 2, configs=["good"])
    claimed = other.claim()
    assert claimed[:2] == ("good", 0)
    again = make(folder, "--trials", 2, configs=["good"])
    assert again.claim()[:2] == ("good", 1)  # given up at once
    with claimed[2]:
        worker = threading.Thread(target=again.work)
        worker.start()
        worker.join()
        assert done == ["good, trial 1", "good, trial 2"] and again.unfinished() == 1
    again.run()
    assert done[2:3] == ["good, trial 0"] and again.unfinished() == 0


def test_trials_of_other_settings_are_not_mixed(folder, bits_of):
    bits_of(lambda model: abs(model.config["optimization"]["lr"][0] - 0.01))
    make(folder, "--trials", 3, configs=["good"]).run()
    with pytest.raises(UserError) as error:
        make(folder, "--trials", 3, "--trial-updates", 30, configs=["good"])
    assert "has trials of another budget (was 40 updates, now 30 updates); choose" in str(
        error.value
    )
    with pytest.raises(UserError, match="config.optimization.clip_norm"):
        make(folder, "--set", "optimization.clip_norm=3", configs=["good"])
    (folder / "space.yaml").write_text(SPACE.replace("[0.1, 10]", "[0.1, 5]"))
    with pytest.raises(UserError, match="trials of another space.settings.lr.values"):
        make(folder, configs=["good"])


def test_trials_without_their_settings_are_not_taken_for_others(folder, bits_of):
    bits_of(lambda model: abs(model.config["optimization"]["lr"][0] - 0.01))
    tuned = make(folder, "--trials", 3, configs=["good"])
    tuned.run()
    (folder / "data" / "valid.bin").write_bytes((folder / "data" / "valid.bin").read_bytes() * 2)
    with pytest.raises(UserError) as error:
        make(folder, "--trials", 3, configs=["good"])
    assert "another size.valid (was" in str(error.value)
    assert str(error.value).endswith(f"or remove {tuned.folder}")
    (tuned.folder / "good" / "settings.json").unlink()
    with pytest.raises(UserError, match="settings.json is missing.*; remove"):
        make(folder, "--trials", 3, configs=["good"]).run()


def test_all_models_have_as_many_trials(folder, bits_of):
    bits_of(lambda model: abs(model.config["optimization"]["lr"][0] - 0.01))
    make(folder, "--trials", 3, configs=["good"]).run()
    with pytest.raises(UserError, match="--trials 2: .* has 3 trials of good; give that number"):
        make(folder, "--trials", 2).run()


def test_many_workers_on_one_model(folder, bits_of):
    """They begin at the same moment, and share a folder for the speed."""
    done = bits_of(lambda model: abs(model.config["optimization"]["lr"][0] - 0.01))
    space = SPACE.replace(", speed: true", "")
    (folder / "space.yaml").write_text(space)
    tuned = make(folder, "--trials", 15, "--parallel", 8, configs=["good"])
    tuned.run()
    assert sorted(done) == sorted(f"good, trial {n}" for n in range(16))
    assert all("failure" not in trial for trial in tuned.trials("good"))


def test_two_processes_measure_each_speed_once(folder, monkeypatch):
    """The second one waits for the first."""
    measured, threads = [], []
    both = [make(folder, configs=["good"], budget=("--seconds", 9)) for _ in range(2)]

    def measured_speed(args, model, path):
        if not threads:
            threads.append(threading.Thread(target=both[1].measure_speeds))
            threads[0].start()
            time.sleep(0.2)
        measured.append(path.name)
        return {"updates_per_second": 2, "bytes_per_token": 1, "machine": {}}

    monkeypatch.setattr(runs, "measured_speed", measured_speed)
    (both[0].folder / "good").mkdir(parents=True)
    both[0].enqueue("good", [None])
    both[0].measure_speeds()
    threads[0].join()
    assert measured == ["speed-streams-1_window-60"] * 2  # two rounds


def test_speeds_of_trials_are_of_one_machine(folder, bits_of, monkeypatch, capsys):
    bits_of(lambda model: 3)
    monkeypatch.setattr(runs, "machine", lambda processes: {"cpu": "Xeon"})

    def measured_speed(args, model, path):
        if "streams-2" in path.name:
            raise RunFailed("failed")
        found = {"updates_per_second": 2, "bytes_per_token": 1}
        return {**found, "machine": runs.machine(args.processes)}

    def tuned(trials):
        return make(folder, "--trials", trials, configs=["good"], budget=("--seconds", 9))

    monkeypatch.setattr(runs, "measured_speed", measured_speed)
    (folder / "space.yaml").write_text(SPACE.replace("[0.5, 2]", "[0.5, 1, 2]"))
    first = tuned(4)
    first.run()
    failed = [trial["settings"] for trial in first.trials("good") if trial["bits"] is None]
    assert failed and {settings["streams"] for settings in failed} == {2}

    # Trials that failed ask for no speed any more, those that are new do.
    monkeypatch.setattr(runs, "machine", lambda processes: {"cpu": "EPYC"})
    tuned(4).run()
    with pytest.raises(UserError, match="good is not measured here, .*; go on there, or"):
        tuned(16).run()


def test_a_border_widens_the_space_once(folder, bits_of, monkeypatch):
    """Another process that has seen the same trials does the new ones."""
    bits_of(lambda model: 1 / model.config["optimization"]["lr"][0])
    tuned, other = (make(folder, "--trials", 4) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "WIDENINGS", 0)
        tuned.run()
    assert len(tuned.widened()) == 1 + 4 + 1
    assert len(other.widened()) == 1 + 4 + 1 and other.unfinished() == 2
    assert len(json.loads((tuned.folder / "widenings.json").read_text())) == 1


def test_of_two_borders_the_first_is_widened(folder, bits_of):
    """The order must not be that of a set, which differs between processes."""

    def bits(model):
        lr = model.config["optimization"]["lr"][0]
        return 1 / lr if "window" in model.config["model"] else lr

    bits_of(bits)
    make(folder, "--trials", 4).run()
    widenings = json.loads((folder / "out" / "tuning" / "widenings.json").read_text())
    assert [widening["side"] for widening in widenings] == [1, 1]


def test_an_absolute_learning_rate(folder, bits_of):
    """A config has a list of them, one for each epoch."""
    space = SPACE.replace("factor: [0.1, 10]", "log: [0.002, 0.02]")
    (folder / "space.yaml").write_text(space)
    bits_of(lambda model: abs(model.config["optimization"]["lr"][0] - 0.01))
    tuned = make(folder, "--trials", 3, configs=["good"])
    tuned.run()
    for trial in tuned.trials("good"):
        assert 0.002 <= trial["settings"]["lr"] <= 0.02
    (chosen,) = tuned.chosen()
    assert chosen.config["optimization"]["lr"] == [pytest.approx(0.01)]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("settings:", "setings:", "has no `settings`"),
        ("seed: 3", "speed: 3", "speed is unknown; there are seed, settings and own"),
        ("factor: [0.1, 10]", "factor: [10, 0.1]", "lr.factor is [10, 0.1]; give [low, high]"),
        ("factor: [0.1, 10]", "factor: [0, 10]", "lr.factor is [0, 10]"),
        ("factor: [0.1, 10], ", "", "lr needs `fields` and one of factor, log"),
        ("choices: [0.02, 0.1]", "choices: [0.02]", "warmup.choices is [0.02]; give two or more"),
        ("fields: [warmup_share]", "fields: [warm]", "warmup.fields is ['warm']; give a list"),
        ("widen: true", "wide: true", "lr needs `fields` and one of"),
        (
            "fields: [dataset.batch_size]",
            "fields: [dataset.size]",
            "no config has a field of streams",
        ),
        ("range: [0, 0.2]", "widen: true, range: [0, 0.2]", "dropout.widen needs a `factor` or"),
        ("seed: 3", "seed: [", "not a space file"),
    ],
)
def test_bad_space_file_is_one_line(folder, old, new, message):
    assert old in SPACE
    (folder / "space.yaml").write_text(SPACE.replace(old, new))
    with pytest.raises(UserError) as error:
        make(folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(folder / "space.yaml") in str(error.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds 0: is the seed of all trials"),
        (["--launcher", "basic"], "--space with --launcher"),
        (["--trials", "0"], "--trials 0: must be positive"),
        (["--trial-seconds", "0"], "--trial-seconds 0: must be positive"),
        (["--parallel", "0"], "--parallel 0: must be positive"),
        (["--seeds", "1", "--paper-seeds", "0", "0"], "--seeds 0: is the seed of all trials"),
        (["--seeds", "--paper-seeds", "1", "2"], "--paper-seeds 1 2: needs --seeds"),
    ],
)
def test_bad_options_are_one_line(folder, options, message):
    with pytest.raises(UserError) as error:
        make(folder, *options)
    assert message in str(error.value)


def test_a_model_may_not_be_called_as_a_folder_of_tuning(folder):
    (folder / "good.yaml").rename(folder / "paper.yaml")
    with pytest.raises(UserError, match="paper.yaml: a folder of --space is called paper too"):
        make(folder, "--configs", str(folder / "paper.yaml"))


@pytest.mark.parametrize("left", ["", "tuned"])
def test_a_run_that_another_kind_of_comparison_left_counts_as_what_it_is_now(folder, left):
    model = recipes.load(folder / "good.yaml", folder / "data", [])
    path = folder / "out" / "good" / "seed1" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": "good", **({"recipe": left} if left else {})}))
    args = argparse.Namespace(out=folder / "out")
    for variant, expected in (("tuned", {"recipe": "tuned"}), (None, {})):
        (found,), _ = runner.finished(args, [(model._replace(variant=variant), 1)])
        assert found == {"model": "good", **expected}


def test_tuned_and_given_recipes_are_trained_on_fresh_seeds(folder):
    """Everything for real: two trials at once, then both recipes."""
    words = ["--data", "data", "--configs", "good.yaml", "--out", "out", "--space"]
    words += ["space.yaml", "--trials", 1, "--trial-updates", 8, "--updates", 16, "--parallel", 2]
    (folder / "space.yaml").write_text(SPACE.replace("widen: true", "widen: false"))
    options = [*words, "--seeds", 4, "--paper-seeds", 5, "--device", "cpu"]
    # Measuring speeds is tested elsewhere.
    machine = runs.machine(Processes(2, max(1, len(os.sched_getaffinity(0)) // 2)))
    for name, here in (("good", machine), ("paper/good", {**machine, "cpu": "another"})):
        (folder / "out" / name).mkdir(parents=True)
        speed = {"updates_per_second": 8, "tokens_per_update": 80, "bytes_per_token": 1}
        (folder / "out" / name / "speed.json").write_text(json.dumps({**speed, "machine": here}))
    process = start(folder, *options)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    results = json.loads((folder / "out" / "results.json").read_text())
    assert sorted((run["recipe"], run["seed"]) for run in results["runs"]) == [
        ("paper", 5),
        ("tuned", 4),
    ]
    for run in results["runs"]:
        assert run["updates"] == 16
        # As measured alone, unless that was on another machine.
        assert (run["training_seconds"] == 2) == (run["recipe"] == "tuned")
        assert (run["pace"] is not None) == (run["recipe"] == "tuned")
        assert run["machine"]["runs at once"] == 2
        assert len(run["valid_curve"]) == 4
    trials = results["tuning"]["models"]["good"]["trials"]
    assert [trial["trial"] for trial in trials] == [0, 1] and trials[0]["updates"] == 8
    best = min(trials, key=lambda trial: trial["bits"])
    assert results["tuning"]["models"]["good"]["chosen"] == best["trial"]
    assert 2 < best["bits"] < 8
    # A trial is evaluated once, at its end.
    trial = folder / "out" / "tuning" / "good" / "trial0" / "seed0"
    assert json.loads((trial / "result.json").read_text())["valid_curve"] == []
    tuned = yaml.safe_load((folder / "out" / "good" / "recipe.yaml").read_text())
    lr = 0.01 * best["settings"]["lr"]
    assert tuned["optimization"]["lr"] == [pytest.approx(lr)]
    # Only the choice is made with seeds of trials, and only on valid.
    assert not list((folder / "out" / "tuning").glob("**/test.json"))
