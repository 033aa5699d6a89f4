"""Pretrain: the bins of prepare_pretrain.py -> a model that continues text.

    python pretrain.py                             one GPU, a Mac, or the CPU
    torchrun --nproc_per_node=4 pretrain.py        four GPUs of one machine

and on the first of two machines (on the second with --node_rank=1):

    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=10.0.0.1 pretrain.py

Writes to out_dir: last.pt (everything that --resume needs), best.pt (the weights with the lowest
validation loss), log.csv (one row a step), run.json (its speed) and curve.png.
"""
import config                                  # before torch: sets how its threads wait
import math
from contextlib import nullcontext

import numpy as np
import torch

import checkpoints
import runtime
from model import IGNORE, Model, ModelConfig, generate
from optim import make_optimizers
from tokenizer import load as load_tokenizer

# data
tokenizer      = "data/tokenizer.model"  # the one that prepare_pretrain.py was given
data_dir       = "data/pretrain"         # train.bin, val.bin, meta.json
out_dir        = "out/pretrain"          # last.pt, best.pt, log.csv, curve.png
resume         = False                   # go on from out_dir/last.pt exactly, if it is there
overwrite      = False                   # start anew although out_dir holds a run
init_from      = ""                      # start from the weights of this checkpoint; empty: anew
# model; the defaults are 34 M parameters with a vocabulary of 16,384; init_from brings its own
# shape, in which max_seq_len, and for a longer context rope_theta or rope_factor, may change
dim            = 512                     # width
n_layers       = 8                       # depth
n_heads        = 4                       # query heads; must divide dim; heads of 128 learn fastest
n_kv_heads     = 0                       # key/value heads; 0: n_heads; fewer: a smaller KV cache
hidden_dim     = 0                       # width of the feed-forward layers; 0: 8/3 dim
max_seq_len    = 512                     # tokens of a row, the longest context the model learns
rope_theta     = 0.0                     # base of the rotary frequencies; 0: 10,000, or init_from's
rope_factor    = 1.0                     # above 1: stretch positions, see continued()
tie_embeddings = True                    # one matrix embeds and scores the tokens
qk_norm        = True                    # RMSNorm on queries and keys (Qwen3): calmer training
mask_documents = True                    # documents packed into one row do not see each other
# optimization; a step is an optimizer step
batch_tokens   = 131_072                 # tokens per step over all processes; sets the accumulation
micro_batch    = 0                       # rows per process and pass; 0: as many as the card holds
epochs         = 1.0                     # passes over train.bin
max_steps      = 0                       # steps; 0: as many as epochs asks for
lr             = 6e-3                    # peak learning rate of AdamW (embeddings, head, norms)
muon_lr        = 5e-3                    # peak learning rate of Muon (the rest); 0: AdamW for all
lr_min         = 0.1                     # where the cosine ends, as a fraction of the peak
warmup         = 0.02                    # linear warm-up, a share of the steps, 500 at most; 0: no
weight_decay   = 0.1                     # on matrices only
grad_clip      = 1.0                     # clip the gradient's norm to this; 0: off
seed           = 1337                    # of the initial weights and the order of the data
# machine
shard          = ""                      # optimizer | full: processes share the model (sharding.py)
offload        = False                   # with shard: the shares are in the host's memory
recompute      = False                   # compute blocks twice: much less memory, a third more time
device         = "auto"                  # auto | cuda | mps | cpu
dtype          = "auto"                  # auto (bfloat16 if fast) | bfloat16 | float16 | float32
compile        = "auto"                  # auto (CUDA, long runs on CPUs) | on | off: torch.compile
# watching
eval_interval  = 250                     # steps between validations; last.pt (and best.pt) is saved
eval_tokens    = 1_048_576               # validate on this many tokens at most
save_interval  = 0                       # steps between further saves of last.pt; 0: none
log_interval   = 10                      # steps between printed lines
sample_prompts = "从前|今天|人工智能"      # continued at validations; separated by |; empty: none
sample_tokens  = 60                      # tokens of each continuation
constants = runtime.override(globals())


