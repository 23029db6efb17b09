"""The installed package works without a clone, and declares what it imports."""

import ast
import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fairseq_sha
from tests.tiny_corpus import text

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("fairseq_sha", "preprocess", "examples", "tests", "benchmarks")

# Where a distribution's name is not that of the module.
DISTRIBUTIONS = {"yaml": "PyYAML", "fairseq_cli": "fairseq"}
# In the package, what only one function needs may come with an extra, and this with torch, which is
# built with triton where it can use a GPU.
WITH_TORCH = {"triton"}
# These files are only imported where the extra is installed.
OF_EXTRAS = {"numba_form.py": {"numba"}, "vector_products.py": {"numba", "llvmlite"}}

TINY = """
hydra: {run: {dir: .}}
common: {user_dir: fairseq_sha, cpu: true}
task: {_name: byte_language_modeling, data: elsewhere, tokens_per_sample: 40}
model: {_name: sha_rnn_small, width: 16, num_layers: 2, attention_layers: [1], window: 60}
criterion: {_name: cross_entropy}
optimizer: {_name: min_trust_lamb}
lr_scheduler: {_name: fixed}
optimization: {lr: [0.01], max_update: 4}
dataset: {batch_size: 4, num_workers: 0}
"""


# What is declared.


def requirements():
    """Names of distributions: what the package needs, and with all its extras."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg", encoding="utf-8")

    def names(lines):
        return set(re.findall(r"^\s*([\w-]+)", lines, re.MULTILINE))

    needed = names(config["options"]["install_requires"])
    extras = config["options.extras_require"].values()
    return needed, needed.union(*map(names, extras))


def imports(path):
    """Names of the modules that a file imports: at once, and when something is called."""
    at_once, later = set(), set()

    def visit(node, found):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = later
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child, found)

    visit(ast.parse(path.read_text(encoding="utf-8")), at_once)
    return at_once, later


def undeclared(path, at_once, later):
    """What a file imports without a declaration."""
    local = set(FOLDERS)
    if REPOSITORY / "fairseq_sha" not in path.parents:  # scripts import others by their names
        for folder in ("preprocess", "benchmarks"):
            local.update(file.stem for file in (REPOSITORY / folder).glob("*.py"))
    found = set()
    for modules, declared in zip(imports(path), (at_once, later)):
        for module in modules - local:
            distribution = DISTRIBUTIONS.get(module, module)
            if distribution not in declared and module not in sys.stdlib_module_names:
                found.add(module)
    return found


names_of_python = pytest.mark.skipif(
    sys.version_info < (3, 10), reason="Python tells the names of its own modules since 3.10"
)


@names_of_python
@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_are_declared(folder):
    needed, all_extras = requirements()
    for path in sorted((REPOSITORY / folder).glob("**/*.py")):
        at_once = needed | WITH_TORCH if folder in ("fairseq_sha", "preprocess") else all_extras
        at_once = at_once | OF_EXTRAS.get(path.name, set())
        # A script finds the scripts of its own folder.
        beside = (
            {other.stem for other in path.parent.glob("*.py")} if folder == "examples" else set()
        )
        assert undeclared(path, at_once, all_extras) - beside == set(), path


@names_of_python
def test_an_undeclared_import_is_found(tmp_path):
    (tmp_path / "x.py").write_text("import os, yaml\nimport pandas.io\ndef f(): import onnx\n")
    assert undeclared(tmp_path / "x.py", {"PyYAML"}, {"PyYAML"}) == {"pandas", "onnx"}


def test_importing_needs_the_standard_library_only():
    """So setuptools reads the version without fairseq, and ``--help`` does not wait for it."""
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import fairseq_sha, fairseq_sha.data, fairseq_sha.errors, fairseq_sha.files\n"
        "print(fairseq_sha.__version__)"
    )
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{fairseq_sha.__version__}\n", done.stderr


# What is installed.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, without the network."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"a wheel cannot be built: {module} is not installed")
    old = int(metadata.version("setuptools").partition(".")[0]) < 71
    if old and importlib.util.find_spec("wheel") is None:
        pytest.skip("a wheel cannot be built: setuptools below 70.1 needs the package wheel")
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "fairseq_sha", source / "fairseq_sha", ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    (path,) = folder.iterdir()
    return path


class Environment:
    """A virtual environment that has the wheel, and sees the packages of the running one."""

    def __init__(self, folder, wheel):
        command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
        subprocess.run(command, check=True)
        self.bin = folder / "bin"
        paths = subprocess.run(
            [self.bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self.packages = Path(paths.stdout.strip())
        # Python reads no .pth files of the folders named there, so that a clone that is installed
        # there in editable form is not seen.
        others = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        (self.packages / "others.pth").write_text("\n".join(sorted(others)) + "\n")
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        command += ["--no-deps", "--no-index", str(wheel)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        # As pip would write them.
        for name in ("train", "hydra-train", "eval-lm"):
            script = self.bin / f"fairseq-{name}"
            module = f"fairseq_cli.{name.replace('-', '_')}"
            script.write_text(f"#!{self.bin}/python\nfrom {module} import cli_main\ncli_main()\n")
            script.chmod(0o755)

    def run(self, name, *args, cwd):
        """Run a command of this environment in a folder; returns its output."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        env["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            [self.bin / name, *map(str, args)],
            cwd=str(cwd),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("venv"), wheel)


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = REPOSITORY / "fairseq_sha"
    files = [path for path in package.glob("**/*") if "__pycache__" not in path.parts]
    assert names == {str(path.relative_to(REPOSITORY)) for path in files if path.is_file()}
    assert wheel.name.startswith(f"fairseq_sha-{fairseq_sha.__version__}-py3-none-any")


