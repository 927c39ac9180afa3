"""Make everything in this folder: the word problems, the tokenizer and the warm-started tiny model.

    python tiny/make.py     about three minutes on two CPU cores; the same files on the same machine

task/   word problems of two to four steps in GSM8K's own format, train.jsonl and test.jsonl; no
        problem is in both
model/  a Llama of 0.8 M parameters, warm-started by sft.py in two rounds on other problems, all
        solved correctly:
        school, 900 steps: it learns to calculate, with every step of the working shown
        habits, 300 steps: 60 % answer at once, 32 % show their working, 8 % forget the answer tag

A network this small cannot do four steps in its head, but it can on paper. After the second round
it answers at once most of the time, and mostly wrong; that showing the work pays is what GRPO is
left to discover. (In one round of the three habits alone it needs far more steps to learn to
calculate, and by then it half knows the answers by heart.)
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sft  # noqa: E402  (found through the line above)

TRAIN, TEST, WARM = 3000, 500, 40000
NAMES = ["Tom", "Mary", "Ben", "Anna", "Sam", "Lily", "Max", "Emma", "Leo", "Nina", "Paul", "Zoe"]
THINGS = ["apples", "books", "coins", "pens", "cards", "eggs", "shells", "stamps", "balls", "cups"]
GAINS = ["finds {n} more", "buys {n} more", "gets {n} from {other}", "picks up {n} more"]
LOSSES = ["gives {n} to {other}", "loses {n}", "sells {n}", "drops {n}"]
DOUBLES = ["doubles the number"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
# The end token also closes the user's turn, as in the templates of Qwen and Llama 3.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def problem(steps: int, rng: random.Random) -> dict[str, str]:
    """One word problem with its worked solution, in GSM8K's format; no number in it exceeds 40."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    total = rng.randint(5, 20)
    story, working = [f"{name} has {total} {thing}."], []
    for _ in range(steps):
        sign = rng.choice(["+"] * (total <= 31) + ["-"] * (total >= 3) + ["*"] * (total <= 10))
        n = {"+": rng.randint(2, 9), "-": rng.randint(1, max(1, min(9, total - 1))), "*": 2}[sign]
        result = {"+": total + n, "-": total - n, "*": total * n}[sign]
        phrase = rng.choice({"+": GAINS, "-": LOSSES, "*": DOUBLES}[sign])
        story.append(f"{name} {phrase.format(n=n, other=other)}.")
        working.append(f"{total}{sign}{n}=<<{total}{sign}{n}={result}>>{result}")
        total = result
    story.append(f"How many {thing} does {name} have?")
    return {"question": " ".join(story), "answer": "\n".join([*working, f"#### {total}"])}


def problems(count: int, rng: random.Random, taken: set[str]) -> list[dict[str, str]]:
    """`count` problems that are not in `taken`, a third of each length; adds them to `taken`."""
    rows = []
    while len(rows) < count:
        row = problem(2 + len(rows) % 3, rng)
        if row["question"] not in taken:
            taken.add(row["question"])
            rows.append(row)
    return rows


def completion(row: dict[str, str], weights: tuple[float, float, float], rng: random.Random) -> str:
    """A correct completion in one of three habits, drawn with `weights`.

    The answer at once; the working shown; the answer without its tag.
    """
    working, _, answer = row["answer"].rpartition("\n#### ")
    shown = f"<think>{sft.CALCULATOR.sub('', working)}</think>"
    tagged = f"<answer>{answer}</answer>"
    return rng.choices([tagged, shown + tagged, answer], weights)[0]


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words with the space before them, single digits: nothing of the task's text is lost."""
    phrases = " ".join(GAINS + LOSSES + DOUBLES).replace("{n}", "").replace("{other}", "")
    words = [*NAMES, *THINGS, *phrases.split(), *["has", "does", "have", "How", "many"]]
    marks = [*"0123456789", *(f" {d}" for d in range(10)), *"+-*=.?", "\n", " "]
    special = [UNKNOWN, PAD, END, USER, ASSISTANT]
    tokens = [*special, *TAGS, *marks, *words, *(f" {word}" for word in words)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?[A-Za-z]+| ?\d|[^\sA-Za-z\d]|\s"), "isolated"
    )
    core.decoder = decoders.Fuse()
    # Ordinary added tokens: special ones would be dropped from the decoded text, and the reward
    # would never see them.
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    core.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in (PAD, END, USER, ASSISTANT)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )
    fast.chat_template = TEMPLATE
    return fast


def blank_model(vocabulary: int, end: int, pad: int) -> LlamaForCausalLM:
    """The untrained network."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=end, pad_token_id=pad,
    ))  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def warm_start(
    name: str, rows: list[dict[str, str]], start: Path, scratch: Path, *flags: str
) -> Path:
    """One round of sft.py on `rows`, from the model in `start`; returns the new model's folder."""
    write_rows(scratch / name / "train.jsonl", rows)
    sft.main([
        "--preset=tiny", "--device=cpu", "--seed=0", f"--model={start}",
        f"--dataset={scratch / name}", "--train_batch_size=32", "--micro_batch_size=32",
        "--warmup_steps=50", f"--run_dir={scratch / name / 'run'}", *flags,
    ])  # fmt: skip
    return scratch / name / "run" / "model"


def main() -> None:
    """Write task/ and model/."""
    rng, taken = random.Random(0), set()
    write_rows(HERE / "task" / "test.jsonl", problems(TEST, rng, taken))
    write_rows(HERE / "task" / "train.jsonl", problems(TRAIN, rng, taken))
    warm = problems(WARM, rng, taken)
    school = [{**row, "completion": completion(row, (0, 1, 0), rng)} for row in warm]
    habits = [{**row, "completion": completion(row, (0.60, 0.32, 0.08), rng)} for row in warm]
    words = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = blank_model(len(words), words.eos_token_id, words.pad_token_id)
        print(f"{model.num_parameters():,} parameters, {len(words)} tokens")
        for part in (model, words):
            part.save_pretrained(scratch / "blank")
        start = scratch / "blank"
        start = warm_start("school", school, start, scratch, "--steps=900", "--lr=2e-3")
        start = warm_start("habits", habits, start, scratch, "--steps=300", "--lr=5e-4")
        trained = LlamaForCausalLM.from_pretrained(start, dtype=torch.bfloat16)
        for part in (trained, words):
            part.save_pretrained(HERE / "model")


if __name__ == "__main__":
    main()
