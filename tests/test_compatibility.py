"""What is changed in fairseq and in the process: never by an import, and only what is still needed.

fairseq's own forms (``__wrapped__``) show that each change is needed.
"""

import inspect
import logging
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils, utils
from fairseq.file_io import PathManager
from fairseq.logging import progress_bar
from fairseq.models import register_model
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from fairseq_sha import UserError, compatibility
from fairseq_sha.checks import torch_is_at_least
from fairseq_sha.models.sha_rnn import SHARNNLayer
from fairseq_sha.optim.radam import FairseqRAdam, RAdamConfig
from fairseq_sha.tasks.segment_language_modeling import SegmentLanguageModelingTask
from tests.commands import REPOSITORY, command, hydra_train, logged_losses
from tests.options import SHA_RNN
from tests.test_commands import RunsCode, in_process
from tests.tiny_corpus import write_folder

compatibility.apply()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def python(program, folder, *argv):
    """Run a program in a Python of its own, in a folder, with this package on its path."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, argv)],
        cwd=folder,
        env={"PYTHONPATH": f"{REPOSITORY}:{folder}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


BESIDE_A_SCRIPT = """
import os, sys

hook, environment, modules = sys.excepthook, dict(os.environ), set(sys.modules)
import fairseq_sha

heavy = {"torch", "fairseq", "numpy", "omegaconf", "hydra"}
assert not heavy & {name.partition(".")[0] for name in set(sys.modules) - modules}
import torch
from fairseq import checkpoint_utils, utils
from fairseq.file_io import PathManager
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
import fairseq.trainer, fairseq_cli.train

def functions():
    return [
        checkpoint_utils.verify_checkpoint_directory,
        checkpoint_utils.load_model_ensemble_and_task,
        checkpoint_utils.load_checkpoint_to_cpu,
        checkpoint_utils.torch_persistent_save,
        PathManager.copy,
        utils.clip_grad_norm_,
        fairseq.trainer.Trainer.load_checkpoint,
        fairseq_cli.train.train,
    ]

def denormal():
    return (torch.tensor([1e-39]) * 0.5).item()

environment = dict(os.environ)  # fairseq's own imports may add to it
before = functions()
assert "sha_rnn" not in MODEL_REGISTRY and "byte_language_modeling" not in TASK_REGISTRY
fairseq_sha.register()
assert "sha_rnn" in MODEL_REGISTRY and "byte_language_modeling" in TASK_REGISTRY
assert functions() == before and sys.excepthook is hook and dict(os.environ) == environment
assert denormal() > 0

from fairseq_sha import compatibility
compatibility.apply()
compatibility.begin_run()
once = functions()
assert not set(once) & set(before) and sys.excepthook is not hook
assert dict(os.environ) == environment
assert denormal() == 0
compatibility.apply()
compatibility.begin_run()
assert functions() == once
print("done")
"""


def test_import_changes_nothing(tmp_path):
    done = python(BESIDE_A_SCRIPT, tmp_path)
    assert done.stdout.strip().endswith("done"), done.stderr


OTHER_PLUG_IN = """
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

@register_task("other_task", dataclass=LanguageModelingConfig)
class OtherTask(LanguageModelingTask):
    def build_model(self, cfg, from_checkpoint=False):
        raise {error}
"""
BESIDE_ANOTHER_PLUG_IN = """
import sys
import fairseq_sha
fairseq_sha.register()
from fairseq_cli.train import cli_main
sys.argv = ["fairseq-train", *sys.argv[1:]]
cli_main()
"""


@pytest.mark.parametrize("error", ["ValueError('of the other plug-in')", "FileNotFoundError('x')"])
def test_another_plug_in_keeps_its_tracebacks(data, tmp_path, error):
    folder = tmp_path / "other_plug_in"
    (folder / "tasks").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "tasks" / "__init__.py").write_text("")
    (folder / "tasks" / "other.py").write_text(OTHER_PLUG_IN.format(error=error))
    options = f"--user-dir {folder} --task other_task --arch transformer_lm --batch-size 2 --cpu"
    options += f" --optimizer sgd --lr 0.1 --save-dir {tmp_path}/out"
    done = python(BESIDE_ANOTHER_PLUG_IN, tmp_path, data, *options.split())
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(error.partition("(")[0])


# Names that two plug-ins register

OTHER_MODEL = """
from fairseq.models import FairseqLanguageModel, register_model
from fairseq.models.transformer_lm import TransformerLanguageModelConfig

@register_model("transformer_xl", dataclass=TransformerLanguageModelConfig)
class TransformerXLLanguageModel(FairseqLanguageModel):
    pass
