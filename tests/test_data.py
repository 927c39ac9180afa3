"""support/data.py: rows, files, prompts, and an order that resumes."""

import gzip
import json
from datetime import date

import pytest
from conftest import BARE, metrics

import check_data
import train
from support.config import PRESETS, SYSTEM_PROMPT_ZH, Config
from support.data import Question, QuestionStream, check_references, load_questions
from support.errors import UserError
from support.model import load_tokenizer
from support.prompts import build_prompt, training_questions, with_prompts

CHINESE = {k: v for k, v in PRESETS["gsm8k-zh"].items() if k != "dataset"}


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_formats(tmp_path):
    rows = [{"question": " q1 ", "answer": "a\nb #### c\n#### 1,000", "colour": "red"}]
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "train.jsonl", *rows)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet"
    )
    for split in ("train", "test"):
        (q,) = load_questions(str(tmp_path), split)
        assert (q.question, q.reference, q.solution) == ("q1", "1,000", "a\nb #### c"), (
            "after the last ####"
        )
        assert q.columns["colour"] == "red"
    (same,) = load_questions(str(tmp_path / "train.jsonl"), "test")
    assert same.question == "q1"


def test_chinese_gsm8k(tmp_path):
    """Its Parquet has question, answer (the solution, no marker) and answer_only."""
    path = write(
        tmp_path / "x.jsonl",
        {"question": "问", "answer": "解", "answer_only": "72"},
        {"question": "问", "answer_only": 5},
    )
    a, b = load_questions(str(path), "train")
    assert (a.reference, a.solution) == ("72", "解") and b.reference == "5"


def test_columns_by_name(tmp_path):
    """`question_zh-cn` of the Chinese GSM8K; `problem` and `solution` of others; in a folder `data` as on the hub."""
    rows = [
        {
            "question": "How many?",
            "question_zh-cn": "几个？",
            "answer_only": 6,
            "problem": "p",
            "n": "six #### 6",
        }
    ]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", *rows)

    def load(**columns):
        (found,) = load_questions(str(tmp_path), "train", Config(**columns))
        return found.question, found.reference, found.solution

    assert load(question_column="question_zh-cn") == ("几个？", "6", "")
    assert load(question_column="problem", answer_column="n") == ("p", "6", "six")
    assert load(answer_column="answer_only") == ("How many?", "6", "")
    write(
        tmp_path / "data" / "lines.jsonl", {"question": "q", "solution": "9 * 2 = 18\n18 * 2 = 36"}
    )
    with pytest.raises(
        UserError, match="the column solution has several lines and no '#### ' line"
    ):
        load_questions(
            str(tmp_path / "data" / "lines.jsonl"), "train", Config(answer_column="solution")
        )
    write(tmp_path / "train.jsonl", {"question": "own", "answer": "#### 1"})
    assert load()[0] == "own", "the folder's own file comes before that in data"
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(
        UserError,
        match="the column problems is missing.*name the right one with --question_column",
    ):
        load(question_column="problems")
    with pytest.raises(
        UserError, match="the column answers is missing.*name the right one with --answer_column"
    ):
        load(answer_column="answers")


