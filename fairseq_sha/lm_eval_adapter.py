"""Models of this package in EleutherAI's lm-evaluation-harness (the package ``lm_eval``).

:func:`register` makes the model ``fairseq_sha`` known to the harness. Its arguments are those of
the commands: ``path``, ``data_bin``, ``cpu``, ``model_overrides``.

The harness asks for three things. ``loglikelihood_rolling`` is the cost of a whole text from its
start, the same as that of ``fairseq-sha score``, so that the harness's bits per byte are this
package's. ``loglikelihood`` and ``generate_until`` are those of :mod:`fairseq_sha.continuations`.
Nothing is ever truncated.
"""

import itertools
import logging

from tqdm import tqdm

from fairseq_sha import continuations
from fairseq_sha.errors import UserError
from fairseq_sha.trained_model import TrainedModel

logger = logging.getLogger(__name__)

NAME = "fairseq_sha"
MOST_TOKENS = 256  # generated, unless a task says more; the harness's own models have this default
#: What a task may ask of generation, besides its end.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")


def register():
    """Register the model with the harness.

    Raises:
        UserError: the harness is not installed
    """
    try:
        import lm_eval.models  # noqa: F401  the harness's own ones, which it would leave out later
        from lm_eval.api.model import LM
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported ({error}); pip install 'fairseq-sha[lm-eval]'")
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(type("TrainedLM", (Adapter, LM), {}))


class Adapter:
    """A trained model that answers the harness's requests, which have ``args``. Mixed with the
    harness's class ``LM`` by :func:`register`.

    Args:
        path (str): checkpoint
        data_bin (str): data folder, for a checkpoint without its symbols
        cpu (bool): use no GPU
        model_overrides (dict): settings of the model to change
        device (str): of the harness; ``cpu`` is the same as ``cpu=True``
        batch_size, max_batch_size: of the harness, without effect: texts are read one by one

    Raises:
        UserError: as :meth:`~fairseq_sha.trained_model.TrainedModel.load`
    """

    def __init__(
        self,
        path,
        data_bin=None,
        cpu=False,
        model_overrides=None,
        device=None,
        batch_size=1,
        max_batch_size=None,
    ):
        super().__init__()
        cpu = cpu or device == "cpu"
        self.model = TrainedModel.load(path, data_bin, cpu, model_overrides)
        self._device = self.model.device
        self._unknown = self._tokens = 0

    def get_model_info(self):
        """What the harness writes beside the results."""
        model = self.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.models[0].parameters()),
            "model_sha": model.identity.hex(),
            "model_codec": model.codec.name,
        }

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihood of each text, in nats, from its start: a list of float."""
        self._check(requests)
        found = []
        for request in tqdm(requests, disable=disable_tqdm or None, desc="texts"):
            (text,) = request.args
            score, tokens, _ = self.model.costs(_bytes(text))
            self._count(tokens)
            found.append(-score.nats if score else 0.0)
        self._warn()
        return found

    def loglikelihood(self, requests, disable_tqdm=False):
        """Log-likelihood of each continuation in nats, and whether it is the greedy one: a list of
        pairs."""
        self._check(requests)
        found = []
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="continuations") as bar:
            # The choices of a question have one context and follow each other.
            for context, group in itertools.groupby(requests, lambda request: request.args[0]):
                group = list(group)
                texts = [_bytes(request.args[1]) for request in group]
                for text in texts:
                    self._count(self.model.encode(text).numpy())
                found += continuations.log_likelihoods(self.model, _bytes(context), texts)
                bar.update(len(group))
        self._warn()
        return found

    def generate_until(self, requests, disable_tqdm=False):
        """The continuation of each context: a list of str."""
        self._check(requests)
        options = [generation_of(request.args[1]) for request in requests]
        found = []
        bar = tqdm(requests, disable=disable_tqdm or None, desc="generated")
        for request, (until, most, sampling) in zip(bar, options):
            context = request.args[0]
            text = continuations.continue_until(
                self.model, _bytes(context), until, most, **sampling
            )
            found.append(text.decode("utf-8", "replace"))
        return found

    def _check(self, requests):
        """Raise a UserError for a text that the model cannot read, before hours of work."""
        for request in requests:
            for text in request.args:
                if isinstance(text, str):
                    self.model.encode(_bytes(text))

    def _count(self, tokens):
        if not self.model.codec.lossless:
            self._unknown += int((tokens == self.model.dictionary.unk()).sum())
            self._tokens += len(tokens)

    def _warn(self):
        if self._unknown:
            logger.warning(
                "%d of %d words are unknown to the model, and each is scored as one symbol however "
                "it is spelled: these scores cannot be compared with those of other models",
                self._unknown,
                self._tokens,
            )
        self._unknown = self._tokens = 0


def generation_of(options):
    """What a task's ``generation_kwargs`` mean.

    Returns:
        the strings that end a continuation, the most tokens, and fairseq's options

    Raises:
        UserError: an option that is not known
    """
    options = dict(options)
    until = options.pop("until", None) or []
    most = int(options.pop("max_gen_toks", MOST_TOKENS))
    others = set(options) - set(SAMPLING)
    if others:
        raise UserError(
            f"generation_kwargs {', '.join(sorted(others))}: not supported; leave them out "
            f"(known: until, max_gen_toks, {', '.join(SAMPLING)})"
        )
    until = [until] if isinstance(until, str) else until
    return [_bytes(end) for end in until], most, continuations.generation_options(**options)


def _bytes(text):
    return text.encode("utf-8", "surrogateescape")