"""
FIRST_COMER = """
import logging, sys
logging.basicConfig(stream=sys.stdout)
import other_model
import fairseq_sha
fairseq_sha.register()
from fairseq.models import MODEL_REGISTRY
from fairseq_sha.data.codecs import ByteCodec
from fairseq_sha.tasks.byte_language_modeling import ByteLanguageModelingTask
from types import SimpleNamespace
task = ByteLanguageModelingTask(None, ByteCodec.from_symbols(["<s>", "<pad>", "</s>", "<unk>"]))
task.build_model(SimpleNamespace(_name="transformer_xl"), from_checkpoint=True)
"""
LATE_COMER = """
import logging, sys
logging.basicConfig(stream=sys.stdout)
import fairseq_sha
fairseq_sha.register()
import other_model
from fairseq_sha.models.sha_rnn import SHARNN as Base
from fairseq_sha import compatibility
compatibility.apply()
"""


#: fairseq 0.12.2 raises an error instead of keeping the first in silence
KEEPS_THE_FIRST = "return MODEL_REGISTRY[name]" in inspect.getsource(register_model)
DUPLICATE = "ValueError: Cannot register duplicate model (transformer_xl)"


def test_names_that_another_plug_in_took_are_named(tmp_path):
    (tmp_path / "other_model.py").write_text(OTHER_MODEL)
    done = python(FIRST_COMER, tmp_path)
    if not KEEPS_THE_FIRST:
        assert done.stderr.strip().endswith(DUPLICATE)
        return
    assert "transformer_xl: other_model has registered this name before" in done.stdout
    assert "UserError: --arch transformer_xl: other_model has registered" in done.stderr


def test_names_that_another_plug_in_wanted_are_named(tmp_path):
    (tmp_path / "other_model.py").write_text(OTHER_MODEL)
    done = python(LATE_COMER, tmp_path)
    if not KEEPS_THE_FIRST:
        assert done.stderr.strip().endswith(DUPLICATE)
        return
    assert done.returncode == 0, done.stderr
    assert "transformer_xl: other_model registers this name too" in done.stdout
    assert done.stdout.count("registers this name") == 1


# What is changed, beside what fairseq does


@pytest.mark.parametrize("limit, expected", [(0.5, 0.5), (1e3, 10.0), (0.0, 10.0)])
def test_gradients_on_the_cpu_are_clipped_there(monkeypatch, limit, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for param, value in zip(params, ([6.0, 0.0], [0.0, 8.0])):
        param.grad = torch.tensor(value)
    assert float(utils.clip_grad_norm_(iter(params), limit)) == 10
    clipped = torch.cat([param.grad for param in params[:2]])
    assert float(clipped.norm()) == pytest.approx(expected, rel=1e-5)
    if limit > 0:
        with pytest.raises((AssertionError, RuntimeError)):
            utils.clip_grad_norm_.__wrapped__(iter(params), limit)


def test_copies_are_atomic(tmp_path, monkeypatch):
    source, destination = tmp_path / "new", tmp_path / "old"
    source.write_bytes(b"new" * 99)

    def interrupted(source, destination):
        Path(destination).write_bytes(Path(source).read_bytes()[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    for copy, left in ((PathManager.copy, b"old"), (PathManager.copy.__wrapped__, b"newnewnewn")):
        destination.write_bytes(b"old")
        with pytest.raises(KeyboardInterrupt):
            copy(str(source), str(destination), overwrite=True)
        assert destination.read_bytes() == left


def test_settings_are_saved_as_plain_values(tmp_path):
    state, path = {"cfg": {"optimizer": Namespace(lr=[0.1])}}, str(tmp_path / "checkpoint.pt")
    checkpoint_utils.torch_persistent_save(state, path)
    assert torch.load(path, weights_only=True) == {"cfg": {"optimizer": {"lr": [0.1]}}}
    checkpoint_utils.torch_persistent_save.__wrapped__(state, path)
    with pytest.raises(Exception, match="Namespace"):
        torch.load(path, weights_only=True)


def test_checksums_are_compared(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"model": {"weights": torch.rand(9999)}, "optimizer_history": [], "extra_state": {}}
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"]["weights"].shape == (9999,)
    with pytest.raises(UserError, match="contents differ from their checksums"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


@pytest.mark.parametrize("forced", [False, True])
def test_code_in_checkpoints_is_never_run(tmp_path, monkeypatch, forced):
    """torch does by default below 2.6, and later if the environment says so."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trace = str(tmp_path / "checkpoint.pt"), tmp_path / "ran"
    torch.save({"model": RunsCode(str(trace))}, path)
    with pytest.raises(UserError, match="not a checkpoint that fairseq wrote"):
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert not trace.exists()
    try:
        checkpoint_utils.load_checkpoint_to_cpu.__wrapped__(path)
    except Exception as error:  # what comes after the code ran, or torch's refusal
        logging.info("%s", error)
    assert trace.exists() == (forced or not torch_is_at_least(2, 6))