def test_chinese_gsm8k_trains(tmp_path):
    """The columns of the hub's dataset, in its folder `data`, through the preset with its Chinese prompt."""
    rows = [
        {"question": f"Tom has {n} apples and gets 2. How many?", "answer": f"{n}+2={n + 2}\n#### {n + 2}",
         "question_zh-cn": f"汤姆有{n}个苹果，又得到2个。一共有几个？", "answer_only": n + 2}
        for n in range(2, 10)
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", *rows)
    train.main([
        "--preset=gsm8k-zh", f"--dataset={tmp_path}", "--model=tiny/model", "--device=cpu", "--precision=fp32", "--steps=1",
        "--rollouts_per_step=2", "--group_size=2", "--train_batch_size=4", "--max_new_tokens=8", "--kl_weight=0",
        "--eval_interval=0", "--checkpoint_interval=0", "--max_prompt_tokens=400", f"--run_dir={tmp_path / 'run'}",
    ])  # fmt: skip
    assert len(metrics(tmp_path / "run")) == 1
    config, tokenizer = Config(dataset=str(tmp_path), **CHINESE), load_tokenizer("tiny/model")
    (question, *_) = training_questions(config, tokenizer)
    assert question.reference == "4" and question.columns["answer_only"] == 4
    assert "汤姆有2个苹果" in question.prompt and SYSTEM_PROMPT_ZH in question.prompt


def test_check_data_says_what_is_in_a_dataset(tmp_path, capsys):
    """Columns, answers that are numbers and those that are not, lengths, prompts, duplicates."""
    rows = [
        {"question": f"How many is {n}?", "answer": f"{n}\n#### {n}", "level": n} for n in (1, 2, 3)
    ]
    rows += [{"question": "What is it?", "answer": "#### x^2 + 1"}, rows[0]]
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "test.jsonl", rows[1], {"question": "New?", "answer": "#### 1,000"})
    short = ["--max_prompt_tokens=9", "--system_prompt=Ω"]
    with pytest.raises(SystemExit):  # all of them are too long, which train.py refuses too
        check_data.main(["--preset=tiny", f"--dataset={tmp_path}", *short])
    said = capsys.readouterr().out
    for words in (
        "train: 5 questions", "question: the question\n", "level: for reward functions, missing in 1 rows",
        "final answers, numbers: 4, such as '1', '2', '3'", "compared word by word: 1, such as 'x^2 + 1'",
        "5 above --max_prompt_tokens 9", "How many is 1?<|end|><|assistant|>'", "answer: '1'", "characters that the tokenizer cannot write",
        "test: 2 questions", "duplicates: 1 inside train", "1 questions of test stand in train too, such as 'How many is 2?'",
    ):  # fmt: skip
        assert words in said, words
    check_data.main(["--preset=tiny", f"--dataset={tmp_path / 'train.jsonl'}"])
    assert "test: none, --dataset is one file" in capsys.readouterr().out


def test_check_data_says_what_would_go_wrong_in_silence(tmp_path, capsys):
    """Two answers to one question; UTF-8 that was read as something else; a path that is not there."""
    row = {"question": "How many is 1?", "answer": "#### 1"}
    write(
        tmp_path / "train.jsonl", row, row | {"answer": "#### 2"}, row | {"question": "5 â€œapples"}
    )
    check_data.main(["--preset=tiny", f"--dataset={tmp_path / 'train.jsonl'}"])
    said = capsys.readouterr().out
    assert "one question has two answers, '1' and '2': 'How many is 1?'" in said
    assert "1 questions have signs of a wrong encoding, such as '5 â€œapples'" in said
    with pytest.raises(SystemExit):
        check_data.main(["--preset=tiny", f"--eval_dataset={tmp_path}/nothere"])
    assert f"There is no folder {tmp_path}/nothere; give --eval_dataset" in capsys.readouterr().err


def test_the_final_answer_is_the_rest_of_its_line(tmp_path):
    """MetaMathQA writes `The answer is: 5` once more below; others put a heading there."""
    for answer in ("s\n#### 5\nThe answer is: 5", "s\n####\n\n5\n## Check"):
        (found,) = load_questions(
            str(write(tmp_path / "x.jsonl", {"question": "q", "answer": answer})), "train"
        )
        assert found.reference == "5"


