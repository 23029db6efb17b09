"""Dynamic evaluation: the published numbers, and what must hold for every model."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from omegaconf import OmegaConf
from torch import nn

from fairseq_sha.commands import main, tune_dynamic
from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.evaluation.dynamic import RMS, SGD, Dynamic, Learner, collect
from fairseq_sha.evaluation.evaluate import evaluate, token_losses
from fairseq_sha.evaluation.policies import Carried, Sliding, Tokens
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.heads import SoftmaxHead
from fairseq_sha.models.segment_decoder import SegmentDecoder
from fairseq_sha.ops.lstm import lstm
from tests.commands import command
from tests.conftest import golden_cases
from tests.options import SHA_RNN, options_of
from tests.tiny_corpus import text, write_folder

CASES = golden_cases("dynamic_eval")


def codec_of(size):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *(str(value) for value in range(size - 4))]
    return ByteCodec.from_symbols(symbols)


class GoldenLSTM(nn.Module):
    """The layer of the golden model, whose width differs from the embedding's."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value))
        self.width = len(self.bias_hh_l0) // 4

    def forward(self, h, state, context):
        start = h.new_zeros(1, h.size(1), self.width)
        weights = self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0
        out, h, c = lstm(h, state.get("h", start), state.get("c", start), *weights)
        return out, {"h": h, "c": c}


def our_name(name):
    return re.sub(
        r"^(encoder|rnn|decoder)\.",
        lambda m: {"encoder": "embedding.", "rnn": "layers.0.", "decoder": "head."}[m[1]],
        name,
    )


def under(case, prefix):
    """What a case has under a prefix, by our names."""
    return {
        f"decoder.{our_name(key[len(prefix) :])}": value
        for key, value in case.items()
        if key.startswith(prefix)
    }


def golden_model(case):
    """The reference's model, in evaluation mode, and a codec with as many symbols."""
    vocabulary, width = case["param/encoder.weight"].shape
    prefix = "param/rnn."
    layer = GoldenLSTM({k[len(prefix) :]: v for k, v in case.items() if k.startswith(prefix)})
    codec = codec_of(vocabulary)
    decoder = SegmentDecoder(codec.dictionary, [layer], width)
    decoder.head = SoftmaxHead(case["param/decoder.weight"].size(1), vocabulary)
    model = FairseqLanguageModel(decoder).eval()
    model.load_state_dict(under(case, "param/"))
    return model, codec


def golden_statistics(model, case):
    """Collected from the case's own text, in its streams."""
    tokens, length = case["stat_tokens"].t(), int(case["setting/bptt"])
    losses = []

    def batches():
        total = tokens.size(1) - 1
        for i, start in enumerate(range(0, total, length)):
            end = min(start + length, total)
            net_input = {"src_tokens": tokens[:, start:end], "segment": f"train:1:{i}"}
            rows = [(0, 0, end - start)] * len(tokens)
            yield {"net_input": net_input, "target": tokens[:, start + 1 : end + 1]}, rows

    def recorded(model, batch):
        costs = token_losses(model, batch)
        losses.append(costs.mean().item())
        return costs

    return collect(model, batches(), recorded), losses


