"""Prompt generators: a solver that reads the text finds the answers; prompts are as long as asked for."""

import random
import re
from collections import Counter

import pytest
from tokenizers import Tokenizer as Trained
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from longctx.config.eval import GENERATORS as NAMES
from longctx.data.tokenizers import load_tokenizer
from longctx.errors import ConfigError
from longctx.eval.needle import depths_of, prompts_of
from longctx.eval.perplexity import bucket_edges, position_rows, windows
from longctx.eval.prompts import encode, fit
from longctx.eval.ruler import GENERATORS, NOISE, make
from longctx.eval.score import IGNORED

DEPTHS = (0.0, 0.3, 1.0)


def solve_numbers(text):
    """Magic numbers of the keys that the last line asks for, in the order of keys, then of the text."""
    asked = re.search(r"magic numbers for ([^\n]*) mentioned in the text, in this order, are$", text)[1]
    told = re.findall(r"One of the special magic numbers for (\w+) is: (\d+)\.", text)
    return [value for key in asked.split(", ") for name, value in told if name == key]


def solve_chain(text):
    wanted = re.search(r"assigned the value (\d+),", text)[1]
    known, order = {}, []
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        known[name] = known.get(value, value)
        order.append(name)
    return [name for name in order if known[name] == wanted]


def solve_common(text):
    found = Counter(re.findall(r"\d+\. (\w+)", text)).most_common(6)
    assert len(found) < 6 or found[4][1] > found[5][1]
    return sorted(name for name, _ in found[:5])


def solve_frequent(text):
    found = Counter(text.split("\n")[1].split()).most_common(4)
    assert [count for _, count in found] == sorted({count for _, count in found}, reverse=True)
    return [name for name, _ in found[:3]]


SOLVERS = {
    "passkey": lambda text: [re.search(r"The pass key is (\d+)\. Remember it", text)[1]],
    "niah_single": solve_numbers,
    "niah_multikey": solve_numbers,
    "niah_multivalue": solve_numbers,
    "niah_multiquery": solve_numbers,
    "vt": solve_chain,
    "cwe": solve_common,
    "fwe": solve_frequent,
}


def test_the_configuration_names_every_generator():
    assert set(NAMES) == set(GENERATORS) == set(SOLVERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("units", [0, 1, 40, 333])
def test_a_solver_finds_the_answers(name, units):
    for depth in DEPTHS:
        for trial in range(3):
            prompt = make(name, seed=f"{trial}", depth=depth)(units)
            assert SOLVERS[name](prompt.text) == list(prompt.answers)
            assert prompt.answers and not prompt.text.endswith(prompt.answers[0])


@pytest.mark.parametrize("name", ["passkey", "niah_single", "niah_multikey"])
def test_the_needle_lies_at_its_depth(name):
    for depth in DEPTHS:
        prompt = make(name, seed="0", depth=depth)(200)
        where = prompt.text.index(prompt.answers[0]) / len(prompt.text)
        assert abs(where - depth) < 0.05


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE of 400 tokens."""
    tokenizer = Trained(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<eos>"])
    tokenizer.train_from_iterator([NOISE, "One of the special magic numbers is"], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(str(path))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["bytes", "trained"])
def test_prompts_are_as_long_as_they_can_be(name, which, trained):
    tokenizer = load_tokenizer("bytes") if which == "bytes" else trained
    made = make(name, seed="7", depth=0.5)
    for length in (1500, 4000):
        found = fit(made, tokenizer, length)
        assert found.num_tokens == len(encode(found.prompt, tokenizer).row.ids) <= length
        units = next(n for n in range(5000) if made(n) == found.prompt)
        grown = next(n for n in range(units, 5000) if made(n) != found.prompt)
        assert encode(made(grown), tokenizer).num_tokens > length
    with pytest.raises(ConfigError, match=r"choose longer eval\.lengths"):
        fit(made, tokenizer, 20)


def test_only_the_tokens_of_answers_are_scored_each_under_its_answer():
    tokenizer = load_tokenizer("bytes")
    found = encode(make("niah_multivalue", seed="0", depth=0.0)(3), tokenizer)
    ids, labels = found.row.ids, found.row.labels
    assert len(labels) == len(ids) - 1
    for number, answer in enumerate(found.prompt.answers):
        targets = ids[1:][labels == number].tolist()
        assert tokenizer.decode(targets) == (" " if number == 0 else ", ") + answer
    assert tokenizer.decode(ids[1:][labels == IGNORED].tolist()) == found.prompt.text[1:]


def test_prompts_differ_between_trials_and_repeat_between_runs():
    tokenizer = load_tokenizer("bytes")

    def texts():
        found = prompts_of("passkey", tokenizer, length=1000, depths=[0.0, 1.0], trials=2, seed=3)
        return [each.prompt.text for each in found]

    assert texts() == texts() and len(set(texts())) == 4
    assert depths_of("passkey", 3) == [0.0, 0.5, 1.0]
    assert depths_of("passkey", 1) == [0.5] and depths_of("cwe", 5) == [0.0]


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 0, 7), (100, 30, 7), (90, 30, 30), (20, 30, 4)]
)
def test_windows_score_every_position_once_with_as_much_before_it_as_fits(length, window, stride):
    scored = []
    for start, stop, first in windows(length, window=window, stride=stride):
        assert stop - start == (min(window, length) if window else length)
        scored += range(first, stop)
        if first:
            assert first - start >= window - stride
    assert scored == list(range(length))


def test_rows_of_a_text_carry_the_bucket_of_each_position():
    import torch

    text, edges = torch.arange(41), bucket_edges(40, 3)
    assert edges == [0, 13, 26, 40] and bucket_edges(2, 8) == [0, 1, 2]
    seen = {}
    for row in position_rows(text, edges, window=16, stride=5):
        for target, label in zip(row.ids[1:].tolist(), row.labels.tolist(), strict=True):
            if label != IGNORED:
                seen[target] = label
    assert seen == {p + 1: sum(p >= edge for edge in edges[1:-1]) for p in range(40)}


def test_the_source_of_randomness_is_the_seed_alone():
    state = random.getstate()
    make("vt", seed="1", depth=0.2)(10)
    assert random.getstate() == state
