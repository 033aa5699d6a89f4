"""extras/report.py through the scripts: an interrupted run, an evaluation, and the page of both."""
import csv
import hashlib
import json
import re
import shutil

import pytest

import checkpoints
from conftest import run

SMALL = [
    "--batch_tokens=320", "--micro_batch=5", "--warmup=0.4", "--device=cpu", "--dtype=float32",
    "--tokenizer=tok.model"]


def read_json(path):
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tok, pretrain_dir, sft_dir, tmp_path_factory):
    """A folder with a pretraining run of two sessions, a fine-tuning run, its BLEU, two reports."""
    path = tmp_path_factory.mktemp("run")
    (path / "tok.model").write_bytes(open(tok.name, "rb").read())
    (path / "data").mkdir()
    for name, made in ("pretrain", pretrain_dir), ("sft", sft_dir):
        (path / "data" / name).symlink_to(made)
    meta = read_json(sft_dir / "meta.json")
    with open(path / "q.jsonl", "w", encoding="utf-8") as f:
        for n in 1, 2:
            question = {"role": "user", "content": "你好！" * n}
            answer = {"role": "assistant", "content": "好"}
            f.write(json.dumps({"messages": [question, answer]}) + "\n")
    pretrain = [
        "pretrain.py", *SMALL, "--dim=32", "--n_layers=1", "--n_heads=2", "--eval_interval=3",
        f"--max_seq_len={meta['longest']}", "--sample_prompts=从前|今天"]
    commands = [
        [*pretrain, "--max_steps=4", "--overwrite"],
        [*pretrain, "--max_steps=7", "--resume"],
        ["extras.report", "--device=cpu"],
        ["sft.py", *SMALL, "--max_steps=5", "--eval_interval=2", "--sample_prompts=你是谁？"],
        ["eval_bleu.py", "--questions=q.jsonl", "--max_new_tokens=9", "--device=cpu"],
        ["extras.report", "--device=cpu", "--max_new_tokens=12"]]
    for script, *arguments in commands:
        done = run(script, path, *arguments)
        assert done.rc == 0, done.err
    return path


