"""Formatting of text for people: names from data, messages, and numbers."""

import re
import unicodedata

import pyarrow as pa

MAX_LINE_LENGTH = 200

# Invisible characters that Persian, Hindi and emoji need. Elsewhere, they only hide a difference of names.
_JOINERS = "\u200c\u200d"

_PORT = r"\d{1,5}(?=[/?#\s\"',;)\]]|$)"
_SECRET_NAME = (
    r"(?:[\w-]*[-_])?(?:sig|signature|token|secret|password|passwd|credential"
    r"|(?:api|access|secret|private)[-_]?key(?:[-_]?id)?)|\w*(?:accesskey(?:id)?|sessiontoken)|googleaccessid"
)
#: Text between a name and its value, as in `name=value`, `"name": "value"` and `b'name': b'value'`.
_ASSIGNED = r"[ \\\"']{0,4}[=:] {0,4}b?[\\\"']{0,2}"
#: Secrets, between the two groups of text around them.
_SECRETS = (
    re.compile(r"(://)[^\s\"'/?#]{1,1000}(@)"),  # the user of a URL, and a password
    # A user and a password that contains a slash or belongs to an address without a scheme, but no path.
    re.compile(
        r"((?<![^\s\"'])(?:[^\s\"'/]{0,100}?[(=,\[])??(?:\w{1,20}:/{1,2})?)"
        rf"[^\s\"'(=,/\[:@]{{0,100}}:(?!/|{_PORT})[^\s\"']{{1,1000}}(@)"
    ),
    re.compile(
        rf"(?i)(?<![\w/-])((?:{_SECRET_NAME}){_ASSIGNED})"
        r"(?:(?<=\")[^\"\n]+|(?<=')[^'\n]+|(?:(?!:\s)[^\s\"'&;,)}\]])+)()"
    ),
    re.compile(
        rf"(?i)(\bauthorization(?:[\"'], ?b?[\"']|{_ASSIGNED})(?:(?:bearer|basic|token) )?)"
        r"[^\s\"',}]+(?: [^\s\"',}]+)?()"
    ),
)


def escape_unprintable(text: str, keep: str = "") -> str:
    r"""Returns text in which invisible characters are escaped as in Python, for example as `\x1b`.

    These are line breaks and Unicode's categories C: control, format, surrogate, private and unassigned
    characters. A name in a bucket with such characters could forge a line or imitate another name. Letters of
    all scripts, spaces, emoji with their joiners, and the characters in `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c if _is_visible(c) or c in keep or _needs_joiner(text, i) else c.encode("unicode_escape").decode()
        for i, c in enumerate(text)
    )


def _is_visible(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _needs_joiner(text: str, i: int) -> bool:
    """Returns whether the character is a joiner between two visible characters outside ASCII."""
    neighbors = text[max(0, i - 1) : i] + text[i + 1 : i + 2]
    is_between = len(neighbors) == 2 and all(c > "\x7f" and _is_visible(c) for c in neighbors)
    return text[i] in _JOINERS and is_between


#: Every secret has one of these characters. Most URIs of images have none, and need not be searched.
_MAY_BE_SECRET = re.compile(r"[@=\"']|(?<!http)(?<!https)(?<!s3)(?<!gs):")


def remove_secrets(text: str) -> str:
    """Returns text in which `***` replaces passwords in addresses, and keys, tokens and signatures."""
    if _MAY_BE_SECRET.search(text) is None:
        return text
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***\2", text)
    return text


def single_line(message: str) -> str:
    """Returns a message on one line of at most `MAX_LINE_LENGTH` characters, without memory addresses.

    Memory addresses differ between attempts, but the prediction files of all attempts must be equal.
    """
    message = escape_unprintable(re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(message.split())))
    return message if len(message) <= MAX_LINE_LENGTH else message[: MAX_LINE_LENGTH - 3] + "..."


def format_number(value: float | None, spec: str = ",.0f") -> str:
    """Formats a number; returns a dash for None and NaN."""
    return "-" if value is None or value != value else f"{value:{spec}}"


def format_percent(value: float | None) -> str:
    """Formats a fraction as a percentage."""
    return format_number(value, ".1%")


def format_score(value: float | None) -> str:
    """Formats a score with three decimals."""
    return format_number(value, ".3f")


def pluralize(count: int, noun: str) -> str:
    """Returns a count and its noun, in the singular or plural: `1 shard`, `2,000 shards`, `10 classes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def arrow_type(name: str) -> pa.DataType:
    """Returns the type of a name such as `int64`, `timestamp[us, UTC]` or `decimal128(9, 2)`.

    Raises `ValueError` for other names, and for types that Parquet does not have.
    """
    if found := re.fullmatch(r"timestamp\[(s|ms|us|ns), *(?:tz=)?([\w/+:-]+)\]", name):
        return pa.timestamp(found[1], found[2])
    if found := re.fullmatch(r"decimal128\((\d+), *(\d+)\)", name):
        return pa.decimal128(int(found[1]), int(found[2]))
    if name == "null" or "interval" in name:
        raise ValueError(name)
    return pa.type_for_alias(name)
