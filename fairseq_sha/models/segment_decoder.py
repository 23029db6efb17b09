"""What all model families share: a decoder reads a segment of parallel streams, starting from the
state that the previous segment left, and leaves a state for the next one.

The state is a list with one dict of tensors per layer, streams on dimension 1, and one more of the
n-gram embedding if there is one. ``None`` instead of the list means a start from nothing.
"""

import functools
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel
from torch import nn
from torch.utils.checkpoint import checkpoint

import fairseq_sha
from fairseq_sha import compatibility
from fairseq_sha.errors import UserError
from fairseq_sha.models.carried_state import CarriedState
from fairseq_sha.models.embeddings import AdaptiveEmbedding
from fairseq_sha.models.heads import AdaptiveSoftmaxHead, SoftmaxHead, widen
from fairseq_sha.ops import dropout

#: Comes with logits where fairseq expects features. It divides by the temperature of generation
#: whatever it gets, which is right for logits only.
LOGITS = {"attn": None}


@dataclass(frozen=True)
class Context:
    """What a layer is told besides its input and its state. A family whose layers need more
    extends it in :meth:`SegmentDecoder.prepare`."""

    #: Whether the pass is for training: whether to apply dropout and to add auxiliary losses.
    training: bool = False
    #: Updates made so far.
    num_updates: int = 0
    #: Updates that the whole run will make; 0 if unknown.
    total_updates: int = 0

    @property
    def progress(self):
        """The share of training that is done, from 0 to 1; 0 if the run's length is unknown."""
        return min(1.0, self.num_updates / self.total_updates) if self.total_updates else 0.0


class Pass(NamedTuple):
    """What reading a segment gave."""

    features: torch.Tensor  # [T, B, H], after the last norm and dropout
    state: list
    hidden: list  # the output of each layer, [T, B, H]; None where windows move
    context: Context


