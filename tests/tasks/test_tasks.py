"""Generated samples: exact lengths, the same bytes for a seed, gold spans, one right answer, nothing held out leaks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import locret
from locret.errors import ConfigError, DataError
from locret.tasks import (
    HELD_OUT_FAMILIES,
    SHAPES,
    STAGES,
    TASKS,
    CorpusFiller,
    ProseFiller,
    build,
    head_samples,
    mixture,
    prose,
    score,
    training_example,
)
from locret.tasks import families as f
from locret.tasks import wordings as w
from locret.tasks.build import FAMILIES, Plan, compose, make_facts
from locret.tasks.encode import encoder_of
from locret.tasks.filler import Renamed, is_heldout
from locret.tasks.grammar import WORDINGS, Pool, Rendered, fill, flatten, parse
from locret.tasks.relations import LABELLED, RELATIONS
from locret.tasks.words import VALUES, reserved, sections, towns, words

EMBEDDED = Path(locret.__file__).parent / "models" / "embedded"
ASKED = [name for name, info in TASKS.items() if not info.training_only]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def coarse():
    """A BPE that keeps digits together and has no chat template: nothing of the fast path applies."""
    text = ["the number of amber-river is 1234567 and 1234567 is the number."] * 4
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def filler(tokenizer):
    return ProseFiller.from_seed(0, tokenizer, 3000)


def make(task, tokenizer, filler, **options):
    return build(task, **{"seed": 3, "length": 700, "tokenizer": tokenizer, "filler": filler, **options})


# ---- samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize("wording", WORDINGS)
def test_prompts_have_the_exact_length(task, wording, tokenizer, filler):
    for seed, length in enumerate((400, 701, 1500)):
        sample = make(task, tokenizer, filler, seed=seed, length=length, wording=wording)
        prompt = sample.prompt_ids(tokenizer)
        assert len(prompt) == length
        assert tokenizer.decode(prompt[-1:]) == "<|assistant|>"
        assert len(sample.weights) == len(sample.document)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_bytes(task, tokenizer, filler):
    one, two = (make(task, tokenizer, filler) for _ in range(2))
    other = make(task, tokenizer, filler, seed=4)
    assert one.document.tobytes() == two.document.tobytes()
    assert one.weights.tobytes() == two.weights.tobytes()
    assert one.questions == two.questions
    assert one.document.tobytes() != other.document.tobytes()


@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize("wording", WORDINGS)
def test_gold_spans_hold_the_answer(task, wording, tokenizer, filler):
    num_questions = 1 if task == "passkey" else 3
    for seed in range(6):
        sample = make(task, tokenizer, filler, seed=seed, length=1200, wording=wording, num_questions=num_questions)
        for question in sample.questions:
            gold = "".join(tokenizer.decode(sample.document[a:b].tolist()) for a, b in question.gold)
            for value in re.split(", | = ", question.answer):
                assert value in gold


@pytest.mark.parametrize("task", ["number", "passkey", "multikey2", "multikey3", "kv", "chain"])
def test_an_answer_occurs_only_in_its_own_fact(task, tokenizer, filler):
    """Numbers and uuids are unique in a document, so a right answer can only come from the right place."""
    for seed in range(8):
        sample = make(task, tokenizer, filler, seed=seed, length=1000)
        question = sample.questions[0]
        inside = "".join(tokenizer.decode(sample.document[a:b].tolist()) for a, b in question.gold)
        whole = tokenizer.decode(sample.document.tolist())
        assert whole.count(question.answer) == inside.count(question.answer)


def test_facts_of_one_document_never_contradict():
    """One value for a (key, attribute) and for a (person, relation), also with hard distractors."""
    for seed in range(60):
        world = f.World(random.Random(seed))
        facts = make_facts(world, Plan("mixed", num_facts=30, families=FAMILIES, hard=True, chain_share=0.2))
        stated = sum(fact.family in ("number", "word", "fact") for fact in facts)
        stated += 2 * sum(fact.family == "multivalue" for fact in facts)
        assert len(world.attributes) == stated
        assert len(set(world.keys)) == len(world.keys)
        assert sum(fact.family == "passkey" for fact in facts) <= 1


def test_hard_distractors_occur():
    """The same key with two attributes, the same person with two relations, keys that share a word."""
    shared = {"key": 0, "person": 0, "near": 0}
    for seed in range(20):
        world = f.World(random.Random(seed))
        make_facts(world, Plan("mixed", num_facts=30, families=FAMILIES, hard=True))
        names = [name for name, _ in world.attributes]
        shared["key"] += any(names.count(key) > 1 for key in world.keys)
        shared["person"] += any(names.count(person) > 1 for person in world.persons)
        parts = [part for key in world.keys for part in key.split("-")]
        shared["near"] += len(set(parts)) < len(parts)
    assert min(shared.values()) > 10


def test_a_chain_is_in_order_and_ends_in_its_value(tokenizer, filler):
    for seed in range(10):
        sample = make("chain", tokenizer, filler, seed=seed, length=900, wording="official")
        text = tokenizer.decode(sample.document.tolist())
        values: dict[str, str] = {}
        for name, source, number in re.findall(r"VAR (\w+) = (?:VAR ([A-Z]+)|(\d+))", text):
            values[name] = f"{name} = {number or values[source]}"  # a KeyError here: used before it was defined
        name = re.search(r"VAR ([A-Z]+)", sample.questions[0].text).group(1)
        assert values[name] == sample.questions[0].answer


def test_facts_lie_at_all_depths(tokenizer, filler):
    depths = []
    for seed in range(60):
        sample = make("number", tokenizer, filler, seed=seed, length=1500, num_facts=1)
        depths.append(sample.questions[0].gold[0][0] / len(sample.document))
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert 0.3 < float(np.mean(depths)) < 0.7


def test_random_keys_and_values_weigh_little(tokenizer, filler):
    sample = make("multikey2", tokenizer, filler, wording="official")
    light = tokenizer.decode(sample.document[sample.weights < 1].tolist())
    assert sample.questions[0].answer in light
    assert "special magic" not in light
    assert set(np.unique(sample.weights)) == {np.float32(0.1), np.float32(1.0)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("task", ["number", "fact", "kv"])
def test_a_prompt_is_what_the_chat_template_renders(shape, task, tokenizer, filler):
    sample = make(task, tokenizer, filler, num_questions=3, length=1200)
    for question in range(3):
        messages = sample.messages(tokenizer, question, shape)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(sample.prompt_ids(tokenizer, question, shape)) == rendered


@pytest.mark.parametrize("shape", SHAPES)
def test_training_ids_close_every_answer_and_weigh_it(shape, tokenizer, filler):
    sample = make("number", tokenizer, filler, num_questions=3)
    ids, weights = sample.training_ids(tokenizer, shape)
    answers = tokenizer.decode(ids[weights == 4.0].tolist())
    assert answers == "".join(f" {q.answer}<|end|>" for q in sample.questions)
    assert len(ids) == len(weights)
    assert tokenizer.decode(ids[-1:].tolist()) == "<|end|>"
    first = sample.prompt_ids(tokenizer, 0, shape)
    assert ids[: len(first)].tolist() == first


def test_tokens_of_a_document_are_those_of_its_text(tokenizer, filler):
    """Facts are put in as tokens: the result must be what encoding the whole text would give."""
    for task in ASKED:
        sample = make(task, tokenizer, filler, seed=11, length=1000)
        a = sample.questions[0].gold[0][0]
        text = tokenizer.decode(sample.document[a:].tolist())
        assert encoder_of(tokenizer).ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"][:-8] == sample.document[a:-8].tolist()


def test_any_tokenizer_will_do(coarse):
    filler = ProseFiller.from_seed(0, coarse, 400)
    for task in ASKED:
        sample = make(task, coarse, filler, length=1400)
        assert len(sample.prompt_ids(coarse)) == 1400
        assert re.split(", | = ", sample.questions[0].answer)[-1] in coarse.decode(sample.document.tolist())
        assert (sample.weights < 1).any()


def test_unknown_names_and_impossible_sizes_are_refused(tokenizer, filler):
    for options in ({"task": "nmber"}, {"wording": "heldut"}, {"values": "al"}):
        arguments = {"task": "number", "seed": 0, "length": 600, "tokenizer": tokenizer, "filler": filler, **options}
        with pytest.raises(ConfigError, match="valid: "):
            build(**arguments)
    sample = make("number", tokenizer, filler)
    with pytest.raises(ConfigError, match="unknown shape"):
        sample.prompt_ids(tokenizer, 0, "one_trn")
    with pytest.raises(ConfigError, match="question 5"):
        sample.prompt_ids(tokenizer, 5)
    with pytest.raises(ConfigError, match="unknown stage"):
        training_example(random.Random(0), 512, tokenizer, {"prose": filler}, "man")
    for task in ("number", "multikey2", "kv", "verbatim"):
        with pytest.raises(ConfigError, match="raise length"):
            make(task, tokenizer, filler, length=60, num_questions=4)
    with pytest.raises(ConfigError, match="raise num_facts"):
        make("number", tokenizer, filler, num_questions=9)


def test_scores():
    assert score("1234567", " 1234567.\n", "number") == 1.0
    assert score("1234567", "12345678", "number") == 0.0
    assert score("11, 22", "11,22", "multivalue") == 1.0
    assert score("11, 22", "22, 11", "multivalue") == 0.0


# ---- wordings -----------------------------------------------------------------------------------------------------


def _pools() -> dict[str, Pool]:
    found = {name: value for name, value in vars(w).items() if isinstance(value, Pool)}
    for name, phrases in {"keyed": w.KEYED, "passkey": w.PASSKEY, "labelled": LABELLED}.items():
        found |= {f"{name}.{key}": pool for key, pool in vars(phrases).items() if isinstance(pool, Pool)}
    for name, relation in RELATIONS.items():
        found |= {f"{name}.{key}": pool for key, pool in vars(relation.phrases).items() if isinstance(pool, Pool)}
        found[f"{name}.labels"] = relation.labels
    return {name: pool for name, pool in found.items() if len(pool)}


def _surfaces(frame: str) -> set[str]:
    """Many of the texts one frame can give; slots stay as names."""
    rng = random.Random(0)
    names = set(re.findall(r"\{\^?(\w+)\}", frame))
    slots = {name: f"<{name}>" for name in names}
    return {fill(flatten(rng, parse(frame), {}, "any"), slots).text for _ in range(150)}


def test_held_out_frames_say_nothing_that_training_says():
    for name, pool in _pools().items():
        shown = set().union(*map(_surfaces, pool.train))
        for frame in pool.heldout:
            assert not shown & _surfaces(frame), (name, frame)


def test_training_never_picks_a_held_out_frame():
    for pool in _pools().values():
        rng = random.Random(0)
        held = {parse(frame) for frame in pool.heldout}
        assert not held & {pool.pick(rng, "train") for _ in range(400)}
        if held:
            assert {pool.pick(rng, "heldout") for _ in range(50)} <= held


@pytest.mark.parametrize("name", ["keyed", "passkey"])
def test_there_are_many_frames_and_a_fifth_of_them_is_held_out(name):
    phrases = {"keyed": w.KEYED, "passkey": w.PASSKEY}[name]
    facts = len(phrases.clauses) + len(phrases.direct)
    questions = len(phrases.asks) + len(phrases.nps) + len(w.NP_WRAPPERS)
    assert facts >= 40
    assert questions >= 40
    for pool in (phrases.clauses, phrases.direct, phrases.asks, phrases.nps):
        assert 0.1 < len(pool.heldout) / len(pool) < 0.3


def test_held_out_statements_and_questions_differ_from_all_of_training():
    """Whole sentences, names replaced: no sentence of a held-out sample can be had in training."""
    shown: set[str] = set()
    held: set[str] = set()
    for wording, found in (("train", shown), ("heldout", held)):
        for seed in range(1500):
            world = f.World(random.Random(f"{wording}{seed}"), wording, "any")
            fact = f.number_fact(world, key="KEY")
            found.add(fact.statements[0].text.replace(fact.asks[0].answer, "VALUE"))
            found.add(fact.asks[0].make(world.rng, wording))
    assert len(shown) > 1500
    assert not shown & held


def test_official_wordings_are_those_of_the_benchmarks(tokenizer, filler):
    sample = make("number", tokenizer, filler, wording="official", num_facts=1)
    text = tokenizer.decode(sample.document.tolist())
    key, value = re.search(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", text).groups()
    question = sample.questions[0]
    assert question.text == f"What is the special magic number for {key} mentioned in the provided text?"
    assert question.answer == value
    sample = make("passkey", tokenizer, filler, wording="official")
    value = sample.questions[0].answer
    assert f"The pass key is {value}. Remember it. {value} is the pass key." in tokenizer.decode(
        sample.document.tolist()
    )
    assert sample.questions[0].text == "What is the pass key?"


def test_official_wordings_are_also_trained_on():
    texts = set()
    for seed in range(300):
        world = f.World(random.Random(seed))
        fact = f.number_fact(world, key="KEY")
        texts |= {fact.statements[0].text[:36], fact.asks[0].make(world.rng, "train")}
    assert "One of the special magic numbers for" in texts
    assert "What is the special magic number for KEY mentioned in the provided text?" in texts


# ---- words --------------------------------------------------------------------------------------------------------


def test_word_lists_are_large_and_a_fifth_is_reserved():
    sizes = {"adjectives": 300, "nouns": 600, "first": 200, "last": 300, "professions": 80}
    for section, least in sizes.items():
        assert len(sections()[section]) >= least
        assert len(set(sections()[section])) == len(sections()[section])
    assert len(towns("any")) >= 200
    for section in sections():
        train, held = set(words(section, "train")), set(words(section, "heldout"))
        assert not train & held
        assert train | held == set(words(section, "any"))
    assert not set(towns("train")) & set(towns("heldout"))


@pytest.mark.parametrize("values", VALUES)
def test_keys_come_from_the_words_that_were_asked_for(values, tokenizer, filler):
    sample = make("multikey2", tokenizer, filler, values=values, wording="official")
    keys = re.findall(r"for ([a-z]+)-([a-z]+) is", tokenizer.decode(sample.document.tolist()))
    assert keys
    assert all(a in words("adjectives", values) and b in words("nouns", values) for a, b in keys)


# ---- fillers ------------------------------------------------------------------------------------------------------


def test_prose_is_varied_and_repeatable():
    sentences = prose.write(random.Random(0), 2000)
    assert sentences == prose.write(random.Random(0), 2000)
    assert len(set(sentences)) > 1500
    assert all(text[-1] in '.?!"' and not re.search(r"[{}\[\]|]", text) for text in sentences)
    text = prose.document(random.Random(0), 300)
    assert "\n\n" in text
    assert "## " in text


def test_a_corpus_is_split_by_document_and_cached(tmp_path, tokenizer):
    texts = [f"Document {i} speaks of things. It ends here.\n\nAnother line of number {i}." for i in range(300)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    cache = tmp_path / "cache"
    train = CorpusFiller.from_folder(tmp_path, tokenizer, cache=cache)
    held = CorpusFiller.from_folder(tmp_path, tokenizer, "heldout", cache=cache)
    assert len(list(cache.iterdir())) == 2
    again = CorpusFiller.from_folder(tmp_path, tokenizer, cache=cache)
    assert np.array_equal(train.ids, again.ids)
    shown, kept = (tokenizer.decode(np.asarray(part.ids).tolist()) for part in (train, held))
    assert 0 < sum(map(is_heldout, texts)) < 30
    for text in texts:
        assert (text in kept) == is_heldout(text)
        assert (text in shown) != is_heldout(text)


def test_documents_in_other_scripts_are_left_out(tmp_path, tokenizer):
    """A Korean translation among the held-out documents: facts planted in it were not facts in English prose."""
    texts = ["Plain text, naïve café and π. " * 5, "심의회가 내부적으로 결정할 수 있으며 " * 5, "Über den Wolken. " * 5]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    found = ""
    for split in ("train", "heldout"):
        with contextlib.suppress(DataError):  # one of the two has no document
            found += tokenizer.decode(np.asarray(CorpusFiller.from_folder(tmp_path, tokenizer, split).ids).tolist())
    assert "naïve" in found
    assert "Wolken" in found
    assert "심의" not in found


def test_breaks_are_ends_of_sentences(tokenizer, filler):
    ids, breaks = filler.take(random.Random(2), 800)
    assert len(ids) == 800
    assert len(breaks) > 20
    for at in breaks:
        assert re.search(r"[.!?][\"')]*$", tokenizer.decode(ids[:at].tolist()))


def test_short_text_is_repeated_and_no_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One short sentence. And another one.", encoding="utf-8")
    filler = CorpusFiller.from_folder(tmp_path, tokenizer)
    assert len(filler.take(random.Random(0), 500)[0]) == 500
    with pytest.raises(DataError, match="no text"):
        CorpusFiller.from_folder(tmp_path, tokenizer, limit_mb=0)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\nnot json\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl:2"):
        CorpusFiller.from_folder(tmp_path, tokenizer)


# ---- encoding -----------------------------------------------------------------------------------------------------


def test_the_fast_encoder_agrees_with_the_tokenizer_on_every_frame(tokenizer):
    encoder = encoder_of(tokenizer)
    assert encoder._separable
    rng = random.Random(0)
    pools = {"speaker": w.SPEAKER}
    values = {"key": "amber-river", "value": "1234567", "attr": "PIN", "np": "the code of KX-41", "a": "an"}
    values |= {"clause": 'it is "x"', "indirect": "where Ann Marsh lives", "person": "Ann Marsh", "label": "home"}
    values |= {"name": "ABCDE", "source": "old_lamp"}
    for pool in _pools().values():
        for frame in pool.train + pool.heldout:
            text = " " + fill(flatten(rng, parse(frame), pools, "any"), values).text
            assert encoder.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_marks_become_light_tokens(tokenizer):
    encoder = encoder_of(tokenizer)
    text = "The code for amber-river is 1234567."
    ids, weights = encoder.weighted(Rendered(text, ((13, 24), (28, 35))))
    assert tokenizer.decode([i for i, x in zip(ids, weights, strict=True) if x < 1]) == " amber-river 1234567"


# ---- training data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_training_examples_fill_the_row(stage, tokenizer, filler):
    for length in (97, 512, 1024, 4096):
        rng = random.Random(length)
        for _ in range(12):
            ids, weights = training_example(rng, length, tokenizer, {"prose": filler, "corpus": filler}, stage)
            assert ids.shape == weights.shape == (length,)
            assert ids.dtype == np.uint16
            assert weights.dtype == np.float32
            assert tokenizer.decode(ids[:1].tolist()) == "<|bos|>"
            assert weights.min() > 0


def test_questions_stand_behind_a_blank_line_or_a_single_newline(tokenizer, filler):
    """RULER has the newline; a model that never saw it takes the question for the document's last line."""
    sample = build("multikey3", seed=1, length=600, tokenizer=tokenizer, filler=filler)
    close = dataclasses.replace(sample, gap="\n")
    texts = [tokenizer.decode(x.training_ids(tokenizer, "one_turn")[0].tolist()) for x in (sample, close)]
    asked = sample.questions[0].text
    assert [text.split(asked)[0][-2:] for text in texts] == ["\n\n", sample_end(sample, tokenizer) + "\n"]
    assert close.messages(tokenizer)[0]["content"].endswith(sample_end(sample, tokenizer) + "\n" + asked)
    rng, seen = random.Random(3), set()
    for _ in range(60):
        text = tokenizer.decode(training_example(rng, 700, tokenizer, {"prose": filler}, "long")[0].tolist())
        seen |= {
            bool(re.search(r"[^\n]\n[^\n]{1,200}<\|end\|>", text)),
            bool(re.search(r"\n\n[^\n]{1,200}<\|end\|>", text)),
        }
    assert seen == {True, False}


