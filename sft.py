"""Fine-tune: the bins of prepare_sft.py and a pretrained checkpoint -> a model that answers.

    python sft.py                                  one GPU, a Mac, or the CPU
    torchrun --nproc_per_node=4 sft.py             four GPUs of one machine

The loop is that of pretrain.py; `diff pretrain.py sft.py` shows what is different about
fine-tuning. Writes to out_dir: last.pt (everything that --resume needs), best.pt (the weights with
the lowest validation loss), log.csv (one row a step), run.json (its speed) and curve.png.
"""
import config                                  # before torch: sets how its threads wait
import math
from bisect import bisect_left, insort
from contextlib import nullcontext

import numpy as np
import torch

import checkpoints
import lora
import runtime
from model import IGNORE, Model, generate
from optim import make_optimizers
from tokenizer import load as load_tokenizer

# data
checkpoint     = "out/pretrain/best.pt"  # the pretrained model to start from
tokenizer      = "data/tokenizer.model"  # the one that prepare_sft.py was given
data_dir       = "data/sft"              # {train,val}.{bin,mask,idx}, meta.json
out_dir        = "out/sft"               # last.pt, best.pt, log.csv, curve.png
resume         = False                   # go on from out_dir/last.pt exactly, if it is there
overwrite      = False                   # start anew although out_dir holds a run
max_seq_len    = 0                       # tokens of a row; 0: as many as the model reads
mask_documents = True                    # examples packed into one row do not see each other
# optimization; a step is an optimizer step
batch_tokens   = 4_096                   # tokens per step over all processes; few for few examples
micro_batch    = 0                       # rows per process and pass; 0: as many as the card holds
epochs         = 2.0                     # passes over the examples
max_steps      = 0                       # steps; 0: as many as epochs asks for
lr             = 2e-3                    # peak learning rate of AdamW (embeddings, head, norms)
muon_lr        = 2e-3                    # peak learning rate of Muon (the rest); 0: AdamW for all
lr_min         = 0.1                     # where the cosine ends, as a fraction of the peak
warmup         = 0.02                    # linear warm-up, a share of the steps, 500 at most; 0: no
weight_decay   = 0.1                     # on matrices only
grad_clip      = 1.0                     # clip the gradient's norm to this; 0: off
lora_rank      = 0                       # train updates of this rank only (lora.py); 0: everything
lora_alpha     = 32.0                    # the updates count lora_alpha / lora_rank times
seed           = 1337                    # of the order of the data and of LoRA's first updates
# machine
shard          = ""                      # optimizer | full: processes share the model (sharding.py)
offload        = False                   # with shard: the shares are in the host's memory
recompute      = False                   # compute blocks twice: much less memory, a third more time
device         = "auto"                  # auto | cuda | mps | cpu
dtype          = "auto"                  # auto (bfloat16 if fast) | bfloat16 | float16 | float32
compile        = "auto"                  # auto (CUDA, long runs on CPUs) | on | off: torch.compile
# watching
eval_interval  = 100                     # steps between validations; last.pt (and best.pt) is saved
eval_tokens    = 1_048_576               # validate on this many tokens at most
save_interval  = 0                       # steps between further saves of last.pt; 0: none
log_interval   = 10                      # steps between printed lines
sample_prompts = "你好！|你是谁？|天空是什么颜色的？"  # answered at validations; a | b; empty: none
sample_tokens  = 80                      # tokens of each answer at most
constants = runtime.override(globals())


def pack(lengths, size):
    """Put examples of `lengths` inputs into few rows of `size`; returns the examples of each row.

    Best-fit decreasing: the longest example goes first, each into the fullest row that still has
    room for it (Johnson 1973).
    """
    rows, free = [], []                        # free: (slots, -turn, row), the fullest row first
    for turn, i in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        n = int(lengths[i])
        at = bisect_left(free, (n,))
        if at < len(free):
            slots, _, row = free.pop(at)
        else:
            slots, row = size, []
            rows.append(row)
        row.append(i)
        if slots > n:
            insort(free, (slots - n, -turn, row))
    return rows


class Examples:
    """The examples of one split, packed into rows of `size` inputs.

    rows: list of lists of examples; targets (len(rows),): the tokens of each row that the loss
    counts.
    """

    def __init__(self, part, meta, size, vocab_size):
        if meta.get("pairs"):
            raise SystemExit(f"{data_dir}: holds pairs of a better and a worse answer, on which "
                             "dpo.py trains; sft.py would learn both")
        self.tokens, self.mask, self.starts, lengths, targets = checkpoints.open_examples(
            data_dir, part, meta, size, vocab_size)
        self.size = size
        self.rows = pack(lengths, size)
        self.targets = np.array([targets[row].sum() for row in self.rows])


