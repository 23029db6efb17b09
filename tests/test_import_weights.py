"""Weights under the references' names become checkpoints with the references' numbers."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from numpy import uint16
from torch import nn

from fairseq_sha import UserError, commands
from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.codecs import PieceCodec, WordCodec
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.trained_model import TrainedModel
from fairseq_sha.weights_import import import_weights, read_symbols
from tests.conftest import golden_cases
from tests.models import golden
from tests.test_commands import REPOSITORY, RunsCode, in_process
from tests.tiny_corpus import write_split

CASES = {
    (family, name): case
    for family in ("sha_rnn", "transformer_xl", "adaptive_span", "srupp")
    for name, case in golden_cases(family).items()
}
TOKENS_FIRST = {"sha_rnn", "transformer_xl", "srupp"}  # tokens of the case are [total, B]


def settings(family, case):
    if family == "sha_rnn":
        return [f"window={int(case['window'])}"]
    values = {k[len("setting/") :]: v for k, v in case.items() if k.startswith("setting/")}
    if family == "transformer_xl":
        return [
            f"n_head={int(values['n_head'])}",
            f"mem_len={int(values['mem_len'])}",
            f"clamp_len={max(int(values['clamp_len']), 0)}",
            f"same_length={bool(values['same_length'])}",
        ]
    if family == "srupp":
        return [f"n_head={int(values['n_head'])}", f"eval_unroll={int(case['segments'].sum())}"]
    return [f"attn_span={int(values['attn_span'])}", f"adapt_span_ramp={int(values['ramp'])}"]


def first(family):
    """The name of the first case of a family."""
    return next(name for of, name in CASES if of == family)


def state_dict(family, case):
    """The case's parameters and what else the reference's state dict has."""
    weights = golden.parameters(case)
    if family == "sha_rnn":
        weights["decoder.weight"] = weights["encoder.weight"].clone()
    if family == "transformer_xl":
        tied = weights["word_emb.emb_layers.0.weight"]
        weights["crit.out_layers.0.weight"] = tied.clone()
        exponents = torch.arange(0.0, tied.size(1), 2.0) / tied.size(1)
        weights["pos_emb.inv_freq"] = 1 / 10000**exponents
    if family == "srupp":
        for name in list(weights):
            if name.endswith("weight_c"):
                weights[name.replace("weight_c", "scale_x")] = torch.ones(1)
    if family == "adaptive_span":
        span = weights["key_pe"].size(2)
        for name in list(weights):
            if name.endswith("current_val"):
                template = name.replace("current_val", "mask_template")
                weights[template] = torch.linspace(1 - span, 0, steps=span)
    return weights


def tokens(family, case):
    """``[B, total]``"""
    return (case["tokens"].t() if family in TOKENS_FIRST else case["tokens"]).long()


def vocabulary_size(case):
    names = ("encoder.weight", "word_emb.emb_layers.0.weight", "in_emb.weight")
    names += ("embedding_layer.weight",)
    return next(len(case[f"param/{name}"]) for name in names if f"param/{name}" in case)


UNKNOWN = 251  # a byte that no case uses
BYTES = sorted(set(range(256)) - {10, UNKNOWN}, key=lambda value: value * 167 % 256)
BYTES.insert(3, 10)


def byte_of(row):
    """Which byte a row stands for: one of them is newline, and they are in no order that a
    dictionary might have."""
    return BYTES[row]


class Import:
    """Files as a user has them, for one golden case; the test split is its first stream."""

    def __init__(self, folder, family, case):
        self.family, self.case = family, case
        self.weights, self.symbols = folder / "weights.pt", folder / "symbols.txt"
        self.data, self.save = folder / "data", folder / "checkpoint.pt"
        self.data.mkdir()
        self.rows = [byte_of(row) for row in range(vocabulary_size(case))]
        self.symbols.write_text("".join(f"{byte}\n" for byte in self.rows))
        torch.save(state_dict(family, case), self.weights)
        dictionary = Dictionary()
        for byte in self.rows:
            if byte != 10:
                dictionary.add_symbol(str(byte), n=1000 - byte)
        dictionary.finalize(padding_factor=8)
        dictionary.save(str(self.data / "dict.txt"))
        self.dictionary = ByteDictionary.load(str(self.data / "dict.txt"))
        text = bytes(byte_of(int(row)) for row in tokens(family, case)[0])
        for split in ("train", "valid", "test"):
            write_split(text, self.data, split, self.dictionary)

    def ids(self):
        """The token id of each row."""
        id_of = {byte: i for i, byte in enumerate(self.dictionary.bytes_by_id())}
        return torch.tensor([id_of[byte] for byte in self.rows])

    def arguments(self):
        return [self.family, str(self.weights), str(self.symbols), str(self.data), str(self.save)]

    def run(self):
        return import_weights(*self.arguments(), settings(self.family, self.case))


@pytest.fixture
def make(tmp_path):
    return lambda family, name: Import(tmp_path, family, CASES[family, name])


def check_losses(imported):
    """The checkpoint gives the losses that the reference gave."""
    family, case = imported.family, imported.case
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(imported.save)])
    model.eval()
    ids = imported.ids()
    lengths = case["segments"]
    if family == "srupp":
        # Recorded as in training, where the memory is only the segment before.
        lengths = lengths[:2]
    pieces = golden.segments(ids[tokens(family, case)], lengths)
    for i, (inputs, targets) in enumerate(pieces):
        with torch.no_grad():
            logits, _ = model(inputs, segment=f"test:1:{i}")
        losses = golden.token_losses(logits, targets)
        if family == "sha_rnn":
            torch.testing.assert_close(losses.mean(), case[f"loss{i}"].reshape(()))
        else:
            expected = case[f"nll{i}"].t() if family in TOKENS_FIRST else case[f"nll{i}"]
            torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
        others = [i for i in range(len(imported.dictionary)) if i not in ids]
        assert len(others) >= 2 and not logits.softmax(-1)[..., others].any()


@pytest.mark.parametrize("family, name", CASES)
def test_losses_are_the_reference_s(make, family, name):
    imported = make(family, name)
    imported.run()
    check_losses(imported)


def has_even_segments(case):
    """Whether fairseq-eval-lm can cut the case's text as the reference did."""
    *whole, last = case["segments"].tolist()
    return set(whole) == {whole[0]} and last <= whole[0]


