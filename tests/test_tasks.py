"""Retrieval tasks: rows have the requested length and answers that follow from the text."""

import re
from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import tokenizers
from test_file_tokenizer import BOUNDARY, train

from ringattn.config import RETRIEVAL, Data
from ringattn.data import dataset, load_tokenizer, read
from ringattn.data.haystack import names, prose, sentences, words
from ringattn.data.questions import check_fits, check_tokenizer, question, questions
from ringattn.data.tasks import DEPTH_TASKS, PLACES, TASKS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train([BOUNDARY]).save(str(path))
    return load_tokenizer(str(path))


def text_and_answers(task, length=3000, depth=0.5, seed="0"):
    tokenizer = load_tokenizer("bytes")
    row = question(task, tokenizer, length, depth, seed)
    bounds = row.answer_bounds
    answers = [tokenizer.decode(row.tokens[a:b]).strip(" ,") for a, b in pairwise(bounds)]
    return tokenizer.decode(row.tokens[: bounds[0]]), answers


def test_the_config_names_all_tasks():
    assert list(TASKS) == list(RETRIEVAL)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1500, 4096])
def test_a_row_has_its_length_with_any_tokenizer(task, length, tokenizer):
    for encoder in (tokenizer, load_tokenizer("bytes")):
        row = question(task, encoder, length, 0.3, "seed")
        assert row.tokens.shape == (length,)
        assert row.tokens[0] == encoder.boundary
        assert encoder.boundary not in row.tokens[1:]
        assert list(row.answer_bounds) == sorted(set(row.answer_bounds))
        assert row.answer_bounds[-1] == length
        assert np.array_equal(row.tokens, question(task, encoder, length, 0.3, "seed").tokens)
        assert not np.array_equal(row.tokens, question(task, encoder, length, 0.3, "other").tokens)


def test_the_answer_occurs_in_the_text_with_any_tokenizer(tokenizer):
    for task in set(TASKS) - {"mrcr"}:  # whose answer has a prefix
        row = question(task, tokenizer, 2000, 0.3, "seed")
        answer = tokenizer.decode(row.tokens[row.answer_bounds[0] :])
        text = tokenizer.decode(row.tokens)
        assert text.endswith(answer)
        assert answer.strip(" <>").split(",")[0] in text[: -len(answer)]


@pytest.mark.parametrize("task", ["passkey", "needle", "multi_key", "multi_query", "multi_value"])
@pytest.mark.parametrize("seed", "012")
def test_the_answers_are_the_numbers_of_the_text(task, seed):
    text, answers = text_and_answers(task, seed=seed)
    asked = text.rsplit("\n", 1)[1]
    if task == "passkey":
        assert re.findall(r"pass key is (\d{5})\.", text) == answers
    else:
        needles = re.findall(r"The magic number of (\w+) is (\d{7})\.", text)
        keys = re.sub(r"The magic numbers? of |, in order,| is$| are$", "", asked).replace(" and ", ", ").split(", ")
        if task == "multi_value":
            assert [value for _, value in needles] == answers
        else:
            assert [dict(needles)[key] for key in keys] == answers
        assert len(needles) == (1 if task == "needle" else 4)


@pytest.mark.parametrize("task", DEPTH_TASKS)
@pytest.mark.parametrize("length", [256, 512, 20_000])
def test_the_needle_is_at_its_depth(task, length):
    """The depth also holds in rows with little haystack."""
    unit, needles = {"lines": 50, "multi_key": 12}.get(task, 12), {"multi_key": 4}.get(task, 1) * 80
    offsets = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        text, (answer,) = text_and_answers(task, length, depth, seed="1")
        text = text.rsplit("\n", 1)[0]
        offsets.append(text.index(answer))
        # Other needles and units of the haystack are indivisible.
        assert offsets[-1] == pytest.approx(depth * len(text), abs=0.03 * length + unit + needles)
    assert offsets == sorted(offsets)
    assert len(set(offsets)) == 5 or (task == "lines" and length < 512)


def test_variables_form_a_chain():
    text, answers = text_and_answers("variables")
    (value,) = re.findall(r"hold (\d+), in order", text)
    assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
    assert len(assigned) == 10
    values = {}
    for name, source in assigned:  # in the order of the text, each source precedes its uses
        values[name] = values.get(source, source)
    assert [name for name, _ in assigned if values[name] == value] == answers
    assert len(answers) == 5


@pytest.mark.parametrize("length", [1300, 3000, 40_000])
def test_common_words_are_the_most_common(length):
    text, answers = text_and_answers("common_words", length)
    counts = Counter(re.findall(r"\d+\. (\S+)", text)).most_common()
    assert sorted(word for word, _ in counts[:10]) == answers
    assert counts[9][1] > counts[10][1]
    if length == 40_000:
        assert (counts[9][1], counts[10][1]) == (30, 3)


@pytest.mark.parametrize("length", [800, 40_000])
def test_frequent_words_are_the_most_frequent_in_order(length):
    text, answers = text_and_answers("frequent_words", length)
    listed = text.rsplit("\n", 1)[0].splitlines()[-1].split()
    counts = Counter(listed).most_common(4)
    assert [word for word, _ in counts[:3]] == answers
    assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]


