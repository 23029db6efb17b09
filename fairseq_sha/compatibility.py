"""Every place where fairseq, or the process that it runs in, is changed.

:func:`apply` makes these changes once. The tasks' ``setup_task`` and this package's own commands
call it; an import never does. Two callers must act earlier:

* the tasks' ``add_args``, which fairseq calls when ``--task`` names one of them: ``fairseq-train``
  checks ``--save-dir``, and ``fairseq-validate`` loads the checkpoint, before ``setup_task``;
* ``from_pretrained`` of the models, which loads the checkpoint before ``setup_task``.

:func:`begin_run` is called where the model to train is built. It changes the training loop, which
the other commands do not have, and forgets the state that fairseq keeps from an earlier run.

Each function says what is changed and why. What was changed keeps fairseq's own form as
``__wrapped__``, with which ``tests/test_compatibility.py`` shows that the change is still needed.
Where fairseq asks the task or the model, these overrule it instead, and are not listed here.
"""

import functools
import logging
import sys
from argparse import Namespace

import torch
from fairseq import checkpoint_utils, utils
from fairseq.file_io import PathManager
from fairseq.logging import progress_bar

from fairseq_sha.checkpoints import load_checkpoint
from fairseq_sha.errors import UserError, show_user_errors_in_one_line
from fairseq_sha.files import copy_atomically
from fairseq_sha.registrations import warn_of_lost_registrations


def apply():
    """Make all changes, unless they were made before."""
    if apply.done:
        return
    apply.done = True
    show_user_errors_in_one_line()
    flush_denormals()
    name_unusable_save_directory()
    name_missing_checkpoint()
    load_checkpoints_safely()
    save_settings_as_plain_values()
    copy_checkpoints_atomically()
    clip_on_cpu()
    warn_of_lost_registrations()


apply.done = False


def flush_denormals():
    """Attention weights that nearly vanish are denormal numbers, with which a CPU computes many
    times more slowly. torch's threads inherit the setting if it is made before they start."""
    torch.set_flush_denormal(True)


def name_unusable_save_directory():
    """fairseq reports a ``--save-dir`` that it cannot write to as an error of a file named
    ``dummy``, or of ``os.makedirs``."""
    verify = checkpoint_utils.verify_checkpoint_directory

    @functools.wraps(verify)
    def verify_or_explain(save_dir):
        try:
            verify(save_dir)
        except OSError as error:
            raise UserError(
                f"--save-dir {save_dir}: cannot be written to ({error.strerror}); name a folder "
                "that can"
            )

    checkpoint_utils.verify_checkpoint_directory = verify_or_explain


def name_missing_checkpoint():
    """fairseq reports a missing ``--path`` as an OSError, like a full disk."""
    load = checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(load)
    def load_or_explain(filenames, *args, **kwargs):
        try:
            return load(filenames, *args, **kwargs)
        except OSError as error:
            if not str(error).startswith("Model file not found"):
                raise
            raise UserError(f"{':'.join(filenames)}: no such file; name a checkpoint")

    checkpoint_utils.load_model_ensemble_and_task = load_or_explain


def load_checkpoints_safely():
    """Below version 2.6, torch runs whatever code a checkpoint holds. And neither torch nor fairseq
    compares a checkpoint's checksums, or says which file it was that could not be read."""
    load = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(load)
    def load_or_explain(path, *args, **kwargs):
        return load_checkpoint(path, functools.partial(load, path, *args, **kwargs))

    checkpoint_utils.load_checkpoint_to_cpu = load_or_explain