def test_references_that_are_no_number_are_said(capsys):
    def references(*texts):
        check_references([Question("q", text, "") for text in texts], "data.jsonl")
        return capsys.readouterr().out

    assert references("5", "6 (times)", "3 (square)", "1,000", "七十二") == ""
    said = (
        "1 of 2 final answers are no number, such as 'x^2 + 1': an answer must have the same words"
    )
    assert said in references("5", "x^2 + 1")
    assert "2 of 2" in references("Monday", "Tuesday or so"), "words are answers too"
    with pytest.raises(
        UserError, match="None of the final answers of data.jsonl .* as in 'see page 5 or 6'"
    ):
        references("see page 5 or 6", "as above")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: a row must be an object"),
        ('{"answer": "#### 1"}', "line 2: the column question is missing"),
        (
            '{"question": " ", "answer": "#### 1"}',
            "line 2: the column question is missing or empty",
        ),
        ('{"question": "q"}', "line 2: the column answer is missing"),
        ('{"question": "q", "answer": 5}', "line 2: the column answer is missing or is not text"),
        ('{"question": "q", "answer": "no marker"}', "line 2: answer has no '#### ' line"),
        ('{"question": "q", "answer": "#### "}', "line 2: the final answer is empty"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_questions(str(path), "train")
    assert "train.jsonl" in str(caught.value)


def test_other_files(tmp_path):
    """What people have: CSV, a JSON list, gzip, a folder of `save_to_disk`; each the same rows."""
    import datasets

    rows = [{"question": "a, b?", "answer": "s\n#### 5"}, {"question": "c", "answer": "#### 6"}]
    expected = [("a, b?", "5"), ("c", "6")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.csv").write_text('question,answer\n"a, b?","s\n#### 5"\nc,#### 6\n')
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "both")
    for name in ("rows.json", "lines.json", "rows.jsonl.gz", "rows.csv", "saved", "both"):
        found = load_questions(str(tmp_path / name), "train")
        assert [(q.question, q.reference) for q in found] == expected, name
    with pytest.raises(UserError, match="both has no split dev; it has train, test."):
        load_questions(str(tmp_path / "both"), "dev")
    for name, row in (("more", "How many is 1,000 plus 5?,#### 5"), ("fewer", "alone")):
        (tmp_path / f"{name}.csv").write_text(f"question,answer\n{row}\n")
        with pytest.raises(
            UserError, match=f"{name}.csv, row 1 has {name} cells than the first line"
        ):
            load_questions(str(tmp_path / f"{name}.csv"), "train")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:20])
    for name, message in (
        ("cut.jsonl.gz", "cannot be read"),
        ("bad.json", "bad.json, line 1: not valid JSON"),
    ):
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(UserError, match=message):
            load_questions(str(tmp_path / name), "train")


def test_a_hub_dataset_without_the_configuration_names_those_there_are(monkeypatch):
    import datasets

    def load(*arguments, **settings):
        raise ValueError("BuilderConfig 'main' not found. Available: ['default']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"not found. Available: \['default'\]\); choose one with --dataset_config"
    ):
        load_questions("some/dataset", "train")


def test_missing_things(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.parquet").write_text("not parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    for name, message in [
        ("nowhere.jsonl", "no file or folder"), ("notes.txt", "neither .jsonl, .parquet, .json nor .csv"), ("", "must hold one train"),
        ("empty.jsonl", "holds no questions"), ("bad.parquet", "cannot be read as Parquet"), ("latin.jsonl", "UTF-8"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_questions(str(tmp_path / name), "train")
    with pytest.raises(UserError, match="from the hub"):
        load_questions("no/such-dataset", "train")


def test_the_bundled_task():
    train, test = (load_questions("tiny/task", split) for split in ("train", "test"))
    assert len(train) == 3000 and len(test) == 500
    assert not {q.question for q in train} & {q.question for q in test}
    for q in train + test:
        steps = q.solution.splitlines()
        assert 2 <= len(steps) <= 4 and q.difficulty == ["easy", "middle", "hard"][len(steps) - 2]
        total = None
        for step in steps:
            left, right = step.split("=<<")[0], step.rpartition(">>")[2]
            assert eval(left) == int(right) and (total is None or left.startswith(str(total)))  # noqa: S307
            total = int(right)
        assert q.reference == str(total)


def questions(n):
    return [Question(str(i), "1", "") for i in range(n)]


def test_the_order_crosses_epochs_and_drops_nothing():
    """Fault 13: 17 of GSM8K's 7,473 questions did not fit the batch size and were left out of every epoch."""
    stream = QuestionStream(questions(10), seed=1)
    taken = [q.question for _ in range(10) for q in stream.take(7)]
    assert stream.position == 70
    for epoch in range(7):
        assert sorted(taken[epoch * 10 : epoch * 10 + 10]) == [str(i) for i in range(10)]
    assert taken[:10] != taken[10:20], "each epoch has an order of its own"
    assert len(QuestionStream(questions(3), 1).take(8)) == 8, "more than an epoch at once"


def test_the_order_is_seeded_and_resumes_from_its_position():
    whole = QuestionStream(questions(10), seed=1)
    first, second = whole.take(13), whole.take(13)
    assert QuestionStream(questions(10), seed=1, position=13).take(13) == second
    assert QuestionStream(questions(10), seed=2).take(13) != first


def test_prompts(tokenizer):
    made, dropped = with_prompts(
        [Question("Tom has 5 apples.", "5", ""), Question("Tom " * 50, "5", "")],
        tokenizer,
        Config(system_prompt="", max_prompt_tokens=20),
    )
    assert dropped == 1 and made[0].prompt == "<|user|>Tom has 5 apples.<|end|><|assistant|>"
    assert tokenizer.decode(made[0].prompt_ids) == made[0].prompt
    with pytest.raises(UserError, match="longer than --max_prompt_tokens 2"):
        with_prompts(questions(2), tokenizer, Config(system_prompt="", max_prompt_tokens=2))


def test_the_date_in_a_template_is_that_of_the_run(tokenizer, tmp_path):
    """Llama 3.2's template prints the day: a run that is resumed a day later would have other prompts."""
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}"
        )
        assert build_prompt("Q", tokenizer, "S", "2024-07-26") == "26 Jul 2024|S|Q>"
        old = Config(system_prompt="S", max_prompt_tokens=128, prompt_date="2024-07-26")
        assert with_prompts(questions(1), tokenizer, old)[0][0].prompt.startswith("26 Jul 2024")
    finally:
        tokenizer.chat_template = template
    Config().save(tmp_path / "config.yaml")
    assert f"prompt_date: '{date.today().isoformat()}'" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="--prompt_date is 'Monday'; write a day as 2026-11-25"):
        Config(prompt_date="Monday")


