"""serve.py, asked over real connections: the same answers as a rollout, one sentence for what is wrong, and no way to stop it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

for package in ("fastapi", "uvicorn", "mcp", "httpx2"):
    pytest.importorskip(package, reason="serve.py needs requirements-serve.txt")

import httpx2
import torch
from conftest import BARE, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serve
from rollout import rollout
from support import serving_gate, serving_options
from support.errors import UserError
from support.generation import Sampling
from support.serving_options import Options, bind, read_options
from support.serving_queue import Job, ModelQueue, Piece, Refused, answers_of, listen
from support.serving_text import TextStream

TUTORIAL = {  # the request of the tutorial's own client, letter by letter
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did Natalia sell altogether in April and May?"
}
ASKED = {"question": "Tom has 12 apples. Tom loses 5. How many apples does Tom have?"}
CHAT = {"model": "trained", "messages": [{"role": "user", "content": ASKED["question"]}]}


@contextlib.contextmanager
def running(service):
    """The service on a port of its own; yields its address."""
    with bind("127.0.0.1", 0) as place:
        place.listen(64)
        thread = threading.Thread(
            target=lambda: asyncio.run(serve.serve_http(service, place)), daemon=True
        )
        thread.start()
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        for _ in range(200):
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(url + "/health").status_code == 200:
                    break
            time.sleep(0.05)
        yield url


@pytest.fixture(scope="module")
def service(few_questions):
    config = replace(
        BARE,
        model="tiny/model",
        max_new_tokens=24,
        dataset=str(few_questions),
        device="cpu",
        precision="fp32",
    )
    return serve.build_service(config, "tiny/model", Options())


@pytest.fixture(scope="module")
def url(service):
    with running(service) as found:
        yield found


def post(url, path="/solve_question", body=ASKED, **others):
    return httpx2.post(url + path, json=body, timeout=60, **others)


# ------------------------------------------------------------------------------- the tutorial's API


def test_the_tutorials_client_finds_what_it_expects(url):
    response = post(url, body=TUTORIAL)
    found = response.json()
    assert response.status_code == found["code"] == 200
    assert list(found) == ["code", "elapsed_milliseconds", "data", "message"]
    assert list(found["data"])[:4] == [
        "assistant_response",
        "reasoning_process",
        "final_answer",
        "clean_response",
    ]
    assert all(isinstance(found["data"][name], str) for name in list(found["data"])[:4])
    assert httpx2.get(url).json()["status"] == "healthy"


def test_greedy_answers_are_those_of_a_rollout_whoever_else_asks(url, service):
    """One after the other, all at once, and in a rollout of their own: the same texts."""
    questions = service.examples[:12]
    model, tokenizer = service.answerer.models["trained"]
    greedy = Sampling(service.config.max_new_tokens, temperature=0.0)
    rolled = [g.completions[0].text for g in rollout(model, tokenizer, questions, 1, greedy)]

    async def together():
        async with httpx2.AsyncClient(timeout=60) as client:
            asked = [
                client.post(url + "/solve_question", json={"question": q.question})
                for q in questions
            ]
            return [r.json()["data"]["assistant_response"] for r in await asyncio.gather(*asked)]

    alone = [
        post(url, body={"question": q.question}).json()["data"]["assistant_response"]
        for q in questions
    ]
    assert alone == asyncio.run(together()) == rolled


def test_samples_of_a_seed_are_those_of_a_rollout(url, service):
    question = service.examples[0]
    body = {
        "question": question.question,
        "temperature": 1.0,
        "seed": 11,
        "n": 4,
        "reference": question.reference,
    }
    found = post(url, body=body).json()
    model, tokenizer = service.answerer.models["trained"]
    torch.manual_seed(11)
    (group,) = rollout(model, tokenizer, [question], 4, Sampling(service.config.max_new_tokens))
    assert [row["assistant_response"] for row in found["answers"]] == [
        c.text for c in group.completions
    ]
    assert found["seed"] == 11


def test_the_judgement_is_that_of_the_training(service):
    """Rewards and advantages of a group of which the first is right."""
    right, wrong = (
        SimpleNamespace(text=f"<think>x</think><answer>{n}</answer>", ids=[1], truncated=False)
        for n in (7, 8)
    )
    job = SimpleNamespace(prompt="", model="trained")
    rows = service.judged(job, [right, wrong, wrong], "7")
    assert [row["reward"] for row in rows] == [1, 0, 0] and [row["correct"] for row in rows] == [
        True,
        False,
        False,
    ]
    expected = service.advantages(
        torch.tensor([[1.0, 0, 0]]), torch.tensor([[[1.0, 0, 0]]]), [1.0]
    )[0]
    assert [row["advantage"] for row in rows] == pytest.approx(expected.tolist())
    (alone,) = service.judged(job, [right], "7")
    assert "advantage" not in alone and "reward" not in service.judged(job, [right], None)[0]


def test_both_models_side_by_side_in_pieces(url):
    body = {**ASKED, "model": "both", "stream": True}
    events = [json.loads(line[6:]) for line in post(url, body=body).text.split("\n\n") if line]
    *pieces, last = events
    assert [row["model"] for row in last["answers"]] == ["trained", "base"]
    for row in last["answers"]:
        assert (
            "".join(p["text"] for p in pieces if p["model"] == row["model"])
            == row["assistant_response"]
        )
    assert len(pieces) > 4


WRONG = [
    ({"question": "  \n"}, "blank"),
    ({"question": ""}, "blank"),
    ({"question": 5}, "`question`: input should be a valid string."),
    ({}, "lacks `question`"),
    ([], "JSON object"),
    ({**ASKED, "temperatur": 1}, "did you mean temperature?"),
    ({**ASKED, "temperature": "hot"}, "`temperature`"),
    ({**ASKED, "temperature": -1}, "`temperature`"),
    ({**ASKED, "max_new_tokens": 25}, "`max_new_tokens` is 24 at the most"),
    ({**ASKED, "max_new_tokens": True}, "`max_new_tokens`"),
    ({**ASKED, "n": 2}, "`temperature` too"),
    ({**ASKED, "n": 17, "temperature": 1.0}, "`n`"),
    ({**ASKED, "model": "gpt"}, "`model`"),
    ({**ASKED, "seed": -1}, "`seed`"),
    ({**ASKED, "reference": "9" * 400}, "`reference`"),
    ({"question": "apples " * 200}, "tokens"),
    ({"question": "x" * 10_000}, "characters"),
]  # fmt: skip


@pytest.mark.parametrize("body, words", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_one_sentence_in_the_documented_shape(url, body, words):
    response = post(url, body=body)
    found = response.json()
    assert response.status_code == found["code"] == 400 and found["data"] == {}
    assert list(found) == ["code", "elapsed_milliseconds", "data", "message"]
    assert (
        words in found["message"]
        and found["message"].endswith(".")
        and "\n" not in found["message"]
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"question": NaN}',
        b"\xff",
        b'{"question": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bytes_that_are_no_json(url, data):
    response = httpx2.post(
        url + "/solve_question", content=data, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400 and response.json()["message"].endswith(".")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "question",
    "n",
    "seed",
    "temperature",
    "model",
    "stream",
    "messages",
    "stop",
    "max_tokens",
    "top_p",
    "reference",
    "max_new_tokens",
]
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON, max_size=5) | JSON


@settings(
    max_examples=int(os.environ.get("SERVE_EXAMPLES", 150)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(body=BODIES, chat=st.booleans())
def test_no_body_makes_it_fail(url, body, chat):
    """A sentence or an answer, whatever is sent. SERVE_EXAMPLES=10000 sends more."""
    data = json.dumps(body).encode()
    path = "/v1/chat/completions" if chat else "/solve_question"
    response = httpx2.post(
        url + path, content=data, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        found = response.json()
        assert (found["error"] if chat else found)["message"].endswith(".")


# ------------------------------------------------------------------------------------- OpenAI's API


def test_chat_completions_in_one_and_in_pieces(url):
    """The stream's pieces are the whole answer; a stop text ends both at the same place."""
    for more in (
        {},
        {"stop": ["</think>"]},
        {"stop": "answer", "n": 2, "seed": 4, "temperature": 1.0},
    ):
        body = {**CHAT, "temperature": 0, **more}
        whole = post(url, "/v1/chat/completions", body).json()
        streamed = post(
            url,
            "/v1/chat/completions",
            {**body, "stream": True, "stream_options": {"include_usage": True}},
        )
        lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        assert chunks[-1]["usage"] == whole["usage"] and whole["usage"]["completion_tokens"] > 0
        for choice in whole["choices"]:
            own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert (
                "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
            )
            assert own[-1]["finish_reason"] == choice["finish_reason"]
            assert not any(
                word in choice["message"]["content"]
                for word in [more.get("stop")]
                if isinstance(word, str)
            )
    short = post(url, "/v1/chat/completions", {**CHAT, "temperature": 0, "max_tokens": 2}).json()
    assert (
        short["choices"][0]["finish_reason"] == "length"
        and short["usage"]["completion_tokens"] == 2
    )


