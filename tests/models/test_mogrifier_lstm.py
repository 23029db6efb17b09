"""The Mogrifier LSTM against numbers of the published implementation, and against itself."""

import re
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.mogrifier_lstm import MogrifierLSTMConfig, MogrifierLSTMDecoder
from fairseq_sha.models.published_weights import PublishedWeights, num_layers
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import check_cuts, check_one_token_at_a_time, randomise
from tests.models.masks import replay_masks

CASES = golden_cases("mogrifier")


def prepare(weights, settings):
    """The reference's matrices are [in, out], and the columns of the gates are j, o, f and i."""
    prepared = {}
    for name, value in weights.items():
        value = value.squeeze(0) if name == "softmax_bias" else value
        transposed = name.endswith(("W", "kernel", "weight_a", "weight_b", "softmax_weights"))
        prepared[name] = value.t().contiguous() if transposed else value
    for layer in range(num_layers(prepared, "cell")):
        cell = f"cell.{layer}."
        gates = [gate for gate in "jfio" if f"{cell}B_{gate}" in prepared]
        bias = torch.cat([prepared.pop(f"{cell}B_{gate}") for gate in gates])
        rows = prepared.pop(f"{cell}W").chunk(len(gates))
        order = [gate for gate in "jofi" if gate in gates]
        weight = torch.cat([rows[order.index(gate)] for gate in gates])
        hidden = len(bias) // len(gates)
        prepared[f"{cell}W_x"] = weight[:, :-hidden]
        prepared[f"{cell}W_h"] = weight[:, -hidden:]
        prepared[f"{cell}B"] = bias
    return {
        re.sub(r"fm_(\d+)[_.](?=weight|bias|kernel)", r"fm_\1.", name): value
        for name, value in prepared.items()
    }


def sizes(weights):
    width = weights["softmax_weights"].size(1)
    return {
        "width": width,
        "embedding_width": weights["embedding"].size(1),
        "num_layers": num_layers(weights, "cell"),
    }


ROUNDS = range(8)
#: The published code saves no weights that anyone could import: these names serve this test.
FAMILY = replace(
    FAMILIES["mogrifier_lstm"],
    published=PublishedWeights(
        layer_prefix="cell",
        whole_names={
            "embedding": "embedding.weight",
            "softmax_weights": "head.weight",
            "softmax_bias": "head.bias",
        },
        layer_names={
            "W_x": "input.weight",
            "W_h": "hidden.weight",
            "B": "input.bias",
            **{f"fm_{r}.kernel": f"rounds.{r}.up.weight" for r in ROUNDS},
            **{f"fm_{r}.weight_a": f"rounds.{r}.down.weight" for r in ROUNDS},
            **{f"fm_{r}.weight_b": f"rounds.{r}.up.weight" for r in ROUNDS},
            **{f"fm_{r}.bias": f"rounds.{r}.up.bias" for r in ROUNDS},
        },
        vocabulary=("embedding.weight", "head.weight", "head.bias"),
        sizes=sizes,
        prepare=prepare,
    ),
)


def golden_decoder(case):
    coupled, capped = (bool(case[f"setting/{name}"]) for name in ("tie_gates", "cap_input_gate"))
    dropouts = {
        f"dropout_{ours}": float(case[f"setting/dropout_{theirs}"])
        for ours, theirs in (
            ("input", "input"),
            ("inter_layer", "inter_layer"),
            ("state", "state"),
        )
        if f"setting/dropout_{theirs}" in case
    }
    return golden.build(
        FAMILY,
        MogrifierLSTMDecoder,
        case,
        rounds=int(case["setting/feature_mask_rounds"]),
        rank=int(case["setting/feature_mask_rank"]),
        input_gate="coupled" if coupled else "capped" if capped else "free",
        sum_layers=bool(case["setting/skip_connection"]),
        **dropouts,
    )


def masks_of(case, segment):
    """The reference's masks in the order in which our decoder draws them, and their rates."""
    layers = [name for name in case if name.startswith(f"mask/{segment}/state.")]
    for layer in range(len(layers)):
        kind = "inter_layer" if layer else "input"
        yield case[f"mask/{segment}/input.{layer}"], float(case[f"setting/dropout_{kind}"])
        yield case[f"mask/{segment}/state.{layer}"], float(case["setting/dropout_state"])


