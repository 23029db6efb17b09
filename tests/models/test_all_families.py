"""What holds for the decoder of each model family."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha.models.family import FAMILIES
from tests.conftest import dictionary_of
from tests.models.helpers import randomise

MODELS = {
    f"{name}, {variant}" if variant else name: (
        family.model,
        family.config(**{**family.tiny.model, **fields}),
    )
    for name, family in FAMILIES.items()
    for variant, fields in family.tiny.variants.items()
}


@pytest.fixture(params=MODELS)
def model(request):
    family, cfg = MODELS[request.param]
    task = SimpleNamespace(source_dictionary=dictionary_of(24), cfg=SimpleNamespace())
    return family.build_model(OmegaConf.structured(cfg), task)


@pytest.mark.parametrize("training, gradients", [(True, True), (False, True), (False, False)])
def test_carried_state_holds_no_more_than_itself(model, training, gradients):
    """A view would keep alive what it is a view of: a whole segment, in each layer."""
    decoder = model.train(training).decoder
    with torch.set_grad_enabled(gradients):
        for i in range(3):
            decoder(torch.randint(24, (3, 6)), segment=f"train:1:{i}")
    for layer in decoder.carried._latest["train", training].state:
        for key, tensor in layer.items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), key
            assert tensor.size(1) == 3 and not tensor.requires_grad


def test_evaluation_without_gradients_computes_the_same(model):
    """Without gradients, layers may remember what they have projected."""
    decoder = randomise(model.eval()).decoder
    segments = torch.randint(24, (3, 41)).split([6, 20, 9, 4, 1, 1], 1)

    def logits(split):
        return [decoder(x, segment=f"{split}:1:{i}")[0] for i, x in enumerate(segments)]

    expected = logits("valid")
    with torch.no_grad():
        torch.testing.assert_close(logits("test"), expected, atol=1e-4, rtol=1e-4)


def test_a_text_begun_with_gradients_may_go_on_without(model):
    decoder = randomise(model.eval()).decoder
    segments = torch.randint(24, (3, 18)).split(6, 1)
    expected = [decoder(x, segment=f"valid:1:{i}")[0] for i, x in enumerate(segments)]
    for i, tokens in enumerate(segments):
        with torch.set_grad_enabled(i == 0):
            logits, _ = decoder(tokens, segment=f"test:1:{i}")
        torch.testing.assert_close(logits, expected[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["transformer_xl", "adaptive_span", "srupp"], indirect=True)
def test_no_gradient_goes_through_what_was_projected_before(model):
    decoder = model.eval().decoder
    tokens = torch.randint(24, (3, 6))
    with torch.no_grad():
        decoder(tokens, segment="valid:1:0")
    with pytest.raises(ValueError, match="no gradient can go; read the segments before"):
        decoder(tokens, segment="valid:1:1")


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_in_bfloat16_is_for_the_model_to_prepare(model, bf16):
    cfg = OmegaConf.create({"common": {"bf16": bf16}, "generation": {}})
    model.prepare_for_inference_(cfg)
    (dtype,) = {parameter.dtype for parameter in model.parameters()}
    assert dtype == (torch.bfloat16 if bf16 else torch.float32)


def losses_and_gradients(decoder, segments):
    out = []
    for i, tokens in enumerate(segments):
        torch.manual_seed(7)
        further = tokens.expand(decoder.num_targets - 1, *tokens.shape)
        losses, extra = decoder(
            tokens, segment=f"train:1:{i}", targets=tokens, further_targets=further
        )
        out.append(losses.square().mean() + sum(extra["auxiliary_losses"].values()))
        decoder.zero_grad()
        out[-1].backward()
        out += [parameter.grad.clone() for parameter in decoder.parameters()]
    return out


def test_layers_computed_anew_for_their_gradients_change_nothing(model):
    decoder = model.train().decoder
    segments = [torch.randint(24, (3, length)) for length in (6, 9, 4)]
    expected = losses_and_gradients(decoder, segments)
    held = []
    decoder.checkpoint_activations = True
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.shape) or x, lambda x: x):
        decoder.extract_features(segments[0])
    # Of two layers' insides there would be hundreds.
    assert len(held) < 36
    assert all(map(torch.equal, losses_and_gradients(decoder, segments), expected))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=() if name == "min_rnn, min_gru" else pytest.mark.long)
        for name in MODELS
    ],
    indirect=True,
)
def test_compiled_layers_compute_the_same(model, monkeypatch):
    """Traced for any length; kernels are not generated, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    decoder = model.train().decoder
    segments = [torch.randint(24, (3, length)) for length in (6, 9, 4)]
    names = set(decoder.state_dict())
    expected = losses_and_gradients(decoder, segments)
    decoder.compile_layers()
    actual = losses_and_gradients(decoder, segments)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert set(decoder.state_dict()) == names
