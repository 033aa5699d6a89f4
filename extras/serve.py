"""Show a model: a chat page, and the API that OpenAI's clients speak, in one process.

    python -m extras.serve                                     then open http://127.0.0.1:8000
    python -m extras.serve --checkpoint=out/pretrain/best.pt   a text field that the model continues
    python -m extras.serve --host=0.0.0.0 --api_key=SECRET     for other machines, with the key

Requests are generated together, as one batch that they join and leave. An answer is the one that
sample.py gives for the same seed and constants. docs/serve.md describes the API.
"""
import config                                  # before torch: sets how its threads wait
import asyncio
import base64
import hashlib
import hmac
import json
import re
import socket
import time
import uuid
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import torch

import runtime
import tokenizer as tokenizers
from extras.batch import Batch, Call, Worker

checkpoint         = "out/sft/best.pt"  # it answers; one of pretrain.py continues text
tokenizer          = ""                 # empty: the one that the checkpoint names
host               = "127.0.0.1"        # 0.0.0.0: other machines may connect, with an api_key
port               = 8000               # 0: any free one; it is printed
api_key            = ""                 # clients send "Authorization: Bearer KEY"; empty: no key
max_batch          = 32                 # requests generated at once, each a row of the KV cache
max_queue          = 128                # requests that wait for a row; more are refused with 429
max_body           = 256                # KiB of a request
max_seconds        = 300                # of generating an answer, which is cut then
most_new_tokens    = 2048               # of an answer, whatever the client asks for
max_new_tokens     = 256                # of an answer; a client may change this and the next four
temperature        = 0.7                # 0: always the most likely token; higher: more varied
top_k              = 0                  # draw from the k most likely tokens only; 0: from all
top_p              = 0.9                # draw from the fewest tokens whose probabilities reach this
repetition_penalty = 1.0                # above 1: tokens that have occurred become less likely
device             = "auto"             # auto | cuda | mps | cpu
dtype              = "auto"             # auto | bfloat16 | float16 | float32; auto as in sample.py
config.override(globals())

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise SystemExit("extras.serve needs two packages: pip install starlette uvicorn") from None

LOCAL = {"127.0.0.1", "localhost", "::1"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# fields of OpenAI's API that would change the answer, and the values at which they do not
UNSUPPORTED = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}, "tools": [],
               "functions": [], "frequency_penalty": 0, "presence_penalty": 0,
               "response_format": {"type": "text"}}


# -----------------------------------------------------------------------------------------------
# what a request asks for

class Refused(Exception):
    """An error that the client is told, in OpenAI's form."""

    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code

    def content(self):
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

    def response(self):
        return JSONResponse(self.content(), self.status)


