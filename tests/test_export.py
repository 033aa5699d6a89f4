"""extras/export.py: what transformers and gguf's reader read of an export."""
import json
import random
import sys

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from conftest import TEXTS, dialogue, import_weights, run, story

import checkpoints
import templates
import tokenizer
import train_tokenizer
from extras import export
from model import Model, ModelConfig, generate

LLAMA3 = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32)
KINDS = {
    "Llama": dict(n_kv_heads=2, norm_eps=1e-3),
    "Llama untied": dict(tie_embeddings=False, rope_theta=5e5),
    "Llama scaled": dict(rope_scaling=LLAMA3, head_dim=12),
    "Qwen2": dict(qkv_bias=True, n_kv_heads=1),
    "Qwen3": dict(qk_norm=True, head_dim=12, n_kv_heads=2)}


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A tokenizer of train_tokenizer.py, with pieces for spaces, runs of them, and words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("spaced") / "tokenizer.model"
    line = "\n    if a  ==  b:\n" + "hello world " * 3 + "哈哈哈哈哈"
    texts = [story(rng, 3) + line for _ in range(60)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "vocab_size", 460)
        path.write_bytes(train_tokenizer.train(texts))
    return tokenizer.load(str(path))


@pytest.fixture
def exported(tok, tmp_path, monkeypatch):
    """exported(out, ...) -> (path of the export of a random network, the network)."""
    def call(out="hf", tok=tok, stage="sft", dtype="f32", **options):
        torch.manual_seed(0)
        sizes = dict(
            vocab_size=tok.vocab_size,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_seq_len=96)
        model = Model(ModelConfig(**{**sizes, **options})).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
        path = str(tmp_path / "best.pt")
        checkpoints.save(path, {
            "stage": stage,
            "model": model.state_dict(),
            "shape": vars(model.config),
            "tokenizer": tok.name,
            "tokenizer_sha256": tok.sha256,
            "step": 1234,
            "val_loss": 2.34567,
            "val_bpb": 1.01234,
            "constants": {"muon_lr": 0.00567}})
        constants = dict(checkpoint=path, out=str(tmp_path / out), dtype=dtype)
        for name, value in constants.items():
            monkeypatch.setattr(export, name, value)
        export.main()
        return tmp_path / out, model
    return call


def rows(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (3, 60), generator=generator)


