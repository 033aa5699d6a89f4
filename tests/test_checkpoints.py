"""checkpoints.py: what is damaged or foreign ends in one sentence, or is read as it was."""

import json
import random
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, dialogue, run, story, write_meta, write_pretrain, write_sft

import checkpoints
import pretrain
import sft
from model import Model, ModelConfig

SHAPE = dict(dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_seq_len=16)
RUN = {
    "step": 3,
    "best": 2.5,
    "skipped": 0,
    "identity": {"seed": 1},
    "constants": {},
    "optimizers": [],
    "scaler": {},
}


def refused(call, *args, **named):
    with pytest.raises(SystemExit) as stopped:
        call(*args, **named)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


@pytest.fixture
def state(tok):
    """What save() is given for best.pt."""
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, **SHAPE))
    return {
        "stage": "pretrain",
        "model": model.state_dict(),
        "shape": dict(vars(model.config)),
        "tokenizer": tok.name,
        "tokenizer_sha256": tok.sha256,
        "step": 3,
        "constants": {},
    }


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_or_changes_nothing(state, tmp_path):
    path, rng = tmp_path / "best.pt", random.Random(0)
    checkpoints.save(str(path), state)
    whole, expected, counts = (
        path.read_bytes(),
        checkpoints.load(str(path)),
        {"refused": 0, "same": 0},
    )
    for at in sorted(rng.sample(range(8 * len(whole)), 1500)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            found = checkpoints.load(str(path))
        except SystemExit as stopped:
            assert str(path) in stopped.code and "\n" not in stopped.code
            counts["refused"] += 1
            continue
        assert {**found, "model": 0} == {**expected, "model": 0}, at
        assert all(
            torch.equal(w, expected["model"][name]) for name, w in found["model"].items()
        ), at
        counts["same"] += 1
    assert counts["refused"] > 1000 > counts["same"] > 0


def change(part, **values):
    """Changes in a checkpoint: None takes a value away."""

    def harm(state):
        table = state[part] if part else state
        for name, value in values.items():
            name = name.replace("__", ".")
            table.pop(name) if value is None else table.update({name: value})

    return harm


def each_weight(f):
    return lambda state: state["model"].update({name: f(w) for name, w in state["model"].items()})


@pytest.mark.parametrize(
    "harm, said",
    [
        (change("model", norm__weight=None), 'Missing key(s) in state_dict: "norm.weight"'),
        (change("model", extra=torch.ones(1)), 'Unexpected key(s) in state_dict: "extra"'),
        (change("model", norm__weight=torch.ones(9)), "size mismatch for norm.weight"),
        (change("model", norm__weight=torch.full((8,), float("nan"))), "norm.weight is not finite"),
        (change("model", norm__weight=torch.tensor([1.0] * 7 + [float("-inf")])), "not finite"),
        (change("model", norm__weight=torch.ones(8, dtype=torch.int8)), "norm.weight"),
        (
            change("model", norm__weight=torch.ones(8, dtype=torch.float64)),
            "norm.weight is of torch.float64",
        ),
        (change("model", norm__weight=[1.0] * 8), "norm.weight"),
        (change("model", norm__weight=torch.ones(8, dtype=torch.complex64)), "refused"),
        (each_weight(lambda w: w.long()), "floating point"),
        (change(None, model=[]), "'model'"),
        (change(None, model=None), "'model'"),
        (change(None, model={}), "layers"),
        (change("shape", n_layers=None), "n_layers"),
        (change("shape", n_layers=2), "weight"),
        (change("shape", n_layers=10**12), "layers"),
        (change("shape", max_seq_len=10**12), "tokens"),
        (change("shape", n_heads="2"), "n_heads"),
        (change("shape", n_heads=2.0), "n_heads"),
        (change("shape", n_heads=True), "n_heads"),
        (change("shape", n_heads=3), "n_heads"),
        (change("shape", dim=-8), "dim"),
        (change("shape", rope_theta=float("nan")), "rope_theta"),
        (change("shape", rope_theta=10**30), "rope_theta"),
        (change("shape", tie_embeddings="no"), "tie_embeddings"),
        (change("shape", rope_scaling={"factor": 2}), "rope_scal"),
        (change("shape", rope_scaling=""), "rope_scaling"),
        (change("shape", rope_scaling="yarn"), "rope_scaling"),
        (change("shape", sliding_window=4), "sliding_window"),
        (
            change(
                "shape",
                rope_scaling=dict.fromkeys(
                    (
                        "factor",
                        "low_freq_factor",
                        "high_freq_factor",
                        "original_max_position_embeddings",
                    ),
                    "8",
                ),
            ),
            "rope_scaling",
        ),
        (change(None, shape=None), "'shape'"),
        (change(None, tokenizer=7), "'tokenizer'"),
        (change(None, tokenizer_sha256=b"x"), "'tokenizer_sha256'"),
        (change(None, stage=1), "'stage'"),
        (change(None, step=-1), "'step'"),
        (change(None, step="3"), "'step'"),
        (change(None, constants=[]), "'constants'"),
        (change(None, val_bpb="1"), "'val_bpb'"),
        (change(None, val_loss=float("nan")), "'val_loss'"),
    ],
)
def test_a_checkpoint_that_cannot_be_one_is_refused_at_the_door(state, tmp_path, harm, said):
    path = str(tmp_path / "best.pt")
    harm(state)
    checkpoints.save(path, state)
    sentence = refused(checkpoints.load, path)
    assert sentence.startswith(path) and said in sentence


def test_a_tokenizer_that_is_none_is_refused(state, tmp_path):
    checkpoints.save(str(tmp_path / "best.pt"), {**state, "tokenizer": None})
    assert "'tokenizer'" in refused(checkpoints.load_with_tokenizer, str(tmp_path / "best.pt"))


@pytest.mark.parametrize("name", ["", "moved.model"])
def test_a_checkpoint_whose_tokenizer_cannot_be_read_is_named_with_the_way_out(
    state, tmp_path, name
):
    path = str(tmp_path / "best.pt")
    checkpoints.save(path, {**state, "tokenizer": name})
    sentence = refused(checkpoints.load_with_tokenizer, path)
    assert sentence.startswith(path) and repr(name) in sentence and "--tokenizer=" in sentence
    assert checkpoints.load_with_tokenizer(path, state["tokenizer"])


def test_a_constant_of_the_network_that_came_later_has_its_default(state, tmp_path):
    for name in "qk_norm", "qkv_bias", "rope_scaling":
        del state["shape"][name]
    checkpoints.save(str(tmp_path / "best.pt"), state)
    assert checkpoints.load(str(tmp_path / "best.pt"))["shape"] == vars(
        ModelConfig(**state["shape"])
    )


@pytest.mark.parametrize("name", [*RUN, "all"])
@pytest.mark.parametrize("value", [None, "x", float("nan")])
def test_a_last_pt_that_lacks_a_part_is_refused(state, tmp_path, name, value):
    state.update(RUN)
    for one in RUN if name == "all" else [name]:
        state.pop(one) if value is None else state.update({one: value})
    checkpoints.save(str(tmp_path / "last.pt"), state)
    sentence = refused(checkpoints.open_run, str(tmp_path), True, False, "pretrain", {"seed": 1})
    assert "last.pt" in sentence and (
        name == "all" or f"'{name}'" in sentence or name == "optimizers"
    )


def test_the_constants_of_a_run_on_a_card_are_read_without_one(state, tmp_path, monkeypatch):
    path = str(tmp_path / "last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        checkpoints.save(path, {**state, **RUN, "constants": {"lr": 0.5}})
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    assert checkpoints.read_constants(path, {"lr": 0.1}, "pretrain") == {"lr": 0.5}


def test_the_constants_of_another_stage_are_left_to_the_check_of_the_run(state, tmp_path):
    path = str(tmp_path / "last.pt")
    checkpoints.save(path, {**state, **RUN, "stage": "sft", "constants": {"max_seq_len": 0}})
    assert checkpoints.read_constants(path, {"max_seq_len": 512}, "sft") == {"max_seq_len": 0}
    assert checkpoints.read_constants(path, {"max_seq_len": 512}, "pretrain") == {}
    assert "made by sft.py" in refused(
        checkpoints.open_run, str(tmp_path), True, False, "pretrain", {"seed": 1}
    )


def test_a_run_resumes_although_its_identity_lacks_what_came_later(state, tmp_path):
    checkpoints.save(str(tmp_path / "last.pt"), {**state, **RUN, "identity": {"seed": 1, "dim": 8}})

    def opened(**identity):
        return checkpoints.open_run(
            str(tmp_path), True, False, "pretrain", {"seed": 1, "dim": 8, **identity}
        )

    assert (
        opened(qk_norm=False, data="0123abcd")["step"] == 3
    )  # not written then: the default, any data
    assert "qk_norm (then False, now True)" in refused(opened, qk_norm=True)
    assert "dim (then 8, now 16)" in refused(opened, dim=16)


@pytest.mark.parametrize(
    "harm",
    [
        lambda o: o["state"][0].update(momentum=torch.ones(3)),
        lambda o: o["state"][0].update(momentum="x"),
        lambda o: o["state"][0]["momentum"].fill_(float("nan")),
        lambda o: o.update(state=[]),
        lambda o: o.update(param_groups=[]),
        lambda o: o["param_groups"].append(o["param_groups"][0]),
        lambda o: o.clear(),
        lambda o: o["param_groups"][0].update(params=[0]),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused(harm):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)
    saved = {
        "state": {i: {"momentum": torch.zeros_like(p)} for i, p in enumerate(model.parameters())},
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    scaler, state = torch.amp.GradScaler("cpu", enabled=True), {
        "model": model.state_dict(),
        "step": 1,
        "best": 1.0,
        "skipped": 0,
        "scaler": {},
        "optimizers": [saved],
    }
    assert checkpoints.restore(state, model, [optimizer], scaler) == (
        1,
        1.0,
        0,
    )  # a run that was not in float16
    harm(saved)
    assert "optimizer" in refused(checkpoints.restore, state, model, [optimizer], scaler)


def test_the_state_of_a_mac_comes_to_the_device_of_a_fused_optimizer():
    """There the number of the step must be where the weights are; it is cast like a moment, too."""
    p = torch.nn.Parameter(torch.ones(2))
    moments = {"exp_avg": p.detach(), "exp_avg_sq": p.detach()}
    on_mac = torch.optim.AdamW([p], lr=5.0, fused=False).state_dict()
    on_mac["state"] = {0: {"step": torch.tensor(3.0, dtype=torch.float64), **moments}}
    optimizer = torch.optim.AdamW([p], lr=1.0, fused=True)
    state = dict(model={}, step=3, best=1.0, skipped=0, scaler={}, optimizers=[on_mac])
    checkpoints.restore(state, torch.nn.Module(), [optimizer], torch.amp.GradScaler("cpu"))
    assert optimizer.state[p]["step"].dtype == torch.float32
    assert optimizer.param_groups[0]["lr"] == 1.0


# ---- meta.json and the bins ----------------------------------------------------------------------


def edit(**changes):
    def harm(text):
        return json.dumps({**json.loads(text), **changes})

    return harm


@pytest.mark.parametrize(
    "harm",
    [
        edit(train={}),
        edit(train=None),
        edit(train={"documents": 1, "tokens": -1, "bytes": 1}),
        edit(val=[]),
        edit(train={"documents": 1, "tokens": True, "bytes": 1}),
        edit(tokenizer_sha256=None),
        edit(tokenizer=None),
        edit(format="1"),
        edit(crc32=7),
        edit(dtype="int64"),
        edit(dtype=None),
        edit(corpora=[]),
        edit(corpora={"a": 3}),
        edit(corpora={"a": {"tokens": "x"}}),
        lambda text: "[" * 100_000,
        lambda text: '{"a":' * 100_000,
        lambda text: "null",
        lambda text: "\x00",
        lambda text: "",
    ],
)
def test_a_meta_json_with_anything_in_it_is_refused(tok, pretrain_dir, tmp_path, harm):
    path = tmp_path / "meta.json"
    text = (pretrain_dir / "meta.json").read_text("utf-8")
    path.write_text(text, encoding="utf-8")
    assert checkpoints.read_meta(str(path), tok, "prepare_pretrain.py")
    path.write_text(harm(text), encoding="utf-8")
    assert "prepare_pretrain.py" in refused(
        checkpoints.read_meta, str(path), tok, "prepare_pretrain.py"
    )


def test_each_stage_refuses_the_bins_of_the_other(tok, pretrain_dir, sft_dir):
    assert "documents" in refused(
        checkpoints.read_meta, f"{sft_dir}/meta.json", tok, "prepare_pretrain.py"
    )
    assert "examples" in refused(
        checkpoints.read_meta, f"{pretrain_dir}/meta.json", tok, "prepare_sft.py"
    )


@pytest.mark.parametrize(
    "name, dtype", [("train.bin", "<u2"), ("train.mask", "u1"), ("train.idx", "<i8")]
)
def test_a_flipped_bit_in_the_bins_is_refused(tok, tmp_path, name, dtype):
    write_sft(tmp_path, tok, [dialogue(random.Random(0), 1)] * 9, [])
    meta = checkpoints.read_meta(f"{tmp_path}/meta.json", tok, "prepare_sft.py")
    data, path = (tmp_path / name).read_bytes(), tmp_path / name
    length = len(data) // np.dtype(dtype).itemsize
    assert len(checkpoints.open_bin(str(path), dtype, length, meta, "prepare_sft.py")) == length
    for at in range(0, 8 * len(data), 97):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        assert name in refused(
            checkpoints.open_bin, str(path), dtype, length, meta, "prepare_sft.py"
        )


def test_the_checksum_and_the_range_are_those_of_the_whole_of_a_long_file(tmp_path):
    data, path = np.zeros((1 << 24) + 5, dtype="u1"), str(tmp_path / "train.bin")
    data[[3, -1]] = 1, 9
    data.tofile(path)
    meta = {"crc32": {"train.bin": zlib.crc32(data)}}
    assert len(checkpoints.open_bin(path, "u1", len(data), meta, "prepare_sft.py", 10)) == len(data)
    assert "holds 9" in refused(
        checkpoints.open_bin, path, "u1", len(data), meta, "prepare_sft.py", 9
    )


def examples(folder, tok):
    meta = checkpoints.read_meta(f"{folder}/meta.json", tok, "prepare_sft.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "data_dir", str(folder))
        return sft.Examples("train", meta, 80, tok.vocab_size)


def shift(starts):
    starts[3:6] += 1


@pytest.mark.parametrize(
    "name, dtype, harm",
    [
        ("idx", "<i8", lambda a: a.put(0, 1)),
        ("idx", "<i8", lambda a: a.put(-1, a[-1] - 1)),
        ("idx", "<i8", lambda a: a.put(2, a[3])),
        ("idx", "<i8", lambda a: a.put(2, a[5])),
        ("idx", "<i8", lambda a: a.put(2, -5)),
        ("idx", "<i8", lambda a: a.put(2, 1 << 40)),
        ("mask", "u1", lambda a: a.fill(0)),
        ("mask", "u1", lambda a: a.put(5, 7)),
        ("mask", "u1", lambda a: a[: a.size // 2].fill(0)),
    ],
)
def test_masks_and_indices_that_are_off_are_refused_also_with_their_own_checksum(
    tok, tmp_path, name, dtype, harm
):
    write_sft(tmp_path, tok, [dialogue(random.Random(0), 1)] * 9, [])
    assert len(examples(tmp_path, tok).targets)
    path = tmp_path / f"train.{name}"
    array = np.fromfile(path, dtype)
    harm(array)
    array.tofile(path)
    parts = json.loads((tmp_path / "meta.json").read_text("utf-8"))
    write_meta(tmp_path, tok, train=parts["train"], val=parts["val"])
    assert f"train.{name}" in refused(examples, tmp_path, tok)


def test_data_prepared_anew_are_other_data_also_at_the_same_size(tok, tmp_path):
    hashes = [
        checkpoints.data_hash(
            checkpoints.read_meta(f"{folder}/meta.json", tok, "prepare_pretrain.py")
        )
        for folder in (
            write_pretrain(tmp_path / str(i), tok, texts, ["好"])
            for i, texts in enumerate(("甲乙", "乙甲", "甲乙"))
        )
    ]
    assert hashes[0] == hashes[2] != hashes[1] and all(hashes)
    assert pretrain.checkpoints.data_hash({"crc32": {}}) == ""


def test_the_prepare_scripts_write_the_checksums_of_their_bins(tok, tmp_path):
    rng = random.Random(0)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": story(rng, 9)}) + "\n" for _ in range(60))
    )
    (tmp_path / "b.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": story(rng, 1)},
                        {"role": "assistant", "content": story(rng, 1)},
                    ]
                }
            )
            + "\n"
            for _ in range(60)
        )
    )
    for stage, corpus, names in (
        ("prepare_pretrain.py", "text:a.jsonl", {"train.bin", "val.bin"}),
        (
            "prepare_sft.py",
            "messages:b.jsonl",
            {f"{part}.{kind}" for part in ("train", "val") for kind in ("bin", "mask", "idx")},
        ),
    ):
        done = run(
            stage,
            tmp_path,
            f"--corpora={corpus}",
            f"--tokenizer={tok.name}",
            "--val_fraction=0.3",
            "--workers=1",
            f"--data_dir={stage}",
        )
        assert done.rc == 0, done.err
        sums = checkpoints.read_meta(f"{tmp_path}/{stage}/meta.json", tok, stage)["crc32"]
        assert names <= sums.keys() and len(set(sums.values())) > 1
        assert all(
            zlib.crc32((tmp_path / stage / name).read_bytes()) == crc for name, crc in sums.items()
        )


# ---- log.csv and run.json ------------------------------------------------------------------------

HEAD = "step,tokens,lr,loss,grad_norm,val_loss,val_bpb\n"
ROW = "1,64,0.1,2.5,1.0,,\n"
NOISE = random.Random(0).randbytes(500)


@pytest.mark.parametrize(
    "text, steps",
    [
        (HEAD + ROW + "2,128,0.1,2.4,1.0,2.0,1.0\n", [1, 2]),
        (HEAD + ROW + "2,128,0.1,2.", [1]),
        ("", []),
        ("x", []),
        (HEAD, []),
        (HEAD + "a,b\n" + ROW, [1]),
        (HEAD + "1\n" * 9, []),
        (HEAD + ROW[:-1] + ",9\n" + ROW, [1]),
        (HEAD + "-" + ROW, []),
        (HEAD + "1.5" + ROW[1:], []),
        (HEAD + "9" * 5000 + ROW[1:], []),
        (HEAD + '"' * 200_000 + "\n" + ROW, [1]),
        (HEAD + "\x00\n" + ROW, [1]),
        (HEAD + "1,64,0.1,,1.0,,\n", []),
    ],
)
def test_a_log_with_anything_in_it_gives_its_rows(tmp_path, text, steps):
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    assert [int(row["step"]) for row in checkpoints.read_log(tmp_path / "log.csv")] == steps


@pytest.mark.parametrize(
    "data", [NOISE, b"\xff\xfe" + NOISE, "日志".encode("gbk"), HEAD.encode() + NOISE]
)
def test_noise_as_log_or_run_is_empty(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert checkpoints.read_log(tmp_path / "a") == [] == checkpoints.read_run(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [None, 3, {}, [3], [[]], [{}], [{"to_step": 1}], "x", [{"to_step": "1", "seconds": 1}]],
)
def test_a_run_json_with_anything_in_it_has_no_sessions(tmp_path, content):
    session = {
        "from_step": 0,
        "to_step": 5,
        "seconds": 1.5,
        "timed_tokens": 9,
        "timed_seconds": 1,
        "date": "2026-01-01",
        "torch": "2.13",
        "device": "cpu",
        "memory": "1 GiB",
    }
    for text, found in (
        (json.dumps(content), []),
        (json.dumps([*(content if isinstance(content, list) else []), session]), [session]),
        ("[" * 100_000, []),
    ):
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
        assert checkpoints.read_run(tmp_path / "run.json") == found
    assert checkpoints.read_run(tmp_path / "no.json") == []


def test_a_new_constant_of_the_network_leaves_earlier_checkpoints_usable(tok, tmp_path):
    """In a copy of the code whose ModelConfig has one field more.

    It has its default then, and export refuses others.
    """
    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    source = (tmp_path / "model.py").read_text("utf-8")
    field = "    rope_scaling: dict = None"
    assert source.count(field) == 1
    (tmp_path / "model.py").write_text(
        source.replace(field, f"    logit_cap: float = 0.0\n{field}"), "utf-8"
    )
    model = Model(ModelConfig(tok.vocab_size, 32, 1, 2, max_seq_len=32))
    checkpoints.save(
        str(tmp_path / "old.pt"),
        {
            "stage": "pretrain",
            "model": model.state_dict(),
            "shape": vars(model.config),
            "tokenizer": tok.name,
            "tokenizer_sha256": tok.sha256,
        },
    )
    script = (
        "import checkpoints\nfrom extras import export\n"
        "shape = checkpoints.load('old.pt')['shape']\n"
        "print(shape['logit_cap'])\nexport.refuse_unknown({**shape, 'logit_cap': 5.0})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "0.0\n", done.stderr
    assert (
        done.returncode == 1
        and "its logit_cap is 5.0" in done.stderr
        and "Traceback" not in done.stderr
    )