@pytest.mark.parametrize(
    "family, name",
    [
        (family, name)
        for family, name in CASES
        if family in ("transformer_xl", "adaptive_span") and has_even_segments(CASES[family, name])
    ],
)
def test_eval_lm_gives_the_reference_s_bits_per_byte(make, monkeypatch, caplog, family, name):
    """One stream in segments of the case's length: all four decimals that are printed."""
    imported = make(family, name)
    imported.run()
    options = ["--cpu", "--gen-subset", "test", "--tokens-per-sample"]
    options += [int(imported.case["segments"][0]), "--path", imported.save]
    text = in_process("eval_lm", monkeypatch, caplog, imported.data, *options)
    nll = [imported.case[f"nll{i}"] for i in range(len(imported.case["segments"]))]
    if family in TOKENS_FIRST:
        nll = [piece.t() for piece in nll]
    bits = torch.cat([piece[0] for piece in nll]).double().mean() / math.log(2)
    printed = re.search(r"Loss \(base 2\): ([0-9.]+)", text).group(1)
    assert float(printed) == pytest.approx(float(bits), abs=1e-4)


def test_command_and_finetuning(make, tmp_path, capsys):
    imported = make("sha_rnn", first("sha_rnn"))
    (window,) = settings("sha_rnn", imported.case)
    options = ["--weights", imported.weights, "--symbols", imported.symbols]
    options += ["--data-bin", imported.data, "--save", imported.save, "--set", window]
    argv = [sys.executable, "-m", "fairseq_sha", "import-weights", "sha_rnn", *options]
    done = subprocess.run(
        [str(word) for word in argv], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{imported.save}: sha_rnn with {window}, for {imported.data}\n"
    assert commands.main(["import-weights", "sha_rnn", *map(str, options)]) == 1
    assert f"{imported.save}: exists already" in capsys.readouterr().err

    cfg = FAMILIES["sha_rnn"].published.sizes(golden.parameters(imported.case))
    attends = ",".join(map(str, cfg.pop("attention_layers"))) or "[]"
    argv = [os.path.join(os.path.dirname(sys.executable), "fairseq-train"), imported.data]
    argv += "--user-dir fairseq_sha --task byte_language_modeling --arch sha_rnn".split()
    argv += [word for k, v in cfg.items() for word in (f"--{k.replace('_', '-')}", v)]
    argv += ["--attention-layers", attends, "--window", window.partition("=")[2]]
    argv += "--batch-size 2 --tokens-per-sample 5 --optimizer adam --lr 0".split()
    argv += "--cpu --max-update 2 --log-format simple --log-interval 1".split()
    argv += ["--save-dir", tmp_path / "tuned", "--finetune-from-model", imported.save]
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    before, after = (
        torch.load(path, weights_only=True)["model"]
        for path in (imported.save, tmp_path / "tuned" / "checkpoint_last.pt")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def altered(change):
    """A change of the state dict."""

    def apply(imported):
        weights = state_dict(imported.family, imported.case)
        change(weights)
        torch.save(weights, imported.weights)

    return apply


def rename(weights, old, new):
    weights[new] = weights.pop(old)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("transformer_xl", altered(lambda w: w.pop("r_w_bias")), "lack 'r_w_bias'"),
        (
            "transformer_xl",
            altered(lambda w: w.pop("layers.0.dec_attn.r_net.weight")),
            "lack 'layers.0.dec_attn.r_net.weight'",
        ),
        (
            "adaptive_span",
            altered(lambda w: rename(w, "layers.0.norm1.bias", "layers.0.norm3.bias")),
            "'layers.0.norm3.bias' has no place",
        ),
        (
            "adaptive_span",
            altered(lambda w: w.update({"layers.0.norm2.bias": w["layers.0.norm2.bias"][1:]})),
            r"'layers.0.norm2.bias' has the shape \[\d+\]; expected \[\d+\]$",
        ),
        (
            "adaptive_span",
            altered(lambda w: w.update({"out_emb.bias": w["out_emb.bias"][1:]})),
            r"'out_emb.bias' has the shape \[\d+\]; expected \[\d+\], one row for each symbol",
        ),
        (
            "adaptive_span",
            altered(lambda w: w.update({"layers.0.norm2.bias": w["layers.0.norm2.bias"][None]})),
            r"'layers.0.norm2.bias' has the shape \[1, \d+\]; expected \[\d+\]$",
        ),
        (
            "transformer_xl",
            altered(lambda w: w["crit.out_layers.0.weight"].add_(1)),
            "'crit.out_layers.0.weight' differs from 'word_emb.emb_layers.0.weight'",
        ),
        (
            "transformer_xl",
            altered(lambda w: w["pos_emb.inv_freq"].mul_(2)),
            "'pos_emb.inv_freq' is not what",
        ),
        (
            "adaptive_span",
            altered(
                lambda w: w["layers.0.attn.attn.adaptive_span._mask.mask_template"].neg_(),
            ),
            "mask_template' is not what",
        ),
        ("sha_rnn", altered(lambda w: w.pop("encoder.weight")), "lack 'encoder.weight'"),
        (
            "sha_rnn",
            altered(lambda w: w.update({"blocks.0.lnmid.x": torch.ones(1)})),
            "'blocks.0.lnmid.x' has no place",
        ),
        (
            "sha_rnn",
            lambda i: torch.save({"model": {}, "optimizer": {}}, i.weights),
            "holds a dict of 'model', 'optimizer', not tensors",
        ),
        ("sha_rnn", lambda i: torch.save([1], i.weights), "holds a list"),
        ("sha_rnn", lambda i: torch.save(torch.ones(2), i.weights), "holds a Tensor"),
        ("sha_rnn", lambda i: torch.save({}, i.weights), "holds nothing"),
        ("sha_rnn", lambda i: i.weights.write_text("text"), "not a state dict that torch loads"),
        ("sha_rnn", lambda i: i.weights.write_bytes(b""), "not a state dict that torch loads"),
        ("sha_rnn", lambda i: os.truncate(i.weights, 5000), "damaged, its contents do not match"),
        ("sha_rnn", lambda i: i.weights.unlink(), "weights.pt: cannot be read"),
        ("sha_rnn", lambda i: i.symbols.unlink(), "symbols.txt: cannot be read"),
        ("sha_rnn", lambda i: i.symbols.write_text(""), "symbols.txt: is empty"),
        ("sha_rnn", lambda i: i.symbols.write_text("10\n256\n"), "line 2: '256' is not a byte"),
        ("sha_rnn", lambda i: i.symbols.write_text("10\n\n"), "line 2: '' is not a byte"),
        ("sha_rnn", lambda i: i.symbols.write_text("10\n11\n10\n"), "line 3: '</s>' appears twice"),
        (
            "sha_rnn",
            lambda i: i.symbols.write_text("".join(f"{b}\n" for b in i.rows[:-1])),
            "which has probability zero",
        ),
        (
            "sha_rnn",
            lambda i: i.symbols.write_text(i.symbols.read_text() + f"{UNKNOWN}\n"),
            f"dictionary lacks '{UNKNOWN}'",
        ),
        ("sha_rnn", lambda i: (i.data / "dict.txt").unlink(), "dict.txt: no such file"),
    ],
)
def test_what_does_not_fit_is_named(make, family, change, message):
    imported = make(family, first(family))
    # The byte that one case leaves out must occur in the data.
    text = bytes(imported.rows)
    write_split(text, imported.data, "test", imported.dictionary)
    change(imported)
    with pytest.raises(UserError, match=message):
        imported.run()
    assert not imported.save.exists() and not list(imported.save.parent.glob("*.unfinished"))