def sample_end(sample, tokenizer):
    return tokenizer.decode(sample.document.tolist())[-1]


def test_statements_can_be_made_to_name_the_value_first(tokenizer, filler):
    world = f.World(random.Random(0), value_first=1.0)
    facts = make_facts(world, Plan("mixed", num_facts=200, families=("number", "word", "fact", "multivalue")))
    for fact in facts:
        values = fact.asks[0].answer.split(", ")
        for value, (text, marks) in zip(values, fact.statements, strict=True):
            assert text[slice(*marks[0])] == value, text
    rng = random.Random(1)
    plan = Plan("multikey2", num_questions=4, value_first=1.0)
    sample = compose(rng, plan, tokenizer, filler, lambda questions: 1024, 1)
    for question in sample.questions:
        line = tokenizer.decode(sample.document[slice(*question.gold[0])].tolist())
        key = next(word for word in re.findall(r"[a-z]+-[a-z]+", question.text) if word in line)
        assert line.index(question.answer) < line.index(key)


def test_training_examples_are_repeatable_and_have_no_held_out_frame(tokenizer, filler):
    held = [frame for frame in w.KEYED.asks.heldout if frame.startswith(("What", "Which"))]
    patterns = [re.compile(_pattern(frame)) for frame in held]
    fillers = {"prose": filler}
    one, two = (training_example(random.Random(7), 2048, tokenizer, fillers)[0] for _ in range(2))
    assert np.array_equal(one, two)
    rng = random.Random(1)
    for _ in range(60):
        text = tokenizer.decode(training_example(rng, 1024, tokenizer, fillers)[0].tolist())
        for pattern in patterns:
            assert not pattern.search(text)


