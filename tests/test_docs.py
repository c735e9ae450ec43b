"""The documents tell the truth: their code runs, their links resolve, their commands are those CI runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from graphopt import cli
from graphopt.commands.recover_command import option_groups
from graphopt.pipeline import Pipeline
from graphopt.report import Report, Side, StepRecord

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "writing-a-pass.md"

_BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
# Written in parts, so that this file is not one of those it looks for.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + rf"(?:{'|'.join(['work', 'tmp', 'root', 'home', 'opt', 'mnt', 'Users'])})/",
            r"file:" + "///",
            r"\b[\w.-]*" + r"(?:pypi|pythonhosted|download\.pytorch)" + r"\.(?:org|com|io)",
            r"local" + "host",
            r"\b\d{1,3}(?:\.\d{1,3}){3}" + r":\d+",
        ]
    )
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a document, and the marker right above it."""

    language: str
    code: str
    marker: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text()
    return [
        Block(m["language"], m["code"], m["marker"] or "", text[: m.start("code")].count("\n") + 1)
        for m in _BLOCK.finditer(text)
    ]


def documents() -> list[Path]:
    return [file for file in repository_files() if file.suffix == ".md"]


def repository_files() -> list[Path]:
    """Return what is in the repository, or would be with the next commit."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(ROOT / name for name in names if name and (ROOT / name).is_file())


def environment(folder: Path) -> dict[str, str]:
    """Return an environment with this interpreter's commands, where `pip install` installs into a folder."""
    scripts = str(Path(sys.executable).parent)
    site = str(folder / "site")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTEST_"))}
    return given | {
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "PYTHONPATH": site,
        "PIP_TARGET": site,
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one as the value of `--build-isolation`
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def workplace(folder: Path) -> Path:
    """Return a folder with the models in it, as a reader's checkout has."""
    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("*.opt.onnx*"))
    return folder


