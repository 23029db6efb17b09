"""A trained model as its users want it: text in, text out, with no file but its checkpoint."""

import argparse
import contextlib
import hashlib
import math
from collections import deque

import numpy as np
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models import MODEL_REGISTRY
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

import fairseq_sha
from fairseq_sha import compatibility
from fairseq_sha.data.codecs import PART, codec_from_state
from fairseq_sha.errors import UserError
from fairseq_sha.evaluation.evaluate import Tally, read_batches, token_losses
from fairseq_sha.evaluation.policies import Carried, Tokens
from fairseq_sha.models.segment_decoder import SegmentDecoder

TASKS = ("byte_language_modeling", "segment_language_modeling")


class TrainedModel(GeneratorHubInterface):
    """fairseq's ``.sample()`` and ``.score()`` of text, and methods that read and write bytes.

    A text is one stream. What a token stands for, and which token stands before the text, is the
    codec's business.

    Args:
        cfg, task, models: as fairseq's ``from_pretrained`` finds them; one model
    """

    def __init__(self, cfg, task, models):
        super().__init__(cfg, task, models)
        self.decoder = models[0].decoder
        self.codec = task.codec
        self.dictionary = task.source_dictionary
        self.identity = None
        self.eval()

    @classmethod
    def load(cls, path, data=None, cpu=False, overrides=None, allow_stock=False, collapse=True):
        """The model of a checkpoint that fairseq wrote.

        Args:
            path (str): the checkpoint
            data (str): data folder that it was trained with, for a checkpoint without its symbols
            cpu (bool): use the CPU even if there is a GPU
            overrides (dict): settings of the model or its task to change
            allow_stock (bool): accept fairseq's own models too, which can be evaluated, and have no
                ``decoder.read``
            collapse (bool): compute over-parameterised vectors once and for all, which is faster;
                weights that learn on must be those that were trained

        Raises:
            OSError: the file cannot be read
            UserError: it is no checkpoint of a model that was trained with one of our tasks
        """
        fairseq_sha.register()
        compatibility.apply()  # before setup_task: the checkpoint must be loaded safely
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        cfg = state["cfg"]
        if cfg is None or getattr(cfg.task, "_name", None) not in TASKS:
            raise UserError(
                f"{path}: was not trained with --task {' or '.join(TASKS)}; name one that was"
            )
        with open_dict(cfg):
            cfg.common.cpu = cpu
            cfg.common.fp16 = cfg.common.bf16 = False
            cfg.dataset.max_tokens = None  # it is for training; prompts may be longer
            cfg.task.data = data or cfg.task.data
            if collapse and "collapse" in cfg.model:
                cfg.model.collapse = True
            _override(cfg, overrides or {})
        saved = state.get("task_state") or {}
        if cfg.model._name not in MODEL_REGISTRY:
            raise UserError(
                f"{path}: --arch {cfg.model._name} is not registered; name the plug-in that has it "
                "with --user-dir"
            )
        try:
            if saved.get("symbols") and data is None:
                codec = codec_from_state(saved)
                task = tasks.setup_task(cfg.task, codec=codec, from_checkpoint=True)
            else:
                task = tasks.setup_task(cfg.task)
                task.load_state_dict(saved)
            model = task.build_model(cfg.model, from_checkpoint=True)
        except OmegaConfBaseException as error:
            if not overrides:
                raise
            raise UserError(f"--model-overrides {overrides}: {str(error).splitlines()[0]}")
        if not (allow_stock or isinstance(model.decoder, SegmentDecoder)):
            raise UserError(
                f"{path}: --arch {cfg.model._name} is not a model of fairseq_sha; use "
                "fairseq-sha evaluate or fairseq-interactive"
            )
        with open_dict(cfg):
            cfg.task = task.cfg  # checked, and of the right types
        identity = digest(state["model"], cfg.model, task.source_dictionary.symbols)
        with threads(1):  # what is computed from the weights must not depend on their number
            model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
        trained = cls(cfg, task, [model])
        trained.identity = identity
        return trained if cpu or not torch.cuda.is_available() else trained.cuda()

    def encode(self, text):
        """Token ids of a text, str or bytes: LongTensor ``[length]``."""
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogateescape")
        return self.codec.encode(text)

    def decode(self, tokens):
        """The text of token ids, as a str; what is not UTF-8 becomes U+FFFD."""
        return self.codec.decode(tokens).decode("utf-8", "replace")

    def continuation(self, prompt, length, **options):
        """What follows a prompt, as bytes.

        Args:
            prompt (bytes): may be empty
            length (int): tokens
            options: of fairseq's generation: ``sampling``, ``sampling_topk``, ``sampling_topp``,
                ``temperature``, ``beam``
        """
        return self.codec.decode(self.continue_tokens(self.encode(prompt), length, **options))

    def continue_tokens(self, tokens, length, **options):
        """As :meth:`continuation`, from the tokens of a prompt to those that follow: LongTensor
        ``[length]``."""
        if options.get("sampling_topk", -1) > len(self.dictionary):  # fairseq could not draw
            options["sampling_topk"] = len(self.dictionary)
        hypotheses = self.generate([tokens], max_len_b=len(tokens) + length, **options)[0]
        # fairseq ends a hypothesis with one symbol more, which stands for no text.
        return hypotheses[0]["tokens"][len(tokens) : len(tokens) + length].cpu()

    @torch.no_grad()
    def read(self, tokens, state=None):
        """Read a segment.

        Args:
            tokens (LongTensor): ``[T, B]``
            state (list): what the segment before left; None for nothing

        Returns:
            logits of what follows each token ``[T, B, V]``, and the new state
        """
        features, state = self.decoder.read(tokens.to(self.device), state)
        return self.decoder.head.logits(features), state

    def reading(self, chunks, **options):
        """What a text costs, part by part; see :class:`Reading`."""
        return Reading(self, chunks, **options)

    def costs(self, data, progress=False, **options):
        """What a text costs.

        Args:
            data (bytes): the text
            progress (bool): whether to show progress on standard error, if that is a terminal
            options: of :class:`Reading`

        Returns:
            the :class:`~fairseq_sha.evaluation.evaluate.Score`, whose bytes are those of the text;
            the token ids; and the cost of each in nats given all tokens before it, float32 array
            ``[length]``. The score of a text without tokens is None
        """
        reading = self.reading((data[i : i + PART] for i in range(0, len(data), PART)), **options)
        tokens, nats = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        disable = None if progress else True  # None: shown on a terminal only
        bar = tqdm(total=len(data), unit="B", unit_scale=True, disable=disable)
        with bar, contextlib.closing(iter(reading)) as parts:
            for text, tokens_of_part, nats_of_part in parts:
                tokens.append(tokens_of_part)
                nats.append(nats_of_part)
                bar.update(len(text))
        return reading.score, np.concatenate(tokens), np.concatenate(nats)

    def bits(self, data, progress=False):
        """The cost of each byte of a text in bits: float64 array ``[len(data)]``. The cost of a
        token of several bytes is spread evenly over them. Arguments as for :meth:`costs`."""
        _, _, nats = self.costs(data, progress)
        return self.codec.spread(data, nats / math.log(2))


