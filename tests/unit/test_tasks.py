"""Generators: repeatable, of the asked length, answerable, and with nothing of the test split in training."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from flux_attention.data import (
    METRICS,
    TASK_CLASSES,
    TASKS,
    Sample,
    corpus,
    get_task,
    make_sample,
    make_samples,
    styles,
    training_tasks,
    wordings,
)
from flux_attention.data.prompt import Draft, SizeLimitError, encode, fit
from flux_attention.data.tasks import ALIASES, MathProblems, Needle, open_prompts
from flux_attention.data.tasks.niah import TRAIN_PHRASINGS

LENGTH = 1200


class WordTokenizer:
    """Words, digits, spaces and signs are tokens, so that ids map back to the text."""

    chat_template = "plain"
    eos_token_id = 0

    def __init__(self):
        self.ids: dict[str, int] = {"<eos>": 0}
        self.names: list[str] = ["<eos>"]

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return f"<user>\n{messages[0]['content']}<end>\n<assistant>\n"

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        result = []
        for token in re.findall(r" ?[^\W\d]{1,6}| ?\d|\s|[^\w\s]|_", text):
            if token not in self.ids:
                self.ids[token] = len(self.names)
                self.names.append(token)
            result.append(self.ids[token])
        return {"input_ids": result}

    def decode(self, ids):
        return "".join(self.names[i] for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="module")
def drawn(tokenizer):
    """Two samples of every task and split."""
    return {
        (name, split): make_samples(name, 2, LENGTH, 3, split, tokenizer) for name in TASKS for split in corpus.SPLITS
    }


def test_registry_is_complete():
    assert {task.task_class for task in TASKS.values()} == set(TASK_CLASSES)
    assert {task.metric for task in TASKS.values()} <= set(METRICS)
    assert sum(task.held_out for task in TASKS.values()) >= 4
    assert not any(task.held_out for task in training_tasks().values())
    assert get_task("needle1") is TASKS[ALIASES["needle1"]]


def test_lengths(drawn):
    for (name, split), samples in drawn.items():
        for sample in samples:
            assert 0.7 * LENGTH <= len(sample) <= LENGTH, (name, split, len(sample))


def test_same_seed_same_sample(drawn, tokenizer):
    for name in TASKS:
        assert make_sample(name, 1, LENGTH, 3, "test", tokenizer) == drawn[name, "test"][1]


def test_seeds_indices_and_splits_differ(drawn, tokenizer):
    for name in TASKS:
        first, second = drawn[name, "test"]
        assert first.prompt_ids != second.prompt_ids
        assert first.prompt_ids != make_sample(name, 0, LENGTH, 4, "test", tokenizer).prompt_ids
        assert first.prompt_ids != drawn[name, "train"][0].prompt_ids


def test_retrieval_answers_stand_in_the_prompt_and_spans_cover_them(drawn, tokenizer):
    counted = {"passage_count"}  # its answer is a number of paragraphs
    for (name, _), samples in drawn.items():
        for sample in samples:
            if sample.metric == "nll":
                continue
            prompt = tokenizer.decode(sample.prompt_ids)
            assert len(sample.spans) == len(sample.answers)
            for (start, end), answer in zip(sample.spans, sample.answers, strict=True):
                assert tokenizer.decode(sample.answer_ids[start:end]).strip() == answer
                if sample.task_class == "retrieval" and name not in counted:
                    assert answer in prompt, name


def test_single_needle_is_asked_for_once(drawn, tokenizer):
    for sample in drawn["niah_single_2", "test"]:
        prompt = tokenizer.decode(sample.prompt_ids)
        assert prompt.count(sample.answers[0]) == 1
        assert 0 <= sample.meta["depth"] <= 1
        assert sample.meta["haystack"] == "docstrings"


def test_multivalue_answers_follow_the_text(drawn, tokenizer):
    for sample in drawn["niah_multivalue", "test"]:
        prompt = tokenizer.decode(sample.prompt_ids)
        places = [prompt.index(answer) for answer in sample.answers]
        assert places == sorted(places)
        assert len(places) == 4


@pytest.mark.parametrize("name", ["variable_tracking", "variable_copies"])
def test_assignments_come_in_order(drawn, tokenizer, name):
    for sample in drawn[name, "test"]:
        prompt = tokenizer.decode(sample.prompt_ids)
        places = [re.search(rf"(VAR|to VAR) {a.removeprefix('VAR ')}\b", prompt).start() for a in sample.answers]
        assert places == sorted(places)


def test_passage_labels_and_kv_entries_are_right(drawn, tokenizer):
    for sample in drawn["passage_retrieval", "test"]:
        prompt = tokenizer.decode(sample.prompt_ids)
        tail = prompt.rsplit("<assistant>\n", 1)[1]
        assert prompt.count(f"{tail} {sample.answers[0]})") == 1
    for sample in drawn["kv_lookup_numbers", "test"]:
        prompt = tokenizer.decode(sample.prompt_ids)
        key = prompt.rsplit("<assistant>\n", 1)[1].split('"')[1]
        assert prompt.count(f'"{key}": "{sample.answers[0]}"') == 1


def test_frequent_words_are_the_most_frequent(drawn, tokenizer):
    for sample in drawn["frequent_words", "test"]:
        a, b, c = sample.meta["counts"]
        assert a > b > c > 0


@pytest.mark.parametrize("name", ["common_words", "common_numbers", "common_codes"])
def test_common_items_are_the_commonest(drawn, tokenizer, name):
    for split in corpus.SPLITS:
        for sample in drawn[name, split]:
            listed = Counter(tokenizer.decode(sample.prompt_ids).split())
            answers = set(sample.answers)
            rest = [count for word, count in listed.items() if word not in answers and sum(map(str.isalnum, word)) > 3]
            assert len(answers) == 10 and min(listed[word] for word in answers) > max(rest), (name, split)


def test_continuation_is_the_source(drawn, tokenizer):
    for name in ("code_completion", "prose_continuation"):
        for sample in drawn[name, "test"]:
            assert len(sample.answer_ids) == 128
            source = "".join(d.text for d in corpus.documents(sample.meta["source"], "test"))
            found = tokenizer.decode(sample.prompt_ids[-20:] + sample.answer_ids[:100])
            assert "".join(found.split()) in "".join(re.findall(r"[^\W\d]|\d|[^\w\s]|_", source))


def test_splits_share_no_document_and_training_no_test_haystack():
    for source in ("topics", "docstrings", "code"):
        names = [{d.name for d in corpus.documents(source, split)} for split in corpus.SPLITS]
        assert names[0]
        assert names[1]
        assert not names[0] & names[1]
    # Docstrings are part of modules: test docstrings must come from modules whose code is never trained on.
    code = {d.name for d in corpus.documents("code", "train")}
    assert not code & {d.name for d in corpus.documents("docstrings", "test")}
    for task in training_tasks().values():
        test_haystack = getattr(task, "test_haystack", None)
        if test_haystack not in (None, "needles"):
            assert test_haystack not in task.haystacks, task.name


def test_training_phrasings_are_not_tested(drawn, tokenizer):
    ruler = "special magic number for"
    assert not any(
        ruler in tokenizer.decode(s.prompt_ids)
        for (name, split), samples in drawn.items()
        if split == "train"
        for s in samples
        if not name.endswith("multivalue")
    )


def test_too_short_a_length_says_which_task(tokenizer):
    for name in TASKS:
        with pytest.raises(ValueError, match=name):
            make_samples(name, 1, 40, 0, "test", tokenizer)


def test_bad_arguments(tokenizer):
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        get_task("nope")
    with pytest.raises(ValueError, match="split"):
        make_samples("needle1", 1, 500, 0, "valid", tokenizer)
    with pytest.raises(ValueError, match="n must be positive"):
        make_samples("needle1", 0, 500, 0, "test", tokenizer)
    with pytest.raises(ValueError, match="asked"):
        Needle(name="x", keys=1, asked=2)
    with pytest.raises(ValueError, match="items must be words, numbers or codes"):
        replace(TASKS["common_words"], items="letters")
    with pytest.raises(ValueError, match="unknown text source"):
        replace(TASKS["niah_single_2"], test_haystack="nope").sample(random.Random(0), tokenizer, 500, "test")
    with pytest.raises(ValueError, match="metric"):
        Sample("t", "retrieval", (1,), (2,), ("x",), "bleu")
    with pytest.raises(ValueError, match="span"):
        Sample("t", "retrieval", (1,), (2,), ("x",), "f1", spans=((0, 2),))


def test_fit_uses_the_room_and_refuses_too_little(tokenizer):
    def build(n):
        return Draft("word " * n, "It is", ("yes",))

    for length in (30, 97, 1003):
        _, encoded = fit(tokenizer, length, build, least=1, guess=5, name="t")
        assert 0.8 * length <= len(encoded) <= length
    with pytest.raises(ValueError, match="does not fit"):
        fit(tokenizer, 8, build, least=1, guess=5, name="t")


def test_answers_join_the_prefix(tokenizer):
    draft = Draft("q", 'The "key": "', ("123", "45"))
    encoded = encode(tokenizer, draft)
    assert tokenizer.decode(encoded.answer_ids) == "123, 45"
    assert [tokenizer.decode(encoded.answer_ids[a:b]).strip() for a, b in encoded.spans] == ["123", "45"]
    assert tokenizer.decode(encode(tokenizer, replace(draft, prefix="It is")).answer_ids) == " 123, 45"


def test_external_texts(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "Row {i} is here. It says {i}."}}\n' for i in range(30)))
    monkeypatch.setattr(corpus, "SOURCES", dict(corpus.SOURCES))
    corpus.add_jsonl_source("mine", path)
    train, test = (corpus.documents("mine", split) for split in corpus.SPLITS)
    assert len(train) + len(test) == 30
    assert train
    assert test
    with pytest.raises(ValueError, match="exists already"):
        corpus.add_jsonl_source("mine", path)
    path.write_text('{"text": "fine"}\n{"txt": "no"}\n')
    with pytest.raises(ValueError, match=r"row 2.*'text'"):
        corpus.read_jsonl_texts(path)


def test_math_problems(tmp_path, tokenizer):
    path = tmp_path / "g.jsonl"
    path.write_text(
        "".join(f'{{"question": "What is {i} + {i}?", "answer": "Add them.\\n#### {2 * i}"}}\n' for i in range(40))
    )
    task = MathProblems(name="gsm8k", kind="gsm8k", path=str(path))
    sample = make_sample(task, 0, 400, 0, "test", tokenizer)
    assert 0.8 * 400 <= len(sample) <= 400
    assert sample.metric == "number_match"
    row = sample.meta["row"] - 1
    assert sample.answers == (str(2 * row),)
    assert tokenizer.decode(sample.prompt_ids).count(f"What is {row} + {row}?") == 1
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        MathProblems(name="gsm8k", kind="gsm8k", path="nothing.jsonl")
    path.write_text('{"question": "a?"}\n')
    with pytest.raises(ValueError, match=r"row 1: field 'answer'"):
        make_sample(task.__class__(name="g", kind="gsm8k", path=str(path), shots=0), 0, 400, 0, "test", tokenizer)


def test_plain_prompts_begin_as_the_tokenizer_begins_texts():
    from flux_attention.data.prompt import chat_text

    class Plain:
        chat_template = None
        bos_token, bos_token_id = "<s>", 7

        def __init__(self, adds):
            self.adds = adds

        def __call__(self, text):
            return {"input_ids": [7, 1] if self.adds else [1]}

    assert chat_text(Plain(True), "question", "answer") == "<s>question\nanswer"
    assert chat_text(Plain(False), "question", "answer") == "question\nanswer"


def test_math_tasks_by_name(tmp_path, monkeypatch):
    import json

    from flux_attention.data import tasks
    from flux_attention.data.tasks import math_problems

    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.get_task(f"gsm8k:{path}")
    assert task.held_out and task.name == "gsm8k" and tasks.get_task("gsm8k") is task
    assert "gsm8k" not in tasks.training_tasks()
    with pytest.raises(FileNotFoundError, match=r"no such JSONL file: none\.jsonl"):
        tasks.get_task("math500:none.jsonl")
    # Without files the Hub is asked.
    asked = []
    monkeypatch.setattr(
        math_problems, "_read_hub", lambda kind, solved: asked.append((kind, solved)) or [("q", "a")] * 2
    )
    with pytest.raises(TypeError):
        tasks.get_task("math500").sample(random.Random(0), None, 500, "test")
    assert asked == [("math", False), ("math", True)]


def test_every_phrasing_of_an_interview_asks_for_all_its_needles(tokenizer):
    task = get_task("needle_interview")
    seen = set()
    for seed in range(60):
        sample = task.sample(random.Random(seed), tokenizer, 1500, "train")
        seen.add(sample.meta["phrasing"])
        answer = tokenizer.decode(sample.answer_ids)
        assert len(sample.spans) == len(sample.answers) == 12
        assert all(value in answer and value in tokenizer.decode(sample.prompt_ids) for value in sample.answers)
        assert "{" not in answer
    assert len(seen) == len(TRAIN_PHRASINGS)


def test_free_wordings_are_many_and_keep_tests_apart():
    rng = random.Random(0)
    facts = [wordings.fact(rng) for _ in range(2000)]
    requests = {wordings.request(rng) for _ in range(2000)}
    assert len({f.question for f in facts}) > 1500 and len(requests) > 1200
    assert len({f.sentence for f in facts}) > 1900
    counting = {wordings.counting(rng, "words", 10) for _ in range(500)}
    assert len(counting) > 400
    tested = {q.lower() for _, questions in open_prompts._FACTS_TEST for q in questions}
    tested |= {r.lower() for r in (*open_prompts._FREE_REQUESTS_TEST, *open_prompts._REQUESTS_TEST)}
    trained = "\n".join([*(f.question for f in facts), *requests]).lower()
    assert not [wording for wording in tested if wording in trained]


@pytest.mark.parametrize("seed", range(24))
def test_restyled_documents_keep_every_word(seed):
    rng = random.Random(seed)
    pieces = [f"Sentence {i} says that {'very ' * rng.randint(0, 12)}long lines are broken." for i in range(30)]
    text = styles.restyle(rng, pieces, 7)
    assert pieces[7] in text
    marks = re.compile(r"(?m)^[#> ]+")
    plain = " ".join(marks.sub("", text).split())
    places = [plain.index(" ".join(piece.split())) for piece in pieces]
    assert places == sorted(places)


def test_the_packages_texts_are_for_tests_alone():
    found = corpus.documents("readmes", "test")
    assert {"torch", "transformers"} <= {document.name for document in found}
    assert all(len(document.text) > 1000 for document in found)
    with pytest.raises(ValueError, match="holds no 'train' document"):
        corpus.documents("readmes", "train")


def spaced(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "split"), [("free_request", "test"), ("open_request", "test"), ("open_request", "train")]
)
@pytest.mark.parametrize("length", [1536, 4096])
def test_the_lost_paragraph_is_nowhere_in_the_prompt(tokenizer, name, split, length):
    for sample in make_samples(name, 60, length, 0, split, tokenizer):
        assert spaced(sample.answers[0]) not in spaced(tokenizer.decode(sample.prompt_ids)), sample.meta


def test_the_lost_paragraph_is_a_whole_one():
    first = "This paragraph of a licence is broken into lines of seventy characters, as they all are."
    wrapped = f"A title\n\n{first[:71]}\n{first[72:]}\n\nRest."
    assert open_prompts._lead(wrapped) == (first, "\nRest.")
    flat = f"Short.\n{first}\nAnother paragraph."
    assert open_prompts._lead(flat) == (first, "Another paragraph.")
    badge = f"[![a badge that says nothing](https://example.org/one/two/three/four)]\n\n{wrapped}"
    assert open_prompts._lead(badge)[0] == first
    assert open_prompts._without(f"One.\n  {first[:30]}\n{first[30:]} Two.", first).split() == ["One.", "Two."]


def test_one_licence_of_each_wording():
    texts = [document.text for document in corpus.documents("readmes", "test")]
    assert sum("TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text[:2000] for text in texts) == 1


def test_samples_about_a_document_name_it(drawn):
    for name in ("free_request", "free_question", "open_request", "open_question", "module_summary"):
        source = {"module_summary": "code"}.get(name)
        for sample in drawn[name, "test"]:
            found = corpus.documents(source or sample.meta["source"], "test")
            assert sample.meta["document"] in {document.name for document in found}


@pytest.mark.parametrize("seed", [0, 1])
def test_answers_of_open_questions_stand_in_the_prompt(tokenizer, seed):
    for sample in make_samples("open_question", 100, 1536, seed, "train", tokenizer):
        assert sample.answers[0] in tokenizer.decode(sample.prompt_ids), sample.meta


def test_a_whole_piece_keeps_hyphens_tabs_and_its_length():
    pieces = ["Words before.", f"\tx = well-known-{'long-' * 40}name\x0c  # two  spaces", "Words behind."] * 2
    for seed in range(60):
        assert pieces[1] in styles.restyle(random.Random(seed), pieces, 1)


@pytest.mark.parametrize("name", ["common_words", "common_numbers", "common_codes"])
@pytest.mark.parametrize("size", [40, 45, 100, 1700, 5000, 15_000, 40_000])
def test_common_items_are_the_commonest_at_every_size(name, size):
    for split in corpus.SPLITS:
        draft = get_task(name).draft(random.Random(size), size, split)
        listed = Counter(re.findall(r"[a-z0-9]+(?!\.)\b", draft.user))
        rest = max(count for word, count in listed.items() if word not in draft.references)
        times = draft.meta["common_times"]
        # The question may hold an item of its own accord.
        assert all(times <= listed[word] <= times + 3 for word in draft.references)
        assert times == 30 or not 600 <= size <= 5000
        if size >= 600:
            assert times > 2 * rest


@pytest.mark.parametrize("name", ["common_words", "common_numbers", "common_codes"])
def test_too_short_a_length_for_every_common_item_is_refused(tokenizer, name):
    with pytest.raises(ValueError, match=rf"task '{name}' needs more than length=100 tokens.* takes (\d+)") as error:
        make_samples(name, 1, 100, 0, "test", tokenizer)
    least = int(re.search(r"takes (\d+)", str(error.value))[1])
    assert least > 100
    for sample in make_samples(name, 4, 2 * least, 0, "test", tokenizer):
        listed = Counter(tokenizer.decode(sample.prompt_ids).split())
        assert all(listed[word] >= 4 for word in sample.answers)


@pytest.mark.parametrize("size", [40, *range(60, 68), 100, 1000])
def test_ranks_of_frequent_words_are_distinct(size):
    task = get_task("frequent_words")
    draft = task.draft(random.Random(0), size, "test")
    words = draft.user.split("\n")[1].split()
    assert len(words) == size
    (_, a), (_, b), (_, c), (_, d) = ranks = Counter(word for word in words if word != "....").most_common(4)
    assert a > b > c > d and tuple(word for word, _ in ranks[:3]) == draft.references


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("row_qa", "has .* paragraphs, .* are needed"),
        ("passage_retrieval", "has .* paragraphs, .* are needed"),
        ("passage_count", "has .* paragraphs, .* are needed"),
        ("row_qa_people", "rows need distinct names"),
    ],
)
def test_a_length_that_takes_more_texts_than_there_are_is_refused(tokenizer, name, reason):
    message = rf"task '{name}': length=600000 is too long, its longest prompt and answer take \d+ tokens: .*{reason}"
    with pytest.raises(ValueError, match=message):
        make_samples(name, 1, 600_000, 0, "test", tokenizer)


def test_a_guess_beyond_the_texts_is_no_error(tokenizer):
    def build(n):
        if n > 30:
            raise SizeLimitError("30 words and no more", 30)
        return Draft("word " * n, "is", ("x",))

    size = len(encode(tokenizer, build(20)))
    assert len(fit(tokenizer, size, build, least=1, guess=500, name="t")[1]) in range(int(0.9 * size), size + 1)
    with pytest.raises(ValueError, match=r"task 't': length=900 is too long.*30 words and no more"):
        fit(tokenizer, 900, build, least=1, guess=5, name="t")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", r"g\.jsonl, row 2: expected an object with fields, got list"),
        ('{"question": "\\ud800?", "answer": "1"}', r"g\.jsonl, row 2: field 'question' holds half of a surrogate"),
    ],
)
def test_bad_rows_of_math_problems_are_named(tmp_path, tokenizer, row, message):
    path = tmp_path / "g.jsonl"
    path.write_text(f'{{"question": "a?", "answer": "1"}}\n{row}\n')
    task = MathProblems(name="g", kind="gsm8k", path=str(path))
    with pytest.raises(ValueError, match=message):
        make_sample(task, 0, 400, 0, "test", tokenizer)