@pytest.mark.parametrize("name", CASES)
def test_equals_published_code(name, monkeypatch):
    case = CASES[name]
    model = golden_decoder(case)
    for i, (tokens, targets) in enumerate(golden.segments(case["tokens"].t(), case["segments"])):
        model.zero_grad()
        with replay_masks(monkeypatch, masks_of(case, i), "mogrifier_lstm"):
            nll = golden.token_losses(model(tokens, segment=f"train:1:{i}")[0], targets)
        torch.testing.assert_close(nll.t(), case[f"nll{i}"], atol=1e-4, rtol=0)
        nll.mean().backward()
    golden.check_gradients(model, case, FAMILY)
    for layer, state in enumerate(model.carried.training_state()["state"]):
        for key in "ch":
            expected = case[f"state/{layer}/{key}"]
            torch.testing.assert_close(state[key][0], expected, atol=1e-4, rtol=0)


def decoder(**fields):
    small = dict(width=12, num_layers=2, rounds=3, rank=2)
    cfg = OmegaConf.structured(MogrifierLSTMConfig(**{**small, **fields}))
    return MogrifierLSTMDecoder(cfg, dictionary_of(29))


@pytest.mark.parametrize(
    "name, count",
    [
        ("melis_lstm_enwik8", 47_994_278),
        ("mogrifier_lstm_enwik8", 47_982_446),
        ("melis_lstm_enwik8_96m", 95_958_506),
        ("mogrifier_lstm_enwik8_96m", 95_943_270),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    """And a width larger by one would exceed the budget."""
    cfg = FAMILY.architectures[name]()
    budget = round(count, -6)
    for width, fits in ((cfg.width, True), (cfg.width + 1, False)):
        with torch.device("meta"):
            settings = OmegaConf.structured(replace(cfg, width=width))
            model = MogrifierLSTMDecoder(settings, dictionary_of(206))
        counted = sum(p.numel() for p in model.parameters())
        assert (counted <= budget) == fits
        assert not fits or counted == count


def test_one_token_at_a_time_equals_the_segment_pass():
    check_one_token_at_a_time(randomise(decoder()).eval(), 20)


@pytest.mark.parametrize("fields", [{}, {"rounds": 0}, {"input_gate": "coupled", "rank": 0}])
def test_cutting_otherwise_changes_nothing(fields):
    check_cuts(randomise(decoder(**fields)).eval(), [24], [7, 1, 2, 14])


def test_initial_weights_are_the_published_ones():
    model = decoder(width=256, embedding_width=64, rank=16)
    layer = model.layers[0]

    def is_cut(weight, std):
        # The standard deviation of a normal distribution that is cut at two of them is 0.88.
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.1)
        assert weight.abs().max() <= 2 * std

    is_cut(layer.input.weight, (1.3 / 64) ** 0.5)
    is_cut(layer.hidden.weight, (1.3 / 256) ** 0.5)
    j, f, i, o = layer.input.bias.chunk(4)
    for bias in (j, f - 1, i, o):
        is_cut(bias, (1.3 / 256) ** 0.5)
    is_cut(layer.rounds[0].down.weight, (256 * 16) ** -0.25)
    is_cut(layer.rounds[0].up.weight, (256 * 16) ** -0.25)
    is_cut(layer.rounds[1].up.weight, (64 * 16) ** -0.25)
    assert not layer.rounds[0].up.bias.any() and not model.head.bias.any()
    is_cut(model.embedding.weight, (1.3 / 64) ** 0.5)
    is_cut(model.head.weight, (1.3 / 256) ** 0.5)


def test_penalty_is_on_all_weights():
    model = decoder(l2_penalty=0.3)
    tokens = torch.randint(29, (2, 5))
    _, extra = model(tokens, targets=tokens)
    squares = sum(float(p.detach().pow(2).sum()) for p in model.parameters())
    assert extra["auxiliary_losses"]["l2_loss"].item() == pytest.approx(0.15 * squares)
    assert model.has_auxiliary_losses and not decoder().has_auxiliary_losses
    assert decoder()(tokens, targets=tokens)[1]["auxiliary_losses"] == {}


def test_prediction_is_from_the_sum_of_layers_or_from_the_last():
    tokens = torch.randint(29, (2, 5))
    model = decoder().eval()
    done = model._read(tokens.t(), None, False)
    torch.testing.assert_close(done.features, done.hidden[0] + done.hidden[1])
    done = decoder(sum_layers=False).eval()._read(tokens.t(), None, False)
    assert torch.equal(done.features, done.hidden[1])


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(num_layers=0), "--num-layers"),
        (dict(rounds=-1), "--rounds"),
        (dict(rank=-1), "--rank"),
        (dict(cell_clip=-1.0), "--cell-clip"),
        (dict(dropout_state=1.0), "--dropout-state"),
        (dict(l2_penalty=-1.0), "--l2-penalty"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
