"""What users type, on a tiny corpus: train, resume, validate, evaluate, generate."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sha import UserError, compatibility
from fairseq_sha.models.sha_rnn import SHARNN
from tests.commands import REPOSITORY, command, hydra_train, logged_losses
from tests.options import SHA_RNN
from tests.tiny_corpus import write_folder

TEST_BYTES = 833
# The frequencies of single bytes give 3.13 bits, and those of pairs 1.83.
LEARNED = 2.6

TRAINING = f"""{SHA_RNN}
    --validate-interval-updates 7 --save-interval-updates 7 --no-epoch-checkpoints
"""


def in_process(module, monkeypatch, caplog, *argv, task="byte_language_modeling"):
    """The same without starting Python anew, for long lists of cases; returns what was logged."""
    caplog.clear()
    user_dir = ["--user-dir", str(REPOSITORY / "fairseq_sha")]
    # Worker processes of torch end seconds after their work where they are forked from tests.
    argv = ["fairseq", *map(str, argv), *user_dir, "--task", task, "--num-workers", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    __import__(f"fairseq_cli.{module}")
    with caplog.at_level("INFO"):
        sys.modules[f"fairseq_cli.{module}"].cli_main()
    return caplog.text


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), test=TEST_BYTES)


@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
    """An uninterrupted run into its second epoch: its checkpoints and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    tensorboard = f"--tensorboard-logdir {folder}/tb --log-trust-ratios"
    done = command(
        "fairseq-train", data, f"{TRAINING} --max-update 52 --save-dir {folder} {tensorboard}"
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_training_learns_and_logs_bits_per_byte(whole_run):
    folder, output = whole_run
    bits = [float(value) for value in re.findall(r"train_inner.*?bpc=([0-9.]+)", output)]
    assert len(bits) == 52 and bits[0] == pytest.approx(4, abs=0.5)
    valid = re.findall(r"valid on 'valid' subset \| loss (\S+) .*?bpc (\S+)", output)
    assert len(valid) == 9  # every 7 updates, after the epoch, and at the end
    for loss, bpc in valid:
        assert float(loss) == pytest.approx(float(bpc), abs=6e-4)
    assert float(valid[-1][1]) < LEARNED
    assert "trust_min=0.25" in output and "trust_at_bound=" in output
    assert list((folder / "tb" / "train_inner").glob("events*"))


def test_checkpoints_load_safely(whole_run):
    for path in whole_run[0].glob("*.pt"):
        assert "model" in torch.load(path, weights_only=True)


class RunsCode:
    """What a malicious checkpoint can hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    compatibility.apply()
    trace = tmp_path / "ran"
    torch.save({"model": RunsCode(str(trace))}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt: not a checkpoint that fairseq wrote"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))
    assert not trace.exists()


def test_resumed_run_repeats_the_uninterrupted_one(data, whole_run, tmp_path):
    """Position, segment lengths, dropout and carried state all go on, in mid-epoch."""
    options = f"{TRAINING} --save-dir {tmp_path}"
    first = command("fairseq-train", data, f"{options} --max-update 11")
    second = command("fairseq-train", data, f"{options} --max-update 50")
    assert second.returncode == 0, second.stdout
    assert "carried state" not in second.stdout  # which warns of its absence
    expected = logged_losses(whole_run[1])
    actual = {**logged_losses(first.stdout), **logged_losses(second.stdout)}
    assert len(actual) == 50
    # The epoch's last update is logged after a reset of meters when it is also validated.
    assert {updates: expected[updates] for updates in actual} == actual


def test_resuming_with_another_batch_size_is_said(data, whole_run, tmp_path):
    checkpoint = whole_run[0] / "checkpoint_last.pt"
    done = command(
        "fairseq-train",
        data,
        f"{TRAINING} --batch-size 5 --restore-file {checkpoint} --save-dir {tmp_path} "
        "--max-update 54",
    )
    assert done.returncode == 0, done.stdout
    assert "another number of streams; beginning epoch 2 again" in done.stdout


@pytest.mark.parametrize("batch_size", [None, 1, 3, 8, 40])
@pytest.mark.parametrize("tokens_per_sample", [7, 64, 5000])
def test_evaluation_counts_every_token_once(
    data, whole_run, monkeypatch, caplog, batch_size, tokens_per_sample
):
    options = ["--batch-size", batch_size] if batch_size else []
    options += ["--tokens-per-sample", tokens_per_sample, "--gen-subset", "test", "--cpu"]
    checkpoint = whole_run[0] / "checkpoint_last.pt"
    text = in_process("eval_lm", monkeypatch, caplog, data, "--path", checkpoint, *options)
    assert f"Evaluated {TEST_BYTES - 1:,} tokens" in text
    assert float(re.search(r"Loss \(base 2\): ([0-9.]+)", text).group(1)) < LEARNED


def test_score_does_not_depend_on_the_segment_length_while_the_window_holds_all(
    data, whole_run, monkeypatch, caplog
):
    """State is carried: cut into other segments, one stream has the same score."""

    def score(tokens_per_sample):
        text = in_process(
            "eval_lm",
            monkeypatch,
            caplog,
            data,
            *["--path", whole_run[0] / "checkpoint_last.pt", "--cpu"],
            *["--tokens-per-sample", tokens_per_sample, "--gen-subset", "valid"],
            *["--model-overrides", "{'window': 10000}"],
        )
        return re.search(r"Loss \(base 2\): ([0-9.]+)", text).group(1)

    assert score(11) == score(64) == score(5000)


def test_validate_command_agrees_with_training(data, whole_run):
    folder, output = whole_run
    done = command(
        "fairseq-validate",
        data,
        f"--path {folder}/checkpoint_last.pt --valid-subset valid --batch-size 4 --cpu "
        "--log-format simple",
    )
    assert done.returncode == 0, done.stdout
    after = re.search(r"valid \| valid on 'valid' subset \| loss (\S+)", done.stdout).group(1)
    during = re.findall(r"valid on 'valid' subset \| loss (\S+)", output)[-1]
    assert after == during


def test_hydra_gives_the_same_run(data, whole_run, tmp_path):
    """The same numbers in YAML, and a named architecture's own defaults."""
    (tmp_path / "small.yaml").write_text(
        f"""
hydra: {{run: {{dir: .}}}}
common: {{user_dir: fairseq_sha, cpu: true, log_format: simple, log_interval: 1}}
task: {{_name: byte_language_modeling, data: {data}, tokens_per_sample: 40,
        random_segment_lengths: true}}
model: {{_name: sha_rnn_small, width: 16, num_layers: 2, attention_layers: [1], window: 60}}
optimizer: {{_name: min_trust_lamb, min_trust: 0.25}}
lr_scheduler: {{_name: fixed, warmup_updates: 5}}
criterion: {{_name: cross_entropy}}
dataset: {{batch_size: 4, num_workers: 0, validate_interval_updates: 7}}
optimization: {{lr: [0.01], max_update: 9, clip_norm: 0.25}}
checkpoint: {{save_dir: {tmp_path}/checkpoints, save_interval_updates: 7}}
"""
    )
    done = hydra_train(tmp_path, "small")
    assert done.returncode == 0, done.stdout
    losses = logged_losses(done.stdout)
    expected = logged_losses(whole_run[1])
    assert len(losses) == 9
    assert losses == {updates: expected[updates] for updates in losses}


def test_dropped_states_are_dropped_again_by_a_resumed_run(data, whole_run, tmp_path):
    options = f"{TRAINING} --drop-state-probability 0.5 --save-dir"
    done = command("fairseq-train", data, f"{options} {tmp_path}/whole --max-update 20")
    whole = logged_losses(done.stdout)
    plain = logged_losses(whole_run[1])
    assert len(whole) == 20, done.stdout
    assert whole["num_updates=1"] == plain["num_updates=1"]  # there was no state to drop
    assert whole["num_updates=2"] != plain["num_updates=2"]
    (checkpoint,) = (tmp_path / "whole").glob("checkpoint_*_7.pt")
    options = f"{options} {tmp_path}/resumed --restore-file {checkpoint} --max-update 20"
    resumed = logged_losses(command("fairseq-train", data, options).stdout)
    assert len(resumed) == 13
    assert resumed == {updates: whole[updates] for updates in resumed}


@pytest.mark.parametrize("option", ["--num-workers 2", "--checkpoint-activations"])
def test_how_it_is_computed_changes_nothing(data, whole_run, tmp_path, option):
    done = command(
        "fairseq-train", data, f"{TRAINING} --max-update 9 {option} --save-dir {tmp_path}"
    )
    expected = logged_losses(whole_run[1])
    losses = logged_losses(done.stdout)
    assert len(losses) == 9, done.stdout
    assert losses == {updates: expected[updates] for updates in losses}


@pytest.mark.long
def test_compiled_training_logs_the_same_bits(data, whole_run, tmp_path):
    options = f"{TRAINING} --max-update 4 --compile --save-dir {tmp_path}"
    done = command("fairseq-train", data, options)
    assert done.returncode == 0, done.stdout

    def bits(output):
        return [float(x) for x in re.findall(r"train_inner.*?bpc=([0-9.]+)", output)][:4]

    assert bits(done.stdout) == pytest.approx(bits(whole_run[1]), abs=0.005)
    scored = command("fairseq-eval-lm", data, f"--path {tmp_path}/checkpoint_last.pt --cpu")
    assert scored.returncode == 0, scored.stdout


def test_collapsed_model_has_the_same_score(data, whole_run, monkeypatch, caplog):
    def evaluate(*options):
        arguments = ["--path", whole_run[0] / "checkpoint_last.pt", "--cpu", "--batch-size", 4]
        text = in_process("eval_lm", monkeypatch, caplog, data, *arguments, *options)
        parameters = int(re.search(r"model params: ([0-9,]+)", text).group(1).replace(",", ""))
        return parameters, re.search(r"Loss \(base 2\): ([0-9.]+)", text).group(1)

    full, score = evaluate()
    collapsed, same = evaluate("--model-overrides", "{'collapse': True}")
    assert same == score
    assert full - collapsed == 2 * 16 * 16 + 2 * 16


def test_interactive_writes_text(data, whole_run):
    prompts = "abc abc\nfed\n"
    argv = [Path(sys.executable).parent / "fairseq-interactive", data, "--user-dir", "fairseq_sha"]
    argv += ["--task", "byte_language_modeling", "--path", whole_run[0] / "checkpoint_last.pt"]
    argv += ["--cpu", "--sampling", "--beam", 1, "--max-len-b", 50]
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=REPOSITORY,
        input=prompts,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for number, prompt in enumerate(prompts.splitlines()):
        assert re.search(rf"^H-{number}\t\S+\t{prompt}", done.stdout, re.MULTILINE)


def test_generate_goes_on_from_what_segments_begin_with(data, whole_run):
    options = f"--path {whole_run[0] / 'checkpoint_last.pt'} --cpu --batch-size 3"
    options += " --tokens-per-sample 50 --beam 1 --sampling --prefix-size 9 --max-len-b 30"
    done = command("fairseq-generate", data, options)
    assert done.returncode == 0, done.stdout
    segments = dict(re.findall(r"^S-(\d+)\t(.*?)\nT-", done.stdout, re.MULTILINE | re.DOTALL))
    texts = dict(re.findall(r"^H-(\d+)\t\S+\t(.*?)\nD-", done.stdout, re.MULTILINE | re.DOTALL))
    assert len(segments) == len(texts) == -(-(TEST_BYTES - 1) // 50 // 3) * 3
    for number, text in texts.items():
        assert len(text) == 30 and text[:9] == segments[number][:9]


def test_from_pretrained_samples_any_text(data, whole_run):
    model = SHARNN.from_pretrained(str(whole_run[0]), "checkpoint_last.pt", data)
    options = dict(sampling=True, max_len_b=120)
    texts = model.sample(["abc\nde", "f", ""], **options)
    for text, prompt in zip(texts, ["abc\nde", "f", ""]):
        assert text.startswith(prompt)
        assert len(text) == 120 and set(text) <= set("abcdefgh \n")
    assert any("\n" in text[6:] for text in texts)  # a newline does not end the text
    assert len(model.sample("abc", beam=4, max_len_b=30)) == 30


def test_generation_scores_equal_the_segment_pass(data, whole_run):
    model = SHARNN.from_pretrained(str(whole_run[0]), "checkpoint_last.pt", data)
    text = "abc abc\nfed had a\ncab"
    scores = model.score(text)["positional_scores"]
    tokens = model.encode(text)
    newline = torch.tensor([model.task.source_dictionary.eos()])
    inputs = torch.cat([newline, tokens[:-1]])[None]
    logits, _ = model.models[0](inputs)
    expected = logits[0].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(scores, expected)
    hypothesis = model.generate([tokens], beam=1, max_len_b=len(tokens) + 5)[0][0]
    generated = hypothesis["positional_scores"][: len(tokens)]
    torch.testing.assert_close(generated, expected, atol=1e-4, rtol=1e-4)


def test_prompt_longer_than_the_text_is_refused(data, whole_run):
    model = SHARNN.from_pretrained(str(whole_run[0]), "checkpoint_last.pt", data)
    with pytest.raises(UserError, match="a prompt of 30 tokens"):
        model.sample("abc" * 10, max_len_b=20)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("fairseq-generate", "--path {path} --cpu", "--batch-size is missing"),
        ("fairseq-train", "--arch sha_rnn_small --cpu --max-tokens 500", "--batch-size is missing"),
        (
            "fairseq-eval-lm",
            "--path {path} --cpu --context-window 5",
            "--context-window has no use",
        ),
    ],
)
def test_mistakes_cost_one_line(data, whole_run, tmp_path, name, options, message):
    options = options.format(path=whole_run[0] / "checkpoint_last.pt")
    if name == "fairseq-train":
        options += f" --save-dir {tmp_path} --optimizer min_trust_lamb --lr 0.01"
    done = command(name, data, options)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith(f"error: {message}")


def test_several_workers_cannot_evaluate(data, whole_run):
    path = str(whole_run[0] / "checkpoint_last.pt")
    overrides = {"data": data}
    _, _, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
    task.load_dataset("test")
    with pytest.raises(UserError, match="evaluate with one"):
        task.eval_lm_dataloader(task.dataset("test"), batch_size=4, num_shards=2)
