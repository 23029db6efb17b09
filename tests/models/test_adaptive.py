"""Adaptive input and softmax: against numbers of the published implementations, against fairseq's
modules, and against an obvious form."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.utils._python_dispatch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.models import heads
from fairseq_sha.models.embeddings import AdaptiveConfig, AdaptiveEmbedding, bands
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.heads import AdaptiveSoftmaxHead, SoftmaxHead
from fairseq_sha.models.sha_rnn import SHARNNDecoder
from fairseq_sha.models.srupp import SRUppDecoder
from fairseq_sha.models.transformer_xl import TransformerXLDecoder
from tests.conftest import dictionary_of, golden_cases
from tests.models import golden
from tests.models.helpers import randomise, record_dropout

TRANSFORMER_XL = golden_cases("transformer_xl_adaptive")
SRUPP = golden_cases("srupp_adaptive")
EOS = 2  # the first symbol with a row


def check_case(model, case, family, **fields):
    """Losses in token order, and the gradients of the last segment."""
    pieces = golden.segments(case["tokens"].t() + EOS, case["segments"])
    for i, (tokens, targets) in enumerate(pieces):
        model.zero_grad()
        nll, _ = model(tokens, segment=f"train:1:{i}", targets=targets)
        torch.testing.assert_close(nll.t(), case[f"nll{i}"], atol=1e-4, rtol=0)
        nll.mean().backward()
    golden.check_gradients(model, case, family, **fields)


@pytest.mark.parametrize("max_logits", [heads.MAX_LOGITS, 30])
@pytest.mark.parametrize("name", TRANSFORMER_XL)
def test_transformer_xl_equals_published_code(name, max_logits, monkeypatch):
    monkeypatch.setattr(heads, "MAX_LOGITS", max_logits)
    case, family = TRANSFORMER_XL[name], FAMILIES["transformer_xl"]
    fields = {
        "cutoffs": case["setting/cutoffs"].tolist(),
        "div_val": float(case["setting/div_val"]),
        "mem_len": int(case["setting/mem_len"]),
        "clamp_len": max(int(case["setting/clamp_len"]), 0),
        "same_length": bool(case["setting/same_length"]),
        "tied_projections": {(0, 1): "tails", (1, 1): "all", (0, 0): "none"}[
            tuple(case["setting/tie_projs"][:2].tolist())
        ],
    }
    model = golden.build(family, TransformerXLDecoder, case, **fields)
    check_case(model, case, family, **fields)


@pytest.mark.parametrize("name", SRUPP)
def test_srupp_equals_published_code(name):
    case, family = SRUPP[name], FAMILIES["srupp"]
    training = not case["setting/same_length"]
    fields = {
        "n_head": int(case["setting/n_head"]),
        "attn_every_n_layers": int(case["setting/attn_every_n_layers"]),
        "layer_norm": bool(case["setting/layer_norm"]),
        "eval_unroll": int(case["setting/mask_length"]),
    }
    model = golden.build(family, SRUppDecoder, case, **fields).train(training)
    assert model.bands.widths[0] == case["setting/n_e"]
    check_case(model, case, family)
    state = model.carried._latest["train", training].state
    last = torch.cat([layer["c"] for layer in state])
    torch.testing.assert_close(last, case["state"], atol=1e-4, rtol=0)


FORMS = {
    "Transformer-XL, base": dict(),
    "Transformer-XL, large": dict(div_val=2, tied_projections="tails"),
    "SRU++": dict(div_val=2, embedding_width=8),
    "SRU++, Billion Word": dict(div_val=2, embedding_width=8, tied_projections="none"),
    "fairseq": dict(div_val=2, tied_projections="tails", cluster_space="hidden", band_biases=False),
    "fairseq, narrow": dict(
        div_val=2,
        embedding_width=8,
        tied_projections="tails",
        cluster_space="hidden",
        band_biases=False,
    ),
}
SYMBOLS, WIDTH, CUTOFFS = 44, 12, [5, 11, 20]


@dataclass
class Config(AdaptiveConfig):
    width: int = WIDTH


def build(**fields):
    """An adaptive input and softmax with random parameters."""
    cfg = OmegaConf.structured(Config(**{"cutoffs": CUTOFFS, **fields}))
    embedding = AdaptiveEmbedding(bands(cfg, dictionary_of(SYMBOLS)))
    head = AdaptiveSoftmaxHead(embedding)
    randomise(torch.nn.ModuleList([embedding, head]))
    return embedding.double(), head.double()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_its_definition(form, monkeypatch):
    """One word at a time, without a thought for speed."""
    monkeypatch.setattr(heads, "MAX_LOGITS", 40)
    embedding, head = build(**FORMS[form])
    words = torch.arange(EOS, SYMBOLS)
    shuffled = words[torch.randperm(len(words))].view(3, -1)
    h = embedding(shuffled)
    losses = head.losses(h, shuffled.roll(1, 1))
    torch.testing.assert_close(h, torch.stack([vectors(embedding, row) for row in shuffled]))
    expected = -torch.stack(
        [
            torch.stack([log_probs(head, embedding, x)[y - EOS] for x, y in zip(*rows)])
            for rows in zip(h, shuffled.roll(1, 1))
        ]
    )
    torch.testing.assert_close(losses, expected)
    parameters = [*embedding.parameters(), *head.parameters()]
    gradients = torch.autograd.grad(losses.sum(), parameters, retain_graph=True)
    for ours, reference in zip(gradients, torch.autograd.grad(expected.sum(), parameters)):
        torch.testing.assert_close(ours, reference)
    every = head.log_probs(h)
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(h.shape[:2]).double())
    assert every[..., :EOS].eq(heads.NO_PROBABILITY).all()
    torch.testing.assert_close(every[0, 0, EOS:], log_probs(head, embedding, h[0, 0]))


def vectors(embedding, tokens):
    """``E_i[token] P_i^T``"""
    rows = []
    for token in tokens.tolist():
        i = sum(token - EOS >= edge for edge in CUTOFFS)
        e = embedding.weights[i][token - EOS - [0, *CUTOFFS][i]]
        rows.append(embedding.projections[i] @ e if embedding.projections else e)
    return torch.stack(rows)


def log_probs(head, embedding, h):
    """Of every word, given one hidden state."""
    fields = head.bands

    def project(i, h):
        if not fields.projected or (i == 0 and not head.head_projected):
            return h
        own = list(head.projections)
        return own[i if head.head_projected else i - 1].t() @ h

    first = project(0, h)
    clusters = head.cluster_weight @ (first if fields.cluster_space == "embedding" else h)
    words = embedding.weights[0] @ first
    if fields.biases:
        words, clusters = words + head.bias, clusters + head.cluster_bias
    first = torch.cat([words, clusters]).log_softmax(0)
    parts = [first[: len(words)]]
    for i in range(1, len(embedding.weights)):
        logits = embedding.weights[i] @ project(i, h)
        if fields.biases:
            logits = logits + head.tail_biases[i - 1]
        parts.append(logits.log_softmax(0) + first[len(words) + i - 1])
    return torch.cat(parts)


@pytest.mark.parametrize("tied", ["none", "tails"])
@pytest.mark.parametrize("width", [WIDTH, 8])
def test_equals_fairseqs_modules(tied, width):
    """Which know neither biases nor clusters in the space of embeddings."""
    size = SYMBOLS - EOS
    theirs = AdaptiveInput(size, 0, width, 2, WIDTH, CUTOFFS).double()
    softmax = AdaptiveSoftmax(
        size, WIDTH, CUTOFFS, 0.0, 2, adaptive_inputs=theirs, tie_proj=tied == "tails"
    ).double()
    form = {**FORMS["fairseq"], "embedding_width": width, "tied_projections": tied}
    embedding, head = build(**form)
    with torch.no_grad():
        for i, (table, projection) in enumerate(theirs.embeddings):
            embedding.weights[i].copy_(table.weight)
            embedding.projections[i].copy_(projection.weight)
        head.cluster_weight.copy_(softmax.head.class_proj.weight)
        if head.head_projected:
            head.projections[0].copy_(softmax.head.word_proj[0].weight.t())
        for i, (projection, _, _) in enumerate(softmax.tail):
            weight = projection.weight if tied == "tails" else projection.weight.t()
            head.projections[i + head.head_projected].copy_(weight)
    tokens = torch.randint(size, (3, 20))
    h = embedding(tokens + EOS)
    torch.testing.assert_close(h, theirs(tokens))
    torch.testing.assert_close(head.log_probs(h)[..., EOS:], softmax.get_log_prob(h, None))


def test_fairseqs_criterion_gets_every_word(monkeypatch):
    """It leaves out class 1, the number of <pad>, in every band; padding only must be left out."""
    embedding, head = build(div_val=2)
    targets = torch.arange(EOS, SYMBOLS).view(1, -1)
    targets = torch.cat([targets, torch.ones(1, 2).long()], 1)
    h = torch.randn(*targets.shape, WIDTH).double()

    class Model:
        decoder = SimpleNamespace(adaptive_softmax=head)

        def __call__(self):
            return h, None

        def get_targets(self, sample, net_output):
            return sample["target"]

    criterion = AdaptiveLoss(SimpleNamespace(target_dictionary=dictionary_of(SYMBOLS)), False)
    loss, count, _ = criterion(Model(), {"target": targets, "net_input": {}})
    assert count == SYMBOLS - EOS
    torch.testing.assert_close(loss, head.losses(h, targets)[:, :-2].sum().view(1))


def test_generation_divides_logits_by_the_temperature():
    """And not features, which fairseq would take."""
    model = golden.build(FAMILIES["srupp"], SRUppDecoder, SRUPP["base"]).eval()
    tokens = torch.tensor([[5], [9]])
    features, _ = model(tokens)
    expected = (model.head.log_probs(features) / 0.5).log_softmax(-1)
    logits, extra = model(tokens, incremental_state={})
    divided = logits.div_(0.5), extra
    torch.testing.assert_close(model.get_normalized_probs(divided, log_probs=True), expected)
    torch.testing.assert_close(model.get_normalized_probs(divided, False), expected.exp())


def test_bands_without_targets_get_a_gradient():
    """Workers wait for each other's gradients, in the same order."""
    embedding, head = build(div_val=2, tied_projections="none")
    tokens = torch.full((2, 3), EOS)
    head.losses(embedding(tokens), tokens).sum().backward()
    assert all(p.grad is not None for p in [*embedding.parameters(), *head.parameters()])


