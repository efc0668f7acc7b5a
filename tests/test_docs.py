"""Tests of the documentation: links and anchors exist, recipes can be read, Python imports names that exist.

docs/data.md is executed by tests/data, the commands of docs/papers.md by tests/test_recipes.py.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from folders import llama
from loop import logged, trainer

from understudy import Batch, Example, LocalTeacher
from understudy.methods import METHODS
from understudy.recipe import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def imports(code: str) -> list[tuple[str, str]]:
    """(module, name) of every `from understudy… import name`."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return [(node.module or "", a.name) for node in nodes if "understudy" in (node.module or "") for a in node.names]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in [link for link in links if not re.match(r"https?:", link)]:
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {link}, and there is no such heading"


def test_every_page_is_reached_from_the_index():
    reached, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", prose(page))]
        waiting += [path for t in targets if (path := (page.parent / t).resolve()).exists() and path not in reached]
    missing = [name for path, name in zip(PAGES, NAMES, strict=True) if name.startswith("docs") and path not in reached]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_recipe_in_the_documentation_can_be_read(page):
    for text in blocks(page, "yaml"):
        content = yaml.safe_load(text)
        if isinstance(content, dict) and {"student", "method", "data"} <= content.keys():
            recipe = parse(content, str(page))
            if ":" not in recipe.method[0]:  # a class of the reader's own
                recipe.check("method", METHODS)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_name_that_the_documentation_imports_exists(page):
    code = [text for text in blocks(page, "python") if ">>>" not in text]
    for module, name in [names for text in code for names in imports(text)]:
        assert hasattr(importlib.import_module(module), name), f"{page.name} imports {name} from {module}"


def test_the_classes_of_the_page_about_extending_work(tmp_path):
    """Method and rollout train together, the teacher scores, the divergence has its gradient, the metric counts."""
    namespace = {"__name__": "extend"}
    for code in blocks(ROOT / "docs" / "extend.md", "python"):
        exec(code, namespace)
    run = trainer(tmp_path, namespace["OnPolicyWithLabels"](), rollout=namespace["Repeat"](2), max_steps=2)
    run.train()
    assert len(logged(run)) == 2
    models = [llama(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    batch = Batch.from_examples([Example([4, 5], [6, 7, 2])], pad=0)
    mean = sum(LocalTeacher(str(model)).score(batch).log_probs.exp() for model in models) / 2
    torch.testing.assert_close(namespace["Ensemble"](list(map(str, models))).score(batch).log_probs.exp(), mean)
    log_p = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    log_q = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: namespace["Hellinger"]()(log_p, q), log_q)
    (by_hand,) = torch.autograd.grad(((log_p.exp().sqrt() - log_q.exp().sqrt()) ** 2).sum(), log_q)
    torch.testing.assert_close(namespace["Hellinger"]().grad_log_q(log_p, log_q), by_hand)
    assert namespace["Length"]().score(["a b", "c"], [["x"], ["y"]])["words"].value == 1.5
    assert namespace["is_short"](["p"], ["short"], [{}]) == [1.0]
