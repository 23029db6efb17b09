"""Counted operations against counts by hand."""

import json
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from fairseq_sha import flops
from fairseq_sha.commands import main
from fairseq_sha.models import family, heads
from fairseq_sha.ops import (
    attend,
    attend_fixed,
    attention,
    causal_bias,
    lstm,
    sparse_attention,
)
from tests.tiny_corpus import write_folder

T, B, H = 5, 3, 8
CONFIG = """
hydra: {run: {dir: .}}
common: {user_dir: fairseq_sha, cpu: true}
task: {_name: byte_language_modeling, data: DATA, tokens_per_sample: 20}
criterion: {_name: cross_entropy}
optimizer: {_name: adam}
lr_scheduler: {_name: cosine}
optimization: {lr: [0.001], max_update: 10}
dataset: {batch_size: 4}
"""
SHA_RNN = {"_name": "sha_rnn", "width": 16, "num_layers": 2, "attention_layers": [1], "window": 50}
ROTARY = {"_name": "rotary_transformer", "width": 16, "num_layers": 2, "n_head": 2, "d_inner": 24}
STOCK = {
    "_name": "transformer_lm",
    "decoder_layers": 2,
    **dict.fromkeys(("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"), 16),
    "decoder_ffn_embed_dim": 24,
    "decoder_attention_heads": 2,
    "share_decoder_input_output_embed": True,
    "add_bos_token": False,
    "max_target_positions": 60,
}
#: Rows of the vocabulary: the symbols of the corpus and the special ones, padded.
VOCABULARY = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def forward_and_backward(function, *inputs):
    """Operations of the forward pass alone, and of both."""

    def both():
        function(*inputs).sum().backward()

    @torch.no_grad()
    def forward():
        function(*inputs)

    return flops.operations(forward), flops.operations(both)


def variable(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_linear_map():
    linear, x = nn.Linear(H, 7), variable(T, B, H)
    once = 2 * T * B * H * 7
    assert forward_and_backward(linear, x) == (once, 3 * once)
    assert forward_and_backward(linear, x.detach()) == (once, 2 * once)  # no gradient of x
    assert flops.operations(lambda: linear.weight @ x[0, 0]) == 2 * H * 7


def test_lstm():
    weights = [variable(4 * H, 6), variable(4 * H, H), variable(4 * H), variable(4 * H)]
    state = torch.zeros(1, B, H)
    once = 2 * T * B * 4 * H * (6 + H)
    layer = lambda x: lstm(x, state, state, *weights)[0]  # noqa: E731
    assert forward_and_backward(layer, variable(T, B, 6)) == (once, 3 * once)
    # Another kernel: a step without gradient.
    with torch.no_grad():
        assert flops.operations(lambda: layer(torch.randn(1, B, 6))) == once / T


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_torch(causal):
    q, k, v = (variable(B, 2, length, 4) for length in (T, 9, 9))
    once = 2 * 2 * B * 2 * T * 9 * 4
    attends = lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal)  # noqa: E731
    assert forward_and_backward(attends, q, k, v) == (once, 3 * once)


@pytest.mark.parametrize("limit", [attention.MAX_SCORES_ON_CPU, 2 * T * 9])
def test_own_attention_counts_once_what_is_computed_again(monkeypatch, limit):
    monkeypatch.setattr(attention, "MAX_SCORES_ON_CPU", limit)
    q, k, v = variable(T, 6, 4), variable(9, 6, 4), variable(9, 6, 4)
    once = 2 * 2 * 6 * T * 9 * 4
    attends = lambda q, k, v: attend(q, k, v, causal_bias(q, k))  # noqa: E731
    assert forward_and_backward(attends, q, k, v) == (once, 3 * once)


def test_head_counts_once_what_is_computed_again(monkeypatch):
    monkeypatch.setattr(heads, "MAX_LOGITS", 64)
    head, targets = heads.SoftmaxHead(H, 20), torch.zeros(T, B, dtype=torch.long)
    once = 2 * T * B * H * 20
    losses = lambda h: head.losses(h, targets)  # noqa: E731
    assert forward_and_backward(losses, variable(T, B, H)) == (once, 3 * once)


