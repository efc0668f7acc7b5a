"""Instances are found by their file's name, and unknown names are answered with the nearest."""

import dataclasses
import sys

import pytest

from understudy.method import Method
from understudy.methods import METHODS, describe
from understudy.registry import Registry, UnknownName, did_you_mean, nearest
from understudy.rollouts import ROLLOUTS
from understudy.teachers import TEACHERS


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """A package with two modules and a private one."""
    folder = tmp_path / "animals_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("class Animal: ...\n")
    (folder / "cat.py").write_text("from . import Animal\nclass Other: ...\nclass Cat(Animal): ...\n")
    (folder / "dog.py").write_text("raise ImportError('a dog that is not installed')\n")
    (folder / "_shared.py").write_text("")
    (folder / "notes.txt").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import animals_of_a_test

    yield Registry("animal", "animals_of_a_test", animals_of_a_test.Animal)
    for name in [name for name in sys.modules if name.startswith("animals_of_a_test")]:
        del sys.modules[name]


def test_names_are_files_without_private_ones_and_import_nothing(animals):
    assert animals.names() == ["cat", "dog"]
    assert "animals_of_a_test.cat" not in sys.modules


def test_the_class_of_a_file_is_the_one_that_it_defines_itself(animals):
    assert animals.get("cat").__name__ == "Cat"


def test_what_is_not_installed_says_so_when_asked_for(animals):
    with pytest.raises(ImportError, match="not installed"):
        animals.get("dog")


@pytest.mark.parametrize("name", ["_shared", "__init__", "cat.py", "", "Cat"])
def test_a_name_that_is_no_public_file_is_unknown(animals, name):
    with pytest.raises(UnknownName, match="there is no animal"):
        animals.get(name)


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(animals):
    with pytest.raises(UnknownName, match=r'^there is no animal "catt"; did you mean "cat"\?$'):
        animals.get("catt")
    with pytest.raises(UnknownName, match=r'^there is no animal "elephant"; there are: cat, dog$'):
        animals.get("elephant")


def test_the_end_of_a_sentence_about_an_unknown_name():
    assert did_you_mean("learning_rte", ["learning_rate", "seed"]) == '; did you mean "learning_rate"?'
    assert did_you_mean("x", ["learning_rate", "seed"]) == ""
    assert nearest("x", {"b", "a"}) == "; there are: a, b"
    assert nearest("x", ["a"]) == "; there is: a"


@pytest.mark.parametrize("registry", [METHODS, TEACHERS, ROLLOUTS], ids=lambda registry: registry.noun)
def test_every_instance_is_found_and_is_of_its_kind(registry):
    assert registry.names()
    for name in registry.names():
        assert issubclass(registry.get(name), registry.base)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_is_described_with_its_paper_and_every_option(name):
    text = describe(name)
    method = METHODS.get(name)
    assert text.startswith(f"{name}: ")
    assert method.paper in text
    for field in (field.name for field in dataclasses.fields(method)):
        assert f"  {field} = " in text
    assert issubclass(method, Method)