def save_settings_as_plain_values():
    """fairseq's older components, such as its SGD and its LSTM, put their settings into checkpoints
    as an ``argparse.Namespace``, which torch then refuses to load, since loading objects can run
    code. Write a dict instead."""
    save = checkpoint_utils.torch_persistent_save

    @functools.wraps(save)
    def save_plain_values(obj, *args, **kwargs):
        cfg = obj.get("cfg") if isinstance(obj, dict) else None
        if isinstance(cfg, dict):
            plain = {k: vars(v) if isinstance(v, Namespace) else v for k, v in cfg.items()}
            obj = {**obj, "cfg": plain}
        return save(obj, *args, **kwargs)

    checkpoint_utils.torch_persistent_save = save_plain_values


def copy_checkpoints_atomically():
    """fairseq copies a new checkpoint over ``checkpoint_last.pt`` and ``checkpoint_best.pt``. A run
    that is killed meanwhile would leave half of the new one, and nothing of the old one."""
    copy = PathManager.copy

    @functools.wraps(copy)
    def copy_local_files_atomically(src_path, dst_path, overwrite=False):
        if "://" in str(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        copy_atomically(src_path, dst_path)
        return dst_path

    PathManager.copy = staticmethod(copy_local_files_atomically)


def clip_on_cpu():
    """Where there is a GPU, fairseq collects the norms of gradients on it, and cannot then scale
    gradients that are on the CPU: ``--cpu`` fails at the first update."""
    clip = utils.clip_grad_norm_

    @functools.wraps(clip)
    def clip_in_place(params, max_norm, aggregate_norm_fn=None):
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        on_cpu = all(p.device.type == "cpu" for p in params)
        if not (on_cpu and params and torch.cuda.is_available()) or aggregate_norm_fn is not None:
            return clip(params, max_norm, aggregate_norm_fn)
        if max_norm > 0:
            return torch.nn.utils.clip_grad_norm_(params, max_norm)
        return torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()

    utils.clip_grad_norm_ = clip_in_place


# The training loop


def begin_run(log_file=None):
    """Start a training run: one of several in this process, if Hydra's launcher or a script makes
    them one after the other.

    Args:
        log_file (str): fairseq's ``--log-file``
    """
    ask_the_task_before_each_epoch()
    ask_the_task_about_checkpoints()
    tell_the_task_of_each_attempt()
    save_all_of_amp()
    forget_earlier_runs(log_file)


def forget_earlier_runs(log_file=None):
    """fairseq keeps the state of a run where the next run in the same process finds it: the best
    score and the count of ``--patience`` as attributes of functions, tensorboard's writers by name
    only, and the handlers of ``--log-file``."""
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    for module in _training_modules():
        vars(module.should_stop_early).pop("best", None)
        vars(module.should_stop_early).pop("num_runs", None)
    for writer in progress_bar._tensorboard_writers.values():
        writer.close()
    progress_bar._tensorboard_writers.clear()
    logger = logging.getLogger("fairseq_cli.train")
    handlers = [h for h in logger.handlers if isinstance(h, logging.FileHandler)]
    for handler in handlers[:-1] if log_file else handlers:  # the last one is this run's own
        logger.removeHandler(handler)
        handler.close()


def patience_count():
    """What ``--patience`` has counted: a dict of ``best`` and ``num_runs``, or None. fairseq's
    checkpoints do not hold it."""
    for module in _training_modules():
        state = vars(module.should_stop_early)
        if "best" in state:
            return {"best": float(state["best"]), "num_runs": int(state["num_runs"])}
    return None


def restore_patience_count(count):
    """Go on from what :func:`patience_count` returned."""
    for module in _training_modules():
        vars(module.should_stop_early).update(count)


def ask_the_task_before_each_epoch():
    """fairseq looks at ``--max-update``, ``--stop-time-hours`` and ``--patience`` after an update
    only, so that a finished run that is started again makes one update more. A task that has
    ``nothing_left_to_train`` is asked first."""
    for module in _training_modules():
        if not hasattr(module.train, "__wrapped_by_fairseq_sha__"):
            module.train = _train_if_anything_is_left(module.train)


def _train_if_anything_is_left(train):
    @functools.wraps(train)
    def train_if_anything_is_left(cfg, trainer, task, epoch_itr):
        ask = getattr(task, "nothing_left_to_train", None)
        if ask is not None and ask(cfg, trainer, epoch_itr):
            return [None], True
        return train(cfg, trainer, task, epoch_itr)

    train_if_anything_is_left.__wrapped_by_fairseq_sha__ = True
    return train_if_anything_is_left


def ask_the_task_about_checkpoints():
    """fairseq restores a checkpoint without optimizer state (``--no-save-optimizer-state``) with an
    update count of zero, silently, and reports options that do not fit a checkpoint by failed
    assertions. A task that has ``check_run`` and ``check_restored`` is asked before and after."""
    from fairseq.trainer import Trainer

    load = Trainer.load_checkpoint
    if hasattr(load, "__wrapped_by_fairseq_sha__"):
        return

    @functools.wraps(load)
    def load_and_check(self, filename, reset_optimizer=False, *args, **kwargs):
        if not hasattr(self.task, "check_restored"):
            return load(self, filename, reset_optimizer, *args, **kwargs)
        self.task.check_run(self.cfg)
        try:
            state = load(self, filename, reset_optimizer, *args, **kwargs)
        except AssertionError as error:
            message = (str(error).splitlines() or [""])[0]
            if "reset the optimizer" not in message:
                raise
            raise UserError(f"{filename}: {message}")
        if state is not None and not reset_optimizer:
            self.task.check_restored(self, filename)
        return state

    load_and_check.__wrapped_by_fairseq_sha__ = True
    Trainer.load_checkpoint = load_and_check


def tell_the_task_of_each_attempt():
    """After a batch that overflows under ``--fp16`` or runs out of memory, fairseq leaves out the
    rest of the update without a word. A task that has ``begin_attempt`` is told of the next one."""
    from fairseq.trainer import Trainer

    train_step = Trainer.train_step
    if hasattr(train_step, "__wrapped_by_fairseq_sha__"):
        return

    @functools.wraps(train_step)
    def begin_and_train(self, *args, **kwargs):
        begin = getattr(self.task, "begin_attempt", None)
        if begin is not None:
            begin()
        return train_step(self, *args, **kwargs)

    begin_and_train.__wrapped_by_fairseq_sha__ = True
    Trainer.train_step = begin_and_train


def save_all_of_amp():
    """fairseq's wrapper of optimisers under ``--amp`` loads their state past them, so that they
    cannot keep the settings of the config, and does not save its loss scale."""
    from fairseq.optim.amp_optimizer import AMPOptimizer

    if hasattr(AMPOptimizer.state_dict, "__wrapped_by_fairseq_sha__"):
        return

    @functools.wraps(AMPOptimizer.state_dict)
    def state_dict(self):
        return {**self.fp32_optimizer.state_dict(), "grad_scaler": self.scaler.state_dict()}

    @functools.wraps(AMPOptimizer.load_state_dict)
    def load_state_dict(self, state_dict, optimizer_overrides=None):
        state_dict = dict(state_dict)
        saved, own = state_dict.pop("grad_scaler", None), self.scaler.state_dict()
        self.fp32_optimizer.load_state_dict(state_dict, optimizer_overrides)
        if saved and own:  # both are empty without a GPU
            kept = {key: saved[key] for key in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict({**own, **kept})

    state_dict.__wrapped_by_fairseq_sha__ = True
    AMPOptimizer.state_dict, AMPOptimizer.load_state_dict = state_dict, load_state_dict


def _training_modules():
    """The modules that hold fairseq's training loop. Under ``python -m fairseq_cli.train`` that is
    the main module."""
    modules = [sys.modules.get("fairseq_cli.train")]
    main = sys.modules.get("__main__")
    if getattr(getattr(main, "__spec__", None), "name", None) == "fairseq_cli.train":
        modules.append(main)
    return [module for module in modules if hasattr(module, "should_stop_early")]
