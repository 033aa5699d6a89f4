"""extras/serve.py: the batch against generate(), the API with OpenAI's client, the page in a
browser."""
import asyncio
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import sample
from conftest import run
from model import Model, ModelConfig, generate

pytest.importorskip("starlette", reason="pip install starlette uvicorn")
openai = pytest.importorskip("openai", reason="pip install openai")
import uvicorn

from extras import serve
from extras.batch import Batch, Call, Worker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CONTEXT = 200
QUESTION = [{"role": "user", "content": "你是谁？"}]
DRAWN = dict(temperature=0.9, top_p=0.8, seed=5)


@pytest.fixture(scope="module")
def saved(tok, tmp_path_factory):
    """A random network that says all kinds of things, and its checkpoints by stage."""
    torch.manual_seed(0)
    shape = ModelConfig(tok.vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                        max_seq_len=CONTEXT, tie_embeddings=False)
    model = Model(shape).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    paths = {}
    folder = tmp_path_factory.mktemp("serve")
    state = {"model": model.state_dict(), "shape": vars(shape),
             "tokenizer": tok.name, "tokenizer_sha256": tok.sha256}
    for stage in "pretrain", "sft":
        paths[stage] = str(folder / f"{stage}.pt")
        checkpoints.save(paths[stage], {"stage": stage, **state})
    return SimpleNamespace(model=model, tok=tok, **paths)


@contextmanager
def serving(saved, stage="sft", stop_ids=None, **constants):
    """The application on a port of its own, with these constants of the script, and stop ids."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(serve, name, value)
        patch.setattr(saved.tok, "stop_ids", stop_ids or saved.tok.stop_ids)
        app = serve.application(saved.model, saved.tok, stage, "tiny")
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", max_retries=0,
                               api_key=constants.get("api_key", "none"),
                               default_headers={"Connection": "close"})
        chat = partial(client.chat.completions.create, model="any", messages=QUESTION)
        go_on = partial(client.completions.create, model="any")
        try:
            yield SimpleNamespace(port=port, client=client, chat=chat, go_on=go_on)
        finally:
            client.close()
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def sft(saved):
    with serving(saved, max_batch=3) as site:
        yield site


@pytest.fixture(scope="module")
def pretrained(saved):
    with serving(saved, "pretrain") as site:
        yield site


def request(site, method, path, body=b"", headers={}):
    """(status, headers, body) of a plain HTTP request."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


def test_more_rows_than_fit_the_memory_are_refused_before_an_address_is_printed(saved, tmp_path):
    done = run("extras.serve", tmp_path, f"--checkpoint={saved.sft}", "--port=0",
               "--max_batch=1000000000000")
    assert done.rc == 1 and done.out == ""
    assert done.err.startswith("no room for --max_batch=1000000000000 answers of"), done.err


# ---- the batch

def alone(model, ids, n, seed, stop_ids, how):
    """What generate() says to one prompt."""
    generator = torch.Generator().manual_seed(seed)
    steps = generate(model, [ids], n, *how, stop_ids=stop_ids, generator=generator)
    return [row[0] for row in steps]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_calls_that_join_and_leave_a_batch_say_what_each_says_alone(saved, temperature):
    rng = random.Random(1)
    batch = Batch(saved.model, 4)
    how = (temperature, 0, 0.9, 1.1)
    stop_ids = {7, 9}
    calls = []
    # long and short in turn: what is in the cache moves to the right and back to the left
    for i, length in enumerate([3, 90, 1, 180, 20, CONTEXT - 1, 150, 5, 60, 2, 120, 7]):
        ids = [rng.randrange(400) for _ in range(length)]
        n = rng.choice([1, 30, 400])
        calls.append(Call(ids, n, how, torch.Generator().manual_seed(i), stop_ids))
    waiting = calls[:]
    most = 0
    with torch.inference_mode():
        while waiting or batch.calls:
            if waiting and len(batch.calls) < 4 and (rng.random() < 0.2 or not batch.calls):
                batch.join(waiting.pop(0))
            most = max(most, len(batch.calls))
            if batch.calls:
                batch.step()
            if batch.calls and rng.random() < 0.02:                      # one is given up
                gone = rng.choice(batch.calls)
                gone.cancelled = True
                batch.leave(gone)
    assert most == 4
    assert any(call.cancelled for call in calls)
    for i, call in enumerate(calls):
        expected = alone(saved.model, call.ids, call.max_new_tokens, i, stop_ids, how)
        assert call.new == (expected[:len(call.new)] if call.cancelled else expected) != []


