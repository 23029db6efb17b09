"""``fairseq-sha compare``: stopped, resumed, repeated, and what it reports.

Nothing here runs in the clone: configs name the plug-in, and its folder is found.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from numpy.random import RandomState

from fairseq_sha.commands import parse
from fairseq_sha.compare import logs, processes, runner, runs, summary
from fairseq_sha.compare import recipe as recipes
from fairseq_sha.compare.processes import Processes, RunFailed
from fairseq_sha.data.segments import segment_lengths
from fairseq_sha.errors import UserError
from fairseq_sha.files import try_lock
from tests import tiny_corpus
from tests.commands import command

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "fairseq_sha"
EXAMPLES = REPOSITORY / "examples"
UPDATES = 100
GOOD = """
hydra: {run: {dir: .}}
common: {user_dir: fairseq_sha, cpu: true}
task: {_name: byte_language_modeling, data: elsewhere, tokens_per_sample: 40,
       random_segment_lengths: true}
model: {_name: sha_rnn_small, width: 16, num_layers: 2, attention_layers: [1], window: 60}
criterion: {_name: cross_entropy}
optimizer: {_name: min_trust_lamb, min_trust: 0.25}
lr_scheduler: {_name: fixed, warmup_updates: 40}
optimization: {lr: [0.01], max_update: 800, max_epoch: 1, clip_norm: 0.25}
dataset: {batch_size: 4, num_workers: 0}
"""
BAD = GOOD.replace("width", "widht")
# A model of fairseq's own: with its own task, and with one of this package.
STOCK = """
hydra: {run: {dir: .}}
common: {cpu: true}
task: {_name: language_modeling, tokens_per_sample: 64}
model: {_name: transformer_lm, decoder_layers: 1, decoder_embed_dim: 16, decoder_input_dim: 16,
        decoder_output_dim: 16, decoder_ffn_embed_dim: 16, decoder_attention_heads: 2}
criterion: {_name: cross_entropy}
optimizer: {_name: adam}
lr_scheduler: {_name: cosine, warmup_updates: 10, warmup_init_lr: 1e-6}
optimization: {lr: [0.005], max_update: 60}
dataset: {batch_size: 4, num_workers: 0}
"""

OTHER = """
hydra: {run: {dir: .}}
common: {user_dir: fairseq_sha, cpu: true}
task: {_name: byte_language_modeling, data: elsewhere, tokens_per_sample: 64}
model: {_name: transformer_lm, decoder_layers: 1, decoder_embed_dim: 16, decoder_input_dim: 16,
        decoder_output_dim: 16, decoder_ffn_embed_dim: 16, decoder_attention_heads: 2,
        add_bos_token: false, max_target_positions: 64}
criterion: {_name: cross_entropy}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
optimization: {lr: [0.005], max_update: 60}
dataset: {batch_size: 4, num_workers: 0}
"""

EVALUATION = {
    "good": "{tokens_per_sample: 50, model_overrides: {window: 20}}",
    "stock": "{context_window: 48, batch_size: 2}",
    "other": "{context_window: 48, batch_size: 2}",
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tiny_corpus.write_folder(tmp_path_factory.mktemp("data"), test=833)


@pytest.fixture(scope="session")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, text in {"good": GOOD, "bad": BAD, "stock": STOCK, "other": OTHER}.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "evaluation").mkdir()
    for name, text in EVALUATION.items():
        (folder / "evaluation" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


def default_signals():
    """As in a terminal: a shell that runs the tests in the background has them ignore Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(folder, *options, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "fairseq_sha", "compare", *map(str, options)],
        cwd=str(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        },
        preexec_fn=default_signals,
    )


@pytest.fixture(scope="session")
def compare(elsewhere):
    def compare(*options, **environment):
        """Run the command; returns exit status, output and errors."""
        process = start(elsewhere, *options, **environment)
        output, errors = process.communicate()
        return process.returncode, output, errors

    return compare


def test_a_closed_terminal_stops_runs_and_runs_of_another_process_are_awaited(
    data, configs, elsewhere, tmp_path
):
    out = tmp_path / "out"
    options = ["--data", data, "--configs", configs / "good.yaml", "--updates", 4, "--out", out]
    options += ["--seeds", 1, 2, "--rivals", "none"]
    process = start(elsewhere, *options)
    while process.poll() is None and not (out / "good" / "seed1" / "train.log").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert "stopped; repeat the command" in process.communicate()[1]
    assert process.returncode == 130
    assert "ended with status" in (out / "good" / "seed1" / "train.log").read_text()

    with try_lock(out / "good" / "seed1" / "lock"):
        before = (out / "good" / "seed1" / "train.log").read_text()
        process = start(elsewhere, *options)
        while process.poll() is None and not (out / "good" / "seed2" / "result.json").exists():
            time.sleep(0.02)
        assert process.poll() is None
        assert (out / "good" / "seed1" / "train.log").read_text() == before
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert result(out)["updates"] == 4 and result(out, seed=2)["updates"] == 4


