"""The Sparse Transformer against numbers of published code, and against itself."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.sparse_transformer import (
    SparseTransformerConfig,
    SparseTransformerDecoder,
    initial_deviations,
)
from fairseq_sha.ops.oracles import sparse_attention_reference, sparse_mask
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import VOCABULARY, check_cuts, check_one_token_at_a_time, randomise

CASES = {
    name: case
    for name, case in golden_cases("sparse_attention").items()
    if "setting/n_layer" in case
}
FAMILY = FAMILIES["sparse_transformer"]
PUBLISHED_NAMES = {
    r"we": "embedding.weight",
    r"pos_emb_0": "layers.0.positions.rows",
    r"pos_emb_1": "layers.0.positions.columns",
    r"final_norm\.g": "final_norm.weight",
    r"final_norm\.b": "final_norm.bias",
    r"gen_logits\.logits_proj": "head.weight",
    r"h(\d+)\.attn_input\.g": r"layers.\1.norm_attention.weight",
    r"h(\d+)\.attn_input\.b": r"layers.\1.norm_attention.bias",
    r"h(\d+)\.mlp\.g": r"layers.\1.norm_feed_forward.weight",
    r"h(\d+)\.mlp\.b": r"layers.\1.norm_feed_forward.bias",
    r"h(\d+)\.post_proj\.w": r"layers.\1.attention.output.weight",
    r"h(\d+)\.post_proj\.b": r"layers.\1.attention.output.bias",
    r"h(\d+)\.mlp_proj(\d)\.w": r"layers.\1.feed_forward.linear\2.weight",
    r"h(\d+)\.mlp_proj(\d)\.b": r"layers.\1.feed_forward.linear\2.bias",
    **{
        rf"h(\d+)\.{part[0]}_proj\.{end[0]}": rf"layers.\1.attention.{part}.{end}"
        for part in ("query", "key", "value")
        for end in ("weight", "bias")
    },
}
SMALL = dict(width=16, num_layers=3, n_head=4, d_inner=24, window=21, eval_stride=7, stride=6)
SMALL.update(summary=2, num_summaries=3, dropout=0.0, initial_weights="code")
PATTERNS = ["fixed", "strided", "dense"]


def decoder(**fields):
    cfg = OmegaConf.structured(SparseTransformerConfig(**{**SMALL, **fields}))
    return SparseTransformerDecoder(cfg, dictionary_of(VOCABULARY))


def our_name(name):
    for pattern, ours in PUBLISHED_NAMES.items():
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(ours)
    raise KeyError(name)


def ours(tensors):
    """The reference's tensors under our names; its matrices are transposed."""
    converted = {our_name(name): value for name, value in tensors.items()}
    matrices = r"layers\.\d+\.(attention|feed_forward)\..*weight|head\.weight"
    return {n: v.t() if re.fullmatch(matrices, n) else v for n, v in converted.items()}


class WithStart(SparseTransformerDecoder):
    """As in the authors' later code: what is read first is not a token but a vector, which has no
    position. The others have the positions that they would have without it."""

    def embed(self, tokens, training):
        positions = self.layers[0].positions
        h = super().embed(tokens, training)[1:] + positions(0, len(tokens) - 1)
        start = self.start.expand(1, tokens.size(1), -1)
        return torch.cat([start, h]) - positions(0, len(tokens))  # which the first layer adds


def config_of(case, weights):
    pattern = "fixed" if "setting/num_verts" in case else "strided"
    stride = int(case["setting/stride"])
    return SparseTransformerConfig(
        width=weights["we"].size(1),
        num_layers=int(case["setting/n_layer"]),
        n_head=int(case["setting/heads"]),
        d_inner=weights["h0.mlp_proj1.w"].size(1),
        window=stride * len(weights["pos_emb_0"]),
        eval_stride=stride,
        stride=stride,
        pattern=pattern,
        # Blocks of keys have one position: as many summaries as the mask has distinct heads.
        summary=int(case.get("setting/vertsize", 1)),
        num_summaries=int(case.get("setting/num_verts", 1)),
        initial_weights="code",
        dropout=0.0,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_equals_published_code(name, training):
    case = CASES[name]
    weights = golden.parameters(case)
    cfg = config_of(case, weights)
    if "mask/fixed_heads" in case:
        mask = sparse_mask(
            "fixed", cfg.window, cfg.n_head, cfg.stride, cfg.summary, cfg.num_summaries
        )
        assert torch.equal(mask, case["mask/fixed_heads"])
    else:  # local and strided in turn
        assert case["setting/modes"].tolist() == [1, 2]
    model = WithStart(OmegaConf.structured(cfg), dictionary_of(len(weights["we"])))
    start = weights.pop("sos_token.sos")
    model.load_state_dict(ours(weights))
    model.start = torch.nn.Parameter(start)
    model.train(training)
    targets = case["tokens"].t()
    tokens = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], 1)
    nll, _ = model(tokens, targets=targets)
    torch.testing.assert_close(nll.t(), case["nll0"], atol=1e-4, rtol=0)
    nll.mean().backward()
    expected = {k[len("grad/") :]: v for k, v in case.items() if k.startswith("grad/")}
    expected = {"start": expected.pop("sos_token.sos"), **ours(expected)}
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # changes no attention weight
            assert parameter.grad.abs().max() < 1e-6
            continue
        reference = expected.pop(name)
        bound = 1e-3 * reference.abs().max() + 1e-8
        assert (parameter.grad - reference).abs().max() <= bound, name
    assert not expected