@pytest.mark.parametrize("family", ["sha_rnn", "adaptive_span"])
def test_validate_command_takes_the_checkpoint(make, monkeypatch, caplog, capsys, family):
    imported = make(family, first(family))
    imported.run()
    options = ["--cpu", "--valid-subset", "test", "--batch-size", 1, "--path", imported.save]
    text = in_process("validate", monkeypatch, caplog, imported.data, *options)
    text += capsys.readouterr().out
    assert "valid on 'test' subset" in text


def test_symbols_that_no_data_uses_may_be_missing_from_the_weights(make):
    imported = make("sha_rnn", first("sha_rnn"))
    lines = (imported.data / "dict.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("madeupword")]
    (imported.data / "dict.txt").write_text("\n".join([*lines, f"{UNKNOWN} 0"]) + "\n")
    imported.run()


@pytest.mark.parametrize(
    "setting, message",
    [
        ("mem_len", "give name=value"),
        ("width=16", "give name=value with one of n_head, mem_len"),
        ("n_head=7", "the shapes of the weights say"),
        ("mem_len=many", "mem_len"),
        ("mem_len=[", "mem_len"),
        ("mem_len=-3", "--mem-len -3"),
    ],
)
def test_impossible_settings_are_named(make, setting, message):
    imported = make("transformer_xl", first("transformer_xl"))
    with pytest.raises(UserError, match=message):
        import_weights(*imported.arguments(), [setting])
    assert not imported.save.exists()


def test_weights_that_would_run_code_are_refused(make, tmp_path):
    imported = make("sha_rnn", first("sha_rnn"))
    torch.save({"encoder.weight": RunsCode(str(tmp_path / "ran"))}, imported.weights)
    with pytest.raises(UserError, match="not a state dict that torch loads safely"):
        imported.run()
    assert not (tmp_path / "ran").exists()


def test_unwritable_place_is_named(make, tmp_path):
    imported = make("sha_rnn", first("sha_rnn"))
    imported.save = tmp_path / "nowhere" / "checkpoint.pt"
    with pytest.raises(UserError, match="nowhere/checkpoint.pt: cannot be written"):
        imported.run()


def test_symbols_may_end_without_a_newline(tmp_path):
    (tmp_path / "symbols").write_bytes(b"10\r\n32\r\n255")
    assert read_symbols(tmp_path / "symbols") == ["</s>", "32", "255"]


def test_family_without_published_weights_is_named(make):
    imported = make("sha_rnn", first("sha_rnn"))
    imported.family = "min_rnn"
    with pytest.raises(UserError, match="min_rnn: not a family with published weights; name adap"):
        import_weights(*imported.arguments())


# Transformer-XL with heads of any width


def widen_heads(weights, n_head, d_head, wide):
    """The same function with wider heads: the new columns are zero. Scores are divided by the root
    of the width, for which the queries make up."""

    def pad(rows):  # [..., heads * d_head, width], by heads
        rows = rows.unflatten(0, (n_head, d_head))
        return torch.nn.functional.pad(rows, (0, 0, 0, wide - d_head)).flatten(0, 1)

    scale = (wide / d_head) ** 0.5
    out = dict(weights)
    for name, value in weights.items():
        if name.endswith("qkv_net.weight"):
            query, key, value = value.chunk(3)
            out[name] = torch.cat([pad(query * scale), pad(key), pad(value)])
        elif name.endswith("r_net.weight"):
            out[name] = pad(value)
        elif name.endswith("o_net.weight"):
            out[name] = pad(value.t()).t()
        elif name in ("r_w_bias", "r_r_bias"):
            out[name] = torch.nn.functional.pad(value * scale, (0, wide - d_head))
    return out


@pytest.mark.parametrize("name", [name for family, name in CASES if family == "transformer_xl"])
def test_heads_need_not_share_the_width(make, name):
    imported = make("transformer_xl", name)
    n_head, d_head = imported.case["param/r_w_bias"].shape
    weights = state_dict("transformer_xl", imported.case)
    torch.save(widen_heads(weights, n_head, d_head, d_head + 3), imported.weights)
    assert imported.run().d_head == d_head + 3
    check_losses(imported)


# Words


class ImportOfWords(Import):
    """The same weights, whose rows stand for words."""

    def __init__(self, folder, family, case):
        super().__init__(folder, family, case)
        self.rows = ["</s>" if byte == 10 else f"wörd{byte}" for byte in self.rows]
        self.rows[5] = "<unk>"
        self.symbols.write_text("".join(f"{word}\n" for word in self.rows), encoding="utf-8")
        dictionary = Dictionary()
        for word in sorted(set(self.rows) - {"</s>", "<unk>"}):
            dictionary.add_symbol(word)
        dictionary.save(str(self.data / "dict.txt"))
        ids = torch.tensor([dictionary.index(word) for word in self.rows])
        for split in ("train", "valid", "test"):
            builder = MMapIndexedDatasetBuilder(str(self.data / f"{split}.bin"), dtype=uint16)
            builder.add_item(ids[tokens(family, case)[0]])
            builder.finalize(str(self.data / f"{split}.idx"))
        self.dictionary = WordCodec.load(str(self.data)).dictionary

    def ids(self):
        return torch.tensor([self.dictionary.indices[word] for word in self.rows])

    def run(self):
        return import_weights(*self.arguments(), settings(self.family, self.case), "words")


@pytest.mark.parametrize("family", [f.name for f in FAMILIES.values() if f.published])
def test_rows_may_stand_for_words(tmp_path, family):
    imported = ImportOfWords(tmp_path, family, CASES[family, first(family)])
    imported.run()
    check_losses(imported)
    _, _, task = checkpoint_utils.load_model_ensemble_and_task([str(imported.save)])
    assert task.codec.name == "words"
    task_state = torch.load(imported.save, weights_only=True)["task_state"]
    assert task_state["codec"] == "words" and task_state["symbols"] == imported.dictionary.symbols


@pytest.mark.parametrize("line", ["two words", "", " led", "trailed "])
def test_lines_that_are_no_words_are_named(tmp_path, line):
    (tmp_path / "symbols").write_text(f"the\n{line}\n")
    with pytest.raises(UserError, match="symbols, line 2: .* is not a word"):
        read_symbols(tmp_path / "symbols", "words")


@pytest.mark.parametrize("listing", ["<eos>\n<unk>\nthe\n", "<S> 30\n<UNK> 20\nthe\t10\n"])
def test_symbols_may_be_the_reference_s_own_listing(tmp_path, listing):
    (tmp_path / "symbols").write_text(listing)
    assert read_symbols(tmp_path / "symbols", "words") == ["</s>", "<unk>", "the"]


# Pieces


class ImportOfPieces(Import):
    """The same weights, whose rows stand for pieces in the order of a tokenizer's ids."""

    def __init__(self, folder, family, case):
        super().__init__(folder, family, case)
        merges = ["Ġ a", "Ġa b", "c d"]
        letters = [
            "Ġ",
            "a",
            "b",
            "c",
            "d",
            "Ċ",
            *"éèABCDEFGHIJKLMNOPQRSTUVWXYZefghijklmnopqrstuvwxyz",
        ]
        count = len(self.rows)
        self.rows = [*(m.replace(" ", "") for m in merges), *letters][:count]
        self.symbols = self.data / "pieces.json"
        tokenizer = {
            "version": "1.0",
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"String": "\n"},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": True,
                    },
                ],
            },
            "decoder": None,
            "model": {
                "type": "BPE",
                "vocab": {symbol: i for i, symbol in enumerate(self.rows)},
                "merges": merges,
            },
        }
        self.symbols.write_text(json.dumps(tokenizer), encoding="utf-8")
        dictionary = Dictionary()
        for symbol in sorted(set(self.rows) - {"Ċ"}):
            dictionary.add_symbol(symbol)
        dictionary.finalize(padding_factor=8)
        dictionary.save(str(self.data / "dict.txt"))
        self.dictionary = PieceCodec.load(str(self.data)).dictionary
        for split in ("train", "valid", "test"):
            builder = MMapIndexedDatasetBuilder(str(self.data / f"{split}.bin"), dtype=uint16)
            builder.add_item(self.ids()[tokens(family, case)[0]])
            builder.finalize(str(self.data / f"{split}.idx"))

    def ids(self):
        names = ["</s>" if symbol == "Ċ" else symbol for symbol in self.rows]
        return torch.tensor([self.dictionary.indices[name] for name in names])

    def run(self):
        options = ["--weights", self.weights, "--symbols", self.symbols, "--data-bin", self.data]
        options += ["--save", self.save, "--codec", "pieces"]
        options += [w for s in settings(self.family, self.case) for w in ("--set", s)]
        return commands.main(["import-weights", self.family, *map(str, options)])