@pytest.fixture(scope="session")
def stopped(data, configs, elsewhere, tmp_path_factory):
    """A comparison that Ctrl-C stopped after the first checkpoint: its options and outcome."""
    out = tmp_path_factory.mktemp("results") / "out"
    options = ["--data", data, "--configs", configs / "good.yaml", configs / "bad.yaml"]
    options += ["--updates", UPDATES, "--out", out, "--rivals", "xz"]
    process = start(elsewhere, *options)
    checkpoint = out / "good" / "seed1" / "checkpoints" / "checkpoint_last.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    log = (out / "good" / "seed1" / "train.log").read_text()
    return out, options, process.returncode, output + errors, log


@pytest.fixture(scope="session")
def finished(stopped, compare):
    """The same command again, which continues to the end."""
    out, options, *_ = stopped
    return (out, options, *compare(*options))


def result(out, seed=1):
    return json.loads((out / "good" / f"seed{seed}" / "result.json").read_text())


def test_interruption_stops_the_child(stopped):
    out, _, status, printed, log = stopped
    assert status == 130 and printed.endswith("stopped; repeat the command to continue\n")
    assert "Traceback" not in printed
    assert log.splitlines()[-1].startswith("fairseq-sha compare: ended with status -15")
    assert 0 < logs.read_training(log).train[-1][0] < UPDATES
    assert not list(out.glob("**/*.unfinished"))


def test_resumed_run_goes_on_from_its_checkpoint(stopped, finished):
    log = (finished[0] / "good" / "seed1" / "train.log").read_text()
    assert log.startswith(stopped[4])
    assert re.search(r"Loaded checkpoint .* @ \d+ updates", log[len(stopped[4]) :])
    training = logs.read_training(log)
    assert training.finished
    assert [update for update, _ in training.train] == list(range(1, UPDATES + 1))
    assert [update for update, _ in training.valid] == [25, 50, 75, 100]


def test_failure_is_reported_and_the_others_go_on(finished):
    out, _, status, output, errors = finished
    assert status == 1
    assert errors == "failed: bad, seed 1; repeat the command to try again\n"
    assert "[2/2] bad, seed 1 failed; the end of " in output and "'widht'" in output
    assert (out / "good" / "seed1" / "result.json").exists()
    assert not (out / "bad" / "seed1" / "result.json").exists()


def test_result_of_a_run(finished):
    found = result(finished[0])
    assert (found["valid"]["tokens"], found["test"]["tokens"]) == (700, 832)
    assert found["parameters"] == 7952
    assert found["test"]["bits"] < 3
    assert found["valid_curve"][-1][1] == pytest.approx(found["valid"]["bits"], abs=0.05)
    assert found["updates"] == UPDATES and found["train_curve"][-1][0] == UPDATES
    log = (finished[0] / "good" / "seed1" / "train.log").read_text()
    tokens = re.findall(r'"wpb": "(\d+)".*? "num_updates": "(\d+)"', log)
    tokens = {update: int(count) for count, update in tokens}  # of a repeated update the later
    assert len(tokens) == UPDATES and found["bytes"] == sum(tokens.values())
    speed = found["bytes"] / found["training_seconds"]
    assert found["training_tokens_per_second"] == pytest.approx(speed, rel=1e-3)
    assert 100 < found["peak_memory_mb"] < 5000
    counted = json.loads((finished[0] / "good" / "flops.json").read_text())
    expected = counted["training_flops_per_token"] * found["bytes"]
    assert found["training_flops"] == pytest.approx(expected, rel=1e-3)
    # Two for each weight of a product, and twice as much for the gradients; attention adds some.
    assert 5 < counted["training_flops_per_token"] / found["parameters"] < 9
    kept = os.listdir(finished[0] / "good" / "seed1" / "checkpoints")
    assert kept == ["checkpoint_last.pt"]


def eval_lm(data, run, options):
    """What fairseq-eval-lm says about a run's model on the test split."""
    path = run / "checkpoints" / "checkpoint_last.pt"
    done = command("fairseq-eval-lm", data, f"--path {path} --gen-subset test --cpu {options}")
    assert done.returncode == 0, done.stdout
    return logs.read_eval_lm(done.stdout)


