"""What the task does after an update."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.models import FairseqLanguageModel
from fairseq.optim import AMPOptimizer, FP16Optimizer
from fairseq.optim.sgd import SGD as FairseqSGD
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.data.codecs import ByteCodec, WordCodec
from fairseq_sha.tasks.segment_language_modeling import (
    SegmentLanguageModelingConfig,
    SegmentLanguageModelingTask,
)
from tests.conftest import dictionary_of
from tests.models.test_adaptive_span import decoder
from tests.tiny_corpus import write_folder


def codec():
    return WordCodec(dictionary_of(29))


@pytest.fixture
def model():
    return FairseqLanguageModel(decoder(adapt_span_init=0.5))


def update(optimizer, model):
    task = SegmentLanguageModelingTask(SegmentLanguageModelingConfig(), codec())
    task.optimizer_step(optimizer, model, update_num=1)


def leave_bounds(parameters):
    for parameter, value in zip(parameters, (-0.2, 1.3)):
        parameter.data.fill_(value)


@pytest.mark.parametrize("random_start", [False, True])
def test_epochs_start_where_the_option_says(model, tmp_path, random_start):
    cfg = SegmentLanguageModelingConfig(
        data=write_folder(tmp_path), tokens_per_sample=20, random_start=random_start, seed=1
    )
    task = SegmentLanguageModelingTask(cfg, ByteCodec.load(cfg.data))
    task.load_dataset("train")
    task.model, task.is_training = model, True

    def first_batch(epoch):
        batches = task.get_batch_iterator(
            task.dataset("train"), max_sentences=4, epoch=epoch, update_epoch_batch_itr=False
        )
        return next(batches.next_epoch_itr())["target"]

    assert torch.equal(first_batch(1), first_batch(2)) != random_start


def test_parameters_are_clamped_to_their_bounds(model):
    spans = [layer.attention.span for layer in model.decoder.layers]
    update(SimpleNamespace(step=lambda: leave_bounds(spans)), model)
    assert [span.tolist() for span in spans] == [[0, 0], [1, 1]]


def test_attempt_ends_where_the_optimizer_steps(model):
    """fairseq calls the hook after an overflow too, and may then feed the same segments again."""
    decoder = model.decoder.train()
    decoder.set_num_updates(3)
    tokens = torch.randint(4, 29, (2, 5))
    first, second = (decoder(tokens, segment=f"train:1:{i}")[0] for i in (0, 1))
    update(SimpleNamespace(step=lambda: None), model)
    assert torch.equal(decoder(tokens, segment="train:1:0")[0], first)
    assert torch.equal(decoder(tokens, segment="train:1:1")[0], second)
    update(SimpleNamespace(step=lambda: None), model)
    third = decoder(tokens, segment="train:1:2")[0]  # the group was given up
    update(SimpleNamespace(step=lambda: None), model)
    assert torch.equal(decoder(tokens, segment="train:1:2")[0], third)
    assert not torch.equal(third, decoder(tokens)[0])


def test_rate_of_an_update_follows_the_length_of_its_segments(model):
    """Of the mean length, where an update has several; the next update starts from the rate."""
    config = SegmentLanguageModelingConfig(tokens_per_sample=20, scale_lr_by_length=True)
    task = SegmentLanguageModelingTask(config, codec())
    rates = [2.0]
    optimizer = SimpleNamespace(
        get_lr=lambda: rates[-1],
        set_lr=rates.append,
        step=lambda: rates.append("step"),
        backward=lambda loss: None,
    )
    criterion = lambda *_: (torch.zeros(()), 1, {})  # noqa: E731

    def read(length):
        sample = {"target": torch.zeros(2, length), "net_input": {}, "ntokens": 1}
        task.train_step(sample, model, criterion, optimizer, 1)

    for lengths in ([20], [5], [20, 10]):
        for length in lengths:
            read(length)
        task.optimizer_step(optimizer, model, 1)
        read(13)  # with --fp16, an overflow leads to no step
        task.begin_attempt()
    assert rates == [2.0, 2.0, "step", 2.0, 0.5, "step", 2.0, 1.5, "step", 2.0]


def test_automatic_mixed_precision_unscales_gradients_once():
    """fairseq's own step would do it twice, which Adam hides and a clipped step does not."""
    param = torch.nn.Parameter(torch.zeros(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    param.grad = scaler.scale(torch.ones(1))
    cfg = OmegaConf.create({"lr": [0.5], "momentum": 0.0, "weight_decay": 0.0})
    wrapped = FairseqSGD(cfg, [param])
    optimizer = AMPOptimizer.__new__(AMPOptimizer)
    optimizer.fp32_optimizer, optimizer._grad_scaler = wrapped, scaler
    optimizer.clip_grad_norm(10.0)
    update(optimizer, FairseqLanguageModel(decoder()))
    assert param.item() == -0.5


def mixed_precision(model, fp32_params):
    """fairseq's optimiser over copies in float32; its own constructor needs a GPU."""
    optimizer = FP16Optimizer.__new__(FP16Optimizer)
    optimizer.fp16_params = list(model.parameters())
    optimizer.fp32_params = fp32_params
    return optimizer


def test_float32_copies_are_clamped_too(model):
    optimizer = mixed_precision(model, None)
    copies = {p: torch.nn.Parameter(p.detach().clone()) for p in optimizer.fp16_params}
    optimizer.fp32_params = list(copies.values())
    spans = [layer.attention.span for layer in model.decoder.layers]

    def step():
        leave_bounds([copies[span] for span in spans])
        for parameter, copy in copies.items():
            parameter.data.copy_(copy)

    optimizer.step = step
    update(optimizer, model)
    for span, expected in zip(spans, (0, 1)):
        assert span.tolist() == copies[span].tolist() == [expected] * 2


def test_flat_float32_copies_are_refused(model):
    optimizer = mixed_precision(model, torch.zeros(4))
    with pytest.raises(UserError, match="--fp16-no-flatten-grads"):
        update(optimizer, model)
