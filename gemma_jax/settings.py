"""Settings are frozen dataclasses; here they are changed by path, checked and written down."""

import ast
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from gemma_jax.errors import UserError


def override[T](settings: T, changes: Mapping[str, Any]) -> T:
    """`settings` with each dotted path set to its value; types are checked.

    `override(experiment, {"model.attn_pattern": "LG", "optimizer.learning_rate": 3e-4})`. An
    unknown path names the settings that exist there.
    """
    return _override(settings, changes, "")


def _override(
    settings: Any, changes: Mapping[str, Any], prefix: str, others: Sequence[type] = ()
) -> Any:
    """All changes of one level at once, so that settings which must fit each other may change
    together. `others` are the classes that `settings` could be of instead."""
    known = _fields(settings)
    is_mapping = isinstance(settings, dict)
    values: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        where = prefix + name
        if name not in (settings if is_mapping else known):
            here = f"in {type(settings).__name__} " if known else ""
            names = ", ".join(settings if is_mapping else known)
            there = f"; there are: {names}" if names else ""
            for other in others:
                if name in typing.get_type_hints(other):
                    example = _example(prefix[:-1], other, name)
                    there += f"; {other.__name__} has it: {example or other.__name__}"
            raise UserError(f"there is no setting '{name}' {here}at '{prefix}{path}'{there}.")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            values[name] = value if is_mapping else _checked(value, known[name], where)
    for name, nested in inner.items():
        base = values.get(name, settings[name] if is_mapping else getattr(settings, name))
        classes = [] if is_mapping else _classes(known[name])
        values[name] = _override(base, nested, f"{prefix}{name}.", classes)
    if is_mapping:
        return settings | values
    try:
        return dataclasses.replace(settings, **values)
    except UserError as error:  # names the class; who set a path knows it by that
        raise UserError(str(error).replace(f"{type(settings).__name__}.", prefix)) from error


def _fields(settings: Any) -> dict[str, Any]:
    kind: Any = type(settings)
    return _hints(kind) if dataclasses.is_dataclass(settings) else {}