def test_evaluation_says_how_it_was_made_and_agrees_with_fairseq(data, finished):
    found = result(finished[0])["test"]
    options = "--tokens-per-sample 50 --batch-size 8 --model-overrides"
    expected = eval_lm(data, finished[0] / "good" / "seed1", options + " {'window':20}")
    assert found["bits"] == pytest.approx(expected["bits"], abs=6e-5)  # it prints four digits
    other = eval_lm(data, finished[0] / "good" / "seed1", options + " {'window':60}")
    assert abs(other["bits"] - found["bits"]) > 1e-3
    assert found["bytes"] == found["tokens"] == expected["tokens"] == 832
    assert found["policy"] == "state carried, 8 streams, segments of 50" and found["streams"] == 8
    assert found["tokens_per_second"] > 0
    assert found["sha256"] == hashlib.sha256(tiny_corpus.text(833, 3)).hexdigest()
    assert found["block_bytes"] == 10_000 and len(found["block_bits"]) == 1
    assert sum(found["block_bits"]) == pytest.approx(found["bits"] * 832, rel=1e-5)


def test_stock_model_with_our_task_is_evaluated_in_a_sliding_window(
    data, configs, tmp_path, compare
):
    """The results, and a terminal that cannot show all of the table."""
    out = tmp_path / "out"
    options = ["--data", data, "--configs", configs / "other.yaml", "--updates", 4, "--out", out]
    status, output, errors = compare(*options, "--seeds", 1, 2, PYTHONIOENCODING="ascii")
    assert (status, errors) == (0, ""), output
    assert "Bits are means over seeds: 1, 2." in output and output.isascii()
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [1, 2]
    for run in runs:
        found, folder = run["test"], out / "other" / f"seed{run['seed']}"
        window = "--tokens-per-sample 64 --context-window 48 --batch-size 3"
        expected = eval_lm(data, folder, window)
        assert found["bits"] == pytest.approx(expected["bits"], abs=6e-5)
        assert found["tokens"] == found["bytes"] == expected["tokens"] == 832
        assert found["policy"] == "sliding window, context of at least 48, stride 16"
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "No interval, because the text has fewer than 10 blocks: other." in table
    assert "Evaluated with sliding window, context of at least 48, stride 16." in table