class Reading:
    """What a text costs, part by part, in memory that does not grow with the text.

    The text is one stream, and state is carried from segment to segment and from part to part. The
    cost of each token is the same to the last bit wherever the parts end. Iterating yields the text
    of a part, its token ids, and the cost of each in nats, float32. A model can be in the middle of
    only one text. Weights that learn are the trained ones again once the iterator is exhausted or
    closed.

    Args:
        trained (TrainedModel): the model
        chunks (iterable of bytes): the text, in pieces of any size
        losses (callable): the rule by which segments are scored, see
            :func:`~fairseq_sha.evaluation.evaluate.evaluate`; it is called for one segment after
            the other
        policy (Carried or Dynamic): of one stream; None for segments as in training
    """

    def __init__(self, trained, chunks, losses=token_losses, policy=None):
        self.codec = trained.codec
        self.policy = policy or Carried(1, trained.cfg.task.tokens_per_sample)
        self._model = trained.models[0]
        self._chunks = chunks
        self._losses = losses
        self._tally = Tally()
        self._segments = self._bytes = 0

    @property
    def score(self):
        """After the last part: the :class:`~fairseq_sha.evaluation.evaluate.Score` of the text, or
        None if it has no tokens."""
        score = self._tally.score(self.policy)
        return score._replace(bytes=self._bytes) if score.tokens else None

    def __iter__(self):
        with self.policy.reading(self._model, self._losses) as self._costs_of_batch:
            yield from self._parts()

    def _parts(self):
        length = self.policy.length
        waiting, costs = deque(), np.zeros(0, np.float32)
        unread = np.array([self.codec.start])  # and before them, the token that comes first
        for part in self.codec.parts(self._chunks):
            waiting.append(part)
            unread = np.append(unread, part[1])
            whole = (len(unread) - 1) // length * length
            costs = np.append(costs, self._read(unread[: whole + 1]))
            unread = unread[whole:]
            while waiting and len(waiting[0][1]) <= len(costs):
                text, tokens = waiting.popleft()
                yield self._finished(text, tokens, costs)
                costs = costs[len(tokens) :]
        costs = np.append(costs, self._read(unread))
        for text, tokens in waiting:
            yield self._finished(text, tokens, costs)
            costs = costs[len(tokens) :]

    def _finished(self, text, tokens, costs):
        self._bytes += len(text)
        return text, tokens, costs[: len(tokens)]

    def _read(self, tokens):
        """The costs of all tokens but the first, in the segments that come next."""
        if len(tokens) == 1:
            return np.zeros(0, np.float32)
        policy = self.policy.after(self._segments)
        self._segments += -(-(len(tokens) - 1) // policy.length)
        batches = policy.batches(Tokens(tokens), "text", self.codec)
        return read_batches(batches, self._costs_of_batch, len(tokens) - 1, self._tally)


def _override(cfg, overrides):
    """Change settings of the model and the task.

    Raises:
        UserError: there is no such setting; fairseq would go on without a word
    """
    for name, value in overrides.items():
        sections = [section for section in (cfg.model, cfg.task) if name in section]
        if not sections or name.startswith("_"):
            raise UserError(f"--model-overrides {name}: the model has no such setting")
        if name in ("data", "codec"):
            raise UserError(f"--model-overrides {name}: says what is read; leave it out")
        for section in sections:
            if isinstance(section, DictConfig):
                section[name] = value
            else:  # the argparse.Namespace of fairseq's models without a config
                setattr(section, name, value)


def digest(weights, settings, symbols):
    """8 bytes that differ between models.

    Args:
        weights (dict of str to Tensor): as in the checkpoint
        settings (DictConfig or argparse.Namespace): of the model
        symbols (list of str): of its dictionary
    """
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    # Collapsed or not, a model is the same.
    described = sorted((key, str(value)) for key, value in settings.items() if key != "collapse")
    total = hashlib.sha256(repr((described, symbols)).encode())
    for name, tensor in sorted(weights.items()):
        total.update(name.encode())
        # A tensor without dimensions cannot be viewed as bytes.
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.digest()[:8]


@contextlib.contextmanager
def threads(number):
    """Have torch use this number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
