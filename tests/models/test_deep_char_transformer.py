"""T12 and T64 against numbers of a third party's code, and against themselves."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.evaluation.evaluate import evaluate
from fairseq_sha.evaluation.policies import Carried, Sliding
from fairseq_sha.models.deep_char_transformer import (
    DeepCharTransformer,
    DeepCharTransformerConfig,
    DeepCharTransformerDecoder,
)
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.segment_decoder import SegmentLanguageModel
from tests.commands import command
from tests.conftest import dictionary_of, golden_cases
from tests.data.test_segments import FakeCorpus
from tests.models import golden
from tests.models.helpers import VOCABULARY, check_cuts, check_one_token_at_a_time, randomise
from tests.options import FAMILIES as OPTIONS
from tests.test_commands import in_process
from tests.tiny_corpus import write_folder

CASES = golden_cases("deep_char_transformer")
FAMILY = FAMILIES["deep_char_transformer"]
PUBLISHED_NAMES = {
    r"encoder\.layers\.(\d+)\.self_attn\.linears\.0": r"layers.\1.attention.query",
    r"encoder\.layers\.(\d+)\.self_attn\.linears\.1": r"layers.\1.attention.key",
    r"encoder\.layers\.(\d+)\.self_attn\.linears\.2": r"layers.\1.attention.value",
    r"encoder\.layers\.(\d+)\.self_attn\.linears\.3": r"layers.\1.attention.output",
    r"encoder\.layers\.(\d+)\.feed_forward\.w_": r"layers.\1.feed_forward.linear",
    r"encoder\.layers\.(\d+)\.sublayer\.0\.norm\.a_2": r"layers.\1.norm_attention.weight",
    r"encoder\.layers\.(\d+)\.sublayer\.0\.norm\.b_2": r"layers.\1.norm_attention.bias",
    r"encoder\.layers\.(\d+)\.sublayer\.1\.norm\.a_2": r"layers.\1.norm_feed_forward.weight",
    r"encoder\.layers\.(\d+)\.sublayer\.1\.norm\.b_2": r"layers.\1.norm_feed_forward.bias",
    r"encoder\.layers\.(\d+)\.add_positional_encoding\.positional_encoding": r"layers.\1.positions",
    r"embed\.lut": "embedding",
}


def config(**fields):
    small = dict(width=16, num_layers=3, n_head=2, d_inner=24, window=9, eval_stride=3, dropout=0)
    return OmegaConf.structured(DeepCharTransformerConfig(**{**small, **fields}))


def decoder(**fields):
    return DeepCharTransformerDecoder(config(**fields), dictionary_of(VOCABULARY))


def our_name(name, layers):
    """Of a tensor of the reference, or None for the norm that takes no part."""
    found = re.match(
        r"(?:encoder\.layers\.(\d+)\.classifier|extra\.(\d+)\.(\d+))\.proj\.(.*)", name
    )
    if found:
        target = 0 if found[1] else int(found[3]) + 1
        from_last = layers - 1 - int(found[1] or found[2])
        if from_last == target == 0:
            return f"head.{found[4]}"
        return f"classifiers.{from_last}.{target - (from_last == 0)}.{found[4]}"
    for pattern, ours in PUBLISHED_NAMES.items():
        name, times = re.subn(f"^{pattern}", ours, name)
        if times:
            return name
    assert name.startswith("encoder.norm"), name
    return None


def golden_decoder(case):
    weights = golden.parameters(case)
    layers = len([name for name in weights if name.endswith("positional_encoding")])
    window, width = weights["encoder.layers.0.add_positional_encoding.positional_encoding"].shape
    cfg = DeepCharTransformerConfig(
        width=width,
        num_layers=layers,
        n_head=int(case["setting/n_head"]),
        d_inner=len(weights["encoder.layers.0.feed_forward.w_1.weight"]),
        window=window,
        eval_stride=1,
        num_targets=int(case["setting/targets"]),
        dropout=0.0,
        attention_biases="encoder.layers.0.self_attn.linears.0.bias" in weights,
    )
    vocabulary = len(weights["embed.lut.weight"])
    model = DeepCharTransformerDecoder(OmegaConf.structured(cfg), dictionary_of(vocabulary))
    weights = {our_name(name, layers): value.clone() for name, value in weights.items()}
    weights.pop(None, None)
    # The reference divides by the unbiased standard deviation.
    for name in weights:
        if re.search(r"norm_\w+\.weight", name):
            weights[name] *= ((width - 1) / width) ** 0.5
    model.load_state_dict(weights)
    model.total_updates = 1000
    model.num_updates = round(1000 * float(case.get("setting/progress", 0.0)))
    model.dictionary.pad_index = -1  # the tokens of the case stand for nothing special
    return model.train(bool(case["setting/train"]))


@pytest.mark.parametrize("name", CASES)
def test_equals_published_schedule_and_code(name):
    case = CASES[name]
    model = golden_decoder(case)
    layers, tokens = len(model.layers), case["tokens"].t()
    length, num_targets = int(case["segments"]), model.num_targets
    ahead = [tokens[:, k : k + length] for k in range(num_targets + 1)]
    further = torch.stack(ahead[2:]) if num_targets > 1 else None
    nll, extra = model(ahead[0], targets=ahead[1], further_targets=further)
    if not model.training:  # the last position alone
        torch.testing.assert_close(nll[:, -1], case["nll_last"], atol=1e-4, rtol=0)
        assert not extra
        return
    torch.testing.assert_close(nll.mean(), case["final_loss"], atol=1e-4, rtol=0)
    predicting = [i + 1 for i in range(layers) if model.predicts(i, model.num_updates / 1000)]
    assert predicting == case["layers_with_loss"].tolist()
    done = model._read(ahead[0].t(), None, True)
    for i in predicting:
        h = model.layers[i - 1].norm_attention(done.hidden[i - 1]).transpose(0, 1)
        for k in range(1, num_targets + 1):
            heads = [model.head, *model.classifiers[0]] if i == layers else None
            heads = heads or model.classifiers[layers - i]
            losses = heads[k - 1].losses(h, ahead[k])
            torch.testing.assert_close(losses.t(), case[f"nll0/{i}/{k}"], atol=1e-4, rtol=0)
    loss = nll.mean() + extra["auxiliary_losses"]["auxiliary_loss"]
    torch.testing.assert_close(loss, case["loss"], atol=1e-4, rtol=0)
    model.averages_layers = False
    summed = nll.mean() + model.auxiliary_losses(done, ahead[1], further)["auxiliary_loss"]
    torch.testing.assert_close(summed, case["loss_sum"], atol=2e-4, rtol=0)
    loss.backward()
    expected = {k[len("grad/") :]: v for k, v in case.items() if k.startswith("grad/")}
    expected = {our_name(name, layers): value for name, value in expected.items()}
    width = model.layers[0].positions.size(1)
    unbiased = ((width - 1) / width) ** 0.5
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name not in expected:  # what the file leaves out has no gradient there
            assert "key.bias" in name or name.startswith("classifiers")
            assert gradient.abs().max() < 1e-6, name
            continue
        if re.search(r"norm_\w+\.weight", name):
            gradient = gradient * unbiased
        reference = expected.pop(name)
        bound = 1e-3 * reference.abs().max() + 1e-8
        assert (gradient - reference).abs().max() <= bound, name
    assert not expected


@pytest.mark.parametrize(
    "name, layers, count", [("t12_enwik8", 12, 44_232_704), ("t64_enwik8", 64, 235_339_776)]
)
def test_parameter_counts_of_the_paper(name, layers, count):
    """With a row for each of 256 bytes."""
    with torch.device("meta"):
        cfg = OmegaConf.structured(FAMILY.architectures[name]())
        model = DeepCharTransformerDecoder(cfg, dictionary_of(256))
    assert sum(p.numel() for p in model.parameters()) == count
    for_training = sum(p.numel() for p in model.classifiers.parameters())
    assert for_training == (2 * layers - 1) * (512 * 256 + 256)


def by_hand(model, tokens):
    """Logits ``[T, V]`` of one window: one position, head and key after another."""

    def norm(x, module):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias

    h = model.embedding.weight[tokens] * model.embedding_scale
    for layer in model.layers:
        h = h + layer.positions[: len(tokens)]
        x, attention = norm(h, layer.norm_attention), layer.attention
        q, k, v = (
            (x @ linear.weight.t()).unflatten(-1, (attention.n_head, -1))
            for linear in (attention.query, attention.key, attention.value)
        )
        rows = []
        for i in range(len(tokens)):
            mixes = []
            for n in range(attention.n_head):
                scores = torch.stack([q[i, n] @ k[j, n] for j in range(i + 1)])
                weights = (scores / q.size(-1) ** 0.5).softmax(0)
                mixes.append(sum(w * v[j, n] for j, w in enumerate(weights)))
            rows.append(torch.cat(mixes))
        h = h + torch.stack(rows) @ attention.output.weight.t()
        feed_forward = layer.feed_forward
        inner = F.relu(feed_forward.linear1(norm(h, layer.norm_feed_forward)))
        h = h + feed_forward.linear2(inner)
    return model.head.logits(norm(h, model.layers[-1].norm_attention))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_model_written_out(training, scale):
    model = randomise(decoder(scale_embedding=scale)).train(training)
    tokens = torch.randint(VOCABULARY, (2, 9))

    def gradients(logits):
        model.zero_grad()
        logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = torch.stack([by_hand(model, stream) for stream in tokens])
    actual = model(tokens)[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    for grad, wanted in zip(gradients(actual), gradients(expected)):
        torch.testing.assert_close(grad, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)


def test_losses_of_layers_end_one_after_another():
    """Layer l of n stops when l / 2n of training is done; the last one never does."""
    model = randomise(decoder(num_layers=4, layer_losses="sum")).train()
    model.total_updates = 800
    tokens = torch.randint(4, VOCABULARY, (2, 7))
    active = {0: 4, 99: 4, 100: 3, 199: 3, 200: 2, 300: 1, 400: 1, 799: 1}
    for update, layers in active.items():
        model.num_updates = update
        model.zero_grad()
        _, extra = model(tokens, targets=tokens, further_targets=tokens[None])
        extra["auxiliary_losses"]["auxiliary_loss"].backward()
        moved = [heads[0].weight.grad.abs().max() > 0 for heads in model.classifiers]
        assert moved == [i < layers for i in range(4)], update


def test_targets_that_do_not_exist_cost_nothing():
    model = randomise(decoder(layer_losses="sum")).train()
    tokens = torch.randint(4, VOCABULARY, (2, 7))
    targets, further = tokens.clone(), tokens[None].clone()
    targets[1, 4:] = further[0, 1, 3:] = model.dictionary.pad()

    def losses(targets, further):
        _, extra = model(tokens, targets=targets, further_targets=further)
        return extra["auxiliary_losses"]["auxiliary_loss"]

    h = [
        model.layers[i].norm_attention(x)
        for i, x in enumerate(model._read(tokens.t(), None, True).hidden)
    ]
    expected = 0.0
    for i, heads in enumerate(model.classifiers):
        heads = [model.head, *heads] if i == 0 else heads
        for k, (head, wanted) in enumerate(zip(heads, (targets, further[0]))):
            exists = wanted != model.dictionary.pad()
            logits = head.logits(h[2 - i].transpose(0, 1))[exists]
            weight = (float(i > 0), 0.5)[k]
            expected = expected + weight * F.cross_entropy(logits, wanted[exists])
    torch.testing.assert_close(losses(targets, further), expected)
    nothing = torch.full_like(further, model.dictionary.pad())
    torch.testing.assert_close(losses(targets, nothing), losses(targets, None))


def test_one_token_at_a_time_equals_the_segment_pass():
    check_one_token_at_a_time(randomise(decoder()).eval(), 24, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 3, 9])
def test_cutting_otherwise_changes_nothing(stride):
    model = randomise(decoder(eval_stride=stride)).eval()
    check_cuts(model, [24], [7, 1, 2, 14], [12, 12], [1] * 24, atol=1e-4, rtol=1e-4)


class Codec:
    """As much of one as an evaluation needs."""

    start, words = 4, None

    def __init__(self, dictionary):
        self.dictionary = dictionary

    def bytes_per_token(self):
        return torch.ones(len(self.dictionary)).numpy()


@pytest.mark.parametrize("stride", [1, 3, 9])
def test_state_gives_what_windows_give(stride):
    """Of one stream: each byte is predicted from the same bytes before it."""
    decoder_ = randomise(decoder(eval_stride=stride)).eval()
    model, codec = SegmentLanguageModel(decoder_), Codec(decoder_.dictionary)
    corpus = FakeCorpus(19)  # tokens 10 to 28
    _, slid = evaluate(model, corpus, "test", codec, Sliding(3, 9 - stride, stride))
    _, carried = evaluate(model, corpus, "test", codec, Carried(1, 5))
    torch.testing.assert_close(torch.tensor(slid), torch.tensor(carried), atol=1e-4, rtol=1e-4)


def test_training_reads_each_segment_on_its_own():
    model = decoder().train()
    first, second = torch.randint(VOCABULARY, (2, 2, 8))
    model(first, segment="train:1:0")
    assert torch.equal(model(second, segment="train:1:1")[0], model(second)[0])
    assert model.carried.training_state()["state"] == [{}, {}, {}]


def test_segments_longer_than_the_window_are_refused():
    with pytest.raises(UserError, match="--tokens-per-sample 10: .* at most 9 tokens"):
        decoder().train()(torch.randint(VOCABULARY, (2, 10)), segment="train:1:0")


def test_losses_of_layers_need_the_length_of_the_run():
    """Otherwise they would never end."""
    for max_update, is_training in ((9, True), (0, False)):
        task = SimpleNamespace(
            is_training=is_training,
            cfg=SimpleNamespace(max_update=max_update),
            source_dictionary=dictionary_of(VOCABULARY),
        )
        DeepCharTransformer.build_model(config(), task)
    task.is_training = True
    with pytest.raises(UserError, match="--intermediate-losses: .* --max-update, which is missing"):
        DeepCharTransformer.build_model(config(), task)
    DeepCharTransformer.build_model(config(intermediate_losses=False), task)


def test_dropout_is_where_the_paper_has_it(monkeypatch):
    """In attention weights and inside feed-forward layers; nowhere else, and in training only."""
    seen = []

    def spy(x, p, *args, **kwargs):
        seen.append((tuple(x.shape), p))
        return x

    monkeypatch.setattr("fairseq_sha.ops.attention.dropout", spy)
    monkeypatch.setattr("fairseq_sha.modules.feed_forward.dropout", spy)
    monkeypatch.setattr("fairseq_sha.models.segment_decoder.dropout", spy)
    model = decoder(dropout=0.4).train()
    monkeypatch.setattr(
        "fairseq_sha.models.segment_decoder.dropout", lambda x, p, *args: x if p == 0 else 1 / 0
    )
    model(torch.randint(VOCABULARY, (5, 7)))
    seen = Counter((shape, p) for shape, p in seen if p)
    assert seen == {((10, 7, 7), 0.4): 3, ((7, 5, 24), 0.4): 3}
    tokens = torch.randint(VOCABULARY, (5, 7))
    monkeypatch.undo()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    assert torch.equal(model.eval()(tokens)[0], model(tokens)[0])


def test_windows_slide_over_every_token_once(tmp_path, monkeypatch, caplog):
    """As a user evaluates."""
    data = write_folder(tmp_path / "data", test=833)
    options = f"{OPTIONS['DeepCharTransformer']} --max-update 12 --save-dir {tmp_path}/run"
    done = command("fairseq-train", data, options)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"train_inner.*?auxiliary_loss=", done.stdout)) == 12

    def evaluate(*options):
        options = [*options, "--tokens-per-sample", 20, "--gen-subset", "test", "--cpu"]
        path = tmp_path / "run" / "checkpoint_last.pt"
        log = in_process("eval_lm", monkeypatch, caplog, data, "--path", path, *options)
        assert "Evaluated 832 tokens" in log
        return log, float(re.search(r"Loss \(base 2\): ([0-9.]+)", log).group(1))

    log, slid = evaluate("--batch-size", 5, "--context-window", 19)
    assert "sliding window, context of at least 19, stride 1" in log
    assert slid == evaluate("--batch-size", 64, "--context-window", 19)[1]
    assert "state carried" in evaluate("--batch-size", 1)[0]


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(width=0), "--width"),
        (dict(num_layers=0), "--num-layers"),
        (dict(n_head=3), "--n-head 3"),
        (dict(d_inner=0), "--d-inner"),
        (dict(window=0), "--window"),
        (dict(eval_stride=0), "--eval-stride"),
        (dict(eval_stride=10), "--eval-stride 10: must divide --window 9"),
        (dict(num_targets=0), "--num-targets"),
        (dict(further_target_weight=-1.0), "--further-target-weight"),
        (dict(dropout=1.0), "--dropout"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        decoder(**fields)