def test_validate_does_not_run_code_either(data, tmp_path):
    """It loads the checkpoint before it sets up the task."""
    trace = tmp_path / "ran"
    torch.save({"model": RunsCode(str(trace))}, tmp_path / "checkpoint.pt")
    options = f"--path {tmp_path}/checkpoint.pt --batch-size 2 --cpu"
    done = command("fairseq-validate", data, options)
    assert done.returncode == 1 and "error: " in done.stdout.strip().splitlines()[-1]
    assert not trace.exists()


def test_folders_and_files_of_the_user_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    verify = checkpoint_utils.verify_checkpoint_directory
    with pytest.raises(UserError, match="--save-dir .*/file: cannot be written to"):
        verify(str(tmp_path / "file"))
    with pytest.raises(OSError, match="dummy"):
        verify.__wrapped__(str(tmp_path / "file"))
    load = checkpoint_utils.load_model_ensemble_and_task
    with pytest.raises(UserError, match="none.pt: no such file"):
        load([str(tmp_path / "none.pt")])
    with pytest.raises(OSError, match="Model file not found"):
        load.__wrapped__([str(tmp_path / "none.pt")])


# One run after the other in a process


def test_nothing_of_a_run_reaches_the_next(data, tmp_path, monkeypatch, caplog):
    import fairseq_cli.train

    logger = logging.getLogger("fairseq_cli.train")

    def run(name, updates):
        folder = tmp_path / name
        options = f"{SHA_RNN} --arch sha_rnn_small --max-update {updates} --save-dir {folder}"
        options += f" --patience 5 --log-file {folder}.log --tensorboard-logdir {folder}/tb"
        in_process("train", monkeypatch, caplog, data, *options.split())

    try:
        run("first", 2)
        assert hasattr(checkpoint_utils.save_checkpoint, "best")
        assert hasattr(fairseq_cli.train.should_stop_early, "best")
        assert progress_bar._tensorboard_writers
        checkpoint_utils.save_checkpoint.best = 0.0  # a run that none can beat
        fairseq_cli.train.should_stop_early.best = 0.0
        length = (tmp_path / "first.log").stat().st_size
        run("second", 3)
        assert (tmp_path / "second" / "checkpoint_best.pt").exists()
        assert fairseq_cli.train.should_stop_early.best > 1
        assert list((tmp_path / "second" / "tb" / "train_inner").glob("events*"))
        assert "num_updates: 3" in (tmp_path / "second.log").read_text()
        # What fairseq says before the task is set up.
        assert "num_updates: 3" not in (tmp_path / "first.log").read_text()[length:]
    finally:
        compatibility.forget_earlier_runs()
    assert not [h for h in logger.handlers if isinstance(h, logging.FileHandler)]


def test_finished_run_would_make_another_update(data, tmp_path, monkeypatch, caplog):
    """As fairseq does without the task's hook."""
    argv = [data, *f"{SHA_RNN} --max-update 2 --save-dir {tmp_path}".split()]
    in_process("train", monkeypatch, caplog, *argv)
    log = in_process("train", monkeypatch, caplog, *argv)
    assert "nothing left to train: there have been 2 updates" in log
    with monkeypatch.context() as patched:
        patched.delattr(SegmentLanguageModelingTask, "nothing_left_to_train")
        log = in_process("train", patched, caplog, *argv)
    assert "num_updates: 3 >= max_update: 2" in log


def test_checkpoint_without_optimizer_would_be_trained_anew(data, tmp_path, monkeypatch, caplog):
    """As fairseq does without the task's hook."""
    options = f"{SHA_RNN} --max-update 2 --no-save-optimizer-state --save-dir {tmp_path}"
    argv = [data, *options.split()]
    in_process("train", monkeypatch, caplog, *argv)
    with monkeypatch.context() as patched:
        patched.delattr(SegmentLanguageModelingTask, "check_restored")
        log = in_process("train", patched, caplog, *argv)
    assert "num_updates: 2 >= max_update: 2" in log and "@ 0 updates" in log