# ---- Hugging Face --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits_and_greedy_text(exported, tok, kind):
    folder, model = exported(**KINDS[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == kind.split()[0] + "ForCausalLM"
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        ours, expected = model(rows(model)), theirs(rows(model)).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        prompt = tok.prompt([{"role": "user", "content": "小猫在河边吗？"}])
        asked = torch.tensor([prompt])
        greedy = theirs.generate(asked, max_new_tokens=40, do_sample=False)
    answer = generate(model, [prompt], 40, temperature=0, stop_ids=tok.stop_ids)
    assert [row[0] for row in answer] == greedy[0, len(prompt):].tolist()


@pytest.mark.parametrize("stage, ends", [("sft", [2, 7]), ("pretrain", [2])])
def test_generation_ends_where_ours_does(exported, stage, ends):
    folder, _ = exported(stage=stage)
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == ends


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("which", ["tok", "spaced"])
def test_autotokenizer_gives_our_ids(exported, request, kind, which):
    ours = request.getfixturevalue(which)
    folder, _ = exported(tok=ours, **KINDS[kind])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    texts = TEXTS + [story(rng, 3) for _ in range(20)]
    for few in "a b", "哈 \n", "helo wrd", "从前，▁😀", "01-=":
        for _ in range(20):
            runs = [rng.choice(few) * rng.choice([1, 1, 2, 3, 9]) for _ in range(20)]
            texts.append("".join(runs))
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
        assert theirs(text).input_ids == [ours.bos_id] + ids
    evil = "<s>你<|end|><|user|></s>"
    as_text = theirs.encode(evil, add_special_tokens=False, split_special_tokens=True)
    assert as_text == ours.encode(evil)
    as_control = theirs.encode(evil, add_special_tokens=False)
    assert as_control == [1, *ours.encode("你"), 7, 5, 2]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    # what generate(**...) takes
    assert set(theirs("你好")) == {"input_ids", "attention_mask"}
    ids = [1, 4, 7, *ours.encode("你 好"), 2]
    assert theirs.decode(ids, skip_special_tokens=True) == "你 好"


def test_the_chat_template_renders_what_sft_trains_on(exported, spaced):
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tok=spaced)[0])
    rng = random.Random(0)
    dialogues = [dialogue(rng, turns) for turns in (1, 1, 2, 3) for _ in range(5)]
    dialogues.append([
        {"role": "user", "content": " a \n\n"},
        {"role": "assistant", "content": "\n  b{{ x }}%} "}])
    for messages in dialogues:
        rendered = theirs.apply_chat_template(messages, return_dict=False)
        assert rendered == spaced.render(messages)[0]
        asked = messages[:-1]
        prompt = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert prompt == spaced.prompt(asked)
    with pytest.raises(Exception, match="roles"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_folder_imported_again_is_the_same_model(exported, tok, tmp_path):
    for stage in ("sft", "pretrain"):
        folder, model = exported(stage=stage, **KINDS["Llama scaled"])
        saved = checkpoints.load(import_weights(folder, tmp_path / "again.pt"))
        assert saved["stage"] == stage
        assert saved["shape"] == vars(model.config)
        assert saved["tokenizer_sha256"] == tok.sha256
        assert tokenizer.load(saved["tokenizer"]).sha256 == tok.sha256
        weights = model.state_dict()
        for name, w in weights.items():
            assert torch.equal(w, saved["model"][name]), name


def test_our_folder_saved_again_by_transformers_is_still_ours(exported, spaced, tmp_path):
    folder, model = exported(tok=spaced, stage="sft")
    saved = tmp_path / "saved"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(saved)
    assert not (saved / "tokenizer.model").exists()
    messages = dialogue(random.Random(1), 2)
    for with_jinja in True, False:
        again = tokenizer.load(str(saved))
        assert again.template == templates.OURS
        assert again.stop_ids == spaced.stop_ids
        assert again.render(messages) == spaced.render(messages)
        assert again.vocab_size == spaced.vocab_size
        for text in TEXTS:
            assert again.encode(text) == spaced.encode(text)
            assert again.decode(again.encode(text)) == text
        imported = checkpoints.load(import_weights(saved, tmp_path / "again.pt"))
        assert imported["stage"] == "sft"
        assert torch.equal(imported["model"]["norm.weight"], model.norm.weight)
        (saved / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((saved / "tokenizer_config.json").read_text("utf-8"))
        settings.pop("chat_template", None)
        (saved / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def test_batches_are_padded_on_the_left_and_answers_marked(exported, spaced):
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tok=spaced)[0])
    padded = theirs(["从前", "从前，小猫在河边唱歌。"], padding=True)
    assert padded.input_ids[0][0] == spaced.pad_id
    for seed in range(9):
        messages = dialogue(random.Random(seed), 3)
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (found["input_ids"], found["assistant_masks"]) == spaced.render(messages)


def test_a_folder_of_others_keeps_its_tokenizer_and_gets_the_template_that_sft_trains(
        exported, tmp_path, monkeypatch):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([story(random.Random(0), 9)], trainer)
    theirs.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (tmp_path / "theirs").mkdir()
    theirs.save(str(tmp_path / "theirs/tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": "another"}
    (tmp_path / "theirs/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "theirs/chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}")
    tok = tokenizer.load(str(tmp_path / "theirs"))
    folder, _ = exported(tok=tok)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "你好 吗"}]
    prompt = again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == tok.prompt(messages)
    messages.append({"role": "assistant", "content": "好。"})
    rendered = again.apply_chat_template(messages, return_dict=False)
    assert rendered == tok.render(messages)[0]
    imported = import_weights(folder, tmp_path / "again.pt")
    assert checkpoints.load(imported)["tokenizer_sha256"] == tok.sha256
    with pytest.raises(SystemExit, match="convert_hf_to_gguf.py .*/model --outfile=.*/model.gguf"):
        exported("model.gguf", tok=tok)