@pytest.mark.parametrize(
    "more, status, words",
    [
        ({"model": "gpt-4"}, 404, "only trained and base"),
        ({"tools": [{}]}, 400, "`tools` is not supported"),
        ({"frequency_penalty": 0.5}, 400, "`frequency_penalty`"),
        ({"messages": []}, 400, "`messages`"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "take turns"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text alone"),
        ({"stop": ["a"] * 5}, 400, "`stop`"),
        ({"top_p": 0}, 400, "`top_p`"),
    ],
)
def test_what_openai_has_and_we_have_not_is_refused(url, more, status, words):
    response = post(url, "/v1/chat/completions", {**CHAT, **more})
    error = response.json()["error"]
    assert response.status_code == error["code"] == status and words in error["message"]
    neutral = {
        "tools": [],
        "frequency_penalty": 0,
        "user": "me",
        "logprobs": False,
        "response_format": {"type": "text"},
    }
    assert post(url, "/v1/chat/completions", {**CHAT, **neutral}).status_code == 200


def test_a_chat_is_the_prompt_of_the_training_or_a_sentence(service):
    """One question as build_prompt writes it; more turns with a template; without one, a sentence."""
    from support.prompts import build_prompt
    from support.serving_prompts import prompt_of

    tokenizer = type(service.tokenizers["trained"]).from_pretrained("tiny/model")
    config = replace(service.config, system_prompt="Answer.")
    one, two = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    no_system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + template
    )
    for tokenizer.chat_template in (None, template, no_system):
        asked = prompt_of([one], tokenizer, config)[0]
        assert asked == build_prompt("How many?", tokenizer, "Answer.")
        own = prompt_of([{"role": "system", "content": "Count."}, one], tokenizer, config)[0]
        assert own == build_prompt("How many?", tokenizer, "Count.")
        if not tokenizer.chat_template:
            with pytest.raises(Refused, match="This model has no chat template; send one question"):
                prompt_of([one, two, one], tokenizer, config)
            continue
        prompt, _, messages = prompt_of([one, two, one], tokenizer, config)
        assert prompt.startswith(("[system] Answer. [user] How many?", "[user] Answer."))
        assert prompt.count("Two.") == 1 and messages[-1] == one
    tokenizer.chat_template = "Hello!"
    with pytest.raises(Refused, match="The model's chat template cannot write this chat; send one"):
        prompt_of([one, two, one], tokenizer, config)


