"""SRU++ against numbers of the published implementation, and against itself."""

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.srupp import SRUppConfig, SRUppDecoder
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import check_cuts, check_one_token_at_a_time, randomise, record_dropout

CASES = golden_cases("srupp")
FAMILY = FAMILIES["srupp"]


def decoder(vocabulary=29, **fields):
    small = dict(width=24, projection=12, num_layers=3, n_head=2, eval_unroll=9, dropout=0)
    cfg = OmegaConf.structured(SRUppConfig(**{**small, "dropatt": 0, **fields}))
    return SRUppDecoder(cfg, dictionary_of(vocabulary))


def golden_decoder(case):
    return golden.build(
        FAMILY,
        SRUppDecoder,
        case,
        n_head=int(case["setting/n_head"]),
        attn_every_n_layers=int(case["setting/attn_every_n_layers"]),
        layer_norm=bool(case["setting/layer_norm"]),
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_published_code(name):
    case = CASES[name]
    model = golden_decoder(case)
    for i, (tokens, targets) in enumerate(golden.segments(case["tokens"].t(), case["segments"])):
        model.zero_grad()
        nll = golden.token_losses(model(tokens, segment=f"train:1:{i}")[0], targets)
        torch.testing.assert_close(nll.t(), case[f"nll{i}"], atol=1e-4, rtol=0)
        nll.mean().backward()
    golden.check_gradients(model, case, FAMILY)
    state = model.carried.training_state()["state"]
    last = torch.cat([layer["c"] for layer in state])
    torch.testing.assert_close(last, case["state"], atol=1e-4, rtol=0)
    attends = [i % int(case["setting/attn_every_n_layers"]) == 0 for i in range(1, len(state) + 1)]
    assert ["memory" in layer for layer in state] == attends


@pytest.mark.parametrize(
    "name, millions", [("srupp_enwik8_base", 108), ("srupp_enwik8_large", 195)]
)
def test_parameter_counts_of_the_paper(name, millions):
    cfg = FAMILY.architectures[name]
    with torch.device("meta"):
        model = SRUppDecoder(OmegaConf.structured(cfg()), dictionary_of(205))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)


def test_one_token_at_a_time_equals_the_segment_pass():
    model = randomise(decoder(attn_every_n_layers=2)).eval()
    check_one_token_at_a_time(model, 20)  # longer than eval_unroll


def test_cutting_an_evaluation_otherwise_changes_nothing():
    check_cuts(randomise(decoder()).eval(), [30], [9, 9, 9, 3], [4, 13, 13])


def test_memory_is_the_segment_before_in_training_and_bounded_in_evaluation():
    model = decoder(eval_unroll=9)
    for training, expected in ((True, [7, 4, 6]), (False, [7, 9, 9])):
        model.train(training)
        for index, length in enumerate((7, 4, 6)):
            logits, _ = model(torch.randint(29, (2, length)), segment=f"train:1:{index}")
            if training:
                logits.sum().backward()  # would fail through the graph of the segment before
            kept = model.carried._latest["train", training].state
            assert [len(layer["memory"]) for layer in kept] == [expected[index]] * 3
            assert not any(t.requires_grad for layer in kept for t in layer.values())
    for index, length in enumerate((7, 4, 6)):
        with torch.no_grad():
            model(torch.randint(29, (2, length)), segment=f"valid:1:{index}")
        for layer in model.carried._latest["valid", False].state:
            rows = {key: len(tensor) for key, tensor in layer.items()}
            assert rows == {"c": 1, **dict.fromkeys(("keys", "values"), [7, 9, 9][index])}


def test_dropout_falls_where_the_paper_has_it(monkeypatch):
    modules = ("models.srupp", "models.segment_decoder", "ops.attention")
    seen = record_dropout(monkeypatch, *modules)
    model = decoder(num_layers=2, dropout=0.1, dropatt=0.2)
    model(torch.randint(29, (3, 5)))
    wide, weights, narrow = ((5, 3, 24), 0.1), ((6, 5, 5), 0.2), ((5, 3, 12), 0.1)
    # The mask of the recurrence is shared by the segment, and off in the last layer.
    assert seen == [wide, weights, narrow, ((3, 24), 0.1), weights, narrow, wide]
    seen.clear()
    model.eval()(torch.randint(29, (3, 5)))
    assert seen == []


def test_initial_weights_are_the_published_ones():
    model = decoder(width=256, projection=64, dropout=0.19)
    layer = model.layers[0]
    assert layer.alpha.item() == 0 and not layer.bias[0].any() and (layer.bias[1] == -2).all()
    assert 0.9 < layer.weight.abs().max() <= 1
    for weight, bound in (
        (layer.project.weight, (6 / (256 + 64)) ** 0.5),
        (layer.expand.weight, 0.9 * (6 / (3 * 256 + 64)) ** 0.5),
        (model.embedding.weight, (3 / 256) ** 0.5),
        (model.head.weight, (3 / 256) ** 0.5),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not model.head.bias.any()


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(projection=0), "--projection"),
        (dict(n_head=5), "--n-head 5"),
        (dict(attn_every_n_layers=0), "--attn-every-n-layers"),
        (dict(eval_unroll=0), "--eval-unroll"),
        (dict(dropout=1.0), "--dropout"),
        (dict(dropatt=-0.1), "--dropatt"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
