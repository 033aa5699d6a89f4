"""A longer context than the model was trained with."""
import pytest
import torch
from test_training import constants, refused, save_model

import checkpoints
import pretrain
from model import Model, ModelConfig, generate


@pytest.fixture
def settings(tok, pretrain_dir, tmp_path):
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, 32, 2, 2, max_seq_len=32))
    save_model(tmp_path / "short.pt", model, tok, "pretrain")
    return dict(
        init_from=str(tmp_path / "short.pt"),
        tokenizer=tok.name,
        data_dir=str(pretrain_dir),
        out_dir=str(tmp_path / "long"),
        device="cpu",
        dtype="float32",
        compile="off",
        max_seq_len=80,
        batch_tokens=240,
        max_steps=3,
        eval_interval=3,
        sample_prompts="",
    )


@pytest.mark.parametrize(
    "how, theta, factor",
    [
        (dict(rope_theta=50_000.0), 50_000.0, None),
        (dict(rope_factor=2.5), 10_000.0, 2.5),
    ],
)
def test_training_goes_on_with_a_longer_context(settings, tok, tmp_path, how, theta, factor):
    with constants(pretrain, **settings, **how):
        pretrain.main()
    saved = checkpoints.load(tmp_path / "long" / "best.pt")
    shape = saved["shape"]
    assert shape["max_seq_len"] == 80
    assert shape["rope_theta"] == theta
    assert (shape["rope_scaling"] or {}).get("factor") == factor
    if factor:
        assert shape["rope_scaling"]["original_max_position_embeddings"] == 32
    model = Model.from_state(shape, saved["model"])
    steps = list(generate(model, [[tok.bos_id]], 79, temperature=0))
    assert len(steps) == 79  # beyond 32


def test_positions_that_the_model_does_not_know_are_refused(settings):
    with constants(pretrain, **settings):
        sentence = refused(pretrain.main)
    assert "32 tokens at most" in sentence
    assert "--rope_theta=" in sentence
    assert "--rope_factor=" in sentence
    with constants(pretrain, **{**settings, "max_seq_len": 32}):  # as long as before
        pretrain.main()


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(max_seq_len=32, rope_factor=2.0), "32 tokens already"),
        (dict(init_from="", rope_factor=2.0), "--init_from="),
        (dict(rope_factor=0.5), "--rope_factor=0.5"),
    ],
)
def test_a_rope_factor_that_stretches_nothing_is_refused(settings, changes, said):
    with constants(pretrain, **{**settings, **changes}):
        assert said in refused(pretrain.main)


def test_a_model_is_stretched_twice(settings):
    """The second factor applies to the frequencies that the first has stretched."""
    shape = dict(vocab_size=400, dim=32, n_layers=2, n_heads=2, max_seq_len=32, rope_scaling=None)
    for max_seq_len, factor in ((80, 2.5), (160, 2.0)):
        changes = dict(max_seq_len=max_seq_len, rope_factor=factor)
        with constants(pretrain, **{**settings, **changes}):
            shape = vars(pretrain.continued(shape))
    assert shape["max_seq_len"] == 160
    assert shape["rope_scaling"] == dict(
        factor=5.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