def test_dropout_falls_before_projections_in_and_after_projections_out(monkeypatch):
    embedding, head = build(div_val=2, dropout_projection=0.5)
    seen = record_dropout(monkeypatch, "models.embeddings", "models.heads")
    words = torch.arange(EOS, SYMBOLS)
    h = embedding(words, True)
    widths = [weight.size(1) for weight in embedding.weights]
    assert [(shape[1], p) for shape, p in seen] == [(width, 0.5) for width in widths]
    seen.clear()
    head.losses(h, words, True)
    assert [(shape[1], p) for shape, p in seen] == [(width, 0.5) for width in widths]
    assert len(set(widths)) == len(widths) > 1


def test_dropout_of_projections_acts_in_training_only():
    embedding, head = build(div_val=2, dropout_projection=0.5)
    tokens = torch.arange(EOS, SYMBOLS)
    for function in (
        lambda training: embedding(tokens, training),
        lambda training: head.losses(embedding(tokens), tokens, training),
    ):
        assert torch.equal(function(False), function(False))
        assert not torch.equal(function(True), function(True))
        torch.manual_seed(3)
        dropped = function(True)
        torch.manual_seed(3)
        assert torch.equal(function(True), dropped)


@pytest.mark.parametrize("kind", ["softmax", "adaptive"])
def test_training_keeps_no_logits_of_all_targets(kind, monkeypatch):
    """In pieces, losses and gradients are the same, and no tensor has a row for each target and a
    column for each word."""
    if kind == "softmax":
        head = SoftmaxHead(WIDTH, SYMBOLS).double()
    else:
        _, head = build(div_val=2)
    h = torch.randn(4, 50, WIDTH).double().requires_grad_()
    targets = torch.randint(EOS, SYMBOLS, (4, 50))

    def run():
        for tensor in [h, *head.parameters()]:
            tensor.grad = None
        losses = head.losses(h, targets)
        losses.sum().backward()
        return [losses.detach(), h.grad.clone(), *(p.grad.clone() for p in head.parameters())]

    expected = run()
    monkeypatch.setattr(heads, "MAX_LOGITS", 7 * 20)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                made.append(out.numel())
            return out

    with Watch():
        result = run()
    for ours, reference in zip(result, expected):
        torch.testing.assert_close(ours, reference)
    assert max(made) <= max(h.numel(), SYMBOLS * WIDTH)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(cutoffs=[5, 5]), "--cutoffs 5,5: must rise, from 1 to less than the 42 words"),
        (dict(cutoffs=[0]), "--cutoffs 0: must rise"),
        (dict(cutoffs=[42]), "--cutoffs 42: must rise"),
        (dict(div_val=0.5), "--div-val 0.5: must be at least 1"),
        (dict(div_val=4), "--div-val 4.0: leaves no width"),
        (dict(embedding_width=-1), "--embedding-width -1: must be at least 0"),
        (dict(dropout_projection=1.0), "--dropout-projection 1.0: must be"),
    ],
)
def test_settings_that_make_no_bands(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)


@pytest.mark.parametrize(
    "family, decoder, architecture, words, parameters",
    [
        ("srupp", SRUppDecoder, "srupp_wt103", 267_735, 147_676_036),
        ("srupp", SRUppDecoder, "srupp_wt103_large", 267_735, 233_741_476),
        ("srupp", SRUppDecoder, "srupp_lm1b", 793_470, 328_313_738),
        ("srupp", SRUppDecoder, "srupp_lm1b_large", 793_470, 465_318_274),
        ("transformer_xl", TransformerXLDecoder, "transformer_xl_wt103", 267_735, 151_107_538),
        (
            "transformer_xl",
            TransformerXLDecoder,
            "transformer_xl_wt103_large",
            267_735,
            285_170_506,
        ),
        ("sha_rnn", SHARNNDecoder, "sha_rnn_wt103", 267_735, 149_826_122),
    ],
)
def test_parameter_counts(family, decoder, architecture, words, parameters):
    """Those of the published classes at these sizes; sha_rnn_wt103 is our own."""
    cfg = FAMILIES[family].architectures[architecture]
    with torch.device("meta"):
        model = decoder(OmegaConf.structured(cfg()), dictionary_of(words + EOS))
    assert sum(p.numel() for p in model.parameters()) == parameters
