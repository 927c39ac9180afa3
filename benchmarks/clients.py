"""Does a checkpoint answer other programs as it answers us? Greedy, given the user's message alone.

    python benchmarks/clients.py --model runs/NAME
    python benchmarks/clients.py --model runs/NAME --url http://localhost:8000     vLLM, say, too

The system prompt of the training is in the checkpoint's chat template, so a client that knows
nothing of it should get the same answer, token for token. Asked are: transformers' pipeline,
`transformers serve` (started here, over HTTP), TRL's way to a prompt with transformers' generate,
lm-eval's Hugging Face model, and with --url any server that speaks OpenAI's chat API. Everything is
in fp32 on the CPU. Needs pip install "transformers[serving]" lm-eval trl; a client that is not
there is said.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, command_line, machine, positive, table, versions, write_lines

from rollout import rollout
from support.checkpoint import find_model
from support.command_line import Parser, parse_config
from support.config import Config
from support.data import Question
from support.errors import UserError, command
from support.evaluation import held_out_questions
from support.generation import Sampling
from support.model import load_model, load_tokenizer

Client = Callable[[list[str]], list[str]]
WAIT = 180  # seconds for a server to come up


def ours(folder: str, config: Config, questions: list[Question]) -> list[str]:
    """Our own answers, and whether none is cut off."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, "fp32")
    greedy = Sampling(config.max_new_tokens, temperature=0.0)
    groups = rollout(model, tokenizer, questions, 1, greedy)
    return [group.completions[0].text for group in groups]


def pipeline_client(folder: str, budget: int) -> Client:
    """transformers' text-generation pipeline."""
    from transformers import pipeline

    ask = pipeline("text-generation", model=folder, device="cpu", dtype="float32")

    def answers(texts: list[str]) -> list[str]:
        settings = {"max_new_tokens": budget, "do_sample": False, "return_full_text": False}
        chats = [[{"role": "user", "content": text}] for text in texts]
        return [ask(chat, **settings)[0]["generated_text"] for chat in chats]

    return answers


def trl_client(folder: str, budget: int) -> Client:
    """The prompt as TRL makes it of a chat, then generate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.data_utils import apply_chat_template

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    def answers(texts: list[str]) -> list[str]:
        found = []
        for text in texts:
            chat = {"prompt": [{"role": "user", "content": text}]}
            prompt = apply_chat_template(chat, tokenizer)["prompt"]
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=budget, do_sample=False)
            own = out[0, ids["input_ids"].shape[1] :]
            found.append(tokenizer.decode(own, skip_special_tokens=True))
        return found

    return answers


def lm_eval_client(folder: str, budget: int) -> Client:
    """lm-eval's model for Hugging Face folders, with the chat template."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    settings = {"until": [], "max_gen_toks": budget, "do_sample": False}

    def answers(texts: list[str]) -> list[str]:
        prompts = [model.apply_chat_template([{"role": "user", "content": t}]) for t in texts]
        requests = [
            Instance("generate_until", {}, (prompt, dict(settings)), i)
            for i, prompt in enumerate(prompts)
        ]
        return model.generate_until(requests, disable_tqdm=True)

    return answers


def http_client(url: str, model: str, budget: int) -> Client:
    """A server that speaks OpenAI's chat API."""

    def answers(texts: list[str]) -> list[str]:
        found = []
        for text in texts:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": budget,
                "temperature": 0,
            }
            asked = urllib.request.Request(
                f"{url}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=WAIT) as answer:
                found.append(json.load(answer)["choices"][0]["message"]["content"])
        return found

    return answers


def served(folder: str, budget: int, texts: list[str]) -> list[str]:
    """The answers of `transformers serve`, which is started and ended here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    flags = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    flags += ["--dtype", "float32"]
    server = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
        while time.monotonic() < end and server.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return http_client(url, folder, budget)(texts)
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        raise RuntimeError(server.communicate(timeout=30)[1].decode().strip().splitlines()[-1])
    finally:
        server.kill()


def compare(name: str, ask: Callable[[], list[str]], expected: list[str]) -> list[str]:
    """A row: how many answers are ours, and the first that is not."""
    try:
        found = ask()
    except Exception as error:  # each client has its own kinds
        return [name, "not tried", " ".join(f"{type(error).__name__}: {error}".split())[:200]]
    pairs = zip(found, expected, strict=True)
    other = [(a, b) for a, b in pairs if a.strip() != b.strip()]
    words = f"{other[0][0][:100]!r} for our {other[0][1][:100]!r}" if other else ""
    return [name, f"{len(expected) - len(other)} of {len(expected)}", words]


@command
def main(argv: list[str]) -> None:
    """Ask all of them the same held-out questions, and write results/clients.md."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run folder or a checkpoint")
    parser.add_argument("--questions", type=positive, default=8)
    parser.add_argument("--url", action="append", default=[], help="of a server that runs already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    folder = find_model(args.model)
    if not Path(folder, "config.yaml").is_file():
        raise UserError(f"{folder} is no checkpoint of a run: it has no config.yaml.")
    config, _ = parse_config([f"--config={folder}/config.yaml"])
    questions = held_out_questions(config, load_tokenizer(folder))[: args.questions]
    texts, budget = [question.question for question in questions], config.max_new_tokens
    expected = ours(folder, config, questions)
    clients = {
        "transformers' pipeline": lambda: pipeline_client(folder, budget)(texts),
        "`transformers serve`": lambda: served(folder, budget, texts),
        "TRL's prompt, `generate`": lambda: trl_client(folder, budget)(texts),
        "lm-eval's `hf` model": lambda: lm_eval_client(folder, budget)(texts),
    }
    for url in args.url:
        clients[f"a server at {url.split('//')[-1]}"] = lambda url=url: http_client(
            url, folder, budget
        )(texts)
    rows = []
    for name, ask in clients.items():
        rows.append(compare(name, ask, expected))
        print(*rows[-1], flush=True)
    prompt = f"the system prompt `{config.system_prompt}`" if config.system_prompt else "no prompt"
    lines = [
        f"`{command_line(argv)}` on {machine()}; {versions()}.",
        "",
        f"Greedy answers to {len(questions)} held-out questions, given to each client as the "
        f"user's message alone; trained with {prompt}. Same as ours, to the character:",
        "",
        *table(["client", "same", "first difference"], rows),
    ]
    write_lines(args.out / "clients.md", lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
