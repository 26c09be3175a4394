"""JSON schemas made ready for llguidance, so that what it writes is valid for other programs too.

It ignores or misreads a few things silently: days that a month does not have every year, numbers
beyond 2^53, and character classes (`generation.patterns`). Here each becomes a schema that it
obeys and that allows no more, or is refused by its name.
"""

import json
import re
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match
from referencing.exceptions import Unresolvable

from gemma_jax.errors import UserError
from gemma_jax.generation.patterns import portable

_EXACT = 2**53  # whole numbers up to here are exact as float64
_YEAR = r"(\d{3}[1-9]|\d{2}[1-9]0|\d[1-9]00|[1-9]000)"
_LEAP = (
    r"(\d{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29"
    rf"|{_YEAR}-(02-(0[1-9]|1\d|2[0-8])|(0[13-9]|1[0-2])-\d\d)"
)
_UTC_SECONDS = r"\d\d:\d\d:[0-5]\d[^tz]*"  # no leap seconds, and capital letters
_FORMATS = {
    "date": f"^({_LEAP})$",
    "time": f"^{_UTC_SECONDS}$",
    "date-time": f"^({_LEAP})T{_UTC_SECONDS}$",
}
_DATA = {"const", "enum", "default", "examples"}  # whose values are no schemas
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_BOUNDS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}


def schema_text(schema: dict[str, Any]) -> str:
    """The schema as llguidance should have it, in JSON.

    Raises:
      UserError: for what is no schema, or asks for what cannot be promised.
    """
    try:
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
        check_schema(schema)
        return json.dumps(_narrowed(schema))
    except UserError:
        raise
    except RecursionError:
        raise UserError("the schema is nested too deeply; mend it.") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"the schema holds what JSON cannot ({error}); mend it.") from None


def check_schema(schema: Any) -> None:
    """Refuses what is no schema of the draft that `$schema` names, 2020-12 by default."""
    kind = _validator(schema)
    error: Any = best_match(kind(kind.META_SCHEMA).iter_errors(schema))
    if error is not None:
        place = "/".join(map(str, error.absolute_path)) or "schema itself"
        raise UserError(
            f"the {place} is {json.dumps(error.instance):.60}, which no schema of "
            f"{kind.META_SCHEMA['$schema']} may have ({error.message:.120}); mend it."
        )


def is_valid(schema: Any, value: Any) -> bool:
    """Whether the schema, which `check_schema` has seen, allows a value of JSON.

    Raises:
      UserError: for a reference that leads nowhere, and a pattern that Python's `re` cannot read.
    """
    try:
        return bool(_validator(schema)(schema).is_valid(value))
    except (Unresolvable, re.error, RecursionError) as error:
        raise UserError(f"the schema cannot be checked here: {error!s:.120}; mend it.") from None


def _validator(schema: Any) -> Any:
    return jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)


def _narrowed(schema: Any) -> Any:
    if not isinstance(schema, dict):  # true or false
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, dict):
            found[name] = {key: _narrowed(part) for key, part in value.items()}
        elif name in ("const", "enum"):
            _check_numbers(name, value)
            found[name] = value
        elif name in _DATA:
            found[name] = value
        elif isinstance(value, list):
            found[name] = [_narrowed(part) for part in value]
        else:  # also what only a reference knows to be a schema
            found[name] = _narrowed(value)
    return _limited(found)


def _limited(schema: dict[str, Any]) -> dict[str, Any]:
    """What the keywords of one schema ask of strings and numbers."""
    if "x-guidance" in schema:
        raise UserError("the schema uses x-guidance, options of another program; leave that out.")
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = portable(pattern, schema=True)
    if isinstance(name := schema.get("format"), str) and name in _FORMATS:
        schema["allOf"] = [*schema.get("allOf", []), {"pattern": _FORMATS[name]}]
    for name, side in _BOUNDS.items():
        value: Any = schema.get(name)
        if not _is_number(value) or abs(value) <= _EXACT:
            continue
        if value * side < 0:
            raise _too_large(name, value)
        schema[name] = side * _EXACT  # a bound that is tighter
    step: Any = schema.get("multipleOf")
    if _is_number(step) and not float(step * 2**16).is_integer():
        raise UserError(
            f"the schema uses multipleOf={step}, and of fractions that are no binary ones programs "
            "disagree what the multiples are; leave that out and check it afterwards."
        )
    return schema


def _check_numbers(name: str, value: Any) -> None:
    """Refuses numbers within a constant that float64 cannot hold."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(name, part)
    elif _is_number(value) and abs(value) > _EXACT:
        raise _too_large(name, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _too_large(name: str, value: float) -> UserError:
    return UserError(
        f"the schema has {value!r:.40} in {name}, beyond 2^53, where not every program is exact; "
        "take a smaller one or a text."
    )