def test_lines_contain_each_register_once():
    text, (answer,) = text_and_answers("lines")
    asked = text.rsplit("\n", 1)[1].removeprefix("line ").removesuffix(": REGISTER_CONTENT is")
    registers = re.findall(r"line ([\w-]+): REGISTER_CONTENT is (<\d+>)", text)
    assert len(dict(registers)) == len(registers) > 40
    assert dict(registers)[asked] == answer


@pytest.mark.parametrize("seed", "01234567")
def test_mrcr_asks_for_one_of_four_equal_requests(seed):
    text, (answer,) = text_and_answers("mrcr", seed=seed)
    (asked,) = re.findall(r"User: Prepend (.*)\nAssistant:$", text)
    ((prefix, number, request),) = re.findall(r"^(\w{10}) to the (\d)\w\w \(1 indexed\) (.*)\. Do not", asked)
    turns = re.findall(r"User: Write a (.*)\.\nAssistant: (.*)", text)
    responses = [response for each, response in turns if each == request]
    assert len(responses) == 4 < len(turns)
    assert answer == prefix + responses[int(number) - 1]


@pytest.mark.parametrize("seed", "01234567")
def test_the_location_is_that_of_the_last_move(seed):
    text, (place,) = text_and_answers("where_person", seed=seed)
    (person,) = re.findall(r"Where is (\w+)\?", text)
    assert re.findall(rf"{person} went to the (\w+)\.", text)[-1] == place
    text, (place,) = text_and_answers("where_thing", seed=seed)
    (thing,) = re.findall(r"Where is the (\w+)\?", text)
    (person,) = re.findall(rf"(\w+) took the {thing}\.", text)
    _, after = text.split(f"{person} took the {thing}.")
    assert re.findall(rf"{person} went to the (\w+)\.", after)[-1] == place


def test_a_row_that_is_too_short_raises():
    with pytest.raises(ValueError, match=r"the task needle requires rows of more than \d+ tokens, not 40; use longer"):
        question("needle", load_tokenizer("bytes"), 40, 0.5, "0")


def test_check_fits_checks_all_rows():
    sizes = []
    tokenizer = load_tokenizer("bytes")
    for number in range(30):
        check_fits("where_person", tokenizer, 300, [str(number)])
        shortest = next(n for n in range(200, 300) if fits(tokenizer, n, [str(number)]))
        assert question("where_person", tokenizer, shortest, 0.0, str(number)).tokens.size == shortest
        sizes.append(shortest)
    assert min(sizes) < max(sizes)
    seeds = list(map(str, range(30)))
    assert not fits(tokenizer, max(sizes) - 1, seeds)
    assert fits(tokenizer, max(sizes), seeds)


def fits(tokenizer, length, seeds):
    try:
        check_fits("where_person", tokenizer, length, seeds)
    except ValueError:
        return False
    return True


def test_tokens_that_span_question_and_answer_are_part_of_the_answer(tmp_path):
    """The tokens of this vocabulary can contain spaces."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    space = {"replacement": "_", "split": False}
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**space)
    tokenizer.decoder = tokenizers.decoders.Metaspace(**space)
    letters = [chr(code) for code in range(33, 127)] + ["\n"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOUNDARY], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["Where is Mary? In the kitchen. the kitchen is in the house"] * 50, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for number in range(20):
        row = question("where_person", loaded, 300, 0.5, str(number))
        answer = loaded.decode(row.tokens[row.answer_bounds[0] :])
        assert answer.endswith(PLACES)
        assert len(answer) < 30


def test_a_tokenizer_that_is_not_for_text_raises():
    with pytest.raises(
        ValueError,
        match=r"the task needle is text, which the tokenizer 'dna' cannot encode; use data.tokenizer=bytes or a",
    ):
        check_tokenizer("needle", load_tokenizer("dna"))


def test_training_documents_mask_all_but_the_answer():
    tokenizer = load_tokenizer("bytes")
    documents = list(questions("needle", tokenizer, 200, 20))
    assert len({document.digest for document in documents}) == 20
    for document in documents:
        assert document.tokens.size == 200
        assert re.fullmatch(r" \d{7}", tokenizer.decode(document.tokens[document.masked_prefix + 1 :]))
    depths = [tokenizer.decode(document.tokens).index("The magic") for document in documents]
    assert min(depths) < 25
    assert max(depths) > 75


def test_documents_of_a_task_fill_rows(monkeypatch):
    monkeypatch.setattr(dataset, "TASK_TOKENS", 2**15)
    splits = read(Data(path=("task:needle:128", "task:passkey"), seq_len=256))
    assert [set(corpus.lengths.tolist()) for corpus in splits.training] == [{128}, {256}]
    assert splits.kinds[0][0] == "needle"


def test_the_haystack_is_plain_prose():
    assert len(sentences()) > 300
    assert not re.search(r"\d", " ".join(sentences()))
    assert len(words()) > 1000
    assert len(set(names(Random(0), 5000))) == 5000
    assert len(prose(Random(0), 12_345)) == 12_345
    assert all(word in set(" ".join(sentences()).split()) for word in prose(Random(0), 100))