def test_scores_are_the_networks_own_log_probabilities(saved):
    batch = Batch(saved.model, 1)
    generator = torch.Generator().manual_seed(0)
    call = Call([1, 50, 60], 3, (0.7, 0, 0.9, 1.3), generator, set(), n_top=4)
    with torch.inference_mode():
        events = batch.join(call) + batch.step() + batch.step()
        reference = saved.model(torch.tensor([call.ids + call.new]))[0].log_softmax(-1)   # (T, V)
    for row, (_, token, (log_p, top), _) in zip(reference[2:], events):
        torch.testing.assert_close(log_p, row[token].item(), rtol=1e-4, atol=1e-4)
        assert [token for token, _ in top] == row.topk(4).indices.tolist()
    assert [end for *_, end in events] == [None, None, "length"]


# ---- the API

@pytest.fixture
def sample_says(monkeypatch, capsys):
    """sample_says(checkpoint, prompt, **constants): what sample.py prints."""
    def call(checkpoint, prompt, **constants):
        usual = dict(device="cpu", dtype="float32", max_new_tokens=25)
        given = dict(checkpoint=checkpoint, prompt=prompt, **constants)
        for name, value in {**usual, **given}.items():
            monkeypatch.setattr(sample, name, value)
        capsys.readouterr()
        sample.main()
        return capsys.readouterr().out.removesuffix("\n")
    return call


@pytest.mark.parametrize("how", [dict(temperature=0.0), DRAWN])
def test_a_chat_answer_is_that_of_sample_py(sft, saved, tok, sample_says, how):
    said = sample_says(saved.sft, "你是谁？", **how)
    whole = sft.chat(max_tokens=25, **how)
    choice = whole.choices[0]
    usage = whole.usage
    assert said
    assert choice.message.content == said
    assert choice.message.role == "assistant"
    assert (whole.model, whole.object) == ("tiny", "chat.completion")
    assert usage.prompt_tokens == len(tok.prompt(QUESTION))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    stream = sft.chat(max_tokens=25, stream=True, stream_options={"include_usage": True}, **how)
    first, *parts, last = stream
    assert "".join(part.choices[0].delta.content for part in parts) == said
    assert first.choices[0].delta.role == "assistant"
    assert first.object == "chat.completion.chunk"
    assert parts[-1].choices[0].finish_reason == choice.finish_reason
    assert last.usage == usage
    assert last.choices == []


@pytest.mark.parametrize("how", [dict(temperature=0.0), DRAWN])
def test_a_continuation_is_that_of_sample_py(pretrained, saved, sample_says, how):
    said = sample_says(saved.pretrain, "从前，小猫", **how)
    choice = pretrained.go_on(prompt="从前，小猫", max_tokens=25, logprobs=3, **how).choices[0]
    parts = list(pretrained.go_on(prompt=["从前，小猫"], max_tokens=25, stream=True, **how))
    assert said == "从前，小猫" + choice.text
    assert "".join(part.choices[0].text for part in parts) == choice.text
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 25
    for token, at in zip(scores.tokens, scores.text_offset):
        following = choice.text[at:].lstrip("\ufffd")          # the rest of a broken character
        assert token.startswith(("bytes:", "<")) or following.startswith(token)
    with pytest.raises(openai.BadRequestError, match="only pretrained"):
        pretrained.chat()


def test_the_likeliest_tokens_are_reported(sft):
    choice = sft.chat(temperature=0, max_tokens=9, logprobs=True, top_logprobs=5).choices[0]
    assert len(choice.logprobs.content) == 9
    for one in choice.logprobs.content:
        likely = [other.logprob for other in one.top_logprobs]
        assert len(likely) == 5
        assert likely == sorted(likely, reverse=True)
        best = one.top_logprobs[0]
        assert (best.token, best.bytes, best.logprob) == (one.token, one.bytes, one.logprob)
    pieces = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
    assert pieces.decode("utf-8", "replace") == choice.message.content


def test_an_answer_ends_with_a_stop_id(saved, tok):
    ids = alone(saved.model, tok.prompt(QUESTION), 30, 0, (), (0.0,))
    with serving(saved, stop_ids={ids[6]}) as site:
        reply = site.chat(temperature=0)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == ids.index(ids[6]) + 1


