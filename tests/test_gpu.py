"""What only a CUDA GPU can show: it computes what the CPU does, and the CPU never waits for it."""

import re
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from fairseq_sha.compression import compress, decompress
from fairseq_sha.models.adaptive_span import AdaptiveSpanDecoder
from fairseq_sha.modules import LSTM
from fairseq_sha.ops import attend, causal_bias, dropout, linear_recurrence, lstm, sru
from fairseq_sha.ops.oracles import (
    attend_reference,
    linear_recurrence_reference,
    lstm_reference,
    sru_reference,
)
from fairseq_sha.optim.min_trust_lamb import MinTrustLAMB
from fairseq_sha.trained_model import TrainedModel
from tests.commands import command, logged_losses
from tests.conftest import dictionary_of
from tests.models.test_all_families import MODELS
from tests.ops.test_lstm import lstm_inputs
from tests.ops.test_recurrences import check, linear_inputs, sru_inputs, sru_mask
from tests.options import FAMILIES
from tests.test_precision import bits
from tests.tiny_corpus import text, write_folder

attention = sys.modules[attend.__module__]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """cuDNN's LSTM would compute float32 products in less."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(tensors):
    return [tensor.detach().cuda().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("length", [1, 2, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_recurrences_equal_their_definitions(length, dtype):
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if dtype == torch.float else {}
    inputs = on_gpu(linear_inputs(length, dtype))
    with torch.no_grad():
        inputs[0].clamp_(-0.9, 0.9)  # states that grow without end cannot be compared
    check(linear_recurrence, linear_recurrence_reference, inputs, **tolerance)
    inputs = on_gpu(sru_inputs(length, dtype))
    check(sru, sru_reference, inputs, sru_mask(dtype).cuda(), **tolerance)
    inputs = on_gpu(sru_inputs(length, dtype, streams=16, width=300))
    check(sru, sru_reference, inputs, **tolerance)
    check(lstm, lstm_reference, on_gpu(lstm_inputs(length, dtype)), **tolerance)


@pytest.mark.parametrize("shared", [(), (0,), (0, 2)])
def test_dropout_of_any_shape_of_mask(shared):
    x = torch.randn(50, 200, 60, device="cuda", requires_grad=True)
    dropped = dropout(x, 0.3, shared=shared)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.15)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    for dimension in shared:
        assert torch.equal(kept, kept.narrow(dimension, 0, 1).expand_as(kept))
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.7)


def test_dropped_recurrent_weights_get_the_gradient_where_they_were_kept():
    """cuDNN takes them apart from its flat buffer."""
    cell, x = LSTM(8, weight_dropout=0.5).cuda(), torch.randn(5, 3, 8, device="cuda")
    torch.manual_seed(4)
    out, _ = cell(x, {}, training=True)
    out.pow(2).sum().backward()
    torch.manual_seed(4)
    kept = dropout(torch.ones_like(cell.weight_hh_l0), 0.5) != 0
    assert torch.equal(cell.weight_hh_l0.grad != 0, kept)


@pytest.mark.parametrize("dtype", [torch.float, torch.half])
@pytest.mark.parametrize("max_scores", [2**27, 3 * 20 * 50])
@pytest.mark.parametrize("width", [64, 300])
def test_attention_equals_its_definition(monkeypatch, width, max_scores, dtype):
    """Of narrow and of wide heads, all at once and some at a time."""
    monkeypatch.setattr(attention, "MAX_SCORES", max_scores)
    exact = [torch.randn(n, 8, width, requires_grad=True) for n in (20, 50, 50)]
    expected = attend_reference(*exact, causal_bias(*exact[:2]))
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    found = attend(*inputs, causal_bias(*inputs[:2]))
    tolerance = (
        {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float else {"atol": 2e-2, "rtol": 2e-2}
    )
    torch.testing.assert_close(found.float().cpu(), expected, **tolerance)
    weight = torch.randn_like(expected)
    expected = torch.autograd.grad((expected * weight).sum(), exact)
    found = torch.autograd.grad((found * weight.to(found)).sum(), inputs)
    torch.testing.assert_close([x.float().cpu() for x in found], list(expected), **tolerance)


@pytest.fixture(params=MODELS)
def decoder(request):
    family, cfg = MODELS[request.param]
    task = SimpleNamespace(source_dictionary=dictionary_of(24), cfg=SimpleNamespace())
    cfg = OmegaConf.structured(cfg)
    for name in cfg:
        if name.startswith("drop"):
            cfg[name] = 0.0  # the GPU draws other numbers
    decoder = family.build_model(cfg, task).decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return decoder


def train_step(decoder, tokens, targets, segment):
    logits, extra = decoder(tokens, segment=segment)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for auxiliary in (extra or {}).get("auxiliary_losses", {}).values():
        loss = loss + auxiliary
    loss.backward()
    return logits


def test_gpu_computes_what_the_cpu_does(decoder):
    """Logits, gradients and, through the segments that follow, carried state."""
    on_cpu, on_gpu = decoder, deepcopy(decoder).cuda()
    for i, length in enumerate((6, 9, 4)):
        tokens, targets = torch.randint(24, (2, 3, length))
        expected = train_step(on_cpu, tokens, targets, f"train:1:{i}")
        actual = train_step(on_gpu, tokens.cuda(), targets.cuda(), f"train:1:{i}")
        torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-4)
    for (name, parameter), other in zip(on_cpu.named_parameters(), on_gpu.parameters()):
        expected = parameter.grad
        atol = 1e-3 * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(other.grad.cpu(), expected, atol=atol, rtol=0, msg=name)


def test_a_step_never_waits_for_the_gpu(decoder, monkeypatch):
    """Torch is told to raise an error where the CPU would wait for a result."""
    decoder = decoder.cuda().train()
    optimizer = MinTrustLAMB(decoder.parameters(), min_trust=0.25)
    tokens, targets = torch.randint(24, (2, 3, 6), device="cuda")
    if isinstance(decoder, AdaptiveSpanDecoder):  # which needs the longest spans, once a step
        trimmed = decoder.trimmed()
        monkeypatch.setattr(decoder, "trimmed", lambda: trimmed)

    def step(number):
        train_step(decoder, tokens, targets, f"train:1:{number}")
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (1, 2, 3):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def without_dropout(options):
    options = re.sub(r"--dropout \S+", "--dropout 0", options)
    if "sha_rnn" in options:
        options += " --dropout-input 0 --dropout-hidden 0 --dropout-output 0"
    if "srupp" in options:
        options += " --dropatt 0"
    return options


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_evaluation_are_the_cpus(data, tmp_path, family):
    """Without mixed precision (LSTMs in TF32, though), and within a little of it with."""
    options = f"{without_dropout(FAMILIES[family])} --max-update 12"
    expected = bits(command("fairseq-train", data, f"{options} --no-save").stdout)
    assert len(expected) == 12
    options = options.replace("--cpu", "")
    for precision, tolerance in (("", 0.005), ("--amp", 0.03), ("--fp16", 0.03)):
        if precision == "--fp16":
            precision += " --fp16-no-flatten-grads --fp16-init-scale 4"
        folder = tmp_path / (precision[2:6] or "float32")
        done = command("fairseq-train", data, f"{options} {precision} --save-dir {folder}")
        assert done.returncode == 0, done.stdout
        torch.testing.assert_close(bits(done.stdout), expected, atol=tolerance, rtol=0)
        checkpoint = folder / "checkpoint_last.pt"
        scores = []
        for device in ("--cpu", "", "--fp16"):
            scored = command("fairseq-eval-lm", data, f"--path {checkpoint} {device}").stdout
            scores.append(float(re.search(r"Loss \(base 2\): ([0-9.]+)", scored).group(1)))
        assert scores == pytest.approx([scores[0]] * 3, abs=0.01), precision


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["", "--amp"])
def test_resumed_run_repeats_the_uninterrupted_one(data, tmp_path, family, precision):
    """Dropout and carried state too; losses as they are logged."""
    options = f"{FAMILIES[family].replace('--cpu', '')} {precision} --save-interval-updates 7"
    whole = command("fairseq-train", data, f"{options} --max-update 12 --save-dir {tmp_path}")
    part = f"--restore-file {tmp_path}/checkpoint_1_7.pt --save-dir {tmp_path / 'other'}"
    resumed = command("fairseq-train", data, f"{options} --max-update 12 {part}")
    expected, losses = logged_losses(whole.stdout), logged_losses(resumed.stdout)
    assert len(losses) == 5, resumed.stdout
    for updates, (loss, _) in losses.items():
        first, second = (
            float(text[len("loss=") :].strip(",")) for text in (loss, expected[updates][0])
        )
        assert first == pytest.approx(second, abs=0.005)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_model_on_the_gpu(checkpoints, family):
    cpu, gpu = (TrainedModel.load(checkpoints[family], cpu=cpu) for cpu in (True, False))
    assert gpu.device.type == "cuda"
    written = text(300)
    torch.testing.assert_close(
        torch.as_tensor(gpu.bits(written)), torch.as_tensor(cpu.bits(written)), atol=1e-3, rtol=1e-3
    )
    assert gpu.sample("abc", max_len_b=40) == cpu.sample("abc", max_len_b=40)
    assert decompress(gpu, compress(gpu, written)) == written
