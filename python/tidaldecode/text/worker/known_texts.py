"""Token ids of texts that begin as earlier ones: only what is new is tokenised.

A conversation grows at its end, and a long document at its beginning would be tokenised again at
every turn. Special tokens cut a text before anything else happens to it, so behind one of them
nothing depends on what was in front.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken

# Shorter texts are tokenised in less time than it takes to look for them.
LEAST_CHARS = 16 * 1024
_MOST_CHARS = 4 << 20  # of all that are known

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class _Known:
    """A text with its ids, and where it may be cut."""

    text: str
    ids: array[int]
    ends: list[int]  # characters up to behind a special token, ascending
    counts: list[int]  # ids up to there

    def up_to(self, cut: int) -> _Known:
        """What is in front of a cut."""
        end, count = self.ends[cut], self.counts[cut]
        return _Known(
            self.text[:end], self.ids[:count], self.ends[: cut + 1], self.counts[: cut + 1]
        )

    def cut_before(self, text: str) -> int:
        """The last of its cuts in front of which another text is the same; -1 if there is none."""
        first, last = 0, len(self.ends)
        while first < last:  # all cuts before `first` are good, all from `last` on are not
            middle = (first + last) // 2
            if text.startswith(self.text[: self.ends[middle]]):
                first = middle + 1
            else:
                last = middle
        return first - 1


class KnownTexts:
    """The newest long texts of one tokenizer that puts nothing in front of a text."""

    def __init__(self, added: Mapping[int, AddedToken], encode: Encode) -> None:
        """Takes the tokenizer's added tokens by id, and what gives the ids of a text."""
        self._encode = encode
        self._ids = {token.content: token_id for token_id, token in added.items() if token.content}
        self._cuts = {
            token_id for token_id, token in added.items() if _is_cut(token, self._ids.keys())
        }
        contents = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents)))
        self._texts: OrderedDict[str, _Known] = OrderedDict()  # the newest last

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text, exactly as without what is known."""
        if len(text) < LEAST_CHARS or not self._cuts:
            return list(self._encode(text))
        begun = self._beginning(text)
        rest = text[len(begun.text) :]
        ids = list(self._encode(rest)) if rest else []
        self._remember(text, begun, ids)
        return begun.ids.tolist() + ids

    def _beginning(self, text: str) -> _Known:
        """The most of a text that is known."""
        best, cut = _Known("", array("I"), [0], [0]), 0
        for known in self._texts.values():
            last = known.cut_before(text)
            if last >= 0 and known.ends[last] > best.ends[cut]:
                best, cut = known, last
        return best.up_to(cut)

    def _remember(self, text: str, begun: _Known, ids: Sequence[int]) -> None:
        """Takes a text in whose beginning is known, with the ids of its rest."""
        begin, count = len(begun.text), len(begun.ids)
        added = frozenset(self._ids.values())
        places = [index for index, token_id in enumerate(ids) if token_id in added]
        found = list(self._pattern.finditer(text, begin))
        # Both have seen the same tokens in the same order, or some token is not where it seems.
        if [ids[place] for place in places] != [self._ids[match[0]] for match in found]:
            return
        ends, counts = list(begun.ends), list(begun.counts)
        for match, place in zip(found, places, strict=True):
            if ids[place] in self._cuts:
                ends.append(match.end())
                counts.append(count + place + 1)
        self._texts[text] = _Known(text, begun.ids + array("I", ids), ends, counts)
        self._texts.move_to_end(text)
        while sum(map(len, self._texts)) > _MOST_CHARS:
            self._texts.popitem(last=False)


def _is_cut(token: AddedToken, contents: Iterable[str]) -> bool:
    """Whether a text may be cut behind a token, whatever follows.

    Not behind one that takes space in or is looked for in another spelling, nor behind one that
    would be part of a longer one if more followed.
    """
    takes_more = token.lstrip or token.rstrip or token.single_word or token.normalized
    if not token.content or not token.special or takes_more:
        return False
    return not any(token.content in other for other in contents if other != token.content)
