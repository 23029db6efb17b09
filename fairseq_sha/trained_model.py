"""A trained model as its users want it: text in, text out, with no file but its checkpoint."""

import argparse
import contextlib
import hashlib

import numpy as np
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models import MODEL_REGISTRY
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

import fairseq_sha
from fairseq_sha import compatibility
from fairseq_sha.data.codecs import codec_from_state
from fairseq_sha.errors import UserError
from fairseq_sha.evaluation.evaluate import evaluate
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
                task = tasks.get_task(cfg.task._name)(cfg.task, codec, from_checkpoint=True)
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
        tokens = self.encode(prompt)
        # fairseq ends a hypothesis with one symbol more, which stands for no text.
        hypotheses = self.generate([tokens], max_len_b=len(tokens) + length, **options)[0]
        return self.codec.decode(hypotheses[0]["tokens"][len(tokens) :])

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

    def costs(self, data, progress=False, policy=None):
        """What a text costs.

        Args:
            data (bytes): the text
            progress (bool): whether to show progress on standard error
            policy (~fairseq_sha.evaluation.policies.Policy): how it is read (default: as one
                stream, in segments of the length that the model was trained with, as by
                ``fairseq-eval-lm``)

        Returns:
            the :class:`~fairseq_sha.evaluation.evaluate.Score`, whose bytes are those of the text;
            the token ids; and the cost of each in nats given all tokens before it, float32 array
            ``[length]``. The score of a text without tokens is None
        """
        tokens = self.encode(data).numpy()
        if not len(tokens):
            return None, tokens, np.zeros(0, np.float32)
        policy = policy or Carried(1, self.cfg.task.tokens_per_sample)
        text = Tokens(np.append(self.codec.start, tokens))
        score, nats = evaluate(self.models[0], text, "text", self.codec, policy, progress)
        return score._replace(bytes=len(data)), tokens, nats

    def bits(self, data, progress=False):
        """The cost of each byte of a text in bits: float64 array ``[len(data)]``. The cost of a
        token of several bytes is spread evenly over them. Arguments as for :meth:`costs`."""
        _, _, nats = self.costs(data, progress)
        return self.codec.spread(data, nats / np.log(2))


def _override(cfg, overrides):
    """Change settings of the model and the task.

    Raises:
        UserError: there is no such setting; fairseq would go on without a word
    """
    for name, value in overrides.items():
        sections = [section for section in (cfg.model, cfg.task) if name in section]
        if not sections or name.startswith("_"):
            raise UserError(f"--model-overrides {name}: the model has no such setting")
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
    described = sorted((key, str(value)) for key, value in settings.items())
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
