"""AWD-LSTM and AWD-QRNN against numbers of the published implementation, and against themselves."""

import re
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.awd_lstm import AWDLSTMConfig, AWDLSTMDecoder
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.published_weights import PublishedWeights, num_layers
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import VOCABULARY, check_cuts, check_one_token_at_a_time, randomise

CASES = {
    **{f"lstm, {name}": case for name, case in golden_cases("awd_lstm").items()},
    **{f"qrnn, {name}": c for name, c in golden_cases("qrnn").items() if "tokens" in c},
}


def prepare(weights, settings):
    """The wrapper for dropped weights adds to the names. With an adaptive softmax the reference has
    one table and one bias for all bands; its vectors of the bands are in reversed order."""
    prepared = {}
    edges = settings.get("cutoffs", [])
    for name, value in weights.items():
        name = re.sub(r"_raw$", "", name.replace("module.", ""))
        if name.startswith("crit."):
            value = value.flip(0)
        if name in ("encoder.weight", "decoder.bias"):
            for i, part in enumerate(value.tensor_split(edges)):
                prepared[f"{name}.{i}"] = part
        else:
            prepared[name] = value
    return prepared


def sizes(weights):
    layers = num_layers(weights, "rnns")
    width = weights["encoder.weight.0"].size(1)
    qrnn = "rnns.0.linear.weight" in weights
    maps, bias = (3, "linear.bias") if qrnn else (4, "bias_ih_l0")
    found = {
        "cell": "qrnn" if qrnn else "lstm",
        "width": width,
        "hidden_width": len(weights[f"rnns.0.{bias}"]) // maps,
        "num_layers": layers,
    }
    if qrnn:
        found["qrnn_window"] = weights["rnns.0.linear.weight"].size(1) // width
    return found


def bands_of(table, bias):
    tails = {f"{table[0]}.{i}": f"{table[1]}.tail_weights.{i - 1}" for i in (1, 2)}
    tails.update({f"{bias[0]}.{i}": f"{bias[1]}.tail_biases.{i - 1}" for i in (1, 2)})
    return {f"{table[0]}.0": f"{table[1]}.weight", f"{bias[0]}.0": f"{bias[1]}.bias", **tails}


#: The published code comes without weights that anyone could import: these names serve this test.
FAMILY = replace(
    FAMILIES["awd_lstm"],
    published=PublishedWeights(
        layer_prefix="rnns",
        whole_names={
            **bands_of(("encoder.weight", "embedding"), ("decoder.bias", "head")),
            "crit.tail_vectors": "head.cluster_weight",
            "crit.tail_bias": "head.cluster_bias",
        },
        layer_names={
            **{
                f"{kind}_{of}_l0": f"cell.{kind}_{of}_l0"
                for kind in ("weight", "bias")
                for of in ("ih", "hh")
            },
            "linear": "cell.input",
        },
        vocabulary=("embedding.weight", "head.bias"),
        sizes=sizes,
        prepare=prepare,
    ),
)

#: The reference's names of dropouts where they differ from ours.
EMBEDDING = {"embed": "embedding"}


def golden_model(case):
    """The decoder of a golden case, and how much its tokens are shifted."""
    settings = {k[len("setting/") :]: v for k, v in case.items() if k.startswith("setting/")}
    fields = {}
    for name, value in settings.items():
        if name.startswith("dropout_"):
            kind = name[len("dropout_") :]
            fields[f"dropout_{EMBEDDING.get(kind, kind)}"] = float(value)
    if "alpha" in settings:
        fields["activation_penalty"] = float(settings["alpha"])
        fields["temporal_penalty"] = float(settings["beta"])
    if "splits" in settings:
        fields["cutoffs"] = settings["splits"].tolist()
    model = golden.build(FAMILY, AWDLSTMDecoder, case, **fields)
    return model, fields, model.bands.first if model.bands else 0