def test_report_sums_up(data, finished):
    out, options, *_ = finished
    found = result(out)
    table = (out / "table.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| good ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["good", f"{found['test']['bits']:.3f}", "best", "7,952"]
    rivals = json.loads((out / "results.json").read_text())["rivals"]
    # The model has read all of train, more than once.
    size = (Path(data) / "train.bin").stat().st_size // 2
    assert size < found["bytes"]
    assert [(row["name"], row["primed_with"]) for row in rivals] == [
        ("xz -9e", 0),
        ("xz -9e", size),
    ]
    for row in rivals:
        name = f"primed with {row['primed_with']:,} bytes" if row["primed_with"] else "alone"
        gap = row["bits"] - found["test"]["bits"]
        assert f"| xz -9e, {name} | {row['bits']:.3f} | {gap:+.3f} |" in table
    assert "Not finished, and so in no mean: bad seed 1." in table
    assert "The budget was 100 updates of training." in table
    everything = json.loads((out / "results.json").read_text())
    assert everything["command"] == shlex.join(["fairseq-sha", "compare", *map(str, options)])
    assert torch.__version__.startswith(found["machine"]["torch"])
    assert found["machine"]["omp_num_threads"] == "1"
    assert everything["runs"] == [found]
    assert everything["not_finished"] == ["bad seed 1"]
    assert len((out / "results.json").read_text().splitlines()) < 10


def test_plugin_is_found_without_a_clone(finished, tmp_path, monkeypatch):
    """Its name is replaced by its folder; any other ``user_dir`` stays."""
    recipe = yaml.safe_load((finished[0] / "good" / "recipe.yaml").read_text())
    assert recipe["common"]["user_dir"] == str(PLUGIN)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other" / "fairseq_sha").mkdir(parents=True)
    (tmp_path / "link").symlink_to(PLUGIN)
    for given, found in {
        "fairseq_sha": str(PLUGIN),
        "./fairseq_sha/": str(PLUGIN),
        str(PLUGIN): str(PLUGIN),
        "link": str(PLUGIN),
        "other/fairseq_sha": "other/fairseq_sha",
        "mine": "mine",
        None: None,
    }.items():
        assert recipes.user_dir({"common": {"user_dir": given}}) == found
    assert recipes.user_dir({}) is None


FOLDERS = sorted(path.parent for path in EXAMPLES.glob("**/results.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_results_of_the_examples_give_their_tables(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    table = summary.markdown(*summary.report(results))
    assert table == (folder / "table.md").read_text(encoding="utf-8")


def test_pictures(finished):
    pytest.importorskip("matplotlib")
    for name in ("bits_by_seconds.png", "bits_by_bytes.png"):
        assert (finished[0] / name).read_bytes().startswith(b"\x89PNG")


def test_repeated_command_redoes_only_what_failed(finished, compare):
    out, options, *_ = finished
    before = {path: path.read_bytes() for path in (out / "good").glob("**/*") if path.is_file()}
    log = (out / "bad" / "seed1" / "train.log").read_text()
    status, output, _ = compare(*options)
    assert status == 1
    assert "[1/2] good, seed 1: already finished" in output
    after = {path: path.read_bytes() for path in (out / "good").glob("**/*") if path.is_file()}
    assert after == before
    again = (out / "bad" / "seed1" / "train.log").read_text()
    assert again.startswith(log) and again.count("ended with status 1") == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (["--updates", 99], "budget (was 100 updates, now 99 updates)"),
        (["--set", "model.width=24"], "config.model.width (was 16, now 24)"),
        (["--set", "evaluation.batch_size=4"], "evaluation.batch_size (was None, now 4)"),
        (["--eval-streams", 4], "eval_streams (was 8, now 4)"),
    ],
)
def test_results_of_other_settings_are_not_mixed(finished, compare, change, message):
    out, options, *_ = finished
    before = (out / "results.json").read_bytes()
    status, output, errors = compare(*options, *change)
    assert (status, output) == (1, "")
    remedy = "choose another --out, or remove it"
    assert errors == f"error: {out}/good has results of another {message}; {remedy}\n"
    assert (out / "results.json").read_bytes() == before


def test_a_config_may_be_corrected_while_there_are_no_results(tmp_path):
    """What was measured with the old one is measured again."""
    model = recipes.Recipe("x", {"model": {"width": 16}}, {})
    runner.prepare(tmp_path / "x", model, {"config": {"model": {"width": 16}}})
    (tmp_path / "x" / "speed.json").write_text("{}")
    runner.prepare(tmp_path / "x", model, {"config": {"model": {"width": 16}}})
    assert (tmp_path / "x" / "speed.json").exists()
    runner.prepare(tmp_path / "x", model, {"config": {"model": {"width": 24}}})
    assert not (tmp_path / "x" / "speed.json").exists()


@pytest.mark.parametrize("name", ["lock", "train.log"])
def test_a_run_that_goes_on_is_not_removed(tmp_path, name):
    """A training whose command was killed has the lock of its log only."""
    model = recipes.Recipe("x", {"model": {"width": 16}}, {})
    runner.prepare(tmp_path / "x", model, {"config": {"model": {"width": 16}}})
    log = tmp_path / "x" / "seed1" / name
    log.parent.mkdir()
    log.write_text("update 1")
    other = {"config": {"model": {"width": 24}}}
    with try_lock(log):
        with pytest.raises(UserError, match="x: a run with other settings goes on there; stop it"):
            runner.prepare(tmp_path / "x", model, other)
        assert log.read_text() == "update 1"
    runner.prepare(tmp_path / "x", model, other)
    assert not log.exists()


def test_a_folder_that_another_command_took_is_left_alone(data, configs, tmp_path, monkeypatch):
    """Until a run begins, nothing tells others that it will."""

    def take(args, budget, cases, **options):
        for _, folder in cases:
            (folder / "settings.json").write_text('{"budget": "1 updates"}')

    monkeypatch.setattr(runner, "measure_speeds", take)
    words = ["compare", "--data", data, "--configs", configs / "good.yaml", "--updates", 4]
    args = parse([str(word) for word in [*words, "--out", tmp_path / "out"]])
    with pytest.raises(UserError, match="out/good: another command gave it other settings; stop"):
        runner.compare(args)
    assert not (tmp_path / "out" / "good" / "seed1" / "train.log").exists()


def test_a_comma_in_a_path_is_no_list_of_values(tmp_path):
    command = recipes.hydra_train(tmp_path, {"common.seed": "1,2", "checkpoint.save_dir": "a,b"})
    assert command[-2:] == ["common.seed=1,2", "checkpoint.save_dir='a,b'"]


def test_speed_is_measured_once_and_gives_updates(data, configs, tmp_path, monkeypatch):
    """With a model of fairseq's own, on its own task."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(calibration_seconds=10.0, calibration_rounds=1, processes=Processes())
    budget, folder = runs.Budget("seconds", 30.0), tmp_path / "stock"
    model = recipes.load(configs / "stock.yaml", data, [])
    runner.prepare(folder, model, {})
    assert runs.known_updates(budget, model, folder) is None
    with pytest.raises(RunFailed, match="has no speed; see .*calibration.log"):
        runs.updates_of(budget, model, folder)
    runs.measure_speeds(args, budget, [(model, folder)])
    updates = runs.updates_of(budget, model, folder)
    speed = json.loads((folder / "speed.json").read_text())
    assert updates == int(30 * speed["updates_per_second"])
    assert "runs at once" not in speed["machine"]
    assert speed["tokens_per_update"] == pytest.approx(4 * 64, rel=0.05)
    assert speed["measured_updates"] == 60
    assert not list((tmp_path / "stock").glob("**/*.pt"))
    log = (tmp_path / "stock" / "calibration.log").read_text()
    assert "begin validation" not in log
    (folder / "recipe.yaml").unlink()  # nothing is measured again
    runs.measure_speeds(args, budget, [(model, folder)])
    assert runs.updates_of(budget, model, folder) == updates


class SlowTraining:
    """Stands for processes whose training makes an update in so many seconds: one number, or one
    for each time; the last one stays."""

    def __init__(self, *seconds):
        self.seconds, self.titles = list(seconds), []

    def execute(self, command, log, title, *unused, again):
        seconds = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        self.titles.append(title)
        hours = float(re.search(r"stop_time_hours=([\d.]+)", " ".join(map(str, command)))[1])
        updates = range(5, int(3600 * hours / seconds) + 1, 5)
        speeds = {"wpb": "100", "wps": str(100 / seconds), "bpb": "3"}
        lines = [json.dumps({"epoch": 1, "num_updates": str(u), **speeds}) for u in updates]
        log.write_text("\n".join(["training on 1 devices", *lines]))


def test_slow_models_are_measured_longer(data, configs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "machine", lambda processes: {})
    model = recipes.load(configs / "good.yaml", data, [])
    args = argparse.Namespace(
        calibration_seconds=10.0, calibration_rounds=1, processes=SlowTraining(2.5)
    )
    runs.calibrate(args, model, tmp_path, 1)
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["updates_per_second"] == pytest.approx(0.4) and speed["measured_updates"] == 15
    (tmp_path / "slower").mkdir()
    args.processes = SlowTraining(6.0)
    message = "good is too slow to be measured in 80 s; raise --calibration-seconds, which is 10"
    case = runs.Budget("seconds", 30.0), [(model, tmp_path / "slower")]
    with pytest.raises(UserError, match=message):
        runs.measure_speeds(args, *case, strict=True)
    runs.measure_speeds(args, *case)
    assert message in capsys.readouterr().out
    assert not (tmp_path / "slower" / "speed.json").exists()


def test_speeds_are_measured_in_rounds_and_the_fastest_counts(data, configs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "machine", lambda processes: {})
    model = recipes.load(configs / "good.yaml", data, [])
    cases = [(model._replace(name=name), tmp_path / name) for name in "ab"]
    for _, folder in cases:
        folder.mkdir()
    args = argparse.Namespace(calibration_seconds=10.0, calibration_rounds=2)
    args.processes = SlowTraining(0.5, 0.1, 0.25, 0.2)
    budget = runs.Budget("seconds", 30.0)
    runs.measure_speeds(args, budget, cases)
    assert args.processes.titles == ["a", "b", "a", "b"]
    speeds = [json.loads((folder / "speed.json").read_text()) for _, folder in cases]
    assert [speed["of_rounds"] for speed in speeds] == [pytest.approx([2, 4]), [10, 5]]
    assert [speed["updates_per_second"] for speed in speeds] == [4, 10]

    # Only what is missing is measured again.
    for name in ("speed.json", "calibration2.json"):
        (tmp_path / "a" / name).unlink()
    args.processes = SlowTraining(0.125)
    runs.measure_speeds(args, budget, cases)
    assert args.processes.titles == ["a"]
    assert json.loads((tmp_path / "a" / "speed.json").read_text())["of_rounds"] == [2, 8]


@pytest.mark.parametrize("complete", [True, False])
def test_a_budget_in_seconds_has_the_speeds_of_one_machine(
    data, configs, tmp_path, monkeypatch, capsys, complete
):
    model = recipes.load(configs / "good.yaml", data, [])
    cases = [(model, tmp_path / name) for name in "ab"]
    args = argparse.Namespace(calibration_seconds=10.0, calibration_rounds=2)
    args.processes = SlowTraining(0.5)
    seconds, updates = runs.Budget("seconds", 30.0), runs.Budget("updates", 30)

    def measure(cpu, cases, budget=seconds, **options):
        monkeypatch.setattr(runs, "machine", lambda _: {"cpu": cpu, "cpus": 2, "commit": cpu})
        runs.measure_speeds(args, budget, cases, **options)

    for _, folder in cases:
        folder.mkdir()
    measure("Xeon", cases[:1])
    if not complete:  # the second round was interrupted
        for name in ("speed.json", "calibration2.json"):
            (tmp_path / "a" / name).unlink()
    known = sorted(tmp_path.glob("*/*"))
    message = r"good is not measured here, .*/a/.*json is of another machine \(cpu Xeon, not EPYC\)"
    measure("EPYC", cases)
    assert len(re.findall(message, capsys.readouterr().out)) == 2 - complete
    with pytest.raises(UserError, match=message):
        measure("EPYC", cases, strict=True)
    assert sorted(tmp_path.glob("*/*")) == known

    # What is known already is used anywhere, and other budgets need no speed.
    measure("Xeon", cases[:1])
    measure("EPYC", cases[:1], strict=True)
    measure("EPYC", cases, updates)
    assert not (tmp_path / "b" / "speed.json").exists()
    measure("EPYC", cases, updates, for_times=True)
    assert (tmp_path / "b" / "speed.json").exists()

    # Two commands measured one model each; a third one has both.
    with pytest.raises(UserError, match=r"/b/.* \(cpu EPYC, not Xeon\); compare models"):
        measure("Xeon", cases)
    for path in (tmp_path / "b").glob("calibration*.json"):
        path.unlink()
    path = tmp_path / "b" / "speed.json"
    for key, value, differs in (("commit", "other", False), ("cpus", 3, True)):
        speed = json.loads((tmp_path / "a" / "speed.json").read_text())
        speed["machine"][key] = value
        path.write_text(json.dumps(speed))
        assert (runs.other_machine([tmp_path / "a", path.parent]) is not None) == differs
    path.write_text((tmp_path / "a" / "speed.json").read_text().replace('"CPU"', '"GPU"'))
    assert "(device GPU, not CPU)" in runs.other_machine([tmp_path / "a", path.parent])


def test_seeds_are_trained_through_a_launcher(data, configs, tmp_path, monkeypatch, capsys):
    """One multirun; what it leaves is read like any other run's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(
        out=tmp_path / "out", seeds=[3, 5], launcher="basic", processes=Processes()
    )
    model = recipes.load(configs / "good.yaml", data, [])
    runner.prepare(args.out / "good", model, {})
    runner.multirun(args, model, 8)
    for seed in args.seeds:
        log = (args.out / "good" / f"seed{seed}" / "train.log").read_text()
        training = logs.read_training(log)
        assert training.finished and len(training.train) == 8 and len(training.valid) == 4
        assert f"'seed': {seed}" in log
        assert logs.read_peak(log) is None
        assert (args.out / "good" / f"seed{seed}" / "checkpoints" / "checkpoint_last.pt").exists()
    capsys.readouterr()
    runner.multirun(args, model, 8)  # nothing is left to do
    assert capsys.readouterr().out == ""


