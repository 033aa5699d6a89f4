"""dpo.py: against trl, against its own formula written plainly, and as a user runs it."""
import random

import numpy as np
import pytest
import torch
from conftest import dialogue, run, story, write_pairs
from test_training import constants, model_of, read_log, refused, same_run, save_model

import checkpoints
import dpo
import runtime
import sft
from extras import report
from model import Model, ModelConfig

SHAPE = dict(dim=32, n_layers=2, n_heads=2, max_seq_len=96)


def pair(rng):
    """(messages, chosen, rejected), both answers of any length."""
    *messages, answer = dialogue(rng, rng.choice([1, 1, 2]))
    rejected = story(rng, 1)[: rng.randrange(2, 30)]
    return messages, answer["content"], rejected


@pytest.fixture(scope="module")
def pairs(tok, tmp_path_factory):
    rng = random.Random(5)
    train, val = ([pair(rng) for _ in range(n)] for n in (14, 5))
    return write_pairs(tmp_path_factory.mktemp("pairs"), tok, train, val)


@pytest.fixture(scope="module")
def settings(tok, pairs, tmp_path_factory):
    """Constants of a short run of a model whose answers are not all alike."""
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, **SHAPE))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    checkpoint = str(tmp_path_factory.mktemp("start") / "best.pt")
    save_model(checkpoint, model, tok, "sft")
    return dict(
        checkpoint=checkpoint,
        tokenizer=tok.name,
        data_dir=str(pairs),
        device="cpu",
        dtype="float32",
        batch_pairs=5,
        micro_batch=2,
        max_steps=6,
        eval_interval=3,
        lr=3e-3,
        muon_lr=3e-3,
        warmup=0.0,
        sample_prompts="",
    )


@pytest.fixture
def train(settings, tmp_path):
    def train(name, **values):
        with constants(dpo, **{**settings, "out_dir": str(tmp_path / name), **values}):
            dpo.main()
        return read_log(tmp_path / name)
    return train


def examples(tok, folder, part):
    """[(ids, mask)] of the bins."""
    ids = np.fromfile(folder / f"{part}.bin", "<u2").tolist()
    mask = np.fromfile(folder / f"{part}.mask", "u1").tolist()
    starts = np.fromfile(folder / f"{part}.idx", "<i8").tolist()
    return [(ids[a:b], mask[a:b]) for a, b in zip(starts, starts[1:])]


def plain_log_prob(model, ids, mask):
    """The log-probability of the masked tokens, a token at a time."""
    log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(log_p[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t])


