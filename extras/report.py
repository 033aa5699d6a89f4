"""One page to keep and to show of a run: report.md beside the checkpoint.

    python -m extras.report     of out/pretrain, out/sft and out/dpo, or those that are there

It only collects: the data are in meta.json, the losses in log.csv and best.pt, the speed in
run.json. A score stands in the first paragraph of the page that the evaluation wrote beside the
checkpoint, with the fingerprint of that checkpoint. The samples alone are drawn now.
"""
import config                                  # before torch: sets how its threads wait
import os
import re
import shlex
from glob import escape, glob
from statistics import fmean

import torch

import checkpoints
import runtime
from model import generate

pretrain_dir       = "out/pretrain"  # out_dir of pretrain.py; left out if it is empty or not there
sft_dir            = "out/sft"       # out_dir of sft.py; the same
dpo_dir            = "out/dpo"       # out_dir of dpo.py; the same
out                = ""              # the page; empty: report.md in the last of these folders
max_new_tokens     = 120             # of a sample at most; its prompts are those of the training
temperature        = 0.7             # of the samples; 0: always the most likely token
top_p              = 0.9             # draw from the fewest tokens that reach this probability
repetition_penalty = 1.1             # above 1: tokens that have occurred become less likely
seed               = 1337            # of the draws, from 0 up
device             = "auto"          # auto | cuda | mps | cpu
dtype              = "auto"          # auto (bfloat16 if fast) | bfloat16 | float16 | float32
config.override(globals())

TITLE = "# Report card"
PREPARED = {"pretrain": "prepare_pretrain.py", "sft": "prepare_sft.py", "dpo": "prepare_sft.py"}


def cell(value):
    """A value in a Markdown table; numbers get their commas."""
    return f"{value:,}" if isinstance(value, (int, float)) else str(value).replace("|", "\\|")


def table(head, rows):
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines, ""]


def figures(folder, saved, n_params):
    """Lines: what was trained, how far, how well, how fast."""
    log = checkpoints.read_log(f"{folder}/log.csv")
    sessions = checkpoints.read_run(f"{folder}/run.json")
    shape = ", ".join(f"{name} {value}" for name, value in saved["shape"].items())
    quality = "{val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte of the validation split"
    if saved["stage"] == "dpo":
        quality = ("{val_loss:.4f} nats per held-out pair, {val_margin:.4f} between the rewards of "
                   "its answers; the chosen one is likelier in {val_preferred:.1%}")
    best = f"step {saved['step']:,}: {quality.format(**saved)}"
    rows = [("parameters", n_params), ("shape", shape), ("tokenizer", saved["tokenizer"]),
            ("best.pt", best)]
    if log:
        first, end = float(log[0]["loss"]), [float(row["loss"]) for row in log[-20:]]
        steps, tokens = int(log[-1]["step"]), int(log[-1]["tokens"])
        rows.append(("training", f"{steps:,} steps, {tokens:,} tokens; loss {first:.4f} at first, "
                                 f"{fmean(end):.4f} in the last {len(end)} steps"))
    if sessions:
        seconds, timed_tokens, timed_seconds = (
            sum(session[name] for session in sessions)
            for name in ("seconds", "timed_tokens", "timed_seconds"))
        speed, time = timed_tokens / max(1e-9, timed_seconds), runtime.seconds_as_text(seconds)
        rows.append(("speed", f"{speed:,.0f} tokens/s; {time} in all, with validation"))
        rows.append(("memory, estimated", sessions[-1]["memory"]))
    for session in sessions:
        rows.append((f"steps {session['from_step'] + 1:,} to {session['to_step']:,}",
                     f"{session['date']}, {session['device']}"))
    return table([folder, ""], rows)


def data(saved, tok):
    """Lines: a row for each split and each corpus of meta.json; or why it is no longer there."""
    path, made_by = f"{saved['constants']['data_dir']}/meta.json", PREPARED[saved["stage"]]
    columns = checkpoints.COUNTS[made_by]
    try:
        meta = checkpoints.read_meta(path, tok, made_by)
    except SystemExit as sentence:
        return [f"The data are not known any more: {sentence}."]
    rows = []
    parts = {"train": meta["train"], "val": meta["val"], **meta.get("corpora", {})}
    for name, row in parts.items():
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in row.get("dropped", {}).items())
        rows.append([name, *(row[column] for column in columns), dropped])
    return table([path, *columns, "dropped"], rows)


