"""The documentation, docstrings and messages use plain technical English: tests/helpers/words.py lists what they avoid."""

import ast
import re
from pathlib import Path

import pytest

import seqlen_curriculum
from tests.helpers.words import FIRST_WORDS, awkward_words

PACKAGE = Path(seqlen_curriculum.__file__).parent
REPOSITORY = PACKAGE.parent
TO_BE_REWORDED: set[str] = set()
"""Rooms, modules and pages that are not checked yet."""


def modules():
    paths = sorted(PACKAGE.rglob("*.py"))
    return [path for path in paths if not {*path.relative_to(PACKAGE).parent.parts, path.stem} & TO_BE_REWORDED]


def pages():
    paths = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [path for path in paths if path.stem not in TO_BE_REWORDED]


def texts(tree):
    """Yield (line, text) of each string of several words: docstrings, messages and help texts; {} is a placeholder."""
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            text = node.value
        else:
            continue
        if text.count(" ") > 1:
            yield node.lineno, text


def docstrings(tree):
    """Yield (line, text) of each docstring, also of the fields of classes."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.lineno, str(statement.value.value)


def functions(tree):
    """Yield (line, docstring) of each function that is not a property."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and not is_property(node):
            yield node.lineno, text


def is_property(function):
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def paragraphs(page):
    """Yield the paragraphs, list items and table rows of a Markdown page, without its code."""
    prose = re.sub(r"^( *)```.*?^\1```", "", page, flags=re.DOTALL | re.MULTILINE)
    yield from re.split(r"\n\s*\n|\n(?=\s*[-*|] )", re.sub(r"`[^`\n]*`", "`code`", prose))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_package_is_in_plain_english(path):
    tree = ast.parse(path.read_text())
    found = [f"line {line}: {problem}" for line, text in texts(tree) for problem in awkward_words(text)]
    found += [
        f"line {line}: a docstring starts with {text.split()[0]!r}"
        for line, text in docstrings(tree)
        if text.split()[0] in FIRST_WORDS
    ]
    found += [
        f"line {line}: the docstring of a function starts with {text.split()[0]!r}, not with a verb"
        for line, text in functions(tree)
        if text.split()[0] in {"A", "An", "The"} or not text[0].isupper()
    ]
    assert not found, f"{path}:\n" + "\n".join(found)


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_page_is_in_plain_english(path):
    found = [problem for paragraph in paragraphs(path.read_text()) for problem in awkward_words(paragraph)]
    assert not found, f"{path}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("Rerun it: it goes on where it was.", "goes on where"),
        ("The log is equal to the uninterrupted one's.", "equal to the uninterrupted one's"),
        ("The log tells what was read.", "tells"),
        ("It writes a PNG a plot.", "PNG a plot"),
        ("A seed of -1 is no seed.", "is no seed"),
        ("It is allowed and\n    warned of.", "is allowed and warned of"),
    ],
)
def test_awkward_phrase_is_found(text, phrase):
    assert any(problem.startswith(repr(phrase)) for problem in awkward_words(text))


@pytest.mark.parametrize("text", ["There is no checkpoint.", "A row of a document is read.", "It is no longer than 8."])
def test_plain_sentence_passes(text):
    assert not awkward_words(text)


def test_texts_and_docstrings_are_collected():
    tree = ast.parse(
        '"""First line."""\nclass A:\n    x: int\n    """A field."""\nraise E(f"key: {x} is bad; give {y}")'
    )
    assert [text for _, text in docstrings(tree)] == ["First line.", "A field."]
    assert "key: {} is bad; give {}" in [text for _, text in texts(tree)]


def test_code_on_pages_is_left_out():
    page = "Prose `tells`.\n\n```bash\necho tells\n```\n\n- first\n- second tells\n"
    assert [problem for paragraph in paragraphs(page) for problem in awkward_words(paragraph)] == [
        "'tells': write 'reports, lists, warns; message'"
    ]