def trl_trainer(trl, policy, reference, folder):
    """trl's loss with beta 0.2, and 0.3 of the negative log-likelihood of the chosen answers."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    args = trl.DPOConfig(
        str(folder / "trl"),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.3],
        beta=0.2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    example = dict(prompt="小猫", chosen="在河边", rejected="唱歌")  # it wants one
    return trl.DPOTrainer(
        policy,
        reference,
        args,
        train_dataset=Dataset.from_list([example]),
        processing_class=AutoTokenizer.from_pretrained(folder / "hf"),
    )


def test_loss_and_gradients_are_those_of_trl(settings, tok, pairs, tmp_path):
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM
    from extras import export
    from extras.huggingface import their_name
    with constants(export, checkpoint=settings["checkpoint"], out=str(tmp_path / "hf")):
        export.main()
    load = AutoModelForCausalLM.from_pretrained
    policy = load(tmp_path / "hf", dtype=torch.float32)
    reference = load(tmp_path / "hf", dtype=torch.float32)
    ours, before = (model_of(checkpoints.load(settings["checkpoint"])) for _ in range(2))
    theirs = dict(policy.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # training has moved the policy
        for name, p in ours.named_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
            theirs[their_name(name)].copy_(p)
    trainer = trl_trainer(trl, policy, reference, tmp_path)
    found = examples(tok, pairs, "train")[:8]
    rows = []
    for (chosen, mask), (rejected, _) in zip(found[::2], found[1::2]):
        n = mask.index(1)
        row = dict(
            prompt_ids=chosen[:n],
            chosen_ids=chosen[n:],
            rejected_ids=rejected[n:],
        )
        rows.append(row)
    loss = trainer.compute_loss(policy, dict(trainer.data_collator(rows)))
    loss.backward()

    with constants(dpo, **settings, beta=0.2):
        meta = checkpoints.read_meta(f"{pairs}/meta.json", tok, "prepare_sft.py")
        data = dpo.Pairs("train", meta, 96, tok.vocab_size)
        x, y = dpo.read_batch(data, np.arange(4), tok, torch.device("cpu"))
        with torch.no_grad():
            known = dpo.log_probs(before, x, y)
        logp = dpo.log_probs(ours, x, y)
        preference_losses, _ = dpo.preferences(logp, known)
    n_targets = data.chosen_targets[:4].sum()
    assert n_targets == sum(len(row["chosen_ids"]) for row in rows)
    our_loss = preference_losses.mean() - 0.3 * logp[0].sum() / n_targets
    our_loss.backward()
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in ours.named_parameters():
        expected = theirs[their_name(name)].grad
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-6)


def test_a_step_is_the_formula_written_plainly(train, settings, tok, pairs):
    """Also with label smoothing, which trl's loss leaves out, and with the validation's figures."""
    how = dict(label_smoothing=0.2, nll_weight=0.3, beta=0.5, lr=0.0, muon_lr=0.0)
    [row] = train("out", max_steps=1, eval_interval=1, **how)
    model = model_of(checkpoints.load(settings["checkpoint"]))
    found = examples(tok, pairs, "train")
    chosen = [found[2 * i] for i in runtime.batch_rows(0, 5, 14, dpo.seed)]
    n_targets = sum(sum(mask) for _, mask in chosen)
    log_prob = sum(plain_log_prob(model, *example) for example in chosen)
    nll = -log_prob.item() / n_targets
    # the model is its own reference: all margins are 0
    assert row["loss"] == pytest.approx(np.log(2) + 0.3 * nll, rel=1e-5)
    found = examples(tok, pairs, "val")
    val = np.array([plain_log_prob(model, *example).item() for example in found])
    chosen = val[::2]
    rejected = val[1::2]
    assert row["val_chosen"] == pytest.approx(chosen.mean(), rel=1e-5)
    assert row["val_rejected"] == pytest.approx(rejected.mean(), rel=1e-5)
    preferred = np.mean(chosen > rejected)
    assert 0 < preferred < 1
    assert row["val_preferred"] == pytest.approx(preferred)

    logp = torch.tensor([
        [-3.0, -5.0],  # the chosen answers
        [-4.0, -4.0],  # the rejected ones
    ])
    known = torch.tensor([
        [-3.5, -4.0],
        [-3.0, -6.0],
    ])
    with constants(dpo, beta=0.5, label_smoothing=0.2):
        loss, margin = dpo.preferences(logp, known)
    expected = [
        0.5 * ((-3 + 3.5) - (-4 + 3)),
        0.5 * ((-5 + 4) - (-4 + 6)),
    ]
    assert margin.tolist() == pytest.approx(expected)
    # the probability that the chosen answer is preferred, for each pair
    right = 1 / (1 + np.exp(-np.array(expected)))
    expected = -0.8 * np.log(right) - 0.2 * np.log(1 - right)
    assert loss.tolist() == pytest.approx(expected.tolist())


def test_the_losses_do_not_depend_on_the_micro_batch_or_the_processes(train, settings, tmp_path):
    one = train("one", micro_batch=5)
    three = train("three", micro_batch=3)
    values = {**settings, "out_dir": tmp_path / "two"}
    arguments = (f"--{name}={value}" for name, value in values.items())
    done = run("dpo.py", tmp_path, *arguments, torchrun=2)
    assert done.rc == 0, done.err
    two = read_log(tmp_path / "two")
    assert len(one) == len(two) == 6
    assert one[0]["loss"] != one[5]["loss"]
    for name in ("loss", "grad_norm", "val_loss", "val_margin", "val_chosen"):
        for a, b, c in zip(one, two, three):
            assert (name in a) == (name in b) == (name in c)
            if name in a:
                expected = pytest.approx(a[name], rel=1e-3, abs=1e-5)
                assert b[name] == expected
                assert c[name] == expected


def test_training_prefers_the_chosen_answers(train):
    rows = train("out", max_steps=30, eval_interval=30, nll_weight=0.0)
    first = rows[0]
    last = rows[-1]
    assert last["loss"] < 0.3
    assert first["loss"] > np.log(2) - 1e-4
    assert last["val_accuracy"] > 0.5
    assert last["val_margin"] > 0


def test_the_report_has_a_section_with_the_figures_of_the_best_step(train, tmp_path):
    rows = [row for row in train("out") if "val_loss" in row]
    how = dict(device="cpu", dtype="float32", max_new_tokens=3)
    dirs = dict(pretrain_dir="", sft_dir="", dpo_dir=str(tmp_path / "out"))
    with constants(report, **how, **dirs):
        report.main()
    best = min(rows, key=lambda row: row["val_loss"])
    page = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert f"better answer in **{best['val_accuracy']:.1%}** of held-out pairs" in page
    assert f"likelier in {best['val_preferred']:.1%}" in page
    loss = f"step {best['step']:.0f}: {best['val_loss']:.4f} nats per held-out pair"
    assert f"{loss}, {best['val_margin']:.4f} between" in page
    assert "## Preferences" in page
    assert "\n    python dpo.py " in page


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_run_in_two_parts_is_the_run_in_one(train, tmp_path, lora_rank):
    with pytest.MonkeyPatch.context() as patch:  # the schedule is that of the whole run
        patch.setattr(dpo, "schedule", lambda step: 1.0)
        train("a", lora_rank=lora_rank)
        train("b", lora_rank=lora_rank, max_steps=3)
        train("b", lora_rank=lora_rank, resume=True)
    same_run(tmp_path / "a", tmp_path / "b")


def test_what_is_no_pair_is_refused(settings, sft_dir, tmp_path):
    settings = {**settings, "out_dir": str(tmp_path / "out")}
    with constants(dpo, **{**settings, "data_dir": str(sft_dir)}):
        sentence = refused(dpo.main)
        assert "holds no pairs" in sentence
        assert "prepare_sft.py --data_dir=data/dpo " in sentence
    with constants(dpo, **{**settings, "data_dir": "away"}):
        sentence = refused(dpo.main)
        assert "not there; run python prepare_sft.py --data_dir=away " in sentence
    with constants(dpo, **{**settings, "max_seq_len": 12}):
        assert "--max_seq_len=12" in refused(dpo.main)
    names = "checkpoint", "tokenizer", "device", "data_dir", "out_dir"
    with constants(sft, **{name: settings[name] for name in names}):
        assert "dpo.py" in refused(sft.main)  # it would learn the rejected answers, too
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.parametrize(
    "harm, part",
    [
        (lambda r: r.clear(), "train"),
        (lambda r: r.update(train=r["train"][:, 1:]), "train"),
        (lambda r: r.update(val="text"), "val"),
        (lambda r: r["val"].fill_(np.nan), "val"),
    ],
)
def test_a_damaged_reference_in_last_pt_is_refused(train, tmp_path, harm, part):
    train("out", max_steps=1)
    saved = checkpoints.load(tmp_path / "out" / "last.pt", to_resume=True)
    harm(saved["reference"])
    torch.save(saved, tmp_path / "out" / "last.pt")
    sentence = refused(lambda: train("out", resume=True))
    assert "last.pt" in sentence
    assert f"pairs of {part}" in sentence


@pytest.mark.parametrize("name", ["beta", "nll_weight", "lora_rank"])
def test_a_constant_below_zero_is_refused(train, name):
    assert f"--{name}=-1" in refused(lambda: train("out", **{name: -1}))