def golden_rule(model, case):
    """What the case's settings say."""
    settings = {k[len("setting/") :]: v.item() for k, v in case.items() if "setting/" in k}
    assert set(settings) in ({"lr", "bptt"}, {"lr", "bptt", "lambda", "epsilon"})
    if "lambda" not in settings:
        return SGD(settings["lr"])
    roots, _ = golden_statistics(model, case)
    return RMS(settings["lr"], settings["lambda"], settings["epsilon"], roots)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_code(name):
    case = CASES[name]
    model, codec = golden_model(case)
    segments = case["segments"].tolist()
    assert max(segments) == case["setting/bptt"]
    tokens = case["tokens"].flatten()[: sum(segments) + 1]
    policy = Dynamic(Carried(1, max(segments)), golden_rule(model, case))

    _, costs = evaluate(model, Tokens(tokens.numpy()), "test", codec, policy)
    means = [part.mean().item() for part in torch.from_numpy(costs).split(segments)]
    np.testing.assert_allclose(means, case["segment_loss"], atol=1e-4)
    assert np.exp(costs.mean()) == pytest.approx(case["perplexity"].item(), rel=1e-4)
    # The weights after the last step.
    batches = policy.batches(Tokens(tokens.numpy()), "test", codec)
    with policy.reading(model, token_losses) as read:
        for i in range(len(batches)):
            read(batches[i])
        after = {key: p.detach().clone() for key, p in model.named_parameters()}
    expected = under(case, "after/")
    assert set(after) == set(expected)
    for key, value in after.items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=0, msg=key)
    for key, value in under(case, "param/").items():
        torch.testing.assert_close(dict(model.named_parameters())[key].data, value, atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if "stat_tokens" in CASES[name]])
def test_statistics_equal_the_published_code(name):
    case = CASES[name]
    model, _ = golden_model(case)
    roots, losses = golden_statistics(model, case)
    np.testing.assert_allclose(losses, case["stat_loss"], atol=1e-4)
    expected, normalised = under(case, "rms/"), under(case, "rms_norm/")
    rule = golden_rule(model, case)
    assert set(roots) == set(expected) == set(normalised)
    for key, share in zip(roots, rule.decays(list(roots))):
        bound = 1e-3 * expected[key].abs().max() + 1e-8
        assert (roots[key] - expected[key]).abs().max() <= bound, key
        wanted = (rule.decay * normalised[key]).clamp(max=1)
        torch.testing.assert_close(share, wanted, atol=1e-4, rtol=1e-3, msg=key)


# What holds for every family.

CODEC = codec_of(24)


def decoder_of(name):
    """A small model of a family, with random weights."""
    family = FAMILIES[name]
    fields = {**family.tiny.model, **next(iter(family.tiny.variants.values()))}
    task = SimpleNamespace(source_dictionary=CODEC.dictionary, cfg=SimpleNamespace())
    return family.model.build_model(OmegaConf.structured(family.config(**fields)), task).eval()


def few_symbols(size):
    """A text in which a model that learns soon sees that there are few symbols."""
    return Tokens(np.random.randint(4, 8, size))


