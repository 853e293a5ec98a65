"""The objects that the fields `uri` and `exclude` of an input select: URIs, lists and glob patterns."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import bracex
from wcmatch import glob

from pipeline.config.base import ConfigError
from pipeline.storage import is_under

_MAX_EXPANSIONS = 100_000
_FLAGS = glob.GLOBSTAR | glob.DOTGLOB | glob.CASE | glob.FORCEUNIX
_GROUP = re.compile(r"images-[0-9a-f]{16}(|-[0-9a-f]{16})")


@dataclass(frozen=True)
class UriPattern:
    """A URI of an object or a folder, or a glob pattern of them. A folder stands for all objects under it.

    Attributes:
        root: The folder before the first wildcard; of a URI without wildcards, the URI.
        prefix: The text before the first wildcard.
        names: The URIs without wildcards that the pattern stands for, by expansion of its braces.
        regex: Matches the names of other objects relative to `root`.
    """

    text: str
    root: str
    prefix: str
    names: frozenset[str] = field(compare=False)
    regex: re.Pattern[str] | None = field(default=None, compare=False)

    @classmethod
    def literal(cls, uri: str) -> UriPattern:
        """Returns the pattern that is one URI, also with the characters of wildcards."""
        return cls(uri, uri, uri, frozenset({uri}))

    @classmethod
    @functools.lru_cache(maxsize=10_000)
    def parse(cls, text: str, root: str = "") -> UriPattern:
        """Returns a normalized URI or pattern; `root` has no wildcards. Raises `ConfigError`."""
        found = re.compile(r"[*?\[{]").search(text, len(root))
        if found is None:
            return cls.literal(text)
        root = text[: found.start()].rpartition("/")[0] or "/"
        if root.endswith(":/"):
            raise ConfigError("the bucket must not have wildcards; set a list of URIs")
        try:
            names = {*bracex.expand(text[len(root) + 1 :], keep_escapes=True, limit=_MAX_EXPANSIONS)}
        except bracex.ExpansionLimitException:
            raise ConfigError(f"the braces stand for more than {_MAX_EXPANSIONS:,} URIs") from None
        wild = sorted(name for name in names if glob.is_magic(name, flags=_FLAGS))
        regex = "|".join(
            each.removesuffix("$") + r"(?:/|\Z)" for each in glob.translate(wild, flags=_FLAGS)[0]
        )
        literals = frozenset(f"{root}/{name}" for name in names.difference(wild))
        return cls(text, root, text[: found.start()], literals, re.compile(regex) if wild else None)

    def match(self, uri: str) -> str | None:
        """Returns the URI, of the object or its folder, that selects an object; `root` for wildcards."""
        name = uri
        while is_under(name, self.root):
            if name in self.names:
                return name
            name = name.rpartition("/")[0]
        start = len(self.root) + 1
        is_match = self.regex and uri[:start] == f"{self.root}/" and self.regex.match(uri[start:])
        return self.root if is_match else None


@dataclass(frozen=True)
class InputUris:
    """The URIs and patterns of an input, and the patterns of objects to exclude."""

    patterns: tuple[UriPattern, ...]
    exclude: tuple[str, ...] = ()

    @classmethod
    def parse(cls, uri: str | Iterable[str], exclude: Iterable[str] = ()) -> InputUris:
        """Returns the input of normalized URIs, whose order does not matter; raises `ConfigError`."""
        uris = {uri} if isinstance(uri, str) else {*uri}
        return cls(tuple(map(UriPattern.parse, sorted(uris))), tuple(sorted(exclude)))

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> InputUris | None:
        """Returns the input in a run record; None if there is none."""
        section = record.get("config", {}).get("input", {})
        return cls.parse(section["uri"], section.get("exclude", ())) if section.get("uri") else None

    def __str__(self) -> str:
        texts = [pattern.text for pattern in self.patterns]
        return ", ".join(texts[:3]) + (f" and {len(texts) - 3:,} more" if len(texts) > 3 else "")

    @functools.cached_property
    def roots(self) -> dict[str, list[UriPattern]]:
        """The outermost roots in the order of a listing, and the patterns whose roots are under each."""
        found, last = dict[str, list[UriPattern]](), ""
        for pattern in sorted(self.patterns, key=lambda each: f"{each.root}/"):
            last = last if last and is_under(pattern.root, last) else pattern.root
            found.setdefault(last, []).append(pattern)
        return found

    def root_of(self, uri: str) -> str:
        """Returns the root that a URI is under; empty if there is none."""
        while uri and uri not in self.roots:
            uri = uri.rpartition("/")[0]
        return uri

    def matches(self, root: str, uri: str) -> dict[str, str]:
        """Returns the patterns that select an object under a root, with the results of `UriPattern.match`."""
        found = ((each.text, each.match(uri)) for each in self.roots.get(root, ()))
        return {text: base for text, base in found if base is not None}

    def excludes(self, root: str, uri: str) -> bool:
        """Returns whether an object under a root is excluded."""
        return any(pattern.match(uri) for pattern in _exclusions(root, self.exclude))

    def group_suffix(self, folder: str) -> str:
        """Returns the end of the names of groups of image files: a hash of patterns; empty for a folder."""
        texts = [pattern.text for pattern in self.roots[self.root_of(folder)]]
        digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8)
        return "" if folder in texts else f"-{digest.hexdigest()}"

    def contains(self, uri: str) -> bool:
        """Returns whether a shard is of this input: an object, a part of it, or a group of image files."""
        root, (folder, _, name) = self.root_of(uri), uri.rpartition("/")
        texts = {pattern.text for pattern in self.roots.get(root, ())}
        is_selected = bool(self.matches(root, uri))
        if root not in texts and (group := _GROUP.fullmatch(name)):
            is_selected = folder in {root, *texts} and group[1] == self.group_suffix(folder)
        return is_selected and not self.excludes(root, uri)

    def covers(self, folder: str) -> bool:
        """Returns whether files that are written to a folder may become objects of this input."""
        names = [folder, *(f"{folder}/{name}" for name in ("x.parquet", "x/x.parquet", "x/x/x.parquet"))]
        return any(self.matches(self.root_of(name), name) for name in names)


@functools.lru_cache(maxsize=10_000)
def _exclusions(root: str, patterns: tuple[str, ...]) -> list[UriPattern]:
    found = []
    for text in (pattern.rstrip("/") for pattern in patterns):
        is_uri, anywhere = text.startswith("/") or "://" in text, "" if "/" in text else "**/"
        found.append(UriPattern.parse(text) if is_uri else UriPattern.parse(f"{root}/{anywhere}{text}", root))
    return found