def test_an_answer_ends_before_a_stop_string(sft):
    ask = partial(sft.chat, temperature=0, max_tokens=30)
    text = ask().choices[0].message.content
    stops = ["不会出现的文字", text[8:11]]
    whole = ask(stop=stops).choices[0]
    parts = [part.choices[0] for part in ask(stop=stops, stream=True)]
    expected = text[:text.index(text[8:11])]
    assert whole.message.content == "".join(part.delta.content for part in parts) == expected
    assert whole.finish_reason == parts[-1].finish_reason == "stop"


@pytest.mark.parametrize("chat, expected", [(False, " upon"), (True, "upon")])
def test_the_space_that_sentencepiece_adds_stays_within_a_text(chat, expected):
    """Llama 2's kind of vocabulary: a text begins with a space that is not its own."""
    tok = SimpleNamespace(piece=[b" once", b" upon"].__getitem__, dummy_space=True)
    call = Call([0], 1, (), None, set())
    call.events.put_nowait((1, None, "length"))

    async def read():
        parts = serve.answer(call, [], chat, tok, SimpleNamespace(cancel=lambda call: None))
        return [text async for text, *_ in parts]

    assert asyncio.run(read()) == [expected]


def test_tokens_that_are_drawn_after_a_stop_string_are_not_counted():
    """The batch goes on until it hears of the stop: how far is chance."""
    tok = SimpleNamespace(piece=[b" once", b" upon"].__getitem__, dummy_space="")
    call = Call([0], 9, (), None, set(), new=[0, 1, 0, 0])
    for token in call.new:
        call.events.put_nowait((token, None, None))

    async def read():
        parts = serve.answer(call, ["on"], True, tok, SimpleNamespace(cancel=lambda call: None))
        return [text async for text, *_ in parts]

    assert "".join(asyncio.run(read())) == " "
    assert serve.usage(call)["completion_tokens"] == 1


def test_models_are_listed(sft):
    assert [model.id for model in sft.client.models.list()] == ["tiny"]
    assert sft.client.models.retrieve("tiny").stage == "sft"
    with pytest.raises(openai.NotFoundError):
        sft.client.models.retrieve("gpt-4")


def test_what_other_clients_send_is_understood(sft):
    """Open WebUI, FastGPT: parts of text, and fields at values that change nothing."""
    parts = [{"type": "text", "text": "你是"}, {"type": "text", "text": "谁？"}]
    sent = [{"role": "system", "content": "简短。"}, {"role": "user", "content": parts}]
    plain = [{"role": "developer", "content": "简短。"}, *QUESTION]
    neutral = dict(
        n=1,
        frequency_penalty=0,
        presence_penalty=0,
        stop=[""],
        user="u",
        tools=[],
        response_format={"type": "text"},
        extra_body={"chat_id": "1"})
    said = sft.chat(messages=sent, temperature=0, max_tokens=12, **neutral)
    expected = sft.chat(messages=plain, temperature=0, max_tokens=12)
    assert said.choices[0].message == expected.choices[0].message


FIELDS = [
    '"temperature": -1',
    '"temperature": NaN',
    '"temperature": "hot"',
    '"top_p": 0',
    '"top_p": true',
    '"top_k": -1',
    '"repetition_penalty": 1e9',
    '"max_tokens": 0',
    '"max_tokens": 1.5',
    '"seed": -1',
    '"seed": 99999999999999999999',
    '"logprobs": 21',
    '"stop": [1]',
    '"stop": ["a"' + ', "a"' * 16 + ']',
    '"stream": "false"',
    '"n": 2',
    '"echo": true',
    '"best_of": 3',
    '"frequency_penalty": 0.5',
    '"logit_bias": {"5": 100}',
    '"prompt": ["a", "b"]']
MESSAGES = [
    '',
    '3',
    '{"role": "tool", "content": "a"}',
    '{"role": ["user"], "content": "a"}',
    '{"role": "user"}',
    '{"role": "user", "content": [{"type": "image_url"}]}']
WRONG = [(400, CHAT, "{"), (400, CHAT, "[1]"), (400, CHAT, "[" * 100_000), (400, TEXT, "{}"),
         (404, "/v1/other", "{}"), (405, "/v1/models", "{}"),
         *((400, TEXT, f'{{"prompt": "a", {field}}}') for field in FIELDS),
         *((400, CHAT, f'{{"messages": [{message}]}}') for message in MESSAGES)]