# ----------------------------------------------------------------------------------------------- MCP


def test_the_mcp_tool_is_flat_described_and_structured(url):
    from mcp import Client

    async def ask():
        async with Client(url + "/mcp") as client:
            (tool,) = (await client.list_tools()).tools
            found = await client.call_tool("solve_question", ASKED)
            blank = await client.call_tool("solve_question", {"question": " "})
            return tool, found, blank

    tool, found, blank = asyncio.run(ask())
    assert list(tool.input_schema["properties"]) == ["question"] and tool.description
    assert tool.input_schema["properties"]["question"]["description"]
    assert (
        found.structured_content["assistant_response"]
        == post(url).json()["data"]["assistant_response"]
    )
    assert blank.is_error and "blank" in blank.content[0].text


# ------------------------------------------------------------------------------------------ the queue


class Held:
    """A `complete` that waits until it may answer; a prompt of [13] is one that it cannot bear."""

    def __init__(self):
        self.go, self.batches = threading.Event(), []

    def __call__(self, model, tokenizer, prompts, sampling):
        self.batches.append([prompt for prompt, _ in prompts])
        for _ in range(400):
            if self.go.wait(0.01) or len(
                sampling.watch(list(range(len(prompts))), [5] * len(prompts))
            ) == len(prompts):
                break
        if [13] in self.batches[-1]:
            raise RuntimeError("of the model")
        return [SimpleNamespace(ids=[5], text="<five>", truncated=False) for _ in prompts]


