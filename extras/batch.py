"""Generation for many askers: one batch that they join and leave at any step, and the thread that
runs it. model.generate() does the same for prompts that begin together.

Shapes: B calls in the batch, T tokens of each that are read at once, V = vocab_size.
"""
import asyncio
import math
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field

import torch

from model import CACHE_STEP, cache_mask, choose, empty_caches


@dataclass(eq=False)
class Call:
    """What an asker wants, and how far the answer is."""
    ids: list                                  # the prompt, shorter than max_seq_len
    max_new_tokens: int
    drawing: tuple                             # temperature, top_k, top_p, repetition_penalty
    generator: torch.Generator
    stop_ids: set
    n_top: int = None                          # how many likeliest tokens to report; None: nothing
    max_seconds: float = math.inf              # of generation
    new: list = field(default_factory=list)    # the tokens drawn so far
    cancelled: bool = False
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    n_read: int = 0                            # events that the asker has taken: a token each
    pad: int = 0                               # places in its row of the cache before its prompt
    seen: torch.Tensor = None                  # (1, V) bool, as choose() takes it
    began: float = 0.0


class Batch:
    """The calls that are being generated, each in a row of one KV cache.

    A step writes to the same slot of all rows. A prompt is read into the slots just before it, so
    that rows of different lengths differ in the padding on their left, as in generate().
    """

    def __init__(self, model, max_rows):
        self.model, self.max_rows, self.calls = model, max_rows, []
        self.slot = 0                          # the next one to be written
        # enough: step() keeps the padding of at least one row below CACHE_STEP
        size = model.config.max_seq_len + CACHE_STEP
        self.caches = empty_caches(model, max_rows, size)
        self.place = torch.arange(size, device=model.norm.weight.device)

    def join(self, call):
        """Read the call's prompt into the next free row; returns the event of its first token."""
        self.shift(max(0, len(call.ids) - self.slot))
        call.pad, call.began = self.slot - len(call.ids), time.monotonic()
        call.seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool)
        call.seen[0, call.ids] = True
        call.seen = call.seen.to(self.place.device)
        self.calls.append(call)
        return self.draw([call], self.logits([call], [call.ids]))

    def step(self):
        """Draw the next token of every call; returns their events."""
        least = min(call.pad for call in self.calls)
        if least >= CACHE_STEP:                # attention then runs over fewer places
            self.shift(-least)
        self.slot += 1
        last = [call.new[-1:] for call in self.calls]
        return self.draw(self.calls[:], self.logits(self.calls, last))

    def logits(self, calls, ids):
        """The scores (B, V) of what follows the ids (B, T), which go to the slots before self.slot.

        calls: all of them, or only the last.
        """
        rows = slice(len(self.calls) - len(calls), len(self.calls))
        x = torch.tensor(ids, device=self.place.device)                           # (B, T)
        pad = torch.tensor([[call.pad] for call in calls], device=x.device)       # (B, 1)
        slots = self.place[self.slot - x.shape[1]:self.slot]                      # (T,)
        place = self.place[:CACHE_STEP * math.ceil(self.slot / CACHE_STEP)]
        mask = cache_mask(place, slots, pad[:, 0])                       # (B, 1, T, places)
        rope = self.model.rope[:, slots - pad]                                    # (2, B, T, 1, D)
        caches = [(keys[rows], values[rows], slots) for keys, values in self.caches]
        return self.model.next_logits(x, rope, mask, caches)

    def draw(self, calls, logits):
        """Draw a token for each of the calls from the scores (B, V), and dismiss those that end.

        Returns an event for each: (call, token, scores as in log_probabilities() or None, end).
        end is "stop" for a stop id, "length" where the answer is cut, and None while it goes on.
        """
        events, context = [], self.model.config.max_seq_len
        for call, row in zip(calls, logits.split(1)):
            token = choose(row, call.seen, *call.drawing, call.generator)         # (1, 1)
            call.seen.scatter_(1, token, True)
            call.new.append(token.item())
            end, longest = None, min(call.max_new_tokens, context - len(call.ids))
            if call.new[-1] in call.stop_ids:
                end = "stop"
            elif len(call.new) == longest or time.monotonic() > call.began + call.max_seconds:
                end = "length"
            scores = None if call.n_top is None else log_probabilities(row[0], token, call.n_top)
            events.append((call, call.new[-1], scores, end))
            if end:
                self.leave(call)
        return events

    def leave(self, call):
        """Give up the call's row; the last row moves there."""
        row, last = self.calls.index(call), self.calls.pop()
        if last is not call:
            self.calls[row] = last
            for cache in sum(self.caches, ()):
                cache[row] = cache[len(self.calls)]
        if not self.calls:
            self.slot = 0

    def shift(self, places):
        """Move the contents of all rows to the right, or to the left if places is negative."""
        if places and self.calls:
            for cache in sum(self.caches, ()):
                rows = cache[:len(self.calls)]
                rows.copy_(rows.roll(places, dims=2))
        for call in self.calls:
            call.pad += places
        self.slot += places


def log_probabilities(logits, token, n):
    """The token's log-probability, and the n likeliest tokens with theirs, [(token, float)].

    logits (V,): the network's own, at temperature 1, before top_k, top_p and the penalty.
    """
    log_p = logits.log_softmax(-1)                                                # (V,)
    top = log_p.topk(min(n, len(log_p)))
    return log_p[token].item(), list(zip(top.indices.tolist(), top.values.tolist()))


class Worker(threading.Thread):
    """The thread that owns the batch. An event loop gives it calls, and finds their events (without
    the call itself) in call.events. To be created in that loop."""

    def __init__(self, batch, max_queue):
        super().__init__(daemon=True)
        self.batch, self.max_queue = batch, max_queue
        self.waiting, self.changed, self.ended = deque(), threading.Condition(), False
        self.loop = asyncio.get_running_loop()

    def submit(self, call):
        """Queue a call; returns False if the queue is full."""
        with self.changed:
            if len(self.waiting) >= self.max_queue:
                return False
            self.waiting.append(call)
            self.changed.notify()
            return True

    def cancel(self, call):
        """Stop a call wherever it is; nothing happens to one that has ended."""
        with self.changed:
            call.cancelled = True
            if call in self.waiting:
                self.waiting.remove(call)

    def end(self):
        with self.changed:
            self.ended = True
            self.changed.notify()
        self.join()

    @torch.inference_mode()
    def run(self):
        calls = self.batch.calls
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ended or self.waiting or calls)
                if self.ended:
                    return
                for call in [call for call in calls if call.cancelled]:
                    self.batch.leave(call)
                free = min(self.batch.max_rows - len(calls), len(self.waiting))
                joining = [self.waiting.popleft() for _ in range(free)]
            try:
                for call in joining:
                    self.send(self.batch.join(call))
                if calls:
                    self.send(self.batch.step())
            except Exception:                  # out of memory, for one: the next calls may do
                traceback.print_exc()
                self.send([(call, None, None, "error") for call in {*calls, *joining}])
                for call in calls[:]:
                    self.batch.leave(call)

    def send(self, events):
        self.loop.call_soon_threadsafe(hand_out, events)


def hand_out(events):
    for call, *event in events:
        call.events.put_nowait(event)
