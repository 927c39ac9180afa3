"""A rollout from a server keeps the contract of our own; and whatever a server does wrong is one sentence.

The server here is a thread that answers in vLLM's format with the bundled model and the adapters
that it was given. benchmarks/served.py asks a real one.
"""

import json
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import BARE, metrics
from test_adapters import fill_at_random
from test_rollout import plain_greedy

import train
from loss import sequences_log_probs
from objectives.table import OBJECTIVES, objective_of
from replay_buffer import pad_batch
from rollout import rollout
from support import generation, server
from support.checkpoint import checkpoints
from support.command_line import parse_config
from support.config import resolve_path
from support.data import load_questions
from support.errors import UserError
from support.generation import Sampling
from support.model import load_model, load_to_train
from support.policy import Policy
from support.preflight import check_sampler
from support.prompts import with_prompts
from support.served_rollout import ServedModel

pytest.importorskip("peft")

ADAPTED = replace(
    BARE, model="tiny/model", precision="fp32", adapter_rank=4, gradient_checkpointing=False,
    max_new_tokens=40, rollout_timeout=20.0,
)  # fmt: skip


class Answer(Exception):
    """What a spoiled server answers: a status and a body; without a status it hangs up."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": "base", "max_model_len": 512}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            with self.server.one_at_a_time:
                self.server.spoil(self.path, body)
                self.reply(200, self.server.answer(self.path.removeprefix("/v1/"), body))
        except Answer as spoiled:
            if spoiled.args:
                self.reply(*spoiled.args)
            else:
                self.close_connection = True

    def reply(self, status, body):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        with suppress(OSError):  # whoever has asked is no longer there
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def failure(status, words):
    return Answer(status, {"error": {"message": words, "type": "BadRequestError", "code": status}})


class FakeVLLM(ThreadingHTTPServer):
    """vLLM, as far as a rollout sees it."""

    daemon_threads = True

    def __init__(self, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokenizer, self.one_at_a_time = tokenizer, threading.Lock()
        self.adapters, self.seen, self.count = {}, [], 0
        self.spoil = lambda path, body: None
        self.changed = lambda choices: choices
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def answer(self, verb, body):
        return getattr(self, verb)(body)

    def load_lora_adapter(self, body):
        name, folder = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            raise failure(400, f"The lora adapter '{name}' has already been loaded.")
        self.adapters[name] = load_model(folder, "fp32")
        self.seen.append(name)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload_lora_adapter(self, body):
        self.adapters.pop(body["lora_name"], None)  # a test before may end late
        return "Success"

    def completions(self, body):
        if body["model"] not in self.adapters:
            raise failure(404, f"The model `{body['model']}` does not exist.")
        assert body["ignore_eos"] and body["top_k"] == 0 and body["repetition_penalty"] == 1
        self.count += 1
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"])
        ends = body["stop_token_ids"]
        settings = generation.generation_config(sampling, ends, self.tokenizer)
        batch = [(prompt, (self.count, i)) for i, prompt in enumerate(body["prompt"])]
        choices = []
        with torch.no_grad():
            rows = generation.generate(self.adapters[body["model"]], batch, sampling, settings)
        for i, (ids, found) in enumerate(rows):
            size = next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))
            log_probs = {"token_logprobs": found[:size]} if "logprobs" in body else None
            choices.append({"index": i, "token_ids": ids[:size], "logprobs": log_probs})
        return {"choices": self.changed(choices[::-1])}  # in any order


@pytest.fixture
def fake(tokenizer, monkeypatch):
    monkeypatch.setattr(server, "PAUSES", (0.01, 0.01))
    found = FakeVLLM(tokenizer)
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(scope="module")
def questions(tokenizer):
    """Of different lengths."""
    return with_prompts(load_questions(resolve_path("tiny/task"), "test")[:6], tokenizer, BARE)[0]


def refill(model, seed=0):
    """Adapters that change the model without making it babble."""
    fill_at_random(model, seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.5
    return model


def make_policy(url="", **changes):
    """The bundled model with adapters that are not 0; sampled from a server if there is a url."""
    config = replace(ADAPTED, rollout_url=url, **changes)
    policy = Policy(refill(load_to_train(config)), sequences_log_probs, config.temperature).eval()
    if url:
        policy.served = ServedModel(policy, config)
    return policy


LONG = Sampling(40)


def ask(policy, tokenizer, questions, group_size=3, sampling=LONG):
    return rollout(policy.sampler(), tokenizer, questions, group_size, sampling)


def gap(policy, groups):
    """The largest distance of a token's log-probability from the policy's own."""
    experiences = [e for group in groups for e in group.experiences]
    batch = pad_batch(experiences)
    with torch.no_grad():
        own = policy(batch)[0]
    return (own - batch.sampler_log_probs)[batch.action_mask].abs().max().item()


# ---------------------------------------------------------------------------- the contract


@pytest.fixture(params=["ours", "served"])
def url(request):
    """Each test of the contract is run with our own engine and with a server."""
    return request.getfixturevalue("fake").url if request.param == "served" else ""


def test_a_group_for_each_question_in_order(url, tokenizer, questions):
    policy = make_policy(url)
    for size in (4, 100):  # a batch cuts through groups
        groups = ask(policy, tokenizer, questions, 3, Sampling(24, batch_size=size))
        assert [g.question for g in groups] == questions
        assert [len(g.completions) for g in groups] == [3] * len(questions)
    assert len({tuple(c.ids) for g in groups for c in g.completions}) > len(questions)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_the_policys(url, tokenizer, questions, temperature):
    """At first, and after each change of the weights."""
    policy = make_policy(url, temperature=temperature)
    for seed in range(3):
        groups = ask(policy, tokenizer, questions, 4, Sampling(40, temperature))
        assert len({len(c.ids) for g in groups for c in g.completions}) > 2
        assert gap(policy, groups) < 1e-4
        before = groups
        refill(policy.model, seed + 1)
        assert gap(policy, before) > 0.01, "the weights have changed, or this compares nothing"


def test_completions_end_where_they_end(url, tokenizer, questions):
    """At any of several end tokens, which stays, or at the budget; and the text is without it."""
    policy, end = make_policy(url), tokenizer.eos_token_id
    first = [c for g in ask(policy, tokenizer, questions, 16) for c in g.completions]
    counts = Counter(token for c in first for token in {*c.ids} - {end})
    word = min(counts, key=lambda token: abs(counts[token] - len(first) / 2))
    policy.model.generation_config.eos_token_id = [end, word]
    seen = set()
    for budget in (4, 30):
        groups = ask(policy, tokenizer, questions, 16, Sampling(budget))
        for c in (c for group in groups for c in group.completions):
            last = c.ids[-1]
            seen.add("cut" if c.truncated else last)
            assert not {end, word} & {*c.ids[:-1]} and len(c.log_probs) == len(c.ids) <= budget
            assert c.truncated == (last not in (end, word)) and (
                len(c.ids) == budget or not c.truncated
            )
            assert c.text == tokenizer.decode([t for t in c.ids if t not in (end, word)])
    assert seen == {"cut", end, word}


def test_greedy_and_a_nucleus(url, tokenizer, questions):
    """Greedy is the slow twin's, without log-probabilities; of a nucleus of one token they are 0."""
    policy = make_policy(url)
    groups = ask(policy, tokenizer, questions, 1, Sampling(20, 0.0))
    for group in groups:
        (c,) = group.completions
        twin = plain_greedy(policy.model, group.question.prompt_ids, tokenizer.eos_token_id, 20)
        assert c.ids == twin and c.log_probs is None
    nucleus = ask(policy, tokenizer, questions, 1, Sampling(20, 1.0, 0.001))
    for one, other in zip(groups, nucleus, strict=True):
        assert one.completions[0].ids == other.completions[0].ids
        assert max(map(abs, other.completions[0].log_probs)) < 1e-6