@pytest.fixture
def held(tokenizer, model):
    made = Held()
    queue = ModelQueue({"trained": (model, tokenizer)}, made, limit=4, batch_size=3)
    queue.start()
    yield made, queue
    made.go.set()
    queue.stop()
    queue.thread.join(10)
    assert not queue.thread.is_alive()


def job(ids=(7,), temperature=0.0, **others):
    return Job("trained", "", list(ids), [], Sampling(8, temperature), 0, **others)


def test_a_full_queue_refuses_and_those_who_leave_free_their_places(held):
    made, queue = held

    async def story():
        def ask(*jobs):
            return asyncio.create_task(answers_of(queue, list(jobs), 30))

        first = ask(job())
        while not made.batches:
            await asyncio.sleep(0.01)
        waiting = [ask(job([n])) for n in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Refused) as refused:
            await ask(job())
        assert refused.value.status == 429 and refused.value.retry >= 1
        waiting[0].cancel()
        await asyncio.sleep(0.05)
        other = ask(job([9], temperature=1.0))  # sampled otherwise: a batch of its own
        await asyncio.sleep(0.05)
        made.go.set()
        await asyncio.gather(first, *waiting[1:], other)

    asyncio.run(story())
    assert made.batches == [[[7]], [[1], [2], [3]], [[9]]]


def test_nobody_waits_longer_than_the_limit_and_nothing_is_computed_for_nobody(held):
    made, queue = held

    async def story():
        start = time.monotonic()
        with pytest.raises(Refused) as late:
            await answers_of(queue, [job()], 0.2)
        assert late.value.status == 504 and time.monotonic() - start < 2

    asyncio.run(story())
    for _ in range(200):
        if not queue.running:
            break
        time.sleep(0.01)
    assert not queue.running, "the rows of who has left end at their next token"


def test_an_error_is_of_the_one_that_made_it(held):
    made, queue = held
    made.go.set()

    async def story():
        jobs = [job([12]), job([13]), job([14])]
        with queue.changed:  # so that they are one batch
            tasks = [asyncio.create_task(answers_of(queue, [each], 30)) for each in jobs]
            await asyncio.sleep(0.1)
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, bad, last = asyncio.run(story())
    assert [[13]] in made.batches and [[12], [13], [14]] in made.batches
    assert bad.status == 500 and "RuntimeError" in str(bad) and "of the model" not in str(bad)
    assert first[0][0].text == last[0][0].text == "<five>"


def test_pieces_come_before_the_answer_and_health_while_it_computes(held, service):
    made, queue = held
    busy = replace(service, answerer=queue, tokenizers={"trained": service.tokenizers["trained"]})
    with running(busy) as url:
        threading.Thread(target=lambda: post(url), daemon=True).start()
        for _ in range(500):
            if made.batches:
                break
            time.sleep(0.01)
        start = time.monotonic()
        assert httpx2.get(url + "/health").status_code == 200 and time.monotonic() - start < 1

        async def story():
            asked = job(streams=True)
            return [event async for _, event in listen(queue, [asked], 30)]

        made.go.set()
        *pieces, last = asyncio.run(story())
        assert (
            last[0].text == "<five>"
            and "".join(p.text for p in pieces if isinstance(p, Piece)) == "<five>"
        )


def test_a_client_that_leaves_in_the_middle_ends_its_rows(held, service):
    """Of an answer, and of a stream."""
    made, queue = held
    busy = replace(service, answerer=queue, tokenizers={"trained": service.tokenizers["trained"]})
    with running(busy) as url:
        for stream in (False, True):
            made.batches.clear()
            body = {**ASKED, "stream": stream}
            asked = httpx2.stream("POST", url + "/solve_question", json=body, timeout=0.5)
            with contextlib.suppress(httpx2.TimeoutException), asked as response:
                assert stream and "text" in next(response.iter_lines())
            assert made.batches and not made.go.is_set()
            for _ in range(200):
                if not queue.running:
                    break
                time.sleep(0.01)
            assert not queue.running and not queue.waiting