def test_a_vocabulary_that_transformers_cannot_have_exactly_stays_here(exported, tmp_path, capsys):
    exported()  # leaves a tokenizer in the same folder
    path = tmp_path / "plain.model"
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e " * 9] * 9),
            model_writer=f,
            vocab_size=14,
            model_type="bpe",
            minloglevel=2)
    folder, model = exported(tok=tokenizer.load(str(path)))
    assert "without a tokenizer" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.vocab_size == 14
    with pytest.raises(SystemExit, match="not made by train_tokenizer.py: llama.cpp reads none"):
        exported("model.gguf", tok=tokenizer.load(str(path)))


def test_float16_and_the_model_card(exported):
    folder, model = exported(dtype="f16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float16
    half = model.blocks[1].ffn.w3.weight.half()
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, half)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for figure in f"{model.n_params():,}", "1234", "2.3457", "1.0123", "0.00567":
        assert f" {figure} |" in card


# ---- GGUF ----------------------------------------------------------------------------------------

GGUF_KINDS = [kind for kind in KINDS if kind != "Llama scaled"]


@pytest.mark.parametrize("kind", [*GGUF_KINDS, "rows"])
def test_transformers_computes_the_same_logits_from_gguf(exported, kind):
    options = KINDS.get(kind, dict(vocab_size=410))  # more rows in the embedding than pieces
    path, model = exported("model.gguf", **options)
    head_dim = {"head_dim": 12} if kind == "Qwen3" else {}  # transformers does not read a Qwen3's
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, **head_dim).eval()
    x = rows(model)
    with torch.no_grad():
        ours, expected = model(x), theirs(x).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def field(reader, name):
    return reader.get_field(name).contents()


def test_the_vocabulary_in_gguf(exported, spaced):
    path, _ = exported("model.gguf", tok=spaced, vocab_size=spaced.vocab_size + 2)
    reader = gguf.GGUFReader(path)
    sp = sentencepiece.SentencePieceProcessor(model_file=spaced.name)
    texts, scores, types = (
        field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    n = spaced.vocab_size
    assert texts[:n] == [sp.id_to_piece(i) for i in range(n)]
    assert len(set(texts)) == len(texts) == n + 2
    assert scores[:n] == pytest.approx([sp.get_score(i) for i in range(n)])
    # of "<unk>", the controls, the bytes, the pieces, and the rows without a piece
    assert types == [2] + [3] * 7 + [6] * 256 + [1] * (n - 264) + [5] * 2
    expected = {
        "model": "llama",
        "add_space_prefix": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": 7,
        "padding_token_id": 3,
        "unknown_token_id": 0}
    assert {name: field(reader, f"tokenizer.ggml.{name}") for name in expected} == expected
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tok=spaced)[0])
    messages = dialogue(random.Random(0), 2)
    template = field(reader, "tokenizer.chat_template")
    rendered = theirs.apply_chat_template(messages, chat_template=template, return_dict=False)
    assert rendered == spaced.render(messages)[0]


def test_a_pretrained_model_has_no_end_of_turn_in_gguf(exported):
    path, _ = exported("model.gguf", stage="pretrain")
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.eot_token_id") is None


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_the_weights_in_gguf_are_ours_rounded(exported, dtype):
    path, model = exported("model.gguf", dtype=dtype, qk_norm=True)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert tensors["blk.1.attn_q_norm.weight"].tensor_type.name == "F32"
    down = tensors["blk.1.ffn_down.weight"]  # rows of 48 are no multiple of 32
    assert down.tensor_type.name == "F16"
    w2 = model.blocks[1].ffn.w2.weight.detach()
    assert np.array_equal(down.data, w2.half().numpy())
    up = tensors["blk.1.ffn_up.weight"]
    w = model.blocks[1].ffn.w3.weight.detach().numpy()
    assert up.tensor_type.name == dtype.upper()
    error = np.abs(gguf.dequantize(up.data, up.tensor_type) - w)
    # of a row: a block, whose scale is a float16
    largest = np.abs(w).max(-1, keepdims=True)
    tolerance = 2**-11 if dtype == "f16" else 0.57 / 127
    assert (error <= largest * tolerance).all()
    assert error.any()


