"""Every recipe from end to end, on tiny files with the schemas of the real ones; hf is replaced."""
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile

import pytest

import checkpoints
from conftest import QUESTIONS, ROOT, dialogue, story
from model import Model, ModelConfig

# hf download --repo-type dataset NAME --local-dir FOLDER --include FILES
HF = """#!/bin/sh
echo "hf $*" >> "$HUB_FOLDER/calls"
mkdir -p "$6"
cp -r "$HUB_FOLDER/$4/." "$6"
"""
SMALL = {
    "TOKENIZER_ARGS": "--vocab_size=400 --test_fraction=0.1",
    "PREPARE_ARGS": "--workers=1 --val_fraction=0.1",
    "PREPARE_SFT_ARGS": "--workers=1 --val_fraction=0.3 --test_fraction=0.2",
    "PRETRAIN_ARGS": "--dim=32 --n_layers=1 --n_heads=2 --max_seq_len=128 --batch_tokens=128 "
                     "--max_steps=2 --device=cpu --sample_prompts=",
    "SFT_ARGS": "--batch_tokens=128 --max_steps=2 --device=cpu",
    "DPO_ARGS": "--batch_pairs=2 --max_steps=2 --device=cpu",
    "BLEU_ARGS": "--max_new_tokens=5 --device=cpu"}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def questions(rng, n):
    """Pairs of different questions: the split into train, val and test goes by the question."""
    for i in range(n):
        question, answer = rng.choice(list(QUESTIONS.items()))
        yield f"{i}，{question}", answer


