"""What holds for the decoder of each model family."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha.models.adaptive_span import AdaptiveSpan, AdaptiveSpanConfig
from fairseq_sha.models.min_rnn import MinRNN, MinRNNConfig
from fairseq_sha.models.sha_rnn import CELLS, SHARNN, SHARNNConfig
from fairseq_sha.models.srupp import SRUpp, SRUppConfig
from fairseq_sha.models.transformer_xl import TransformerXL, TransformerXLConfig
from tests.conftest import dictionary_of

SMALL = dict(width=16, num_layers=2)
MODELS = {
    **{
        f"sha_rnn, {cell}": (
            SHARNN,
            SHARNNConfig(attention_layers=[1], window=12, cell=cell, **SMALL),
        )
        for cell in CELLS
    },
    "transformer_xl": (TransformerXL, TransformerXLConfig(n_head=2, d_inner=8, mem_len=9, **SMALL)),
    "adaptive_span": (AdaptiveSpan, AdaptiveSpanConfig(n_head=2, d_inner=8, attn_span=9, **SMALL)),
    "srupp": (SRUpp, SRUppConfig(projection=8, eval_unroll=9, **SMALL)),
    "min_gru": (MinRNN, MinRNNConfig(d_inner=8, **SMALL)),
    "min_lstm": (MinRNN, MinRNNConfig(d_inner=8, cell="min_lstm", **SMALL)),
}


@pytest.fixture(params=MODELS)
def model(request):
    family, cfg = MODELS[request.param]
    task = SimpleNamespace(source_dictionary=dictionary_of(24), cfg=SimpleNamespace())
    return family.build_model(OmegaConf.structured(cfg), task)


@pytest.mark.parametrize("training", [True, False])
def test_carried_state_holds_no_more_than_itself(model, training):
    """A view would keep alive what it is a view of: a whole segment, in each layer."""
    decoder = model.train(training).decoder
    for i in range(3):
        decoder(torch.randint(24, (3, 6)), segment=f"train:1:{i}")
    for layer in decoder.carried._kept["train", training].after:
        for key, tensor in layer.items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, key
            assert tensor.size(1) == 3 and not tensor.requires_grad


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_in_bfloat16_is_for_the_model_to_prepare(model, bf16):
    cfg = OmegaConf.create({"common": {"bf16": bf16}, "generation": {}})
    model.prepare_for_inference_(cfg)
    (dtype,) = {parameter.dtype for parameter in model.parameters()}
    assert dtype == (torch.bfloat16 if bf16 else torch.float32)