@pytest.mark.parametrize("family", ["sha_rnn", "transformer_xl", "srupp"])
def test_rows_may_stand_for_the_pieces_of_a_tokenizer(tmp_path, family):
    imported = ImportOfPieces(tmp_path, family, CASES[family, first(family)])
    assert imported.run() == 0
    check_losses(imported)
    model = TrainedModel.load(imported.save, cpu=True)  # from the checkpoint alone
    shutil.rmtree(imported.data)
    if importlib.util.find_spec("tokenizers"):
        text = b" ab cd\n a"
        symbols = [model.dictionary[token] for token in model.encode(text)]
        assert symbols == ["Ġab", "Ġ", "cd", "</s>", "Ġa"]
        assert model.codec.decode(model.encode(text)) == text


def test_pieces_may_be_listed(tmp_path):
    imported = ImportOfPieces(tmp_path, "sha_rnn", CASES["sha_rnn", first("sha_rnn")])
    assert imported.run() == 0
    expected = torch.load(imported.save, weights_only=True)["model"]
    imported.symbols = tmp_path / "symbols.txt"
    for newline, count in (("Ċ", ""), ("<eos>", " 7")):
        lines = (newline if symbol == "Ċ" else symbol for symbol in imported.rows)
        imported.symbols.write_text("".join(f"{line}{count}\n" for line in lines), "utf-8")
        imported.save.unlink()
        assert imported.run() == 0
        actual = torch.load(imported.save, weights_only=True)["model"]
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def _with_gap(imported):
    tokenizer = json.loads(imported.symbols.read_text("utf-8"))
    tokenizer["model"]["vocab"]["c"] += 500
    imported.symbols = imported.symbols.with_name("gap.json")
    imported.symbols.write_text(json.dumps(tokenizer))


