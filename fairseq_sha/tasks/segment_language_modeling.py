"""What language modeling over segments with carried state needs, whatever the tokens are."""

import logging
import math
import os
from dataclasses import dataclass, field
from typing import List, Optional

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.data import (
    AppendTokenDataset,
    Dictionary,
    IdDataset,
    ListDataset,
    NestedDictionaryDataset,
    NumelDataset,
    PadDataset,
    PrependTokenDataset,
)
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from fairseq.optim import AMPOptimizer, FP16Optimizer
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask
from omegaconf import II

from fairseq_sha.checkpoints import (
    check_symbols,
    checkpoint_to_start_from,
    replace_damaged_last_checkpoint,
)
from fairseq_sha.checks import torch_is_at_least
from fairseq_sha.criterions.cross_entropy_with_auxiliary_losses import (
    CrossEntropyWithAuxiliaryLosses,
)
from fairseq_sha.data import Corpus, SegmentDataset, SegmentIterator
from fairseq_sha.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class SegmentLanguageModelingConfig(FairseqDataclass):
    data: Optional[str] = field(
        default=None, metadata={"help": "data folder made by a script in preprocess/"}
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
    save_carried_state: ChoiceEnum(["auto", "always", "never"]) = field(
        default="auto",
        metadata={
            "help": "whether checkpoints hold the state between segments, with which a resumed run "
            "repeats the uninterrupted one; auto: if it takes 1 GB at most"
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
    seed: int = II("common.seed")
    tpu: bool = II("common.tpu")
    fp16: bool = II("common.fp16")
    amp: bool = II("common.amp")
    disable_validation: bool = II("dataset.disable_validation")
    validate_after_updates: int = II("dataset.validate_after_updates")
    max_update: int = II("optimization.max_update")
    update_freq: List[int] = II("optimization.update_freq")
    restore_file: str = II("checkpoint.restore_file")
    continue_once: Optional[str] = II("checkpoint.continue_once")
    finetune_from_model: Optional[str] = II("checkpoint.finetune_from_model")
    reset_dataloader: bool = II("checkpoint.reset_dataloader")
    save_dir: str = II("checkpoint.save_dir")
    save_interval_updates: int = II("checkpoint.save_interval_updates")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")


class SamplingOrForced(Sampling):
    """fairseq's sampling, which draws even where it has left but one symbol, of a prompt or at the
    end, and fails if that one's probability is too small for a float."""

    def step(self, step, lprobs, *args, **kwargs):
        allowed = lprobs > -math.inf
        forced = allowed & (allowed.sum(-1, keepdim=True) == 1)
        given = lprobs.masked_fill(~forced, 0.0).sum(-1)
        scores, symbols, beams = super().step(
            step, lprobs.masked_fill(forced, 0.0), *args, **kwargs
        )
        return scores + given, symbols, beams


METRICS = "loss", "nll_loss", "ppl", "bpc"  # that validation with these criterions gives
MAX_CARRIED_BYTES = {"auto": 1e9, "always": math.inf, "never": 0}


class SegmentLanguageModelingTask(FairseqTask):
    """Language modeling in which parallel streams are read segment by segment, in order.

    ``--batch-size`` is the number of streams of each worker. Every token but a split's first is
    predicted exactly once an epoch, and scored exactly once in evaluation.
    """

    def __init__(self, cfg, dictionary, from_checkpoint=False):
        super().__init__(cfg)
        self.dictionary = dictionary
        self.model = None
        self.is_training = False
        self.train_iterator = None

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        if not cfg.data:
            raise UserError("no data folder given; make one with a script in preprocess/")
        if cfg.tokens_per_sample < 1:
            raise UserError(f"--tokens-per-sample {cfg.tokens_per_sample}: must be at least 1")
        return cls(cfg, cls.load_dictionary(os.path.join(cfg.data, "dict.txt")), **kwargs)

    @classmethod
    def load_dictionary(cls, filename):
        return Dictionary.load(filename)

    @property
    def source_dictionary(self):
        return self.dictionary

    @property
    def target_dictionary(self):
        return self.dictionary

    def build_model(self, cfg, from_checkpoint=False):
        """fairseq's hook. Training builds its model anew, before it looks for a checkpoint."""
        self.is_training = not from_checkpoint
        if self.is_training:
            if self.cfg.tpu:
                raise UserError(
                    "--bf16 means a TPU to fairseq's command line; for bfloat16 on GPU or CPU use "
                    "fairseq-hydra-train with common.bf16=true"
                )
            if self.cfg.compile and not torch_is_at_least(2, 4):
                raise UserError(
                    f"--compile: torch {torch.__version__} is too old; 2.4 or newer can"
                )
            if min(self.cfg.update_freq) < 1:
                raise UserError(f"--update-freq {min(self.cfg.update_freq)}: must be at least 1")
            replace_damaged_last_checkpoint(self.cfg.save_dir)
            path = checkpoint_to_start_from(self.cfg)
            only_weights = path == self.cfg.finetune_from_model or self.cfg.reset_dataloader
            if path is not None and only_weights:  # else the iterator will look at the symbols
                weights = checkpoint_utils.load_checkpoint_to_cpu(path)
                self.load_state_dict(weights.get("task_state") or {})
        self.model = super().build_model(cfg, from_checkpoint)
        if self.is_training:
            self.model.decoder.checkpoint_activations = self.cfg.checkpoint_activations
            self.model.decoder.carried.may_overflow = self.cfg.fp16 or self.cfg.amp
            if self.cfg.compile:
                self.model.decoder.compile_layers()
        return self.model

    def build_criterion(self, cfg, from_checkpoint=False):
        criterion = super().build_criterion(cfg)
        ignores = not isinstance(criterion, CrossEntropyWithAuxiliaryLosses)
        if ignores and getattr(self.model and self.model.decoder, "has_auxiliary_losses", False):
            raise UserError(
                f"--criterion {cfg._name}: would leave out this model's auxiliary losses; use "
                "cross_entropy_with_auxiliary_losses"
            )
        if self.is_training and isinstance(criterion, CrossEntropyCriterion):
            metric = self.cfg.best_checkpoint_metric
            if metric not in METRICS:  # fairseq would notice at the first validation
                known = ", ".join(METRICS)
                raise UserError(f"--best-checkpoint-metric {metric}: choose one of {known}")
        return criterion

    def begin_epoch(self, epoch, model):
        """fairseq's hook. A resumed run's next line of log is of what it has seen of the epoch; so
        is therefore that of a run which comes from the epoch before."""
        if self.train_iterator is not None and self.train_iterator.iterations_in_epoch == 0:
            metrics.reset_meters("train_inner")

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        """fairseq's hook. fairseq looks at ``--max-update`` after an update only, so that a run
        which is started again when it is done would make one more."""
        if 0 < self.cfg.max_update <= update_num:
            logger.info("nothing left to train: there have been %d updates", update_num)
            raise SystemExit(0)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def optimizer_step(self, optimizer, model, update_num):
        """fairseq's hook. After the update, parameters are clamped to the model's bounds."""
        bounded = model.decoder.bounded_parameters()
        masters = {}
        if bounded and isinstance(optimizer, FP16Optimizer):
            if optimizer.has_flat_params:
                raise UserError(
                    "this model has parameters with bounds, which one flat tensor of all "
                    "parameters cannot keep; add --fp16-no-flatten-grads"
                )
            masters = dict(zip(optimizer.fp16_params, optimizer.fp32_params))
        if isinstance(optimizer, AMPOptimizer):
            # fairseq has torch's scaler unscale the gradients of one object and step another, for
            # which they would be unscaled once more.
            optimizer.scaler.step(optimizer.optimizer)
            optimizer.scaler.update()
        else:
            super().optimizer_step(optimizer, model, update_num)
        with torch.no_grad():
            for parameter, low, high in bounded:
                parameter.clamp_(low, high)
                # Else the float32 copy would undo it at the next update.
                if parameter in masters:
                    masters[parameter].clamp_(low, high)
        done, interval = update_num + 1, self.cfg.save_interval_updates
        validates = not self.cfg.disable_validation and done >= self.cfg.validate_after_updates
        if self.train_iterator is not None and not validates:
            if done == self.cfg.max_update or (interval > 0 and done % interval == 0):
                self.train_iterator.gather_carried_state()

    def begin_valid_epoch(self, epoch, model):
        """fairseq's hook on all workers before a validation, which comes before each checkpoint in
        mid-epoch. Only the first worker then reaches the state that is saved."""
        if self.train_iterator is not None:
            self.train_iterator.gather_carried_state()

    def load_dataset(self, split, **kwargs):
        corpus = Corpus(os.path.join(self.cfg.data, split))
        wrong = corpus.find(self.is_no_text)
        if wrong is not None:
            what, token = f"tokens that {self.cfg.data}/dict.txt lacks", int(corpus.tokens[wrong])
            if token < len(self.dictionary):
                what = f"{self.dictionary[token]}, which stands for no text"
            raise UserError(
                f"{corpus.path}: holds {what} (token {token} at offset {wrong}); preprocess the "
                "corpus again"
            )
        self.datasets[split] = corpus

    def is_no_text(self, tokens):
        """Which token ids, of an array, no corpus may hold: unknown ones, ``<s>`` and ``<pad>``."""
        return (tokens >= len(self.dictionary)) | (tokens < self.dictionary.eos())

    def state_dict(self):
        """What checkpoints say of the task: the symbols that token ids stand for."""
        return {"symbols": self.dictionary.symbols}

    def load_state_dict(self, state_dict):
        """fairseq's hook in evaluation and generation; in training the iterator checks the same."""
        check_symbols(state_dict.get("symbols"), self.dictionary.symbols)

    def get_batch_iterator(
        self,
        dataset,
        max_sentences=None,
        num_shards=1,
        shard_id=0,
        num_workers=0,
        epoch=1,
        data_buffer_size=0,
        skip_remainder_batch=False,
        update_epoch_batch_itr=None,
        **kwargs,
    ):
        """fairseq's hook. A :class:`Corpus` is cut into segments; what
        :meth:`build_dataset_for_inference` made is batched as by any task.

        Raises:
            UserError: no batch size, which here is the number of streams
        """
        if not isinstance(dataset, Corpus):
            return super().get_batch_iterator(
                dataset,
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
        if max_sentences < 1:
            raise UserError(f"--batch-size {max_sentences}: must be at least 1")
        if num_workers < 0:
            raise UserError(f"--num-workers {num_workers}: must be at least 0")
        if num_shards > 1 and not self.is_training:
            raise UserError(
                f"{num_shards} workers: fairseq would report the score of one worker's part as "
                "that of the whole; evaluate with one (--distributed-world-size 1)"
            )
        split = next(name for name, loaded in self.datasets.items() if loaded is dataset)
        # fairseq gives this when it trains, and not when it validates, which may be on the same.
        training = self.is_training and update_epoch_batch_itr is not None
        if training and max_sentences * num_shards > len(dataset):
            raise UserError(
                f"--batch-size {max_sentences}: {max_sentences * num_shards} streams in all, and "
                f"{dataset.path} holds {len(dataset)} predictions; use fewer"
            )
        segments = SegmentDataset(
            dataset,
            split,
            epoch,
            self.dictionary.pad(),
            batch_size=max_sentences,
            tokens_per_sample=self.cfg.tokens_per_sample,
            random_lengths=training and self.cfg.random_segment_lengths,
            seed=self.cfg.seed,
            num_shards=num_shards,
            shard=shard_id,
        )
        decoder = self.model.decoder if training else None
        iterator = SegmentIterator(
            segments,
            carried=decoder and decoder.carried,
            like=decoder and next(decoder.parameters()),
            symbols=self.dictionary.symbols,
            max_carried_bytes=MAX_CARRIED_BYTES[str(self.cfg.save_carried_state)],
            num_workers=num_workers,
            buffer_size=data_buffer_size,
            skip_remainder_batch=skip_remainder_batch,
        )
        if training:
            self.train_iterator = iterator
        return iterator

    def eval_lm_dataloader(
        self, dataset, batch_size=None, num_shards=1, context_window=0, **kwargs
    ):
        """``fairseq-eval-lm``'s hook. Without ``--batch-size``, one stream.

        Raises:
            UserError: options whose result would not count every token once
        """
        if context_window > 0:
            raise UserError(
                "--context-window has no use here: every token is scored once, with the state "
                "carried from all text before it; leave it out"
            )
        kwargs = {k: kwargs[k] for k in ("num_workers", "data_buffer_size") if k in kwargs}
        return self.get_batch_iterator(
            dataset,
            max_sentences=1 if batch_size is None else batch_size,
            num_shards=num_shards,
            **kwargs,
        ).next_epoch_itr(shuffle=False)

    # Text is one stream without an end. Generation therefore takes newline for what came before the
    # prompt, and another symbol, which it cannot choose, for fairseq's end of a hypothesis.

    def build_dataset_for_inference(self, src_tokens, src_lengths, **kwargs):
        """Prompts for generation, or texts for scoring.

        Args:
            src_tokens (list of LongTensor): token ids of each, ``[length]``
            src_lengths: their lengths
        """
        lengths = np.array([int(length) for length in src_lengths])
        texts = ListDataset([tokens.long() for tokens in src_tokens], lengths)
        inputs = PrependTokenDataset(texts, self.dictionary.eos())
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
        no symbol that :meth:`symbols_without_text` names."""
        generator = super().build_generator(
            models,
            args,
            extra_gen_cls_kwargs={
                "eos": self.dictionary.bos(),
                "tokens_to_suppress": self.symbols_without_text(),
                **(extra_gen_cls_kwargs or {}),
            },
            **kwargs,
        )
        if isinstance(generator, SequenceGenerator):
            generator.unk_penalty = math.inf
            if isinstance(generator.search, Sampling):
                search = generator.search
                generator.search = SamplingOrForced(
                    self.dictionary, search.sampling_topk, search.sampling_topp
                )
        return generator

    def symbols_without_text(self):
        """Symbols of the dictionary, beside the special ones, that must not be generated."""
        return [s for s in self.dictionary.symbols if s.startswith("madeupword")]

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        if constraints is not None:
            raise UserError("--constraints is not supported; leave it out")
        if not isinstance(generator, SequenceGenerator):
            return generator.generate(models, sample)
        inputs = sample["net_input"]["src_tokens"]
        # No hypothesis ends before the maximum length, which fairseq derives from the prompt's.
        generator.min_len = int(generator.max_len_a * inputs.size(1) + generator.max_len_b)
        if "segment" in sample["net_input"]:
            # fairseq-generate: the prompts are what segments begin with, --prefix-size tokens.
            prefix_tokens = inputs[:, : 0 if prefix_tokens is None else prefix_tokens.size(1)]
        elif prefix_tokens is None:
            prefix_tokens = inputs[:, 1:]
        if prefix_tokens.size(1) > generator.min_len:
            raise UserError(
                f"a prompt of {prefix_tokens.size(1)} tokens is longer than the maximum length, "
                f"{generator.min_len}, of prompt and continuation; raise --max-len-b"
            )
        return generator.generate(
            models, sample, prefix_tokens=prefix_tokens, bos_token=self.dictionary.eos()
        )