def costs_of(model, tokens, policy):
    return evaluate(model, tokens, "test", CODEC, policy)[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_what_comes_and_forgets_it_afterwards(name):
    model, tokens = decoder_of(name), few_symbols(81)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    static = costs_of(model, tokens, Carried(1, 10))
    batches = Carried(1, 10).batches(tokens, "train", CODEC)
    roots = collect(model, ((batches[i], batches.rows(i)) for i in range(8)))
    for rule in (RMS(0.003, 0.01, 1e-3, roots), SGD(0.1, 0.01)):
        policy = Dynamic(Carried(1, 10), rule)
        dynamic = costs_of(model, tokens, policy)
        assert dynamic[-20:].mean() < static[-20:].mean() - 0.05, rule
        # The first segment is scored before anything is learnt from it.
        np.testing.assert_allclose(dynamic[:10], static[:10], atol=1e-4)
        # Learning begins anew. What comes later changes no score.
        shorter = Tokens(tokens.tokens[:31])
        assert np.array_equal(costs_of(model, shorter, policy), dynamic[:30])
        if name != "sha_rnn":  # its window depends on the length of the segment
            within = costs_of(model, Tokens(tokens.tokens[:36]), policy)
            np.testing.assert_allclose(within, dynamic[:35], atol=1e-4)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    for rule in (RMS(0.0, 0.1, 1e-3, roots), SGD(0.0, 0.1)):
        assert np.array_equal(costs_of(model, tokens, Dynamic(Carried(1, 10), rule)), static)
    # Steps too small to change a weight: only the kernels differ.
    still = costs_of(model, tokens, Dynamic(Carried(1, 10), SGD(1e-30)))
    np.testing.assert_allclose(still, static, atol=1e-5)


@pytest.mark.parametrize("name", ["sha_rnn", "rotary_transformer"])
@pytest.mark.parametrize("parts", [3, 20])
def test_parts_are_independent(name, parts):
    """Each costs what it costs alone."""
    model, tokens = decoder_of(name), few_symbols(18)
    one = Dynamic(Carried(1, 4), SGD(0.1, 0.01))
    score, costs = evaluate(model, tokens, "test", CODEC, Dynamic(one.text, one.rule, parts))
    sizes = [len(part) for part in np.array_split(np.arange(17), min(parts, 17))]
    bounds = np.append(0, np.cumsum(sizes))
    alone = [
        costs_of(model, Tokens(tokens.tokens[a : b + 1]), one) for a, b in zip(bounds, bounds[1:])
    ]
    assert np.array_equal(costs, np.concatenate(alone))
    assert score.tokens == score.bytes == 17
    assert f"{parts} parts, each with its own weights" in score.policy


# By hand.


class Bigrams(FairseqDecoder):
    """A model of a kind that fairseq has: it looks at the last token only."""

    def __init__(self, dictionary):
        super().__init__(dictionary)
        self.logits = nn.Parameter(torch.randn(len(dictionary), len(dictionary)))
        self.bias = nn.Parameter(torch.randn(len(dictionary)))

    def forward(self, prev_output_tokens, src_lengths=None):
        return self.logits[prev_output_tokens] + self.bias, None


def by_hand(model, tokens, length, step):
    """Costs of a bigram model, whose softmax has gradient ``p - y``.

    Args:
        length (int): predictions between two steps
        step (callable): from weights, trained weights and gradients, by name, to new weights
    """
    trained = {"logits": model.decoder.logits, "bias": model.decoder.bias}
    trained = {name: p.detach().double().numpy() for name, p in trained.items()}
    weights, costs = trained, []
    for start in range(0, len(tokens) - 1, length):
        gradients = {name: np.zeros_like(p) for name, p in trained.items()}
        pairs = list(zip(tokens[start:], tokens[start + 1 : start + 1 + length]))
        for before, after in pairs:
            scores = weights["logits"][before] + weights["bias"]
            p = np.exp(scores) / np.exp(scores).sum()
            costs.append(-np.log(p[after]))
            p[after] -= 1
            gradients["logits"][before] += p / len(pairs)
            gradients["bias"] += p / len(pairs)
        weights = {n: step(n, weights[n], trained[n], gradients[n]) for n in trained}
    return costs


ROOTS = {"logits": torch.rand(24, 24), "bias": torch.rand(24)}
ROOTS["logits"][3] = 0
MEAN = float(ROOTS["logits"].mean() + ROOTS["bias"].mean()) / 2


def rms_step(name, w, w0, g):
    root = ROOTS[name].double().numpy()
    return w + np.minimum(0.7 * root / MEAN, 1) * (w0 - w) - 0.2 * g / (root + 0.1)


@pytest.mark.parametrize(
    "policy", [Carried(1, 7, has_state=False), Sliding(1, 5, 7)], ids=["segments", "windows"]
)
@pytest.mark.parametrize(
    "rule, step",
    [
        (SGD(0.5), lambda n, w, w0, g: w - 0.5 * g),
        (SGD(0.5, 0.3), lambda n, w, w0, g: w + 0.3 * (w0 - w) - 0.5 * g),
        (RMS(0.2, 0.7, 0.1, {f"decoder.{n}": root for n, root in ROOTS.items()}), rms_step),
    ],
    ids=["sgd", "sgd with decay", "rms"],
)
def test_models_of_fairseq_learn_from_what_is_new(policy, rule, step):
    """Windows overlap, and what was scored before is not learnt again."""
    model = FairseqLanguageModel(Bigrams(CODEC.dictionary)).eval()
    tokens = Tokens(np.random.randint(3, 24, 61))
    expected = by_hand(model, tokens.tokens, 7, step)
    actual = costs_of(model, tokens, Dynamic(policy, rule))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    static = costs_of(model, tokens, policy)
    assert abs(static[7:] - expected[7:]).max() > 0.05


def test_statistics_by_hand():
    """Batches count alike; rows whose text has ended do not count."""
    model = FairseqLanguageModel(Bigrams(CODEC.dictionary)).eval()
    tokens = Tokens(np.random.randint(4, 24, 33))
    batches = Carried(3, 6, has_state=False).batches(tokens, "train", CODEC)  # 11, 11, 10
    roots = collect(model, ((batches[i], batches.rows(i)) for i in range(len(batches))))
    squares = []
    for segments in (((0, 6), (11, 17), (22, 28)), ((6, 11), (17, 22), (28, 32))):
        places = np.concatenate([np.arange(*segment) for segment in segments])
        inputs, targets = (torch.from_numpy(tokens.tokens[places + i]) for i in (0, 1))
        logits = model.decoder.logits[inputs] + model.decoder.bias
        loss = nn.functional.cross_entropy(logits, targets)
        squares.append(torch.autograd.grad(loss, [model.decoder.logits, model.decoder.bias]))
    for name, first, second in zip(("logits", "bias"), *squares):
        expected = ((first**2 + second**2) / 2).sqrt()
        torch.testing.assert_close(roots[f"decoder.{name}"], expected)


# Adaptive Span: parameters with bounds, and a cache that depends on them.


def test_bounded_parameters_stay_bounded():
    model = decoder_of("adaptive_span")
    learner = Learner(model, SGD(1e4))
    spans = model.decoder.spans
    for sign, bound in ((1, 0.0), (-1, 1.0)):
        learner.learn(sign * spans().sum())
        assert (spans() == bound).all()
    learner.restore()
    costs = costs_of(model, few_symbols(40), Dynamic(Carried(1, 8), SGD(0.1)))
    assert np.isfinite(costs).all()


def test_a_span_that_grows_finds_the_tokens_that_it_had_not_reached(monkeypatch):
    family = FAMILIES["adaptive_span"]
    fields = {**family.tiny.model, "attn_span": 200, "adapt_span_ramp": 2}
    task = SimpleNamespace(source_dictionary=CODEC.dictionary, cfg=SimpleNamespace())
    model = family.model.build_model(OmegaConf.structured(family.config(**fields)), task).eval()
    tokens = few_symbols(201)

    original = torch.autograd.grad

    def growing(loss, parameters, **kwargs):
        """Gradients by which the spans grow, and nothing else changes."""
        return [
            torch.full_like(p, -0.04) if p.shape == (2,) else torch.zeros_like(p)
            for p in original(loss, parameters, **kwargs)
        ]

    monkeypatch.setattr(torch.autograd, "grad", growing)
    policy = Dynamic(Carried(1, 8), SGD(1.0))
    costs = costs_of(model, tokens, policy)
    monkeypatch.setattr("fairseq_sha.models.adaptive_span.TRIM_TO_MULTIPLES_OF", 1000)
    np.testing.assert_allclose(costs_of(model, tokens, policy), costs, atol=1e-5)
    assert abs(costs_of(model, tokens, Carried(1, 8)) - costs).max() > 1e-3


# What users type.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), train=3000, valid=401, test=501)


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = command("fairseq-train", data, f"{SHA_RNN} --max-update 30 --save-dir {folder}")
    assert done.returncode == 0, done.stdout
    return folder / "checkpoint_last.pt"


RMS_OPTIONS = "--dynamic rms --dynamic-lr 0.001 --dynamic-decay 0.01 --dynamic-epsilon 1e-4"
FEW = "--statistics-segments 3 --statistics-streams 2 --dynamic-segment 20"


def run(*words):
    assert main([str(word) for part in words for word in str(part).split()]) == 0


def test_evaluate_prints_the_dynamic_score_after_the_static_one(data, path, tmp_path, capsys):
    words = ["evaluate", data, "--path", path, "--cpu --tokens-per-sample 20 --json"]
    run(*words, tmp_path / "static.json")
    static = capsys.readouterr().out
    options = "--dynamic sgd --dynamic-lr 0.02 --dynamic-segment 20"
    run(*words, tmp_path / "dynamic.json", options)
    out = capsys.readouterr().out
    run(*words, tmp_path / "still.json", options.replace("0.02", "0"))
    plain, dynamic, still = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("static", "dynamic", "still")
    )
    assert out.splitlines()[0] == static.splitlines()[0] and len(out.splitlines()) == 2
    assert "test, dynamic: " in out and "learning rate 0.02" in out and "segments of 20" in out
    # Over-parameterised vectors are not collapsed, which may change the last digit.
    assert dynamic["nats"] == pytest.approx(plain["nats"], rel=1e-6)
    assert dynamic["dynamic"]["nats"] < dynamic["nats"]
    assert sum(dynamic["dynamic"]["block_bits"]) == pytest.approx(
        500 * dynamic["dynamic"]["bits_per_byte"], abs=0.01
    )
    assert still["dynamic"]["nats"] == still["nats"]
    assert plain["dynamic"] is None