@pytest.mark.parametrize("name", CASES)
def test_published_deviations_of_initial_weights(name):
    case = CASES[name]
    cfg = config_of(case, golden.parameters(case))
    deviations = initial_deviations(cfg)
    published = {k[len("init_std/") :]: v for k, v in case.items() if k.startswith("init_std/")}
    published.pop("sos_token.sos")
    for name, value in published.items():
        (ours,) = (std for end, std in deviations.items() if our_name(name).endswith(end))
        assert ours == pytest.approx(float(value), rel=1e-5), name


def test_initial_weights_of_the_paper():
    model = decoder(width=256, n_head=8, d_inner=1024, num_layers=2, initial_weights="paper")
    layer = model.layers[0]
    expected = {
        model.embedding.weight: 0.125 / 256**0.5,
        layer.positions.columns: 0.125 / 512**0.5,
        layer.attention.query.weight: 0.125 / 256**0.5,
        layer.attention.output.weight: 0.125 / 256**0.5 / 2,
        layer.feed_forward.linear1.weight: 0.125 / 256**0.5,
        layer.feed_forward.linear2.weight: 0.125 / 1024**0.5 / 2,
    }
    for tensor, deviation in expected.items():
        assert tensor.std().item() == pytest.approx(deviation, rel=0.05)
    assert not model.head.weight.any() and not layer.attention.query.bias.any()
    assert (layer.norm_attention.weight == 1).all()


def test_parameter_count_of_the_paper():
    """With a row for each of 256 bytes."""
    cfg = FAMILY.architectures["sparse_transformer_enwik8"]
    with torch.device("meta"):
        model = SparseTransformerDecoder(OmegaConf.structured(cfg()), dictionary_of(256))
    assert sum(p.numel() for p in model.parameters()) == 94_949_376


def by_hand(model, tokens, pattern):
    """Logits ``[T, B, V]`` of one window, with the scores of all pairs of positions."""
    stride = SMALL["stride"]
    h = model.embedding(tokens)
    positions = model.layers[0].positions
    h = h + torch.stack(
        [positions.rows[t // stride] + positions.columns[t % stride] for t in range(len(tokens))]
    ).unsqueeze(1)
    for i, layer in enumerate(model.layers):
        kind = pattern if pattern != "strided" else ("local", "strided")[i % 2]
        mask = sparse_mask(kind, len(tokens), 4, stride, SMALL["summary"], SMALL["num_summaries"])
        attention, x = layer.attention, layer.norm_attention(h)
        q, k, v = (
            linear(x).unflatten(-1, (4, -1))
            for linear in (attention.query, attention.key, attention.value)
        )
        a = attention.output(sparse_attention_reference(q, k, v, mask).flatten(2))
        inner = layer.feed_forward.linear1(layer.norm_feed_forward(h + a))
        b = layer.feed_forward.linear2(inner * torch.sigmoid(1.702 * inner))
        h = h + a + b
    return model.final_norm(h) @ model.head.weight.t()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [5, 21])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_model_written_out(pattern, length, training):
    model = randomise(decoder(pattern=pattern)).train(training)
    tokens = torch.randint(VOCABULARY, (2, length))

    def gradients(logits):
        model.zero_grad()
        logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = by_hand(model, tokens.t(), pattern).transpose(0, 1)
    actual = model(tokens)[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    for grad, wanted in zip(gradients(actual), gradients(expected)):
        bound = 1e-4 * wanted.abs().max().item() + 1e-6
        torch.testing.assert_close(grad, wanted, atol=bound, rtol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_token_at_a_time_equals_the_segment_pass(pattern):
    model = randomise(decoder(pattern=pattern)).eval()
    check_one_token_at_a_time(model, 40, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stride", [1, 7, 21])
def test_cutting_otherwise_changes_nothing(pattern, stride):
    model = randomise(decoder(pattern=pattern, eval_stride=stride)).eval()
    check_cuts(model, [40], [7, 1, 2, 14, 16], [20, 20], atol=1e-4, rtol=1e-4)


def test_a_position_reaches_every_other_one_before_it_by_two_steps():
    """With as many summaries as a block has parts, and with strides."""
    for masks in (
        [sparse_mask("fixed", 21, 4, 6, 2, 3).any(0)] * 2,
        [sparse_mask(kind, 21, 1, 6)[0] for kind in ("local", "strided")],
    ):
        reached = (masks[1].float() @ masks[0].float()) > 0
        assert reached.tril().equal(torch.ones(21, 21).tril().bool())


def test_dropout_is_where_the_paper_has_it(monkeypatch):
    """On what attention and feed-forward layers add, and nowhere else."""
    seen = []

    def spy(x, p, *args, **kwargs):
        seen.append((tuple(x.shape), p))
        return x

    for module in ("models.segment_decoder", "models.sparse_transformer", "modules.feed_forward"):
        monkeypatch.setattr(f"fairseq_sha.{module}.dropout", spy)
    decoder(dropout=0.4).train()(torch.randint(VOCABULARY, (5, 7)))
    assert [call for call in seen if call[1]] == [((7, 5, 16), 0.4)] * 6


@pytest.mark.parametrize("pattern", ["strided", "dense"])
def test_patterns_without_summaries_take_any_stride(pattern):
    decoder(pattern=pattern, stride=5, summary=3, num_summaries=4)


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(num_layers=0), "--num-layers"),
        (dict(n_head=3), "--n-head 3"),
        (dict(d_inner=0), "--d-inner"),
        (dict(window=0), "--window"),
        (dict(eval_stride=4), "--eval-stride 4: must divide --window 21"),
        (dict(stride=0), "--stride"),
        (dict(summary=4), "--summary 4: must divide --stride 6"),
        (dict(num_summaries=4), "--num-summaries 4: a block of --stride 6 has 3 parts"),
        (dict(dropout=1.0), "--dropout"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