@pytest.mark.parametrize("status, path, body", WRONG)
def test_a_wrong_request_is_refused_in_openais_form(sft, status, path, body):
    found, _, reply = request(sft, "POST", path, body)
    error = json.loads(reply)["error"]
    assert found == status
    assert error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_a_prompt_that_is_too_long_is_refused(sft):
    def ask(text):
        return sft.chat(messages=[{"role": "user", "content": text}])

    with pytest.raises(openai.BadRequestError, match="has .* tokens and may have 150") as refused:
        ask("月" * 300)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError, match="longer than 256 KiB") as refused:
        ask("a" * 300_000)
    assert refused.value.status_code == 413


def test_control_tokens_and_half_characters_in_a_text_are_text(sft, tok):
    messages = [{"role": "user", "content": "<|end|><|assistant|></s>\ud800"}]
    ids = tok.prompt(messages)
    assert [id for id in ids if id < 8] == tok.prompt([{"role": "user", "content": ""}])
    body = json.dumps({"messages": messages, "max_tokens": 1})
    status, _, reply = request(sft, "POST", CHAT, body)
    assert status == 200
    assert json.loads(reply)["usage"]["prompt_tokens"] == len(ids)


def test_a_vocabulary_without_a_known_template_does_not_end_the_server(sft, tok, monkeypatch):
    def refuse(messages):
        raise SystemExit("its chat template is none of those known here")

    with monkeypatch.context() as patch:
        patch.setattr(tok, "prompt", refuse)
        with pytest.raises(openai.BadRequestError, match="template is not known here"):
            sft.chat()
    assert sft.chat(max_tokens=3, temperature=0).usage.completion_tokens == 3


def test_many_clients_at_once_get_the_answers_of_one_alone(sft, saved, tok):
    """Eight clients for the three rows of the batch."""
    def ask(i):
        messages = [{"role": "user", "content": f"{i}加{i}是几？" * (i + 1)}]
        reply = sft.chat(messages=messages, seed=i, max_tokens=10 + 9 * i, top_p=0.9)
        return messages, reply.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(ask, range(8)))
    for i, (messages, text) in enumerate(said):
        prompt = tok.prompt(messages)
        how = (serve.temperature, 0, 0.9)
        expected = alone(saved.model, prompt, 10 + 9 * i, i, tok.stop_ids, how)
        assert text == tok.decode(expected)


@pytest.fixture
def gate(monkeypatch):
    """Holds the generation: gate.steps.release(n) lets n steps pass.

    gate.calls: those that came, each with the events `joined` and `gone`, for cancelled; gate.came
    is set when one comes.
    """
    gate = SimpleNamespace(steps=threading.Semaphore(0), came=threading.Event(), calls=[])
    step = Batch.step
    join = Batch.join
    submit = Worker.submit
    cancel = Worker.cancel

    def held_step(batch):
        assert gate.steps.acquire(timeout=30)
        return step(batch)

    def seen_submit(worker, call):
        call.joined = threading.Event()
        call.gone = threading.Event()
        gate.calls.append(call)
        accepted = submit(worker, call)
        gate.came.set()
        return accepted

    def seen_join(batch, call):
        call.joined.set()
        return join(batch, call)

    def seen_cancel(worker, call):
        cancel(worker, call)
        call.gone.set()

    monkeypatch.setattr(Batch, "step", held_step)
    monkeypatch.setattr(Batch, "join", seen_join)
    monkeypatch.setattr(Worker, "submit", seen_submit)
    monkeypatch.setattr(Worker, "cancel", seen_cancel)
    return gate


