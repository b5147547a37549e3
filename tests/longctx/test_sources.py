"""Several sources in one run: shares, names, metrics, and resuming in another world."""

import json
import shutil

import numpy as np
import pytest
from ranks import run_ranks
from stores import make_store
from tiny import make_config, make_world, write_corpus

from longctx.config.check import resolve
from longctx.config.load import load
from longctx.config.schema import CurriculumConfig, DataConfig, SourceConfig
from longctx.config.weights import class_weights
from longctx.data.mixture import make_mixture
from longctx.data.sources import Corpus, open_data
from longctx.data.weights import LossWeights, source_weights
from longctx.errors import ConfigError, DataError
from longctx.recovery.members import Fixed
from longctx.train.loop import train


def documents(lengths, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(0, 256, size=int(n) - 1).tolist(), 256] for n in lengths]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(1)
    make_store(folder / "web", documents(np.floor(rng.lognormal(4, 1, 300)) + 2, 1))
    make_store(folder / "books", documents(rng.integers(400, 1200, size=40), 2))
    return folder


def source_list(stores, **books) -> list[SourceConfig]:
    return [
        SourceConfig(name="web", path=str(stores / "web"), weight=3.0),
        SourceConfig(name="books", path=str(stores / "books"), **books),
    ]


def mixture(stores, *, kind="natural", mode="mixed", steps=200, seed=0, min_len=16, **books):
    data = DataConfig(
        sources=source_list(stores, **books), seq_len=256, min_len=min_len, held_out=0.0, workers=1
    )
    opened = open_data(data)
    curriculum = CurriculumConfig(kind=kind, mode=mode)
    return opened, make_mixture(opened, data, curriculum, seed=seed, tokens=(512, 2048), steps=steps)


def names_of(opened, packs) -> list[str]:
    return [opened.tokens.name(p.doc) + f"@{p.start}+{p.length}" for pack in packs for p in pack]


def test_a_corpus_reads_what_its_stores_hold(stores):
    opened, _ = mixture(stores)
    assert isinstance(opened.tokens, Corpus)
    assert opened.names == ("web", "books")
    for own, store in zip((0, 300), opened.tokens.stores, strict=True):
        for number in (0, 7, len(store) - 1):
            assert (opened.tokens.document(own + number, 1) == store.document(number, 1)).all()
    assert opened.tokens.source_of(np.array([0, 299, 300, 339])).tolist() == [0, 0, 1, 1]
    assert len(opened.tokens) == 340 == len(opened.train_docs)


@pytest.mark.parametrize("mode", ["mixed", "one_bucket"])
def test_tokens_follow_the_weights_and_packs_are_full(stores, mode):
    opened, mixed = mixture(stores, mode=mode)
    tokens = np.zeros(2)
    for step in range(200):
        packs = mixed.packs(step)
        assert [sum(p.length for p in pack) for pack in packs] == [512] * 4
        for pack in packs:
            for piece in pack:
                tokens[int(opened.tokens.source_of(np.array([piece.doc]))[0])] += piece.length
    assert tokens / tokens.sum() == pytest.approx([0.75, 0.25], abs=0.005)


def test_every_piece_comes_once_before_any_comes_twice(stores):
    _, mixed = mixture(stores)
    buckets = mixed.bucketed.buckets
    (bucket,) = np.flatnonzero((buckets.source == 1) & (buckets.length == 256))
    size = int(buckets.pieces[bucket])
    seen: list[tuple] = []
    for step in range(100):
        seen += [p for pack in mixed.packs(step) for p in pack if p.doc >= 300 and p.length == 256]
        before, drawn = mixed.curriculum.draw(step)
        if int(before[bucket] + drawn[bucket]) <= size:
            assert len(set(seen)) == len(seen)
    assert len(seen) > size == len(set(seen))


def test_weights_per_length_class_of_a_source(stores):
    _, mixed = mixture(stores, kind="uniform", lengths={"256": 3, "128": 1})
    tokens: dict[tuple[bool, int], int] = {}
    for step in range(200):
        for pack in mixed.packs(step):
            for piece in pack:
                key = (piece.doc >= 300, piece.length)
                tokens[key] = tokens.get(key, 0) + piece.length
    books = {length: count for (is_book, length), count in tokens.items() if is_book}
    assert set(books) == {256, 128}
    assert books[256] / sum(books.values()) == pytest.approx(0.75, abs=0.005)


def test_steps_depend_on_seed_and_step_only(stores):
    _, first = mixture(stores)
    expected = [first.packs(step) for step in range(12)]
    _, again = mixture(stores)
    assert [again.packs(step) for step in (7, 3, 11, 0)] == [expected[step] for step in (7, 3, 11, 0)]
    _, other = mixture(stores, seed=1)
    assert other.packs(0) != expected[0]


