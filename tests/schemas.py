"""Random JSON schemas of all the kinds that can be obeyed."""

import random
from typing import Any

_PATTERNS = (r"^[A-Z]{2,4}-\d{3}$", r"^(red|green|blue)( dark)?$", r"^\w+@\w+\.(com|org)$", "^a*b$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
_NAMES = ("id", "name", "größe", "a b", "x-y", 'quo"te', "tags", "next", "value", "note")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema that at least one value meets."""
    leaves = [_string, _integer, _number, _choice, _simple]
    kinds = leaves if depth == 0 else [*leaves, _object, _object, _array, _any_of, _recursive]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    least = rng.randrange(6)
    limits = {"minLength": least, "maxLength": least + rng.randrange(20)} if kind == 2 else {}
    return {"type": "string", **limits}


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randrange(-1000, 1000)
    return {
        "type": "integer",
        rng.choice(["minimum", "exclusiveMinimum"]): low,
        rng.choice(["maximum", "exclusiveMaximum"]): low + 2 + rng.randrange(500),
    }


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "number", "minimum": rng.uniform(-10, 0), "maximum": rng.uniform(0.5, 1e4)}


def _choice(rng: random.Random, _: int) -> dict[str, Any]:
    values = ["yes", "no", "ünsure", 1, 2.5, None, True, ["x", 1], {"k": "v"}]
    if rng.random() < 0.3:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _simple(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"]])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randrange(1, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
    }
    if rng.random() < 0.6:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = random_schema(rng, 0)
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(3)
    if rng.random() < 0.3:
        parts = [random_schema(rng, depth) for _ in range(rng.randrange(1, 4))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    most = {"maxItems": least + rng.randrange(4)} if rng.random() < 0.7 else {}
    return {"type": "array", "items": random_schema(rng, depth), "minItems": least, **most}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth) for _ in range(rng.randrange(2, 4))]}


def _recursive(rng: random.Random, depth: int) -> dict[str, Any]:
    node = {
        "type": "object",
        "properties": {
            "value": random_schema(rng, 0),
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    # References are to the root, so only a whole schema may be of this kind.
    whole = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    return whole if depth == 2 else random_schema(rng, 0)