def _other_pieces(imported):
    imported.symbols = imported.symbols.with_name("symbols.txt")
    imported.symbols.write_text("".join(f"{s}\n" for s in [*imported.rows[:-1], "Ā"]), "utf-8")


def _no_piece(imported):
    imported.symbols = imported.symbols.with_name("symbols.txt")
    imported.symbols.write_text("Ġa\nthe end\n", "utf-8")


@pytest.mark.parametrize(
    "change, message",
    [
        (_with_gap, "gap.json: the ids of its pieces have gaps"),
        (_other_pieces, "lacks 'Ā', a symbol of the weights; name the data folder with whose"),
        (_no_piece, "symbols.txt, line 2: 'the end' is not a piece"),
    ],
)
def test_pieces_that_do_not_fit_are_named(tmp_path, capsys, change, message):
    imported = ImportOfPieces(tmp_path, "sha_rnn", CASES["sha_rnn", first("sha_rnn")])
    change(imported)
    assert imported.run() == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not imported.save.exists()


# Words with an adaptive input and softmax

ADAPTIVE_CASES = {
    (family, name): case
    for family in ("transformer_xl", "srupp")
    for name, case in golden_cases(f"{family}_adaptive").items()
}
UNKNOWN_ROW = 4


def adaptive_state_dict(family, case):
    """The case's parameters as the reference's state dict has them, tied ones twice."""
    weights = golden.parameters(case)
    if family == "transformer_xl":
        pairs = [("word_emb.emb_layers.{}.weight", "crit.out_layers.{}.weight")]
        pairs += [("word_emb.emb_projs.{}", "crit.out_projs.{}")]
        width = int(case["setting/d_model"])
        weights["pos_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0.0, width, 2.0) / width)
    else:
        pairs = [("output_layer.out_layers.{}.weight", "embedding_layer.emb_weights.{}")]
        pairs += [("output_layer.out_projs.{}", "embedding_layer.emb_projs.{}")]
    for saved, tied in pairs:
        for i in range(len(case["setting/cutoffs"]) + 1):
            if saved.format(i) in weights and tied.format(i) not in weights:
                weights[tied.format(i)] = weights[saved.format(i)].clone()
    return weights


def adaptive_settings(family, case):
    """As the reference writes them."""
    value = {k[len("setting/") :]: v.tolist() for k, v in case.items() if k.startswith("setting/")}
    shared = [f"div_val={value['div_val']}", f"cutoffs={value['cutoffs']}".replace(" ", "")]
    if family == "transformer_xl":
        names = ("n_head", "d_head", "mem_len", "clamp_len", "same_length")
        return [
            *shared,
            *(f"{name}={value[name]}" for name in names),
            f"tie_projs={[bool(tied) for tied in value['tie_projs']]}",
        ]
    # Recorded as in training, unless same_length is set, with all of the segment before.
    unroll = value["mask_length"] if value["same_length"] else 2 * value["mask_length"]
    return [
        *shared,
        f"attn_heads={value['n_head']}",
        f"attn_every_n_layers={value['attn_every_n_layers']}",
        f"eval_unroll_size={unroll}",
    ]


class AdaptiveImport:
    """Files as a user has them, for one golden case: rows in the order of the reference, which has
    the unknown word somewhere, and a data folder in the order of ours."""

    codec = "words"

    def __init__(self, folder, family, case, shuffled=False):
        self.family, self.case = family, case
        self.weights, self.symbols = folder / "weights.pt", folder / "symbols.txt"
        self.data, self.save = folder / "data", folder / "checkpoint.pt"
        self.settings = adaptive_settings(family, case)
        self.data.mkdir()
        torch.save(adaptive_state_dict(family, case), self.weights)
        rows = len(family_weights(family, case, "bias")) - clusters(family, case)
        self.words = [f"wörd{row}" for row in range(rows)]
        self.words[0], self.words[UNKNOWN_ROW] = "</s>", "<unk>"
        self.write_symbols(self.words)
        ordered = self.words
        if shuffled:
            edges = [0, *case["setting/cutoffs"].tolist(), rows]
            bands = [self.words[i:j] for i, j in zip(edges, edges[1:])]
            ordered = [band[k] for band in bands for k in torch.randperm(len(band)).tolist()]
        self.write_data(ordered)

    def write_symbols(self, words):
        """With the reference's names of special symbols."""
        names = {"</s>": "<eos>"} if self.family == "srupp" else {"</s>": "<S>", "<unk>": "<UNK>"}
        lines = "".join(f"{names.get(word, word)}\n" for word in words)
        self.symbols.write_text(lines, encoding="utf-8")

    def write_data(self, ordered, padding_factor=1):
        """A data folder whose dictionary has these words in this order; its test split is the part
        of the case's first stream that evaluation can cut as the reference did."""
        dictionary = Dictionary()
        for word in ordered:
            if word not in ("</s>", "<unk>"):
                dictionary.add_symbol(word, n=5)
        dictionary.pad_to_multiple_(padding_factor)
        dictionary.save(str(self.data / "dict.txt"))
        self.ids = torch.tensor([dictionary.index(word) for word in self.words])
        self.text = self.ids[self.case["tokens"][: self.lengths().sum() + 1, 0].long()]
        for split in ("train", "valid", "test"):
            builder = MMapIndexedDatasetBuilder(str(self.data / f"{split}.bin"), dtype=uint16)
            builder.add_item(self.text)
            builder.finalize(str(self.data / f"{split}.idx"))

    def lengths(self):
        """Of the segments that evaluation reads as the reference did."""
        lengths = self.case["segments"]
        return lengths if len(lengths.unique()) == 1 else lengths[:2]

    def nll(self):
        """Of the test split, in nats."""
        pieces = [self.case[f"nll{i}"][:, 0] for i in range(len(self.lengths()))]
        return torch.cat(pieces).double().mean()

    def run(self):
        options = ["--weights", self.weights, "--symbols", self.symbols, "--data-bin", self.data]
        options += ["--save", self.save, "--codec", self.codec]
        options += [word for setting in self.settings for word in ("--set", setting)]
        return commands.main(["import-weights", self.family, *map(str, options)])


def family_weights(family, case, name):
    """All bands of the head's weights or biases, one after another."""
    prefix = "crit" if family == "transformer_xl" else "output_layer"
    names = [f"param/{prefix}.out_layers.{i}.{name}" for i in range(9)]
    return torch.cat([case[name] for name in names if name in case])


def clusters(family, case):
    return len(case["setting/cutoffs"]) if family == "srupp" else 0


@pytest.fixture
def make_adaptive(tmp_path):
    def make(family, name=None, **options):
        name = name or next(name for of, name in ADAPTIVE_CASES if of == family)
        return AdaptiveImport(tmp_path, family, ADAPTIVE_CASES[family, name], **options)

    return make


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("family, name", ADAPTIVE_CASES)
def test_imported_words_have_the_published_losses(make_adaptive, family, name, shuffled):
    """Each loss of every stream."""
    imported = make_adaptive(family, name, shuffled=shuffled)
    assert imported.run() == 0
    check_losses_of_words(imported)


def check_losses_of_words(imported):
    """The checkpoint gives the losses that the reference gave."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(imported.save)])
    model.eval()
    case = imported.case
    pieces = golden.segments(imported.ids[case["tokens"].t().long()], imported.lengths())
    for i, (inputs, targets) in enumerate(pieces):
        with torch.no_grad():
            losses, _ = model(inputs, segment=f"test:1:{i}", targets=targets)
        torch.testing.assert_close(losses.t(), case[f"nll{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, name", ADAPTIVE_CASES)
def test_evaluation_of_imported_words_gives_the_published_score(
    make_adaptive, tmp_path, monkeypatch, caplog, capsys, family, name
):
    imported = make_adaptive(family, name)
    assert imported.run() == 0
    out = capsys.readouterr().out
    assert f"cutoffs={imported.case['setting/cutoffs'].tolist()}" in out
    length, scores = str(int(imported.lengths()[0])), tmp_path / "scores.json"
    argv = ["evaluate", imported.data, "--path", imported.save, "--cpu", "--json", scores]
    assert commands.main([*map(str, argv), "--tokens-per-sample", length]) == 0
    score = json.loads(scores.read_text())
    assert score["tokens"] == imported.lengths().sum() and score["sha256"] is None
    assert score["nats"] / score["tokens"] == pytest.approx(float(imported.nll()), abs=1e-5)
    options = [imported.data, "--cpu", "--gen-subset", "test", "--tokens-per-sample", length]
    options += ["--path", imported.save, "--codec", "words"]
    text = in_process("eval_lm", monkeypatch, caplog, *options, task="segment_language_modeling")
    bits = re.search(r"Loss \(base 2\): ([0-9.]+)", text).group(1)
    assert float(bits) == pytest.approx(float(imported.nll()) / math.log(2), abs=1e-4)


def test_validation_of_imported_words_has_the_criterion_for_it(
    make_adaptive, monkeypatch, caplog, capsys
):
    imported = make_adaptive("srupp", "eval_mask")
    imported.run()
    options = ["--cpu", "--valid-subset", "test", "--batch-size", 1, "--path", imported.save]
    in_process("validate", monkeypatch, caplog, imported.data, *options)
    assert "valid on 'test' subset" in caplog.text + capsys.readouterr().out
    config = torch.load(imported.save, weights_only=True)["cfg"]
    assert config["criterion"]["_name"] == "cross_entropy_with_auxiliary_losses"


def test_projections_of_billion_word_are_not_tied(make_adaptive):
    """As in the published checkpoints: the input's differ from the head's."""
    imported = make_adaptive("srupp", "base")
    weights = torch.load(imported.weights, weights_only=True)
    for name in list(weights):
        if "emb_projs" in name:
            weights[name] = torch.randn_like(weights[name])
        if "emb_weights" in name:
            del weights[name]  # a list of tensors, which torch does not save
    torch.save(weights, imported.weights)
    assert imported.run() == 0
    saved = torch.load(imported.save, weights_only=True)
    assert saved["cfg"]["model"]["tied_projections"] == "none"
    for i in range(3):
        for ours, reference in (
            ("embedding.projections", "embedding_layer.emb_projs"),
            ("head.projections", "output_layer.out_projs"),
        ):
            assert torch.equal(saved["model"][f"decoder.{ours}.{i}"], weights[f"{reference}.{i}"])


def test_each_layer_may_have_its_own_biases(make_adaptive):
    """As in the published TensorFlow weights (``untie_r``). Equal ones are like shared ones."""
    imported = make_adaptive("transformer_xl", "large_div4")
    weights = torch.load(imported.weights, weights_only=True)
    names = {"r_w_bias": "content_bias", "r_r_bias": "position_bias"}
    for name in names:
        weights[name] = torch.stack([weights[name]] * 2)
    torch.save(weights, imported.weights)
    assert imported.run() == 0
    check_losses_of_words(imported)
    for name in names:
        weights[name][1] += 1
    torch.save(weights, imported.weights)
    os.remove(imported.save)
    assert imported.run() == 0
    saved = torch.load(imported.save, weights_only=True)
    assert saved["cfg"]["model"]["untie_r"] is True
    for reference, ours in names.items():
        for layer in (0, 1):
            found = saved["model"][f"decoder.layers.{layer}.attention.{ours}"]
            assert torch.equal(found, weights[reference][layer])


def altered_weights(change):
    """A change of the state dict of an :class:`AdaptiveImport`."""

    def apply(imported):
        weights = torch.load(imported.weights, weights_only=True)
        change(weights)
        torch.save(weights, imported.weights)

    return apply


def swapped_words(imported):
    """Row 12 is the last of the first band."""
    words = list(imported.words)
    words[12], words[13] = words[13], words[12]
    imported.write_data(words)


def symbol_that_is_no_word(imported):
    """Instead of one that the text does not have."""
    used = set(imported.text.tolist())
    row = next(row for row, token in enumerate(imported.ids.tolist()) if token not in used)
    imported.write_symbols([*imported.words[:row], "<s>", *imported.words[row + 1 :]])


def given(*settings):
    """Settings instead of the right ones."""

    def apply(imported):
        names = {setting.partition("=")[0] for setting in settings}
        kept = [s for s in imported.settings if s.partition("=")[0] not in names]
        imported.settings = [*kept, *(s for s in settings if not s.endswith("="))]

    return apply


@pytest.mark.parametrize(
    "family, name, change, message",
    [
        (
            "srupp",
            "base",
            altered_weights(lambda w: w["embedding_layer.emb_weights.1"].add_(1)),
            "'embedding_layer.emb_weights.1' differs from 'output_layer.out_layers.1.weight'",
        ),
        (
            "srupp",
            "base",
            altered_weights(lambda w: w["embedding_layer.emb_weights.0"][-1].add_(1)),
            "'embedding_layer.cluster_weight' differs from 'output_layer.cluster_weight'",
        ),
        (
            "srupp",
            "base",
            altered_weights(lambda w: w["embedding_layer.emb_projs.2"].add_(1)),
            "'embedding_layer.emb_projs.2' differs from 'output_layer.out_projs.2'",
        ),
        (
            "transformer_xl",
            "large_div4",
            altered_weights(lambda w: w["crit.out_projs.1"].add_(1)),
            "'crit.out_projs.1' differs from 'word_emb.emb_projs.1'",
        ),
        (
            "transformer_xl",
            "large_div4",
            altered_weights(lambda w: w.pop("crit.out_projs.0")),
            "lack 'crit.out_projs.0'",
        ),
        (
            "transformer_xl",
            "large_div4",
            altered_weights(lambda w: w.pop("crit.cluster_bias")),
            "lack 'crit.cluster_bias'",
        ),
        ("srupp", "base", swapped_words, "'wörd12' in band 2 .* have it in band 1"),
        (
            "srupp",
            "base",
            lambda i: i.write_data(i.words, padding_factor=8),
            "its dictionary has 46 words with </s> and <unk>, the weights have 41",
        ),
        (
            "srupp",
            "base",
            lambda i: i.write_data([*i.words, "other"]),
            "dictionary has 42 words .* without padding",
        ),
        ("srupp", "base", lambda i: i.write_data(i.words[:-1]), "dictionary lacks 'wörd40'"),
        (
            "srupp",
            "base",
            lambda i: i.write_symbols(i.words[:-1]),
            "symbols.txt: has 40 symbols, but the vocabulary of the weights has 41 rows",
        ),
        (
            "srupp",
            "base",
            symbol_that_is_no_word,
            "'<s>' is no word; </s> is the end of a line",
        ),
        ("transformer_xl", "base_div1", given("cutoffs="), "holds 4 bands of 41 words; give the 3"),
        ("transformer_xl", "base_div1", given("cutoffs=12,20"), "give the 3 numbers of words"),
        ("transformer_xl", "base_div1", given("cutoffs=12,20,41"), "give the 3 numbers of words"),
        ("transformer_xl", "base_div1", given("cutoffs=few"), "--set .*cutoffs=few"),
        (
            "transformer_xl",
            "large_div4",
            given("cutoffs=[11,26]"),
            r"--set cutoffs=\[11, 26\]: the shapes of the weights say \[11, 25\]",
        ),
        ("transformer_xl", "large_div4", given("div_val=2"), "the shapes of the weights say 4.0"),
        ("transformer_xl", "large_div4", given("d_head=16"), "the shapes of the weights say 10"),
        ("srupp", "base", given("attn_heads=5"), "--n-head 5"),
        ("srupp", "base", given("attn_every_n_layers=2"), "the shapes of the weights say 1"),
        (
            "transformer_xl",
            "large_div4",
            given("tie_projs=[True,True,True]"),
            "'crit.out_projs.0' differs from 'word_emb.emb_projs.0'; the two are tied",
        ),
        (
            "transformer_xl",
            "large_div4",
            given("tie_projs=False,True"),
            r"--set tie_projs=\[False, True\]: give one of True or False for each of 3 bands",
        ),
        ("transformer_xl", "large_div4", given("tie_projs=some"), "--set tie_projs=some: give one"),
        ("transformer_xl", "large_div4", given("tie_projs=null"), "--set tie_projs=None: give one"),
        ("transformer_xl", "base_div1", given("cutoffs=null"), "--set .*cutoffs=null"),
        ("transformer_xl", "base_div1", given("clamp_len=null"), "--set .*clamp_len=null"),
        ("srupp", "base", given("attn_heads=many"), "--set .*attn_heads=many"),
    ],
)
def test_what_does_not_fit_an_adaptive_softmax_is_named(
    make_adaptive, capsys, family, name, change, message
):
    imported = make_adaptive(family, name)
    change(imported)
    assert imported.run() == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1 and not imported.save.exists()


def test_a_softmax_without_bands_takes_no_cutoffs(make):
    imported = make("transformer_xl", first("transformer_xl"))
    with pytest.raises(UserError, match="--set cutoffs=.*the shapes of the weights say"):
        import_weights(*imported.arguments(), ["cutoffs=[3]"])


def test_pieces_take_no_adaptive_softmax(make_adaptive, capsys):
    imported = make_adaptive("srupp")
    imported.symbols.write_text("".join(f"{chr(256 + i)}\n" for i in range(41)), "utf-8")
    imported.codec = "pieces"
    assert imported.run() == 1
    assert "bands have no place for <unk> and the padding" in capsys.readouterr().err


def test_a_whole_model_is_refused_with_what_to_do(make_adaptive, capsys):
    imported = make_adaptive("transformer_xl")
    torch.save(nn.Linear(2, 2), imported.weights)
    assert imported.run() == 1
    advice = re.search(r"save the weights .*: (torch\.save\(.*\))$", capsys.readouterr().err)[1]
    exec(advice, {"torch": torch, "FILE": imported.weights})
    assert [*torch.load(imported.weights, weights_only=True)] == ["weight", "bias"]


#: Of the published SRU++ checkpoints, for bytes and for words.
SRUPP_NAMES = [
    r"rnn\.rnn_lst\.\d+\.(weight_c|bias)",
    r"rnn\.rnn_lst\.\d+\.layer_norm\.(weight|bias)",
    r"rnn\.rnn_lst\.\d+\.transform_module\.(linear[123]\.weight|alpha)",
    r"rnn\.rnn_lst\.\d+\.transform_module\.layer_norm\.(weight|bias)",
]
SRUPP_BYTES = [r"embedding_layer\.weight", r"output_layer\.(weight|bias)"]
SRUPP_WORDS = [
    r"output_layer\.out_layers\.\d\.(weight|bias)",
    r"output_layer\.out_projs\.\d",
    r"embedding_layer\.emb_(weights|projs)\.\d",
]


@pytest.mark.parametrize(
    "names, vocabulary",
    [
        (state_dict("srupp", CASES["srupp", "two_heads_some_layers"]), SRUPP_BYTES),
        (adaptive_state_dict("srupp", ADAPTIVE_CASES["srupp", "eval_mask"]), SRUPP_WORDS),
    ],
    ids=["bytes", "words"],
)
def test_tests_of_srupp_have_every_published_name(names, vocabulary):
    """The imports above would not notice a name that none of them has."""
    patterns = [*SRUPP_NAMES, r"rnn\.rnn_lst\.\d+\.scale_x", *vocabulary]
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in names)
    for pattern in [*SRUPP_NAMES, *vocabulary]:
        assert any(re.fullmatch(pattern, name) for name in names), pattern