def test_tokens_are_watched_as_they_are_drawn(model, tokenizer):
    """Each token of each row once, but for the last ones; a row that is named ends, the others do not change."""
    from rollout import complete

    prompts, seen = [([5, 6, 7], (1, i)) for i in range(4)], {}
    plain = complete(model, tokenizer, prompts, Sampling(12))

    def watch(rows, tokens):
        for row, token in zip(rows, tokens, strict=True):
            seen.setdefault(row, []).append(token)
        return [row for row in rows if row == 2 and len(seen[row]) >= 3]

    watched = complete(model, tokenizer, prompts, Sampling(12, watch=watch))
    for row, (before, after) in enumerate(zip(plain, watched, strict=True)):
        if row == 2:
            assert after.ids[:3] == before.ids[:3] and len(after.ids) == min(4, len(before.ids))
        else:
            assert after == before
            assert seen[row][: len(before.ids) - 1] == before.ids[:-1]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=2),
)
def test_pieces_of_text_are_never_taken_back(text, stop):
    """Bytes as tokens: whatever the characters, pieces add up to the text before the first stop text."""

    def decode(ids):
        return bytes(ids).decode(errors="replace")

    stream, got = TextStream(decode, ends=[], stop=tuple(stop)), ""
    for byte in text.encode():
        got += stream.add(byte)
        if stream.over:
            break
    end = min((text.find(word) for word in stop if word in text), default=len(text))
    assert text.startswith(got) and len(got) <= end
    assert got + stream.finish(text[:end]) == text[:end]


# ------------------------------------------------------------------------------------------- the gate


def test_other_names_other_sites_long_bodies_and_other_methods(url):
    assert httpx2.get(url + "/health", headers={"Host": "evil.example"}).status_code == 421
    assert (
        httpx2.get(url + "/health", headers={"Host": "127.0.0.1.evil.example:16020"}).status_code
        == 421
    )
    assert post(url, headers={"Origin": "http://evil.example"}).status_code == 403
    assert post(url, headers={"Origin": url}).status_code == 200
    assert post(url, body={"question": "x" * 300_000}).status_code == 413
    assert (
        httpx2.post(url + "/solve_question", content=(b"x" * 1000 for _ in range(400))).status_code
        == 413
    )
    assert httpx2.get(url + "/solve_question").status_code == 405
    assert httpx2.get(url + "/../etc/passwd").status_code == 404
    assert "access-control-allow-origin" not in post(url, headers={"Origin": url}).headers