class SegmentDecoder(FairseqIncrementalDecoder):
    """Embeds tokens, runs the layers, and predicts the next token.

    Args:
        dictionary (~fairseq.data.Dictionary): the vocabulary, of size ``V``
        layers (list of nn.Module): each takes ``h [T, B, H]``, its state, which is a dict that is
            empty at a start, and a :class:`Context`; it returns the new ``h`` and its new state
        width (int): ``H``
        bands (~fairseq_sha.models.embeddings.Bands): for an adaptive input and softmax; None for a
            softmax over the whole vocabulary
        tied (bool): without bands: whether the head shares the embedding's weight or has its own
        embedding_scale (float): factor on the embedded tokens
        dropout_embedding (float): on whole rows of the embedding matrix
        dropout_input (float): on the embedded tokens
        dropout_output (float): on the last layer's output
        final_norm (nn.Module): for the last layer's output, or None
        ngrams (~fairseq_sha.modules.NGramEmbedding): what n-grams add to the embedded tokens, or
            None
    """

    #: The longest segment whose tokens may see each other; longer ones are read in pieces. None if
    #: there is no bound.
    max_segment = None
    #: The longest window whose tokens all see each other, for a model that may also be evaluated in
    #: windows that overlap, each from nothing. 0 for one that needs the state of all text before.
    longest_window = 0
    #: Whether there is a state between segments in training, too.
    has_training_state = True
    #: Whether training needs a criterion that adds :meth:`auxiliary_losses`.
    has_auxiliary_losses = False
    #: Dimensions of ``[T, B, H]`` along which the dropout of input and output shares one mask.
    shared_dropout = ()
    #: How many tokens ahead each position predicts. Beyond one, batches hold ``further_targets``.
    num_targets = 1

    def __init__(
        self,
        dictionary,
        layers,
        width,
        bands=None,
        tied=True,
        embedding_scale=1.0,
        dropout_embedding=0.0,
        dropout_input=0.0,
        dropout_output=0.0,
        final_norm=None,
        ngrams=None,
    ):
        super().__init__(dictionary)
        if bands is None:
            self.embedding = nn.Embedding(len(dictionary), width)
        else:
            self.embedding = AdaptiveEmbedding(bands)
        self.ngrams = ngrams
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        if bands is None:
            tied_weight = self.embedding.weight if tied else None
            self.head = SoftmaxHead(width, len(dictionary), tied_weight)
        else:
            self.head = AdaptiveSoftmaxHead(self.embedding)
            # Where fairseq looks for it; past nn.Module, which would take it for a second head.
            self.__dict__["adaptive_softmax"] = self.head
        self.bands = bands
        self.embedding_scale = embedding_scale
        self.dropout_embedding = dropout_embedding
        self.dropout_input = dropout_input
        self.dropout_output = dropout_output
        self.carried = CarriedState()
        #: The state that generation starts from, one stream for each hypothesis; None for nothing.
        self.generation_start = None
        self.num_updates = 0
        #: Updates that the run will make, which the task knows; 0 if unknown.
        self.total_updates = 0
        #: Whether to recompute each layer for its gradient instead of keeping its activations.
        self.checkpoint_activations = False
        #: With what probability a training segment of a stream starts from a state of zeros.
        self.drop_state_probability = 0.0
        self._register_state_dict_hook(_leave_out_tied)
        self._register_load_state_dict_pre_hook(self._complete_state_dict)

    # What fairseq calls.

    def forward(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        src_lengths=None,
        segment=None,
        targets=None,
        further_targets=None,
    ):
        """Logits of a batch, or the losses of its targets.

        Args:
            prev_output_tokens (LongTensor): ``[B, T]``
            incremental_state (dict): fairseq's, when generating: only the last token is read, from
                the state that the one before it left
            segment (str): which :class:`~fairseq_sha.data.segments.SegmentId` the batch is; without
                it the decoder starts from nothing and keeps nothing
            targets (LongTensor): ``[B, T]``
            further_targets (LongTensor): the tokens after the targets, ``[num_targets - 1, B, T]``,
                for auxiliary losses

        Returns:
            Without targets: logits ``[B, T, V]`` (of the last token only, when generating) and
            None. With an adaptive softmax, features ``[B, T, H]``, which fairseq's
            ``adaptive_loss`` expects, except when generating: logits and :data:`LOGITS`. With
            targets: the loss of each in nats, ``[B, T]``, and a dict that is empty except in
            training: ``auxiliary_losses`` and ``statistics``, see :meth:`auxiliary_losses` and
            :meth:`statistics`.
        """
        done = self._read_batch(prev_output_tokens, incremental_state, segment)
        features = done.features.transpose(0, 1)
        if targets is None and self.bands:
            if incremental_state is None:
                return features, None
            return self.head.logits(features), LOGITS
        if targets is None:
            return self.head.logits(features), None
        extra = {}
        if self.training:
            extra = {
                "auxiliary_losses": self.auxiliary_losses(done, targets, further_targets),
                "statistics": self.statistics(),
            }
        return self.head.losses(features, targets, self.training), extra

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        """fairseq's, which takes :data:`LOGITS` for features where there is an adaptive softmax."""
        if net_output[1] is LOGITS:
            scores = widen(net_output[0]).log_softmax(-1)
            return scores if log_probs else scores.exp()
        return super().get_normalized_probs(net_output, log_probs, sample)

    def extract_features(self, prev_output_tokens, incremental_state=None, segment=None, **unused):
        """The features ``[B, T, H]`` that the head reads, and None. Arguments as for
        :meth:`forward`."""
        done = self._read_batch(prev_output_tokens, incremental_state, segment)
        return done.features.transpose(0, 1), None

    def output_layer(self, features):
        """Features ``[..., H]`` to logits ``[..., V]``."""
        return self.head.logits(features)

    def set_num_updates(self, num_updates):
        """fairseq's hook before each training batch."""
        self.num_updates = num_updates
        self.carried.begin_update(num_updates)

    def max_positions(self):
        """fairseq's hook: text may be of any length."""
        return sys.maxsize

    # What a family may override.

    def prepare(self, h, state, context):
        """What the layers need in common: the :class:`Context`, or a family's own kind of it.

        Args:
            h (Tensor): the embedded tokens, ``[T, B, H]``
            state (list of dict): one per layer, all of them empty at a start
        """
        return context

    def combine(self, hidden, context):
        """What the last norm and the head read of the layers.

        Args:
            hidden (list of Tensor): the output of each layer, ``[T, B, H]``
            context (Context): what :meth:`prepare` returned

        Returns:
            Tensor ``[T, B, H]``
        """
        return hidden[-1]

    def auxiliary_losses(self, done, targets, further_targets=None):
        """What training minimises besides the loss of the targets.

        Args:
            done (Pass): with the output of each layer
            targets (LongTensor): ``[B, T]``
            further_targets (LongTensor): ``[num_targets - 1, B, T]``, or None

        Returns:
            dict of Tensors ``[]`` by name, in nats per target
        """
        return {}

    def statistics(self):
        """What training logs besides losses: a dict of Tensors ``[]`` by name, no gradient."""
        return {}

    def bounded_parameters(self):
        """Parameters that must stay within bounds: a list of ``(parameter, low, high)``. The task
        clamps them after each update."""
        return []

    # Reading.

    def read(self, tokens, state, training=False):
        """Read a segment.

        Args:
            tokens (LongTensor): ``[T, B]``
            state (list): what the segment before left; None for nothing
            training (bool): whether dropout acts

        Returns:
            features ``[T, B, H]`` and the new state
        """
        done = self._read(tokens, state, training)
        return done.features, done.state

    def _read_batch(self, prev_output_tokens, incremental_state, segment):
        tokens = prev_output_tokens.t()
        if incremental_state is not None:
            before = self.get_generation_state(incremental_state)
            done = self._read(tokens[-1:], before, self.training)
            self.set_generation_state(incremental_state, done.state)
        elif segment is not None:
            before = self.carried.before(segment, self.training)
            done = self._read(tokens, self._drop_state(before), self.training)
            self.carried.keep(segment, self.training, before, done.state)
        else:
            done = self._read(tokens, None, self.training)
        return done

    def _drop_state(self, state):
        """The state with zeros for some streams, in training. fairseq seeds random numbers anew for
        each update, so that a resumed run, or an update tried again, drops the same."""
        if not self.training or self.drop_state_probability == 0 or not state:
            return state
        tensors = [tensor for layer in state for tensor in layer.values()]
        if not tensors:
            return state
        # Drawn on the CPU: where to drop does not depend on the device.
        kept = torch.rand(tensors[0].size(1)) >= self.drop_state_probability

        def drop(tensor):
            shape = (1, -1) + (1,) * (tensor.dim() - 2)
            return tensor.masked_fill(~kept.view(shape).to(tensor.device), 0)

        return [{key: drop(tensor) for key, tensor in layer.items()} for layer in state]

    def _read(self, tokens, state, training):
        context = Context(training, self.num_updates, self.total_updates)
        if self.max_segment is None or len(tokens) <= self.max_segment:
            return self._read_piece(tokens, state, context)
        pieces = []
        for piece in tokens.split(self.max_segment):
            pieces.append(self._read_piece(piece, state, context))
            state = pieces[-1].state
        features = torch.cat([piece.features for piece in pieces])
        hidden = [torch.cat(outputs) for outputs in zip(*(piece.hidden for piece in pieces))]
        return Pass(features, state, hidden, context)

    def _read_piece(self, tokens, state, context):
        state = state or [{}] * self.num_states
        new_state, ngram_state, hidden = [], [], []
        h = self.embed(tokens, context.training)
        if self.ngrams is not None:
            added, after = self.ngrams(tokens, state[-1])
            h = h + dropout(added, self.dropout_input, context.training, self.shared_dropout)
            ngram_state.append(after)
        context = self.prepare(h, state, context)
        for layer, layer_state in zip(self.layers, state):
            if self.checkpoint_activations and torch.is_grad_enabled():
                layer = functools.partial(checkpoint, layer, use_reentrant=False)
            h, after = layer(h, layer_state, context)
            new_state.append(after)
            hidden.append(h)
        new_state += ngram_state
        h = self.combine(hidden, context)
        if self.final_norm is not None:
            h = self.final_norm(h)
        features = dropout(h, self.dropout_output, context.training, self.shared_dropout)
        return Pass(features, new_state, hidden, context)

    @property
    def num_states(self):
        """How many dicts of tensors a state has."""
        return len(self.layers) + (self.ngrams is not None)

    def embed(self, tokens, training):
        """Tokens ``[T, B]`` to what the first layer reads of each, ``[T, B, H]``."""
        h = self.embedding(tokens, training) if self.bands else self.embedding(tokens)
        if training and self.dropout_embedding > 0:
            rows = h.new_ones(len(self.dictionary), 1)
            h = h * dropout(rows, self.dropout_embedding)[tokens]
        if self.embedding_scale != 1:
            h = h * self.embedding_scale
        return dropout(h, self.dropout_input, training, self.shared_dropout)

    def compile_layers(self):
        """Have torch compile each layer at its first segment, for any length. Recurrences stay as
        they are: compiled, they would become one operation after another for each length."""
        import torch._dynamo  # takes seconds

        limit = torch._dynamo.config.cache_size_limit
        torch._dynamo.config.cache_size_limit = max(limit, 8 * len(self.layers))
        for module in self.modules():
            if hasattr(module, "recurrence"):
                module.recurrence = torch._dynamo.disable(module.recurrence)
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def vocabulary_parameters(self):
        """Names and parameters of the embedding and the head, tied ones once."""
        return nn.ModuleList([self.embedding, self.head]).named_parameters()

    # fairseq wants the state of generation as a flat dict of tensors.

    def get_generation_state(self, incremental_state):
        """The state that generation goes on from."""
        flat = self.get_incremental_state(incremental_state, "state")
        if flat is None:
            return self.generation_start
        state = [{} for _ in range(self.num_states)]
        for name, tensor in flat.items():
            layer, key = name.split(".")
            state[int(layer)][key] = tensor
        return state

    def set_generation_state(self, incremental_state, state):
        """Have generation go on from a state that :meth:`read` returned."""
        flat = {
            f"{layer}.{key}": tensor
            for layer, tensors in enumerate(state)
            for key, tensor in tensors.items()
        }
        self.set_incremental_state(incremental_state, "state", flat)

    def reorder_incremental_state(self, incremental_state, new_order):
        """fairseq's hook in beam search: stream ``i`` goes on from what was ``new_order[i]``."""
        flat = self.get_incremental_state(incremental_state, "state")
        if flat:
            streams = next(iter(flat.values())).size(1)
            # Without a beam nothing moves, and a copy may take longer than the rest of a step.
            if torch.equal(new_order, torch.arange(streams, device=new_order.device)):
                return
            flat = {name: tensor.index_select(1, new_order) for name, tensor in flat.items()}
            self.set_incremental_state(incremental_state, "state", flat)

    # Tied parameters are saved once, as the embedding's.

    def tied_parameters(self):
        """The head's parameters that are the embedding's: a dict from names to names there."""
        names = {id(p): name for name, p in self.embedding.named_parameters()}
        ours = self.head.named_parameters()
        return {f"head.{n}": f"embedding.{names[id(p)]}" for n, p in ours if id(p) in names}

    def _complete_state_dict(self, state_dict, prefix, *unused):
        for name in ("weight", "bias"):  # as version 0.1 called them
            if f"{prefix}output_{name}" in state_dict:
                state_dict[f"{prefix}head.{name}"] = state_dict.pop(f"{prefix}output_{name}")
        for name, saved in self.tied_parameters().items():
            if f"{prefix}{saved}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{saved}"]


def _leave_out_tied(decoder, state_dict, prefix, local_metadata):
    for name in decoder.tied_parameters():
        state_dict.pop(f"{prefix}{name}")


class SegmentLanguageModel(FairseqLanguageModel):
    """What fairseq registers: a model is a subclass whose ``build_model`` gives it its decoder, a
    :class:`SegmentDecoder`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """fairseq's, which looks up the task by its name and loads the checkpoint first."""
        fairseq_sha.register()
        compatibility.apply()
        return super().from_pretrained(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        """fairseq's, with one line that says what does not fit.

        Raises:
            UserError: the weights are of another model, or of other sizes
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            _, _, first = str(error).partition("\n")
            first = first.strip().split("\n")[0]
            raise UserError(
                f"the checkpoint is of another model or other sizes ({first[:200]}); "
                "give the options that it was trained with"
            )

    def prepare_for_inference_(self, cfg):
        """fairseq's hook in evaluation and generation, which leaves bfloat16 to the model."""
        super().prepare_for_inference_(cfg)
        if cfg.common.bf16:
            self.to(torch.bfloat16)