def test_the_start_check(url, tokenizer, questions, capsys):
    """Of a policy that agrees, and of one that does not; a nucleus does not disturb it."""
    for wrong in (0.0, 0.002):
        policy = make_policy(url, top_p=0.5)
        sample = lambda *rest, p=policy: rollout(p.sampler(), tokenizer, *rest)  # noqa: E731
        real = policy.log_probs
        policy.log_probs = lambda *a, w=wrong, f=real: (f(*a)[0] + w, *f(*a)[1:])
        check = partial(check_sampler, sample, policy, pad_batch, questions, ADAPTED)
        if wrong:
            with pytest.raises(UserError, match="sampled from otherwise than it is trained"):
                check()
        else:
            check()
            assert "sampler and trainer give the same" in capsys.readouterr().out


# ---------------------------------------------------------------------------- the hand-over


def test_each_hand_over_has_a_new_name_and_the_old_one_goes(fake, tokenizer, questions):
    policy = make_policy(fake.url)
    ask(policy, tokenizer, questions[:1])
    ask(policy, tokenizer, questions[:1])  # the same weights: nothing is handed over
    assert len(fake.seen) == 1
    for seed in (1, 2):
        refill(policy.model, seed)
        ask(policy, tokenizer, questions[:1])
        assert list(fake.adapters) == fake.seen[-1:]
    assert len(set(fake.seen)) == 3
    assert [p.name for p in policy.served.folder.iterdir()] == fake.seen[-1:]
    other = make_policy(fake.url)  # another run, or this one resumed
    ask(other, tokenizer, questions[:1])
    assert len(set(fake.seen)) == 4
    policy.served.unload()  # what the end of the process does
    assert list(fake.adapters) == fake.seen[-1:]


