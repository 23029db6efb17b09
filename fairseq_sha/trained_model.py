"""A trained model as its users want it: bytes in, bytes out, with no file but its checkpoint."""

import contextlib
import hashlib

import numpy as np
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.hub_utils import GeneratorHubInterface
from omegaconf import open_dict
from tqdm import tqdm

import fairseq_sha
from fairseq_sha import compatibility
from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.errors import UserError


class TrainedModel(GeneratorHubInterface):
    """fairseq's ``.sample()`` and ``.score()`` of text, and what reads and writes bytes.

    Text is one stream. Where it begins, a newline is taken for what came before.

    Args:
        cfg, task, models: as fairseq's ``from_pretrained`` finds them; one model
    """

    def __init__(self, cfg, task, models):
        super().__init__(cfg, task, models)
        self.decoder = models[0].decoder
        self.dictionary = task.source_dictionary
        self.identity = None
        self.eval()

    @classmethod
    def load(cls, path, data=None, cpu=False):
        """The model of a checkpoint that fairseq wrote.

        Args:
            path (str): the checkpoint
            data (str): data folder that it was trained with, for a checkpoint without its symbols
            cpu (bool): stay there, though there is a GPU

        Raises:
            OSError: the file cannot be read
            UserError: it is no checkpoint of a model that --task byte_language_modeling trained
        """
        fairseq_sha.register()
        compatibility.apply()  # before setup_task: the checkpoint must be loaded safely
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        cfg = state["cfg"]
        if cfg is None or getattr(cfg.task, "_name", None) != "byte_language_modeling":
            raise UserError(
                f"{path}: was not trained with --task byte_language_modeling; name one that was"
            )
        with open_dict(cfg):
            cfg.common.cpu = cpu
            cfg.common.fp16 = cfg.common.bf16 = False
            cfg.task.data = data or cfg.task.data
            if "collapse" in cfg.model:  # over-parameterised vectors: the same, and faster
                cfg.model.collapse = True
        symbols = (state.get("task_state") or {}).get("symbols")
        if symbols and data is None:
            task_type = tasks.get_task(cfg.task._name)
            task = task_type(cfg.task, ByteCodec.from_symbols(symbols), from_checkpoint=True)
        else:
            task = tasks.setup_task(cfg.task)
            task.load_state_dict(state.get("task_state") or {})
        model = task.build_model(cfg.model, from_checkpoint=True)
        identity = digest(state["model"], cfg.model, task.source_dictionary.symbols)
        with threads(1):  # what is computed from the weights must not depend on their number
            model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
        trained = cls(cfg, task, [model])
        trained.identity = identity
        return trained if cpu or not torch.cuda.is_available() else trained.cuda()

    def encode(self, text):
        """Token ids of a text or of bytes: LongTensor ``[length]``."""
        if isinstance(text, bytes):
            return self.dictionary.encode(text)
        return super().encode(text)

    def continuation(self, prompt, length, **options):
        """Bytes that follow a prompt.

        Args:
            prompt (bytes): may be empty
            length (int): how many
            options: of fairseq's generation: ``sampling``, ``sampling_topk``, ``sampling_topp``,
                ``temperature``, ``beam``
        """
        tokens = self.encode(prompt)
        # fairseq gives up what is left of the length to a symbol that ends the text.
        hypotheses = self.generate([tokens], max_len_b=len(prompt) + length, **options)[0]
        return self.dictionary.decode(hypotheses[0]["tokens"])[len(prompt) :]

    @torch.no_grad()
    def read(self, tokens, state=None):
        """Read on from the state that the text before left (None: from nothing).

        Args:
            tokens (LongTensor): ``[T, B]``

        Returns:
            logits of what follows each token ``[T, B, V]``, and the new state
        """
        features, state = self.decoder.read(tokens.to(self.device), state)
        return self.decoder.output_layer(features), state

    def bits(self, data, progress=False):
        """The cost of each byte in bits, given all bytes before it: float64 ``[len(data)]``.

        Read in segments of the length that the model was trained with, as by fairseq-eval-lm.

        Args:
            data (bytes): what to score
            progress (bool): whether to show on standard error how far it is
        """
        if not data:
            return np.zeros(0)
        targets = self.encode(data)
        tokens = torch.cat([torch.tensor([self.dictionary.eos()]), targets])
        costs, state = [], None
        length = self.cfg.task.tokens_per_sample
        pieces = zip(tokens[:-1].split(length), targets.split(length))
        with tqdm(total=len(data), unit="B", unit_scale=True, disable=not progress) as bar:
            for inputs, expected in pieces:
                logits, state = self.read(inputs[:, None], state)
                chosen = torch.nn.functional.cross_entropy(
                    logits[:, 0].double(), expected.to(self.device), reduction="none"
                )
                costs.append(chosen.cpu().numpy() / np.log(2))
                bar.update(len(inputs))
        return np.concatenate(costs)


def digest(weights, settings, symbols):
    """8 bytes that differ between models.

    Args:
        weights (dict of str to Tensor): as in the checkpoint
        settings (DictConfig): of the model
        symbols (list of str): of its dictionary
    """
    described = sorted((key, str(value)) for key, value in settings.items())
    total = hashlib.sha256(repr((described, symbols)).encode())
    for name, tensor in sorted(weights.items()):
        total.update(name.encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.digest()[:8]


@contextlib.contextmanager
def threads(number):
    """Have torch use so many threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
