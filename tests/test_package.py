"""What a user installs: the wheel, away from this folder, and the images, as far as they can be judged unbuilt."""

import configparser
import email
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from qwen_jax.cli import _parser

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"qwen_jax": ROOT / "qwen_jax", "qwen_kernels": ROOT / "kernels" / "qwen_kernels"}
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True,
                   capture_output=True)
    path, = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's files, as an installer lays them down."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_every_file_of_both_packages_is_in_the_wheel_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    expected = {f"{name}/{path.relative_to(folder).as_posix()}": path.read_bytes()
                for name, folder in PACKAGES.items() for path in folder.rglob("*")
                if path.is_file() and "__pycache__" not in path.parts}
    information = f"qwen_jax-{PROJECT['version']}.dist-info/"
    assert {name for name in found if not name.startswith(information)} == set(expected)
    assert all(found[name] == content for name, content in expected.items())
    for needed in ("qwen_jax/bundled/model.safetensors", "qwen_jax/yardstick/sparse_attention.json",
                   "qwen_jax/student/model.safetensors",
                   "qwen_jax/serving/http/page.html", "qwen_kernels/attention/xla.py"):
        assert needed in found
    assert sum(map(len, found.values())) < 12e6


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"qwen_jax-{PROJECT['version']}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(f"{folder}/entry_points.txt").decode())
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Name"] == "qwen-jax" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed and not any(line.startswith(("torch", "qwen")) for line in needed)
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert dict(entries["console_scripts"]) == {"qwen-jax": "qwen_jax.cli:main"}


def test_the_first_version_of_the_changelog_is_this_one():
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions and versions[0] == PROJECT["version"]


def test_it_works_away_from_the_repository(installed, tmp_path):
    code = "import qwen_jax, qwen_kernels; print(qwen_jax.__file__, qwen_kernels.__file__, sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}

    def run(*args):
        return subprocess.run([sys.executable, *args], cwd=tmp_path, env=environment, check=True, text=True,
                              capture_output=True).stdout

    assert all(Path(line).is_relative_to(installed) for line in run("-c", code).splitlines())
    answer = json.loads(run("-m", "qwen_jax.cli", "generate", "bundled", "--prompt", "Limit 507", "--max-tokens", "4",
                            "--temperature", "0", "--max-seq-len", "64", "--json"))
    assert len(answer["token_ids"]) == 4 or answer["finish_reason"] == "stop"
    assert json.loads(run("-m", "qwen_jax.cli", "info", "yardstick", "--json"))["num_layers"] == 4


def instructions(name):
    """Of a Dockerfile: pairs of a keyword and its arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_have_what_they_copy_and_start_what_is_there(name):
    steps = instructions(name)
    copied = [word for keyword, rest in steps if keyword == "COPY" and "--from" not in rest
              for word in rest.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored and all(f"!{source}" in ignored for source in copied)
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml",
              *(folder.relative_to(ROOT).parts[0] for folder in PACKAGES.values())}
    assert set(copied) == needed  # what the wheel is built from

    last = dict(steps)  # of each keyword the last one
    assert json.loads(last["ENTRYPOINT"]) == ["qwen-jax"] and "qwen-jax" in PROJECT["scripts"]
    args = _parser().parse_args(json.loads(last["CMD"]))
    assert args.host == "0.0.0.0" and str(args.port) == last["EXPOSE"]
    extras = re.search(r"\.whl\)\[([\w,]+)\]", str(steps)).group(1).split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"]) and "serve" in extras


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_a_user_with_a_cache_of_its_own_and_say_whether_they_are_well(name):
    steps = instructions(name)
    user = dict(steps)["USER"]
    made = next(rest for keyword, rest in steps if keyword == "RUN" and "useradd" in rest)
    assert user.isdigit() and int(user) > 0 and f"--uid {user}" in made
    volume = dict(steps)["VOLUME"]
    assert f"--mode=0700 {volume}" in made and f"QWEN_JAX_CACHE={volume}/" in dict(steps)["ENV"]
    command = dict(steps)["HEALTHCHECK"].split("CMD", 1)[1]
    probe = json.loads(command)[-1]
    compile(probe, name, "exec")
    assert f":{dict(steps)['EXPOSE']}/health" in probe


def test_the_cpu_image_has_the_programs_of_the_model_that_it_serves():
    steps = instructions("Dockerfile")
    run = next(rest for keyword, rest in steps if keyword == "RUN" and rest.startswith("qwen-jax "))
    model = dict(steps)["ARG"].split("=")[1]
    args = _parser().parse_args(shlex.split(run.replace('"$MODEL"', model))[1:])
    cache = re.search(r"QWEN_JAX_CACHE=(\S+)", dict(steps)["ENV"]).group(1)
    assert args.model == model == json.loads(dict(steps)["CMD"])[1] and args.output == f"{cache}/executables"
    keywords = [keyword for keyword, _ in steps]
    assert keywords.index("USER") < steps.index(("RUN", run)) < keywords.index("VOLUME"), "else the folder is not kept"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name):
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None and not os.environ.get("QWEN_JAX_CI"):
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, ROOT / name], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_executable_and_parse():
    for path in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert os.access(path, os.X_OK), path
        subprocess.run(["bash", "-n", path], check=True)