def test_stale_weights_are_refused(fake, tokenizer, questions):
    """A server that goes on with what it has loaded first, and says that all is well."""

    def keep_first(path, body):
        if "load_lora" in path and fake.adapters:
            fake.adapters[body["lora_name"]] = next(iter(fake.adapters.values()))
            raise Answer(200, "Success")

    fake.spoil = keep_first
    policy = make_policy(fake.url)
    ask(policy, tokenizer, questions)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter *= 1.3
    for sampling in (Sampling(40), Sampling(40, 0.0)):  # training and evaluation
        with pytest.raises(UserError, match="samples from other weights than it was given"):
            ask(policy, tokenizer, questions, 3, sampling)


def test_raw_log_probabilities_are_refused(fake, tokenizer, questions):
    """vLLM's default, which leaves the temperature out."""

    def raw(choices):
        for choice in choices:
            values = choice["logprobs"]["token_logprobs"]
            choice["logprobs"]["token_logprobs"] = [0.6 * value for value in values]
        return choices

    fake.changed = raw
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        ask(make_policy(fake.url, temperature=0.6), tokenizer, questions, 3, Sampling(40, 0.6))


def test_an_adapter_that_another_program_has_unloaded(fake, tokenizer, questions):
    policy = make_policy(fake.url)
    ask(policy, tokenizer, questions)
    fake.adapters.clear()  # or the server was started again
    with pytest.raises(UserError, match=r"404: The model .* not exist.* It was started again"):
        ask(policy, tokenizer, questions)


def test_an_answer_that_was_lost_is_asked_for_again(fake, tokenizer, questions):
    """A hand-over that was made twice is one; and errors inside the server may pass."""
    lost, failed = [], []

    def lose(path, body):
        if "/load_lora" in path and not lost:
            lost.append(fake.answer("load_lora_adapter", body))
            raise Answer
        if "completions" in path and not failed:
            failed.append(path)
            raise Answer(503, "busy")

    fake.spoil = lose
    policy = make_policy(fake.url)
    assert gap(policy, ask(policy, tokenizer, questions)) < 1e-4 and lost and failed


# ---------------------------------------------------------------------------- what servers do wrong


def cut(choices):
    choices[0]["token_ids"] = choices[0]["token_ids"][:2]
    choices[0]["logprobs"]["token_logprobs"] = choices[0]["logprobs"]["token_logprobs"][:2]
    return choices


def of_one(change):
    """A change to one completion."""

    def changed(choices):
        change(choices[0])
        return choices

    return changed


