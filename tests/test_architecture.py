"""Tests of the architecture: import directions, file lengths, a documentation page for every method, the source tree.

The layers are listed in pyproject.toml (tool.importlinter), where `make lint` reads them too.
"""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import understudy

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "understudy"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MATHEMATICS = ("batch", "step", "scores", "divergences", "fused_linear")
LINES_PER_FILE, LINES_PER_FUNCTION, ENTRIES = 300, 60, 35


def instances(folder: str) -> list[str]:
    """The names of what lies in one of the plural folders, as a recipe spells them."""
    return sorted(path.stem for path in (PACKAGE / folder).glob("[!_]*.py"))


def tracked_texts() -> dict[str, str]:
    """The text of every file under version control; data and binaries are left out."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".json", ".jsonl"}:
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return texts


def mentions(pattern: str) -> list[str]:
    """`file:line: text` of every line under version control that `pattern` matches."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line)
    ]


def test_imports_point_downwards_and_siblings_stay_apart():
    """In a process of its own, because the linter reconfigures logging."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_mathematics_imports_torch_alone():
    graph = grimp.build_graph(
        "understudy", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    allowed = {"torch", "understudy"} | sys.stdlib_module_names
    for module in MATHEMATICS:
        name = f"understudy.{module}"
        for part in {name, *graph.find_descendants(name)}:
            imported = {other.partition(".")[0] for other in graph.find_modules_directly_imported_by(part)}
            assert imported <= allowed, (
                f"{part} imports {sorted(imported - allowed)}; the mathematics needs torch alone"
            )


def test_no_file_is_longer_than_a_reader_can_hold():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_PER_FILE}


def test_no_function_is_longer_than_a_screen():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_PER_FUNCTION}


def test_the_package_s_folder_can_be_read_at_a_glance():
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= ENTRIES


def test_no_file_is_called_utils_or_helpers():
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.stem in drawers]


@pytest.mark.parametrize("method", instances("methods"))
def test_every_method_has_a_page(method):
    assert (ROOT / "docs" / "methods" / f"{method}.md").is_file(), f"write docs/methods/{method}.md"


def test_the_source_tree_in_the_architecture_page_lists_every_module_and_folder():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    modules = [path.name for path in PACKAGE.glob("[!_]*.py")]
    folders = [f"{path.parent.name}/" for path in PACKAGE.glob("[!_]*/__init__.py")]
    missing = [name for name in modules + folders if not re.search(rf"^[├└]── {re.escape(name)}", page, re.MULTILINE)]
    assert not missing, f"the tree of src/understudy in docs/architecture.md lacks {sorted(missing)}"


def test_every_public_name_exists_and_is_listed_once():
    """Their order is ruff's to check (RUF022)."""
    if not hasattr(understudy, "__all__"):
        pytest.skip("understudy lists no public names yet")
    listed = understudy.__all__
    assert len(listed) == len(set(listed))
    assert not [name for name in listed if not hasattr(understudy, name)]
    present = {name for name, value in vars(understudy).items() if not inspect.ismodule(value) and name[0] != "_"}
    assert present <= set(listed)


def test_no_file_knows_the_machine_that_it_was_written_on():
    assert not mentions(r"(?<![\w.~-])/(home|root|Users|work|workspace)/[\w.]")


def test_nothing_is_left_to_do_in_a_comment():
    assert not mentions(r"\b(TO" r"DO|FIX" r"ME)\b")
