"""The documents are true to the program: links and anchors lead somewhere, commands, options and keys exist."""

from __future__ import annotations

import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from page_commands import commands

from latent_grpo.common.config.reference import reference
from latent_grpo.deploy.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
MADE = {"settings.md"}  # from the program: its keys are true, and its code spans are values
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
KEYS = [key.name for section in reference() for key in section.keys]
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
FILE = re.compile(r"\.(py|json|jsonl|md|yaml)$")
METHODS = ("model.generate",)  # of Hugging Face's model, no key of ours
NOT_OURS = ("serve",)  # vLLM's options follow


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them; a repeated one gets a number."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        number = 1
        while (name := anchor if number == 1 else f"{anchor}-{number - 1}") in found:
            number += 1
        found.add(name)
    return found


def dead_links(page: Path) -> Iterator[str]:
    for match in LINK.finditer(prose(page)):
        target = match[1] or match[2]
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{target}: {file.name} has no such heading"


@cache
def names_of(depth: int) -> set[str]:
    """The keys of so many parts, and the sections."""
    return {".".join(name.split(".")[:depth]) for name in KEYS}


@cache
def key_pattern(name: str) -> re.Pattern[str]:
    """What a page may write for a key: a number or `*` or `N` in the place of an index, any name for `NAME`."""
    parts = [r"[\w*-]+" if part in ("N", "NAME") else rf"(?:{re.escape(part)}|\*)" for part in name.split(".")]
    return re.compile(r"\.".join(parts))


def is_key(text: str) -> bool:
    """Whether a text is a key, or a section of keys. Below `options` a user's own class decides."""
    if re.search(r"(^|\.)options(\.|$)", text):
        return True
    return any(key_pattern(name).fullmatch(text) for name in names_of(text.count(".") + 1))


@cache
def program() -> Any:
    return typer.main.get_command(app)


def the_command(words: list[str]) -> tuple[Any, list[str]] | str:
    """The command that words call, and the words after it; or what is wrong with them."""
    here = program()
    while hasattr(here, "commands"):  # a group
        if not words or words[0].startswith("-"):
            return here, words
        if words[0] not in here.commands:
            return f"there is no command {words[0]}"
        here, words = here.commands[words[0]], words[1:]
    return here, words


def faults(line: str) -> Iterator[str]:
    """What is wrong with a line that begins with `latent-grpo`: its command, options and keys."""
    try:
        words = shlex.split(line)[1:]
    except ValueError:
        return  # a part of a command, in prose
    if not words or not re.fullmatch(r"-?-?[a-z][a-z-]*", words[0]):
        return  # `latent-grpo ...`
    if words[0] == "submit":  # its own options, and then another command
        inner = next((i for i, word in enumerate(words[1:], 1) if word in program().commands), None)
        if inner is not None:
            yield from faults(shlex.join(["latent-grpo", *words[inner:]]))
            words = words[:inner]
        else:  # `train` is what it means
            words = ["train", *(word for word in words[1:] if word.partition("=")[0] != "--env")]
    found = the_command(words)
    if isinstance(found, str):
        yield found
        return
    command, rest = found
    if command.name in NOT_OURS:
        return
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help", "--address", "--follow", "--no-follow"}
    free = bool(command.context_settings.get("ignore_unknown_options"))
    for word in rest:
        name = word.partition("=")[0]
        if word.startswith("--"):
            if name not in options and not (free and is_key(name[2:])):
                yield f"{command.name} has no option {name}"
        elif free and re.fullmatch(r"[a-z][\w.]*=.*", word) and not is_key(name):
            yield f"{name} is no key"


def spans(page: Path) -> list[str]:
    return SPAN.findall(prose(page))


def unknown_key(span: str) -> bool:
    """Whether a code span looks like a key of a section of ours, alone or with a value, and is none."""
    found = re.fullmatch(r"([a-z_]+(?:\.[\w*]+)+)(?:=.*|: .*)?", span)
    if found is None or FILE.search(found[1]) or found[1] in METHODS:
        return False
    return found[1].partition(".")[0] in SECTIONS and not is_key(found[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page):
    assert list(dead_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_their_keys_exist(page):
    shown = commands(page, "latent-grpo") + [span for span in spans(page) if span.startswith("latent-grpo ")]
    found = [f"{line}: {fault}" for line in shown for fault in faults(line[line.index("latent-grpo") :])]
    assert found == []


def test_the_readme_names_every_command():
    (table,) = re.findall(r"## Commands\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    rows = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(typer.main.get_command(app).commands) <= set(SPAN.findall(rows))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in MADE], ids=lambda page: page.name)
def test_keys_in_code_spans_exist(page):
    found = []
    for span in spans(page):
        if unknown_key(span):
            found.append(span)
    assert found == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("latent-grpo trian --profile a", "there is no command trian"),
        ("latent-grpo train --profil a", "train has no option --profil"),
        ("latent-grpo train noise.scales=1", "noise.scales is no key"),
        ("latent-grpo train --noise.scales 1", "train has no option --noise.scales"),
        ("latent-grpo bench nothing", "there is no command nothing"),
        ("latent-grpo submit evaluate --modle m", "evaluate has no option --modle"),
        ("latent-grpo train --profile a tasks.0.path=b noise.scale=1 --optimizer.lr 1", None),
        ("latent-grpo submit --address http://HEAD:8265 --profile a --gpus 8", None),
    ],
)
def test_a_fault_is_found(line, fault):
    assert next(faults(line), None) == fault


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One `two`\n\n## One two\n\n[a](#one-two) [b](#one-two-1) [c](#three) [d](none.md) ![e](f.png)\n")
    assert [link.partition(":")[0] for link in dead_links(page)] == ["#three", "none.md", "f.png"]


@pytest.mark.parametrize(
    ("span", "unknown"),
    [
        ("rollout.worker", True),
        ("checkpoint.backgrond: false", True),
        ("tasks.0.colums.problem=a", True),
        ("rollout.workers", False),
        ("checkpoint.background: false", False),
        ("tasks.*.max_prompt_tokens", False),
        ("evaluation.tasks.0.path=a", False),
        ("tasks.0.options.size=3", False),
        ("metrics.jsonl", False),
        ("pool.submit", False),
    ],
)
def test_an_unknown_key_is_found(span, unknown):
    assert unknown_key(span) is unknown


def test_the_site_has_every_page_and_every_object_that_it_documents():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    groups = [next(iter(entry.values())) for entry in site["nav"]]
    shown = {page for group in groups for page in ([group] if isinstance(group, str) else [*map(one_value, group)])}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} <= shown
    assert all((ROOT / page).is_file() for page in shown)
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 10
    for name in named:
        assert pkgutil.resolve_name(name).__doc__, f"{name} has no docstring"


def one_value(entry: dict[str, str]) -> str:
    (value,) = entry.values()
    return value