@pytest.mark.parametrize("streamed", [False, True])
def test_a_full_queue_answers_429_and_clients_that_go_free_their_places(
        saved, gate, monkeypatch, streamed):
    logged = []
    monkeypatch.setattr(serve, "log", logged.append)
    body = json.dumps({"messages": QUESTION, "stream": streamed, "temperature": 0})

    def come(site):
        gate.came.clear()
        client = http.client.HTTPConnection("127.0.0.1", site.port)
        client.request("POST", CHAT, body)
        assert gate.came.wait(30)
        return client, gate.calls[-1]

    def go(client, call):
        client.sock.shutdown(socket.SHUT_RDWR)
        client.close()
        assert call.gone.wait(30)

    with serving(saved, max_batch=1, max_queue=1) as site, ThreadPoolExecutor(1) as pool:
        first = come(site)
        assert first[1].joined.wait(30)                        # the others have to wait
        waiting = come(site)
        with pytest.raises(openai.RateLimitError, match="try again later"):
            site.chat()
        go(*waiting)
        gate.came.clear()
        last = pool.submit(site.chat, temperature=0, max_tokens=5)
        assert gate.came.wait(30)
        go(*first)
        gate.steps.release(100)
        assert last.result(30).usage.completion_tokens == 5
    assert len(waiting[1].new) == 0
    assert len(first[1].new) in (1, 2)
    assert len([line for line in logged if line.endswith("cancelled")]) == 2
    assert not any("你是谁" in line for line in logged)


def test_an_answer_is_cut_at_the_time_limit(saved):
    with serving(saved, max_seconds=0) as site:
        reply = site.chat(temperature=0)
    assert reply.usage.completion_tokens == 1
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_failed_step_is_told_and_the_next_request_works(sft, monkeypatch, streamed):
    def fail(batch):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", fail)
        kind = openai.APIError if streamed else openai.InternalServerError
        with pytest.raises(kind, match="generation failed"):
            list(sft.chat(stream=streamed, max_tokens=5))
    assert sft.chat(max_tokens=5, temperature=0).usage.completion_tokens == 5


def test_the_end_of_the_server_is_told_to_those_who_wait(saved, gate, monkeypatch, capsys):
    end = Worker.end

    def ask(streamed):
        gate.came.clear()
        body = json.dumps({"messages": QUESTION, "stream": streamed, "temperature": 0})
        asked = pool.submit(request, site, "POST", CHAT, body)
        assert gate.came.wait(30)
        return asked

    def open_gate_and_end(worker):
        gate.steps.release(999)
        end(worker)

    monkeypatch.setattr(Worker, "end", open_gate_and_end)
    with ThreadPoolExecutor(2) as pool:
        with serving(saved) as site:
            whole = ask(False)
            stream = ask(True)
        status, _, reply = whole.result(30)
        assert status == 503
        assert json.loads(reply)["error"]["message"] == "the server was stopped"
        last = stream.result(30)[2].decode().strip().split("data: ")[-1]
        assert json.loads(last)["error"]["message"] == "the server was stopped"
    assert "Traceback" not in capsys.readouterr().err


# ---- who may come in

def test_other_web_pages_and_names_are_refused(sft):
    own = f"http://127.0.0.1:{sft.port}"
    for headers in {}, {"Origin": own}, {"Host": "localhost:80"}, {"Host": "LOCALHOST"}:
        assert request(sft, "GET", "/", headers=headers)[0] == 200, headers
    foreign = [{"Host": "evil.example"}, {"Host": f"evil.example:{sft.port}"}, {"Origin": "null"},
               {"Origin": "https://evil.example"}, {"Origin": own + "0"}, {"Origin": "http://["},
               {"Host": ""}]
    for headers in foreign:
        assert request(sft, "GET", "/", headers=headers)[0] == 403, headers
        assert request(sft, "POST", CHAT, "{}", headers)[0] == 403, headers


