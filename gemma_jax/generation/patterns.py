"""Regular expressions that mean the same to everybody who checks a text.

A matcher built on Rust's `regex` crate, Python's `re` and ECMAScript, whose dialect JSON Schema
names, differ in what \\w, \\d, \\s, a dot and their opposites take in beyond ASCII. What is written
under `portable(pattern)` matches `pattern` for all of them: each class becomes the characters that
they agree on, and inside of a negated class those that any of them takes in.
"""

from gemma_jax.errors import UserError

# (class, in a negated class) by escape. To a JSON schema \w and \d are ASCII.
_SCHEMA = {
    "w": (r"\w", r"\w\p{L}\p{N}"),
    "W": (r"[^\w\p{L}\p{N}]", r"\W"),
    "d": (r"\d", r"\d\p{Nd}"),
    "D": (r"[^\d\p{Nd}]", r"\D"),
    "s": (r"[ \t\n\r\f\v\u00a0\u2028\u2029]", r"\s\x1c-\x1f\ufeff"),
    "S": (r"[^\s\x1c-\x1f\ufeff]", r"\S"),
}
_PLAIN = {
    "w": (r"[_\p{L}\p{Nd}\p{Nl}]", r"\w\p{No}"),
    "W": (r"[^\w\p{No}]", r"[^_\p{L}\p{Nd}\p{Nl}]"),
    "s": (r"\s", r"\s\x1c-\x1f"),
    "S": (r"[^\s\x1c-\x1f]", r"\S"),
}
_ESCAPE_IN_CLASS = {"[", "&", "~"}  # of which Rust makes operators


def portable(pattern: str, *, schema: bool) -> str:
    """The pattern for Rust's `regex` crate; `schema` where it was written for ECMAScript.

    Raises:
      UserError: for a lone backslash at the end, and for `--` in a class of a schema's pattern, a
        range for some and a difference of classes for others.
    """
    known = _SCHEMA if schema else _PLAIN
    found: list[str] = []
    negated: list[bool] = []  # of each class that is open here, with those around it
    i = 0
    while i < len(pattern):
        letter, step = pattern[i], 1
        if letter == "\\":
            step = 2
            if i + 1 == len(pattern):  # llguidance would drop it
                raise UserError(f"the expression {pattern!r:.80} ends with a lone \\; write \\\\.")
            kind = known.get(pattern[i + 1])
            inside = bool(negated) and negated[-1]
            found.append(kind[inside] if kind else pattern[i : i + 2])
        elif letter == "[" and not (schema and negated):
            start = i
            i += 1 + (pattern[i + 1 : i + 2] == "^")
            step = int(pattern[i : i + 1] == "]")  # the first one is a letter of the class
            around = bool(negated) and negated[-1]
            negated.append((i == start + 2) != around)
            found.append(pattern[start : i + step])
        elif letter == "]" and negated:
            negated.pop()
            found.append(letter)
        elif schema and negated:
            if pattern[i : i + 2] == "--":
                raise UserError(
                    f"the pattern {pattern!r:.80} has -- in a class, which not all programs read "
                    r"alike; write \-."
                )
            found.append(f"\\{letter}" if letter in _ESCAPE_IN_CLASS else letter)
        else:
            dot = schema and letter == "."
            found.append(r"[^\n\r\u2028\u2029]" if dot else letter)
        i += step
    return "".join(found)
