"""``k8s/Dockerfile`` as far as it can be read: nothing here builds it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch

import pytest
import yaml

from rl_system.config.compose import CONFIG_DIR

pytestmark = pytest.mark.unit

ROOT = CONFIG_DIR.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@dataclass
class Stage:
    """Instructions of one ``FROM``, each as (keyword, rest)."""

    parent: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [rest for word, rest in self.instructions if word == keyword]


@pytest.fixture(scope="module")
def text():
    return (ROOT / "k8s/Dockerfile").read_text()


@pytest.fixture(scope="module")
def stages(text):
    """Name -> stage; what comes before the first is called ``""``."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    found = {"": Stage("", "")}
    for line in filter(str.strip, lines):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            found[name] = Stage(parent, name)
        else:
            list(found.values())[-1].instructions.append((word, " ".join(rest.split())))
    return found


def lineage(stages, name):
    """The stages whose instructions make ``name``, the first one first."""
    stage = stages[name]
    return [*(lineage(stages, stage.parent) if stage.parent in stages else []), stage]


def test_it_is_for_buildkit_and_on_nothing_but_a_base_by_digest(text, stages):
    assert text.startswith("# syntax=docker/dockerfile:1.")
    assert stages[""].instructions == [("ARG", "BASE")]  # without a default
    assert [s.parent for s in stages.values() if s.name and s.parent not in stages] == ["${BASE}"]
    check = stages["base"].all("RUN")[0]
    for base, code in (("python:3.11-slim", 1), ("", 1), (f"python:3.11-slim@sha256:{'0' * 64}", 0)):
        done = subprocess.run(["sh", "-c", check], env={"BASE": base}, capture_output=True, text=True)
        assert done.returncode == code and bool(done.stderr) == bool(code)


@pytest.mark.parametrize("target", ["train", "reward"])
def test_each_target_runs_as_uid_1000_and_has_its_lists_before_its_code(stages, target):
    instructions = [i for stage in lineage(stages, target) for i in stage.instructions]
    assert [rest for word, rest in instructions if word == "USER"][-1] == "1000:100"
    copies = [rest.split()[-2:] for word, rest in instructions if word == "COPY"]
    assert copies == [["requirements/${ACCELERATOR}.txt", "requirements/"], [".", "."]]
    installs = [rest for word, rest in instructions if word == "RUN" and "pip install" in rest]
    assert "-r requirements/${ACCELERATOR}.txt" in installs[0] and "--mount=type=cache" in installs[0]
    assert "--editable ." in installs[1] and all("--no-deps" in install for install in installs)
    order = [i for i, (_, rest) in enumerate(instructions) if "requirements/" in rest or rest.endswith(". .")]
    assert order == sorted(order) and "-r requirements" in instructions[order[1]][1]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_both_variants_have_a_list_with_every_version_pinned(accelerator):
    lines = (ROOT / f"requirements/{accelerator}.txt").read_text().splitlines()
    wanted = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(wanted) > 100 and all(re.match(r"[\w.\[\],-]+==\S+", line) for line in wanted)


def test_labels_say_what_it_is(stages):
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', stages["train"].all("LABEL")[0]))
    assert labels == {
        "title": PROJECT["project"]["name"],
        "version": "${VERSION}",
        "revision": "${REVISION}",
        "licenses": PROJECT["project"]["license"],
    }
    assert f"VERSION={PROJECT['project']['version']}" in stages["train"].all("ARG")


def ignored(path: str) -> bool:
    """By ``.dockerignore``: the last rule that meets the path or a folder above it."""
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    out = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.lstrip("!").removeprefix("**/")
            names = parts if "**/" in rule else above
            if any(fnmatch(name, pattern) for name in names):
                out = not rule.startswith("!")
    return out


def test_the_context_has_all_that_is_run_and_nothing_else(stages):
    packages = [pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    run = re.findall(r"(?:python|-r) ((?:tools|requirements)/\S+)", " ".join(stages["train"].all("RUN")))
    needed = [
        *(f"{package}/__init__.py" for package in packages),
        *run,
        "requirements/cpu.txt",
        "requirements/cuda.txt",
    ]
    needed += [
        "pyproject.toml",
        PROJECT["project"]["readme"],
        "toy/weights/policy/config.json",
        "rl_system/k8s/drain.py",
    ]
    assert run and [path for path in needed if ignored(path) or not (ROOT / path).is_file()] == []
    secret = [".git/config", ".venv/bin/python", "runs/toy/config.yaml", ".env", "rl_system/__pycache__/x.pyc", "x.pyc"]
    assert [
        path for path in [*secret, "tests/conftest.py", "docs/grpo.md", "k8s/Dockerfile"] if not ignored(path)
    ] == []


def test_the_documented_commands_build_it(stages):
    page = (ROOT / "docs/kubernetes.md").read_text()
    commands = re.findall(r"docker buildx build(?:.*\\\n)*.*", page)
    declared = {a.partition("=")[0] for stage in stages.values() for a in stage.all("ARG")}
    accelerators = set()
    for command in commands:
        assert "-f k8s/Dockerfile" in command and command.rstrip().endswith(" .")
        assert re.search(r"--target (\S+)", command)[1] in ("train", "reward")
        given = dict(re.findall(r"--build-arg (\w+)=(\S+)", command))
        assert set(given) <= declared and "@sha256:" in given["BASE"]
        accelerators.add(given.get("ACCELERATOR", "cpu"))
    assert accelerators == {"cpu", "cuda"}


def test_the_images_user_is_the_one_that_the_pods_run_as():
    job = yaml.safe_load((ROOT / "k8s/components/train/rayjob.yaml").read_text())
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert (head["runAsUser"], head["runAsGroup"]) == (1000, 100)