def test_dry_run_prints_the_commands_and_does_nothing(data, configs, tmp_path, compare):
    options = ["--data", data, "--configs", configs / "good.yaml", configs / "stock.yaml"]
    options += ["--out", tmp_path / "out", "--seeds", 1, 2, "--dry-run"]
    status, output, _ = compare(*options, "--updates", 80)
    assert status == 0 and not (tmp_path / "out").exists()
    commands = [shlex.split(line) for line in output.splitlines() if line.startswith("/")]
    assert len(commands) == 2 * 2 * 3
    train, valid, test = commands[3:6]
    assert Path(train[0]) == Path(sys.executable).parent / "fairseq-hydra-train"
    expected = ["common.seed=2", "optimization.max_update=80", "lr_scheduler.warmup_updates=4"]
    expected += ["dataset.validate_interval_updates=20", "checkpoint.save_interval_updates=20"]
    assert set(expected) < set(train)
    words = [" ".join(found) for found in (valid, test)]
    for line, split in zip(words, ("valid", "test")):
        assert line.startswith(f"{sys.executable} -m fairseq_sha evaluate {data} --split {split} ")
        assert f"--json {tmp_path}/out/good/seed2/{split}.json" in line
        assert "--tokens-per-sample 50 --batch-size 8 --model-overrides {'window': 20}" in line
        assert "--user-dir" not in line and line.endswith(" --cpu")
    stock = " ".join(commands[-1])
    assert "fairseq-eval-lm" in stock and "--task language_modeling " in stock
    assert "--tokens-per-sample 64 --batch-size 2 --context-window 48" in stock
    assert "--user-dir" not in stock

    status, output, _ = compare(*options, "--seconds", 60)
    assert status == 0 and "optimization.max_update=UPDATES" in output
    assert output.count("updates per second of this command, fastest of 2:") == 2
    assert output.count("optimization.stop_time_hours=0.005556") == 2
    assert "lr_scheduler.warmup_updates=UPDATES*40/800" in output