async def read_body(request):
    """The JSON object that a request carries."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_body * 1024:
            raise Refused(413, f"the request is longer than {max_body} KiB")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object")
    if body.get("stream") not in (None, True, False):
        raise Refused(400, "stream must be true or false")
    for name, neutral in UNSUPPORTED.items():
        if body.get(name) not in (None, neutral):
            raise Refused(400, f"{name} is not supported by this server; leave it out")
    return body


def number(body, name, default, kinds=(int, float)):
    """The number in a field of the body, or the default."""
    value = default if body.get(name) is None else body[name]
    if value is not None and type(value) not in kinds:
        whole = "" if float in kinds else "whole "
        raise Refused(400, f"{name} must be a {whole}number")
    return value


def read_messages(body):
    """The dialogue of a chat request, as Tokenizer.prompt() takes it."""
    messages, dialogue = body.get("messages"), []
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one message")
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(400, "the role of a message must be system, user or assistant")
        if isinstance(content, list):          # OpenAI's other form: parts, here of text only
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str):
            raise Refused(400, "the content of a message must be text")
        dialogue.append({"role": ROLES[role], "content": content})
    return dialogue


def read_prompt(body, chat, stage, tok):
    """The ids of the prompt: a dialogue, or a text to continue."""
    if chat and stage == "pretrain":
        raise Refused(400, "this model was only pretrained: it continues text, at /v1/completions")
    if chat:
        messages = read_messages(body)
        try:
            return tok.prompt(messages)
        except SystemExit:                     # its vocabulary has a template that is not known
            raise Refused(400, "this model's chat template is not known here; it can continue "
                               "text, at /v1/completions") from None
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:          # LangChain sends lists of texts
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Refused(400, "prompt must be one string")
    return [tok.bos_id] + tok.encode(prompt)


def read_stops(body):
    """The strings at which the answer ends, other than where the model ends it."""
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refused(400, "stop must be a string or a list of strings")
    if len(stops) > 16:                        # each is looked for after every token
        raise Refused(400, "stop may have at most 16 strings")
    return [stop for stop in stops if stop]    # FastGPT sends [""] for none


def read_call(body, chat, state):
    """The Call that a body describes."""
    drawing = {"temperature": number(body, "temperature", temperature),
               "top_p": number(body, "top_p", top_p),
               "repetition_penalty": number(body, "repetition_penalty", repetition_penalty)}
    try:
        config.check_drawing(**drawing)
    except SystemExit as error:                # the limits of sample.py, in a sentence about --NAME
        raise Refused(400, str(error).removeprefix("--")) from None
    k, seed = number(body, "top_k", top_k, [int]), number(body, "seed", None, [int])
    longest = number(body, "max_tokens", max_new_tokens, [int])
    longest = min(number(body, "max_completion_tokens", longest, [int]), most_new_tokens)
    if longest < 1:
        raise Refused(400, "max_tokens must be at least 1")
    if not 0 <= k < 1 << 31 or not 0 <= (seed or 0) < 1 << 63:
        raise Refused(400, "top_k and seed must not be negative, nor of more than 31 and 63 bits")
    if chat:
        n_top = number(body, "top_logprobs", 0, [int]) if body.get("logprobs") else None
    else:
        n_top = number(body, "logprobs", None, [int])
    if not 0 <= (n_top or 0) <= 20:
        raise Refused(400, "between 0 and 20 likely tokens can be reported for each")
    ids, context = read_prompt(body, chat, state.card["stage"], state.tok), state.context
    room = context - min(longest, context // 4)                # as in sample.py
    if len(ids) > room:
        raise Refused(400, f"the prompt has {len(ids)} tokens and may have {room}, as the context "
                           f"of this model is {context} tokens", "context_length_exceeded")
    generator = torch.Generator(state.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    how = drawing["temperature"], k, drawing["top_p"], drawing["repetition_penalty"]
    return Call(ids, longest, how, generator, state.stop_ids, n_top, max_seconds)


# -----------------------------------------------------------------------------------------------
# what comes back

async def answer(call, stops, chat, tok, worker):
    """Yield the parts of an answer: (text, scores of a token or None, why the answer ends or None).

    scores: (token, its log-probability, [(likely token, its log-probability)], offset in the text).
    """
    decoder, text, said, end = tokenizers.StreamDecoder(tok), "", 0, None
    for id in [] if chat else call.ids:        # a continuation begins in the middle of a text
        decoder.push(id)
    held = max(map(len, stops), default=1) - 1                 # characters that may begin a stop
    try:
        while not end:
            token, scores, end = await call.events.get()
            if end == "error":
                raise Refused(500, "generation failed; the server's output says why")
            call.n_read += 1
            scores = scores and (token, *scores, len(text))
            text += decoder.push(token) + (decoder.flush() if end else "")
            cuts = [at for at in map(text.find, stops) if at >= 0]
            if cuts:
                text, end = text[:min(cuts)], "stop"
            until = len(text) if end else max(said, len(text) - held)
            yield text[said:until], scores, end
            said = until
    finally:                                   # the client may have gone in the middle of it
        worker.cancel(call)
        log(f"{len(call.ids)} + {call.n_read} tokens, {end or 'cancelled'}")


def label(token, tok):
    """A token as text; bytes that are no whole character as OpenAI writes them."""
    piece = tok.piece(token)
    if not piece:
        names = {tok.bos_id: "<bos>", tok.eos_id: "<eos>", tok.end_id: "<end>"}
        return names.get(token, f"<{token}>")
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def chat_logprobs(scores, tok):
    """The form of /v1/chat/completions."""
    def entry(token, log_p):
        return {"token": label(token, tok), "logprob": log_p, "bytes": list(tok.piece(token))}

    return {"content": [{**entry(token, log_p), "top_logprobs": [entry(*one) for one in top]}
                        for token, log_p, top, _ in scores]}


def text_logprobs(scores, tok):
    """The form of /v1/completions."""
    tokens, log_ps, tops, offsets = zip(*scores)
    return {"tokens": [label(token, tok) for token in tokens], "token_logprobs": log_ps,
            "top_logprobs": [{label(token, tok): log_p for token, log_p in top} for top in tops],
            "text_offset": offsets}


def choice(text, scores, end, chat, part, tok):
    """The one choice of a response, or of a part that is streamed."""
    logprobs = (chat_logprobs if chat else text_logprobs)(scores, tok) if scores else None
    if not chat:
        said = {"text": text}
    elif part:
        said = {"delta": {"content": text}}
    else:
        said = {"message": {"role": "assistant", "content": text}}
    return {"index": 0, **said, "logprobs": logprobs, "finish_reason": end}


def usage(call):
    n_prompt, n_new = len(call.ids), call.n_read
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def event(data):
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def events(parts, head, call, chat, tok, with_usage):
    """The server-sent events of a streamed answer."""
    if chat:
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        yield event({**head, "choices": [first]})
    try:
        async for text, scores, end in parts:
            if text or scores or end:
                one = choice(text, [scores] if scores else [], end, chat, True, tok)
                yield event({**head, "choices": [one]})
    except Refused as error:
        yield event(error.content())
        return
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(call)})
    yield "data: [DONE]\n\n"


async def whole(parts, head, call, chat, tok):
    """The response with the answer in one piece."""
    texts, scores, end = zip(*[part async for part in parts])
    scores = [score for score in scores if score]
    one = choice("".join(texts), scores, end[-1], chat, False, tok)
    return JSONResponse({**head, "choices": [one], "usage": usage(call)})


# -----------------------------------------------------------------------------------------------
# endpoints

async def complete(request):
    """POST /v1/chat/completions and /v1/completions."""
    state, chat = request.app.state, request.scope["path"].startswith("/v1/chat/")
    try:
        body = await asyncio.wait_for(read_body(request), timeout=30)
    except (asyncio.TimeoutError, ClientDisconnect):
        raise Refused(408, "the request did not arrive within 30 seconds") from None
    stops, call, part = read_stops(body), read_call(body, chat, state), bool(body.get("stream"))
    if not state.worker.submit(call):
        raise Refused(429, "too many requests are waiting; try again later", "queue_full")
    parts = answer(call, stops, chat, state.tok, state.worker)
    kind = ("chat.completion" + ".chunk" * part) if chat else "text_completion"
    head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind,
            "created": int(time.time()), "model": state.card["id"]}
    if part:
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and options.get("include_usage")
        return StreamingResponse(events(parts, head, call, chat, state.tok, with_usage),
                                 media_type="text/event-stream",
                                 background=BackgroundTask(state.worker.cancel, call))
    response = asyncio.ensure_future(whole(parts, head, call, chat, state.tok))
    gone = asyncio.ensure_future(request.receive())            # all that can come is a disconnect
    try:
        await asyncio.wait({response, gone}, return_when=asyncio.FIRST_COMPLETED)
        return response.result() if response.done() else JSONResponse(None)
    finally:
        response.cancel()
        gone.cancel()


async def models(request):
    """GET /v1/models, and /v1/models/NAME."""
    card = request.app.state.card
    name = request.path_params.get("name")
    if name is None:
        return JSONResponse({"object": "list", "data": [card]})
    if name != card["id"]:
        raise Refused(404, "there is no such model", "model_not_found")
    return JSONResponse(card)


async def refuse(request, error):
    """Tell the client of an error in OpenAI's form."""
    if not isinstance(error, Refused):
        message = getattr(error, "detail", "the server failed; its output says why")
        error = Refused(getattr(error, "status_code", 500), message)
    log(f"refused with {error.status}")
    return error.response()


