"""extras/serve.py: its batch against generate(), its API with OpenAI's client, its page in a browser."""
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
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import sample
from model import Model, ModelConfig, generate

pytest.importorskip("starlette", reason="pip install starlette uvicorn")
openai = pytest.importorskip("openai", reason="pip install openai")
import uvicorn

from extras import serve
from extras.batch import Batch, Call, Worker

CONTEXT = 200
QUESTION = [{"role": "user", "content": "你是谁？"}]


@pytest.fixture(scope="module")
def saved(tok, tmp_path_factory):
    """{stage: path} of one random network that says all kinds of things, and the network."""
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=CONTEXT,
                              tie_embeddings=False)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    paths, folder = {}, tmp_path_factory.mktemp("serve")
    for stage in "pretrain", "sft":
        paths[stage] = str(folder / f"{stage}.pt")
        checkpoints.save(paths[stage], {"stage": stage, "model": model.state_dict(), "shape": vars(model.config),
                                        "tokenizer": tok.name, "tokenizer_sha256": tok.sha256})
    return SimpleNamespace(model=model, **paths)


@contextmanager
def serving(path, **constants):
    """The application on a port of its own, with these constants of the script."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"dtype": "float32", **constants}.items():
            patch.setattr(serve, name, value)
        checkpoint, tok = checkpoints.load_with_tokenizer(path)
        app = serve.application(checkpoint, tok, "tiny", torch.device("cpu"))
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = listener.getsockname()[1]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=constants.get("api_key") or "none",
                               max_retries=0, default_headers={"Connection": "close"})
        try:
            yield SimpleNamespace(port=port, client=client, chat=client.chat.completions.create, server=server)
        finally:
            client.close()
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def sft(saved):
    with serving(saved.sft, max_batch=3) as site:
        yield site


@pytest.fixture(scope="module")
def pretrained(saved):
    with serving(saved.pretrain) as site:
        yield site


def alone(model, ids, n, seed=0, stop_ids=(), **how):
    """What generate() says to one prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [row[0] for row in generate(model, [ids], n, stop_ids=stop_ids, generator=generator, **how)]


