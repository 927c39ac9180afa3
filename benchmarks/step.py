"""How long does a step take? train.py, TRL's GRPOTrainer and the tutorial's way, side by side.

    python benchmarks/step.py --install          makes an environment with TRL (once) and compares
    python benchmarks/step.py --env DIR --tune   TRL from DIR, at its fastest batch size
    python benchmarks/step.py --workload smollm2 --model FOLDER --dataset FOLDER --precision fp32
    python benchmarks/step.py --workload gpu --ours="--micro_batch_size 16"

Each contender is a process of its own that lives as long as the comparison. It makes one step for
each line that it is sent and answers with one line, so only one computes at a time; they take turns
step by step, in rotating order. The first steps are not counted. All of them have the same weights,
the same prompts in the same order, the same number of completions and of tokens at the most, the
same rewards, KL, precision and learning rate, and make one optimizer step of the whole rollout.
What they sample differs, so the tokens are in the table too.

Ours is train.py's loop, without evaluation and log. TRL generates with plain transformers; its
seconds are those between its own on_step_begin and on_step_end. The tutorial's way is
benchmarks/tutorial.py. A `rollout` includes the decoding of ours and of TRL; `rest` is rewards,
advantages and (TRL) the padding of batches.

Results: results/step-WORKLOAD.md, and every step, the uncounted ones included, in
results/step-WORKLOAD.jsonl.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    RESULTS,
    ROOT,
    available,
    command_line,
    folder_of,
    machine,
    positive,
    synchronize,
    table,
    whole,
    write_lines,
)

from reward import REWARDS
from support.command_line import Parser, parse_config
from support.config import Config, resolve_path
from support.data import Question, QuestionStream
from support.errors import UserError, command
from support.model import (
    build_accelerator,
    build_optimizer,
    load_model,
    load_tokenizer,
    set_learning_rate,
)
from support.prompts import training_questions
from support.user_rewards import load_rewards

# Where benchmarks/conformance.py --install puts it.
CACHE = Path.home() / ".cache" / "pocket-grpo" / "conformance"
COMMON = (
    "--objective grpo --clip_eps 0.2 --epochs_per_step 1 --temperature 1 --top_p 1 --warmup_steps "
    "0 --weight_decay 0 --max_norm 1 --eval_interval 0 --steps 1000000"
)
WORKLOADS = {
    "bundled": (
        "--preset tiny --precision fp32 --rollouts_per_step 32 --group_size 8 --max_new_tokens 48 "
        "--train_batch_size 256 --kl_weight 0"
    ),
    "smollm2": (
        "--device auto --rollouts_per_step 4 --group_size 8 --max_new_tokens 64 --train_batch_size "
        "32 --kl_weight 0.01"
    ),
    "gpu": (
        "--device cuda --rollouts_per_step 32 --group_size 12 --max_new_tokens 512 "
        "--train_batch_size 384 --kl_weight 0.01"
    ),
}
NAMES = {"ours": "ours", "trl": "TRL's GRPOTrainer", "tutorial": "the tutorial's way"}
PARTS = ("rollout", "log_probs", "update", "rest")


# --------------------------------------------------------------------- a contender's process


class Talk:
    """The worker's side: a line in is a step to make, a line out is what it took."""

    def __init__(self) -> None:
        self.lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what anybody else prints is no answer

    def say(self, **row: Any) -> None:
        """One line out."""
        print(json.dumps(row), file=self.lines, flush=True)

    def wait(self) -> bool:
        """Do nothing until there is a line; False when there will be none."""
        return bool(sys.stdin.readline())

    def ready(self, **versions: str) -> None:
        """Everything is loaded."""
        own = {"torch": torch.__version__, "transformers": transformers.__version__}
        threads = torch.get_num_threads()
        self.say(versions=own | versions, loaded_gb=peak_gb(), threads=threads)

    def answer(self, seconds: float, tokens: int, spent: dict[str, float]) -> None:
        """A step: its seconds, the tokens that it sampled, the seconds of its parts."""
        parts = {part: spent[part] for part in PARTS if part != "rest"}
        parts["rest"] = seconds - sum(parts.values())
        self.say(seconds=seconds, **parts, tokens=tokens, peak_gb=peak_gb())


