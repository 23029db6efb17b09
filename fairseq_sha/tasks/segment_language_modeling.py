"""Language modeling over segments of parallel streams, whatever the tokens are.

Models that carry state (:class:`~fairseq_sha.models.segment_decoder.SegmentDecoder`) are told which
segment each batch is. fairseq's own language models read each segment on its own.
"""

import argparse
import logging
import math
import os
import re
from dataclasses import dataclass, field
from typing import List, Optional

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.data import (
    AppendTokenDataset,
    IdDataset,
    ListDataset,
    NestedDictionaryDataset,
    NumelDataset,
    PadDataset,
    PrependTokenDataset,
)
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.configs import CommonConfig
from fairseq.logging import metrics
from fairseq.models import FairseqLanguageModel
from fairseq.optim import AMPOptimizer, FP16Optimizer
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, DictConfig

from fairseq_sha import compatibility
from fairseq_sha.checkpoints import (
    check_codec,
    checkpoint_to_start_from,
    replace_damaged_last_checkpoint,
)
from fairseq_sha.checks import require_at_least
from fairseq_sha.criterions.cross_entropy_with_auxiliary_losses import (
    CrossEntropyWithAuxiliaryLosses,
)
from fairseq_sha.data.codecs import CODECS
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.data.segment_iterator import SegmentIterator
from fairseq_sha.data.segments import RandomWindowDataset, SegmentDataset
from fairseq_sha.errors import UserError
from fairseq_sha.evaluation.policies import Carried, Sliding
from fairseq_sha.models.family import architecture_names
from fairseq_sha.models.segment_decoder import SegmentDecoder
from fairseq_sha.optim.averaged_weights import AveragedWeights, non_monotone, stalled
from fairseq_sha.registrations import taken_names
from fairseq_sha.tasks.generation import SamplingOrForced, continue_prompts

logger = logging.getLogger(__name__)


@dataclass
class SegmentLanguageModelingConfig(FairseqDataclass):
    data: Optional[str] = field(
        default=None, metadata={"help": "data folder made by a script in preprocess/"}
    )
    codec: ChoiceEnum(["words", "bytes", "pieces"]) = field(
        default="words", metadata={"help": "what the tokens of the data folder stand for"}
    )
    tokens_per_sample: int = field(
        default=1024,
        metadata={"help": "length of a segment in tokens (default: paper's bptt for enwik8)"},
    )
    random_segment_lengths: bool = field(
        default=False,
        metadata={
            "help": "draw the lengths of training segments at random, tokens-per-sample at most, "
            "as the published SHA-RNN training does"
        },
    )
    random_start: bool = field(
        default=False,
        metadata={
            "help": "begin each training epoch at a random place of the corpus, drawn from the "
            "seed, and go on at its beginning after its end"
        },
    )
    random_windows: bool = field(
        default=False,
        metadata={
            "help": "train on windows of tokens-per-sample tokens from random places of the "
            "corpus, drawn from the seed, each on its own, instead of on segments in order; an "
            "epoch has as many of them as there would be segments"
        },
    )
    save_carried_state: ChoiceEnum(["auto", "always", "never"]) = field(
        default="auto",
        metadata={
            "help": "whether checkpoints hold the state between segments, with which a resumed run "
            "repeats the uninterrupted one; auto: if it takes 1 GB at most"
        },
    )
    drop_state_probability: float = field(
        default=0.0,
        metadata={
            "help": "probability with which a training segment of a stream starts from a state of "
            "zeros instead of the carried one; for an attention this is a memory of zeros "
            "(default: none; the Mogrifier LSTM's recipes have 0.01)"
        },
    )
    scale_lr_by_length: bool = field(
        default=False,
        metadata={
            "help": "multiply the learning rate of each update by the length of its segment over "
            "tokens-per-sample, as in the published code of AWD-LSTM; for random segment lengths"
        },
    )
    average_weights: ChoiceEnum(["never", "non_monotone", "stalled"]) = field(
        default="never",
        metadata={
            "help": "from some validation on, validate and save the uniform average of the weights "
            "after each update; non_monotone: when the loss is above the least of those more than "
            "average-patience validations ago (NT-ASGD, with --optimizer sgd); stalled: when it "
            "has not improved for average-patience validations (Mogrifier LSTM)"
        },
    )
    average_patience: int = field(
        default=5, metadata={"help": "in validations (default: as for AWD-LSTM)"}
    )
    average_latest: int = field(
        default=0,
        metadata={
            "help": "with --average-weights stalled: start after so many validations at the "
            "latest; 0 for no limit"
        },
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata={
            "help": "keep of each layer only its input and compute the rest anew for its gradient: "
            "less memory, one more forward pass"
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "in training, have torch compile the layers (takes minutes at the start)"
        },
    )
    max_target_positions: Optional[int] = field(
        default=None,
        metadata={
            "help": "for fairseq's own models: the longest segment that they can read "
            "(default: tokens-per-sample)"
        },
    )
    add_bos_token: bool = field(
        default=False,
        metadata={"help": "not supported: every token is predicted from the one before it"},
    )
    seed: int = II("common.seed")
    log_file: Optional[str] = II("common.log_file")
    tpu: bool = II("common.tpu")
    fp16: bool = II("common.fp16")
    bf16: bool = II("common.bf16")
    amp: bool = II("common.amp")
    disable_validation: bool = II("dataset.disable_validation")
    validate_after_updates: int = II("dataset.validate_after_updates")
    valid_subset: str = II("dataset.valid_subset")
    combine_valid_subsets: Optional[bool] = II("dataset.combine_valid_subsets")
    ignore_unused_valid_subsets: Optional[bool] = II("dataset.ignore_unused_valid_subsets")
    max_update: int = II("optimization.max_update")
    update_freq: List[int] = II("optimization.update_freq")
    restore_file: str = II("checkpoint.restore_file")
    continue_once: Optional[str] = II("checkpoint.continue_once")
    finetune_from_model: Optional[str] = II("checkpoint.finetune_from_model")
    reset_dataloader: bool = II("checkpoint.reset_dataloader")
    reset_lr_scheduler: bool = II("checkpoint.reset_lr_scheduler")
    reset_meters: bool = II("checkpoint.reset_meters")
    reset_optimizer: bool = II("checkpoint.reset_optimizer")
    save_dir: str = II("checkpoint.save_dir")
    save_interval_updates: int = II("checkpoint.save_interval_updates")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")


