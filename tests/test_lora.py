"""lora.py: against peft, and that a merged model is the model that was trained."""
import pytest
import torch
from test_training import constants, same_run, save_model

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
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from extras.huggingface import their_name
    ours = network(n_kv_heads=1)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=ours.config.hidden_dim, rms_norm_eps=1e-5,
        tie_word_embeddings=True)
    theirs = transformers.LlamaForCausalLM(config)
    for name, w in ours.state_dict().items():
        theirs.state_dict()[their_name(name)].copy_(w)
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=layers))
    lora.add(ours, rank=4, alpha=12, seed=1)
    same = {}                                                    # our parameter: theirs
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if ".lora_" in name:
            layer, _, part = name.rpartition(".lora_")
            layer = their_name(f"{layer}.weight").removesuffix(".weight")
            same[name] = named[f"base_model.model.{layer}.lora_{part.upper()}.default.weight"]
            same[name].data.copy_(p.data)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == same.keys() and len(same) == 2 * 2 * 7
    assert {id(p) for p in same.values()} == {id(p) for p in theirs.parameters() if p.requires_grad}
    optimizers = [torch.optim.AdamW(list(params), lr=1e-2)
                  for params in (trained.values(), same.values())]
    x = torch.randint(0, 300, (3, 25), generator=torch.Generator().manual_seed(2))
    for step in range(4):
        losses = ours(x[:, :-1], x[:, 1:]) / x[:, 1:].numel(), theirs(input_ids=x, labels=x).loss
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, p in trained.items():
        torch.testing.assert_close(p, same[name], rtol=1e-3, atol=1e-5)
        assert p.abs().max() > 1e-3
    merged = lora.merge(ours.state_dict())
    for name, w in theirs.merge_and_unload().state_dict().items():
        ours_name = next(n for n in merged if their_name(n) == name)
        torch.testing.assert_close(merged[ours_name], w, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_computes_what_was_trained_and_the_frozen_weights_stay(dtype):
    model, x = network(qkv_bias=True), torch.arange(20)[None]
    before = {name: w.clone() for name, w in model.state_dict().items()}
    lora.add(model, rank=3, alpha=6, seed=1)
    assert torch.equal(model(x), network(qkv_bias=True)(x))      # b is zero
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)
    weights = lora.merge({name: w.to(dtype) for name, w in model.state_dict().items()})
    assert weights.keys() == before.keys()
    merged = Model.from_state(vars(model.config), {name: w.float() for name, w in weights.items()})
    changed = {name for name in before if not torch.equal(weights[name], before[name].to(dtype))}
    assert changed == {name for name, w in before.items()
                       if name.startswith("blocks.") and w.ndim == 2}
    if dtype == torch.float32:
        torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)
    assert lora.merge(before) == before


@pytest.mark.parametrize("harm", ["a is missing", "b of another shape", "scale is text"])
def test_half_an_update_is_refused(harm):
    model = network()
    lora.add(model, rank=3, alpha=6, seed=1)
    weights, layer = model.state_dict(), "blocks.1.ffn.w2.lora_"
    if harm == "a is missing":
        del weights[layer + "a"]
    else:
        weights[layer + harm.split()[0]] = torch.zeros(1, 1) if "shape" in harm else "2"
    with pytest.raises(ValueError, match="blocks.1.ffn.w2 is not whole"):
        lora.merge(weights)


def test_fine_tuning_with_lora_resumes_exactly_and_ends_in_an_ordinary_checkpoint(
        tok, sft_dir, tmp_path, monkeypatch):
    start = network(vocab_size=tok.vocab_size, max_seq_len=96)
    save_model(tmp_path / "start.pt", start, tok, "pretrain")
    settings = dict(checkpoint=str(tmp_path / "start.pt"), tokenizer=tok.name, device="cpu",
                    data_dir=str(sft_dir), dtype="float32", batch_tokens=256, max_steps=8,
                    eval_interval=4, save_interval=2, lr=3e-3, lora_rank=4, sample_prompts="",
                    compile="off", micro_batch=2)

    def run(name, **values):
        with constants(sft, **{**settings, "out_dir": str(tmp_path / name), **values}):
            sft.main()
        return checkpoints.read_log(tmp_path / name / "log.csv")

    monkeypatch.setattr(sft, "schedule", lambda step: 1.0)               # whatever max_steps is
    rows = run("whole")
    run("parts", max_steps=4)
    run("parts", resume=True)
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert float(rows[-1]["val_loss"]) < float(rows[3]["val_loss"]) < float(rows[0]["loss"])
    best = checkpoints.load(tmp_path / "whole" / "best.pt")
    assert best["model"].keys() == start.state_dict().keys()
    assert torch.equal(best["model"]["embedding.weight"], start.embedding.weight)
    query = best["model"]["blocks.0.attention.wq.weight"]
    assert not torch.equal(query, start.blocks[0].attention.wq.weight)
    last = checkpoints.load(tmp_path / "whole" / "last.pt")      # sample.py takes it, too: merged
    assert last["model"].keys() == best["model"].keys()
    assert all(torch.equal(w, best["model"][name]) for name, w in last["model"].items())
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
    make_optimizers(model, 1e-3, 0, 0.1)                         # as sft.py with LoRA
    saved = 12 * (model.n_params() - n_trained)                  # two moments and a gradient each
    assert whole - model.bytes_to_train(1, 8, torch.float32) == pytest.approx(saved, rel=0.3)