def test_a_text_read_twice_costs_far_less_the_second_time(path, tmp_path, capsys):
    words = "abcdefgh"
    line = "".join(words[i] for i in np.random.randint(8, size=150)).encode()
    (tmp_path / "text").write_bytes(line + b"\n" + line + b"\n")
    costs = []
    for options in ("", "--dynamic sgd --dynamic-lr 0.5 --dynamic-segment 5"):
        run("score --cpu --per-line --path", path, tmp_path / "text", options)
        lines = capsys.readouterr().out.splitlines()
        costs.append([float(line.split("\t")[0]) for line in lines[:2]])
    (_, static), (first, second) = costs
    assert second < min(first, static) - 0.3
    assert "dynamic evaluation, SGD" in lines[2]


def test_statistics_are_collected_once_and_belong_to_one_model(data, path, tmp_path, capsys):
    own = tmp_path / "checkpoint.pt"
    shutil.copy(path, own)
    statistics = tmp_path / "checkpoint.pt.dynamic.npz"
    (tmp_path / "text").write_bytes(text(100))
    score = ["score", tmp_path / "text", "--cpu", RMS_OPTIONS, "--dynamic-segment 20", "--path"]
    assert main([str(word) for part in score for word in str(part).split()] + [str(own)]) == 1
    assert "no such file; collect statistics" in capsys.readouterr().err
    words = ["evaluate", data, "--cpu", RMS_OPTIONS, "--path", own]
    run(*words, FEW)
    out, written = capsys.readouterr().out, statistics.read_bytes()
    run(*words, FEW)
    assert capsys.readouterr().out == out and statistics.read_bytes() == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", statistics.name, "text"]
    run(*score, own)
    with np.load(statistics, allow_pickle=False) as file:
        assert any("value_gate.seed" in name for name in file.files)  # not collapsed

    def refuses(message, *words):
        capsys.readouterr()
        assert main([str(word) for part in words for word in str(part).split()]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    refuses("segment length 20, not 21", *words, FEW.replace("segment 20", "segment 21"))
    refuses("streams 2, not 4", *words, FEW.replace("streams 2", "streams 4"))
    refuses(
        "statistics with checkpoint",
        *words,
        FEW,
        "--dynamic-statistics",
        statistics,
        "--model-overrides {'dropout_output':0.5}",
    )
    for content in (b"", written[:500], written[:-200] + b"x" * 200, pickled(tmp_path)):
        statistics.write_bytes(content)
        refuses("damaged", *words, FEW)


def pickled(folder):
    np.savez(folder / "code.npz", settings=np.array({"a": 1}, dtype=object))
    content = (folder / "code.npz").read_bytes()
    (folder / "code.npz").unlink()
    return content


@pytest.mark.parametrize(
    "options, named",
    [
        ("--dynamic sgd", "needs --dynamic-lr"),
        ("--dynamic-lr 0.1", "--dynamic-lr: needs --dynamic sgd or rms"),
        ("--dynamic sgd --dynamic-lr 0.1 --dynamic-epsilon 1", "needs --dynamic rms"),
        ("--dynamic sgd --dynamic-lr 0.1 --statistics-streams 3", "needs --dynamic rms"),
        ("--dynamic sgd --dynamic-lr nan", "--dynamic-lr nan"),
        ("--dynamic sgd --dynamic-lr -1", "--dynamic-lr -1.0"),
        ("--dynamic sgd --dynamic-lr 0.1 --dynamic-decay 2", "--dynamic-decay 2.0"),
        ("--dynamic rms --dynamic-lr 0.1 --dynamic-epsilon 0", "--dynamic-epsilon 0"),
        ("--dynamic sgd --dynamic-lr 0.1 --dynamic-segment 0", "--dynamic-segment 0"),
        ("--dynamic rms --dynamic-lr 0.1 --statistics-streams 0", "--statistics-streams 0"),
        ("--dynamic sgd --dynamic-lr 0.1 --fit-temperature valid", "--fit-temperature"),
        ("--dynamic sgd --dynamic-lr 0.1 --context-window 10", "--context-window"),
    ],
)
def test_wrong_options_are_named(data, path, capsys, options, named):
    words = ["evaluate", data, "--path", str(path), "--cpu", *options.split()]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert named in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_tuning_reports_the_grid_and_its_choice_serves_the_other_commands(
    data, path, tmp_path, capsys
):
    own, folder = tmp_path / "checkpoint.pt", tmp_path / "table"
    shutil.copy(path, own)
    words = ["tune-dynamic", data, "--path", own, "--cpu", "--tokens 200", FEW, "--dynamic rms sgd"]
    words += ["--dynamic-lr 0.001 0.1 1e9", "--dynamic-decay 0 0.01", "--score test"]
    run(*words, "--out", folder, "--name small")
    out = capsys.readouterr().out
    (row,) = [json.loads(p.read_text()) for p in folder.glob("*.json")]
    assert row["model"] == "small" and row["split"] == "test" and row["tuned_on"] in out
    for rule in ("sgd", "rms"):
        figures = row[rule]
        points = {(lr, decay): bits for lr, decay, bits in figures["grid"]}
        rates = [(lr, decay) for lr in (0.001, 0.1, 1e9) for decay in (0, 0.01)]
        assert set(points) == {(0, 0), *rates}
        finite = {point: bits for point, bits in points.items() if np.isfinite(bits)}
        assert (figures["lr"], figures["decay"]) == min(finite, key=finite.get)
        choice = re.search(rf"best: (--dynamic {rule} [^(\n]*)", out)[1]
        assert choice.startswith(f"--dynamic {rule} --dynamic-lr {figures['lr']:g}")
        run("evaluate", data, "--path", own, "--cpu --json", tmp_path / rule, choice)
        score = json.loads((tmp_path / rule).read_text())["dynamic"]
        assert score["nats"] == figures["nats"] and score["policy"] == figures["policy"]
    assert row["rms"]["nats"] < row["static"]["nats"]
    header, _, line = (folder / "table.md").read_text().splitlines()
    cells = dict(zip(header.split(" | "), line.split(" | ")))
    for kind, title in (("static", "static"), ("sgd", "SGD"), ("rms", "RMS")):
        assert cells[f"bits per byte, {title}"] == f"{row[kind]['bits_per_byte']:.3f}"
    capsys.readouterr()
    words = ["tune-dynamic", data, "--path", path, "--dynamic", "sgd", "--score", "test"]
    assert main([*map(str, words), "--dynamic-segment", "21", "--out", str(folder)]) == 1
    assert "small.json: is of split test and segments of 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rates, best, warning",
    [
        ((0.1, 0.2, 0.3), 0.2, ""),
        ((0.1, 0.2, 0.3), 0.1, " (the end of the grid; try smaller rates)"),
        ((0.1, 0.2, 0.3), 0.3, " (the end of the grid; try larger rates)"),
        ((0.1,), 0.1, " (the end of the grid; try smaller and larger rates)"),
        ((0.1, 0.2), 0.0, ""),
        ((), 0.0, ""),
    ],
)
def test_best_rate_at_an_end_of_the_grid_is_said(rates, best, warning):
    bits = {(rate, 0.0): 1.0 for rate in (0.0, *rates)}
    assert tune_dynamic.at_the_end((best, 0.0), bits) == warning