def test_package_is_found_and_has_its_command(environment, tmp_path):
    output = environment.run("python", "-c", "import fairseq_sha as f; print(f.__file__)", cwd="/")
    assert Path(output.strip()) == environment.packages / "fairseq_sha" / "__init__.py"
    assert "compare" in environment.run("fairseq-sha", "--help", cwd=tmp_path)
    assert "--calibration-seconds" in environment.run(
        "python", "-m", "fairseq_sha", "compare", "--help", cwd=tmp_path
    )


@pytest.fixture(scope="module")
def data(environment, tmp_path_factory):
    """A data folder, made by a script that sees the installed package only."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(REPOSITORY / "preprocess" / "bytes.py", folder / "script.py")
    (folder / "input").write_bytes(text(8000))
    environment.run("python", "script.py", "--input", "input", "--dest", "data", cwd=folder)
    return folder / "data"


def test_preprocessing(data):
    assert len(list(data.iterdir())) == 7


@pytest.mark.long
def test_training(environment, data, tmp_path):
    user_dir = environment.packages / "fairseq_sha"
    options = "--task byte_language_modeling --arch sha_rnn_small --width 16 --num-layers 3 --cpu "
    options += "--tokens-per-sample 40 --batch-size 4 --optimizer min_trust_lamb --lr 0.01 "
    options += "--criterion cross_entropy --max-update 2 --num-workers 0 --save-dir checkpoints"
    output = environment.run(
        "fairseq-train", data, "--user-dir", user_dir, *options.split(), cwd=tmp_path
    )
    assert "done training" in output
    assert (tmp_path / "checkpoints" / "checkpoint_last.pt").exists()


@pytest.mark.long
def test_comparison(environment, data, tmp_path):
    """Outside the clone ``user_dir: fairseq_sha`` is no path; the package's folder is found."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--data", data, "--configs", "tiny.yaml", "--updates", 2, "--out", "out"]
    output = environment.run("fairseq-sha", "compare", *options, cwd=tmp_path)
    assert "| tiny |" in output
    recipe = (tmp_path / "out" / "tiny" / "recipe.yaml").read_text()
    assert f"user_dir: {environment.packages / 'fairseq_sha'}\n" in recipe