def request(site, method, path, body=b"", **headers):
    """(status, headers, body) of a plain HTTP request."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


# ---- the batch

@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_calls_that_join_and_leave_a_batch_say_what_each_says_alone(saved, temperature):
    rng, model, batch, calls = random.Random(1), saved.model, Batch(saved.model, 4), []
    draw = dict(temperature=temperature, top_k=0, top_p=0.9, repetition_penalty=1.1)
    lengths = [3, 90, 1, 180, 20, CONTEXT - 1, 150, 5, 60, 2, 120, 7]      # the slots move to the right and back
    for i, length in enumerate(lengths):
        ids = [rng.randrange(400) for _ in range(length)]
        calls.append(Call(ids, rng.choice([1, 30, 400]), tuple(draw.values()), torch.Generator().manual_seed(i), {7, 9}))
    waiting, most, steps = calls[:], 0, 0
    with torch.inference_mode():
        while waiting or batch.calls:
            if waiting and len(batch.calls) < 4 and (rng.random() < 0.2 or not batch.calls):
                batch.join(waiting.pop(0))
            if batch.calls:
                batch.step()
            if rng.random() < 0.02 and batch.calls:                      # one that is given up
                gone = rng.choice(batch.calls)
                batch.leave(gone)
                gone.cancelled = True
            most, steps = max(most, len(batch.calls)), steps + 1
    assert most == 4 and any(call.cancelled for call in calls)
    for i, call in enumerate(calls):
        expected = alone(model, call.ids, call.max_new_tokens, i, {7, 9}, **draw)
        assert call.new == (expected[:len(call.new)] if call.cancelled else expected) and call.new


def test_scores_are_the_networks_own_log_probabilities(saved):
    call = Call([1, 50, 60], 3, (0.7, 0, 0.9, 1.3), torch.Generator().manual_seed(0), set(), n_top=4)
    batch = Batch(saved.model, 1)
    with torch.inference_mode():
        events = batch.join(call) + batch.step() + batch.step()
        reference = saved.model(torch.tensor([call.ids + call.new]))[0].log_softmax(-1)   # (T, V)
    for at, (_, token, (log_p, top), _) in enumerate(events, start=2):
        best = reference[at].topk(4)
        torch.testing.assert_close(log_p, reference[at, token].item(), rtol=1e-4, atol=1e-4)
        assert [token for token, _ in top] == best.indices.tolist()
    assert [end for *_, end in events] == [None, None, "length"]


# ---- the API

@pytest.fixture
def sample_says(monkeypatch, capsys):
    """sample_says(checkpoint, prompt, **constants): what sample.py prints."""
    def call(checkpoint, prompt, **constants):
        how = dict(checkpoint=checkpoint, prompt=prompt, device="cpu", dtype="float32", max_new_tokens=25)
        for name, value in {**how, **constants}.items():
            monkeypatch.setattr(sample, name, value)
        capsys.readouterr()
        sample.main()
        return capsys.readouterr().out.removesuffix("\n")
    return call


HOWS = [dict(temperature=0.0), dict(temperature=0.9, top_p=0.8, seed=5)]


@pytest.mark.parametrize("how", HOWS)
def test_a_chat_answer_is_that_of_sample_py(sft, saved, tok, sample_says, how):
    said = sample_says(saved.sft, "你是谁？", **how)
    ask = dict(model="any", messages=QUESTION, max_tokens=25, **how)
    whole, parts = sft.chat(**ask), list(sft.chat(**ask, stream=True, stream_options={"include_usage": True}))
    assert said and whole.choices[0].message.content == said
    assert (whole.model, whole.object, whole.choices[0].message.role) == ("tiny", "chat.completion", "assistant")
    assert whole.usage.prompt_tokens == len(tok.prompt(QUESTION))
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert "".join(part.choices[0].delta.content for part in parts[:-1]) == said
    assert parts[0].choices[0].delta.role == "assistant" and parts[0].object == "chat.completion.chunk"
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage and parts[-1].choices == []


@pytest.mark.parametrize("how", HOWS)
def test_a_continuation_is_that_of_sample_py(pretrained, saved, tok, sample_says, how):
    said = sample_says(saved.pretrain, "从前，小猫", **how)
    ask = dict(model="any", prompt="从前，小猫", max_tokens=25, **how)
    whole = pretrained.client.completions.create(**ask, logprobs=3)
    parts = list(pretrained.client.completions.create(**ask, stream=True))
    assert said == "从前，小猫" + whole.choices[0].text
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    scores = whole.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 25
    for token, at in zip(scores.tokens, scores.text_offset):
        behind = whole.choices[0].text[at:].lstrip("\ufffd")             # what is left of a broken character
        assert token.startswith(("bytes:", "<")) or behind.startswith(token)
    with pytest.raises(openai.BadRequestError, match="only pretrained"):
        pretrained.chat(model="any", messages=QUESTION)


def test_the_likeliest_tokens_are_reported(sft):
    choice = sft.chat(model="any", messages=QUESTION, temperature=0, max_tokens=9, logprobs=True, top_logprobs=5).choices[0]
    assert len(choice.logprobs.content) == 9
    for one in choice.logprobs.content:
        likely = [other.logprob for other in one.top_logprobs]
        assert len(likely) == 5 and likely == sorted(likely, reverse=True) and one.logprob == likely[0] < 0
        assert one.token == one.top_logprobs[0].token and one.bytes == one.top_logprobs[0].bytes
    pieces = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
    assert pieces.decode("utf-8", "replace") == choice.message.content


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_before_a_stop_string(sft, streamed):
    ask = dict(model="any", messages=QUESTION, temperature=0, max_tokens=30)
    text = sft.chat(**ask).choices[0].message.content
    stop = text[8:11]
    reply = sft.chat(**ask, stop=["不会出现的文字", stop], stream=streamed)
    said = [(part.choices[0].delta.content, part.choices[0].finish_reason) for part in reply] if streamed else \
        [(reply.choices[0].message.content, reply.choices[0].finish_reason)]
    assert "".join(part for part, _ in said) == text[:text.index(stop)] and said[-1][1] == "stop"


def test_models_are_listed(sft):
    assert [model.id for model in sft.client.models.list()] == ["tiny"]
    assert sft.client.models.retrieve("tiny").stage == "sft"
    with pytest.raises(openai.NotFoundError):
        sft.client.models.retrieve("gpt-4")


def test_what_open_webui_and_fastgpt_send_is_understood(sft):
    """Parts of text, a system message, and fields at the values that change nothing."""
    parts = [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": [{"type": "text", "text": "你是谁？"}]}]
    plain = [{"role": "developer", "content": "简短回答。"}, *QUESTION]
    how = dict(model="any", temperature=0, max_tokens=12)
    said = sft.chat(**how, messages=parts, n=1, frequency_penalty=0, presence_penalty=0, stop=None, user="u", tools=[],
                    response_format={"type": "text"}, extra_body={"chat_id": "1", "metadata": {}})
    assert said.choices[0].message == sft.chat(**how, messages=plain).choices[0].message


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WRONG = [(CHAT, "{", 400), (CHAT, "[1]", 400), (CHAT, "[" * 100_000, 400), (CHAT, '{"messages": []}', 400),
         (CHAT, '{"messages": [3]}', 400), (CHAT, '{"messages": [{"role": ["user"], "content": "a"}]}', 400),
         (CHAT, '{"messages": [{"role": "tool", "content": "a"}]}', 400),
         (CHAT, '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400), (TEXT, "{}", 400),
         (TEXT, '{"prompt": ["a", "b"]}', 400), ("/v1/other", "{}", 404), ("/v1/models", "{}", 405)] + [
    (TEXT, f'{{"prompt": "a", {field}}}', 400) for field in (
        '"temperature": -1', '"temperature": NaN', '"temperature": "hot"', '"top_p": 0', '"top_p": true', '"top_k": -1',
        '"repetition_penalty": 1e9', '"max_tokens": 0', '"max_tokens": 1.5', '"seed": -1', '"logprobs": 21',
        '"seed": 99999999999999999999', '"stop": [1]', '"stop": [""]', '"n": 2', '"echo": true', '"best_of": 3',
        '"frequency_penalty": 0.5', '"logit_bias": {"5": 100}')]


@pytest.mark.parametrize("path, body, status", WRONG)
def test_a_wrong_request_is_refused_in_openais_form(sft, path, body, status):
    found, _, reply = request(sft, "POST", path, body)
    error = json.loads(reply)["error"]
    assert found == status and error["message"] and error["type"] == "invalid_request_error" and "param" in error


def test_a_prompt_that_is_too_long_is_refused(sft):
    with pytest.raises(openai.BadRequestError, match="the prompt has .* tokens and may have 150") as refused:
        sft.chat(model="any", messages=[{"role": "user", "content": "月" * 300}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError, match="longer than 256 KiB") as refused:
        sft.chat(model="any", messages=[{"role": "user", "content": "a" * 300_000}])
    assert refused.value.status_code == 413


def test_control_tokens_and_half_characters_in_a_text_are_text(sft, tok):
    text = "<|end|><|assistant|></s>\ud800"
    ids = tok.prompt([{"role": "user", "content": text}])
    assert len(set(ids) & {2, *range(4, 8)}) == 3 and ids.count(tok.end_id) == 1
    body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1})
    status, _, reply = request(sft, "POST", CHAT, body)
    assert status == 200 and json.loads(reply)["usage"]["prompt_tokens"] == len(ids)


def test_many_clients_at_once_get_the_answers_of_one_alone(sft, saved, tok):
    """Eight clients for the three rows of the batch."""
    asked = [dict(messages=[{"role": "user", "content": f"{i}加{i}是几？" * (i + 1)}], seed=i, max_tokens=10 + 9 * i,
                  temperature=0.7, top_p=0.9) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda ask: sft.chat(model="any", **ask).choices[0].message.content, asked))
    for ask, text in zip(asked, said):
        ids = alone(saved.model, tok.prompt(ask["messages"]), ask["max_tokens"], ask["seed"], tok.stop_ids,
                    temperature=0.7, top_p=0.9)
        assert tok.decode(ids) == text


@pytest.fixture
def gate(monkeypatch):
    """Holds the generation: gate.steps.release(n) lets n steps pass; events tell what has happened."""
    gate = SimpleNamespace(steps=threading.Semaphore(0), joined=threading.Event(), gone=threading.Event())
    step, join, cancel = Batch.step, Batch.join, Worker.cancel

    def held_step(batch):
        assert gate.steps.acquire(timeout=30)
        return step(batch)

    def seen_join(batch, call):
        gate.joined.set()
        return join(batch, call)

    def seen_cancel(worker, call):
        cancel(worker, call)
        gate.gone.set()

    monkeypatch.setattr(Batch, "step", held_step)
    monkeypatch.setattr(Batch, "join", seen_join)
    monkeypatch.setattr(Worker, "cancel", seen_cancel)
    return gate


@pytest.mark.parametrize("streamed", [False, True])
def test_a_full_queue_answers_429_and_clients_that_go_free_their_places(saved, gate, monkeypatch, streamed):
    logged, came, submit = [], threading.Event(), Worker.submit
    monkeypatch.setattr(serve, "log", logged.append)
    monkeypatch.setattr(Worker, "submit", lambda *args: (submit(*args), came.set())[0])
    body = json.dumps({"messages": QUESTION, "stream": streamed, "temperature": 0})

    def come(site):
        client = http.client.HTTPConnection("127.0.0.1", site.port)
        client.request("POST", CHAT, body)
        assert came.wait(30)
        came.clear()
        return client

    def go(client):
        gate.gone.clear()
        client.sock.shutdown(socket.SHUT_RDWR)
        client.close()
        assert gate.gone.wait(30)

    with serving(saved.sft, max_batch=1, max_queue=1) as site, ThreadPoolExecutor(1) as pool:
        first = come(site)
        assert gate.joined.wait(30)                                      # in the batch; the next ones wait
        waiting = come(site)
        with pytest.raises(openai.RateLimitError, match="try again later"):
            site.chat(model="any", messages=QUESTION)
        came.clear()
        go(waiting)
        last = pool.submit(site.chat, model="any", messages=QUESTION, temperature=0, max_tokens=5)
        assert came.wait(30)
        go(first)
        gate.steps.release(100)
        assert last.result(30).usage.completion_tokens == 5
    counts = [line.split(" + ")[1] for line in logged if "cancelled" in line]
    assert counts[0] == "0 tokens, cancelled" and counts[1] in ("1 tokens, cancelled", "2 tokens, cancelled")
    assert not any("你是谁" in line for line in logged)


def test_an_answer_is_cut_at_the_time_limit(saved):
    with serving(saved.sft, max_seconds=0) as site:
        reply = site.chat(model="any", messages=QUESTION, temperature=0)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (1, "length")


def test_a_failed_step_is_told_and_the_next_request_works(sft, monkeypatch):
    step = Batch.step

    def fails(batch):
        monkeypatch.setattr(Batch, "step", step)
        raise RuntimeError("out of memory")

    for streamed, kind in (False, openai.InternalServerError), (True, openai.APIError):
        monkeypatch.setattr(Batch, "step", fails)
        with pytest.raises(kind, match="generation failed"):
            list(sft.chat(model="any", messages=QUESTION, stream=streamed, max_tokens=5))
        assert sft.chat(model="any", messages=QUESTION, max_tokens=5).usage.completion_tokens == 5


# ---- who may come in

def test_other_web_pages_and_names_are_refused(sft):
    own = f"127.0.0.1:{sft.port}"
    for headers, status in (({}, 200), ({"Origin": f"http://{own}"}, 200), ({"Host": "localhost:80"}, 200),
                            ({"Host": "evil.example"}, 403), ({"Host": f"evil.example:{sft.port}"}, 403),
                            ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403)):
        assert request(sft, "GET", "/v1/models", **headers)[0] == status, headers
        assert request(sft, "GET", "/", **headers)[0] == status, headers


def test_the_page_may_run_its_own_code_only_and_no_file_is_served(sft):
    status, headers, page = request(sft, "GET", "/")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert status == 200 and policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert b"http" not in page.replace(b"http://www.w3.org/2000/svg", b"")          # no other host
    for path in "/serve.html", "/extras/serve.py", "/../model.py", "/v1/models/../../../model.py", "/%2e%2e/model.py":
        assert request(sft, "GET", path)[0] == 404, path


def test_a_key_is_asked_for(saved):
    with serving(saved.sft, api_key="secret") as site:
        assert [model.id for model in site.client.models.list()] == ["tiny"]
        assert request(site, "GET", "/", Host="my.server")[0] == 200
        for key in "secre", "secrets", "", "sécret":
            assert request(site, "GET", "/v1/models", Authorization=f"Bearer {key}")[0] == 401
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
        for name, value in dict(checkpoint=saved.sft, device="cpu", dtype="float32", port=port).items():
            monkeypatch.setattr(serve, name, value)
        with pytest.raises(SystemExit, match=f"--port={port}: "):
            serve.main()
    seen = []

    def ask_and_interrupt(server, sockets):
        def ask():
            site = SimpleNamespace(port=sockets[0].getsockname()[1])
            seen.append(request(site, "GET", "/v1/models")[0])
            os.kill(os.getpid(), signal.SIGINT)
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            run_server(server, sockets)
        finally:
            thread.join()

    run_server = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", ask_and_interrupt)
    serve.main()
    assert seen == [200] and f"open http://127.0.0.1:{port} in a browser" in capsys.readouterr().out


# ---- the page, in a real browser

@pytest.fixture(scope="module")
def browser():
    """Chromium or Chrome: Playwright's own, or the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as playwright:
        names = "chromium", "chromium-browser", "google-chrome", "chrome"
        found = [path for path in (playwright.chromium.executable_path, *map(shutil.which, names))
                 if path and os.path.exists(path)]
        if not found:
            pytest.skip("no browser: install Chromium, or run `python -m playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, site, **options):
    """A new visitor's page; fails for errors in its code and for what its own policy forbids."""
    context = browser.new_context(**options)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(f"http://127.0.0.1:{site.port}/")
    page.locator("#empty").wait_for()                                    # it has asked which model there is
    yield page
    context.close()
    assert not problems


def reload(page):
    page.reload()
    page.locator("#empty").wait_for()


def ask(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_a_visitor_asks_sees_the_answer_stream_and_stops_it(browser, sft, gate):
    with opened(browser, sft, locale="zh-CN") as page:
        assert page.inner_text("#send") == "发送" and "对话模型" in page.inner_text("#facts")
        ask(page, "<b>你是谁？</b>")
        answer = page.locator(".assistant .text")
        page.wait_for_function("document.querySelector('.assistant .text')?.textContent")
        first = answer.text_content()
        gate.steps.release(5)
        page.wait_for_function("n => document.querySelector('.assistant .text').textContent.length > n", arg=len(first))
        assert answer.text_content().startswith(first) and page.locator("#stop").is_visible()
        gate.gone.clear()
        page.click("#stop")
        assert gate.gone.wait(30)
        gate.steps.release(1000)
        page.locator("#send").wait_for()
        said = answer.text_content()
        assert "已停止" in page.inner_text(".foot")

        reload(page)                                                     # the conversation is kept
        page.click("#list .title >> text=你是谁")
        assert [page.locator(f".{who} .text").text_content() for who in ("user", "assistant")] == ["<b>你是谁？</b>", said]
        page.click("#language")
        assert page.inner_text("#send") == "Send" and "stopped" in page.inner_text(".foot")
        reload(page)
        assert page.inner_text("#send") == "Send" and page.get_attribute("html", "lang") == "en"

        page.set_viewport_size({"width": 360, "height": 640})           # a telephone
        assert page.evaluate("document.documentElement.scrollWidth") <= 360 and not page.locator("#list").is_visible()
        page.click("#menu")
        page.click("#list .title")
        assert not page.locator("#list").is_visible() and answer.text_content() == said
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#menu")
        page.click("#list .delete")
        page.locator("#empty").wait_for()
        assert page.locator("#list li").count() == 0


def test_the_page_says_what_sample_py_says_and_shows_the_odds(browser, sft, saved, sample_says):
    with opened(browser, sft, locale="en-US") as page:
        page.click("#gear")
        page.fill("#seed", "5")
        page.fill("#max_tokens", "25")
        page.evaluate("for (const [id, x] of [['temperature', 0.9], ['top_p', 0.8]])"
                      " { $(id).value = x; $(id).oninput(); }")
        page.press("#seed", "Escape")
        ask(page, "你是谁？")
        page.locator(".inspect").wait_for()
        assert page.locator(".assistant .text").text_content() == sample_says(
            saved.sft, "你是谁？", temperature=0.9, top_p=0.8, seed=5)
        reply = sft.chat(model="any", messages=QUESTION, max_tokens=25, temperature=0.9, top_p=0.8, seed=5, logprobs=True,
                         top_logprobs=6).choices[0].logprobs.content
        page.click(".inspect")
        page.click(".token")
        page.keyboard.press("ArrowRight")                                # to the second token
        likely = [one.logprob for one in reply[1].top_logprobs if one.token != reply[1].token][:5]
        shown = [float(text.split()[0]) for text in page.locator(".odds b").all_inner_texts()]
        assert shown == pytest.approx([100 * math.exp(x) for x in [reply[1].logprob, *likely]], abs=0.06)
        page.click(".inspect")
        assert page.locator(".token").count() == 0


def test_nothing_that_a_model_says_becomes_html(browser, sft):
    evil = "<img src=x onerror=\"window.evil=1\"><script>window.evil=1</script>"
    score = {"token": evil, "logprob": -0.1}
    choice = {"index": 0, "delta": {"content": evil}, "finish_reason": "stop",
              "logprobs": {"content": [{**score, "top_logprobs": [score, {"token": evil + "!", "logprob": -3}]}]}}
    with opened(browser, sft) as page:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"))
        ask(page, evil)
        page.click(".inspect")
        page.click(".token")
        reload(page)
        page.click("#list .title")
        assert page.locator(".text").all_text_contents() == [evil, evil]
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            status=503, body=json.dumps({"error": {"message": evil, "code": None}})))
        page.click(".foot >> text=Again")
        assert page.locator(".error").text_content() == evil
        assert page.evaluate("window.evil === undefined && !document.querySelector('main img, main script, aside img')")


def test_a_pretrained_model_continues_a_text(browser, pretrained, saved, sample_says):
    with opened(browser, pretrained, locale="en-US", color_scheme="dark") as page:
        assert page.inner_text("#send") == "Continue"
        page.click("#gear")
        page.fill("#seed", "1337")
        page.fill("#max_tokens", "25")
        page.fill("#input", "从前，小猫")
        page.click("#send")
        page.locator(".inspect").wait_for()
        said = sample_says(saved.pretrain, "从前，小猫", seed=1337, temperature=0.7, top_p=0.9)
        assert page.input_value("#input") == "".join(page.locator(".text").all_text_contents()) == said