MAX_CARRIED_BYTES = {"auto": 1e9, "always": math.inf, "never": 0}


@register_task("segment_language_modeling", dataclass=SegmentLanguageModelingConfig)
class SegmentLanguageModelingTask(FairseqTask):
    """Language modeling in which parallel streams are read segment by segment, in order.

    ``--batch-size`` is the number of streams of each worker. Every token but a split's first is
    predicted exactly once an epoch, and scored exactly once in evaluation.

    Logs ``nats``, the mean cost of a token, and ``ppl``, its perplexity; ``bpb``, bits per byte of
    the original text; and ``wppl``, perplexity per word, for words and pieces.

    Args:
        cfg (SegmentLanguageModelingConfig): the settings
        codec (~fairseq_sha.data.codecs.Codec): what tokens stand for
    """

    def __init__(self, cfg, codec, from_checkpoint=False):
        super().__init__(cfg)
        self.codec = codec
        self.dictionary = codec.dictionary
        self.model = None
        self.is_training = False
        self.train_iterator = None
        #: The average of the weights in training (``--average-weights``), or None.
        self.averaged = None
        self._awaits_cost = False  # of the first split of a validation
        self._segment_lengths = []  # of the current attempt at an update

    @classmethod
    def add_args(cls, parser):
        """fairseq's hook where a command line names this task. (fairseq also calls it on import,
        for its documentation, with a group of arguments.)"""
        if isinstance(parser, argparse.ArgumentParser):
            compatibility.apply()
        super().add_args(parser)

    @classmethod
    def setup_task(cls, cfg, codec=None, **kwargs):
        """fairseq's hook. A codec is given where a checkpoint holds it; otherwise it is that of the
        data folder."""
        compatibility.apply()
        if cfg.tokens_per_sample < 1:
            raise UserError(f"--tokens-per-sample {cfg.tokens_per_sample}: must be at least 1")
        if not 0 <= cfg.drop_state_probability <= 1:
            raise UserError(
                f"--drop-state-probability {cfg.drop_state_probability}: must be from 0 to 1"
            )
        if cfg.add_bos_token:
            raise UserError("--add-bos-token: not supported; leave it out")
        return cls(cfg, codec or cls._codec_of_data(cfg), **kwargs)

    @staticmethod
    def _codec_of_data(cfg):
        if not cfg.data:
            raise UserError(
                "no data folder given; make one with a script in preprocess/, or for words with "
                "fairseq-preprocess"
            )
        if os.pathsep in cfg.data and not os.path.isdir(cfg.data):
            raise UserError(f"{cfg.data}: a list of folders; name one, with the whole corpus in it")
        return CODECS[str(cfg.codec)].load(cfg.data)

    @property
    def source_dictionary(self):
        return self.dictionary

    @property
    def target_dictionary(self):
        return self.dictionary

    def build_model(self, cfg, from_checkpoint=False):
        """fairseq's hook. Training builds its model anew, before it looks for a checkpoint."""
        self.is_training = not from_checkpoint
        taken = taken_names(architecture_names(), tasks=()).get(getattr(cfg, "_name", None))
        if taken is not None:
            raise UserError(
                f"--arch {cfg._name}: {taken} has registered this name, before fairseq_sha could; "
                "do not import it"
            )
        if self.is_training:
            compatibility.begin_run(self.cfg.log_file)
            self._check_before_training()
        self.model = super().build_model(cfg, from_checkpoint)
        if not isinstance(self.model, FairseqLanguageModel):
            raise UserError(
                f"--arch {cfg._name}: not a language model; this task trains models that predict "
                "each token from those before it"
            )
        if self.is_training and self.carries_state():
            self.model.decoder.checkpoint_activations = self.cfg.checkpoint_activations
            self.model.decoder.drop_state_probability = self.cfg.drop_state_probability
            self.model.decoder.carried.may_overflow = self.cfg.fp16 or self.cfg.amp
            self.model.decoder.total_updates = self.cfg.max_update
            if self.cfg.compile:
                self.model.decoder.compile_layers()
        elif self.is_training:
            # Some of fairseq's models have such an option of their own.
            own = isinstance(cfg, DictConfig) and "checkpoint_activations" in cfg
            for name in ("compile", *(() if own else ("checkpoint_activations",))):
                if getattr(self.cfg, name):
                    option = name.replace("_", "-")
                    raise UserError(
                        f"--{option}: not supported for --arch {cfg._name}; leave it out"
                    )
        if self.is_training and self.cfg.drop_state_probability > 0:
            if not (self.carries_state() and self.model.decoder.has_training_state):
                raise UserError(
                    f"--drop-state-probability {self.cfg.drop_state_probability}: --arch "
                    f"{cfg._name} carries no state in training; leave it out"
                )
        if self.is_training and str(self.cfg.average_weights) != "never":
            self.averaged = self._averaged_weights()
        return self.model

    def _averaged_weights(self):
        kind, patience = str(self.cfg.average_weights), self.cfg.average_patience
        require_at_least(1, self.cfg, "average_patience")
        require_at_least(0, self.cfg, "average_latest")
        if self.cfg.fp16 or self.cfg.bf16:
            raise UserError(
                f"--average-weights {kind}: not with weights in half precision; train with --amp, "
                "or in float32"
            )
        if self.cfg.disable_validation:
            raise UserError(
                f"--average-weights {kind}: starts after a validation; leave out "
                "--disable-validation"
            )
        if kind == "non_monotone" and self.cfg.average_latest:
            raise UserError(
                f"--average-latest {self.cfg.average_latest}: is for --average-weights stalled; "
                "leave it out"
            )
        parameters = dict(self.model.named_parameters())
        if kind == "stalled":
            latest = self.cfg.average_latest
            return AveragedWeights(parameters, lambda costs: stalled(costs, patience, latest))
        # torch's ASGD, which the published code uses, leaves out the first update.
        return AveragedWeights(parameters, lambda costs: non_monotone(costs, patience), skipped=1)

    def carries_state(self):
        """Whether the model carries state between segments; fairseq's own models do not."""
        return self.model is None or isinstance(self.model.decoder, SegmentDecoder)

    def _check_before_training(self):
        if self.cfg.tpu:
            raise UserError(
                "--bf16 means a TPU to fairseq's command line; for bfloat16 on GPU or CPU use "
                "fairseq-hydra-train with common.bf16=true"
            )
        if min(self.cfg.update_freq) < 1:
            raise UserError(f"--update-freq {min(self.cfg.update_freq)}: must be at least 1")
        if self.cfg.random_windows and self.cfg.random_start:
            raise UserError(
                "--random-start: has no use with --random-windows, which begin anywhere; leave it "
                "out"
            )
        if self.cfg.random_windows and self.cfg.drop_state_probability > 0:
            raise UserError(
                f"--drop-state-probability {self.cfg.drop_state_probability}: has no use with "
                "--random-windows, which carry no state; leave it out"
            )
        self._check_valid_subsets()
        replace_damaged_last_checkpoint(self.cfg.save_dir)
        path = checkpoint_to_start_from(self.cfg)
        only_weights = path == self.cfg.finetune_from_model or self.cfg.reset_dataloader
        if path is not None and only_weights:  # otherwise the iterator compares the codecs
            weights = checkpoint_utils.load_checkpoint_to_cpu(path)
            self.load_state_dict(weights.get("task_state") or {})
            iterator = (weights.get("extra_state") or {}).get("train_iterator") or {}
            if (iterator.get("averaged") or {}).get("trained") is not None:
                logger.warning(
                    "the weights of %s are averages; training starts from them, and averaging anew",
                    path,
                )

    def _check_valid_subsets(self):
        """fairseq's own check, with the path and the remedy."""
        if self.cfg.ignore_unused_valid_subsets or self.cfg.combine_valid_subsets:
            return
        if self.cfg.disable_validation:
            return
        files = sorted(os.listdir(self.cfg.data))
        splits = [name[:-4] for name in files if re.fullmatch(r"valid.*\d\.idx", name)]
        for split in splits:
            if split not in self.cfg.valid_subset.split(","):
                raise UserError(
                    f"{os.path.join(self.cfg.data, split)}.idx: would not be validated on; name it "
                    "in --valid-subset, or add --ignore-unused-valid-subsets"
                )

    def build_criterion(self, cfg, from_checkpoint=False):
        criterion = super().build_criterion(cfg)
        ignores = not isinstance(criterion, CrossEntropyWithAuxiliaryLosses)
        if not ignores and not self.carries_state():
            raise UserError(
                f"--criterion {cfg._name}: for the models of fairseq_sha; use cross_entropy with "
                "fairseq's own"
            )
        if ignores and getattr(self.model and self.model.decoder, "has_auxiliary_losses", False):
            raise UserError(
                f"--criterion {cfg._name}: would leave out this model's auxiliary losses; use "
                "cross_entropy_with_auxiliary_losses"
            )
        if self.is_training and isinstance(criterion, CrossEntropyCriterion):
            metric, known = self.cfg.best_checkpoint_metric, self._metrics(criterion)
            if metric not in known:  # fairseq would notice at the first validation
                known = ", ".join(known)
                raise UserError(f"--best-checkpoint-metric {metric}: choose one of {known}")
        return criterion

    def _metrics(self, criterion):
        """Names of the scores that a validation logs."""
        own_nll = isinstance(criterion, CrossEntropyWithAuxiliaryLosses) or criterion.sentence_avg
        names = ["loss", *(["nll_loss"] if own_nll else []), "ppl", "nats", "bpb"]
        return [*names, "wppl"] if self.codec.logs_words else names

    # The hooks of compatibility.py

    def check_run(self, cfg):
        """Check options of a training run that fairseq would fail on, or that would break the rule
        that every token counts once.

        Args:
            cfg: fairseq's whole config

        Raises:
            UserError: one of them is wrong
        """
        scheduler = cfg.lr_scheduler
        if getattr(scheduler, "_name", None) == "polynomial_decay":
            if not float(scheduler.total_num_update) > 0:
                raise UserError(
                    f"--total-num-update {scheduler.total_num_update}: must be positive; it is the "
                    "number of updates over which the learning rate decays"
                )
        scale = cfg.common.amp_init_scale, cfg.common.amp_scale_window
        if cfg.common.amp and scale != (CommonConfig.amp_init_scale, None):
            raise UserError(
                "--amp-init-scale and --amp-scale-window: fairseq takes the one for the other; use "
                "--fp16-init-scale, which is the first loss scale of --amp, too"
            )
        if cfg.dataset.max_valid_steps is not None:
            raise UserError(
                "--max-valid-steps: would give the score of a part of the split; leave it out"
            )

    def check_restored(self, trainer, path):
        """Check that training goes on with what a checkpoint holds.

        Raises:
            UserError: the checkpoint was written without optimizer state
        """
        history = getattr(trainer, "_optim_history", None) or [{}]
        made = history[-1].get("num_updates", 0)
        if made != trainer.get_num_updates():
            raise UserError(
                f"{path}: written after {made} updates with --no-save-optimizer-state, so training "
                "cannot go on from it; add --reset-optimizer to start again from its weights, with "
                "0 updates"
            )

    def nothing_left_to_train(self, cfg, trainer, epoch_itr):
        """Whether a run that is started again had ended before; says so. fairseq looks at its
        limits after an update only."""
        made = trainer.get_num_updates()
        count = self._restore_patience(cfg, trainer, epoch_itr)
        hours = getattr(trainer, "_previous_training_time", 0) / 3600  # the same on all workers
        reasons = {
            f"--max-update {cfg.optimization.max_update}": 0 < cfg.optimization.max_update <= made,
            f"--stop-time-hours {cfg.optimization.stop_time_hours}": 0
            < cfg.optimization.stop_time_hours
            < hours,
            f"--patience {cfg.checkpoint.patience}": 0 < cfg.checkpoint.patience <= count,
        }
        reached = [reason for reason, holds in reasons.items() if holds]
        if reached:
            logger.info(
                "nothing left to train: there have been %d updates (%s)", made, ", ".join(reached)
            )
        return bool(reached)

    def _restore_patience(self, cfg, trainer, epoch_itr):
        """Restore what ``--patience`` had counted when the checkpoint was written; returns it."""
        restored, epoch_itr.restored = epoch_itr.restored, None
        if restored is None:
            return 0
        plateau = getattr(trainer.lr_scheduler, "lr_scheduler", None)
        if getattr(plateau, "patience", 0) > 0:
            logger.warning(
                "the count of --lr-patience starts anew, since checkpoints of fairseq do not hold "
                "it: the learning rate may be reduced later than in an uninterrupted run"
            )
        if cfg.checkpoint.patience <= 0 or cfg.checkpoint.reset_meters:
            return 0
        if cfg.checkpoint.reset_optimizer:
            return 0
        if restored["patience"] is None:
            logger.warning(
                "the count of --patience starts anew, since the checkpoint does not hold it"
            )
            return 0
        compatibility.restore_patience_count(restored["patience"])
        return restored["patience"]["num_runs"]

    def begin_epoch(self, epoch, model):
        """fairseq's hook. The first log line of a resumed run covers only its own epoch, so the
        first line of each epoch does the same in an uninterrupted run."""
        if self.train_iterator is not None and self.train_iterator.iterations_in_epoch == 0:
            metrics.reset_meters("train_inner")

    def train_step(self, sample, *args, **kwargs):
        """fairseq's hook, which also logs the numbers of bytes and words."""
        if self.averaged is not None:
            self.averaged.use_trained()
        self._segment_lengths.append(sample["target"].size(1))
        loss, sample_size, logged = super().train_step(sample, *args, **kwargs)
        return loss, sample_size, {**logged, **_worth(sample)}

    def valid_step(self, sample, *args, **kwargs):
        """fairseq's hook, which also logs the numbers of bytes and words."""
        loss, sample_size, logged = super().valid_step(sample, *args, **kwargs)
        return loss, sample_size, {**logged, **_worth(sample)}

    def reduce_metrics(self, logging_outputs, criterion):
        """fairseq's hook: logs what the criterion does, and the scores named in the class."""
        criterion_outputs = [
            {key: value for key, value in output.items() if key not in WORTH}
            for output in logging_outputs
        ]
        super().reduce_metrics(criterion_outputs, criterion)

        def total(key):
            return sum(output[key] for output in logging_outputs)

        # nll_loss is the cost of the tokens without what a criterion adds.
        keys = set.intersection(*map(set, logging_outputs)) if logging_outputs else set()
        cost = "nll_loss" if "nll_loss" in keys else "loss"
        if not {cost, "ntokens"} <= keys:
            return
        nats, tokens = total(cost), total("ntokens")
        metrics.log_scalar("nats", nats / tokens, tokens, round=4)
        if "nbytes" in keys:
            count = total("nbytes")
            metrics.log_scalar("bpb", nats / count / math.log(2), count, round=4)
        if "nwords" in keys and self.codec.logs_words:
            # Per token, since no word may begin in a batch.
            metrics.log_scalar("_words_per_token", total("nwords") / tokens, tokens)
            metrics.log_derived("wppl", _perplexity_per_word)

    def begin_attempt(self):
        """Forget the segments of an attempt at an update that came to nothing."""
        self._segment_lengths = []
        if self.model is not None and self.carries_state():
            self.model.decoder.carried.end_attempt()

    def optimizer_step(self, optimizer, model, update_num):
        """fairseq's hook. After the update, parameters are clamped to the model's bounds and
        averaged."""
        lengths = self._segment_lengths
        if self.cfg.scale_lr_by_length:
            rate, length = optimizer.get_lr(), sum(lengths) / len(lengths)
            optimizer.set_lr(rate * length / self.cfg.tokens_per_sample)
        self._segment_lengths = []
        made = True
        bounded = []
        if isinstance(model.decoder, SegmentDecoder):
            bounded = model.decoder.bounded_parameters()
            model.decoder.carried.end_attempt()
        masters = {}
        if bounded and isinstance(optimizer, FP16Optimizer):
            if optimizer.has_flat_params:
                raise UserError(
                    "this model has parameters with bounds, which one flat tensor of all "
                    "parameters cannot keep; add --fp16-no-flatten-grads"
                )
            masters = dict(zip(optimizer.fp16_params, optimizer.fp32_params))
        if isinstance(optimizer, AMPOptimizer):
            # fairseq lets torch's scaler unscale the gradients by one optimizer object and step by
            # another, for which the scaler would unscale them once more.
            scaler, scale = optimizer.scaler, None
            if self.averaged is not None:  # reading the scale makes the CPU wait for the GPU
                scale = scaler.get_scale()
            scaler.step(optimizer.optimizer)
            scaler.update()
            # The scaler lowers its scale where gradients overflow, and makes no update.
            made = scale is None or scaler.get_scale() >= scale
        else:
            super().optimizer_step(optimizer, model, update_num)
        with torch.no_grad():
            for parameter, low, high in bounded:
                parameter.clamp_(low, high)
                # Otherwise the float32 copy would undo it at the next update.
                if parameter in masters:
                    masters[parameter].clamp_(low, high)
        if self.cfg.scale_lr_by_length:
            optimizer.set_lr(rate)
        if self.averaged is not None and made:
            self.averaged.after_update()
        done, interval = update_num + 1, self.cfg.save_interval_updates
        validates = not self.cfg.disable_validation and done >= self.cfg.validate_after_updates
        if self.train_iterator is not None and not validates:
            if done == self.cfg.max_update or (interval > 0 and done % interval == 0):
                self.train_iterator.gather_carried_state()

    def begin_valid_epoch(self, epoch, model):
        """fairseq's hook, called on all workers before a validation, and so before each checkpoint
        within an epoch. When the checkpoint is written, only the first worker is asked."""
        if self.train_iterator is not None:
            self.train_iterator.gather_carried_state()
        if self.averaged is not None:
            self.averaged.use_average()
            self._awaits_cost = True

    def post_validate(self, model, stats, agg):
        """fairseq's hook after the validation on each split. The first of them decides when
        averaging starts. Its cost is not rounded, as fairseq's statistics are."""
        if self.averaged is None or not self._awaits_cost:
            return
        self._awaits_cost = False
        if self.averaged.after_validation(float(agg["nats"].avg)):
            logger.info("averaging the weights of all updates from here on")

    def load_dataset(self, split, combine=False, **kwargs):
        """fairseq's hook.

        Raises:
            UserError: the split is missing or damaged, holds tokens that stand for no text, or has
                further parts (``train1``), which fairseq would read too if asked to combine them
        """
        path = os.path.join(self.cfg.data, split)
        if combine and os.path.exists(f"{path}1.idx"):
            raise UserError(
                f"{path}1.idx: a second part of {split}, which fairseq would append; preprocess "
                "the parts as one, or move it away"
            )
        corpus = Corpus(path)
        wrong = corpus.find(self.codec.is_forbidden)
        if wrong is not None:
            what, token = f"tokens that {self.cfg.data}/dict.txt lacks", int(corpus.tokens[wrong])
            if token < len(self.dictionary):
                what = f"{self.dictionary[token]}, which stands for no text"
            raise UserError(
                f"{corpus.path}: holds {what} (token {token} at offset {wrong}); preprocess the "
                "corpus again"
            )
        self.datasets[split] = corpus

    def state_dict(self):
        """What checkpoints say of the task: what token ids stand for."""
        return self.codec.state()

    def load_state_dict(self, state_dict):
        """fairseq's hook in evaluation and generation. In training the iterator does the same."""
        check_codec(state_dict, self.codec)

    def get_batch_iterator(
        self,
        dataset,
        max_sentences=None,
        num_shards=1,
        shard_id=0,
        num_workers=0,
        epoch=1,
        data_buffer_size=0,
        max_tokens=None,
        skip_remainder_batch=False,
        update_epoch_batch_itr=None,
        context_window=0,
        **kwargs,
    ):
        """fairseq's hook. A :class:`Corpus` is cut into segments; what
        :meth:`build_dataset_for_inference` made is batched as in any task.

        These options of fairseq's change nothing here: batches are never shuffled
        (``--curriculum``, ``--grouped-shuffling``, ``--update-ordered-indices-seed``), no item is
        too long (``--skip-invalid-size-inputs-valid-test``), and the number of streams and the
        length of segments are what was asked for (``--required-batch-size-multiple``,
        ``--required-seq-len-multiple``).

        Raises:
            UserError: no batch size, which here is the number of streams; or an option that would
                leave out tokens
        """
        if not isinstance(dataset, Corpus):
            return super().get_batch_iterator(
                dataset,
                max_tokens=max_tokens,
                max_sentences=max_sentences,
                num_shards=num_shards,
                shard_id=shard_id,
                num_workers=num_workers,
                epoch=epoch,
                data_buffer_size=data_buffer_size,
                **kwargs,
            )
        if max_sentences is None:
            raise UserError("--batch-size is missing: it is the number of parallel streams")
        # fairseq gives this when it trains, and not when it validates, which may be on the same.
        training = self.is_training and update_epoch_batch_itr is not None
        valid = "-valid" if self.is_training and not training else ""
        if max_sentences < 1:
            raise UserError(f"--batch-size{valid} {max_sentences}: must be at least 1")
        if max_tokens is not None and max_tokens < max_sentences * self.cfg.tokens_per_sample:
            raise UserError(
                f"--max-tokens{valid} {max_tokens}: {max_sentences} streams (--batch-size{valid}) "
                f"with segments of {self.cfg.tokens_per_sample} tokens (--tokens-per-sample) are "
                "more; leave it out or change the others"
            )
        if num_workers < 0:
            raise UserError(f"--num-workers {num_workers}: must be at least 0")
        if skip_remainder_batch:
            raise UserError(
                "--skip-remainder-batch: would leave out the end of each epoch; leave it out"
            )
        if num_shards > 1 and not self.is_training:
            raise UserError(
                f"{num_shards} workers: fairseq would report the score of one worker's part as "
                "that of the whole; evaluate with one (--distributed-world-size 1)"
            )
        split = next(name for name, loaded in self.datasets.items() if loaded is dataset)
        if training and max_sentences * num_shards > len(dataset):
            raise UserError(
                f"--batch-size {max_sentences}: {max_sentences * num_shards} streams in all, and "
                f"{dataset.path} holds {len(dataset)} predictions; use fewer"
            )
        carries = training and self.carries_state() and not self.cfg.random_windows
        if training:
            options = {
                "epoch": epoch,
                "pad": self.dictionary.pad(),
                "batch_size": max_sentences,
                "tokens_per_sample": self.cfg.tokens_per_sample,
                "random_lengths": self.cfg.random_segment_lengths,
                "seed": self.cfg.seed,
                "num_shards": num_shards,
                "shard": shard_id,
                "codec": self.codec,
                "filler": None if self.carries_state() else self.codec.start,
                "num_targets": getattr(self.model.decoder, "num_targets", 1),
            }
            if self.cfg.random_windows:
                batches = RandomWindowDataset(dataset, **options)
            else:
                split = split if carries else None
                batches = SegmentDataset(
                    dataset, split, random_start=self.cfg.random_start, **options
                )
            self._check_positions(self.cfg.tokens_per_sample)
        else:
            policy = self.evaluation_policy(
                max_sentences, self.cfg.tokens_per_sample - context_window, context_window
            )
            batches = policy.batches(dataset, split, self.codec, num_shards, shard_id)
            logger.info("evaluating %s: %s", split, policy)
        iterator = SegmentIterator(
            batches,
            carried=self.model.decoder.carried if carries else None,
            reference=next(self.model.parameters()) if training else None,
            codec=self.codec,
            max_carried_bytes=MAX_CARRIED_BYTES[str(self.cfg.save_carried_state)],
            averaged=self.averaged if training else None,
            num_workers=num_workers,
            buffer_size=data_buffer_size,
        )
        if training:
            self.train_iterator = iterator
        return iterator

    def evaluation_policy(self, batch_size, length, context=0):
        """How this task's model reads a text for a score.

        Args:
            batch_size (int): streams, or windows read side by side
            length (int): tokens that are scored of each segment or window
            context (int): tokens that come before them in each window

        Returns:
            a policy of :mod:`fairseq_sha.evaluation.policies`

        Raises:
            UserError: a context for a model that needs carried state, or more tokens than the model
                can read at once
        """
        self._check_positions(context + length)
        if context == 0:
            return Carried(batch_size, length, self.carries_state())
        if self.carries_state():
            longest = 0 if self.model is None else self.model.decoder.longest_window
            if longest == 0:
                raise UserError(
                    "--context-window has no use here: every token is scored once, with the state "
                    "carried from all text before it; leave it out"
                )
            if context + length > longest:
                raise UserError(
                    f"--tokens-per-sample {context + length}: windows of this model have at most "
                    f"{longest} tokens; use fewer"
                )
        return Sliding(batch_size, context, length)

    def _check_positions(self, length):
        """The longest segment or window that a model without state can read."""
        if self.carries_state() or self.model is None:
            return
        limit = self.model.max_positions()
        if length > limit:
            raise UserError(
                f"--tokens-per-sample {length}: this model reads at most {limit} tokens at once; "
                "use fewer, or train it with --max-target-positions"
            )

    def eval_lm_dataloader(
        self, dataset, batch_size=None, num_shards=1, context_window=0, **kwargs
    ):
        """``fairseq-eval-lm``'s hook. Without ``--batch-size``, one stream.

        Raises:
            UserError: options whose result would not count every token once
        """
        kwargs = {k: kwargs[k] for k in ("num_workers", "data_buffer_size") if k in kwargs}
        # fairseq has reduced tokens_per_sample by the context.
        self.cfg.tokens_per_sample += context_window
        return self.get_batch_iterator(
            dataset,
            max_sentences=1 if batch_size is None else batch_size,
            num_shards=num_shards,
            context_window=context_window,
            **kwargs,
        ).next_epoch_itr(shuffle=False)

    # Text is one stream without an end. Generation starts from the codec's start symbol, and gives
    # fairseq another symbol, which cannot be chosen, for the end of a hypothesis.

    def build_dataset_for_inference(self, src_tokens, src_lengths, **kwargs):
        """Prompts for generation, or texts for scoring.

        Args:
            src_tokens (list of LongTensor): token ids of each, ``[length]``
            src_lengths: their lengths
        """
        lengths = np.array([int(length) for length in src_lengths])
        texts = ListDataset([tokens.long() for tokens in src_tokens], lengths)
        inputs = PrependTokenDataset(texts, self.codec.start)
        targets = AppendTokenDataset(texts, self.dictionary.pad())
        return NestedDictionaryDataset(
            {
                "id": IdDataset(),
                "net_input": {
                    "src_tokens": PadDataset(inputs, self.dictionary.pad(), left_pad=False),
                    "src_lengths": NumelDataset(inputs),
                },
                "target": PadDataset(targets, self.dictionary.pad(), left_pad=False),
            },
            sizes=[inputs.sizes],
        )

    def build_generator(self, models, args, extra_gen_cls_kwargs=None, **kwargs):
        """fairseq's generator, which goes on to the maximum length, newlines included, and chooses
        no symbol that the codec excludes."""
        excluded, unknown = set(self.codec.not_generated()), self.dictionary.unk()
        generator = super().build_generator(
            models,
            args,
            extra_gen_cls_kwargs={
                "eos": self.dictionary.bos(),
                "tokens_to_suppress": [self.dictionary[i] for i in excluded if i > unknown],
                **(extra_gen_cls_kwargs or {}),
            },
            **kwargs,
        )
        if isinstance(generator, SequenceGenerator):
            if unknown in excluded:
                generator.unk_penalty = math.inf
            if isinstance(generator.search, Sampling):
                search = generator.search
                generator.search = SamplingOrForced(
                    self.dictionary, search.sampling_topk, search.sampling_topp
                )
        return generator

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        if constraints is not None:
            raise UserError("--constraints is not supported; leave it out")
        if not isinstance(generator, SequenceGenerator):
            return generator.generate(models, sample)
        inputs = sample["net_input"]["src_tokens"]
        length = int(generator.max_len_a * inputs.size(1) + generator.max_len_b)
        if "nsentences" in sample:
            # fairseq-generate: the prompts are what segments begin with, --prefix-size tokens.
            prefix_tokens = inputs[:, : 0 if prefix_tokens is None else prefix_tokens.size(1)]
        elif prefix_tokens is None:
            prefix_tokens = inputs[:, 1:]
        if prefix_tokens.size(1) > length:
            raise UserError(
                f"a prompt of {prefix_tokens.size(1)} tokens is longer than the maximum length, "
                f"{length}, of prompt and continuation; raise --max-len-b"
            )
        limit = min(model.max_decoder_positions() for model in models) - 1
        if length > limit:
            raise UserError(
                f"a length of {length} tokens: this model reads at most {limit}; lower --max-len-b"
            )
        segment_length = self.cfg.tokens_per_sample
        return continue_prompts(
            generator, models, sample, prefix_tokens, length, self.codec.start, segment_length
        )


WORTH = "nbytes", "nwords"  # what batches say of their targets, beside the number of tokens


def _perplexity_per_word(meters):
    words_per_token = meters["_words_per_token"].avg
    return (
        math.inf
        if not words_per_token
        else utils.get_perplexity(meters["nats"].avg / words_per_token, base=math.e)
    )


def _worth(sample):
    return {key: sample[key] for key in WORTH if key in (sample or {})}
