"""A trained SHA-RNN as an :class:`~fairseq_sha.portable.model.IntegerModel`. The only file of this
package that imports torch."""

import collections

import numpy as np
import torch
import torch.nn.functional as F

from fairseq_sha.errors import UserError
from fairseq_sha.models.sha_rnn import SHARNNDecoder
from fairseq_sha.modules.boom import GELU_SLOPE, Boom
from fairseq_sha.modules.overparameterised_vector import OverparameterisedVector
from fairseq_sha.portable import model as form

#: Activations may grow so much beyond what calibration saw before they are clamped.
MARGIN = 1.25
#: The largest value that calibration saw may grow so much.
VALUE_MARGIN = 2.0
LARGEST_SHIFT = 36
#: What has an integer form, for messages.
SUPPORTED = "SHA-RNN of bytes with --cell lstm, sru or min_gru"


def check(trained):
    """Raise a UserError if a model has no integer form.

    Args:
        trained (~fairseq_sha.trained_model.TrainedModel): any
    """
    cfg, decoder = trained.cfg.model, trained.decoder
    what = None
    if not isinstance(decoder, SHARNNDecoder):
        what = f"--arch {cfg._name}"
    elif trained.codec.name != "bytes":
        what = f"a model of {trained.codec.name}"
    elif str(cfg.cell) not in form.CELLS:
        what = f"--cell {cfg.cell}"
    elif not all(isinstance(layer.boom, Boom) for layer in decoder.layers):
        what = "a model with --feed-forward full"
    elif decoder.bands is not None:
        what = "a model with --cutoffs"
    if what:
        raise UserError(f"{what} has no integer form; {SUPPORTED} has one")
    for name, most in form.MOST_SIZES.items():
        option = "num_layers" if name == "layers" else name
        value = cfg[option]
        if value > most:
            option = option.replace("_", "-")
            raise UserError(f"--{option} {value}: the integer form has at most {most}")
    number, longest = len(cfg.ngram_orders), max(cfg.ngram_orders, default=0)
    rows = number * cfg.ngram_buckets
    if number > form.MOST_NGRAMS or longest > form.LONGEST_NGRAM or rows > form.MOST_NGRAM_ROWS:
        raise UserError(
            f"--ngram-orders {cfg.ngram_orders} --ngram-buckets {cfg.ngram_buckets}: the integer "
            f"form has at most {form.MOST_NGRAMS} lengths of at most {form.LONGEST_NGRAM} bytes, "
            f"and {form.MOST_NGRAM_ROWS:,} rows in all"
        )


@torch.no_grad()
def convert(trained, sample, per_row=True):
    """The sizes and arrays of the integer form.

    Args:
        trained (~fairseq_sha.trained_model.TrainedModel): on the CPU; :func:`check` accepts it
        sample (LongTensor): tokens of train ``[T, B]``, to see how large activations become
        per_row (bool): whether each row of a matrix has a scale of its own, or all rows share one

    Returns:
        :class:`~fairseq_sha.portable.model.Sizes` and :class:`~fairseq_sha.portable.model.Arrays`
    """
    decoder, cfg = trained.decoder, trained.cfg.model
    texts = trained.codec.texts()
    known = {text[0]: token for token, text in enumerate(texts) if text}
    largest = _calibrate(decoder, sample, trained.cfg.task.tokens_per_sample)
    fraction = 16
    while max(largest.values()) * VALUE_MARGIN * 2**fraction > form.MOST_VALUE and fraction > 10:
        fraction -= 1
    sizes = form.Sizes(
        cell=str(cfg.cell),
        width=cfg.width,
        layers=cfg.num_layers,
        boom_multiple=cfg.boom_multiple,
        attention_layers=tuple(sorted(set(cfg.attention_layers))),
        window=cfg.window,
        fraction=fraction,
        known=tuple(sorted(known)),
        ngram_orders=tuple(cfg.ngram_orders),
        ngram_buckets=cfg.ngram_buckets if cfg.ngram_orders else 0,
    )
    writer = _Writer(sizes, largest, per_row)
    writer.tables()
    tokens = [known[byte] for byte in sizes.known]
    writer.embedding(decoder, [*tokens, trained.dictionary.unk()])
    for index, layer in enumerate(decoder.layers):
        writer.layer(index, layer)
    writer.linear("head", [(decoder.head.weight[tokens], "features")], decoder.head.bias[tokens])
    return sizes, writer.arrays()