def samples(model, saved, tok):
    """Lines: what the model makes of each of the sample_prompts that it was watched with."""
    is_chat, lines = saved["stage"] != "pretrain", []
    for prompt in filter(None, saved["constants"]["sample_prompts"].split("|")):
        ids = [tok.bos_id] + tok.encode(prompt)
        if is_chat:
            ids = tok.prompt([{"role": "user", "content": prompt}])
        if len(ids) >= model.config.max_seq_len:
            continue
        generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
        steps = generate(model, [ids], max_new_tokens, temperature, 0, top_p, repetition_penalty,
                         tok.stop_ids if is_chat else {tok.eos_id}, generator=generator)
        new = [token for (token,) in steps]
        text = f"> {prompt}\n{tok.decode(new)}" if is_chat else tok.decode(ids + new)
        lines.append("")
        lines += [f"    {line}" for line in text.splitlines()]     # Markdown leaves it as it is
    return [*lines, "", "All constants:", ""]


def evaluations(folder, link):
    """A line for each page of an evaluation: its scores, if they are those of best.pt."""
    lines, now = [], checkpoints.fingerprint(f"{folder}/best.pt")
    for path in sorted(glob(f"{escape(folder)}/*.md")):
        with open(path, encoding="utf-8", errors="replace") as f:
            summary = " ".join(f.read().partition("\n\n")[0].split())
        page = f"[{os.path.basename(path)}]({link(path)})"
        if scored := re.match(r"\S.*? \(([0-9a-f]{8})\): ", summary):
            lines.append(f"{summary} ({page})" if scored[1] == now else
                         f"{page} scores another checkpoint than best.pt is now: evaluate again")
    return lines


def main():
    named = pretrain_dir, sft_dir, dpo_dir
    folders = [folder for folder in named if folder and os.path.exists(f"{folder}/best.pt")]
    if not folders:
        raise SystemExit(f"no best.pt in {', '.join(filter(None, named)) or 'no folder'}: train "
                         "first, or name the folders with --pretrain_dir=, --sft_dir=, --dpo_dir=")
    config.check_range(1, max_new_tokens=max_new_tokens)
    config.check_drawing(temperature, top_p, repetition_penalty)
    page = out or f"{folders[-1]}/report.md"
    config.check_output("out", page)

    def link(path):
        return os.path.relpath(path, os.path.dirname(page) or ".").replace(os.sep, "/")

    scores, lines = [], []
    for folder in folders:
        model, tok, saved = runtime.load_model(f"{folder}/best.pt", "", device, dtype)
        heading, figure, score = {
            "pretrain": ("Pretraining", "val_bpb", "**{:.4f} bits per byte** of validation text"),
            "sft": ("Fine-tuning", "val_bpb", "**{:.4f} bits per byte** of validation answers"),
            "dpo": ("Preferences", "val_accuracy", "moved towards the better answer in **{:.1%}** "
                    "of held-out pairs")}[saved["stage"]]
        if not {figure, "constants"} <= saved.keys():
            raise SystemExit(f"{folder}/best.pt: no run of pretrain.py, sft.py or dpo.py wrote it, "
                             "there is nothing to report")
        scores.append(f"{folder}: {model.n_params() / 1e6:.1f} M parameters, "
                      + score.format(saved[figure]))
        scores += evaluations(folder, link)
        lines += ["", f"## {heading}", *figures(folder, saved, model.n_params())]
        if os.path.exists(f"{folder}/curve.png"):
            lines.append(f"![loss over steps]({link(f'{folder}/curve.png')})")
        # a copied command must not destroy the run
        constants = shlex.join(f"--{name}={value}" for name, value in saved["constants"].items()
                               if name not in ("resume", "overwrite"))
        lines += [*data(saved, tok), *samples(model, saved, tok),
                  f"    python {saved['stage']}.py {constants}"]
    with config.whole_file(page) as f:
        f.write("\n".join([TITLE, "", *(f"- {score}" for score in scores), *lines]) + "\n")
    print("\n".join(scores) + f"\nreport: {page}")


if __name__ == "__main__":
    main()