@pytest.mark.parametrize("name", ["stock", "other"])
def test_stock_model_and_a_change_of_evaluation_before_there_are_results(
    data, configs, tmp_path, compare, name
):
    """Training does not depend on settings of evaluation: it is not repeated."""
    out = tmp_path / "out"
    options = ["--data", data, "--configs", configs / f"{name}.yaml", "--updates", 4, "--out", out]
    status, output, errors = compare(*options)
    assert status == 0, output + errors
    (result,) = json.loads((out / "results.json").read_text())["runs"]
    assert 0 < result["test"]["tokens"] <= 833
    log = (out / name / "seed1" / "train.log").read_text()
    options += ["--set", "evaluation.context_window=8"]
    status, _, errors = compare(*options)
    assert status == 1 and "has results of another evaluation.context_window (was 48" in errors
    (out / name / "seed1" / "result.json").unlink()
    status, output, errors = compare(*options)
    assert status == 0, output + errors
    (again,) = json.loads((out / "results.json").read_text())["runs"]
    assert again["test"]["bits"] != result["test"]["bits"]
    assert (out / name / "seed1" / "train.log").read_text() == log


@pytest.mark.parametrize(
    "config, options, message",
    [
        (None, ["--updates", 5], r".*no_such.yaml: no such config; give the path of a YAML file"),
        (GOOD, ["--updates", 0], r"--updates 0: must be positive"),
        (GOOD, ["--seconds", -1], r"--seconds -1: must be positive"),
        (GOOD, ["--updates", 5, "--seeds"], r"--seeds: name at least one, or tune with --space"),
        (GOOD, ["--updates", 5, "--data", "/nowhere"], r"/nowhere/dict.txt is missing; make a .*"),
        (GOOD, ["--updates", 5, "--set", "cpu"], r"--set cpu: give SECTION.FIELD=VALUE, .*"),
        ("a: [", ["--updates", 5], r".*/good.yaml: not a config: .*; correct it"),
        ("- a", ["--updates", 5], r".*/good.yaml: not a config, since it has no sections; .*"),
        (
            GOOD.replace("max_update: 800, ", ""),
            ["--updates", 5],
            r".*/good.yaml: optimization.max_update is missing; .* add it",
        ),
        (
            GOOD.replace("batch_size", "max_tokens"),
            ["--bytes", 5000],
            r"good: a budget in bytes needs dataset.batch_size; add it",
        ),
        (GOOD + "  \n", ["--updates", 5, "--set", "evaluation.cpu=1"], r".* evaluation.cpu is .*"),
        (
            GOOD,
            ["--updates", 5, "--set", "evaluation.context_window=40"],
            r".*/good.yaml: in evaluation, tokens_per_sample 40 includes the context .*",
        ),
        (
            GOOD,
            ["--updates", 5, "--set", "evaluation.tokens_per_sample=long"],
            r".*/good.yaml: tokens_per_sample is 'long'; give a whole number",
        ),
        (
            GOOD,
            ["--updates", 5, "--recipe", "/nowhere.yaml"],
            r"/nowhere.yaml: cannot be read \(No such file or directory\); give the path .*",
        ),
        (GOOD, ["--updates", 5, "--trials", 8], r"--trials: belongs to tuning; add --space"),
        (
            GOOD,
            ["--updates", 5, "--trial-seconds", 8],
            r"--trial-seconds: belongs to tuning; add --space",
        ),
        (GOOD, ["--updates", 5, "--paper-seeds"], r"--paper-seeds: belongs to tuning; .*"),
    ],
)
def test_mistakes_cost_one_line(data, tmp_path, compare, config, options, message):
    if config is not None:
        (tmp_path / "good.yaml").write_text(config)
    path = tmp_path / ("no_such.yaml" if config is None else "good.yaml")
    fixed = ["--data", data, "--configs", path, "--out", tmp_path / "out"]
    status, output, errors = compare(*fixed, *options)
    assert (status, output) == (1, "")
    assert re.fullmatch(f"error: {message}\n", errors)
    assert not (tmp_path / "out").exists()