def test_an_end_token_behind_every_prompt_is_left_out(tokenizer):
    """As Llama's tokenizers put it there, if they are told to: the completion would begin after the end."""

    class Appends:
        chat_template, eos_token, eos_token_id = None, tokenizer.eos_token, tokenizer.eos_token_id

        def __call__(self, texts, **settings):
            ids = tokenizer(texts, **settings)["input_ids"]
            return {"input_ids": [row + [self.eos_token_id] for row in ids]}

    (made,), _ = with_prompts(questions(1), Appends(), BARE)
    assert made.prompt_ids[-1] != tokenizer.eos_token_id
    assert made.prompt_ids == tokenizer("Question: 0\n\nAnswer:")["input_ids"]


def test_prompts_of_other_templates(tokenizer):
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ m.content }}]{% endfor %}"
        assert build_prompt("Q", tokenizer, "S") == "[S\n\nQ][", (
            "no system role: in front of the question; and the answer begins behind a bracket"
        )
        no_start = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        tokenizer.chat_template = no_start
        assert build_prompt("Q", tokenizer, "S") == "<system>S</s><user>Q</s><assistant>"
        tokenizer.chat_template = "{% for m in messages %}{{ '[I] ' + m.content + ' [/I]' if m.role == 'user' else ' ' + m.content }}{% endfor %}"
        assert build_prompt("Q", tokenizer, "") == "[I] Q [/I]", "no words in front of an answer"
        no_system = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content | trim }}]{% endif %}{% endfor %}"
        tokenizer.chat_template = no_system
        assert build_prompt("How many?", tokenizer, "Be <b>.") == "[Be <b>.\n\nHow many?]", (
            "left out"
        )
        assert build_prompt("How many?", tokenizer, "") == "[How many?]"
        for drops in (
            "{{ messages[-1].content | replace('?', '') }}",
            "{{ messages[0].value }}<assistant>",
            "{{ messages[-1].content[0].text }}:",
            "Hello!",
        ):
            tokenizer.chat_template = drops
            with pytest.raises(
                UserError, match="The chat template of the model drops the question"
            ):
                build_prompt("How many?", tokenizer, "S")
        tokenizer.chat_template = None
        assert build_prompt("Q", tokenizer, "S") == "S\n\nQuestion: Q\n\nAnswer:"
    finally:
        tokenizer.chat_template = template
