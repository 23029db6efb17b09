"""What models share that see a fixed window of text, with a position for each place in it.

They are trained on segments of at most one window, each on its own. A score takes a text of any
length, which is read in windows that overlap. There are two ways to do this, and both give the same
figures where the second has one stream:

* by the policy ``Sliding`` (``--context-window``): windows are read side by side, each from
  nothing;
* with carried state, which is also how texts are scored, continued and compressed. Tokens are read
  one after the other until the window is full. The next window begins ``eval_stride`` tokens later:
  the tokens that it has in common with the last one are read again, since their positions are now
  others. Scores do not depend on how the text is cut into segments.
"""

import torch

from fairseq_sha.checks import require_at_least
from fairseq_sha.errors import UserError
from fairseq_sha.models.segment_decoder import Context, SegmentDecoder


class WindowDecoder(SegmentDecoder):
    """A decoder whose layers number positions from the beginning of a window.

    In evaluation the state of each layer holds ``keys`` and ``values`` of the tokens of the current
    window, ``[rows, B, H]`` (see :func:`extend`), and that of the first layer ``tokens``, too:
    ``[rows, B]``, int32. There is no state in training.

    Args:
        dictionary, layers, width: see :class:`SegmentDecoder`
        window (int): tokens of a window
        eval_stride (int): tokens by which windows move in evaluation and generation
        **kwargs: for :class:`SegmentDecoder`
    """

    has_training_state = False

    def __init__(self, dictionary, layers, width, window, eval_stride, **kwargs):
        super().__init__(dictionary, layers, width, **kwargs)
        self.window = self.longest_window = window
        self.eval_stride = eval_stride

    def _read(self, tokens, state, training):
        if training:
            if len(tokens) > self.window:
                raise UserError(
                    f"--tokens-per-sample {len(tokens)}: this model reads at most {self.window} "
                    "tokens at once (--window); use fewer"
                )
            return super()._read(tokens, None, training)
        context = Context(training, self.num_updates, self.total_updates)
        pieces = []
        while len(tokens):
            seen = state[0]["tokens"] if state and state[0] else tokens[:0]
            again, room = tokens[:0], self.window - len(seen)
            if room == 0:
                again, room = seen[self.eval_stride :].to(tokens), self.eval_stride
                state = None
            piece, tokens = tokens[:room], tokens[room:]
            done = self._read_piece(torch.cat([again, piece]), state, context)
            state = done.state
            pieces.append(done.features[len(again) :])
        # The outputs of layers are for the losses of training.
        return done._replace(features=torch.cat(pieces), hidden=None)

    def _read_piece(self, tokens, state, context):
        done = super()._read_piece(tokens, state, context)
        if not context.training:
            seen = state[0]["tokens"] if state and state[0] else tokens[:0].int()
            done.state[0]["tokens"] = torch.cat([seen, tokens.int()])
        return done

    def prepare_for_onnx_export_(self):
        """fairseq's hook.

        Raises:
            UserError: always
        """
        raise UserError(
            "cannot be exported: this model begins a new window now and then, and a graph does the "
            "same at every call"
        )


def extend(state, keys, values, training):
    """Add the keys and values of a segment to those of the window so far.

    Args:
        state (dict): ``keys`` and ``values [rows, B, H]``; or nothing, at the beginning
        keys, values (Tensor): of the segment, ``[T, B, H]``
        training (bool): whether to keep no state

    Returns:
        keys and values ``[rows + T, B, H]``, and the new state
    """
    if state:
        keys = torch.cat([state["keys"], keys])
        values = torch.cat([state["values"], values])
    return keys, values, {} if training else {"keys": keys, "values": values}


def check_window(cfg):
    """Raise a UserError for a window that cannot slide."""
    require_at_least(1, cfg, "window", "eval_stride")
    if cfg.window % cfg.eval_stride:
        raise UserError(
            f"--eval-stride {cfg.eval_stride}: must divide --window {cfg.window}; choose another"
        )
