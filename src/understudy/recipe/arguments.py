"""Check a recipe's fields against the constructor of the class that they are for, and build the instance."""

import copy
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..registry import Registry, UnknownName, is_class, nearest
from .yaml_text import RecipeError


def construct(
    cls: type,
    fields: Mapping[str, Any],
    where: str,
    other_fields: Sequence[str] = (),
    registry: Registry[Any] | None = None,
    **extra: Any,
) -> Any:
    """Build an instance from a recipe's fields.

    Raises:
        RecipeError: as `arguments`, and for what the constructor refuses.
    """
    values = arguments(cls, fields, where, other_fields, registry, **extra)
    try:
        return cls(**values)
    except RecipeError:
        raise
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}", where) from None


def arguments(
    cls: type,
    fields: Mapping[str, Any],
    where: str,
    other_fields: Sequence[str] = (),
    registry: Registry[Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """A recipe's fields as arguments of a constructor, checked against its signature.

    Args:
        where: the fields' place in the recipe, such as `method.gkd`; for errors.
        other_fields: names of fields that are not for this constructor, and are left out.
        registry: of the class itself, for constructors that take further instances of its kind by name.
        extra: arguments that are not fields of a recipe, such as a method's reward.

    Raises:
        RecipeError: for an unknown field, a missing one or one of the wrong type.
    """
    parameters = inspect.signature(cls).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    settable = [n for n in named if n not in extra and not n.startswith("_")]
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError as error:
        message = f"{where}: an annotation of its constructor cannot be read: {error}; import that name at run time"
        raise RecipeError(message, where) from None
    for name in extra:
        if name not in named and not open_ended:
            raise RecipeError(f"{where} takes no {name}", where)
    values = dict(extra)
    for name, value in fields.items():
        if name in other_fields:
            continue
        if name not in settable and (not open_ended or name in named):
            hint = nearest(str(name), [*settable, *other_fields])
            raise RecipeError(f'{where} has no field "{name}"{hint}', f"{where}.{name}")
        values[name] = _convert_field(copy.deepcopy(value), hints.get(name, Any), f"{where}.{name}", registry)
    missing = [n for n, p in named.items() if p.default is p.empty and n not in values]
    if missing:
        raise RecipeError(f'{where} needs "{missing[0]}": add {where}.{missing[0]}', where)
    return values


def _convert_field(value: Any, hint: Any, where: str, registry: Registry[Any] | None) -> Any:
    """As `convert`; divergences are constructed by name, and so are several instances of the registry's class, each by
    a name of its own; where Python takes a model a recipe has its name.
    """
    from ..divergences import Divergence

    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if any(is_class(option) and issubclass(option, Divergence) for option in options):
        if value is None and type(None) in options:
            return None
        return _construct_by_name(value, Registry("divergence", Divergence.__module__, Divergence), where)
    if registry is not None and hint == Mapping[str, registry.base]:
        if not isinstance(value, Mapping):
            noun = registry.noun
            raise RecipeError(f"{where} has a {noun} for each name, written as `name: {{{noun}: {{…}}}}`", where)
        return {str(name): _construct_by_name(each, registry, f"{where}.{name}") for name, each in value.items()}
    if str in options and any(isinstance(o, type) and o.__module__ != "builtins" for o in options):
        hint = str | None if type(None) in options else str
    return convert(value, hint, where)


def _construct_by_name(value: Any, registry: Registry[Any], where: str) -> Any:
    """The instance that `reverse_kl` or `{jensen_shannon: {beta: 0.9}}` describes."""
    try:
        name, fields = name_and_fields(value)
        cls = registry.get(name)
    except UnknownName as error:
        raise RecipeError(f"{where}: {error}", where) from error
    except ValueError as error:
        raise RecipeError(f"{where}: {error}", where) from None
    return construct(cls, fields, f"{where}.{name}", registry=registry)


def convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the type that `hint` asks for.

    Raises:
        RecipeError: if it cannot be one, with the place `where`.
    """
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise RecipeError(f"{where}: {message[:1].lower()}{message[1:]}, not {value!r}", where) from None


def name_and_fields(value: Any) -> tuple[str, dict[str, Any]]:
    """`name` or `{name: {fields}}` as (name, fields)."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, tuple):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        [(name, fields)] = value.items()
        if fields is None or isinstance(fields, Mapping):
            return str(name), dict(fields or {})
    raise ValueError("write one name, or one name with its fields: `gkd` or `gkd: {on_policy: 0.5}`")