def _pattern(frame: str) -> str:
    """A regex of a frame; alternatives without nesting only."""
    escaped = re.escape(frame).replace(r"\[", "(?:").replace(r"\]", ")").replace(r"\|", "|")
    return r"<\|user\|>" + re.sub(r"\\\{\\?\^?\w+\\\}", r"[^<>\\n]{1,40}", escaped) + r"<\|end\|>"


def test_chains_are_well_represented(tokenizer, filler):
    """They were the weakest family of a prototype."""
    from locret.tasks.mixture import _plan

    rng = random.Random(0)
    plans = [_plan(rng, "sparse", 2048, 0) for _ in range(400)]
    asked = sum(plan.task == "chain" or plan.chain_share >= 0.2 for plan in plans)
    assert asked / len(plans) > 0.2


def test_copying_tasks_can_be_solved(tokenizer, filler):
    for seed in range(10):
        sample = make("verbatim", tokenizer, filler, seed=seed, num_questions=2, length=900)
        text = tokenizer.decode(sample.document.tolist())
        for question in sample.questions:
            a, b = question.gold[0]
            quote = tokenizer.decode(sample.document[a:b].tolist()).strip().removesuffix(question.answer).strip()
            assert quote in question.text
            assert text.count(f"{quote} {question.answer}") == 1
    repeat = make("repeat", tokenizer, filler, length=2000).document
    seen = {repeat[i : i + 6].tobytes() for i in range(1000)}
    assert any(repeat[i : i + 6].tobytes() in seen for i in range(1000, 1990))


