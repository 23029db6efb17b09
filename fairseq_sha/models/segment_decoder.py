"""What all models here have in common: a decoder that reads a segment of parallel streams, starting
from the state that the previous segment left, and leaves a state for the next.

The state is a list with one dict of tensors per layer, streams on dimension 1; ``None`` instead of
the list is a start, from nothing.
"""

import functools

import torch
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel
from torch import nn
from torch.utils.checkpoint import checkpoint

import fairseq_sha
from fairseq_sha import compatibility
from fairseq_sha.errors import UserError
from fairseq_sha.models.carried_state import CarriedState
from fairseq_sha.ops import dropout


class SegmentDecoder(FairseqIncrementalDecoder):
    """Embeds tokens, runs the layers, and projects to the vocabulary.

    Args:
        dictionary (~fairseq.data.Dictionary): the vocabulary, of size ``V``
        layers (list of nn.Module): each takes ``h [T, B, H]`` and its state, a dict that is empty
            at a start (and what :meth:`inputs_of_layers` gives), and returns the new ``h`` and the
            state that it leaves
        width (int): ``H``
        tied (bool): whether the output has the embedding's weights, or its own
        embedding_scale (float): factor on the embedded tokens
        dropout_embedding (float): on whole rows of the embedding matrix
        dropout_input (float): on the embedded tokens
        dropout_output (float): on the last layer's output
        final_norm (nn.Module): for the last layer's output, or None
    """

    def __init__(
        self,
        dictionary,
        layers,
        width,
        tied=True,
        embedding_scale=1.0,
        dropout_embedding=0.0,
        dropout_input=0.0,
        dropout_output=0.0,
        final_norm=None,
    ):
        super().__init__(dictionary)
        self.embedding = nn.Embedding(len(dictionary), width)
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        if tied:
            self.output_weight = None
            self.output_bias = nn.Parameter(torch.zeros(len(dictionary)))
        else:
            output = nn.Linear(width, len(dictionary))
            self.output_weight, self.output_bias = output.weight, output.bias
        self.embedding_scale = embedding_scale
        self.dropout_embedding = dropout_embedding
        self.dropout_input = dropout_input
        self.dropout_output = dropout_output
        self.carried = CarriedState()
        #: Whether to compute each layer anew for its gradient instead of keeping what lies inside.
        self.checkpoint_activations = False

    def forward(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        src_lengths=None,
        segment=None,
    ):
        """Logits of a batch.

        Args:
            prev_output_tokens (LongTensor): ``[B, T]``
            incremental_state (dict): fairseq's, when generating: only the last token is read, from
                the state that the one before it left
            segment (str): which :class:`~fairseq_sha.data.SegmentId` the batch is; without it the
                decoder starts from nothing and leaves nothing

        Returns:
            logits ``[B, T, V]`` (of the last token only, when generating), and what criterions
            may want besides: :meth:`extra` in training, else None
        """
        features, extra = self.extract_features(
            prev_output_tokens, incremental_state=incremental_state, segment=segment
        )
        return self.output_layer(features), extra

    def extract_features(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        src_lengths=None,
        segment=None,
    ):
        """What :meth:`output_layer` projects: ``[B, T, H]``. Arguments as for :meth:`forward`."""
        tokens = prev_output_tokens.t()
        if incremental_state is not None:
            state = self._state_of_generation(incremental_state)
            features, state = self.read(tokens[-1:], state)
            self.keep_state_of_generation(incremental_state, state)
        elif segment is not None:
            before = self.carried.before(segment, self.training)
            features, after = self.read(tokens, before)
            self.carried.keep(segment, self.training, before, after)
        else:
            features, _ = self.read(tokens, None)
        return features.transpose(0, 1), self.extra() if self.training else None

    #: Whether training needs a criterion that adds the auxiliary losses of :meth:`extra`.
    has_auxiliary_losses = False

    def extra(self):
        """What a model's training needs besides logits, or None: a dict of
        ``auxiliary_losses``, Tensors ``[]`` by name, in nats per prediction, and ``statistics``,
        Tensors ``[]`` by name, without gradient, to be logged."""
        return None

    def bounded_parameters(self):
        """Parameters that must stay within bounds: a list of ``(parameter, low, high)``. The task
        clamps them after each update."""
        return []

    def set_num_updates(self, num_updates):
        """fairseq's hook before each batch that is trained on."""
        self.carried.begin_update(num_updates)

    def read(self, tokens, state):
        """Run a segment: tokens ``[T, B]`` and state to features ``[T, B, H]`` and new state."""
        h = self.embed(tokens)
        state = state or [{}] * len(self.layers)
        left = []
        for layer, before, others in zip(self.layers, state, self.inputs_of_layers(h, state)):
            if self.checkpoint_activations and torch.is_grad_enabled():
                layer = functools.partial(checkpoint, layer, use_reentrant=False)
            h, after = layer(h, before, *others)
            left.append(after)
        if self.final_norm is not None:
            h = self.final_norm(h)
        return dropout(h, self.dropout_output, self.training), left

    def compile_layers(self):
        """Have torch compile each layer at its first segment, for any length; recurrences, which
        would be compiled into one operation after another for each length, run as they did."""
        import torch._dynamo  # takes seconds

        limit = torch._dynamo.config.cache_size_limit
        torch._dynamo.config.cache_size_limit = max(limit, 8 * len(self.layers))
        for module in self.modules():
            if hasattr(module, "recurrence"):
                module.recurrence = torch._dynamo.disable(module.recurrence)
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def inputs_of_layers(self, h, state):
        """What each layer is given after ``h`` and its state: a list of tuples."""
        return [()] * len(self.layers)

    def embed(self, tokens):
        """Tokens ``[T, B]`` to ``h [T, B, H]`` for the first layer."""
        h = self.embedding(tokens)
        if self.training and self.dropout_embedding > 0:
            rows = torch.ones_like(self.embedding.weight[:, :1])
            h = h * dropout(rows, self.dropout_embedding)[tokens]
        if self.embedding_scale != 1:
            h = h * self.embedding_scale
        return dropout(h, self.dropout_input, self.training)

    def output_layer(self, features):
        """Features ``[..., H]`` to logits ``[..., V]``."""
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return nn.functional.linear(features, weight, self.output_bias)

    # fairseq wants the state of generation as a flat dict of tensors.

    def _state_of_generation(self, incremental_state):
        flat = self.get_incremental_state(incremental_state, "state")
        if flat is None:
            return None
        state = [{} for _ in self.layers]
        for name, tensor in flat.items():
            layer, key = name.split(".")
            state[int(layer)][key] = tensor
        return state

    def keep_state_of_generation(self, incremental_state, state):
        """Make a state that :meth:`read` left the one that generation goes on from."""
        flat = {
            f"{layer}.{key}": tensor
            for layer, tensors in enumerate(state)
            for key, tensor in tensors.items()
        }
        self.set_incremental_state(incremental_state, "state", flat)

    def reorder_incremental_state(self, incremental_state, new_order):
        """fairseq's hook in beam search: stream ``i`` goes on from what was ``new_order[i]``."""
        flat = self.get_incremental_state(incremental_state, "state")
        if flat is not None:
            flat = {name: tensor.index_select(1, new_order) for name, tensor in flat.items()}
            self.set_incremental_state(incremental_state, "state", flat)


class SegmentLanguageModel(FairseqLanguageModel):
    """What fairseq registers: a model is a subclass whose ``build_model`` gives it its decoder, a
    :class:`SegmentDecoder`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """fairseq's, which looks for the task by its name and loads the checkpoint first."""
        fairseq_sha.register()
        compatibility.apply()
        return super().from_pretrained(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        """fairseq's, with one line that says what does not fit."""
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