def read_batch(data, rows, tok, device):
    """Rows of packed examples as inputs and targets (B, T) and their cu_seqlens.

    The target is the next token where that is part of an answer, and IGNORE everywhere else.
    """
    shape = len(rows), data.size
    x, y = np.full(shape, tok.pad_id), np.full(shape, IGNORE)
    starts = np.zeros(shape, dtype=bool)
    for b, row in enumerate(rows):
        at = 0
        for i in data.rows[row] if row < len(data.rows) else ():
            example = slice(data.starts[i], data.starts[i + 1])
            ids, mask = data.tokens[example].astype(np.int64), data.mask[example]
            end = at + len(ids) - 1
            x[b, at:end] = ids[:-1]
            y[b, at:end] = np.where(mask[1:], ids[1:], IGNORE)
            starts[b, at] = True
            at = end
        starts[b, at:at + 1] = True            # the padding, if there is any
    cu_seqlens = None
    if mask_documents:
        cu_seqlens = np.append(np.flatnonzero(starts), x.size).astype(np.int32)
    return [runtime.to_device(a, device) for a in (x, y, cu_seqlens)]


def schedule(step):
    """Learning rate of a step (from 1) as a fraction of its peak: warm-up, then a cosine."""
    warmup_steps = min(500, round(warmup * max_steps))
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return lr_min + (1 - lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


def sample(model, tok, autocast, process):
    """Print the most likely answers to sample_prompts."""
    for prompt in filter(None, sample_prompts.split("|")):
        ids = tok.prompt([{"role": "user", "content": prompt}])
        if len(ids) >= model.config.max_seq_len:
            print(f"  | {prompt[:20]}... ({len(ids)} tokens: too long for the context, left out)")
            continue
        with autocast:
            steps = generate(model, [ids], sample_tokens, temperature=0, stop_ids=tok.stop_ids)
            new = [token for (token,) in steps]
        print(f"  | {prompt} -> {tok.decode(new)}".replace("\n", "\n  | "), flush=True)


def main():
    global max_steps, max_seq_len, micro_batch
    config.check_range(1, eval_interval=eval_interval, log_interval=log_interval)
    config.check_range(0, lora_rank=lora_rank)
    made_by = "prepare_sft.py"
    tok = load_tokenizer(tokenizer)
    meta = checkpoints.read_meta(f"{data_dir}/meta.json", tok, made_by)
    pretrained = checkpoints.load_for(checkpoint, tok)
    shape = pretrained["shape"]
    max_seq_len = max_seq_len or shape["max_seq_len"]
    if max_seq_len > shape["max_seq_len"]:
        raise SystemExit(f"--max_seq_len={max_seq_len}: the model of {checkpoint} reads "
                         f"{shape['max_seq_len']} at most")
    train, val = (Examples(part, meta, max_seq_len, tok.vocab_size) for part in ("train", "val"))
    n_rows, n_val_rows = len(train.rows), len(val.rows)
    n_val_rows = min(n_val_rows, max(1, eval_tokens // max_seq_len))
    batch_rows = batch_tokens // max_seq_len
    max_steps = max_steps or math.ceil(epochs * n_rows / max(1, batch_rows))
    if not (n_rows and n_val_rows and max_steps):
        raise SystemExit(f"{data_dir}: {n_rows} rows to train on, {n_val_rows} to validate on, "
                         f"epochs is {epochs}: none of them may be 0; {made_by} with "
                         "more text, or a larger val_fraction")
    identity = {**shape, "max_seq_len": max_seq_len, "tokenizer": tok.sha256,
                "rows": n_rows, "data": checkpoints.data_hash(meta), "batch_tokens": batch_tokens,
                "seed": seed, "lora_rank": lora_rank, "lora_alpha": lora_rank and lora_alpha}
    saved = checkpoints.open_run(out_dir, resume, overwrite, "sft", identity)
    must_agree = {**constants, "the step of last.pt": saved and saved["step"]}
    process = runtime.start(device, batch_rows, must_agree, offload)
    dtype_name, autocast, scaler = runtime.precision(process.device, dtype)
    runtime.check_sharding(shard, offload, compile, dtype_name, batch_rows, process)

    if lora_rank and pretrained["stage"] == "pretrain":
        process.print("LoRA trains no embeddings, and this model has not learnt those of the chat "
                      "tokens: fine-tune all weights first, or go on from a model that chats")
    model = Model.from_state(shape, pretrained.pop("model"))
    model.recompute = recompute
    if lora_rank:
        lora.add(model, lora_rank, lora_alpha, seed)
    forward = runtime.parallel(model, process, shard, dtype_name, offload)
    optimizers = make_optimizers(model, lr, 0 if lora_rank else muon_lr, weight_decay, dtype_name)
    start, best, skipped = checkpoints.restore(saved, model, optimizers, scaler)
    saved = None                               # frees the host's memory
    runtime.compiled(model, "off" if shard else compile, process, max_steps * batch_tokens)
    micro_batch = micro_batch or runtime.rows_that_fit(model, process, dtype_name, batch_rows,
                                                       max_seq_len)
    constants["micro_batch"] = micro_batch     # a resumed run then rounds as this one does
    facts = runtime.announce(model, process, dtype_name, max_steps - start, batch_rows, micro_batch,
                             n_rows, max_seq_len)
    about = {"stage": "sft", "shape": shape, "identity": identity,
             "constants": constants, "tokenizer": tok.name, "tokenizer_sha256": tok.sha256}
    run = checkpoints.Run(out_dir, about, start, process)
    token_bytes = np.array([len(piece) for piece in tok.pieces])
    past_the_end = len(val.rows)                               # a row without tokens
    val_rounds = runtime.even_rounds(n_val_rows, past_the_end, micro_batch, process)
    meter = runtime.Meter(start, max_steps, process)
    stop, stopping = runtime.StopRequest(), False

    for step in range(start + 1, max_steps + 1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step)

        # the global batch is the same, however processes and rounds share its rows
        rows = runtime.batch_rows(step - 1, batch_rows, n_rows, seed)
        n_targets = int(train.targets[rows].sum())             # answer tokens of the global batch
        rounds = runtime.micro_batches(rows, micro_batch, process)
        nats = torch.zeros((), device=process.device)          # summed there, without waiting
        for i, share in enumerate(rounds):
            x, y, cu_seqlens = read_batch(train, share, tok, process.device)
            # gradients are exchanged in the last round only; DDP decides that in the forward pass
            with nullcontext() if i == len(rounds) - 1 else forward.no_sync():
                with autocast:
                    loss = forward(x, y, cu_seqlens)           # summed over the targets
                # a mean over the global batch: DDP averages over processes, world_size undoes it
                scaler.scale(loss * (process.world_size / n_targets)).backward()
            nats += loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = runtime.clip_gradient(model, grad_clip)
        nats, stopping = runtime.total([nats, stop.code], process)
        train_loss = nats / n_targets
        if math.isfinite(grad_norm + train_loss):
            for optimizer in optimizers:
                optimizer.step()
        elif scaler.is_enabled() and scaler.get_scale() > 2**-64:
            skipped += 1                       # float16 overflowed: the scaler halves its scale
        else:
            run.refuse(step, f"the loss is {train_loss}, the gradient's norm {grad_norm}")
        scaler.update()
        runtime.clear_gradients(forward, optimizers)

        row = dict(step=step, tokens=step * batch_rows * max_seq_len, lr=lr * schedule(step),
                   loss=train_loss, grad_norm=grad_norm)
        meter.step(row, skipped, log_interval)
        evaluating = step % eval_interval == 0 or step == max_steps
        if evaluating:
            with meter.paused():
                batches = (read_batch(val, share, tok, process.device) for share in val_rounds)
                val_loss, val_bpb = runtime.evaluate(model, batches, token_bytes, autocast, process)
                process.print(f"step {step:>6}  validation: {val_loss:.4f} nats per token, "
                              f"{val_bpb:.4f} bits per byte")
                row.update(val_loss=val_loss, val_bpb=val_bpb)
                if val_loss < best:
                    best = val_loss
                    run.save("best.pt", model, step, val_loss=val_loss, val_bpb=val_bpb)
        run.log(row)
        if evaluating or stopping or (save_interval and step % save_interval == 0):
            run.save("last.pt", model, step, optimizers=[o.state_dict() for o in optimizers],
                     scaler=scaler.state_dict(), best=best, skipped=skipped)
            meter.save(f"{out_dir}/run.json", facts)
        if evaluating and process.is_main and not shard:       # after saving, as it may fail
            with meter.paused(), config.only_watching("samples"):
                sample(model, tok, autocast, process)
        if stopping:
            process.print(f"stopped after step {step}, saved in {out_dir}/last.pt; --resume goes "
                          "on")
            break
    meter.close()
    run.flush()
    code = (stop.code or 143) if stopping else 0               # not 0, or a script would go on
    return runtime.finish(process, code, max(start, max_steps), best, out_dir,
                          f"fine-tuning, {model.n_params() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    with runtime.ending_together(), runtime.memory_advice(globals()), runtime.only_run_in(out_dir):
        code = main()
    raise SystemExit(code)
