"""lora.py: against peft, and that a merged model is the model that was trained."""
import pytest
import torch
from test_training import constants, read_log, same_run, save_model

import checkpoints
import lora
import sft
from model import Model, ModelConfig
from optim import make_optimizers

SHAPE = dict(vocab_size=300, dim=32, n_layers=2, n_heads=2, max_seq_len=48)


def network(**shape):
    torch.manual_seed(0)
    return Model(ModelConfig(**{**SHAPE, **shape}))


def test_losses_and_weights_after_some_steps_are_those_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from extras.huggingface import their_name
    ours = network(n_kv_heads=1)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=ours.config.hidden_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config)
    start = theirs.state_dict()
    for name, w in ours.state_dict().items():
        start[their_name(name)].copy_(w)
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    update = peft.LoraConfig(r=4, lora_alpha=12, target_modules=layers)
    theirs = peft.get_peft_model(theirs, update)
    lora.add(ours, rank=4, alpha=12, seed=1)
    same = {}  # the name of our parameter: their parameter
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if ".lora_" in name:
            layer, _, part = name.rpartition(".lora_")
            layer = their_name(f"{layer}.weight").removesuffix(".weight")
            their_part = f"base_model.model.{layer}.lora_{part.upper()}"
            same[name] = named[f"{their_part}.default.weight"]
            same[name].data.copy_(p.data)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == same.keys()
    assert len(same) == 2 * 2 * 7
    they_train = [p for p in theirs.parameters() if p.requires_grad]
    assert {id(p) for p in same.values()} == {id(p) for p in they_train}
    optimizers = [
        torch.optim.AdamW(list(trained.values()), lr=1e-2),
        torch.optim.AdamW(list(same.values()), lr=1e-2),
    ]
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 300, (3, 25), generator=generator)
    targets = x[:, 1:]
    for step in range(4):
        loss = ours(x[:, :-1], targets) / targets.numel()
        expected = theirs(input_ids=x, labels=x).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for loss, optimizer in zip((loss, expected), optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, p in trained.items():
        torch.testing.assert_close(p, same[name], rtol=1e-3, atol=1e-5)
        assert p.abs().max() > 1e-3
    merged = lora.merge(ours.state_dict())
    their_weights = theirs.merge_and_unload().state_dict()
    renamed = {their_name(name): w for name, w in merged.items()}
    for name, w in their_weights.items():
        torch.testing.assert_close(renamed[name], w, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_computes_what_was_trained_and_the_frozen_weights_stay(dtype):
    model = network(qkv_bias=True)
    x = torch.arange(20)[None]
    before = {name: w.clone() for name, w in model.state_dict().items()}
    lora.add(model, rank=3, alpha=6, seed=1)
    assert torch.equal(model(x), network(qkv_bias=True)(x))  # b is zero
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)
    rounded = {name: w.to(dtype) for name, w in model.state_dict().items()}
    weights = lora.merge(rounded)
    assert weights.keys() == before.keys()
    for name, w in before.items():
        is_changed = not torch.equal(weights[name], w.to(dtype))
        assert is_changed == (name.startswith("blocks.") and w.ndim == 2), name
    in_float32 = {name: w.float() for name, w in weights.items()}
    merged = Model.from_state(vars(model.config), in_float32)
    if dtype == torch.float32:
        torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)
    assert lora.merge(before) == before


@pytest.mark.parametrize("harm", ["a is missing", "b of another shape", "scale is text"])
def test_half_an_update_is_refused(harm):
    model = network()
    lora.add(model, rank=3, alpha=6, seed=1)
    weights = model.state_dict()
    layer = "blocks.1.ffn.w2.lora_"
    if harm == "a is missing":
        del weights[layer + "a"]
    elif harm == "b of another shape":
        weights[layer + "b"] = torch.zeros(1, 1)
    else:
        weights[layer + "scale"] = "2"
    with pytest.raises(ValueError, match="blocks.1.ffn.w2 is not whole"):
        lora.merge(weights)


def test_fine_tuning_with_lora_resumes_exactly_and_ends_in_an_ordinary_checkpoint(
    tok, sft_dir, tmp_path, monkeypatch
):
    start = network(vocab_size=tok.vocab_size, max_seq_len=96)
    save_model(tmp_path / "start.pt", start, tok, "pretrain")
    settings = dict(
        checkpoint=str(tmp_path / "start.pt"),
        tokenizer=tok.name,
        data_dir=str(sft_dir),
        device="cpu",
        dtype="float32",
        compile="off",
        batch_tokens=256,
        micro_batch=2,
        max_steps=8,
        eval_interval=4,
        save_interval=2,
        lr=3e-3,
        lora_rank=4,
        sample_prompts="",
    )

    def run(name, **values):
        with constants(sft, **{**settings, "out_dir": str(tmp_path / name), **values}):
            sft.main()
        return read_log(tmp_path / name)

    monkeypatch.setattr(sft, "schedule", lambda step: 1.0)  # whatever max_steps is
    rows = run("whole")
    run("parts", max_steps=4)
    run("parts", resume=True)
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert rows[-1]["val_loss"] < rows[3]["val_loss"] < rows[0]["loss"]
    best = checkpoints.load(tmp_path / "whole" / "best.pt")
    assert best["model"].keys() == start.state_dict().keys()
    assert torch.equal(best["model"]["embedding.weight"], start.embedding.weight)
    query = best["model"]["blocks.0.attention.wq.weight"]
    assert not torch.equal(query, start.blocks[0].attention.wq.weight)
    # last.pt is merged, too: sample.py takes it
    last = checkpoints.load(tmp_path / "whole" / "last.pt")
    assert last["model"].keys() == best["model"].keys()
    for name, w in last["model"].items():
        assert torch.equal(w, best["model"][name])
    with pytest.raises(SystemExit, match="lora_rank"):
        run("parts", resume=True, lora_rank=0)
    with pytest.raises(SystemExit, match="lora_alpha"):
        run("parts", resume=True, lora_alpha=64.0)


def test_the_estimate_of_memory_counts_gradients_and_moments_of_the_updates_only():
    model = network(dim=256)
    make_optimizers(model, 1e-3, 0, 0.1)
    whole = model.bytes_to_train(1, 8, torch.float32)
    lora.add(model, rank=2, alpha=4, seed=1)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    make_optimizers(model, 1e-3, 0, 0.1)  # as sft.py with LoRA
    with_lora = model.bytes_to_train(1, 8, torch.float32)
    saved = 12 * (model.n_params() - n_trained)  # two moments and a gradient each
    assert whole - with_lora == pytest.approx(saved, rel=0.3)
