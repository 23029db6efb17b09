"""EleutherAI's lm-evaluation-harness on tasks over small texts of our own."""

import json
import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from fairseq_sha import UserError, lm_eval_adapter
from fairseq_sha.commands import main
from fairseq_sha.continuations import continue_until, log_likelihoods
from fairseq_sha.trained_model import TrainedModel
from tests import random_checkpoint
from tests.commands import REPOSITORY
from tests.tiny_corpus import text


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return random_checkpoint.write(tmp_path_factory.mktemp("model") / "model, 1.pt")


def test_without_the_harness_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--path", "none.pt", "--", "--tasks", "none"]) == 1
    assert "pip install 'fairseq-sha[lm-eval]'" in capsys.readouterr().err


def test_generation_of_a_task():
    assert lm_eval_adapter.generation_of({}) == ([], 256, {"beam": 1})
    options = {"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    assert lm_eval_adapter.generation_of(options) == ([b"\n"], 5, {"beam": 1})
    with pytest.raises(UserError, match="generation_kwargs num_beams: not supported"):
        lm_eval_adapter.generation_of({"until": ["a"], "num_beams": 3})


class Request(NamedTuple):
    args: tuple


def test_answers_without_the_harness(path):
    adapter = lm_eval_adapter.Adapter(path, device="cpu", batch_size=4)
    model, data, context = adapter.model, text(130), text(45, seed=3)
    score, _, _ = model.costs(data)
    rolling = adapter.loglikelihood_rolling([Request((data.decode(),)), Request(("",))])
    assert rolling == [-score.nats, 0.0]
    pairs = [(context, b"ab"), (context, b"h"), (b"", b"ab")]
    requests = [Request((before.decode(), after.decode())) for before, after in pairs]
    expected = log_likelihoods(model, context, [b"ab", b"h"]) + log_likelihoods(model, b"", [b"ab"])
    assert adapter.loglikelihood(requests) == expected
    options = {"until": ["hab"], "max_gen_toks": 40}
    generated = continue_until(model, context, [b"hab"], 40, beam=1).decode()
    assert adapter.generate_until([Request((context.decode(), options))]) == [generated]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_what_cannot_be_read_is_said_before_anything_is(path, kind, monkeypatch):
    adapter = lm_eval_adapter.Adapter(path, device="cpu")
    monkeypatch.setattr(adapter.model, "costs", None)
    for name in ("log_likelihoods", "continue_until"):
        monkeypatch.setattr(lm_eval_adapter.continuations, name, None)
    rest = {"loglikelihood": ("ab",), "generate_until": ({},)}.get(kind, ())
    with pytest.raises(UserError, match="byte 90"):
        getattr(adapter, kind)([Request(("ab", *rest)), Request(("Z", *rest))])
    if kind == "generate_until":
        with pytest.raises(UserError, match="nothing"):
            adapter.generate_until([Request(("ab", {})), Request(("ab", {"nothing": 1}))])


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.json}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{{target}}}}}"
target_delimiter: ""
{rest}
metric_list:
"""

#: By name of a task: its kind, its target, other settings and metrics.
TASKS = {
    # Without the perplexity of words: of a model that was never trained, it has too many digits
    # for the table that the harness prints.
    "rolling": ("loglikelihood_rolling", "text", "", ["byte_perplexity", "bits_per_byte"]),
    "choice": ("multiple_choice", "label", 'doc_to_choice: "{{choices}}"', ["acc", "acc_norm"]),
    "generated": (
        "generate_until",
        "target",
        'generation_kwargs: {until: ["hab"], max_gen_toks: 60, do_sample: false}',
        ["exact_match"],
    ),
}


def write_task(folder, name, documents):
    kind, target, rest, metrics = TASKS[name]
    content = TASK.format(name=name, folder=folder, kind=kind, target=target, rest=rest)
    content += "".join(f"  - metric: {metric}\n" for metric in metrics)
    (folder / f"{name}.yaml").write_text(content)
    lines = [json.dumps({"context": "", **document}) + "\n" for document in documents]
    (folder / f"{name}.json").write_text("".join(lines))


def test_harness_gives_the_scores_of_this_package(path, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[lm-eval]'")
    model = TrainedModel.load(path, cpu=True)
    texts = [text(size, seed=size) for size in (30, 500, 201)]
    contexts = [text(size, seed=size).strip() for size in (90, 7)]
    choices = [[b" ab", b" ha", b"cde", b"f"]] * 2
    write_task(tmp_path, "rolling", [{"text": data.decode()} for data in texts])
    scored = [log_likelihoods(model, *pair) for pair in zip(contexts, choices)]
    best = [max(range(4), key=lambda i, of=of: of[i][0]) for of in scored]
    write_task(
        tmp_path,
        "choice",
        [
            {
                "context": context.decode(),
                "choices": [choice.decode() for choice in of_context],
                # The second one is labelled wrong.
                "label": (label + number) % 4,
            }
            for number, (context, of_context, label) in enumerate(zip(contexts, choices, best))
        ],
    )
    generated = [continue_until(model, context, [b"hab"], 60, beam=1) for context in contexts]
    targets = [generated[0].decode(), generated[1].decode() + "x"]
    pairs = zip(contexts, targets)
    write_task(
        tmp_path,
        "generated",
        [{"context": context.decode(), "target": target} for context, target in pairs],
    )
    out = tmp_path / "results.json"
    options = ["--tasks", ",".join(TASKS), "--include_path", tmp_path, "--output_path", out]
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_sha", "lm-eval", "--path", path, "--cpu", "--", *options],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("results*.json")
    found = json.loads(found.read_text())
    results = found["results"]
    nats = sum(model.costs(data)[0].nats for data in texts)
    size = sum(map(len, texts))
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / math.log(2) / size, rel=1e-6
    )
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / size))
    assert results["choice"]["acc,none"] == 0.5
    assert results["generated"]["exact_match,none"] == 0.5
    assert found["config"]["model"] == "fairseq_sha"
    assert found["config"]["model_sha"] == model.identity.hex()