def test_two_configs_of_one_name(data, configs, tmp_path, compare):
    (tmp_path / "good.yaml").write_text(GOOD)
    paths = [configs / "good.yaml", tmp_path / "good.yaml"]
    fixed = ["--data", data, "--updates", 5, "--out", tmp_path / "out"]
    status, _, errors = compare(*fixed, "--configs", *paths)
    assert status == 1
    assert errors == f"error: {paths[1]}: another config is called good too; rename one\n"


def test_schedule_is_scaled_to_the_budget():
    scheduler = {"_name": "x", "warmup_updates": 40, "total_num_update": 800, "lr_shrink": 0.5}
    scheduler.update(lr_period_updates=-1, force_anneal=None)
    config = {"optimization": {"max_update": 800}, "lr_scheduler": scheduler}
    model = recipes.Recipe("x", config, {})
    expected = {"lr_scheduler.warmup_updates": 15, "lr_scheduler.total_num_update": 300}
    assert recipes.schedule(model, 300) == expected
    expected = {"lr_scheduler.warmup_updates": 1, "lr_scheduler.total_num_update": 5}
    assert recipes.schedule(model, 5) == expected
    scheduler["warmup_updates"] = 0
    assert "lr_scheduler.warmup_updates" not in recipes.schedule(model, 300)


