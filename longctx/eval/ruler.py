"""Tasks whose answer lies somewhere in a long context, made of nothing but a seed.

Every generator takes a random source, the units of noise and the depth of its needle (0 start, 1
end), and returns a `Prompt`. The order of several answers is always determined by the question,
so that exact continuation is a fair score.

Source: RULER (Hsieh et al. 2024), sec. 3; passkey: Landmark Attention (Mohtashami and Jaggi 2023).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from .prompts import Prompt

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")
NUM_VALUES = 4
HOPS = 4
NUM_COMMON = 5
COMMON_REPEATS, RARE_REPEATS = 8, 2

WITHOUT_DEPTH = frozenset({"cwe", "fwe"})
"""Tasks whose answer lies everywhere."""

Generator = Callable[[random.Random, int, float], Prompt]


def word(source: random.Random, syllables: int = 3) -> str:
    """A word that is no word."""
    return "".join(source.choice(_SYLLABLES) for _ in range(syllables))


def words(source: random.Random, count: int, syllables: int = 3) -> list[str]:
    """Different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(source, syllables)] = None
    return list(found)


def number(source: random.Random) -> str:
    """Seven digits."""
    return str(source.randint(1_000_000, 9_999_999))


def placed(noise: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Lines of noise with each needle before the line that its depth points to."""
    at = [round(depth * len(noise)) for depth in depths]
    order = sorted(range(len(needles)), key=lambda i: at[i])
    lines: list[str] = []
    last = 0
    for i in order:
        lines += [*noise[last : at[i]], needles[i]]
        last = at[i]
    return "\n".join([*lines, *noise[last:]])


def passkey(source: random.Random, units: int, depth: float) -> Prompt:
    """One number in repeated noise."""
    key = number(source)
    body = placed([NOISE] * units, [f"The pass key is {key}. Remember it. {key} is the pass key."], [depth])
    intro = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it."
    return Prompt(text=f"{intro}\n{body}\nWhat is the pass key? The pass key is", answers=(key,))


def magic(key: str, value: str) -> str:
    """A needle."""
    return f"One of the special magic numbers for {key} is: {value}."


def _ask(body: str, keys: str) -> str:
    intro = "Some special magic numbers are hidden within the following text. Memorize them."
    return f"{intro}\n{body}\nThe special magic numbers for {keys} mentioned in the text, in this order, are"


def niah_single(source: random.Random, units: int, depth: float) -> Prompt:
    """One key and its value in repeated noise."""
    key, value = word(source), number(source)
    return Prompt(text=_ask(placed([NOISE] * units, [magic(key, value)], [depth]), key), answers=(value,))


def niah_multikey(source: random.Random, units: int, depth: float) -> Prompt:
    """One key among as many others as there is noise."""
    keys = words(source, units + 1, 5)
    needle, value = keys.pop(), number(source)
    others = [magic(key, number(source)) for key in keys]
    return Prompt(text=_ask(placed(others, [magic(needle, value)], [depth]), needle), answers=(value,))


def niah_multivalue(source: random.Random, units: int, depth: float) -> Prompt:
    """All values of one key, in the order of the text."""
    key, values = word(source), [number(source) for _ in range(NUM_VALUES)]
    depths = sorted([depth, *(source.random() for _ in range(NUM_VALUES - 1))])
    body = placed([NOISE] * units, [magic(key, value) for value in values], depths)
    return Prompt(text=_ask(body, key), answers=tuple(values))


def niah_multiquery(source: random.Random, units: int, depth: float) -> Prompt:
    """Several keys with a value each, in the order of the question."""
    keys, values = words(source, NUM_VALUES), [number(source) for _ in range(NUM_VALUES)]
    depths = [depth, *(source.random() for _ in range(NUM_VALUES - 1))]
    body = placed([NOISE] * units, [magic(k, v) for k, v in zip(keys, values, strict=True)], depths)
    return Prompt(text=_ask(body, ", ".join(keys)), answers=tuple(values))


def vt(source: random.Random, units: int, depth: float) -> Prompt:
    """Variable tracking: a chain of assignments, and another one that leads elsewhere."""
    names = [name.upper() for name in words(source, 2 * (HOPS + 1))]
    chain, other = names[: HOPS + 1], names[HOPS + 1 :]
    value, wrong = number(source), number(source)
    needles, depths = [], []
    for own, start in ((chain, value), (other, wrong)):
        needles += [f"VAR {own[0]} = {start}"]
        needles += [f"VAR {name} = VAR {before}" for before, name in pairwise(own)]
        depths += [depth, *sorted(depth + (1 - depth) * source.random() for _ in range(HOPS))]
    body = placed([NOISE] * units, needles, depths)
    question = f"The variables that are assigned the value {value}, in the order of the text, are"
    return Prompt(text=f"Track the chains of variable assignments.\n{body}\n{question}", answers=tuple(chain))


def cwe(source: random.Random, units: int, depth: float) -> Prompt:
    """Common words: those that appear oftenest in a numbered list."""
    found = words(source, NUM_COMMON + units, 4)
    common, rare = found[:NUM_COMMON], found[NUM_COMMON:]
    listed = common * COMMON_REPEATS + rare * RARE_REPEATS
    source.shuffle(listed)
    body = " ".join(f"{i + 1}. {each}" for i, each in enumerate(listed))
    question = f"The {NUM_COMMON} most common words in the list, in alphabetical order, are"
    text = f"Memorize the words that appear most often.\n{body}\n{question}"
    return Prompt(text=text, answers=tuple(sorted(common)))


def fwe(source: random.Random, units: int, depth: float) -> Prompt:
    """Frequent words: coded words with frequencies like those of a language."""
    found = words(source, 3 + max(4, units // 8), 4)
    rounds = max(1, units // 12)
    rare = [max(1, 2 * rounds // (2 + i)) for i in range(len(found) - 3)]
    counts = [6 * rounds, 4 * rounds, 3 * rounds, *rare]
    listed = [each for each, count in zip(found, counts, strict=True) for _ in range(count)]
    source.shuffle(listed)
    question = "The three most frequent coded words, most frequent first, are"
    return Prompt(text=f"Read the coded text.\n{' '.join(listed)}\n{question}", answers=tuple(found[:3]))


GENERATORS: Mapping[str, Generator] = {
    "passkey": passkey,
    "niah_single": niah_single,
    "niah_multikey": niah_multikey,
    "niah_multivalue": niah_multivalue,
    "niah_multiquery": niah_multiquery,
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
}
"""The names are those of `config.eval.GENERATORS`."""


def make(name: str, *, seed: str, depth: float) -> Callable[[int], Prompt]:
    """A prompt by units of noise; the same seed gives the same needles whatever the noise."""
    return lambda units: GENERATORS[name](random.Random(seed), units, depth)