@pytest.mark.parametrize("groups", [1, H])
def test_convolution(groups):
    conv, x = nn.Conv1d(H, H, 3, groups=groups), variable(B, H, T + 2)
    once = 2 * B * T * H * (H // groups) * 3
    assert forward_and_backward(conv, x) == (once, 3 * once)


def test_convolution_over_time_of_fairseq():
    weight, bias = variable(3, H, 6), variable(6)
    once = 2 * T * B * 3 * H * 6
    conv = lambda x: torch.conv_tbc(x, weight, bias)  # noqa: E731
    assert forward_and_backward(conv, variable(T + 2, B, H)) == (once, 3 * once)


def counted(data, tmp_path, model, evaluation=None, changes=None):
    """What the command writes."""
    config = OmegaConf.create(CONFIG.replace("DATA", str(data)))
    config = OmegaConf.merge(config, {"model": model}, changes or {})
    path, out = tmp_path / "model.yaml", tmp_path / "flops.json"
    OmegaConf.save(config, str(path))
    if evaluation:
        (tmp_path / "evaluation").mkdir()
        OmegaConf.save(OmegaConf.create(evaluation), str(tmp_path / "evaluation" / "model.yaml"))
    assert main(["flops", "--config", str(path), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_sha_rnn(data, tmp_path, capsys):
    """Its memory is full in training and evaluation, and needs no gradient; training has the
    over-parameterised vector, evaluation its constant value."""
    figures = counted(data, tmp_path, SHA_RNN, {"tokens_per_sample": 10})
    width, boom, window = 16, 64, 50
    matrices = 2 * 8 * width**2 + width**2 + 2 * width * boom + VOCABULARY * width
    in_training = 6 * matrices
    # Scores and mix of the window, and their gradients: two products for each row of the segment,
    # but one each for memory.
    in_training += 2 * 2 * width * (window + window + 20)
    in_training += 6 * 2 * width**2 / (4 * 20)  # the vector, once an update, over four streams
    in_training -= 2 * width * 2 * width / (4 * 20)  # whose seed is an input
    assert figures["training_flops_per_token"] == pytest.approx(in_training, rel=0.01)
    boomed = 2 * (matrices + 2 * width * window)
    assert figures["evaluation_flops_per_token"] == boomed
    assert figures["tokens_per_update"] == 80
    output = capsys.readouterr().out
    assert f"{figures['parameters']:,}" in output and "FLOPs per token, evaluation" in output


def test_positions_of_transformer_xl_are_projected_once_for_all_streams(data, tmp_path):
    """Of each of the segment's and the memory's tokens, and of one more; in each layer."""
    model = {"_name": "transformer_xl", "width": 16, "num_layers": 2, "n_head": 2, "d_inner": 24}
    model = {**model, "mem_len": 20, "dropout": 0.0}
    costs = {}
    for streams in (1, 2, 5):
        changes = {"dataset": {"batch_size": streams}}
        folder = tmp_path / str(streams)
        folder.mkdir()
        evaluation = {"tokens_per_sample": 20, "batch_size": streams}
        costs[streams] = counted(data, folder, model, evaluation, changes)
    once = 2 * 2 * (20 + 20 + 1) * 16**2
    for key, passes in (("training", 2), ("evaluation", 1)):  # positions need no gradient
        per_token = {n: found[f"{key}_flops_per_token"] for n, found in costs.items()}
        for streams in (2, 5):
            less = per_token[1] - per_token[streams]
            assert less == pytest.approx(passes * once * (1 - 1 / streams) / 20)


#: Models of width 16 that remember 20 tokens: their matrices, and what a token's attention costs
#: in each layer, of segments of 20.
REMEMBERING = {
    "transformer_xl": (
        {"n_head": 2, "d_inner": 24, "mem_len": 20},
        4 * 16**2 + 2 * 16 * 24,
        # Scores and mix, scores of positions, and positions projected once for all four streams.
        2 * 2 * 40 * 16 + 2 * 41 * 16 + 2 * 41 * 16**2 / (4 * 20),
    ),
    "adaptive_span": (
        {"n_head": 2, "d_inner": 24, "attn_span": 20, "adapt_span_loss": 0.0},
        4 * 16**2 + 2 * 16 * 24,
        2 * 2 * 39 * 16 + 2 * 20 * 16,
    ),
    "srupp": (
        {"projection": 8, "eval_unroll": 20},
        16 * 8 + 8 * 16 + 8 * 3 * 16,
        2 * 2 * 40 * 8,
    ),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_evaluation_projects_each_token_once(data, tmp_path, name):
    sizes, matrices, attention = REMEMBERING[name]
    model = {"_name": name, "width": 16, "num_layers": 2, **sizes}
    figures = counted(data, tmp_path, model, {"tokens_per_sample": 20, "batch_size": 4})
    expected = 2 * (2 * matrices + attention) + 2 * VOCABULARY * 16
    assert figures["evaluation_flops_per_token"] == pytest.approx(expected)


MATRICES = 2 * (4 * 16**2 + 3 * 16 * 24) + VOCABULARY * 16


@pytest.mark.parametrize("memory", [0, 13])
def test_transformer(data, tmp_path, memory):
    model = {**ROTARY, "memory": memory, "eval_memory": 33}
    figures = counted(data, tmp_path, model)
    attention = 2 * 2 * 2 * 16 * (20 + memory)
    # Keys and values of the memory are inputs; torch's kernel computes their gradient all the same.
    assert figures["training_flops_per_token"] == 6 * MATRICES + 3 * attention
    assert figures["evaluation_flops_per_token"] == 2 * MATRICES + 2 * 2 * 2 * 16 * (20 + 33)
    assert figures["parameters"] == MATRICES + VOCABULARY + 5 * 16


def test_scored_token_of_a_window_pays_for_its_context(data, tmp_path):
    evaluation = {"tokens_per_sample": 30, "context_window": 20}
    figures = counted(data, tmp_path, ROTARY, evaluation)
    assert figures["evaluation_flops_per_token"] == 3 * (2 * MATRICES + 2 * 2 * 2 * 16 * 30)


def test_fairseqs_own_transformer(data, tmp_path):
    figures = counted(data, tmp_path, STOCK, {"tokens_per_sample": 60, "context_window": 20})
    matrices = 2 * (4 * 16**2 + 2 * 16 * 24) + VOCABULARY * 16
    assert figures["training_flops_per_token"] == 6 * matrices + 3 * 2 * 2 * 2 * 16 * 20
    assert figures["evaluation_flops_per_token"] == 1.5 * (2 * matrices + 2 * 2 * 2 * 16 * 60)


def test_six_per_parameter_where_attention_is_small(data, tmp_path):
    """A common rule of thumb (arXiv 2001.08361)."""
    model = {**SHA_RNN, "width": 64, "attention_layers": []}
    figures = counted(data, tmp_path, model)
    expected = 6 * figures["parameters"]
    assert figures["training_flops_per_token"] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", family.FAMILIES)
def test_every_family_is_counted(data, tmp_path, name):
    criterion = {"criterion": {"_name": "cross_entropy_with_auxiliary_losses"}}
    tiny = {"_name": name, **family.FAMILIES[name].tiny.model}
    figures = counted(data, tmp_path, tiny, changes=criterion)
    ratio = figures["training_flops_per_token"] / figures["evaluation_flops_per_token"]
    # Where windows overlap, evaluation reads tokens again.
    least = 0.5 if "eval_stride" in tiny else 2
    assert least < ratio < 5


def test_windows_whose_state_repeats_after_several_segments(data, tmp_path_factory):
    """Each 20 tokens the window of 60 is read again, wherever segments end."""
    tiny = {"_name": "sparse_transformer", **family.FAMILIES["sparse_transformer"].tiny.model}
    assert (tiny["window"], tiny["eval_stride"]) == (60, 20)
    counts = [
        counted(data, tmp_path_factory.mktemp("flops"), tiny, {"tokens_per_sample": length})
        for length in (20, 30, 16)
    ]
    counts = [figures["evaluation_flops_per_token"] for figures in counts]
    # Pieces of a window cost a little less attention than the window as a whole.
    assert 0.9 * counts[0] < min(counts[1:]) and max(counts[1:]) <= counts[0]


def test_random_windows_carry_nothing(data, tmp_path_factory):
    model = {"_name": "transformer_xl", "width": 16, "num_layers": 2, "n_head": 2, "d_inner": 24}
    counts = [
        counted(
            data,
            tmp_path_factory.mktemp("flops"),
            {**model, "mem_len": mem_len},
            changes={"task": {"random_windows": random_windows}},
        )["training_flops_per_token"]
        for mem_len, random_windows in ((0, False), (200, True), (200, False))
    ]
    assert counts[0] == counts[1] < counts[2]


def test_recomputation_of_sparse_attention_counts_once(monkeypatch):
    inputs = [torch.randn(24, 2, 3, 4, requires_grad=True) for _ in range(3)]
    run = partial(attend_fixed, stride=6, summary=2, num_summaries=3)
    kept = forward_and_backward(run, *inputs)
    monkeypatch.setattr(sparse_attention, "MAX_COPIED", 0)
    assert forward_and_backward(run, *inputs) == kept


def test_counting_leaves_nothing_behind():
    from torch.utils.flop_counter import flop_registry

    before = dict(flop_registry), attention.checkpoint, heads.checkpoint
    with pytest.raises(ZeroDivisionError):
        flops.operations(lambda: 1 / 0)
    assert (dict(flop_registry), attention.checkpoint, heads.checkpoint) == before


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": {"_name": "nothing"}}, "model._name nothing"),
        ({"model": {"widht": 3}}, "widht"),
        ({"evaluation": {"model_overrides": {"eval_memroy": 9}}}, "eval_memroy"),
        ({"task": {"_name": "language_modeling"}}, "task._name language_modeling"),
        ({"task": {"data": "nowhere"}}, "nowhere"),
        ({"dataset": {"batch_size": None}}, "dataset.batch_size is missing"),
        ({"dataset": {"batch_size": 0}}, "dataset.batch_size 0: must be a whole number of at"),
        ({"task": {"tokens_per_sample": "many"}}, "task.tokens_per_sample many: must be"),
        ({"model": "sha_rnn"}, "model sha_rnn: not a section; correct it"),
    ],
)
def test_config_that_makes_no_model_is_one_line(data, tmp_path, capsys, changes, named):
    config = OmegaConf.create(CONFIG.replace("DATA", str(data)))
    path = tmp_path / "model.yaml"
    if "evaluation" in changes:
        (tmp_path / "evaluation").mkdir()
        OmegaConf.save(
            OmegaConf.create(changes["evaluation"]), str(tmp_path / "evaluation" / path.name)
        )
        changes = {}
    config = OmegaConf.merge(config, {"model": SHA_RNN})
    for name, section in changes.items():
        config[name] = OmegaConf.merge(config[name], section) if section != "sha_rnn" else section
    OmegaConf.save(config, str(path))
    assert main(["flops", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and named in error and error.count("\n") == 1