def test_the_page_may_run_its_own_code_only_and_no_file_is_served(sft):
    status, headers, page = request(sft, "GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200
    assert "default-src 'none'; connect-src 'self';" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert b"http" not in page.replace(b"http://www.w3.org/2000/svg", b"")       # no other host
    for path in "/serve.html", "/../model.py", "/v1/models/../../model.py", "/%2e%2e/model.py":
        assert request(sft, "GET", path)[0] == 404, path


def test_a_key_is_asked_for(saved):
    with serving(saved, api_key="secret") as site:
        assert [model.id for model in site.client.models.list()] == ["tiny"]
        assert request(site, "GET", "/", headers={"Host": "my.server"})[0] == 200
        lower = {"Authorization": "bearer secret"}
        assert request(site, "GET", "/v1/models", headers=lower)[0] == 200
        for key in "secre", "secrets", "", "sécret":
            headers = {"Authorization": f"Bearer {key}"}
            assert request(site, "GET", "/v1/models", headers=headers)[0] == 401
        with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            site.client.with_options(api_key="other").models.list()


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.setattr(serve, "host", "0.0.0.0")
    with pytest.raises(SystemExit, match="--host=0.0.0.0 .* --api_key="):
        serve.check_constants()
    monkeypatch.setattr(serve, "api_key", "secret")
    serve.check_constants()


def test_the_script_serves_until_ctrl_c(saved, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        constants = dict(checkpoint=saved.sft, device="cpu", dtype="float32", port=port)
        for name, value in constants.items():
            monkeypatch.setattr(serve, name, value)
        with pytest.raises(SystemExit, match=f"--port={port}: "):
            serve.main()
    run = uvicorn.Server.run
    seen = []

    def ask_and_interrupt():
        seen.append(request(SimpleNamespace(port=port), "GET", "/v1/models")[0])
        os.kill(os.getpid(), signal.SIGINT)

    def run_with_a_client(server, sockets):
        assert sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask_and_interrupt)
            try:
                run(server, sockets)
            finally:
                asked.result(30)

    monkeypatch.setattr(uvicorn.Server, "run", run_with_a_client)
    serve.main()
    assert seen == [200]
    assert f"http://127.0.0.1:{port} in a browser" in capsys.readouterr().out


# ---- the page, in a real browser

@pytest.fixture(scope="module")
def browser():
    """The system's Chromium or Chrome, else the one that Playwright has downloaded."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = "chromium", "chromium-browser", "google-chrome"
    found = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: playwright install chromium ({str(error)[:99]})")
        yield browser
        browser.close()


@contextmanager
def opened(browser, site, **options):
    """A new visitor's page; no error in its code, and nothing that its own policy forbids."""
    context = browser.new_context(**options)
    problems = []
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text))
    page.goto(f"http://127.0.0.1:{site.port}/")
    page.locator("#empty").wait_for()                          # it has asked which model there is
    yield page
    context.close()
    assert not [text for text in problems if "Failed to load resource" not in text]


def reload(page):
    page.reload()
    page.locator("#empty").wait_for()