def peak_gb() -> float:
    """Peak memory in GB: torch's on the GPU, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def now() -> float:
    """The clock, once the GPU has done what it was given."""
    synchronize()
    return time.perf_counter()


def ours(config: Config, job: dict[str, Any], talk: Talk) -> None:
    """train.py's loop."""
    import train  # here, since the environment with TRL has no tensorboard
    from support.schedule import seed_step

    trainer = train.build(config, None)
    trainer.monitor.show_completions = lambda *_: None  # there is no log

    def steps() -> Iterator[tuple[int, torch.Generator]]:
        step, start = 0, 0.0
        while True:
            if step:
                answer_for(trainer, now() - start, talk)
            if not talk.wait():
                return
            step, start = step + 1, now()
            set_learning_rate(trainer.optimizer, config, step)
            yield step, seed_step(config.seed, step)

    talk.ready()
    train.train(trainer, steps())


def answer_for(trainer: Any, seconds: float, talk: Talk) -> None:
    """Say what train.py's own clocks have counted in a step."""
    sums = {name: float(total) for name, (total, _) in trainer.monitor.sums.items()}
    trainer.monitor.sums.clear()
    spent = {part: sums.get(f"time/{part}", 0.0) for part in PARTS}
    talk.answer(seconds, int(sums["rollout/completion_tokens"]), spent)


def stream(config: Config, tokenizer: Any) -> QuestionStream:
    """The questions in the order that train.py has them in."""
    with redirect_stdout(sys.stderr):
        return QuestionStream(training_questions(config, tokenizer), config.seed)


def tutorial(config: Config, job: dict[str, Any], talk: Talk) -> None:
    """benchmarks/tutorial.py."""
    import tutorial

    device, tokenizer = build_accelerator(config).device, load_tokenizer(config.model)
    questions, rewards = stream(config, tokenizer), load_rewards(config.reward, REWARDS)
    torch.manual_seed(config.seed)
    model = load_model(config.model, config.precision, config.gradient_checkpointing).to(device)
    reference = load_model(config.model, config.precision).to(device) if config.kl_weight else None
    optimizer = build_optimizer(model, config)
    talk.ready()
    while talk.wait():
        start = now()
        batch = questions.take(config.rollouts_per_step)
        found = tutorial.step(model, reference, tokenizer, optimizer, batch, rewards, config)
        talk.answer(now() - start, found["tokens"], found)


class Done(Exception):
    """No further step is wanted; TRL's loop has no other way out before it begins one."""


class Watch(transformers.TrainerCallback):
    """Holds TRL's loop before each step until there is a line, and takes the time of its parts."""

    def __init__(self, talk: Talk, completions: int) -> None:
        self.talk = talk
        self.completions = completions
        self.inside = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait; the data loader has the prompts, nothing has been sampled."""
        if not self.talk.wait():
            raise Done
        self.spent = dict.fromkeys(("prepare", "rollout", "log_probs"), 0.0)
        self.tokens, self.inside, self.start = [], True, now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has made its step."""
        seconds, self.inside = now() - self.start, False
        if len(self.tokens) != self.completions:
            count = len(self.tokens)
            raise UserError(f"TRL sampled {count} completions in a step, not {self.completions}.")
        update = seconds - self.spent["prepare"]
        self.talk.answer(seconds, sum(self.tokens), self.spent | {"update": update})

    def over(self, trainer: Any) -> None:
        """Put the clock around TRL's own methods."""
        always, without_gradient = lambda: True, lambda: not torch.is_grad_enabled()
        self.wrap(trainer, "_generate_and_score_completions", "prepare", always)
        self.wrap(trainer, "_generate", "rollout", always)
        self.wrap(trainer, "_get_per_token_logps_and_entropies", "log_probs", without_gradient)
        generate = trainer._generate_single_turn

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = generate(*args, **kwargs)
            self.tokens += [len(ids) for ids in result[0]]
            return result

        trainer._generate_single_turn = counted

    def wrap(self, trainer: Any, method: str, part: str, counts: Callable[[], bool]) -> None:
        """Add the seconds of a method to a part, where they count."""
        inner = getattr(trainer, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not counts():
                return inner(*args, **kwargs)
            if not self.inside:
                raise UserError(f"TRL called {method} outside a step: its seconds mean nothing.")
            start = now()
            result = inner(*args, **kwargs)
            self.spent[part] += now() - start
            return result

        setattr(trainer, method, timed)


def trl_settings(config: Config, job: dict[str, Any], folder: str) -> dict[str, Any]:
    """GRPOConfig's arguments: our step in TRL's words."""
    size, cuda = job["batch"], available(config.device) == "cuda"
    pure = config.precision == "bf16-pure"
    sampling = {
        "num_generations": config.group_size,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "reward_weights": config.reward_weights,
        "shuffle_dataset": False,
    }
    update = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": config.sequences_per_step // size,
        "loss_type": "grpo",
        "beta": config.kl_weight,
        "epsilon": config.clip_eps,
        "num_iterations": 1,
        "scale_rewards": "group",
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_norm,
    }
    model = {
        "bf16": config.precision == "bf16",
        "model_init_kwargs": {"dtype": "bfloat16" if pure else "float32"},
        "disable_dropout": True,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
    }
    nothing_else = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")
    nothing_else |= {"report_to": [], "disable_tqdm": True, "output_dir": folder}
    run = {"max_steps": job["steps"] + 1, "seed": config.seed}
    return sampling | update | model | nothing_else | run