def test_a_key_is_asked_for_where_there_is_one(service):
    guarded = replace(service, options=Options(api_key="s3cret"))
    with running(guarded) as url:
        assert post(url).status_code == 401 and "Bearer" in post(url).json()["message"]
        assert post(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx2.get(url + "/v1/models").status_code == 401
        assert (
            httpx2.get(url + "/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code
            == 200
        )
        assert httpx2.get(url, headers={"Accept": "text/html"}).status_code == 200


def test_what_a_page_with_a_key_tells(service, url):
    """The page needs no key, so it has no questions; the scheme is in any case."""
    guarded = replace(service, options=Options(api_key="s3cret"))
    question, wanted = service.examples[0].question, {"Accept": "text/html"}
    assert question in httpx2.get(url, headers=wanted).text
    with running(guarded) as url:
        assert question not in httpx2.get(url, headers=wanted).text
        headers = {"Authorization": "bearer s3cret"}
        assert httpx2.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_mcp_keeps_no_stream_open(url):
    for method in ("GET", "DELETE"):
        answer = httpx2.request(method, f"{url}/mcp", headers={"Accept": "text/event-stream"})
        assert answer.status_code == 405 and "POST" in answer.json()["message"]


def test_slow_senders_are_not_waited_for(service, monkeypatch):
    """Headers, or a body, a byte at a time: closed, while others are answered."""
    monkeypatch.setattr(serving_gate, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(serving_gate, "BODY_SECONDS", 0.5)
    with running(service) as url:
        port = int(url.rsplit(":", 1)[1])
        head = b"POST /solve_question HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        for sent, said in ((b"POST /solve", b""), (head + b"{", b"408")):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(sent)
                start, answer = time.monotonic(), b""
                connection.settimeout(10)
                while time.monotonic() - start < 5:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        connection.sendall(b"x")
                    connection.settimeout(0.2)
                    try:
                        got = connection.recv(4096)
                    except TimeoutError:
                        continue
                    except ConnectionResetError:
                        break
                    answer += got
                    if not got:
                        break
                assert time.monotonic() - start < 4 and said in answer
                assert httpx2.get(url + "/health").status_code == 200


def test_the_log_holds_nothing_of_what_was_said(url, capfd):
    body = {"question": "Sesame has 3 apples. How many apples has Sesame?", "reference": "Sesame"}
    post(url, body=body)
    post(url, body={**body, "Sesame": 1})
    httpx2.get(url + "/Sesame?Sesame=Sesame")
    time.sleep(0.2)
    out, err = capfd.readouterr()
    assert "POST /solve_question 200" in out and "POST /solve_question 400" in out
    assert "Sesame" not in out + err


def test_the_page_loads_nothing_and_lets_nothing_run(url):
    page = httpx2.get(url, headers={"Accept": "text/html,*/*"}).text
    assert "default-src 'none'" in page and "connect-src 'self'" in page and "unsafe" not in page
    assert not [
        word
        for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(")
        if word in page
    ]
    assert page.count("http://") + page.count("https://") == 0
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["models"] == ["trained", "base"] and "<" not in data


# -------------------------------------------------------------------------------------- the command


def test_options_that_cannot_be(monkeypatch):
    monkeypatch.delenv("SERVE_API_KEY", raising=False)
    none = dict.fromkeys(Options.HELP)
    assert read_options(none) == Options()
    for name, value, words in (
        ("host", "0.0.0.0", "--api_key"), ("port", "99999", "--port"), ("port", "x", "--port"), ("queue", "0", "--queue"),
        ("timeout", "nan", "--timeout"), ("mcp", "sse", "--mcp"), ("api_key", "a b", "--api_key"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_options({**none, name: value})
    assert read_options({**none, "host": "0.0.0.0", "api_key": "k"}).api_key == "k"
    with bind("127.0.0.1", 0) as taken, pytest.raises(UserError, match="Cannot listen"):
        taken.listen()
        bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_and_started_again_and_stopped():
    """The command itself: a client of a killed server sees the end; the port is free at once; Ctrl-C ends with 130."""
    command = [
        sys.executable,
        "serve.py",
        "--preset=tiny",
        "--base=none",
        "--dataset=tiny/task",
        "--device=cpu",
    ]

    def start(port):
        process = subprocess.Popen(
            [*command, f"--port={port}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, process.stdout.readline().split(" on ")[1].split("/ (")[0]

    process, url = start(0)
    body = {**ASKED, "stream": True, "n": 16, "temperature": 1.0}
    with (
        pytest.raises(httpx2.RemoteProtocolError),
        httpx2.stream("POST", url + "/solve_question", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()
        assert "text" in next(lines)
        process.kill()
        list(lines)
    process.communicate()
    port = int(url.rsplit(":", 1)[1])
    process, url = start(port)
    assert post(url).status_code == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "stopped\n"


def test_a_missing_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    with pytest.raises(SystemExit) as end:
        serve.main([])
    assert (
        end.value.code == 2 and "pip install -r requirements-serve.txt" in capsys.readouterr().err
    )


def test_in_front_of_another_server(url, service):
    """--backend, with this service as the server behind: the same answers, in pieces too; its refusals; and none there."""
    from support.serving_backend import Backend

    tokenizer = service.tokenizers["trained"]
    tokenizer = type(tokenizer).from_pretrained("tiny/model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    front = replace(service, answerer=Backend(url, "", 8), tokenizers={"trained": tokenizer})
    with running(front) as front_url:
        plain = post(url).json()["data"]
        assert post(front_url).json()["data"] == plain
        events = post(front_url, body={**ASKED, "stream": True}).text.split("\n\n")
        pieces = [json.loads(e[6:]) for e in events if e]
        assert (
            "".join(p["text"] for p in pieces[:-1])
            == pieces[-1]["data"]["assistant_response"]
            == plain["assistant_response"]
        )
        assert post(front_url, body={**ASKED, "n": 9, "temperature": 1.0}).status_code == 400
        front.answerer.name = "nix"
        refused = post(front_url)
        assert refused.status_code == 502 and "There is no model" in refused.json()["message"]
    with pytest.raises(UserError, match="--backend"):
        Backend("http://127.0.0.1:9", "", 8)


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def log_message(self, *words): pass
if "--bad" in sys.argv: sys.exit("error: it does not start")
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"serving x on http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C stops)", flush=True)
server.serve_forever()
"""


@pytest.mark.skipif(os.name != "posix", reason="app/run.sh is a shell script")
def test_run_sh_says_what_is_true(tmp_path):
    """start waits for an answer, or says why there is none; stop ends its own process alone."""
    (tmp_path / "app").mkdir()
    script = tmp_path / "app" / "run.sh"
    script.write_bytes((ROOT / "app" / "run.sh").read_bytes())
    (tmp_path / "serve.py").write_text(SERVER)

    def run(*words):
        found = subprocess.run(
            ["bash", str(script), *words],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHON": sys.executable},
        )
        return found.returncode, found.stdout + found.stderr

    assert run("status")[0] == 3
    code, said = run("start", "--bad")
    assert code == 1 and "not started" in said and "it does not start" in said
    assert run("start")[0] == 0 and run("status")[0] == 0 and run("start")[0] == 1
    assert "serving" in run("logs")[1] and run("stop")[0] == 0 and run("status")[0] == 3
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "app" / "serve.pid").write_text(f"{other.pid}\nMon Jan 1 00:00:00 2024\n")
        assert "not running" in run("stop")[1] and other.poll() is None
        other.communicate(b"\n")


def test_both_models_have_the_seed_that_is_told(url):
    """So that the seed of a response brings all of its answers again."""
    body = {**ASKED, "model": "both", "temperature": 5.0}
    first = post(url, body=body).json()
    again = post(url, body={**body, "seed": first["seed"]}).json()
    texts, same = (
        [row["assistant_response"] for row in found["answers"]] for found in (first, again)
    )
    assert texts == same


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_temperature_that_would_overflow(url, temperature):
    """It is the request that is wrong, and not the weights."""
    found = post(url, body={**ASKED, "temperature": temperature})
    assert found.status_code == 400 and "at the least" in found.json()["message"]
    assert post(url, body={**ASKED, "temperature": 1e-6}).status_code == 200


def test_two_servers_that_start_at_the_same_time():
    """Both have bound the port while they loaded; the second one says so in a sentence."""
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        serving_options.listen(first)
        with pytest.raises(UserError, match="is a server running there"):
            serving_options.listen(second)


SENT = {
    "a text for a choice": ([{"choices": ["x"]}], 502, "does not speak"),
    "a list for the usage": ([{"choices": [{"text": "a"}], "usage": [1]}], 502, "does not speak"),
    "half of an answer": ([{"choices": [{"text": "<answer>4"}]}], 502, "in the middle"),
    "a whole one": ([{"choices": [{"text": "4", "finish_reason": "stop"}]}], 200, "4"),
}


@pytest.mark.parametrize("kind", SENT)
def test_a_server_behind_that_sends_what_it_likes(kind):
    """It is told at once, not when the time is over; and half of an answer is none."""
    from support.serving_backend import Backend

    rows, status, words = SENT[kind]
    text = "".join(f"data: {json.dumps(row)}\n\n" for row in rows)

    async def ask():
        backend = Backend("http://behind", "m", 2)
        transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text=text))
        backend.client = httpx2.AsyncClient(base_url="http://behind", transport=transport)
        jobs = [Job("trained", "?", [1], [], Sampling(4), seed=1, count=n) for n in (1, 3)]
        with pytest.raises(Refused) as too_many:
            backend.submit(jobs[1:])
        assert too_many.value.status == 400, "it would never have a place"
        try:
            ((answer,),) = await answers_of(backend, jobs[:1], 3.0)
            return 200, answer.text
        except Refused as error:
            return error.status, str(error)

    found = asyncio.run(ask())
    assert found[0] == status and words in found[1]


def test_the_thread_lives_on_when_nobody_reads_the_log(monkeypatch):
    """`serve.py | head -1`: to print is an error then, also where the model's error is told."""

    def broken(*arguments, **others):
        raise BrokenPipeError

    def fails(*arguments):
        raise RuntimeError

    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0))
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0, decode=str)
    monkeypatch.setattr("builtins.print", broken)
    monkeypatch.setattr("tqdm.tqdm.write", broken)
    monkeypatch.setattr("support.monitor.silence", lambda: None)
    queue = ModelQueue({"m": (model, tokenizer)}, fails, 8, 8)
    queue.start()

    async def ask():
        for _ in range(2):
            with pytest.raises(Refused, match="RuntimeError"):
                await answers_of(queue, [Job("m", "", [1], [], Sampling(4), seed=1)], 5.0)

    asyncio.run(ask())
    queue.stop()