def read_batch(data, rows, tok, device):
    """Rows of the flat token file as inputs and targets (B, T) and their cu_seqlens.

    A document stands in the file as d1 .. dn eos. On the input side its predecessor's eos becomes
    bos: the model sees bos d1 .. dn and learns d1 .. dn eos. So bos means "a text begins", and is
    all the context that an empty prompt has.
    """
    tokens = np.full((len(rows), max_seq_len + 1), -1, dtype=np.int64)
    for line, row in zip(tokens, rows):
        begin = int(row) * max_seq_len
        piece = data[begin:begin + max_seq_len + 1]
        line[:len(piece)] = piece              # the last row of the file is shorter
    x, y = tokens[:, :-1], tokens[:, 1:]
    starts = (x == tok.eos_id) | (np.arange(max_seq_len) == 0)
    x = np.where((x == tok.eos_id) | (x < 0), tok.bos_id, x)
    y = np.where(y < 0, IGNORE, y)
    cu_seqlens = None
    if mask_documents:
        cu_seqlens = np.append(np.flatnonzero(starts), x.size).astype(np.int32)
    return [runtime.to_device(a, device) for a in (x, y, cu_seqlens)]


def continued(shape):
    """The ModelConfig of init_from, with a longer context if max_seq_len asks for one.

    Beyond its context a model meets angles between positions that it has not learnt. Two ways make
    them known ones: a larger rope_theta slows all frequencies, the low ones most (Xiong et al.
    2023, arXiv:2309.16039); rope_factor interpolates positions, but for the high frequencies,
    which tell neighbours apart (Chen et al. 2023, arXiv:2306.15595, with the ramp of Llama 3).
    """
    shape, context = dict(shape), shape["max_seq_len"]
    if max_seq_len > context and not rope_theta and rope_factor == 1:
        raise ValueError(f"the model of {init_from} reads {context} tokens at most; for "
                         f"--max_seq_len={max_seq_len} raise --rope_theta= or --rope_factor=")
    if rope_factor > 1 and max_seq_len <= context:
        raise ValueError(f"the model of {init_from} reads {context} tokens already; --rope_factor="
                         f"{rope_factor} is for a larger --max_seq_len=")
    if rope_theta:
        shape["rope_theta"] = rope_theta
    if rope_factor > 1:
        scaling = dict(factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=context)
        scaling.update(shape["rope_scaling"] or {})            # of an earlier continuation
        shape["rope_scaling"] = {**scaling, "factor": rope_factor * scaling["factor"]}
    shape["max_seq_len"] = max(max_seq_len, context)
    return ModelConfig(**shape)