def log(sentence):
    """One short line for each request; nothing of what it says."""
    print(time.strftime("%H:%M:%S"), sentence, flush=True)


# -----------------------------------------------------------------------------------------------
# the server

def problem(scope):
    """Why a request may not come in, as Refused, or None.

    Browsers send requests of any page that their user visits. The Host header shows a foreign name
    that was made to point here (DNS rebinding), the Origin header a foreign page.
    """
    headers = Headers(scope=scope)
    address, origin = headers.get("host", "").lower(), headers.get("origin")
    name = re.sub(r":\d*$", "", address).strip("[]")
    if not api_key and name not in LOCAL:
        return Refused(403, "without an API key this server is called 127.0.0.1 or localhost only")
    if origin is not None and origin.lower() not in (f"http://{address}", f"https://{address}"):
        return Refused(403, "requests of other web pages are refused")
    given = re.sub("^bearer +", "", headers.get("authorization", ""), flags=re.I)
    right = hmac.compare_digest(given.encode(), api_key.encode()) or not api_key
    if not right and scope["path"] != "/":
        return Refused(401, "the API key is missing or wrong", "invalid_api_key")


def guarded(app, page):
    """The app behind problem(); its headers let browsers run the page's own code and no other."""
    allowed = []
    for tag in "script", "style":
        code = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'; ")
    policy = ("default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
              f"form-action 'none'; {''.join(allowed)}frame-ancestors 'none'")
    more = {"content-security-policy": policy, "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-store"}

    async def call(scope, receive, send):
        started = False

        async def send_with_headers(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] += [(k.encode(), v.encode()) for k, v in more.items()]
            await send(message)

        refused = scope["type"] == "http" and problem(scope)
        try:
            await (refused.response() if refused else app)(scope, receive, send_with_headers)
        except asyncio.CancelledError:         # Ctrl-C, and the answer is not ready
            if scope["type"] != "http":
                raise
            error = Refused(503, "the server was stopped")
            if started:
                await send({"type": "http.response.body", "body": event(error.content()).encode()})
            else:
                await error.response()(scope, receive, send_with_headers)

    return call


