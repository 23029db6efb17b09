"""Recurrent highway networks against numbers of the published implementation, and against
themselves."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.published_weights import PublishedWeights, num_layers
from fairseq_sha.models.rhn import RHNConfig, RHNDecoder
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import VOCABULARY, check_cuts, check_one_token_at_a_time, randomise
from tests.models.masks import replay_masks

CASES = golden_cases("rhn")


def prepare(weights, settings):
    """The reference has a matrix [in, out] for each gate and micro-step; the first is of the input,
    too."""
    prepared = {name: value for name, value in weights.items() if "RHN" not in name}
    prepared["softmax_w"] = prepared["softmax_w"].t()
    for layer in range(num_layers({n.replace("RHN", "RHN."): 0 for n in weights}, "RHN")):
        prefix, gates = f"RHN{layer}.", ("h", "t")
        depth = sum(n.startswith(f"{prefix}h_") and n.endswith("Bias") for n in weights)

        def rows(kind, d, prefix=prefix, gates=gates):
            parts = [weights[f"{prefix}{gate}_{d}.{kind}"] for gate in gates]
            return torch.cat(parts, -1)

        width = rows("Bias", 0).numel() // 2
        matrices = [rows("Matrix", d).t() for d in range(depth)]
        prepared[f"RHN.{layer}.W"] = matrices[0][:, :-width]
        prepared[f"RHN.{layer}.R"] = torch.stack([matrix[:, -width:] for matrix in matrices])
        prepared[f"RHN.{layer}.b"] = torch.stack([rows("Bias", d) for d in range(depth)])
    return prepared


def sizes(weights):
    depth, _, width = weights["RHN.0.R"].shape
    return {
        "width": width,
        "depth": depth,
        "embedding_width": weights["embedding"].size(1),
        "num_layers": num_layers(weights, "RHN"),
    }


#: The published code comes without weights that anyone could import: these names serve this test.
FAMILY = replace(
    FAMILIES["rhn"],
    published=PublishedWeights(
        layer_prefix="RHN",
        whole_names={
            "embedding": "embedding.weight",
            "softmax_w": "head.weight",
            "softmax_b": "head.bias",
        },
        layer_names={"W": "input.weight", "R": "weights", "b": "biases"},
        vocabulary=("embedding.weight", "head.weight", "head.bias"),
        sizes=sizes,
        prepare=prepare,
    ),
)

#: Our names of the reference's dropouts.
DROPOUTS = {"x": "token", "i": "input", "h": "hidden", "o": "output"}


def golden_decoder(case):
    assert not case["setting/tied"]
    dropouts = {
        f"dropout_{ours}": float(case[f"setting/dropout_{theirs}"])
        for theirs, ours in DROPOUTS.items()
        if f"setting/dropout_{theirs}" in case
    }
    model = golden.build(FAMILY, RHNDecoder, case, **dropouts)
    assert len(model.layers) == case["setting/num_layers"]
    assert all(len(layer.weights) == case["setting/depth"] for layer in model.layers)
    return model


def masks_of(case, segment, tokens):
    """The reference's masks in the order in which our decoder draws them, and their rates."""
    if f"mask/{segment}/x" not in case:
        return
    mask = {kind: case[f"mask/{segment}/{kind}"] for kind in DROPOUTS}
    rate = {kind: float(case[f"setting/dropout_{kind}"]) for kind in DROPOUTS}
    of_symbols = torch.zeros(len(case["param/embedding"]), len(tokens), dtype=torch.bool)
    for stream, row in enumerate(tokens):
        for token, kept in zip(row, mask["x"][stream, :, 0]):
            of_symbols[token, stream] = kept
        assert torch.equal(of_symbols[row, stream], mask["x"][stream, :, 0])  # equal tokens share
    yield of_symbols, rate["x"]
    for layer in range(mask["i"].size(2)):
        yield mask["i"][None, :, :, layer], rate["i"]
        yield mask["h"][:, :, layer], rate["h"]
    yield mask["o"].transpose(0, 1), rate["o"]


@pytest.mark.parametrize("name", CASES)
def test_equals_published_code(name, monkeypatch):
    case = CASES[name]
    model = golden_decoder(case)
    for i, (tokens, targets) in enumerate(golden.segments(case["tokens"].t(), case["segments"])):
        model.zero_grad()
        with replay_masks(monkeypatch, masks_of(case, i, tokens), "rhn"):
            nll = golden.token_losses(model(tokens, segment=f"train:1:{i}")[0], targets)
        torch.testing.assert_close(nll.t(), case[f"nll{i}"], atol=1e-4, rtol=0)
        # The published objective is a sum over time, to which its rates and norms refer.
        torch.testing.assert_close(nll.sum() / len(nll), case[f"train_loss{i}"], atol=1e-3, rtol=0)
        nll.mean().backward()
    golden.check_gradients(model, case, FAMILY)
    for layer, state in enumerate(model.carried.training_state()["state"]):
        torch.testing.assert_close(state["s"][0], case[f"state/{layer}"], atol=1e-4, rtol=0)


def decoder(**fields):
    small = dict(width=12, embedding_width=8, num_layers=2, depth=3)
    cfg = OmegaConf.structured(RHNConfig(**{**small, **fields}))
    return RHNDecoder(cfg, dictionary_of(VOCABULARY))


@pytest.mark.parametrize(
    "name, count", [("rhn_enwik8", 45_994_730), ("rhn_enwik8_small", 20_677_230)]
)
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        cfg = OmegaConf.structured(FAMILY.architectures[name]())
        model = RHNDecoder(cfg, dictionary_of(205))
    assert sum(p.numel() for p in model.parameters()) == count


def test_one_token_at_a_time_equals_the_segment_pass():
    check_one_token_at_a_time(randomise(decoder()).eval(), 20)


def test_cutting_otherwise_changes_nothing():
    check_cuts(randomise(decoder()).eval(), [24], [7, 1, 2, 14])


def test_dropped_tokens_are_dropped_wherever_they_occur_in_a_stream():
    model = decoder(dropout_token=0.5)
    tokens = torch.randint(VOCABULARY, (60, 4))
    dropped = (model.embed(tokens, training=True) == 0).all(2)
    assert 0.3 < dropped.float().mean() < 0.7
    differs = False
    for token in range(VOCABULARY):
        found = [dropped[tokens[:, b] == token, b].tolist() for b in range(4)]
        assert all(len(set(stream)) <= 1 for stream in found)
        differs |= len({stream[0] for stream in found if stream}) == 2
    assert differs
    assert not (model.embed(tokens, training=False) == 0).any()


def test_initial_weights_are_the_published_ones():
    model = decoder(width=64)
    for layer in model.layers:
        assert (layer.biases[:, 64:] == -4).all()
        assert 0.03 < layer.biases[:, :64].abs().max() <= 0.04
    for weight in (model.layers[0].weights, model.embedding.weight, model.head.weight):
        assert 0.039 < weight.abs().max() <= 0.04
    assert 0.02 < model.head.bias.abs().max() <= 0.04


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(embedding_width=0), "--embedding-width"),
        (dict(num_layers=0), "--num-layers"),
        (dict(depth=0), "--depth"),
        (dict(init_range=-1.0), "--init-range"),
        (dict(dropout_token=1.0), "--dropout-token"),
        (dict(l2_penalty=-1.0), "--l2-penalty"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