def test_head_samples_never_show_the_held_out_families(tokenizer, filler, monkeypatch):
    """Not as a question, and not in the documents either."""
    made: list[str] = []
    for name in ("word_fact", "passkey_fact"):
        monkeypatch.setattr(f, name, lambda *_, name=name, **__: made.append(name))
    samples = list(head_samples(tokenizer, {"prose": filler}, count=120, length_range=(600, 1500), seed=1))
    assert not made
    assert not {sample["task"] for sample in samples} & set(HELD_OUT_FAMILIES)
    assert len({sample["task"] for sample in samples}) >= 7
    for sample in samples:
        assert 600 <= len(sample["prompt_ids"]) <= 1500
        assert tokenizer.decode(sample["answer_ids"]) == f" {sample['answer']}<|end|>"
        assert sample["prompt"][-1]["role"] == "user"
        assert not re.search(r"pass ?key|pass ?code|password|code word|watchword", sample["prompt"][-1]["content"])


def test_head_samples_with_more_questions_ask_about_other_facts_too(tokenizer, filler):
    """A label is a maximum over the answer's queries: facts that nobody asks for would look useless."""
    options = dict(count=40, length_range=(900, 1500), seed=3)
    one = list(head_samples(tokenizer, {"prose": filler}, **options))
    many = list(head_samples(tokenizer, {"prose": filler}, **options, max_questions=16))
    assert all(sample["answer_ids"].count(tokenizer.eos_token_id) == 1 for sample in one)
    assert sum(sample["answer_ids"].count(tokenizer.eos_token_id) for sample in many) > 4 * len(many)
    for sample in many:
        assert tokenizer.decode(sample["answer_ids"]).startswith(f" {sample['answer']}<|end|>")
        assert len(sample["prompt_ids"]) <= 1500