def test_a_source_that_is_used_up_is_named(stores):
    _, mixed = mixture(stores, max_epochs=1.0)
    steps = range(200)
    drawn = [p for step in steps for pack in mixed.packs(step) for p in pack if p.doc >= 300]
    assert len(set(drawn)) == len(drawn)
    assert mixed.exhausted(0) == []
    assert mixed.exhausted(199) == ["books"]


def test_a_source_without_a_long_enough_document_is_named(stores):
    data = DataConfig(sources=source_list(stores), seq_len=2048, min_len=2048, held_out=0.0)
    with pytest.raises(DataError, match=r"source books has no document .* data.min_len=2048"):
        make_mixture(
            open_data(DataConfig(sources=source_list(stores)[1:], held_out=0.0)),
            data,
            CurriculumConfig(kind="natural"),
            seed=0,
            tokens=(2048, 2048),
            steps=1,
        )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["curriculum.kind=none", "data.sources=[{name: a, path: x}]"], ["curriculum.kind=natural"]),
        (["data.sources=[{name: a, path: x}, {name: a, path: y}]"], ["data.sources[0]", "name of its own"]),
        (["data.sources=[{name: a}]"], ["data.sources[0]", "path"]),
        (["data.sources=[{name: a, path: x, weight: -1}]"], ["weight=-1", "0 or more"]),
        (["data.seq_len=500", "train.microbatch_tokens=500"], ["500", "256", "512"]),
        (["train.global_batch_tokens=1000", "train.microbatch_tokens=512"], ["1000", "train.global_batch"]),
        (["train.microbatch_tokens=700"], ["train.microbatch_tokens=1k"]),
        (["data.min_len=400", "data.seq_len=256"], ["data.min_len=400"]),
        (["curriculum.kind=weights"], ["curriculum.weights"]),
        (["curriculum.kind=weights", "curriculum.weights.512=0"], ["curriculum.weights"]),
        (["curriculum.kind=weights", "curriculum.weights.3k=1"], ["curriculum.weights: 3k", "256, 512"]),
        (["curriculum.kind=weights", "curriculum.weights={512: 1, 256: -1}"], ["256 has weight -1"]),
        (["curriculum.kind=weights", "curriculum.weights.512=.inf"], ["weight inf", "finite"]),
        (["data.sources=[{name: a, path: x, weight: .inf}]"], ["data.sources[0]", "weight=inf", "finite"]),
        (["data.sources=[{name: a, path: x, max_epochs: .nan}]"], ["max_epochs=nan"]),
        (["data.sources=[{name: a, path: x, reference_loss: .inf}]"], ["reference_loss=inf"]),
        (["data.sources=[{name: a, path: x, lengths: {3k: 1}}]"], ["data.sources[a].lengths: 3k"]),
        (["data.sources=[{name: a, path: x, schedule: {2: 1}}]"], ["data.sources[a]", "progress 2"]),
        (["data.sources=[{name: a, path: x, schedule: {0: .inf}}]"], ["weight inf at progress 0"]),
        (["data.sources=[{name: a, path: x, weight: 0}]"], ["all weights are 0"]),
    ],
)
def test_what_cannot_be_mixed_is_refused(extra, words):
    standard = ["curriculum.kind=natural", "data.seq_len=512", "train.global_batch_tokens=1024"]
    with pytest.raises(ConfigError) as caught:
        resolve(load(["recipes/quickstart.yaml"], [*standard, *extra]).config, 1, "cpu")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_weights_are_checked_and_schedules_are_linear():
    sources = [
        SourceConfig(name="a", path="x"),
        SourceConfig(name="b", path="y", schedule={"0": 0.0, "0.5": 2.0, "1": 1.0}),
    ]
    weights = source_weights(sources, 101)
    assert [weights(step) for step in (0, 25, 50, 75, 100)] == [[1, 0], [1, 1], [1, 2], [1, 1.5], [1, 1]]
    for schedule, words in (
        ({"half": 1.0}, "schedule="),
        ({"2": 1.0}, "progress 2.0"),
        ({"1": 0.0}, "all weights are 0"),
        ({"0": 1.0, "0.5": 0.0, "1": 1.0}, "all weights are 0 at progress 0.5"),
    ):
        with pytest.raises(ConfigError, match=words):
            source_weights([SourceConfig(name="a", path="x", schedule=schedule)], 3)
    assert class_weights({"1k": 2}, [512, 1024], "k") == {1024: 2.0}
    for given, words in (({"3k": 1}, "no length class"), ({"512": -1}, "0 or more"), ({"x": 1}, "no length")):
        with pytest.raises(ConfigError, match=words):
            class_weights(given, [512, 1024], "curriculum.weights")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    write_corpus(folder / "docs", documents=60)
    write_corpus(folder / "other", documents=40, seed=5)
    return folder