def trl(config: Config, job: dict[str, Any], talk: Talk) -> None:
    """TRL's GRPOTrainer, left as it is but for the clocks."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl import __version__ as version

    tokenizer = load_tokenizer(config.model)
    questions = stream(config, tokenizer).take(config.rollouts_per_step * (job["steps"] + 1))
    watch = Watch(talk, config.sequences_per_step)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=resolve_path(config.model),
            reward_funcs=list(load_rewards(config.reward, REWARDS).values()),
            args=GRPOConfig(**trl_settings(config, job, folder)),
            train_dataset=Dataset.from_list(
                [{"prompt": q.prompt, "reference": q.reference} for q in questions]
            ),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        check_prompts(questions, trainer)
        watch.over(trainer)
        talk.ready(trl=version)
        try:
            trainer.train()
        except Done:
            return


def check_prompts(questions: list[Question], trainer: Any) -> None:
    """UserError unless TRL makes the same tokens of each prompt."""
    theirs = trainer._tokenize_prompts([q.prompt for q in questions])[0]
    for question, ids in zip(questions, theirs, strict=True):
        if list(ids) != question.prompt_ids:
            raise UserError(
                f"TRL reads other tokens in the prompt of {question.question!r}; nothing can be "
                "compared."
            )


CONTENDERS: dict[str, Callable[[Config, dict[str, Any], Talk], None]] = {
    "ours": ours,
    "trl": trl,
    "tutorial": tutorial,
}


def work(job: dict[str, Any]) -> None:
    """The whole life of a contender's process; a UserError is said to the parent."""
    talk = Talk()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    try:
        CONTENDERS[job["contender"]](parse_config(job["flags"])[0], job, talk)
    except UserError as error:
        talk.say(error=str(error))


# --------------------------------------------------------------------- the parent


class Worker:
    """A contender's process, seen from outside."""

    def __init__(self, name: str, python: str, job: dict[str, Any]) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        arguments = [python, __file__, "--worker", json.dumps({"contender": name, **job})]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(arguments, text=True, **pipes)
        self.about = self.hear()

    def hear(self) -> dict[str, Any]:
        """The next answer; UserError if there is none."""
        line = self.process.stdout.readline()
        row = json.loads(line) if line else {}
        if not line:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["it said nothing"])[-1]
            row["error"] = f"it ended with exit code {self.process.wait()}: {last[:300]}"
        if "error" in row:
            raise UserError(f"{NAMES[self.name]}: {row['error']}")
        return row

    def step(self) -> dict[str, Any]:
        """Let it make one step."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; `hear` says why
            print(file=self.process.stdin, flush=True)
        return self.hear()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def tuned(python: str, job: dict[str, Any], sequences: int, sizes: list[int]) -> int:
    """TRL's fastest per_device_train_batch_size: a step to warm up and two that count, for each."""
    found = {}
    for size in (s for s in sizes if sequences % s == 0):
        worker = None
        try:
            worker = Worker("trl", python, job | {"batch": size})
            found[size] = min([worker.step()["seconds"] for _ in range(3)][1:])
            print(f"TRL with batches of {size}: {found[size]:.2f} s", flush=True)
        except UserError as error:  # too large for the memory, say
            print(f"TRL with batches of {size}: {error}", flush=True)
        finally:
            if worker:
                worker.close()
    if not found:
        raise UserError(
            f"TRL made no step with any of the batch sizes {sizes} (they must divide {sequences})."
        )
    return min(found, key=found.get)


