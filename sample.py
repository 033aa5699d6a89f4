"""Read what a model writes: continue a text, or talk to a fine-tuned model. Streamed, in the terminal.

    python sample.py                                             chat (Ctrl-C stops an answer, Ctrl-D ends the chat)
    python sample.py --prompt=天空为什么是蓝色的？                   one answer
    python sample.py --checkpoint=out/pretrain/best.pt --prompt=从前 --n_samples=3          three continuations
"""
import config                                  # before torch: sets how its threads wait
import sys
import time

import torch

import checkpoints
import runtime
import tokenizer as tokenizers
from model import Model, generate

checkpoint         = "out/sft/best.pt"  # of sft.py: it answers; of pretrain.py: it continues text
tokenizer          = ""                 # empty: the one that the checkpoint names
prompt             = ""                 # empty: a chat, or with a pretrained checkpoint a text from nothing
prompt_file        = ""                 # take the prompt from this file instead
n_samples          = 1                  # answers or continuations to the prompt
max_new_tokens     = 256                # of an answer at most; it ends earlier where the model ends it
temperature        = 0.7                # 0: always the most likely token; higher: more varied
top_k              = 0                  # draw from the k most likely tokens only; 0: from all
top_p              = 0.9                # draw from the fewest tokens whose probabilities reach this; 1: from all
repetition_penalty = 1.0                # above 1: tokens that have occurred become less likely
seed               = 1337               # of the draws; 0: different every time
device             = "auto"             # auto | cuda | mps | cpu
dtype              = "auto"             # auto (bfloat16 where the device has it) | bfloat16 | float16 | float32
compile            = False              # torch.compile a step: seconds at the start, faster long texts
config.override(globals())


def longest_prompt(model):
    """Tokens of the longest prompt: a quarter of the context is enough for most answers."""
    context = model.config.max_seq_len
    return context - min(max_new_tokens, context // 4)


def stream(model, tok, ids, stop_ids, generator, continues=False):
    """Print the continuation of ids as it comes; returns its text. Ctrl-C ends it."""
    context, longest = model.config.max_seq_len, longest_prompt(model)
    if len(ids) > longest:
        print(f"[the prompt has {len(ids)} tokens, the context {context}: only its end is read]", file=sys.stderr)
        ids = ids[:1] + ids[len(ids) - longest + 1:]           # its beginning is bos, or the first word
    decoder, text, n, began = tokenizers.StreamDecoder(tok), "", 0, time.perf_counter()
    if continues:
        for id in ids:                                         # what comes is in the middle of a text, not its beginning
            decoder.push(id)
    try:
        for (token,) in generate(model, [ids], max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop_ids,
                                 generator=generator):
            piece, n = decoder.push(token), n + 1
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(decoder.flush())
    full = ", the context is full" if len(ids) + n >= context else ""
    print(f"[{n} tokens, {n / (time.perf_counter() - began):.0f} tokens/s{full}]", file=sys.stderr)
    return text


def chat(model, tok, generator):
    """Questions from the keyboard, until Ctrl-D; the oldest exchanges are forgotten when the context is full."""
    print("Type a question; /new starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    messages, interrupted = [], False
    while True:
        try:
            question = input("> ").strip()
            interrupted = False
            if question == "/new":
                messages = []
            elif question:
                asked = messages + [{"role": "user", "content": question}]
                while len(asked) > 1 and len(tok.prompt(asked)) > longest_prompt(model):
                    asked = asked[2:]
                answer = stream(model, tok, tok.prompt(asked), tok.stop_ids, generator)
                messages = asked + [{"role": "assistant", "content": answer}]
        except KeyboardInterrupt:                              # meant for the line, or came just after an answer
            print()
            if interrupted:
                return
            interrupted = True
            print("[Ctrl-C again or Ctrl-D ends]", file=sys.stderr)
        except EOFError:
            print()
            return


def main():
    config.check_range(1, n_samples=n_samples, max_new_tokens=max_new_tokens)
    config.check_drawing(temperature, top_p, repetition_penalty)
    saved, tok = checkpoints.load_with_tokenizer(checkpoint, tokenizer)
    where = runtime.start(device).device
    kind = getattr(torch, runtime.precision(where, dtype)[0])
    model = Model.from_state(saved["shape"], saved.pop("model")).to(where, kind).eval()
    if compile:
        model.compile_generation()
    generator = torch.Generator(where)
    generator.manual_seed(seed) if seed else generator.seed()
    text = prompt
    if prompt_file:
        try:
            with open(prompt_file, encoding="utf-8") as f:
                text = f.read()
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"{prompt_file}: cannot be read as UTF-8 text ({error})") from None
    answers = saved["stage"] == "sft"
    if answers and not text:
        return chat(model, tok, generator)
    for i in range(n_samples):
        if n_samples > 1:
            print(f"--- {i + 1} of {n_samples} ---")
        if answers:
            stream(model, tok, tok.prompt([{"role": "user", "content": text}]), tok.stop_ids, generator)
        else:
            print(text, end="", flush=True)
            stream(model, tok, [tok.bos_id] + tok.encode(text), {tok.eos_id}, generator, continues=True)


if __name__ == "__main__":
    main()