def application(model, tok, stage, name):
    """The ASGI application that serves a model; stage: as in its checkpoint."""
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    try:
        batch = Batch(model, max_batch)
    except RuntimeError as error:
        raise SystemExit(f"no room for --max_batch={max_batch} answers of "
                         f"{model.config.max_seq_len} tokens: lower it ({error})") from None

    @asynccontextmanager
    async def lifespan(app):
        app.state.worker = Worker(batch, max_queue)
        app.state.worker.start()
        with suppress(asyncio.CancelledError):                 # a second Ctrl-C
            yield
        app.state.worker.end()

    async def index(request):
        return HTMLResponse(page)

    app = Starlette(lifespan=lifespan, exception_handlers=dict.fromkeys(
        (Refused, HTTPException, Exception), refuse), routes=[
            Route("/", index),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/completions", complete, methods=["POST"])])
    app.state.tok, app.state.device = tok, model.norm.weight.device
    app.state.context = model.config.max_seq_len
    app.state.stop_ids = {tok.eos_id} if stage == "pretrain" else tok.stop_ids
    defaults = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens,
                "repetition_penalty": repetition_penalty}
    app.state.card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "you",
                      "stage": stage, "n_params": model.n_params(),
                      "max_model_len": model.config.max_seq_len, "defaults": defaults}
    return guarded(app, page)


def check_constants():
    config.check_range(1, max_batch=max_batch, max_queue=max_queue, max_body=max_body,
                       max_seconds=max_seconds, most_new_tokens=most_new_tokens,
                       max_new_tokens=max_new_tokens)
    config.check_range(0, 65535, port=port)
    config.check_drawing(temperature, top_p, repetition_penalty)
    if host not in LOCAL and not api_key:
        raise SystemExit(f"--host={host} lets other machines in: set a key with --api_key=")
    if not re.fullmatch("[!-~]*", api_key):
        raise SystemExit("--api_key= may have ASCII letters, digits and punctuation only")


def main():
    check_constants()
    model, tok, saved = runtime.load_model(checkpoint, tokenizer, device, dtype)
    name = "/".join(Path(checkpoint).with_suffix("").parts[-2:])
    app = application(model, tok, saved["stage"], name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise SystemExit(f"--host={host} --port={port}: {error.strerror}; choose another") from None
    # each token leaves at once; asyncio sets this for sockets that it opens itself only
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{listener.getsockname()[1]}"
    print(f"open {url} in a browser; Ctrl-C ends", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False,
                                           timeout_graceful_shutdown=1, limit_concurrency=1000))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:                  # the usual end of a server
        pass


if __name__ == "__main__":
    main()