def test_choice_for_windows_names_their_context(data, tmp_path, capsys):
    options = options_of(FAMILIES["rotary_transformer"])
    done = command("fairseq-train", data, f"{options} --max-update 5 --save-dir {tmp_path}")
    assert done.returncode == 0, done.stdout
    model = [data, "--path", tmp_path / "checkpoint_last.pt", "--cpu"]
    words = "--dynamic sgd --dynamic-lr 0.01 --dynamic-decay 0 --dynamic-segment 7"
    words += " --context-window 12 --tokens 90 --score test --name windows --out"
    run("tune-dynamic", *model, words, tmp_path / "figures")
    choice = re.search(r"best: (--dynamic [^(]*)", capsys.readouterr().out)[1]
    run("evaluate", *model, choice, "--tokens-per-sample 20 --json", tmp_path / "score.json")
    (tuned,) = [json.loads(p.read_text()) for p in (tmp_path / "figures").glob("*.json")]
    score = json.loads((tmp_path / "score.json").read_text())["dynamic"]
    assert score["nats"] == tuned["sgd"]["nats"] and score["policy"] == tuned["sgd"]["policy"]


def test_what_is_missing_is_found_before_statistics_are_collected(data, path, tmp_path, capsys):
    words = [data, "--path", path, "--cpu", "--dynamic rms --dynamic-lr 0.1 --dynamic-statistics"]
    for name, options, named in (
        ("evaluate", f"{tmp_path}/rms.npz --split tset", "tset.idx: no such file"),
        ("tune-dynamic", f"{tmp_path}/none/rms.npz", "rms.npz: its folder is missing"),
    ):
        arguments = [name, *words, options]
        assert main([word for part in arguments for word in str(part).split()]) == 1
        captured = capsys.readouterr()
        assert named in captured.err and not captured.out
    assert not list(tmp_path.iterdir())