def run(block: Block, folder: Path) -> str:
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run([*command, block.code], cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 0, f"line {block.line}:\n{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_tutorial_runs(tmp_path: Path) -> None:
    """Write down every file and run every command of the tutorial, in its order."""
    folder = workplace(tmp_path)
    printed, written = [], []
    for block in blocks(TUTORIAL):
        kind, _, name = block.marker.partition(": ")
        if kind == "file":
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(block.code)
            written.append(name)
        else:
            assert block.marker == "run", f"line {block.line}: neither a file nor run"
            printed.append(run(block, folder))
    listed, _, table, tested = printed
    assert "fold-scale" in listed
    assert "bits of mantissa kept" in listed
    assert "round-weights:bits=6" in table
    assert "tensors rounded to 6 bits" in table
    assert re.search(r"^4 passed", tested, re.MULTILINE)
    assert len(written) == 5
    assert (folder / "rounded.onnx").exists()


def test_tutorial_files_are_clean(tmp_path: Path) -> None:
    for block in blocks(TUTORIAL):
        if block.language == "python" and block.marker.startswith("file: "):
            file = tmp_path / block.marker.removeprefix("file: ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.code)
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml")]
    checked = subprocess.run([*ruff, "check", *config, "."], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    formatted = subprocess.run([*ruff, "format", "--diff", *config, "."], cwd=tmp_path, capture_output=True, text=True)
    assert formatted.returncode == 0, formatted.stdout


def tour() -> list[Block]:
    return [block for block in blocks(README) if not block.marker.startswith("command: ")]


@pytest.mark.parametrize("language", ["python", "bash"])
def test_readme_runs(language: str, tmp_path: Path) -> None:
    chosen = [block for block in tour() if block.language == language]
    assert chosen
    folder = workplace(tmp_path)
    for block in chosen:
        run(block, folder)
    assert (folder / "small.onnx").exists()


def test_training_loop_of_ones_own_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (loop,) = [block for block in blocks(ROOT / "docs" / "torch.md") if block.marker == "run"]
    folder = workplace(tmp_path)
    run(loop, folder)
    assert (folder / "trained.onnx").read_bytes() != (folder / "models" / "digits_cnn.onnx").read_bytes()


def test_readme_recipe_is_one() -> None:
    (recipe,) = [block for block in tour() if block.language == "toml"]
    assert len(Pipeline.from_toml(recipe.code).steps) == 2


def readme_command(name: str) -> str:
    (block,) = [block for block in blocks(README) if block.marker == f"command: {name}"]
    assert block.code.count("\n") == 1, "one shell line each"
    return block.code.strip()


def test_ci_runs_the_commands_of_the_readme(tmp_path: Path) -> None:
    """Run a copy of .ci/run with a shell in place of what it runs, which writes down what it is given."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/run", ".ci/constraints.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name in ("bash", "python3"):
        file = stand_ins / name
        file.write_text(
            f'#!/bin/sh\nprintf "%s|" {name} "$PIP_CONSTRAINT" "$@" >> "{tmp_path}/log"\necho >> "{tmp_path}/log"\n'
        )
        file.chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    path = os.pathsep.join([str(stand_ins), os.environ["PATH"]])
    done = subprocess.run([bash, ".ci/run"], cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    constraint = ".ci/constraints.txt"
    assert (tmp_path / "log").read_text().splitlines() == [
        f"python3|{constraint}|-m|venv|--clear|.venv|",
        *(f"bash|{constraint}|-euo|pipefail|-c|{readme_command(name)}|" for name in ("main", "tests")),
    ]


def test_ci_stops_where_the_readme_lacks_a_command(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "README.md").write_text(README.read_text().replace("command: tests", "command: other"))
    done = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert not (tmp_path / ".venv").exists()


def test_main_command_is_the_main_job() -> None:
    *setup, job = readme_command("main").split(" && ")
    assert job == (".venv/bin/graphopt optimize models/digits_cnn.onnx --passes prune,quant --data models/digits.npz")
    assert setup == ["python3 -m venv .venv", ".venv/bin/pip install -q -e '.[cpu]'"]
    assert readme_command("tests").endswith(".venv/bin/pytest")


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def command_options() -> dict[str, set[str]]:
    """Return the options of every command of the command line."""
    group: Any = typer.main.get_command(cli.app)
    commands: dict[str, Any] = {}
    for name, command in group.commands.items():
        commands |= {
            name: command,
            **{f"{name} {one}": inner for one, inner in getattr(command, "commands", {}).items()},
        }
    known = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands.items()
    }
    known["recover"] |= {words.split()[0] for _, rows in option_groups() for words, _ in rows}
    return known


def calls(document: Path) -> list[list[str]]:
    """Return every call of graphopt in a document's shell blocks, as words."""
    lines = [line for block in blocks(document) if block.language == "bash" for line in block.code.splitlines()]
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [call[1:] for call in words if call and call[0].rpartition("/")[2] == "graphopt"]


@pytest.mark.parametrize("document", [README, TUTORIAL], ids=lambda file: file.name)
def test_calls_are_ones_the_command_line_takes(document: Path) -> None:
    known = command_options()
    found = calls(document)
    assert len(found) > 1
    for command, *arguments in found:
        if arguments and f"{command} {arguments[0]}" in known:
            command = f"{command} {arguments.pop(0)}"
        assert command in known
        assert {word for word in arguments if word.startswith("-")} <= known[command] | {"--help"}


def test_options_in_prose_exist() -> None:
    prose = re.sub(_BLOCK, "", README.read_text())
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", prose))
    assert {"--data", "--eval", "--budget", "--verify", "--report", "--keep-failed"} <= mentioned
    assert mentioned <= set().union(*command_options().values()) | {"--help", "--install-completion"}


def test_pipelines_in_readme_parse() -> None:
    specs = re.findall(r"--passes ([\w:=.,+-]+)", README.read_text())
    assert len(specs) >= 3
    for spec in specs:
        Pipeline.parse(spec)


def test_extras_in_readme_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    wanted = {
        extra for group in re.findall(r"(?:\.|graphopt)\[([a-z,]+)\]", README.read_text()) for extra in group.split(",")
    }
    assert {"cpu", "gpu", "torch", "test"} <= wanted
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in wanted)


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve() -> None:
    checked, faults = 0, []
    for document in documents():
        for found in _LINK.finditer(re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)):
            target = found["target"]
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (document.parent / name).resolve() if name else document
            checked += 1
            if not file.exists() or not file.is_relative_to(ROOT):
                faults.append(f"{document.relative_to(ROOT)}: no file {target}")
            elif anchor and anchor not in anchors(file):
                faults.append(f"{document.relative_to(ROOT)}: no heading {target}")
    assert checked > 5
    assert not faults, "\n".join(faults)


def test_architecture_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for file in sorted((ROOT / "graphopt").glob("*.py")):
        assert f"`{file.name}`" in text or f"`graphopt/{file.name}`" in text, f"{file.name} has no line"
    for folder in ("passes", "backends"):
        for file in sorted((ROOT / folder).rglob("[!_]*.py")):
            assert f"`{file.stem}`" in text, f"{file.relative_to(ROOT)} is not named"
    for name in re.findall(r"`(\w+)\.py`", text):
        known = [ROOT / "graphopt" / f"{name}.py", ROOT / "passes" / f"{name}.py"]
        is_function = name in ("optimize", "compare", "bench", "bisect", "reduce", "replay")
        assert any(file.exists() for file in known) or is_function, f"{name}.py is gone"


def test_every_key_of_the_report_is_described() -> None:
    side = Side(nodes=0, parameters=0, nonzero=0, bytes=0, bytes_gzip=0, macs=0)
    step = StepRecord("", "", "", nodes_before=0, bytes_before=0)
    report = Report("", "", "", "", seed=0, steps=[step], before=side, after=side, ok=True).as_dict()
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text[text.index("## The report") :].partition("\n## ")[0]
    described = set(re.findall(r"`(\w+)`", section)) | {"steps", "check"}
    assert {*report, *report["steps"][0], *report["steps"][0]["check"], *report["before"]} <= described


def test_nothing_names_a_machine() -> None:
    faults = []
    for file in repository_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a model, or data
        faults += [
            f"{file.relative_to(ROOT)}:{number}: {found[0]}"
            for number, line in enumerate(text.splitlines(), 1)
            if (found := MACHINE.search(line))
        ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("see /" + "tmp/x.onnx", True),
        ("'/" + "work/main'", True),
        ("https://" + "pypi" + ".org/simple", True),
        ("models/digits.npz", False),
        ("../shared/" + "work/x", False),
        ("/proc/self/status", False),
    ],
)
def test_machine_names_are_recognized(text: str, is_one: bool) -> None:
    assert bool(MACHINE.search(text)) is is_one


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
