"""Classes by name: those of the package, of a module in the working directory, and of entry points."""

import re
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from understudy.divergences import Divergence
from understudy.methods import METHODS
from understudy.metrics import METRICS
from understudy.registry import Registry, UnknownName, did_you_mean, import_object, nearest
from understudy.rollouts import ROLLOUTS
from understudy.teachers import TEACHERS

DIVERGENCES = Registry("divergence", "understudy.divergences", Divergence)
REGISTRIES = [METHODS, TEACHERS, ROLLOUTS, METRICS, DIVERGENCES]


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """A registry of a package with two modules and a private one."""
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


def test_the_class_of_a_file_is_the_one_that_it_defines(animals):
    assert animals.get("cat").__name__ == "Cat"


def test_a_package_that_is_not_installed_is_named_in_the_error(animals):
    with pytest.raises(ImportError, match="not installed"):
        animals.get("dog")


@pytest.mark.parametrize("name", ["_shared", "__init__", "cat.py", "", "Cat"])
def test_a_name_that_is_no_public_file_is_unknown(animals, name):
    with pytest.raises(UnknownName, match="there is no animal"):
        animals.get(name)


def test_an_error_about_an_unknown_name_has_the_nearest_one_or_all(animals):
    with pytest.raises(UnknownName, match=r'^there is no animal "catt"; did you mean "cat"\?$'):
        animals.get("catt")
    with pytest.raises(UnknownName, match=r'^there is no animal "elephant"; there are: cat, dog$'):
        animals.get("elephant")


def test_the_end_of_a_sentence_about_an_unknown_name():
    assert did_you_mean("learning_rte", ["learning_rate", "seed"]) == '; did you mean "learning_rate"?'
    assert did_you_mean("x", ["learning_rate", "seed"]) == ""
    assert nearest("x", {"b", "a"}) == "; there are: a, b"
    assert nearest("x", ["a"]) == "; there is: a"


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.noun)
def test_every_builtin_class_is_a_subclass_of_its_base(registry):
    assert registry.builtin_names()
    for name in registry.builtin_names():
        assert issubclass(registry.get(name), registry.base)


def test_a_registry_of_one_module_names_its_classes_in_snake_case():
    assert DIVERGENCES.get("jensen_shannon").__name__ == "JensenShannon"
    assert DIVERGENCES.get("forward_kl").__name__ == "ForwardKL"
    with pytest.raises(UnknownName, match='there is no divergence "divergence"'):
        DIVERGENCES.get("divergence")


# Classes of one's own


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the working directory; it is forgotten when the test ends."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(text, name="module_of_a_test"):
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return name

    yield write
    for name, imported in list(sys.modules.items()):
        if name not in before and str(getattr(imported, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def subclass_of(base):
    """Source code of a subclass that defines whatever is abstract."""
    methods = "".join(f"    def {name}(self, *arguments): ...\n" for name in sorted(base.__abstractmethods__))
    return f"from {base.__module__} import {base.__name__}\nclass Mine({base.__name__}):\n{methods}"


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.noun)
def test_a_class_in_the_working_directory_is_named_by_module_and_class(registry, module):
    name = module(subclass_of(registry.base))
    path = list(sys.path)
    mine = registry.get(f"{name}:Mine")
    assert issubclass(mine, registry.base)
    assert mine.__module__ == name
    assert registry.get(f"{name}:Mine") is mine
    assert sys.path == path


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.noun)
def test_a_class_that_cannot_be_used_is_refused_in_one_sentence(registry, module):
    base = f"{registry.base.__module__}.{registry.base.__name__}"
    name = module(f"import {registry.base.__module__}\nclass Odd: ...\nclass Bare({base}): ...\nnumber = 1\n")
    missing = " and ".join(sorted(registry.base.__abstractmethods__))
    errors = {
        f"{name}:Odd": f"the {registry.noun} {name}:Odd is not a subclass of {base}: derive it from that class",
        f"{name}:number": f"the {registry.noun} {name}:number is not a subclass of {base}: derive it from that class",
        f"{name}:Bare": f"the {registry.noun} {name}:Bare is abstract: define {missing}, as {base} asks for",
        f"{name}:Bear": f'the module {name} has no class "Bear"; did you mean "Bare"?',
        f"{name}:": f'a {registry.noun} is written module:class, not "{name}:"',
    }
    for key, error in errors.items():
        with pytest.raises(UnknownName, match=f"^{re.escape(error)}$"):
            registry.get(key)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("module_of_a_tset:Mine", 'there is no module "module_of_a_tset" in .*; did you mean "module_of_a_test"'),
        ("nowhere.at.all:Mine", 'there is no module "nowhere" in .* or among the installed ones$'),
        ("wanting:Mine", "the method wanting:Mine cannot be imported: No module named 'nothing_of_that_name'$"),
        ("misspelt:Mine", r"cannot be imported: SyntaxError: invalid syntax \(misspelt.py, line 1\)$"),
        ("failing:Mine", "cannot be imported: ZeroDivisionError: division by zero$"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_the_reason(name, error, module):
    module("")
    module("import nothing_of_that_name\n", "wanting")
    module("x = = 1\n", "misspelt")
    module("1 / 0\n", "failing")
    with pytest.raises(UnknownName, match=error):
        METHODS.get(name)


def test_a_module_may_lie_in_a_package_and_import_its_neighbours(module):
    module("", "package_of_a_test.__init__")
    module("NAME = 'neighbour'\n", "package_of_a_test.other")
    name = module("from .other import NAME\ndef name(): return NAME\n", "package_of_a_test.mine")
    assert import_object(f"{name}:name", "thing", "function")() == "neighbour"


# Classes of other packages


@pytest.fixture
def entry_points(monkeypatch):
    """Pretend that a package is installed that offers these classes: name → module:Class, in one group."""

    def install(group, **offers):
        installed = EntryPoints(EntryPoint(name, value, group) for name, value in offers.items())
        monkeypatch.setattr("importlib.metadata.entry_points", lambda **query: installed.select(**query))

    return install


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.noun)
def test_an_entry_point_of_an_installed_package_is_a_name(registry, module, entry_points):
    entry_points(f"understudy.{registry.noun}s", another=f"{module(subclass_of(registry.base))}:Mine")
    assert "another" in registry.names()
    assert "another" not in registry.builtin_names()
    assert "module_of_a_test" not in sys.modules
    assert issubclass(registry.get("another"), registry.base)
    with pytest.raises(UnknownName, match='did you mean "another"'):
        registry.get("anothr")


def test_an_entry_point_of_a_broken_package_says_which(entry_points):
    entry_points("understudy.methods", another="not_installed.methods:Another")
    with pytest.raises(UnknownName, match=r"the method not_installed\.methods:Another cannot be imported"):
        METHODS.get("another")


def test_a_builtin_name_takes_precedence_over_an_entry_point_with_a_warning(entry_points, caplog):
    entry_points("understudy.methods", gkd="other_package.methods:GKD")
    assert METHODS.get("gkd").__module__ == "understudy.methods.gkd"
    assert "the entry point other_package.methods:GKD of that name is not used" in caplog.text
    assert METHODS.names().count("gkd") == 1