def ask(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def texts(page):
    """What the question and the answer show."""
    return page.locator(".turn .text").all_text_contents()


LONGER = "n => (document.querySelector('.assistant .text')?.textContent.length ?? 0) > n"


def test_a_visitor_asks_sees_the_answer_stream_and_stops_it(browser, sft, gate):
    with opened(browser, sft, locale="zh-CN") as page:
        assert page.inner_text("#send") == "发送"
        assert "对话模型" in page.inner_text("#facts")
        page.click("#gear")
        page.fill("#seed", "5")                                # of an answer that soon has text
        page.click("#gear")
        ask(page, "<b>你是谁？</b>")
        page.wait_for_function(LONGER, arg=0)
        first = texts(page)[1]
        gate.steps.release(5)
        page.wait_for_function(LONGER, arg=len(first))
        page.click("#language")                                # there and back in the middle of it
        page.click("#language")
        assert texts(page)[1].startswith(first)
        assert page.locator("#stop").is_visible()
        page.click("#stop")
        assert gate.calls[0].gone.wait(30)
        gate.steps.release(1)                                  # the one that was held
        page.locator("#send").wait_for()
        said = texts(page)
        assert said[0] == "<b>你是谁？</b>"
        assert "已停止" in page.inner_text(".foot")

        reload(page)                                           # the conversation is kept
        page.click("#list .title")
        assert texts(page) == said
        page.click("#language")
        assert page.inner_text("#send") == "Send"
        assert "stopped" in page.inner_text(".foot")
        reload(page)                                           # and so is the language
        assert page.inner_text("#send") == "Send"
        assert page.get_attribute("html", "lang") == "en"

        page.set_viewport_size({"width": 360, "height": 640})  # a telephone
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not page.locator("#list").is_visible()
        page.click("#menu")
        page.click("#list .title")
        assert not page.locator("#list").is_visible()
        assert texts(page) == said
        ask(page, "再说一遍。")                                 # the next answer hangs, and is deleted
        page.wait_for_function("document.querySelectorAll('.turn').length === 4")
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#menu")
        page.click("#list .delete")
        page.locator("#empty").wait_for()
        page.locator("#send").wait_for()
        assert page.locator("#list li").count() == 0
        assert gate.calls[1].gone.wait(30)
        gate.steps.release(1)


def test_the_page_says_what_sample_py_says_and_shows_the_odds(browser, sft, saved, sample_says):
    reply = sft.chat(max_tokens=25, logprobs=True, top_logprobs=6, **DRAWN)
    tokens = reply.choices[0].logprobs.content
    likely = [{one.token: one.logprob for one in token.top_logprobs} for token in tokens]
    at = next(i for i in range(1, 25) if tokens[i].token in likely[i])
    del likely[at][tokens[at].token]
    expected = [tokens[at].logprob, *likely[at].values()]
    with opened(browser, sft, locale="en-US") as page:
        page.click("#gear")
        for name, value in {**DRAWN, "max_tokens": 25}.items():
            page.fill(f"#{name}", str(value))
        page.press("#seed", "Escape")
        ask(page, "你是谁？")
        page.click(".tokens")
        page.locator(".token").nth(at - 1).click()
        page.keyboard.press("ArrowRight")
        shown = page.locator(".odds b").all_inner_texts()
        page.click(".tokens")
        assert texts(page)[1] == sample_says(saved.sft, "你是谁？", **DRAWN)
    percent = [float(text.split()[0]) for text in shown]
    assert percent == pytest.approx([100 * math.exp(log_p) for log_p in expected], abs=0.06)


def test_opening_the_conversation_that_is_being_answered_keeps_its_answer(browser, sft, gate):
    with opened(browser, sft, locale="en-US") as page:
        page.click("#gear")
        page.fill("#seed", "5")
        page.click("#gear")
        ask(page, "你是谁？")
        page.wait_for_function(LONGER, arg=0)
        page.click("#list .title")
        assert gate.calls[0].gone.wait(30)
        gate.steps.release(1)
        page.locator("#send").wait_for()
        assert len(texts(page)) == 2


BROKEN = "localStorage['model.chat.1'] = '{'; localStorage['model.settings'] = '{'"
FORBIDDEN = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no') } })"
FULL = """for (let i = 0, n = 2 ** 22; n >= 1; i += 1) {
    try { localStorage[i] = 'x'.repeat(n) } catch { n /= 2 }
}"""


@pytest.mark.parametrize("storage", [BROKEN, FORBIDDEN, FULL])
def test_the_page_works_where_the_browser_cannot_store(browser, sft, storage):
    context = browser.new_context(locale="en-US")
    context.add_init_script(storage)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{sft.port}/")
    page.locator("#empty").wait_for()
    page.click("#language")
    assert page.inner_text("#send") == "发送"
    page.click("#gear")
    page.fill("#max_tokens", "9")
    page.press("#max_tokens", "Escape")
    ask(page, "你是谁？")
    page.locator(".tokens").wait_for()
    assert len(texts(page)) == 2
    context.close()


def test_nothing_that_a_model_says_becomes_html(browser, sft):
    evil = "<img src=x onerror='window.evil=1'><script>window.evil=1</script>"
    top = [{"token": evil, "logprob": -0.1}, {"token": evil + "!", "logprob": -3}]
    choice = {"index": 0, "delta": {"content": evil}, "finish_reason": "stop",
              "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
    answer = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    refusal = json.dumps({"error": {"message": evil, "code": None}})
    answers = [dict(content_type="text/event-stream", body=answer), dict(status=503, body=refusal)]
    with opened(browser, sft, locale="en-US") as page:
        page.route("**" + CHAT, lambda route: route.fulfill(**answers.pop(0)))
        ask(page, evil)
        page.click(".tokens")
        page.click(".token")
        assert page.locator(".odds span").first.text_content() == evil.replace(" ", "␣")
        reload(page)
        page.click("#list .title")
        assert texts(page) == [evil, evil]
        page.click(".foot >> text=Again")
        page.locator(".error").wait_for()
        assert page.locator(".error").text_content() == evil
        assert page.locator("main img, main script, aside img, aside script").count() == 0
        assert page.evaluate("window.evil === undefined")


def test_a_pretrained_model_continues_a_text(browser, pretrained, saved, sample_says):
    with opened(browser, pretrained, locale="en-US", color_scheme="dark") as page:
        page.click("#gear")
        page.fill("#seed", "1337")
        page.fill("#max_tokens", "25")
        page.fill("#input", "从前，小猫")
        assert page.inner_text("#send") == "Continue"
        page.press("#input", "Control+Enter")
        page.locator(".tokens").wait_for()
        said = sample_says(saved.pretrain, "从前，小猫", seed=1337, temperature=0.7, top_p=0.9)
        assert page.input_value("#input") == "".join(texts(page)) == said
