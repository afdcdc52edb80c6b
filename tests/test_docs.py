"""Every command and program of README and documentation does what it says; run by make readme and CI.

A comment that no reader sees stands on the line above a block that is special: ``% needs-data`` (in the README
``<!-- needs-data -->``) where the block needs files that are not here, so that its commands are parsed but not run; ``% slow``
where it takes more than about 20 seconds.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import attribution as at
import evaluation as ev
from vision_attribution.command import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MARKS = ("needs-data", "slow")
BLOCK = re.compile(r"^(?:(?:%|<!--) *([a-z, -]+?)(?: *-->)?\n)?```(\w+)\n(.*?)^```$", flags=re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    marks: frozenset[str]
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    page = name_of(path)
    found = []
    for match in BLOCK.finditer(text):
        marks = frozenset(mark.strip() for mark in (match[1] or "").split(",") if mark.strip() in MARKS)
        found.append(Block(page, text.count("\n", 0, match.start(2)) + 1, marks, match[2], match[3]))
    return found


def commands_of(block: Block) -> list[str]:
    lines = [line.split(" #")[0].strip() for line in block.text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
SHELL = [(block, command) for block in BLOCKS if block.language == "sh" for command in commands_of(block)]
PROGRAMS = [block for block in BLOCKS if block.language == "python"]


def inline_commands() -> list[tuple[str, str]]:
    """Commands within sentences, such as `attribution benchmark --list`."""
    found = []
    for path in PAGES:
        text = BLOCK.sub("", path.read_text(encoding="utf-8"))
        for command in re.findall(r"`((?:attribution|python scripts/\S+) [^`]+)`", text):
            found.append((name_of(path), " ".join(command.split())))  # noqa: PERF401
    return found


def runs(block: Block) -> bool:
    return "needs-data" not in block.marks


def in_order(block: Block, value: Any, identity: str) -> Any:
    return pytest.param(block, value, id=identity, marks=[pytest.mark.readme, *([pytest.mark.slow] if "slow" in block.marks else [])])


def to_run() -> list[Any]:
    """Commands and programs in the order of the pages, each command once: a page may use what it wrote further up."""
    found, seen = [], {"make test"}  # CI runs make test first
    for block in BLOCKS:
        if not runs(block):
            continue
        if block.language == "python":
            found.append(in_order(block, None, block.name))
        if block.language == "sh":
            for number, command in enumerate(commands_of(block), start=1):
                if command not in seen:
                    seen.add(command)
                    found.append(in_order(block, command, f"{block.name}.{number}"))
    return found


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each page a folder with what its commands read, so that they write nothing into the checkout."""
    folders: dict[str, Path] = {}
    for page in dict.fromkeys(block.page for block in BLOCKS):
        folder = folders[page] = tmp_path_factory.mktemp(page.replace("/", "-"))
        (folder / "docs").mkdir()
        (folder / "out").mkdir()
        shutil.copy(DOCS / "photo.png", folder / "docs")
        shutil.copytree(DOCS / "examples", folder / "docs" / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
    return folders


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    examples = os.pathsep.join(filter(None, [str(DOCS / "examples"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": examples, "COLUMNS": "120"}


@pytest.mark.parametrize(("block", "command"), to_run())
def test_runs(block: Block, command: str | None, checkouts: dict[str, Path]) -> None:
    folder = checkouts[block.page]
    before = set(folder.rglob("*"))
    if command is None:
        arguments: Any = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block.text]
    else:
        arguments = command
    if command is not None and command.startswith("make"):
        arguments += f" VENV={Path(sys.executable).parents[1]} --assume-old=pyproject.toml --assume-old=constraints.txt"
    result = subprocess.run(
        arguments, shell=command is not None, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip(), "it printed nothing"
    if command is None:
        check_said(block.text, result.stdout)
    elif "--help" not in command and "--list" not in command and "attribution doctor" not in command:  # which print
        written = {path.suffix for path in set(folder.rglob("*")) - before}
        expected = {".jsonl"} if "--shard" in command else {".png", ".html"}  # a shard has no page
        assert written & expected, f"neither a figure nor a page was written:\n{result.stdout}"


def check_said(program: str, output: str) -> None:
    """What a comment says that a line prints, such as Explanation(cat 0.858, ...), is what it prints, to rounding of the machine."""
    for said in re.findall(r"^print\(.*\)\s+# (Explanation\(.*?\))", program, flags=re.M):
        number = re.compile(r"\d+(?:\.\d+)?")
        same_words = [line for line in output.splitlines() if number.sub("0", line) == number.sub("0", said)]
        close = [
            line
            for line in same_words
            if all(
                abs(float(a) - float(b)) <= max(0.02, 0.02 * float(b))
                for a, b in zip(number.findall(line), number.findall(said), strict=True)
            )
        ]
        assert close, f"it says {said}, but the program printed\n{output}"


@pytest.mark.parametrize(("page", "command"), [*((block.name, command) for block, command in SHELL), *inline_commands()])
def test_the_command_and_its_options_exist(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        known = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
        assert words[1] in known
        return
    if words[0] == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words[2]
        return
    if words[0] == "python":
        parsed, arguments = command_of_script(ROOT / words[1]), words[2:]
    else:
        assert words[0] == "attribution", f"{command}: neither make, python nor attribution"
        group = typer.main.get_command(app)
        name = words[1]
        parsed, arguments = getattr(group, "commands", {}).get(name), words[2:]
        assert parsed is not None, f"there is no command attribution {name}"
    for word in arguments:
        if word.endswith(".toml"):
            assert (ROOT / word).is_file(), word
    if "--help" not in arguments:
        parsed.make_context(words[0], arguments)  # a UsageError for an unknown option or a value that does not fit


def command_of_script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    single = typer.Typer()
    single.command()(module.main)
    return typer.main.get_command(single)


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: block.name)
def test_programs_use_names_that_exist(block: Block) -> None:
    """Also of programs that need data: at.NAME and ev.NAME are there."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("at", "ev"):
            assert hasattr({"at": at, "ev": ev}[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


RECIPES = {  # of docs/extending.md: the test that holds each to the contract of its registry
    "stripes": "tests/attribution/test_regions.py",
    "single_regions": "tests/attribution/search/test_searches.py",
    "gradient_norm": "tests/attribution/baselines/test_attribute.py",
    "_peak_share": "tests/evaluation/metrics/test_registry.py",
}


def test_recipes_are_those_that_the_contract_tests_try() -> None:
    """Functions of the extending page stand in the tests word for word, and its study is the one that the tests run."""
    programs = [block.text for block in PROGRAMS if block.page == "docs/extending.md"]
    functions = {
        node.name: ast.get_source_segment(text, node)
        for text in programs
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(functions) == set(RECIPES)
    for name, file in RECIPES.items():
        assert f"{functions[name]}\n" in (ROOT / file).read_text(encoding="utf-8"), f"{name} is not in {file}"
    assert "```{literalinclude} examples/brightness.py\n" in (DOCS / "extending.md").read_text(encoding="utf-8")


def test_there_is_something_to_run() -> None:
    pages = {block.page for block in BLOCKS if block.language in ("sh", "python") and runs(block)}
    assert {"README.md", "docs/getting-started.md"} <= pages
    assert {f"docs/how-to/{path.name}" for path in (DOCS / "how-to").glob("*.md")} <= pages


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=lambda block: block.name)
def test_settings_are_settings(block: Block) -> None:
    assert ev.make_settings(tomllib.loads(block.text)).methods


def test_languages_of_blocks() -> None:
    """A block in another spelling (bash, py, ...) would never be run."""
    assert {block.language for block in BLOCKS} <= {"sh", "python", "toml", "text"}


def test_the_readme_only_opens_the_door() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("package", [at, ev], ids=["attribution", "evaluation"])
def test_the_reference_names_every_public_name(package: Any) -> None:
    page = (DOCS / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
    directives = re.findall(rf"^\.\. auto(?:function|class|data|exception):: {package.__name__}\.(\w+)", page, flags=re.M)
    assert sorted(directives) == sorted(package.__all__)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)[^)]*\)", text):
        assert (path.parent / target).exists(), target
    for named in re.findall(r"`((?:scripts|tests|attribution|datasets|evaluation|docs)/[\w./*-]*)`", text):
        assert list(ROOT.glob(named.rstrip("/"))), named


def test_the_changelog_says_where_modules_went() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## [")[1]  # of the version to come
    rows = re.findall(r"^\| (.*) \| (.*) \|$", text, flags=re.M)
    named = [name for _, now in rows for name in re.findall(r"`((?:attribution|evaluation|vision_attribution)(?:\.\w+)*)`", now)]
    assert len(named) > 30
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("path", sorted((DOCS / "images").iterdir()), ids=lambda path: path.name)
def test_every_picture_is_shown(path: Path) -> None:
    assert any(f"images/{path.name}" in page.read_text(encoding="utf-8") for page in PAGES)