def train_rank(rank: int, size: int, base, name: str, meeting: str, extra: tuple[str, ...]) -> int:
    sources = f"data.sources=[{{name: a, path: {base}/docs}}, {{name: b, path: {base}/other, weight: 2}}]"
    standard = (
        sources,
        "curriculum.kind=grow-p2",
        "curriculum.cycles=2",
        "data.min_len=16",
        "train.steps=8",
        "train.dtype=float64",
    )
    config = make_config(base, name, size=size, layout={"dp_shard": size}, extra=(*standard, *extra))
    (base / meeting).mkdir(exist_ok=True)
    return train(config, Fixed(make_world(base / meeting, rank, size)))


def test_weights_for_classes_that_the_documents_lack_are_refused(tmp_path):
    make_store(tmp_path / "even", documents([257] * 20, 3))  # pieces of 256 alone
    data = DataConfig(path=str(tmp_path / "even"), seq_len=256, min_len=16, held_out=0.0, workers=1)
    curriculum = CurriculumConfig(kind="weights", weights={"64": 1.0})
    with pytest.raises(ConfigError, match=r"curriculum\.weights, which names none of \[256\]"):
        make_mixture(open_data(data), data, curriculum, seed=0, tokens=(256, 256), steps=1)


def rows_of(base, name: str, *runs: tuple[int, tuple[str, ...]]) -> list[dict]:
    for number, (size, extra) in enumerate(runs):
        codes = run_ranks(train_rank, size, base, name, f"{name}-{number}", extra, init=False)
        assert codes == [0] * size
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


def test_metrics_by_source_and_length_and_a_resume_in_another_world(base):
    whole = rows_of(base, "whole", (1, ("checkpoint.every=3", "checkpoint.keep=9")))
    for row in whole:
        for kind in ("source", "length"):
            tokens = {k.split("/")[1]: v for k, v in row.items() if k.startswith(f"tokens_{kind}/")}
            losses = {k.split("/")[1]: v for k, v in row.items() if k.startswith(f"loss_{kind}/")}
            assert sum(tokens.values()) == 2048
            mean = sum(losses[name] * tokens[name] for name in tokens) / 2048
            assert mean == pytest.approx(row["loss"], rel=1e-12)
    share = sum(row["tokens_source/b"] for row in whole) / sum(row["loss"] > 0 for row in whole) / 2048
    assert share == pytest.approx(2 / 3, abs=0.05)

    (base / "resumed" / "ckpt").mkdir(parents=True)
    shutil.copytree(base / "whole" / "ckpt" / "step-00000003", base / "resumed" / "ckpt" / "step-00000003")
    resumed = rows_of(base, "resumed", (2, ("run.resume=true",)))
    names = [name for name in whole[0] if name.partition("_")[0] in ("loss", "tokens", "documents")]
    assert [row["step"] for row in resumed] == [4, 5, 6, 7, 8]
    for expected, found in zip(whole[3:], resumed, strict=True):
        for name in names:
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-10), name


def test_the_run_s_events_name_a_source_that_is_used_up(base):
    sources = (
        f"data.sources=[{{name: a, path: {base}/docs}}, {{name: b, path: {base}/other, max_epochs: 0.2}}]"
    )
    codes = run_ranks(
        train_rank, 1, base, "spent", "spent-0", (sources, "curriculum.kind=natural"), init=False
    )
    assert codes == [0]
    events = [json.loads(line) for line in (base / "spent" / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "exhausted"]
    assert event["source"] == "b" and 1 <= event["step"] <= 8


def test_losses_move_the_weights_and_a_resume_goes_on_with_them(base):
    sources = (
        f"data.sources=[{{name: a, path: {base}/docs, reference_loss: 9}}, "
        f"{{name: b, path: {base}/other, reference_loss: 4}}]",
        "curriculum.kind=natural",
        "curriculum.reweight_every=2",
        "checkpoint.every=3",
        "checkpoint.keep=9",
    )
    whole = rows_of(base, "reweighted", (1, sources))
    shares = [row["tokens_source/b"] / 2048 for row in whole]
    assert shares[0] == pytest.approx(0.5, abs=0.1)  # b's loss is 1.7 nats above its reference, a's below
    assert sum(shares[4:6]) / 2 > 0.75 and sum(shares[6:8]) / 2 > 0.9  # to 0.85, then to 0.97
    state = json.loads((base / "reweighted" / "ckpt" / "step-00000003" / "state.json").read_text())
    assert state["mixture"]["changes"][0][0] == 1 + LossWeights.AHEAD

    (base / "again" / "ckpt").mkdir(parents=True)
    shutil.copytree(base / "reweighted" / "ckpt" / "step-00000003", base / "again" / "ckpt" / "step-00000003")
    resumed = rows_of(base, "again", (1, (*sources, "run.resume=true")))
    assert [row["tokens_source/b"] for row in resumed] == [row["tokens_source/b"] for row in whole[3:]]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole[3:]]
