"""Which licence a merge may carry, from those of its parents. Advice, not law.

Knows the Hub's identifiers; asks nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Source: huggingface.co/docs/hub/repositories-licenses
_IDS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma
    unknown other
"""
HUB_LICENCES = frozenset(_IDS.split())
# How the same licences are spelt in files' metadata (`modelspec.license` is free text).
_SPELT = (
    (re.compile(r"creativeml\s+open\s*rail\s*\+\+[\s-]*m?", re.IGNORECASE), "openrail++"),
    (re.compile(r"creativeml\s+open\s*rail[\s-]*m", re.IGNORECASE), "creativeml-openrail-m"),
    (re.compile(r"\bapache(?:\s+license)?,?\s*(?:version\s*)?2(?:\.0)?\b", re.IGNORECASE),
     "apache-2.0"),
    (re.compile(r"\bmit(?:\s+license)?\Z", re.IGNORECASE), "mit"),
)  # fmt: skip
_RESTRICTED = re.compile(
    r"(?:^|-)nc(?:-|$)|non-?commercial|research|deepfloyd-if-license", re.IGNORECASE
)
_NOTHING = ("", "unknown", "other")


@dataclass(frozen=True)
class Licence:
    """What the card says of the licence.

    id      one of the Hub's; "other" with a `name`; "" where none could be told
    name    of a licence that the Hub does not list
    link    to its text
    why     the reasoning, one sentence each
    refused why it cannot be inherited; "" where it can
    parents parent -> licence, "" where unknown
    """

    id: str
    name: str
    link: str
    why: tuple[str, ...]
    refused: str
    parents: Mapping[str, str]


def licence_id(text: str) -> str:
    """The Hub's identifier for a licence as files and cards spell it; the text where there is none.

    >>> licence_id("CreativeML Open RAIL++-M License")
    'openrail++'
    """
    plain = text.strip()
    if plain.lower() in HUB_LICENCES:
        return plain.lower()
    return next((name for pattern, name in _SPELT if pattern.search(plain)), plain)


def is_restricted(licence: str) -> bool:
    """Whether a licence forbids commercial use, as far as its name tells."""
    return bool(_RESTRICTED.search(licence))


def inherit(
    parents: Mapping[str, str], *, given: str = "", link: str = "", own: str = ""
) -> Licence:
    """The licence of what was made from `parents` (name -> licence, "" where unknown).

    given  what the owner decided (`--license`); taken as it is, the differences are told
    own    of a model without parents, as its own metadata says
    """
    known = {name: licence_id(text) for name, text in parents.items()}
    said = _by_licence(known)
    if given:
        id_ = licence_id(given)
        why = ["as given"]
        if known:
            why.append(f"the parents': {'; '.join(said)}")
        listed = id_ in HUB_LICENCES
        return Licence(id_ if listed else "other", "" if listed else given, link, tuple(why), "",
                       known)  # fmt: skip
    if not known:
        id_ = licence_id(own)
        if id_ in _NOTHING:
            return _refused(known, "nothing tells the licence of this model")
        return _found(id_, link, ("as the file's metadata says",), known)
    unknown = [name for name, licence in known.items() if licence in _NOTHING]
    restricted = [name for name, licence in known.items() if is_restricted(licence)]
    different = len(set(known.values())) > 1
    if unknown:
        return _refused(known, f"the licence of {_words(unknown)} is not known", said)
    if different:
        return _refused(known, "the parents' licences differ", said)
    if restricted:
        word = known[restricted[0]]
        return _refused(known, f"{word} restricts commercial use or what may be passed on", said)
    id_ = next(iter(known.values()))
    count = f"all {len(known)} parents have it" if len(known) > 1 else "the parent has it"
    return _found(id_, link, (count,), known)


def _found(id_: str, link: str, why: tuple[str, ...], parents: Mapping[str, str]) -> Licence:
    listed = id_ in HUB_LICENCES
    return Licence(id_ if listed else "other", "" if listed else id_, link, why, "", parents)


def _refused(parents: Mapping[str, str], reason: str, why: Sequence[str] = ()) -> Licence:
    return Licence("", "", "", tuple(why), reason, parents)


def _by_licence(known: Mapping[str, str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, licence in known.items():
        groups.setdefault(licence or "unknown", []).append(name)
    return [f"{_words(names)}: {licence}" for licence, names in groups.items()]


def _words(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