HYDRA = """
hydra: {{run: {{dir: .}}, sweep: {{dir: {folder}/sweep}}}}
common: {{user_dir: {repository}/fairseq_sha, cpu: true, log_format: simple, log_interval: 1}}
task: {{_name: byte_language_modeling, data: {data}, tokens_per_sample: 40}}
model: {{_name: sha_rnn_small, width: 16, num_layers: 2, attention_layers: [1], window: 60}}
optimizer: {{_name: min_trust_lamb}}
lr_scheduler: {{_name: fixed}}
criterion: {{_name: cross_entropy}}
dataset: {{batch_size: 4, num_workers: 0, validate_interval_updates: 1}}
optimization: {{lr: [0.01], max_update: 4}}
checkpoint: {{save_dir: "{folder}/job${{hydra:job.num}}", patience: 2}}
"""


def test_jobs_of_a_sweep_do_not_disturb_each_other(data, tmp_path):
    """The second job is worse than the first, and is neither stopped nor deprived of its best
    checkpoint by that. Repeated, both are found done; what one lacks is trained."""
    config = HYDRA.format(folder=tmp_path, data=data, repository=REPOSITORY)
    (tmp_path / "sweep.yaml").write_text(config)
    sweep = ["-m", "optimization.lr=[0.05],[0.002]"]
    first = hydra_train(tmp_path, "sweep", *sweep)
    assert first.returncode == 0, first.stdout
    assert first.stdout.count("max_update: 4") == 2 and "early stop" not in first.stdout
    for job in ("job0", "job1"):
        assert (tmp_path / job / "checkpoint_best.pt").exists()
    again = hydra_train(tmp_path, "sweep", *sweep)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("nothing left to train") == 2 and not logged_losses(again.stdout)
    shutil.rmtree(tmp_path / "job1")
    rest = hydra_train(tmp_path, "sweep", *sweep)
    assert rest.returncode == 0, rest.stdout
    assert rest.stdout.count("nothing left to train") == 1 and len(logged_losses(rest.stdout)) == 4


def test_training_goes_on_from_the_state_before_a_batch_that_ran_out_of_memory(
    data, tmp_path, monkeypatch, caplog
):
    """fairseq skips the batch and never feeds it again."""
    forward, calls = SHARNNLayer.forward, []

    def run_out_once(self, h, state, context):
        if context.training and self.attention is not None:
            calls.append(bool(state))
            if len(calls) == 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, h, state, context)

    monkeypatch.setattr(SHARNNLayer, "forward", run_out_once)
    options = f"{SHA_RNN} --max-update 8 --no-save --save-dir {tmp_path}"
    log = in_process("train", monkeypatch, caplog, data, *options.split())
    assert "segments 4 to 4 of epoch 1 were lost" in log
    assert len(calls) == 9 and calls[0] is False and all(calls[1:])


def under_amp(scale, **settings):
    """RAdam in fairseq's wrapper for ``--amp``. Without a GPU, fairseq's own scaler is off."""
    cfg = OmegaConf.structured(RAdamConfig(**{"lr": [0.1], **settings}))
    optimizer = AMPOptimizer.__new__(AMPOptimizer)
    optimizer.fp32_optimizer = FairseqRAdam(cfg, [torch.nn.Parameter(torch.ones(2))])
    optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)
    return optimizer


def test_resumed_run_with_amp_keeps_its_loss_scale_and_takes_settings_from_its_config():
    compatibility.begin_run()
    saved = under_amp(512.0, weight_decay=0.2).state_dict()
    resumed = under_amp(128.0, weight_decay=0.1, radam_eps=1e-6)
    AMPOptimizer.load_state_dict.__wrapped__(resumed, saved)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.2
    assert "grad_scaler" not in AMPOptimizer.state_dict.__wrapped__(resumed)

    resumed.load_state_dict(saved)
    (group,) = resumed.optimizer.param_groups
    assert group["weight_decay"] == 0.1 and group["eps"] == 1e-6
    assert resumed.scaler.get_scale() == 512 and resumed.scaler.get_growth_interval() == 7
    # A checkpoint from before the scale was saved, and one of a run without --amp.
    other = under_amp(64.0)
    other.load_state_dict(resumed.fp32_optimizer.state_dict())
    assert other.scaler.get_scale() == 64
    other.fp32_optimizer.load_state_dict(saved)


def test_task_is_told_of_each_attempt_at_an_update():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    compatibility.begin_run()
    told = []
    task = Namespace(begin_attempt=lambda: told.append(1))
    for train_step, count in ((Trainer.train_step.__wrapped__, 0), (Trainer.train_step, 1)):
        with pytest.raises(Stop):
            train_step(Namespace(task=task, _set_seed=stop), [])
        assert len(told) == count
    with pytest.raises(Stop):  # another task
        Trainer.train_step(Namespace(task=None, _set_seed=stop), [])
