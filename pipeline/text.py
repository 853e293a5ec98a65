"""Text that holds names from data, such as keys, labels and URIs, as it may be shown: one rule for all."""

import re
import unicodedata

MAX_LINE_LENGTH = 200

# Without ink, and yet part of writing: Persian, Hindi and emoji, join and part characters by them. Elsewhere
# they only hide something.
_JOINERS = "\u200c\u200d"


def escape_unprintable(text: str, keep: str = "") -> str:
    r"""Text with nothing in it that is no character to see: what is not is written as Python would, `\x1b`.

    These are line breaks, and all of Unicode's categories C: control characters, which a terminal acts on;
    formats, that turn the writing's direction or have no width; halves of surrogates, private and unassigned
    characters. Names in a bucket may have any of them, and would forge lines, or look like other names.
    Whatever else there is stays: letters of all scripts, spaces, emoji, with the joiners that they need. The
    characters of `keep` stay, too.
    """
    if text.isprintable():
        return text
    return "".join(
        c if _is_shown(c) or c in keep or _joins(text, i) else c.encode("unicode_escape").decode()
        for i, c in enumerate(text)
    )


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _joins(text: str, place: int) -> bool:
    """Whether a joiner stands between two characters that may need it, which ASCII's never do."""
    beside = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
    return text[place] in _JOINERS and len(beside) == 2 and all(c > "\x7f" and _is_shown(c) for c in beside)


def remove_credentials(text: str) -> str:
    """Text without what stands before the host in URLs."""
    return re.sub(r"(?<=://)[^\s\"']*@", "", text)


def single_line(message: str) -> str:
    """A message without line breaks, what can't be printed, excessive length, and memory addresses.

    Addresses differ from attempt to attempt, and prediction files must not.
    """
    message = escape_unprintable(re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(message.split())))
    return message if len(message) <= MAX_LINE_LENGTH else message[: MAX_LINE_LENGTH - 3] + "..."


def format_number(value: float | None, form: str = ",.0f") -> str:
    """A count, for people; a dash where there is none."""
    return "-" if value is None or value != value else f"{value:{form}}"


def format_percent(value: float | None) -> str:
    """A share, for people."""
    return format_number(value, ".1%")


def format_score(value: float | None) -> str:
    """A score, for people."""
    return format_number(value, ".3f")


def pluralize(count: int, noun: str) -> str:
    """Returns a count and its noun, in the singular or plural: `1 shard`, `2,000 shards`, `10 classes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
