"""Sparse attention against numbers of the published code, and against a dense matrix of scores."""

from functools import partial

import pytest
import torch

from fairseq_sha.ops import (
    attend_fixed,
    attend_locally,
    attend_strided,
    attend_to_all,
    sparse_attention,
)
from fairseq_sha.ops.oracles import sparse_attention_reference, sparse_mask
from tests.conftest import golden_cases

CASES = golden_cases("sparse_attention")
MASKS = [name for name, case in CASES.items() if "setting/n_ctx" in case]
LAYERS = {"local": attend_locally, "strided": attend_strided, "dense": attend_to_all}


def seen_by(attend, total, heads):
    """Which keys get a weight above 0: bool ``[heads, total, total]``."""
    keys = torch.zeros(total, 1, heads, total)
    values = torch.eye(total).view(total, 1, 1, total).expand(-1, -1, heads, -1)
    return attend(keys, keys, values).squeeze(1).transpose(0, 1) > 1e-6


@pytest.mark.parametrize("name", MASKS)
def test_published_masks(name):
    case = CASES[name]
    sizes = ("n_ctx", "stride", "heads", "blocksize", "num_verts", "vertsize")
    total, stride, heads, block, verts, vertsize = (int(case[f"setting/{n}"]) for n in sizes)
    summary = vertsize * block
    ours = {
        "local": partial(attend_locally, stride=stride),
        "strided": partial(attend_strided, stride=stride),
        "fixed": partial(attend_fixed, stride=stride, summary=summary, num_summaries=1),
        "fixed_heads": partial(attend_fixed, stride=stride, summary=summary, num_summaries=verts),
    }
    for pattern, attend in ours.items():
        expected = case[f"mask/{pattern}"].expand(heads, -1, -1)
        assert torch.equal(seen_by(attend, total, heads), expected), pattern
        own = sparse_mask(
            pattern.replace("_heads", ""),
            total,
            heads,
            stride,
            summary,
            verts if "_" in pattern else 1,
        )
        assert torch.equal(own, expected), pattern


@pytest.mark.parametrize("name", LAYERS)
def test_published_layers(name):
    case = CASES[name]
    heads, stride = int(case["setting/heads"]), int(case["setting/stride"])
    inputs = [case[f"param/{part}"].clone().requires_grad_() for part in "qkv"]
    q, k, v = (x.transpose(0, 1).unflatten(-1, (heads, -1)) for x in inputs)
    output = LAYERS[name](q, k, v, stride).flatten(2).transpose(0, 1)
    torch.testing.assert_close(output, case["output"], atol=1e-4, rtol=0)
    (output * case["grad_output"]).sum().backward()
    for part, x in zip("qkv", inputs):
        bound = 1e-3 * case[f"grad/{part}"].abs().max() + 1e-8
        assert (x.grad - case[f"grad/{part}"]).abs().max() <= bound


OURS = {
    "fixed": partial(attend_fixed, stride=8, summary=2, num_summaries=3),
    "local": partial(attend_locally, stride=8),
    "strided": partial(attend_strided, stride=8),
    "dense": attend_to_all,
}


@pytest.mark.parametrize("pattern", OURS)
@pytest.mark.parametrize(
    "length, total", [(32, 32), (29, 29), (5, 5), (1, 1), (1, 21), (1, 24), (9, 32), (20, 27)]
)
@pytest.mark.parametrize("most", [0, 2**24])
def test_equals_attention_with_all_scores(pattern, length, total, most, monkeypatch):
    """From nothing and after a past, over whole blocks and parts of them."""
    monkeypatch.setattr(sparse_attention, "MAX_COPIED", most)
    q = torch.randn(length, 2, 4, 3, dtype=torch.double, requires_grad=True)
    k, v = torch.randn(2, total, 2, 4, 3, dtype=torch.double).requires_grad_().unbind()
    mask = sparse_mask(pattern, total, 4, 8, 2, 3)
    outputs = [OURS[pattern](q, k, v), sparse_attention_reference(q, k, v, mask)]
    direction = torch.randn_like(q)
    grads = [torch.autograd.grad((out * direction).sum(), (q, k, v)) for out in outputs]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("pattern", OURS)
def test_what_is_held_for_the_gradient_grows_with_positions_alone(pattern, monkeypatch):
    monkeypatch.setattr(sparse_attention, "MAX_COPIED", 0)

    def held(total):
        x = torch.randn(3, total, 1, 4, 8, requires_grad=True)
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            OURS[pattern](*x.unbind()).sum()
        return sum(storage.nbytes() for storage in storages.values())

    assert held(2048) < 2.5 * held(1024) < 6.25 * held(512)