def test_wrong_statistics_are_found_before_tuning(data, path, tmp_path, capsys):
    (tmp_path / "statistics").write_bytes(b"no")
    words = ["tune-dynamic", data, "--path", path, "--cpu", "--dynamic", "sgd", "rms"]
    words += ["--dynamic-statistics", tmp_path / "statistics", "--score", "test"]
    assert main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert "damaged" in captured.err and not captured.out


@pytest.mark.parametrize("content", ["[]", '{"model": "a"}', "{", "\xff"])
def test_table_is_not_made_of_other_files(tmp_path, capsys, content):
    """Which is said before the model is loaded."""
    (tmp_path / "other.json").write_bytes(content.encode("latin-1"))
    words = ["tune-dynamic", "none", "--path", "none.pt", "--cpu", "--dynamic", "sgd"]
    assert main([*words, "--score", "test", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "other.json: not figures of tune-dynamic" in captured.err and not captured.out


@pytest.mark.parametrize(
    "options, named",
    [
        ("--tune-split test", "test is not for tuning"),
        ("--score valid", "is what the rates are tuned on"),
        ("--out folder", "name it with --score"),
        ("--tokens 0", "--tokens 0"),
    ],
)
def test_tuning_on_what_is_scored_is_refused(data, path, capsys, options, named):
    words = ["tune-dynamic", data, "--path", str(path), "--cpu", "--dynamic", "sgd"]
    assert main([*words, *options.split()]) == 1
    assert named in capsys.readouterr().err
