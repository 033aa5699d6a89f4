"""Fine-tune: the bins of prepare_sft.py and a pretrained checkpoint -> a model that answers.

    python sft.py                                            one GPU, a Mac, or the CPU
    torchrun --nproc_per_node=4 sft.py                       four GPUs of one machine

The loop is that of pretrain.py; `diff pretrain.py sft.py` shows what is different about fine-tuning. Writes to out_dir:
last.pt (everything that --resume needs), best.pt (the lowest validation loss), log.csv, run.json (its speed), curve.png.
"""
import config                                  # before torch: sets how its threads wait
import math
from contextlib import nullcontext

import numpy as np
import torch

import checkpoints
import runtime
import tokenizer as tokenizers
from model import IGNORE, Model, generate
from optim import make_optimizers

# data
checkpoint     = "out/pretrain/best.pt"  # the pretrained model to start from
tokenizer      = "data/tokenizer.model"  # the one that prepare_sft.py was given
data_dir       = "data/sft"              # {train,val}.{bin,mask,idx}, meta.json
out_dir        = "out/sft"               # last.pt, best.pt, log.csv, curve.png
resume         = False                   # go on from out_dir/last.pt, exactly where it stopped
overwrite      = False                   # start anew although out_dir holds a run
max_seq_len    = 0                       # tokens of a row; 0: as many as the model reads
mask_documents = True                    # examples packed into one row do not see each other
# optimization; a step is an optimizer step
batch_tokens   = 4_096                   # tokens per step over all processes; few examples want small steps
micro_batch    = 0                       # rows per process and forward pass; 0: as many as the card's memory holds
epochs         = 2.0                     # passes over the examples
max_steps      = 0                       # steps; 0: as many as epochs asks for
lr             = 2e-3                    # peak learning rate of AdamW (embeddings, head, norms)
muon_lr        = 2e-3                    # peak learning rate of Muon (all other matrices); 0: AdamW for everything
lr_min         = 0.1                     # where the cosine ends, as a fraction of the peak
warmup         = 0.02                    # linear warm-up, as a share of all steps, but 500 steps at most; 0: none
weight_decay   = 0.1                     # on matrices only
grad_clip      = 1.0                     # largest norm of the gradient; 0: any
seed           = 1337                    # of the order of the data, from 0 up
# machine
device         = "auto"                  # auto | cuda | mps | cpu
dtype          = "auto"                  # auto (bfloat16 where the device has it) | bfloat16 | float16 | float32
compile        = "auto"                  # auto (CUDA, long runs on CPUs) | on | off: torch.compile, faster steps
# watching
eval_interval  = 100                     # steps between validations; last.pt is saved then, and best.pt if it is best
eval_tokens    = 1_048_576               # validate on this many tokens at most
save_interval  = 0                       # steps between further saves of last.pt; 0: only at validations
log_interval   = 10                      # steps between printed lines
sample_prompts = "你好！|你是谁？|天空是什么颜色的？"  # answered at every validation; separated by |, empty: none
sample_tokens  = 80                      # tokens of each answer at most
constants = runtime.override(globals())


def pack(lengths, size):
    """Best-fit decreasing: put examples of `lengths` inputs into as few rows of `size` as it finds; a list of lists.

    The longest example goes first, each into the fullest row that still has room for it (Johnson 1973).
    """
    rows, by_room, rooms = [], [[] for _ in range(size + 1)], 0        # bit r of rooms: a row with room r is there
    for i in np.argsort(-lengths, kind="stable"):
        n = int(lengths[i])
        enough = rooms >> n
        room = n + (enough & -enough).bit_length() - 1 if enough else size
        row = by_room[room].pop() if enough else []
        if not row:
            rows.append(row)
        elif not by_room[room]:
            rooms &= ~(1 << room)
        row.append(int(i))
        by_room[room - n].append(row)
        rooms |= 1 << (room - n)
    return rows


class Examples:
    """The examples of one split, packed into rows of max_seq_len inputs.

    rows: list of lists of examples; targets (len(rows),): the tokens of each row that the loss counts.
    """

    def __init__(self, part, meta, size, vocab_size):
        path, counts, made_by = f"{data_dir}/{part}", meta[part], "prepare_sft.py"
        n, n_tokens = counts["examples"], counts["tokens"]
        self.tokens = checkpoints.open_bin(f"{path}.bin", "<u2", n_tokens, meta, made_by, vocab_size)
        self.mask = checkpoints.open_bin(f"{path}.mask", "u1", n_tokens, meta, made_by, below=2)
        self.starts = checkpoints.open_bin(f"{path}.idx", "<i8", n + 1, meta, made_by, n_tokens + 1)
        lengths = np.diff(self.starts) - 1                             # n tokens are n - 1 inputs, each with a target
        if self.starts[0] != 0 or self.starts[-1] != n_tokens or lengths.min(initial=1) < 1:
            raise SystemExit(f"{path}.idx: does not cut {path}.bin into examples; run python {made_by} again")
        if lengths.max(initial=0) > size:
            raise SystemExit(f"{path}.bin: its longest example has {lengths.max() + 1} tokens and a row of this run "
                             f"{size}: run python prepare_sft.py --max_seq_len={size}")
        self.rows, self.size = pack(lengths, size), size
        targets = np.add.reduceat(self.mask, self.starts[:-1], dtype=np.int64) if n else lengths
        if targets.min(initial=1) < 1:
            raise SystemExit(f"{path}.mask: an example has no token on which the loss counts; run python {made_by} again")
        self.targets = np.array([targets[row].sum() for row in self.rows])