def replay_masks(monkeypatch, case, segment):
    """Have dropout take the masks of a segment, in the order in which the reference draws them, and
    return the list of those that are left."""
    layers = num_layers(golden.parameters(case), "rnns")
    kinds = ["embed", "input"]
    for layer in range(layers):
        kinds += [f"weight{layer}", f"hidden{layer}" if layer < layers - 1 else "output"]
    left = [kind for kind in kinds if f"mask/{segment}/{kind}" in case]

    def replay(x, p, training=True, shared=()):
        if not training or p == 0:
            return x
        kind = left.pop(0)
        mask = case[f"mask/{segment}/{kind}"]
        rate = float(case[f"setting/dropout_{kind.rstrip('0123456789')}"])
        assert p == pytest.approx(rate)
        assert list(mask.shape) == [1 if i in shared else n for i, n in enumerate(x.shape)]
        return x * mask / (1 - p)

    for module in ("models.segment_decoder", "models.awd_lstm", "modules.cells"):
        monkeypatch.setattr(f"fairseq_sha.{module}.dropout", replay)
    return left


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_model(name, monkeypatch):
    """Losses, regularisers, states and gradients, under the published masks where there are any."""
    case = CASES[name]
    model, fields, shift = golden_model(case)
    pieces = list(golden.segments(case["tokens"].t() + shift, case["segments"]))
    for i, (inputs, targets) in enumerate(pieces):
        left = replay_masks(monkeypatch, case, i)
        losses, extra = model.train()(inputs, segment=f"train:1:{i}", targets=targets)
        assert not left
        expected = case[f"nll{i}"].t()
        torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
        regularisers = extra["auxiliary_losses"]
        assert set(regularisers) == {n for n in ("ar_loss", "tar_loss") if f"{n}{i}" in case}
        for kind, value in regularisers.items():
            torch.testing.assert_close(value, case[f"{kind}{i}"], atol=1e-4, rtol=1e-4)
        total = losses.mean() + sum(regularisers.values())
        if regularisers:
            torch.testing.assert_close(total, case[f"loss{i}"], atol=1e-4, rtol=0)
    total.backward()
    golden.check_gradients(model, case, FAMILY, **fields)
    state = model.carried._latest["train", True].state
    assert len(state) == len(model.layers)
    for layer, tensors in enumerate(state):
        for key, value in tensors.items():
            theirs = {"x": f"prev_x/{layer}", "c": f"hidden/{layer}/c", "h": f"hidden/{layer}/h"}
            reference = case[f"hidden/{layer}" if "x" in state[0] and key == "c" else theirs[key]]
            torch.testing.assert_close(value[0], reference, atol=1e-4, rtol=0)


def decoder(**fields):
    small = dict(width=8, hidden_width=12, num_layers=3)
    cfg = OmegaConf.structured(AWDLSTMConfig(**{**small, **fields}))
    return AWDLSTMDecoder(cfg, dictionary_of(VOCABULARY))


VARIANTS = [{}, dict(cell="qrnn"), dict(cell="qrnn", qrnn_window=1), dict(cutoffs=[7, 15])]


# (With bands, a segment gives features, and generation logits.)
@pytest.mark.parametrize("fields", VARIANTS[:-1])
def test_one_token_at_a_time_equals_the_segment_pass(fields):
    check_one_token_at_a_time(randomise(decoder(**fields)).eval(), 12, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS)
def test_cutting_otherwise_changes_nothing(fields):
    check_cuts(randomise(decoder(**fields)).eval(), [24], [7, 1, 2, 14], atol=1e-4, rtol=1e-4)


def num_parameters(name, symbols, **fields):
    cfg = FAMILIES["awd_lstm"].architectures[name](**fields)
    with torch.device("meta"):
        model = AWDLSTMDecoder(OmegaConf.structured(cfg), dictionary_of(symbols))
    return sum(parameter.numel() for parameter in model.parameters())


def test_named_architectures_have_the_published_sizes():
    assert num_parameters("awd_lstm_enwik8", 205) == 47_270_045
    assert num_parameters("awd_lstm_wt2", 33_278) == 33_556_078
    # Symbols before </s> have no rows in an adaptive embedding.
    first = dictionary_of(0).eos()
    assert num_parameters("awd_qrnn_wt103", first + 267_735) == 153_886_638
    assert num_parameters("awd_qrnn_wt103", first + 267_735, qrnn_window=1) == 150_886_638


def test_dropout_of_activations_has_one_mask_for_all_steps():
    kinds = "input", "hidden", "output"
    model = decoder(**{f"dropout_{kind}": 0.5 for kind in kinds}, dropout_weight=0.0)
    tokens = torch.randint(4, VOCABULARY, (3, 20))
    done = model._read(tokens.t(), None, True)
    first, *_ = done.hidden
    for h in (model.embed(tokens.t(), True), first, done.features):
        dropped = h == 0
        assert torch.equal(dropped, dropped[:1].expand_as(dropped))
        assert 0.2 < dropped.float().mean() < 0.8
    assert (done.hidden[-1] != 0).all()
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_starts_as_the_published_code():
    model = decoder(width=200, hidden_width=100, cutoffs=[7, 15])
    for weight in model.embedding.weights:
        assert weight.abs().max() <= 0.1 and weight.std().item() == pytest.approx(0.058, rel=0.1)
    assert not any(p.any() for n, p in model.head.named_parameters() if "bias" in n)
    assert not model.head.cluster_weight.any()


def test_a_segment_of_one_token_has_no_change():
    model = decoder(activation_penalty=2.0, temporal_penalty=1.0)
    tokens = torch.randint(4, VOCABULARY, (3, 1))
    _, extra = model(tokens, targets=tokens)
    losses = extra["auxiliary_losses"]
    assert losses["tar_loss"] == 0 and losses["ar_loss"] > 0


def test_only_models_with_regularisers_need_their_criterion():
    assert not decoder().has_auxiliary_losses
    assert decoder(activation_penalty=1.0).has_auxiliary_losses
    assert decoder(temporal_penalty=1.0).has_auxiliary_losses


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(hidden_width=0), "--hidden-width"),
        (dict(num_layers=0), "--num-layers"),
        (dict(qrnn_window=3), "--qrnn-window 3: must be 1 or 2"),
        (dict(dropout_weight=1.0), "--dropout-weight"),
        (dict(temporal_penalty=-1.0), "--temporal-penalty"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