def _calibrate(decoder, sample, length):
    """The largest absolute number in each place: a dict."""
    largest = collections.defaultdict(float)

    def see(name, tensor):
        largest[name] = max(largest[name], float(tensor.abs().max()))

    def watch(module, name):
        def hook(module, inputs, output):
            see(name, output[0] if isinstance(output, tuple) else output)

        hooks.append(module.register_forward_hook(hook))

    hooks = []
    for index, layer in enumerate(decoder.layers):
        for name, module in layer.named_modules():
            if name.startswith("norm") or name in ("cell", "cell.input", "attention.query"):
                watch(module, f"{index}.{name}")
        watch(layer, f"{index}")
        if layer.attention is not None:
            watch_query(layer.attention, f"{index}.query", see, hooks)
        watch_boom(layer, f"{index}.boom", see, hooks)
    try:
        state = None
        for segment in sample.split(length):
            features, state = decoder.read(segment, state)
            see("features", features)
            see("logits", decoder.head.logits(features))
            for index, layer in enumerate(state):
                for key, tensor in layer.items():
                    if key != "memory":
                        see(f"{index}.state.{key}", tensor)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(largest)


def watch_query(attention, name, see, hooks):
    """Have ``see`` get the queries, with both gates."""
    gates = torch.sigmoid(attention.query_gate) * torch.sigmoid(attention.key_gate)
    hooks.append(
        attention.query_norm.register_forward_hook(lambda m, i, out: see(name, gates * out))
    )


def watch_boom(layer, name, see, hooks):
    """Have ``see`` get what goes into the sigmoids of the boom layer."""
    linear = layer.boom.linear

    def hook(module, inputs, output):
        see(name, GELU_SLOPE * F.linear(output, linear.weight, linear.bias))

    hooks.append(layer.norm_boom.register_forward_hook(hook))


class _Writer:
    """Collects the arrays, layer by layer."""

    def __init__(self, sizes, largest, per_row):
        self.sizes, self.largest, self.per_row = sizes, largest, per_row
        self.layout = form.layout(sizes)
        self.parts = {name: [] for name in self.layout}

    def arrays(self):
        whole = {}
        for name, (kind, shape) in self.layout.items():
            array = np.array(self.parts[name], np.float64).reshape(shape)
            if np.issubdtype(kind, np.integer) and array.size:
                info = np.iinfo(kind)
                array = np.clip(array, info.min, info.max)
            whole[name] = np.rint(array).astype(kind)
        return form.Arrays(**whole)

    def tables(self):
        """Entry i of the sigmoid's is for the middle of its interval, and that of the exponential
        for its beginning, since a common factor does not matter."""
        steps = np.arange(form.SIGMOID_ENTRIES) - form.SIGMOID_ENTRIES / 2 + 0.5
        sigmoid = 1 / (1 + np.exp(-steps / 2**form.SIGMOID_BITS))
        self.parts["sigmoid"].append(sigmoid * 2**form.SHARE_BITS)
        exp = np.exp(-np.arange(form.EXP_ENTRIES) / 2**form.EXP_BITS)
        self.parts["exp"].append(exp * form.MOST_EXP)
        self.parts["boom_out"].append(2**form.NORM_BITS / GELU_SLOPE)

    def embedding(self, decoder, tokens):
        rows = _array(decoder.embedding.weight[tokens])
        most = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-30)
        if decoder.ngrams is not None:
            number = len(self.sizes.ngram_orders)
            tables = _array(decoder.ngrams.embedding.weight)
            scales = np.maximum(np.abs(tables).max(1, keepdims=True), 1e-30) / 127
            most = most.max() + 127 * scales.reshape(number, -1).max(1).sum()  # of a whole sum
            unit = most / (32767 << form.EMBEDDING_BITS)
            self.parts["ngram_tokens"].append(tokens)
            self.parts["ngram_weight"].append(tables / scales)
            self.parts["ngram_multiplier"].append(scales / unit)
        self.parts["embedding"].append(rows * (32767 / most))

    def layer(self, index, layer):
        cell, width = layer.cell, self.sizes.width
        self.norm("start_norm", layer.norm_start)
        x = f"{index}.norm_start"
        if self.sizes.cell == "lstm":
            self.largest[f"{index}.h"] = 1.0
            maps = [(cell.weight_ih_l0, x), (cell.weight_hh_l0, f"{index}.h")]
            self.linear("cell", maps, cell.bias_ih_l0 + cell.bias_hh_l0)
        else:
            bias = torch.zeros(len(cell.input.weight))
            if self.sizes.cell == "sru":
                bias[width:] = cell.bias.flatten()
                self.parts["state_weight"].append(_array(cell.weight) * 2**form.NORM_BITS)
            self.linear("cell", [(cell.input.weight, x)], bias)
            self.parts["cell_shifts"][-1].append(0)
        if layer.attention is not None:
            self.attention(index, layer)
        self.norm("boom_norm", layer.norm_boom)
        self.norm("residual_norm", layer.norm_residual)
        linear = layer.boom.linear
        maps = [(GELU_SLOPE * linear.weight, f"{index}.norm_boom")]
        self.linear("boom", maps, GELU_SLOPE * linear.bias)

    def attention(self, index, layer):
        attention, fraction = layer.attention, self.sizes.fraction
        self.norm("memory_norm", layer.norm_memory)
        self.norm("middle_norm", layer.norm_mid)
        gates = torch.sigmoid(attention.query_gate) * torch.sigmoid(attention.key_gate)
        self.norm("query_norm", attention.query_norm, gates)
        query = attention.query
        self.linear("query", [(query.weight, f"{index}.norm_mid")], query.bias)
        of_query = self.shift(f"{index}.query", form.query_limit(self.sizes.width))
        of_memory = self.shift(f"{index}.norm_memory", form.MOST_MEMORY)
        self.parts["attention_shifts"].append(
            [*self.parts.pop("query_shifts"), of_query, of_memory]
        )
        unit = 2.0 ** (of_query + of_memory - 2 * fraction) / self.sizes.width**0.5
        self.parts["score_multiplier"].append(unit * 2 ** (form.EXP_BITS + form.SCORE_BITS))
        gate = attention.value_gate
        gate = gate() if isinstance(gate, OverparameterisedVector) else torch.sigmoid(gate)
        self.parts["value_gate"].append(_array(gate) * 2.0 ** (of_memory + form.GATE_BITS))

    def norm(self, name, norm, factor=1.0):
        weight, bias = _array(norm.weight * factor), _array(norm.bias * factor)
        one = 2**form.NORM_BITS
        half = 2 ** (2 * form.NORM_BITS - self.sizes.fraction - 1)  # ">>" then rounds to nearest
        self.parts[name].append([weight * one, bias * one**2 + half])

    def linear(self, name, maps, bias):
        """Round matrices whose results are added: pairs of weight ``[rows, H]`` and of the place
        that its activations come from."""
        rounded, units, shifts = [], [], []
        for weight, place in maps:
            weight = _array(weight)
            scale = np.abs(weight).max(1, keepdims=True)
            scale = np.maximum(scale if self.per_row else scale.max() + 0 * scale, 1e-30) / 127
            rounded.append(np.rint(weight / scale).astype(np.int8))
            shifts.append(self.shift(place, int(form.limits(rounded[-1][None])[0])))
            units.append(scale[:, 0] * 2.0 ** shifts[-1])
        room = np.log2(form.MOST_MULTIPLIER / max(unit.max() for unit in units))
        shift = int(min(LARGEST_SHIFT, np.floor(room)))
        for part, weight, unit in zip((name, "hidden"), rounded, units):
            self.parts[f"{part}_weight"].append(weight)
            self.parts[f"{part}_multiplier"].append(unit * 2.0**shift)
        half = 2.0**shift / 2
        self.parts[f"{name}_bias"].append(
            _array(bias) * 2.0 ** (self.sizes.fraction + shift) + half
        )
        self.parts[f"{name}_shift"].append(shift)
        if name == "query":
            self.parts["query_shifts"] = shifts
        else:
            self.parts[f"{name}_shifts"].append(shifts)

    def shift(self, place, limit):
        """The smallest shift with which activations of a place stay below a limit."""
        largest = self.largest[place] * MARGIN * 2**self.sizes.fraction
        return max(0, int(np.ceil(np.log2(max(largest, 1.0) / limit))))