def read_batch(data, rows, tok, device):
    """Rows of packed examples as inputs and targets (B, T) and the starts of the examples (cu_seqlens).

    The target is the next token where that is part of an answer, and IGNORE everywhere else.
    """
    shape = len(rows), data.size
    x, y, starts = np.full(shape, tok.pad_id), np.full(shape, IGNORE), np.zeros(shape, dtype=bool)
    for b, row in enumerate(rows):
        at = 0
        for i in data.rows[row]:
            part = slice(data.starts[i], data.starts[i + 1])
            ids, mask = data.tokens[part].astype(np.int64), data.mask[part]
            end = at + len(ids) - 1
            x[b, at:end], y[b, at:end], starts[b, at] = ids[:-1], np.where(mask[1:], ids[1:], IGNORE), True
            at = end
        starts[b, at:at + 1] = True                                    # the padding, where there is some
    cu_seqlens = np.append(np.flatnonzero(starts), x.size).astype(np.int32) if mask_documents else None
    return [runtime.to_device(a, device) for a in (x, y, cu_seqlens)]


def schedule(step):
    """Learning rate of a step (from 1) as a fraction of its peak: linear warm-up, then a cosine down to lr_min."""
    warmup_steps = min(500, round(warmup * max_steps))
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return lr_min + (1 - lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model, data, n_rows, tok, token_bytes, autocast, process):
    """Mean loss of the answers in nats per token and in bits per byte, on n_rows rows, a share in each process."""
    nats, targets, n_bytes = [], 0, 0
    for rows in runtime.micro_batches(np.arange(n_rows), micro_batch, process):
        x, y, cu_seqlens = read_batch(data, rows, tok, process.device)
        with autocast:
            nats.append(model(x, y, cu_seqlens))
        counted = y[y != IGNORE].cpu().numpy()
        targets, n_bytes = targets + len(counted), n_bytes + int(token_bytes[counted].sum())
    nats, targets, n_bytes = runtime.total([sum(n.item() for n in nats), targets, n_bytes], process)
    return nats / targets, nats / math.log(2) / n_bytes


def sample(model, tok, autocast, process):
    """Print the most likely answers to sample_prompts."""
    for question in filter(None, sample_prompts.split("|")):
        ids = tok.prompt([{"role": "user", "content": question}])
        if len(ids) >= model.config.max_seq_len:
            print(f"  | {question[:20]}... ({len(ids)} tokens: too long for the context, left out)")
            continue
        with autocast:
            new = [row[0] for row in generate(model, [ids], sample_tokens, temperature=0,
                                              stop_ids=tok.stop_ids)]
        print(f"  | {question} -> {tok.decode(new)}".replace("\n", "\n  | "), flush=True)