WRONG = {
    "too few completions": (lambda choices: choices[1:], "there are 3 for 4 prompts"),
    "a completion that was cut": (cut, "stopped after 2 of 16 tokens without an end token"),
    "no tokens": (of_one(lambda c: c.update(token_ids=[])), "one has 0 tokens"),
    "too many tokens": (of_one(lambda c: c.update(token_ids=[5] * 99)), "one has 99 tokens"),
    "a token of another model": (of_one(lambda c: c["token_ids"].__setitem__(0, 121)), "of this model's 121"),
    "a log-probability too few": (
        of_one(lambda c: c["logprobs"]["token_logprobs"].pop()),
        r"tokens and \d+ log-probabilities",
    ),
    "NaN": (
        of_one(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, float("nan"))),
        "not a finite number",
    ),
    "null": (of_one(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None)), "not a finite"),
    "an old vLLM": (of_one(lambda c: c.pop("token_ids")), "not in vLLM's format .KeyError: 'token_i"),
    "no log-probabilities": (of_one(lambda c: c.update(logprobs=None)), "not in vLLM's format"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_completions_that_cannot_be_trained_on(fake, tokenizer, questions, wrong):
    fake.changed, says = WRONG[wrong]
    with pytest.raises(UserError, match=f"cannot be trained on: .*{says}"):
        ask(make_policy(fake.url), tokenizer, questions)


def test_a_server_that_is_too_slow(fake, tokenizer, questions):
    policy = make_policy(fake.url)
    ask(policy, tokenizer, questions)
    policy.served.server = replace(policy.served.server, timeout=0.3)
    fake.spoil = lambda path, body: "completions" in path and time.sleep(1)
    with pytest.raises(UserError, match="has not answered /v1/completions in 0.3 seconds"):
        ask(policy, tokenizer, questions)


def test_addresses_without_a_server(fake, tokenizer):
    with pytest.raises(UserError, match=r"cannot be reached.*ConnectionRefused"):
        make_policy("http://127.0.0.1:9")
    for answer in ({"object": "list", "data": []}, {"detail": "x"}, "<html>", [1]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Handler, "do_GET", lambda self, body=answer: self.reply(200, body))
            with pytest.raises(UserError, match="There is no vLLM server at"):
                make_policy(fake.url)
    with pytest.raises(
        UserError, match="reads 512 tokens at the most.*start it with --max-model-l"
    ):
        make_policy(fake.url, max_new_tokens=500)
    assert make_policy(f"{fake.url}/v1/").served.server.url == fake.url


def test_a_server_that_may_not_load(fake, tokenizer, questions):
    """Not started for it; or for smaller adapters."""
    for status, words in ((404, "Not Found"), (400, "LoRA rank 4 is greater than max_lora_rank 2")):

        def refuse(path, body, status=status, words=words):
            raise failure(status, words)

        fake.spoil = refuse
        with pytest.raises(UserError, match=f"{words}.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            ask(make_policy(fake.url), tokenizer, questions)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rollout_url=http://localhost:8000"], "needs adapters.*give --adapter_rank 16"),
        (["--rollout_url=localhost:8000", "--adapter_rank=4"], "write the address of a server"),
        (["--rollout_url=http://:80", "--adapter_rank=4"], "write the address of a server"),
        (["--rollout_url=http://a:b", "--adapter_rank=4"], "write the address of a server"),
        (["--rollout_timeout=0"], "must be more than 0"),
        (
            ["--rollout_url=http://a", "--adapter_rank=4", "--quantize=4bit"],
            "beside one that is rounded to 4 bits",
        ),
    ],
)
def test_settings_that_mean_nothing(flags, says):
    with pytest.raises(UserError, match=says):
        parse_config(["--preset=tiny", *flags])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_sampler_is_corrected_unless_the_flags_say_otherwise(objective):
    flags = ["--adapter_rank=4", f"--objective={objective}"]
    assert objective_of(parse_config(flags)[0]).sampler_correction == "none"
    flags.append("--rollout_url=http://localhost:8000")
    found = objective_of(parse_config(flags)[0])
    assert found.sampler_correction == f"{'sequence' if found.couples_tokens else 'token'}_truncate"
    without = objective_of(parse_config([*flags, "--sampler_correction=none"])[0])
    assert without.sampler_correction == "none"


# ---------------------------------------------------------------------------- whole runs


def test_a_run_and_a_server_that_dies_in_it(fake, tiny_run, capsys, tokenizer):
    """In a rollout, and in an evaluation: the finished step is saved, and the run goes on from it."""
    flags = ["--adapter_rank=4", "--reward=length_penalty", "--checkpoint_interval=100"]
    calls = []

    def die(path, body):
        """In the rollout of step 2; it takes as many requests until then."""
        calls.append(path)
        if sum("/load_lora" in each for each in calls) == 2 and "completions" in path:
            raise Answer

    fake.spoil = die
    with pytest.raises(SystemExit):
        tiny_run("run", *flags, f"--rollout_url={fake.url}", "--eval_interval=0")
    said = capsys.readouterr().err
    assert "cannot be reached, or has ended (RemoteDisconnected" in said and "--resume" in said
    folder = Path(said.split("--resume ")[1].strip().rstrip("."))
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-1"]

    def die_in_evaluation(path, body):
        if body.get("temperature") == 0:
            raise Answer(500, "EngineDeadError")

    fake.spoil = die_in_evaluation
    with pytest.raises(SystemExit):
        train.main([f"--resume={folder}", "--steps=4", "--eval_interval=3"])
    assert "EngineDeadError" in capsys.readouterr().err
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-1", "checkpoint-3"]
    fake.spoil = lambda path, body: None
    again = FakeVLLM(tokenizer)  # started again, elsewhere
    try:
        train.main([f"--resume={folder}", f"--rollout_url={again.url}"])
    finally:
        again.shutdown()
        again.server_close()
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and len(again.seen) == 2
    assert max(row["train/sampler_gap"] for row in rows) < 1e-4


def test_a_checkpoint_is_an_adapter_that_a_server_loads(fake, tiny_run):
    """As it is: the folder that a checkpoint is has the same two files."""
    run = tiny_run("run", "--adapter_rank=4", "--steps=2", "--eval_interval=0")
    fake.load_lora_adapter({"lora_name": "x", "lora_path": str(run / "checkpoint-2")})
    assert "x" in fake.adapters