@pytest.mark.parametrize("length", [40, 256, 1024])
def test_tokens_per_update_is_the_mean_over_random_lengths(length):
    task = {"tokens_per_sample": length, "random_segment_lengths": True}
    config = {"task": task, "dataset": {"batch_size": 6}, "optimization": {"update_freq": [2]}}
    drawn = segment_lengths(5_000_000, length, RandomState(1)).mean()
    actual = recipes.tokens_per_update(recipes.Recipe("x", config, {}))
    assert actual == pytest.approx(drawn * 6 * 2, rel=0.004)
    task["random_segment_lengths"] = False
    assert recipes.tokens_per_update(recipes.Recipe("x", config, {})) == length * 12


def logged(update, loss, wps, wpb=100):
    stats = {"epoch": 1, "loss": str(loss), "wps": str(wps), "wpb": str(wpb)}
    return json.dumps({**stats, "num_updates": str(update)})


def test_log_of_a_resumed_run():
    """Later lines replace earlier ones; validation and starting are not training time."""
    valid = '{"epoch": 1, "valid_loss": "5", "valid_nll_loss": "4.5", "valid_num_updates": "20"}'
    lines = ["training on 1 devices", logged(12, 6, 1), logged(16, 5, 50), logged(20, 4, 50)]
    lines += [
        valid,
        logged(24, 9, 1),
        "fairseq-sha compare: ended with status -15, peak memory 70 MB",
    ]
    lines += ["training on 1 devices", logged(24, 3.5, 2), logged(28, 3, 100, 90)]
    lines += [f"{logs.ENDED} 0, peak memory 60 MB"]
    training = logs.read_training("\n".join(lines))
    assert training.train == [(12, 6), (16, 5), (20, 4), (24, 3.5), (28, 3)]
    assert training.valid == [(20, 4.5)]
    assert training.tokens_per_update == pytest.approx((4 * 100 + 90) / 5)
    assert training.seconds_per_update == 2  # the median of 2, 2 and 0.9
    assert not training.finished
    assert logs.read_peak("\n".join(lines)) == 70
    assert logs.read_training("\n".join(lines[:1])) is None


def test_progress_is_visible_and_a_failure_shows_the_end_of_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "PROGRESS_SECONDS", 0.3)
    code = "import sys, time; print('one', flush=True); time.sleep(0.8); sys.exit('no more')"
    log = tmp_path / "train.log"
    with pytest.raises(RunFailed, match=f"failed; the end of {log}:\n    one\n    no more"):
        Processes().execute([sys.executable, "-c", code], log, "[1/2] x", log.exists, str)
    assert re.match(r"\[1/2\] x: False\n\[1/2\] x: True, \d s\n", capsys.readouterr().out)
    with pytest.raises(RunFailed):  # a good exit status without the work done
        Processes().execute(["true"], log, "x", str, lambda text: False)
    assert "ended with status 0" in log.read_text()


def test_a_command_whose_parent_was_killed_is_awaited(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "PROGRESS_SECONDS", 0.3)
    log, go_on = tmp_path / "train.log", tmp_path / "go_on"
    code = f"""import os, time
print("begun", flush=True)
while not os.path.exists({str(go_on)!r}):
    time.sleep(0.02)
print("done", flush=True)"""
    command = [sys.executable, "-c", code]
    parent = f"""from pathlib import Path
from fairseq_sha.compare.processes import Processes
Processes().execute({command}, Path({str(log)!r}), "x", str, str)"""
    # Its output would keep the pipe open.
    killed = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.DEVNULL)
    while "begun" not in logs.read(log):
        time.sleep(0.02)
    killed.kill()
    killed.wait()

    def execute(here, status=str, **options):
        here.execute(command, log, "x", status, lambda text: "done" in text, **options)

    stopped, begun = Processes(parallel=2), threading.Event()
    with pytest.raises(KeyboardInterrupt):
        stopped.run(
            [lambda: execute(stopped, begun.set), lambda: begun.wait() and stopped.stopping.set()]
        )
    waiting = threading.Thread(target=execute, args=[Processes()])
    waiting.start()
    printed = ""
    while printed.count("x: , by an earlier command that still runs") < 2:
        time.sleep(0.02)
        printed += capsys.readouterr().out
    assert waiting.is_alive()
    go_on.touch()
    waiting.join()
    assert log.read_text() == "begun\ndone\n"
    execute(Processes(), again=True)
    assert log.read_text().startswith("begun\ndone\nfairseq-sha compare: ended with status 0")