def main():
    global max_steps, max_seq_len, micro_batch
    config.check_range(1, eval_interval=eval_interval, log_interval=log_interval)
    tok = tokenizers.load(tokenizer)
    meta = checkpoints.read_meta(f"{data_dir}/meta.json", tok, "prepare_sft.py")
    pretrained = checkpoints.load(checkpoint)
    if pretrained["tokenizer_sha256"] != tok.sha256:
        raise SystemExit(f"{checkpoint} was trained with {pretrained['tokenizer']}, which is not {tokenizer}")
    shape = pretrained["shape"]
    max_seq_len = max_seq_len or shape["max_seq_len"]
    if max_seq_len > shape["max_seq_len"]:
        raise SystemExit(f"--max_seq_len={max_seq_len}: the model of {checkpoint} reads {shape['max_seq_len']} at most")
    train, val = (Examples(part, meta, max_seq_len, tok.vocab_size) for part in ("train", "val"))
    n_rows, n_val_rows = len(train.rows), min(len(val.rows), max(1, eval_tokens // max_seq_len))
    batch_rows = batch_tokens // max_seq_len
    max_steps = max_steps or math.ceil(epochs * n_rows / max(1, batch_rows))
    if not (n_rows and n_val_rows and max_steps):
        raise SystemExit(f"{data_dir}: {n_rows} rows to train on, {n_val_rows} to validate on, epochs is {epochs}: none "
                         "of them may be 0; prepare_sft.py with more text, or a larger val_fraction")
    identity = {**shape, "max_seq_len": max_seq_len, "tokenizer": tok.sha256, "rows": n_rows,
                "data": checkpoints.data_hash(meta), "batch_tokens": batch_tokens, "seed": seed}
    saved = checkpoints.open_run(out_dir, resume, overwrite, "sft", identity)
    process = runtime.start(device, batch_rows, {**constants, "the step of last.pt": saved and saved["step"]})
    dtype_name, autocast, scaler = runtime.precision(process.device, dtype)

    model = Model.from_state(shape, pretrained.pop("model"))
    model.to(process.device)
    optimizers = make_optimizers(model, lr, muon_lr, weight_decay, dtype_name)
    start, best, skipped = checkpoints.restore(saved, model, optimizers, scaler)
    micro_batch = micro_batch or runtime.rows_that_fit(model, process, dtype_name, batch_rows, max_seq_len)
    constants["micro_batch"] = micro_batch                             # a resumed run then rounds as this one does
    saved = None                                                       # restored: the host's memory is free again
    forward = runtime.parallel(runtime.compiled(model, compile, process, max_steps * batch_tokens), process)
    said = runtime.announce(model, process, dtype_name, max_steps - start, batch_rows, micro_batch, n_rows, max_seq_len)
    log = checkpoints.Log(f"{out_dir}/log.csv", start, process)
    token_bytes = np.array([len(piece) for piece in tok.pieces])

    def save(name, **more):
        checkpoints.refuse_to_save_nan(model, step, out_dir)
        if process.is_main:
            log.flush()                                                # never behind a checkpoint
            checkpoints.save(f"{out_dir}/{name}", {
                "stage": "sft", "model": model.state_dict(), "shape": shape, "step": step,
                "identity": identity, "constants": constants, "tokenizer": tok.name, "tokenizer_sha256": tok.sha256,
                **more})

    stop, asked, meter = runtime.StopRequest(), False, runtime.Meter(start, max_steps, process)
    for step in range(start + 1, max_steps + 1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step)

        # the global batch: the same rows, in whatever shares the processes and rounds divide them
        rows = runtime.batch_rows(step - 1, batch_rows, n_rows, seed)
        n_targets = int(train.targets[rows].sum())                     # answer tokens, over all processes and rounds
        rounds = runtime.micro_batches(rows, micro_batch, process)
        nats = torch.zeros((), device=process.device)                  # summed on the device: no wait in between
        for i, mine in enumerate(rounds):
            x, y, cu_seqlens = read_batch(train, mine, tok, process.device)
            # gradients are exchanged once, in the last round; DDP decides that in the forward pass already
            with nullcontext() if i == len(rounds) - 1 else forward.no_sync():
                with autocast:
                    loss = forward(x, y, cu_seqlens)                   # summed over the targets, not averaged
                # DDP averages over the processes: world_size gives that back, and the mean is over the global batch
                scaler.scale(loss * (process.world_size / n_targets)).backward()
            nats += loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
        nats, asked = runtime.total([nats, bool(stop)], process)
        train_loss = nats / n_targets
        if math.isfinite(grad_norm + train_loss):
            for optimizer in optimizers:
                optimizer.step()
        elif scaler.is_enabled() and scaler.get_scale() > 2**-64:      # float16 overflowed: the scaler halves its scale
            skipped += 1
        else:
            raise SystemExit(f"step {step}: the loss is {train_loss}, the gradient's norm {grad_norm}; nothing of it "
                             f"was saved: --resume goes on from {out_dir}/last.pt, with a lower learning rate perhaps")
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        row = dict(step=step, tokens=step * batch_rows * max_seq_len, lr=lr * schedule(step), loss=train_loss,
                   grad_norm=grad_norm)
        meter.step(row, skipped, log_interval)
        evaluating = step % eval_interval == 0 or step == max_steps
        if evaluating:
            with meter.paused():
                val_loss, val_bpb = evaluate(model, val, n_val_rows, tok, token_bytes, autocast, process)
                process.print(f"step {step:>6}  validation: {val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte")
                if val_loss < best:
                    best = val_loss
                    save("best.pt", val_loss=val_loss, val_bpb=val_bpb)
            row.update(val_loss=val_loss, val_bpb=val_bpb)
        log.row(**row)
        if evaluating or asked or (save_interval and step % save_interval == 0):
            save("last.pt", optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(), best=best,
                 skipped=skipped)
            meter.save(f"{out_dir}/run.json", said)
        if evaluating and process.is_main:                             # after saving: it may fail
            with meter.paused(), config.only_watching("samples"):
                sample(model, tok, autocast, process)
        if asked:
            process.print(f"stopped after step {step}, saved in {out_dir}/last.pt; --resume goes on")
            break
    meter.close()
    log.flush()
    if process.is_main and not asked:
        print(f"finished at step {max(start, max_steps)}: lowest validation loss {best:.4f} nats per token; {out_dir}/best.pt, {out_dir}/log.csv")
        with config.only_watching("curve"):
            print(runtime.draw_curve(out_dir, f'fine-tuning, {model.n_params() / 1e6:.1f} M parameters'))
    return runtime.finish((stop.code or 143) if asked else 0)          # stopped: a script must not go on to the next stage


if __name__ == "__main__":
    with runtime.ending_together(), runtime.memory_advice(globals()), runtime.only_run_in(out_dir):
        code = main()
    raise SystemExit(code)