def read_log(folder):
    with open(folder / "log.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def best(folder):
    """The row of the log with the lowest loss of validation."""
    measured = [row for row in read_log(folder) if row["val_loss"]]
    return min(measured, key=lambda row: float(row["val_loss"]))


def sections(folder):
    """The three parts of the page: scores, pretraining, fine-tuning."""
    return re.split(r"\n## .*\n", (folder / "out/sft/report.md").read_text("utf-8"))


def test_the_figures_are_those_of_the_logs(folder):
    scores, *stages = sections(folder)
    for name, of, page, step in (
            ("pretrain", "text", stages[0], 7),
            ("sft", "answers", stages[1], 5)):
        lowest = best(folder / "out" / name)
        loss, bits = float(lowest["val_loss"]), float(lowest["val_bpb"])
        assert f"**{bits:.4f} bits per byte** of validation {of}" in scores
        said = f"step {lowest['step']}: {loss:.4f} nats per token, {bits:.4f} bits per byte"
        assert said in page
        log = read_log(folder / "out" / name)
        losses = [float(row["loss"]) for row in log]
        said = (
            f"{step} steps, {int(log[-1]['tokens']):,} tokens; loss {losses[0]:.4f} at first, "
            f"{sum(losses) / len(losses):.4f} in the last {step} steps")
        assert said in page
        kinds = ["documents", "tokens", "bytes"]
        if name == "sft":
            kinds = ["examples", "tokens", "targets"]
        meta = read_json(folder / "data" / name / "meta.json")
        for part in "train", "val":
            counts = [f"{meta[part][kind]:,}" for kind in kinds]
            assert f"| {part} | " + " | ".join(counts) + " |" in page


def test_the_summary_of_an_evaluation_is_quoted_and_its_page_linked(folder):
    summary = (folder / "out/sft/bleu.md").read_text("utf-8").split("\n\n")[0]
    assert re.search(r"BLEU-4 \d+\.\d\d on 2 questions", summary)
    assert f"- {summary} ([bleu.md](bleu.md))" in sections(folder)[0]
    # pretraining's own report is no evaluation
    assert "Report card" not in sections(folder)[0].removeprefix("# Report card")


def test_a_score_is_shown_beside_the_checkpoint_that_it_belongs_to_only(folder, tmp_path):
    """BLEU of an earlier best.pt, an exam of this one, notes in GBK; then another best.pt."""
    shutil.copytree(folder / "out/sft", tmp_path / "run")
    (tmp_path / "tok.model").write_bytes((folder / "tok.model").read_bytes())
    best = tmp_path / "run/best.pt"
    saved = checkpoints.load(str(best))
    checkpoints.save(str(best), {**saved, "step": 99})
    now = hashlib.sha256(best.read_bytes()).hexdigest()[:8]
    exam = f"run/best.pt ({now}): C-Eval val, 25.0 %"
    (tmp_path / "run/ceval_val.md").write_text(f"{exam}\n\nmore\n", "utf-8")
    (tmp_path / "run/notes.md").write_bytes("笔记：BLEU 99".encode("gbk"))

    def scores():
        arguments = ["--device=cpu", "--max_new_tokens=1", "--pretrain_dir=", "--sft_dir=run"]
        done = run("extras.report", tmp_path, *arguments)
        assert done.rc == 0, done.err
        return (tmp_path / "run/report.md").read_text("utf-8").split("\n## ")[0]
    page = scores()
    assert f"- {exam} ([ceval_val.md](ceval_val.md))\n" in page
    assert "BLEU" not in page
    assert "[bleu.md](bleu.md) scores another checkpoint" in page
    checkpoints.save(str(best), {**saved, "step": 100})
    page = scores()
    assert "25.0" not in page
    assert "[ceval_val.md](ceval_val.md) scores another checkpoint" in page


def test_the_command_to_copy_does_not_destroy_the_run(folder):
    _, pretrain, sft = sections(folder)
    for page, name in (pretrain, "pretrain"), (sft, "sft"):
        assert re.search(rf"\n    python {name}\.py --.*--max_steps=\d", page)
        assert "--overwrite" not in page
        assert "--resume" not in page


def test_samples_continue_the_prompts_and_pictures_are_linked(folder):
    _, pretrain, sft = sections(folder)
    assert "\n    从前" in pretrain
    assert "\n    今天" in pretrain
    assert re.search("\n    (从前|今天).", pretrain)            # one may end at once
    assert re.search("\n    > 你是谁？\n    .", sft)
    assert "](../pretrain/curve.png)" in pretrain
    assert "](curve.png)" in sft
    arguments = ["--device=cpu", "--max_new_tokens=12", "--out=again/card.md"]
    again = run("extras.report", folder, *arguments)
    assert again.rc == 0, again.err
    expected = "\n## ".join(["", pretrain]).replace("](../pretrain/", "](../out/pretrain/")
    assert expected.strip("\n# ") in (folder / "again/card.md").read_text("utf-8")


def test_every_session_of_a_run_is_timed(folder):
    first, second = sessions = read_json(folder / "out/pretrain/run.json")
    assert [(s["from_step"], s["to_step"]) for s in sessions] == [(0, 4), (4, 7)]
    per_step = int(read_log(folder / "out/pretrain")[0]["tokens"])
    for session, steps in (first, 3), (second, 2):  # the first step of a session is not timed
        assert session["timed_tokens"] == steps * per_step
        assert 0 < session["timed_seconds"] < session["seconds"]
    speed = 5 * per_step / (first["timed_seconds"] + second["timed_seconds"])
    page = sections(folder)[1]
    assert f"| speed | {speed:,.0f} tokens/s; " in page
    assert "| steps 1 to 4 | " in page
    assert "| steps 5 to 7 | " in page
    assert second["torch"] in page


def test_either_stage_may_be_missing(folder, tmp_path):
    # made before there was a fine-tuned model
    alone = (folder / "out/pretrain/report.md").read_text("utf-8")
    assert "## Pretraining" in alone
    assert "Fine-tuning" not in alone
    assert "](curve.png)" in alone
    for arguments in [], ["--pretrain_dir="], ["--pretrain_dir=", "--sft_dir="]:
        none = run("extras.report", tmp_path, *arguments)
        assert none.rc == 1
        assert none.err.count("\n") == 1
        assert "no best.pt in" in none.err


def test_a_checkpoint_without_a_run_is_refused(folder, tmp_path):
    saved = checkpoints.load(str(folder / "out/sft/best.pt"))
    without_run = {name: saved[name] for name in saved if name != "val_bpb"}
    checkpoints.save(str(tmp_path / "best.pt"), without_run)
    done = run("extras.report", folder, "--pretrain_dir=", f"--sft_dir={tmp_path}")
    assert done.rc == 1
    assert done.err.count("\n") == 1
    assert "nothing to report" in done.err


def test_data_that_are_gone_are_said_to_be_gone(folder, tmp_path):
    for name in "out", "tok.model":
        (tmp_path / name).symlink_to(folder / name)
    arguments = ["--device=cpu", "--max_new_tokens=1", "--sft_dir=", "--out=card.md"]
    done = run("extras.report", tmp_path, *arguments)
    assert done.rc == 0, done.err
    page = (tmp_path / "card.md").read_text("utf-8")
    assert "The data are not known any more: data/pretrain/meta.json: not there" in page
    assert "bits per byte" in page