def compare(workers: list[Worker], warmup: int, steps: int, log: Path) -> list[dict[str, Any]]:
    """Let them take turns; every step as a row."""
    rows = []
    with log.open("w", encoding="utf-8") as file:
        for step in range(warmup + steps):
            turn = step % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                row = {"contender": worker.name, "step": step + 1, "counted": step >= warmup}
                row |= worker.step()
                rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
                print(json.dumps(rows[-1]), file=file, flush=True)
                print(f"step {step + 1}, {NAMES[worker.name]}: {row['seconds']:.2f} s", flush=True)
    return [row for row in rows if row["counted"]]


def summary(
    rows: list[dict[str, Any]], workers: list[Worker], settings: dict[str, str]
) -> list[str]:
    """One line for each contender: medians over its counted steps."""
    head = ["", "s per step", "÷ ours (by step)", *(part.replace("_", "-") for part in PARTS)]
    head += ["tokens", "tokens/s of rollout", "tokens/s of step"]
    head += ["peak memory, GB (loaded)", "setting"]
    median, cells = statistics.median, []
    base = [row["seconds"] for row in rows if row["contender"] == "ours"]
    for worker in workers:
        mine = [row for row in rows if row["contender"] == worker.name]
        seconds = [row["seconds"] for row in mine]
        ratio = "–"
        if base:
            each = [a / b for a, b in zip(seconds, base, strict=True)]
            ratio = f"{median(seconds) / median(base):.2f} ({min(each):.2f}–{max(each):.2f})"
        line = [NAMES[worker.name], f"{median(seconds):.2f}", ratio]
        line += [f"{median(row[part] for row in mine):.2f}" for part in PARTS]
        line.append(f"{median(row['tokens'] for row in mine):.0f}")
        for of in ("rollout", "seconds"):
            line.append(f"{median(row['tokens'] / row[of] for row in mine):.0f}")
        line.append(f"{mine[-1]['peak_gb']:.2f} ({worker.about['loaded_gb']:.2f})")
        cells.append([*line, settings[worker.name]])
    return table(head, cells)


def report(
    rows: list[dict[str, Any]],
    workers: list[Worker],
    configs: dict[str, Config],
    batch: int,
    args: argparse.Namespace,
    missing: str,
) -> list[str]:
    """The whole of results/step-WORKLOAD.md."""
    versions = {k: v for worker in workers for k, v in worker.about["versions"].items()}
    config = next(iter(configs.values()))
    place = machine(available("auto"))
    settings = {
        name: f"`micro_batch_size {c.micro_batch_size or 'auto'}`" for name, c in configs.items()
    }
    fastest = ", the fastest" if args.tune else ""
    settings["trl"] = f"`per_device_train_batch_size {batch}`{fastest}"
    if args.ours:
        settings["ours"] += f", `{args.ours}`"
    kl = f"KL weight {config.kl_weight:g} to a reference" if config.kl_weight else "no KL"
    checkpointing = "" if config.gradient_checkpointing else "no "
    return [
        f"`{command_line(args.given)}` on {place}, {workers[0].about['threads']} threads; Python "
        f"{platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        f"{Path(config.model).name}, {config.rollouts_per_step} questions × {config.group_size} "
        f"completions of up to {config.max_new_tokens} tokens, {config.precision}, {kl}, "
        f"{checkpointing}gradient checkpointing; one optimizer step of the whole rollout. Medians "
        f"of {args.steps} steps after {args.warmup} that are not counted, taking turns. Loaded: "
        f"peak memory before the first step.{missing}",
        "",
        *summary(rows, workers, settings),
    ]