def _array(tensor):
    return tensor.detach().double().numpy()


@torch.no_grad()
def float_bits(trained, parts):
    """What the float model makes of texts that are read side by side, a byte at a time, as the
    integer form does.

    Args:
        trained (~fairseq_sha.trained_model.TrainedModel): a model of bytes
        parts (list of bytes): of one length ``T``, without bytes that the model does not know

    Returns:
        float: bits in all
    """
    texts = trained.codec.texts()
    ids = [token for token, text in enumerate(texts) if text]
    column = torch.full((len(texts),), -1)
    column[ids] = torch.arange(len(ids))
    tokens = torch.stack([trained.codec.encode(part) for part in parts], 1)
    before = torch.cat([torch.full_like(tokens[:1], trained.codec.start), tokens[:-1]])
    state, nats = None, 0.0
    for row, wanted in zip(before, tokens):
        logits, state = trained.read(row[None], state)
        logs = logits[0, :, ids].double().log_softmax(-1)
        nats -= float(logs.gather(1, column[wanted][:, None]).sum())
    return nats / float(np.log(2))


def text_of(trained, split, size):
    """The first bytes of a split of the model's data folder, up to ``size``."""
    trained.task.load_dataset(split)
    tokens = trained.task.dataset(split).tokens[1 : size + 1]
    return trained.codec.decode(np.array(tokens, np.int64))


def columns(trained, text, streams):
    """Tokens of a text that is read in streams side by side: LongTensor ``[T, streams]``."""
    tokens = trained.codec.encode(text)
    length = max(1, len(tokens) // streams)
    return tokens[: length * streams].view(-1, length).t()