def turns(question, answer):
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Data sets by their names on huggingface.co, in the schemas that their readers name."""
    folder, rng = tmp_path_factory.mktemp("hub"), random.Random(6)
    texts = [story(rng, 4) for _ in range(60)]
    write_lines(folder / "stories.json", [{
        "story": "Once",
        "story_zh": text,
        "summary": "A story.",
        "source": "GPT-4",
        "instruction": {
            "prompt:": "Write", "words": ["dog", f"number {i}"], "features": ["Dialogue"]}}
        for i, text in enumerate(texts)])
    archive = folder / "adam89/TinyStoriesChinese/data.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "stories.json", "stories.json")
    minimind = folder / "jingyaogong/minimind_dataset"
    write_lines(minimind / "pretrain_t2t_mini.jsonl", [{"text": text} for text in texts])
    none = {"reasoning_content": "", "tools": "", "tool_calls": ""}
    write_lines(minimind / "sft_t2t_mini.jsonl", [
        {"conversations": [{"role": "user", "content": question, **none},
                           {"role": "assistant", "content": answer, **none}]}
        for question, answer in questions(rng, 40)])
    write_lines(minimind / "dpo.jsonl", [
        {"chosen": turns(question, answer), "rejected": turns(question, "不知道")}
        for question, answer in questions(rng, 20)])
    write_lines(folder / "pleisto/wikipedia-cn-20230720-filtered/wiki.json",
                [{"completion": text} for text in texts[:20]])
    write_lines(folder / "xuqinyang/BaiduBaike-5.63M/baike.json",
                [{"title": "词条", "summary": text, "sections": []} for text in texts[20:40]])
    pairs = [{"instruction": q, "input": "", "output": a} for q, a in questions(rng, 40)]
    write_lines(folder / "shibing624/medical/pretrain/book.json",
                [{"text": text} for text in texts[40:]])
    write_lines(folder / "shibing624/medical/finetune/qa.json", pairs[:20])
    write_lines(folder / "BelleGroup/train_1M_CN/belle.json", pairs[20:])
    client = folder / "bin/hf"
    client.parent.mkdir()
    client.write_text(HF)
    client.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory, tok):
    """Makes copies of the code, as recipes write below the folder that they lie in."""
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        for part in "extras", "recipes":
            shutil.copytree(ROOT / part, folder / part)
        (folder / "data").mkdir()
        for script in [*ROOT.glob("*.py"), ROOT / "data/make_identity.py"]:
            shutil.copy(script, folder / script.relative_to(ROOT))
        return folder
    return make


def start(folder, name, hub, **variables):
    path = f"{hub}/bin{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SMALL, "PYTHON": sys.executable, "HUB_FOLDER": str(hub),
                   "PATH": path, "PYTHONUTF8": "1", **variables}
    return subprocess.Popen(
        ["sh", f"recipes/{name}.sh"], cwd=folder, env=environment, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def sft_checkpoint(folder, tok):
    """A random model that was 'fine-tuned', its tokenizer, and dialogues that it learnt."""
    shutil.copy(tok.name, folder / "data/tokenizer.model")
    model = Model(ModelConfig(tok.vocab_size, 32, 1, 2, max_seq_len=128))
    path = folder / "out/sft/best.pt"
    path.parent.mkdir(parents=True)
    checkpoints.save(path, {
        "stage": "sft", "model": model.state_dict(), "shape": vars(model.config),
        "tokenizer": "data/tokenizer.model", "tokenizer_sha256": tok.sha256})
    rng = random.Random(8)
    write_lines(folder / "old.jsonl", [{"messages": dialogue(rng, 2)} for _ in range(40)])


@pytest.fixture(scope="module")
def done(hub, copy, tok):
    """{name: (folder, output)} of all recipes, which ran side by side."""
    folders = {name: copy(name) for name in ("stories", "chat", "encyclopedia", "identity")}
    sft_checkpoint(folders["identity"], tok)
    variables = {"identity": {"KEEP": "old.jsonl", "NAME": "阿福", "MAKER": "小王",
                              "PREPARE_SFT_ARGS": "--workers=1"}}
    started = {name: start(folder, name, hub, **variables.get(name, {}))
               for name, folder in folders.items()}
    return {name: (folders[name], end(process)) for name, process in started.items()}


def test_every_recipe_says_its_cost_first(done):
    for name, (_, output) in done.items():
        assert output.startswith("download"), name
        if name != "identity":
            assert "RTX 3090    about" in output.split("hours, computed")[0]


def test_every_recipe_ends_with_a_model(done):
    for name, path, stage in (
            ("stories", "out/stories/pretrain/best.pt", "pretrain"),
            ("stories", "out/stories/sft/best.pt", "sft"),
            ("chat", "out/chat/sft/best.pt", "sft"), ("chat", "out/chat/dpo/best.pt", "dpo"),
            ("encyclopedia", "out/encyclopedia98/sft/best.pt", "sft"),
            ("identity", "out/identity/best.pt", "sft")):
        saved = checkpoints.load(done[name][0] / path)
        assert saved["stage"] == stage and saved["step"] > 0
    for name in "chat", "encyclopedia":
        assert "BLEU-4" in done[name][1]
    assert (done["chat"][0] / "out/chat/model.gguf").stat().st_size > 1000
    assert (done["chat"][0] / "out/chat/sft/report.md").exists()
    assert "before:" in done["identity"][1] and "after:" in done["identity"][1]


def test_all_records_of_the_schemas_are_read(done):
    """No record is dropped but duplicates: the schemas are those that the readers expect."""
    for name, total, dialogues in ("stories", 60, 60), ("chat", 60, 40), ("encyclopedia", 60, 40):
        folder = done[name][0] / "data" / name
        meta = json.loads((folder / "bins/meta.json").read_text("utf-8"))
        rows = meta["corpora"].values()
        assert sum(row["records"] for row in rows) == total
        for row in rows:
            assert all("duplicate" in reason for reason in row["dropped"])
        meta = json.loads((folder / "sft/meta.json").read_text("utf-8"))
        examples = sum(meta[part]["examples"] for part in ("train", "val"))
        with open(folder / "sft/test.jsonl", encoding="utf-8") as f:
            assert examples + len(f.readlines()) == dialogues
    assert "dropped: no text" not in done["chat"][1]        # the tokenizer saw the dialogues, too


def test_identity_asks_90_questions(done):
    folder = done["identity"][0]
    with open(folder / "data/identity/identity.jsonl", encoding="utf-8") as f:
        dialogues = [json.loads(line)["messages"] for line in f]
    assert len({messages[0]["content"] for messages in dialogues}) == 90
    assert all("{" not in messages[1]["content"] for messages in dialogues)
    assert sum("阿福" in messages[1]["content"] for messages in dialogues) >= 60


def test_a_second_run_repeats_neither_download_nor_data(done, hub):
    folder, calls = done["stories"][0], (hub / "calls").read_text()
    assert calls.count("adam89/TinyStoriesChinese") == 1
    before = (folder / "data/stories/bins/meta.json").stat().st_mtime_ns
    output = end(start(folder, "stories", hub, PRETRAIN_ARGS=SMALL["PRETRAIN_ARGS"].replace(
        "--max_steps=2", "--max_steps=3")))
    assert "going on with out/stories/pretrain/last.pt from step 2" in output
    assert (folder / "data/stories/bins/meta.json").stat().st_mtime_ns == before
    assert (hub / "calls").read_text() == calls


def download(folder, *arguments, **variables):
    """Runs download() of common.sh with a client that only notes how it was called."""
    for client in "hf", "modelscope":
        path = folder / "clients" / client
        path.parent.mkdir(exist_ok=True)
        path.write_text('#!/bin/sh\necho "$0 $*"\nmkdir -p raw\n')
        path.chmod(0o755)
    script = f". {ROOT}/recipes/common.sh\ndownload " + " ".join(arguments)
    return subprocess.run(
        ["sh", "-e", "-c", script], cwd=folder, capture_output=True, text=True,
        env={"PATH": f"{folder}/clients{os.pathsep}{os.environ['PATH']}", **variables})


def test_both_clients_are_called_as_they_want(tmp_path):
    done = download(tmp_path, "a/b", "c/d", "raw", "x.jsonl", "'part/*'", HUB="modelscope")
    calls = [call.partition("clients/")[2] for call in done.stdout.splitlines()]
    assert calls == [
        "modelscope download --dataset c/d --local_dir raw --include x.jsonl",
        "modelscope download --dataset c/d --local_dir raw --include part/*"]
    again = download(tmp_path, "a/b", "c/d", "raw", "x.jsonl")
    assert again.returncode == 0 and not again.stdout
    (tmp_path / "raw/.complete").unlink()
    done = download(tmp_path, "a/b", "c/d", "raw", "x.jsonl")
    assert done.stdout.endswith(
        "hf download --repo-type dataset a/b --local-dir raw --include x.jsonl\n")


def test_what_cannot_be_downloaded_ends_in_a_sentence(tmp_path):
    done = download(tmp_path, "a/b", '""', "raw", "x.jsonl", HUB="modelscope")
    assert done.returncode == 1 and "no copy on ModelScope is known" in done.stdout
    done = download(tmp_path, "a/b", "c/d", "raw", "x.jsonl", HUB="nothing")
    assert done.returncode == 1 and "nothing: not installed" in done.stdout