# --------------------------------------------------------------------- the command line


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, read and checked."""
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=how, allow_abbrev=False)
    flag, contenders = parser.add_argument, list(CONTENDERS)
    flag("--workload", choices=list(WORKLOADS), default="bundled")
    flag("--model", help="in the place of the workload's; smollm2 needs it")
    flag("--dataset", help="as train.py's; smollm2 needs it")
    flag("--precision", choices=["bf16", "bf16-pure", "fp32"], help="in the workload's place")
    flag("--only", nargs="+", choices=contenders, default=contenders)
    flag("--ours", default="", help="train.py's flags for ours alone: --ours='--a 1 --b 2'")
    flag("--tutorial", default="--micro_batch_size 16", help="the same for the tutorial's way")
    flag("--all", default="", help="the same for all, TRL too where it has the setting")
    flag("--trl_batch_size", type=positive, default=32, help="TRL's per_device_train_batch_size")
    flag("--tune", action="store_true", help="try the sizes below for TRL; take the fastest")
    flag("--tune_sizes", type=positive, nargs="+", default=[8, 16, 32, 64, 128, 256])
    flag("--steps", type=positive, default=5, help="counted steps of each")
    flag("--warmup", type=whole, default=2, help="steps before them")
    flag("--threads", type=positive, help="torch's CPU threads (default: its own choice)")
    flag("--env", type=Path, help="an environment with trl (default: that of --install)")
    flag("--install", action="store_true", help="make it first, as conformance.py does")
    flag("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.given = argv
    if args.workload == "smollm2" and not (args.model and args.dataset):
        raise UserError(
            "--workload smollm2 needs --model FOLDER (SmolLM2-135M-Instruct) and --dataset FOLDER "
            "(GSM8K)."
        )
    if args.workload == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "--workload gpu needs a CUDA GPU and there is none here; bundled and smollm2 run on "
            "any machine."
        )
    for name in ("model", "dataset"):
        value = getattr(args, name)
        if value and value.startswith((".", "/", "~")) and not Path(value).expanduser().exists():
            raise UserError(f"There is no folder {value}; give --{name} one that is there.")
    return args


def flags(args: argparse.Namespace) -> dict[str, list[str]]:
    """train.py's flags for each contender."""
    same = f"{COMMON} {WORKLOADS[args.workload]}".split()
    for name in ("model", "dataset", "precision"):
        value = getattr(args, name)
        if value:
            same.append(f"--{name}={Path(value).expanduser() if value[0] == '~' else value}")
    try:
        everywhere, ours_alone, others = map(shlex.split, (args.all, args.ours, args.tutorial))
    except ValueError as error:
        raise UserError(
            f"--all, --ours and --tutorial take flags as a shell does ({error})."
        ) from error
    same += everywhere
    return {"ours": same + ours_alone, "trl": same, "tutorial": same + others}


def find_trl(args: argparse.Namespace) -> str | None:
    """An interpreter that has TRL, or None."""
    folder = (args.env or CACHE).expanduser()
    if args.install:  # its --help in the environment, once that is made
        script = str(ROOT / "benchmarks/conformance.py")
        maker = [sys.executable, script, "--install", "--env", str(folder), "--help"]
        if subprocess.run(maker, stdout=subprocess.DEVNULL).returncode:
            raise UserError(
                f"The environment {folder} could not be made; what pip says of it stands above."
            )
    inside = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if args.env and not inside.exists():
        raise UserError(f"There is no virtual environment in {args.env}; add --install to make it.")
    candidates = [str(inside)] if args.env else [str(inside), sys.executable]
    for python in filter(os.path.exists, candidates):
        if subprocess.run([python, "-c", "import trl"], capture_output=True).returncode == 0:
            return python
    return None


@command
def main(argv: list[str]) -> None:
    """Compare, print, write."""
    if argv[:1] == ["--worker"]:
        work(json.loads(argv[1]))
        return
    args = arguments(argv)
    names, flagged, missing = [n for n in CONTENDERS if n in args.only], flags(args), ""
    configs = {name: parse_config(flagged[name])[0] for name in names}
    pythons = dict.fromkeys(names, sys.executable)
    if "trl" in names:
        pythons["trl"] = find_trl(args)
        if not pythons["trl"]:
            missing = " TRL is not installed here, so it takes no part: add --install."
            print(missing.strip(), flush=True)
            names.remove("trl")
            configs.pop("trl")
    jobs = {
        n: {"flags": flagged[n], "steps": args.warmup + args.steps, "threads": args.threads}
        for n in names
    }
    batch, workers = args.trl_batch_size, []
    if "trl" in names:
        sequences = configs["trl"].sequences_per_step
        if args.tune:
            batch = tuned(pythons["trl"], jobs["trl"] | {"steps": 3}, sequences, args.tune_sizes)
        elif sequences % batch:
            raise UserError(
                f"--trl_batch_size {batch} does not divide the {sequences} completions of a step."
            )
        jobs["trl"]["batch"] = batch
    folder_of(args.out)
    try:
        for name in names:  # one after the other, so that each one loads alone
            workers.append(Worker(name, pythons[name], jobs[name]))
        rows = compare(workers, args.warmup, args.steps, args.out / f"step-{args.workload}.jsonl")
        lines = report(rows, workers, configs, batch, args, missing)
    finally:
        for worker in workers:
            worker.close()
    print("\n".join(["", *lines]))
    write_lines(args.out / f"step-{args.workload}.md", lines)


if __name__ == "__main__":
    main()
