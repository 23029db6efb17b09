"""Training and evaluation in bfloat16, and updates whose gradients are not finite."""

import re

import pytest
import torch
from fairseq import options
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from tests.commands import REPOSITORY, command, hydra_train, logged_losses
from tests.options import FAMILIES, SHA_RNN
from tests.test_commands import in_process
from tests.tiny_corpus import write_folder

BITS = 0.03  # by which bfloat16 may differ from float32, per byte, in the first updates


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def train(data, text, caplog, **common):
    """``fairseq-train`` in this process, with settings of ``common`` that its command line lacks;
    returns what was logged."""
    from fairseq_cli.train import main

    argv = [data, "--user-dir", str(REPOSITORY / "fairseq_sha"), "--task", "byte_language_modeling"]
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [*argv, *text.split()])
    cfg = convert_namespace_to_omegaconf(args)
    for name, value in common.items():
        cfg.common[name] = value
    caplog.clear()
    with caplog.at_level("INFO"):
        main(cfg)
    return caplog.text


def bits(text):
    found = re.findall(r"train_inner.*?bpc=([0-9.]+)", text)
    return torch.tensor([float(value) for value in found])


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_trains_and_evaluates_like_float32(data, tmp_path, monkeypatch, caplog, name):
    text = f"{FAMILIES[name]} --max-update 12 --no-save --save-dir {tmp_path}"
    full = bits(train(data, text, caplog))
    assert len(full) == 12
    text = text.replace("--no-save", "")
    half = bits(train(data, text, caplog, bf16=True))
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, atol=BITS, rtol=0)

    def score(*precision):
        arguments = ["--path", tmp_path / "checkpoint_last.pt", "--cpu", "--batch-size", 4]
        logged = in_process("eval_lm", monkeypatch, caplog, data, *arguments, *precision)
        return float(re.search(r"Loss \(base 2\): ([0-9.]+)", logged).group(1))

    assert score("--bf16") == pytest.approx(score(), abs=BITS)


def test_bfloat16_resumes(data, tmp_path, caplog):
    """Not to the last digit: fairseq's checkpoints hold weights in bfloat16 only, not the
    optimiser's float32 copies of them."""
    text = f"{FAMILIES['SRUpp']} --save-interval-updates 4 --save-dir"
    whole = bits(train(data, f"{text} {tmp_path / 'whole'} --max-update 8", caplog, bf16=True))
    train(data, f"{text} {tmp_path / 'cut'} --max-update 4", caplog, bf16=True)
    rest = train(data, f"{text} {tmp_path / 'cut'} --max-update 8", caplog, bf16=True)
    assert "from nothing" not in rest
    torch.testing.assert_close(bits(rest), whole[4:], atol=BITS, rtol=0)


def test_hydra_is_the_way_to_bfloat16(data, tmp_path):
    (tmp_path / "small.yaml").write_text(
        f"""
hydra: {{run: {{dir: .}}}}
common: {{user_dir: fairseq_sha, cpu: true, bf16: true, log_format: simple, log_interval: 1}}
task: {{_name: byte_language_modeling, data: {data}, tokens_per_sample: 40}}
model: {{_name: sha_rnn_small, width: 16, num_layers: 2, attention_layers: [1], window: 60}}
optimizer: {{_name: min_trust_lamb}}
lr_scheduler: {{_name: fixed}}
criterion: {{_name: cross_entropy}}
dataset: {{batch_size: 4, num_workers: 0}}
optimization: {{lr: [0.01], max_update: 3}}
checkpoint: {{save_dir: {tmp_path}/checkpoints}}
"""
    )
    done = hydra_train(tmp_path, "small")
    assert done.returncode == 0, done.stdout
    assert len(logged_losses(done.stdout)) == 3
    done = command("fairseq-train", data, f"{SHA_RNN} --bf16 --save-dir {tmp_path / 'none'}")
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("error: --bf16 means a TPU")


def test_gradients_that_are_not_finite_end_the_run_before_they_do_harm(
    data, tmp_path, monkeypatch, caplog
):
    """fairseq's rule in float32. The run then goes on from the last checkpoint as if never hit."""
    text = f"{SHA_RNN} --save-interval-updates 4 --save-dir"
    whole = train(data, f"{text} {tmp_path / 'whole'} --max-update 9", caplog)
    calls, forward = [], CrossEntropyCriterion.forward

    def poisoned(self, model, sample, reduce=True):
        loss, *rest = forward(self, model, sample, reduce)
        calls.append(model.training)
        return loss * (float("nan") if sum(calls) == 7 else 1), *rest

    with monkeypatch.context() as patched:
        patched.setattr(CrossEntropyCriterion, "forward", poisoned)
        with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
            train(data, f"{text} {tmp_path / 'hit'} --max-update 9", caplog)
    rest = train(data, f"{text} {tmp_path / 'hit'} --max-update 9", caplog)
    expected, resumed = logged_losses(whole), logged_losses(rest)
    assert len(resumed) == 5
    assert resumed == {update: expected[update] for update in resumed}