def test_strange_words_are_none_that_evaluation_keeps_for_itself(tokenizer):
    vocabulary = mixture._vocabulary(tokenizer)
    kept = {word.lower() for name in sections() for word in words(name, "heldout")}
    assert len(set(vocabulary)) > 20_000
    assert not kept & set(vocabulary)


def test_strange_keys_names_and_values_stand_in_the_place_of_list_words():
    world = f.World(random.Random(0), strange=1.0, vocabulary=("qua",))
    assert world.pair_key() == "qua-qua"
    assert world.new_person() == "Qua Qua"
    assert {world.value(kind) for kind in ("word", "town", "profession")} == {"qua", "Qua"}
    assert "qua" not in f.World(random.Random(0), vocabulary=("qua",)).pair_key()


def test_garbled_facts_keep_key_and_value_and_are_alone_about_them(tokenizer, filler):
    """Arbitrary words around a fact are only fair when its name alone finds it."""
    plan = Plan("mixed", num_facts=12, families=("number", "word", "fact"), hard=True, garble=1.0)
    for seed in range(20):
        world = f.World(random.Random(seed), garble=1.0)
        facts = make_facts(world, plan)
        for fact in facts:
            name = next(key for key in [*world.keys, *world.used] if key in fact.statements[0].text)
            assert fact.asks[0].answer in fact.statements[0].text
            assert name in fact.asks[0].make(random.Random(seed), "train") or fact.family == "fact"
        assert not world.persons, "a second fact about a person would make the question ambiguous"