def checked_fields(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` for the fields of a settings class, each of its annotated type."""
    return {name: _checked(value, _hints(kind)[name], name) for name, value in values.items()}


def check_types(settings: Any) -> None:
    """For the `__post_init__` of a settings class: refuses a field that is not of its annotated
    type, and makes floats of whole numbers and tuples of lists where those are wanted."""
    kind: Any = type(settings)
    for name, wanted in _hints(kind).items():
        value = getattr(settings, name)
        found = _checked(value, wanted, f"{kind.__name__}.{name}")
        if found is not value:
            object.__setattr__(settings, name, found)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _checked(value: Any, wanted: Any, path: str) -> Any:
    """`value` if it is of the annotated type (an int where a float is wanted becomes one)."""
    fits, converted = _fit(value, wanted)
    if not fits:
        meant = value.get("type") if isinstance(value, dict) else str(value).partition("(")[0]
        classes = sorted(_classes(wanted), key=lambda kind: kind.__name__ != meant)
        examples = [text for kind in classes if (text := _example(path, kind))]
        such_as = f", such as {examples[0]}" if examples else ""
        raise UserError(
            f"{path}={value!r} is of the wrong type; it must be {_spell(wanted)}{such_as}."
        )
    return converted


def _classes(wanted: Any) -> list[type]:
    """The settings classes among what an annotation allows."""
    while isinstance(wanted, typing.TypeAliasType):
        wanted = wanted.__value__
    is_union = typing.get_origin(wanted) in (Union, types.UnionType)
    options = typing.get_args(wanted) if is_union else (wanted,)
    return [one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)]


def _example(path: str, kind: type, name: str | None = None) -> str | None:
    """How a setting is made of a class on the command line, quoted for the shell: with the field
    `name`, or what the class needs, or its first field; None where that is no short text."""
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    shown = [name] if name else list(_needed(kind)) or list(fields)[:1]
    hints = typing.get_type_hints(kind)
    texts = []
    for field in shown:
        value = "sh/t1" if fields[field] is dataclasses.MISSING else fields[field]
        if not _fit(value, hints[field])[0]:
            return None
        texts.append(f"{field}={json.dumps(value) if isinstance(value, str) else repr(value)}")
    return f"'{path}={kind.__name__}({', '.join(texts)})'"


def _needed(kind: Any) -> list[str]:
    fields = dataclasses.fields(kind)
    return [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]


def _fit(value: Any, wanted: Any) -> tuple[bool, Any]:
    while isinstance(wanted, typing.TypeAliasType):
        wanted = wanted.__value__
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        exact = [x for x in arguments if isinstance(x, type) and type(value) is x]
        fits = (_fit(value, option) for option in (*exact, *arguments))
        return next((fit for fit in fits if fit[0]), (False, value))
    if origin is Literal:
        return value in arguments, value
    if origin is tuple and isinstance(value, (tuple, list)):
        each = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        pairs = [_fit(x, y) for x, y in zip(value, each, strict=False)]
        fits_all = len(each) == len(value) and all(ok for ok, _ in pairs)
        return fits_all, tuple(x for _, x in pairs)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if wanted is Any:
        return True, value
    if wanted in (int, float) and isinstance(value, bool):
        return False, value
    kind = origin or wanted
    return isinstance(kind, type) and isinstance(value, kind), value


def _spell(wanted: Any) -> str:
    while isinstance(wanted, typing.TypeAliasType):
        wanted = wanted.__value__
    if typing.get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(wanted))
    if wanted is types.NoneType:
        return "None"
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)


def parse_assignments(texts: list[str], known: Mapping[str, type]) -> dict[str, Any]:
    """`["model.attn_pattern=LG", "optimizer=Muon(learning_rate=1e-3)"]` as a dict of values.

    A value is a Python literal, a call of one of the `known` settings classes, or else plain text.
    """
    changes = {}
    for text in texts:
        path, separator, value = text.partition("=")
        if not separator or not path.strip():
            raise UserError(f"'{text}' is not of the form path=value.")
        changes[path.strip()] = parse_value(value.strip(), known)
    return changes


def parse_value(text: str, known: Mapping[str, type]) -> Any:
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return text
    if isinstance(node, (ast.Call, ast.Tuple, ast.List, ast.Dict)) and any(
        isinstance(inner, ast.Call) for inner in ast.walk(node)
    ):
        return _construct(node, text, known)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: what is no key of a dict
        return text


def _construct(node: ast.expr, text: str, known: Mapping[str, type]) -> Any:
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_construct(inner, text, known) for inner in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        inside = [_construct(inner, text, known) for inner in node.values]
        return dict(zip(keys, inside, strict=True))
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            given = ast.get_source_segment(text, node)
            raise UserError(f"{given} in '{text}' must be in quotes: \"{given}\".") from None
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in known or node.args:
        raise UserError(
            f"'{text}' must name one of {', '.join(sorted(known))}, with settings as name=value."
        )
    kind = known[name]
    hints = _hints(kind)
    try:
        values = {str(k.arg): _construct(k.value, text, known) for k in node.keywords}
        for field, value in values.items():
            if field not in hints:
                raise UserError(
                    f"'{text}' sets '{field}', which {name} does not have; it has: "
                    f"{', '.join(hints)}."
                )
            values[field] = _checked(value, hints[field], f"{name}.{field}")
        if missing := [field for field in _needed(kind) if field not in values]:
            raise UserError(f"'{text}' must say {missing[0]}, as in {name}({missing[0]}=...).")
        return kind(**values)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{text}' cannot be made: {error}.") from None


def to_json(settings: Any) -> Any:
    """Settings as plain JSON values; each dataclass says its type."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        values = {f.name: to_json(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
        return {"type": type(settings).__name__, **values}
    if isinstance(settings, Mapping):
        return {str(key): to_json(value) for key, value in settings.items()}
    if isinstance(settings, (tuple, list)):
        return [to_json(value) for value in settings]
    if callable(settings):
        return f"function {getattr(settings, '__qualname__', type(settings).__name__)}"
    return settings


def differences(ours: Any, theirs: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, our value, their value) wherever settings differ from a `to_json` tree of others.

    A field that is missing there has its default: the tree may be older than the field.
    """
    if dataclasses.is_dataclass(ours) and not isinstance(ours, type):
        kind = type(ours)
        if isinstance(theirs, dict) and theirs.get("type") == kind.__name__:
            theirs = _defaults(kind) | theirs
        names = [field.name for field in dataclasses.fields(ours)]
        ours = {"type": kind.__name__, **{name: getattr(ours, name) for name in names}}
    if isinstance(ours, Mapping) and isinstance(theirs, dict):
        found = []
        for key in sorted(ours.keys() | theirs.keys()):
            inner = f"{path}.{key}" if path else key
            found += differences(ours.get(key), theirs.get(key), inner)
        return found
    ours = to_json(ours)
    return [] if ours == theirs else [(path, ours, theirs)]


def _defaults(kind: Any) -> dict[str, Any]:
    """The defaults of a settings class, as `to_json` writes them."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            found[field.name] = to_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = to_json(field.default_factory())
    return found
