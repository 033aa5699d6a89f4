"""Read what a model writes: continue a text, or talk to a fine-tuned model, in the terminal.

    python sample.py                                   chat (Ctrl-C stops an answer, Ctrl-D ends)
    python sample.py --prompt=天空为什么是蓝色的？         one answer
    python sample.py --checkpoint=out/pretrain/best.pt --prompt=从前 --n_samples=3    three stories
"""
import config                                  # before torch: sets how its threads wait
import sys
import time

import torch

import runtime
from model import generate
from tokenizer import StreamDecoder

checkpoint         = "out/sft/best.pt"  # of sft.py: it answers; of pretrain.py: it continues text
tokenizer          = ""                 # empty: the one that the checkpoint names
prompt             = ""                 # empty: chat; with a pretrained model a new text
n_samples          = 1                  # answers or continuations to the prompt
max_new_tokens     = 256                # of an answer at most; the model may end it earlier
temperature        = 0.7                # 0: always the most likely token; higher: more varied
top_k              = 0                  # draw from the k most likely tokens only; 0: from all
top_p              = 0.9                # draw from the fewest tokens that reach this probability
repetition_penalty = 1.0                # above 1: tokens that have occurred become less likely
seed               = 1337               # of the draws; 0: different every time
device             = "auto"             # auto | cuda | mps | cpu
dtype              = "auto"             # auto (bfloat16 if fast) | bfloat16 | float16 | float32
compile            = False              # torch.compile a step: slow start, then faster
config.override(globals())


def longest_prompt(model):
    """Tokens of the longest prompt: a quarter of the context is enough for most answers."""
    context = model.config.max_seq_len
    return context - min(max_new_tokens, context // 4)


def stream(model, tok, ids, stop_ids, generator, continues=False):
    """Print the continuation of ids as it comes; returns its text. Ctrl-C ends it."""
    context, longest = model.config.max_seq_len, longest_prompt(model)
    if len(ids) > longest:
        print(f"[the prompt has {len(ids)} tokens, the context {context}: only its end is read]",
              file=sys.stderr)
        ids = ids[:1] + ids[len(ids) - longest + 1:]           # the first is bos, or the first word
    decoder, text, n, began = StreamDecoder(tok), "", 0, time.perf_counter()
    if continues:                                              # we are in the middle of a text
        for id in ids:
            decoder.push(id)
    try:
        for (token,) in generate(model, [ids], max_new_tokens, temperature, top_k, top_p,
                                 repetition_penalty, stop_ids, generator=generator):
            piece, n = decoder.push(token), n + 1
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(decoder.flush())
    full = ", the context is full" if len(ids) + n >= context else ""
    speed = n / (time.perf_counter() - began)
    print(f"[tokens: {n}, {speed:.0f} tokens/s{full}]", file=sys.stderr)
    return text


def chat(model, tok, generator):
    """Answer questions from the keyboard. When the context is full, the oldest ones are dropped."""
    print("Type a question; /new starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends.",
          file=sys.stderr)
    messages, interrupted = [], False
    while True:
        try:
            question = input("> ").strip()
            if not sys.stdin.isatty():             # nobody has typed it: show it
                print(question)
            interrupted = False
            if question == "/new":
                messages = []
            elif question:
                messages.append({"role": "user", "content": question})
                while len(messages) > 1 and len(tok.prompt(messages)) > longest_prompt(model):
                    messages = messages[2:]
                answer = stream(model, tok, tok.prompt(messages), tok.stop_ids, generator)
                messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:                  # at the prompt, or just after an answer
            messages = messages[:len(messages) // 2 * 2]       # a question without its answer goes
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
    model, tok, saved = runtime.load_model(checkpoint, tokenizer, device, dtype)
    if compile:
        if not runtime.can_compile(model.norm.weight.device):
            raise SystemExit(f"--compile: {runtime.COMPILE_NEEDS}")
        model.compile_generation()
    generator = torch.Generator(model.norm.weight.device)
    generator.manual_seed(seed) if seed else generator.seed()
    answers = saved["stage"] != "pretrain"
    if answers and not prompt:
        return chat(model, tok, generator)
    for i in range(n_samples):
        if n_samples > 1:
            print(f"--- {i + 1} of {n_samples} ---")
        if answers:
            ids = tok.prompt([{"role": "user", "content": prompt}])
            stream(model, tok, ids, tok.stop_ids, generator)
        else:
            print(prompt, end="", flush=True)
            ids = [tok.bos_id] + tok.encode(prompt)
            stream(model, tok, ids, {tok.eos_id}, generator, continues=True)


if __name__ == "__main__":
    main()
