"""Run the documentation as a reader would: every command runs or says why not, and every name that it uses exists."""

import ast
import contextlib
import importlib
import io
import re
import tomllib

import documentation
import msgspec
import pytest
import yaml
from documentation import PAGES, ROOT, SHELL, Block, Failure, Reader, blocks, code_spans, commands, prose, words_of

from qwen_jax.cli import _parser
from qwen_jax.training.recipe import Recipe

PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
COMMAND = re.compile(r"^(\$ |qwen-jax |curl |pip3? |python3? |scripts/|docker |kubectl |ray |pytest |git )", re.M)


def name_of(page):
    return str(page.relative_to(ROOT))


def runs(page, marks):
    """Return the blocks of a page that can run and have one of these marks."""
    return [block for block in blocks(page) if block.language in (*SHELL, "python") and block.mark in marks]


def follow(page, marks, folder, cache):
    """Run the blocks of a page with these marks, in order."""
    with Reader(folder, documentation.environment(str(cache))) as reader:
        for block in runs(page, marks):
            try:
                reader.run(block)
            except Failure as failure:
                pytest.fail(str(failure), pytrace=False)


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page, {None})], ids=name_of)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, executable_cache):
    follow(page, {None}, tmp_path, executable_cache)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page, {"slow"})], ids=name_of)
def test_a_page_runs_with_what_takes_long(page, tmp_path, executable_cache):
    follow(page, {None, "slow"}, tmp_path, executable_cache)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page):
    wrong = [f"{block.where}: ```{block.info}: a language, or a language and 'no-run: REASON' or 'slow: REASON'"
             for block in blocks(page) if not block.well_marked]
    wrong += [f"{block.where}: a block with commands must be ```bash, or ```bash no-run: REASON"
              for block in blocks(page) if not block.language and COMMAND.search(block.text)]
    assert not wrong, "\n".join(wrong)


def parse(words):
    """Return the message with which the command line refuses these words, or None if it accepts them."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            _parser().parse_args(words)
        except SystemExit as end:
            return output.getvalue().strip().splitlines()[-1] if end.code else None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_line_parses(page):
    wrong = [f"{block.where}: {command}\n    {refused}"
             for block in blocks(page) if block.language in (*SHELL, "") for command in commands(block)
             if (words := words_of(command)) is not None and (refused := parse(words))]
    for span in code_spans(page):
        if span.startswith("qwen-jax "):
            wrong += [f"{name_of(page)}: `{span}`: {problem}" for problem in unknown(span)]
    assert not wrong, "\n".join(wrong)


def unknown(span):
    """Return what the command line does not know of a command in running text, which may leave arguments out."""
    words = [word.strip("[]") for word in span.split()[1:]]
    parser = _parser()
    while (choices := [action.choices for action in parser._actions if isinstance(action.choices, dict)]) and words:
        if words[0].startswith("-"):
            break
        if words[0] not in choices[0]:
            return [f"there is no command {words[0]}"]
        parser = choices[0][words.pop(0)]
    return [f"there is no {word}" for word in words if word.startswith("--") and
            word.split("=")[0] not in parser._option_string_actions]


def options():
    """Return the options of the command line and of all scripts."""
    names, parsers = set(), [_parser()]
    while parsers:
        parser = parsers.pop()
        names |= set(parser._option_string_actions)
        parsers += [sub for action in parser._actions if isinstance(action.choices, dict)
                    for sub in action.choices.values()]
    for path in (ROOT / "scripts").rglob("*.py"):
        names |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_running_text_exist(page):
    known = options()
    named = {word.split("=")[0] for span in code_spans(page) if span.startswith("--") for word in span.split()[:1]}
    assert not named - known


@pytest.mark.parametrize("block", [block for block in PYTHON if block.mark], ids=lambda block: block.where)
def test_python_that_does_not_run_here_parses_and_its_imports_exist(block: Block):
    tree = compile(block.text, block.where, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("qwen_"):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


FILE = re.compile(r"^(?:python )?((?:scripts|tests|configs|docs|qwen_jax|kernels|engine|model|serving|cluster|parallel"
                  r"|training|evaluation|checkpoint|quantization|sparse_attention|qwen_kernels)/[\w./*-]*\w\.?\w*)\b")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    roots = (ROOT, ROOT / "qwen_jax", ROOT / "kernels", ROOT / "kernels" / "qwen_kernels")
    named = [found[1] for span in code_spans(page) if (found := FILE.match(span))]
    named += [found for block in blocks(page) if block.language in SHELL
              for found in re.findall(r"\bscripts/[\w/]+\.(?:py|sh)\b|\bconfigs/[\w/]+\.\w+", block.text)]
    assert not [name for name in named if not any(any(root.glob(name)) for root in roots)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page):
    named = [span.split("::") for span in code_spans(page) if span.startswith("tests/") and "::" in span]
    assert not [(path, name) for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]


def test_limits_are_those_of_the_code():
    commands_of, = (action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    arguments = commands_of["serve"]._option_string_actions
    rows = re.findall(r"^\| [^|]+ \| ([\d,.]+) \| `([^`]+)` \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for value, name in rows:
        module, _, constant = name.rpartition(".")
        known = getattr(importlib.import_module(f"qwen_jax.{module}"), constant) if module else (
            arguments[name].default)
        assert float(value.replace(",", "")) == known, name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists():
            wrong.append(target)
        elif anchor and anchor not in {anchor_of(title) for title in re.findall(r"^#+ (.*)$", prose(file), re.M)}:
            wrong.append(target)
    assert not wrong


def anchor_of(title):
    """Return the anchor that GitHub makes of a title."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.findall(r"@@|\bTODO\b|\bTBD\b|\bFIXME\b", page.read_text())


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    assert not [name for name in pages if f"({name})" not in index]


def templates():
    """Return every string of the code, one per line, with … for the values that are put into it."""
    def text_of(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text_of(value) or "…" for value in node.values)
        return None

    texts = {text_of(node) for root in ("qwen_jax", "kernels") for path in (ROOT / root).rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text()))}
    return "\n".join(text.replace("\n", " ") for text in texts if text)


def test_messages_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 60
    texts = templates()
    assert not [message for message in messages
                if not re.search("[^\n]*".join(map(re.escape, message.split("…"))), texts)]


def test_metrics_are_those_of_the_server():
    page = (ROOT / "docs" / "operations.md").read_text()
    dashboard = (ROOT / "configs" / "dashboards" / "qwen_jax.json").read_text()
    rules = [rule for block in blocks(ROOT / "docs" / "operations.md") if block.language == "yaml"
             for group in yaml.safe_load(block.text)["groups"] for rule in group["rules"]]
    assert rules and all(rule["alert"] and rule["expr"] and rule["annotations"]["summary"] for rule in rules)
    named = set(re.findall(r"\bqwen_jax_([a-z0-9_]+)\b(?!\.json)", page + dashboard))
    source = "".join(path.read_text() for path in (ROOT / "qwen_jax" / "serving").rglob("*.py"))
    known = set(re.findall(r'"([a-z0-9_]+)"', source)) | {f"device_{name}" for name in re.findall(r'"(\w+)"', source)}
    assert named and not {name for name in named if not known & {name, re.sub("_(total|bucket|sum|count)$", "", name)}}


def test_recipes_have_known_keys(tmp_path):
    whole = {}
    for block in blocks(ROOT / "docs" / "training.md"):
        if block.language == "toml":
            whole = {**whole, **tomllib.loads(block.text)}
            if "distill" in whole:
                whole.pop("lora", None)
            msgspec.convert(whole, Recipe)
    assert whole