def schedule(step):
    """Learning rate of a step (from 1) as a fraction of its peak: warm-up, then a cosine."""
    warmup_steps = min(500, round(warmup * max_steps))
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return lr_min + (1 - lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


def sample(model, tok, autocast, process):
    """Print continuations of sample_prompts, with the same random numbers every time."""
    generator = torch.Generator(process.device).manual_seed(seed)
    for prompt in filter(None, sample_prompts.split("|")):
        ids = [tok.bos_id] + tok.encode(prompt)
        if len(ids) >= model.config.max_seq_len:
            print(f"  | {prompt[:20]}... ({len(ids)} tokens: too long for the context, left out)")
            continue
        with autocast:
            steps = generate(model, [ids], sample_tokens, temperature=0.8, top_p=0.9,
                             stop_ids={tok.eos_id}, generator=generator)
            new = [token for (token,) in steps]
        print("  | " + tok.decode(ids + new).replace("\n", "\n  | "), flush=True)


def main():
    global max_steps, micro_batch
    config.check_range(1, max_seq_len=max_seq_len, eval_interval=eval_interval,
                       log_interval=log_interval, rope_factor=rope_factor)
    if rope_factor > 1 and not init_from:
        raise SystemExit(f"--rope_factor={rope_factor} is for a longer context than that of "
                         "--init_from=, which is empty")
    made_by = "prepare_pretrain.py"
    tok = load_tokenizer(tokenizer)
    meta = checkpoints.read_meta(f"{data_dir}/meta.json", tok, made_by)
    train, val = (checkpoints.open_tokens(f"{data_dir}/{part}.bin", meta[part]["tokens"], meta,
                                          made_by, tok.vocab_size) for part in ("train", "val"))
    n_rows = math.ceil((len(train) - 1) / max_seq_len)
    n_val_rows = math.ceil((len(val) - 1) / max_seq_len)
    n_val_rows = min(n_val_rows, max(1, eval_tokens // max_seq_len))
    batch_rows = batch_tokens // max_seq_len
    max_steps = max_steps or math.ceil(epochs * n_rows / max(1, batch_rows))
    if not (n_rows and n_val_rows and max_steps):
        raise SystemExit(f"{data_dir}: {n_rows} rows to train on, {n_val_rows} to validate on, "
                         f"epochs is {epochs}: none of them may be 0; {made_by} with "
                         "more text, or a larger val_fraction")
    pretrained = checkpoints.load_for(init_from, tok) if init_from else None
    try:
        shape = continued(pretrained["shape"]) if pretrained else ModelConfig(
            tok.vocab_size, dim, n_layers, n_heads, n_kv_heads, 0, hidden_dim, max_seq_len,
            rope_theta or 10_000.0, tie_embeddings=tie_embeddings, qk_norm=qk_norm)
    except ValueError as error:
        raise SystemExit(f"pretrain.py: {error}") from None
    identity = {**vars(shape), "max_seq_len": max_seq_len, "tokenizer": tok.sha256,
                "rows": n_rows, "data": checkpoints.data_hash(meta), "batch_tokens": batch_tokens,
                "seed": seed}
    saved = checkpoints.open_run(out_dir, resume, overwrite, "pretrain", identity)
    must_agree = {**constants, "the step of last.pt": saved and saved["step"]}
    process = runtime.start(device, batch_rows, must_agree, offload)
    dtype_name, autocast, scaler = runtime.precision(process.device, dtype)
    runtime.check_sharding(shard, offload, compile, dtype_name, batch_rows, process)

    torch.manual_seed(seed)
    if pretrained:
        model = Model.from_state(vars(shape), pretrained.pop("model"))
    else:
        model = Model(shape)
    model.recompute = recompute
    forward = runtime.parallel(model, process, shard, dtype_name, offload)
    optimizers = make_optimizers(model, lr, muon_lr, weight_decay, dtype_name)
    start, best, skipped = checkpoints.restore(saved, model, optimizers, scaler)
    saved = None                               # frees the host's memory
    runtime.compiled(model, "off" if shard else compile, process, max_steps * batch_tokens)
    micro_batch = micro_batch or runtime.rows_that_fit(model, process, dtype_name, batch_rows,
                                                       max_seq_len)
    constants["micro_batch"] = micro_batch     # a resumed run then rounds as this one does
    facts = runtime.announce(model, process, dtype_name, max_steps - start, batch_rows, micro_batch,
                             n_rows, max_seq_len)
    about = {"stage": "pretrain", "shape": vars(shape), "identity": identity,
             "constants": constants, "tokenizer": tok.name, "tokenizer_sha256": tok.sha256}
    run = checkpoints.Run(out_dir, about, start, process)
    token_bytes = np.array([len(piece) for piece in tok.pieces])
    past_the_end = math.ceil(len(val) / max_seq_len)           # a row without tokens
    val_rounds = runtime.even_rounds(n_val_rows, past_the_end, micro_batch, process)
    meter = runtime.Meter(start, max_steps, process)
    stop, stopping = runtime.StopRequest(), False

    for step in range(start + 1, max_steps + 1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step)

        # the global batch is the same, however processes and rounds share its rows
        rows = runtime.batch_rows(step - 1, batch_rows, n_rows, seed)
        n_targets = sum(min(max_seq_len, len(train) - 1 - int(row) * max_seq_len) for row in rows)
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
                          f"pretraining, {model.n_params() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    with runtime.ending_together(), runtime.memory_advice(globals()), runtime.only_run_in(out_dir):
        code = main()
    raise SystemExit(code)
