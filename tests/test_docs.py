"""README and docs against the code, and the two languages against each other."""
import functools
import re
import unicodedata

import pytest
from conftest import ROOT

import config
import corpora
from extras import draw

PAGES = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")]
PAGES = ["README.md", "README_zh.md", *sorted(PAGES)]
ENGLISH = [page for page in PAGES if "_zh" not in page]
# what is not ours: options of torchrun, programs, scripts of another project
OTHER_OPTIONS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "help"}
OTHER_PROGRAMS = "hf ", "pip ", "git ", "llama-cli "
THEIRS = {
    "data_process.py",
    "data_clean/clear.py",
    "sft_data_process.py",
    "eval.py",
    "eval_pretrain.py", "kept.py"}


@functools.cache
def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def chinese(page):
    return page.replace(".md", "_zh.md")


def split(page):
    """A page as (text outside of fenced blocks, list of fenced blocks)."""
    parts = re.split(r"^ *```\w*\n", read(page), flags=re.M)
    return "".join(parts[::2]), parts[1::2]


def commands(page):
    """The lines of all blocks and everything between backticks."""
    prose, fenced = split(page)
    lines = "".join(fenced).replace("\\\n", "").splitlines()
    return lines + re.findall(r"`([^`\n]+)`", prose)


def scripts(line):
    """The paths of the scripts that a line names: pretrain.py, or python -m extras.export."""
    modules = re.findall(r"\bextras\.(\w+)", line)
    files = re.findall(r"([\w/]+)\.py\b", line)
    return [f"extras/{name}.py" for name in modules] + [f"{name}.py" for name in files]


def located(script):
    """Where a script is, which pages may name without its folder; None if there is none."""
    for path in ROOT / script, ROOT / "extras" / script:
        if path.exists():
            return path
    return None


@functools.cache
def constants(path):
    return set(config.constants_of(path))


@functools.cache
def all_constants():
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]:
        found |= constants(path)
    return found


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", split(page)[0], re.M)
    bare = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in bare]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r'(?:\]\(|src=")([^)"\s]+)', split(page)[0])
    inner = [link for link in links if not link.startswith("http")]
    assert len(inner) > 1
    for link in inner:
        path, _, anchor = link.partition("#")
        folder = (ROOT / page).parent
        target = (folder / path).resolve() if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT)), link


@pytest.mark.parametrize("page", PAGES)
def test_every_script_exists_and_has_the_constants_that_it_is_given(page):
    for line in commands(page):
        if line.startswith(OTHER_PROGRAMS):
            continue
        named = [name for name in scripts(line) if name not in THEIRS]
        paths = [located(name) for name in named]
        assert None not in paths, line
        known = constants(paths[0]) if len(paths) == 1 else all_constants()
        options = re.findall(r"--([a-z_]+)(?![\w-])", line)
        assert not set(options) - known - OTHER_OPTIONS, line


@pytest.mark.parametrize("page", ENGLISH)
def test_both_languages_have_the_same_headings_commands_and_figures(page):
    for english, translated in zip(outline(page), outline(chinese(page)), strict=True):
        assert english == translated


def outline(page):
    """What must be equal in both languages: heading levels, blocks, figures of the tables."""
    prose, fenced = split(page)
    without_comments = [re.sub(r"[ \t]*#.*", "", block) for block in fenced]
    ours = draw.TABLE.sub("", prose)                  # the tables of corpora are tested below
    rows = re.findall(r"^\|.*", ours, re.M)
    figures = [sorted(re.findall(r"\d+(?:[,.]\d+)*(?:e-?\d+)?", row)) for row in rows]
    return re.findall(r"^#+", prose, re.M), without_comments, figures


@pytest.mark.parametrize("page", draw.HEADS)
def test_the_tables_of_corpora_are_those_of_the_code(page):
    text = read(f"docs/{page}")
    assert draw.with_tables(page, text) == text, "run python -m extras.draw"
    tables = [name for name, value in vars(corpora).items() if is_table(value)]
    assert len(tables) > 1
    shown = {name for _, name, _, _ in draw.TABLE.findall(text)}
    assert not set(tables) - shown, "a section with <!-- corpora.NAME, ... --> is missing"


def is_table(value):
    return isinstance(value, dict) and isinstance(next(iter(value.values()), None), corpora.Corpus)


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_front_page_is_short(page):
    lines = read(page).splitlines()
    wide = [line for line in lines if columns(line) > 120]
    assert len(lines) <= 200 and not wide


def columns(line):
    """The width of a line in a terminal, where a Chinese character takes two columns."""
    wide = [unicodedata.east_asian_width(character) in "WF" for character in line]
    return len(line) + sum(wide)
