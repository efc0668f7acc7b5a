"""YAML 1.1 as recipes use it: safe types, a bounded size, keys that are texts and appear once, and their lines.

Aliases multiply what a text holds, so the nodes are counted before anything is built from them.
"""

import math
import re
from typing import Any

import yaml

LARGEST_FILE = 100_000  # bytes
_MOST_NODES, _DEEPEST = 10_000, 20  # with every alias in place of its anchor
_LARGEST_INTEGER = 2**53  # beyond, a number has no exact float

_FLOAT, _TIME = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-5 is a number and not a text, and 2024-01-31 a text and not a date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIME]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


class RefusedYAML(yaml.MarkedYAMLError):
    """Valid YAML that is refused: too large, too deep, with keys that are no texts, or with meaningless numbers."""


def read_yaml(text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The content, and the line of every key, counted from 1.

    Raises:
        RefusedYAML: for a key that appears twice or is no text; a block that contains itself; too many or too deep
            blocks; a number that is not finite or too large.
        yaml.YAMLError: for a text that is not YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines = _Visit(loader).lines(node)
        return loader.construct_document(node), lines
    except RecursionError:
        raise RefusedYAML(problem=f"blocks are nested more than {_DEEPEST} deep") from None
    except yaml.YAMLError:
        raise
    except Exception as error:  # a block that does not fit its tag fails in many ways
        raise RefusedYAML(problem=f"a block cannot be read: {str(error) or type(error).__name__:.80}") from None
    finally:
        loader.dispose()


class _Visit:
    """Walks over the nodes of a text, aliases included, checks them and notes the line of every key."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._lines: dict[tuple[str, ...], int] = {}
        self._count = 0

    def lines(self, node: Any) -> dict[tuple[str, ...], int]:
        self._visit(node, (), ())
        return self._lines

    def _visit(self, node: Any, path: tuple[str, ...], above: tuple[Any, ...]) -> None:
        self._count += 1
        if self._count > _MOST_NODES:
            raise _error(f"this holds more than {_MOST_NODES:,} values, aliases included; a recipe is short", node)
        if len(above) > _DEEPEST:
            raise _error(f"blocks are nested more than {_DEEPEST} deep", node)
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                _refuse_circle(item, (*above, node), node)
                self._visit(item, path, (*above, node))
        if isinstance(node, yaml.MappingNode):
            own: dict[str, int] = {}
            for key, value in node.value:
                name = _key(key, len(path))
                if name in own:
                    raise _error(f'the key "{name}" is set twice, first in line {own[name]}; keep one', key)
                own[name] = key.start_mark.line + 1
                self._lines[(*path, name)] = own[name]
                _refuse_circle(value, (*above, node), key)
                self._visit(value, (*path, name), (*above, node))

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        """Refuse what cannot be read as its type, and numbers that no field of a recipe can mean."""
        try:
            value = self._loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # such as a number of 5,000 digits, or !!timestamp x
            message = f"{node.value!r:.40} cannot be read: {str(error) or type(error).__name__:.80}"
            raise _error(message, node) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(f"{node.value} is not a finite number", node)
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            raise _error(f"{node.value:.40} is too large a number", node)


def _refuse_circle(node: Any, above: tuple[Any, ...], place: Any) -> None:
    if any(node is other for other in above):
        raise _error("a block contains itself; remove the alias", place)


def _key(node: Any, depth: int) -> str:
    """The name of a key; numbers may be keys only deep inside, such as in `max_memory: {0: 10GiB}`."""
    if not isinstance(node, yaml.ScalarNode):
        raise _error("a key is a word, not a list or a mapping", node)
    kind = node.tag.rpartition(":")[2]
    if kind not in ("str", "merge") and (kind != "int" or depth < 3):
        raise _error(f"{node.value[:40]}: keys should be strings", node)
    return str(node.value)


def _error(problem: str, node: Any) -> RefusedYAML:
    return RefusedYAML(problem=problem, problem_mark=node.start_mark)