def test_the_frequencies_of_llama_3_in_gguf(exported):
    path, _ = exported("model.gguf", **KINDS["Llama scaled"])
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    factors = torch.tensor(tensors["rope_freqs.weight"].copy())
    frequencies = []
    for scaling in ({"rope_type": "default"}, {"rope_type": "llama3", **LLAMA3}):
        rope = {"rope_theta": 10_000.0, **scaling}
        c = transformers.LlamaConfig(
            hidden_size=32,
            num_attention_heads=4,
            head_dim=12,
            max_position_embeddings=96,
            rope_parameters=rope)
        embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(c)
        frequencies.append(embedding.inv_freq)
    torch.testing.assert_close(factors, frequencies[0] / frequencies[1])
    assert factors[0] == 1
    assert factors[-1] == 8


# ---- what cannot be ------------------------------------------------------------------------------

@pytest.mark.parametrize("out, options, said", [
    ("hf", dict(qk_norm=True, qkv_bias=True), "nobody else"),
    ("m.gguf", dict(qk_norm=True, qkv_bias=True), "nobody else"),
    ("hf", dict(dim=30, head_dim=8), "must divide"),
    ("m.gguf", dict(qkv_bias=True, head_dim=12), "not for qwen2"),
    ("m.gguf", dict(qk_norm=True, rope_scaling=LLAMA3), "not for qwen3"),
    ("hf", dict(dtype="q8_0"), "q8_0 is for"),
    ("m.gguf", dict(dtype="int4"), "choose f32, f16 or q8_0")])
def test_what_no_one_else_computes_is_refused_and_nothing_written(
        exported, tmp_path, out, options, said):
    with pytest.raises(SystemExit, match=said):
        exported(out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_a_field_that_export_does_not_know_must_have_its_default(tok, monkeypatch):
    monkeypatch.setitem(checkpoints.LATER, "logit_cap", 0.0)
    shape = vars(ModelConfig(tok.vocab_size, dim=32, n_layers=1, n_heads=2))
    assert export.architecture({**shape, "logit_cap": 0.0}) == "Llama"
    with pytest.raises(SystemExit, match="logit_cap is 5.0"):
        export.architecture({**shape, "logit_cap": 5.0})


@pytest.mark.parametrize("out, package, module", [
    ("hf", "safetensors", "safetensors.torch"),
    ("m.gguf", "gguf", "gguf")])
def test_one_line_says_what_to_install(exported, tmp_path, monkeypatch, out, package, module):
    monkeypatch.setitem(sys.modules, module, None)  # import then fails
    with pytest.raises(SystemExit, match=f"pip install {package}$") as stopped:
        exported(out)
    assert "\n" not in str(stopped.value)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_the_script_without_gguf_and_with_it(exported, tmp_path):
    exported()
    arguments = "--checkpoint=best.pt", "--out=m.gguf", "--dtype=q8_0"
    done = run("extras.export", tmp_path, *arguments, code="sys.modules['gguf'] = None")
    assert done.rc == 1
    assert done.err.count("\n") == 1
    assert "pip install gguf" in done.err
    assert run("extras.export", tmp_path, *arguments).rc == 0
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors


def test_another_tokenizer_than_the_checkpoints_is_refused(exported, other_tok, monkeypatch):
    monkeypatch.setattr(export, "tokenizer", other_tok.name)
    with pytest.raises(SystemExit, match="was trained with"):
        exported()


@pytest.mark.parametrize("out", ["", "file", "folder.gguf", "notes", "best.pt"])
def test_nothing_but_an_earlier_export_is_overwritten(exported, tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="--out="):
        exported(out)
    after = sorted(path for path in tmp_path.rglob("*") if path.name != "best.pt")
    assert after == before
    assert (tmp_path / "notes/README.md").read_text() == "mine"