def test_garbling_never_uses_a_word_that_could_be_a_value():
    values = {word for section in sections() for word in words(section, "any")}
    assert len(f.frame_words()) > 200
    assert not set(f.frame_words()) & {word for word in values if word in set(words("nouns", "any"))}


def test_a_renamed_text_swaps_words_alike_throughout_and_spares_those_kept_for_evaluation(tokenizer):
    prose_text = ProseFiller.from_seed(0, tokenizer, 400)
    renamed = Renamed(prose_text, tokenizer, random.Random(1))
    before, breaks = prose_text.take(random.Random(2), 3000)
    after, same_breaks = renamed.take(random.Random(2), 3000)
    assert (breaks == same_breaks).all()
    assert 0 < (before != after).mean() < 0.5
    assert len(set(zip(before.tolist(), after.tolist(), strict=True))) == len(set(before.tolist()))
    assert sorted(renamed.ids) == list(range(len(tokenizer))), "a renaming loses no word"
    kept = {word.lower() for word in reserved()}
    moved = [tokenizer.decode([i]) for i in np.flatnonzero(renamed.ids != np.arange(len(renamed.ids)))]
    assert moved
    assert not [text for text in moved if text.strip().lower() in kept]
    again = Renamed(prose_text, tokenizer, random.Random(1))
    assert (again.ids == renamed.ids).all()
