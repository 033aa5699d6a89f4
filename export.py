"""Export: a checkpoint -> a Hugging Face folder for transformers, or a GGUF file for llama.cpp and Ollama.

    python export.py                                                    out/sft/best.pt -> the folder out/hf
    python export.py --out=out/model.gguf --dtype=q8_0                  one file, 8 bits a weight
    python export.py --checkpoint=out/pretrain/best.pt --out=out/base   a model that continues text

The folder holds config.json, model.safetensors, generation_config.json, the tokenizer with the chat template, and a
model card. Both forms compute what model.py computes: Llama, with qk_norm Qwen3, with qkv_bias Qwen2.
"""
import importlib
import json
import os
import shutil

import numpy as np
import torch

import config
import runtime
import tokenizer as tokenizers
from huggingface import their_name
from model import Model

checkpoint = "out/sft/best.pt"  # of pretrain.py or sft.py
tokenizer  = ""                 # empty: the one that the checkpoint names
out        = "out/hf"           # a folder, or a file that ends in .gguf
dtype      = "f32"              # of the weights: f32 | f16; in a GGUF file also q8_0, 8 bits each
config.override(globals())

DTYPES = {"f32": torch.float32, "f16": torch.float16}
TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
# What Tokenizer.render() and prompt() write. The names of the roles stand apart from their "<|": llama.cpp, where it does
# not run templates, would take this one for Phi-3's, which has line feeds.
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
                 "{{ raise_exception('the roles are system, user and assistant') }}{% endif %}"
                 "{{ '<|' + message['role'] + '|>' + message['content'] + '<|' + 'end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|' + 'assistant|>' }}{% endif %}")


def needed(package, module):
    """The imported module; SystemExit if its package, which only exports need, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"--out={out}: needs the package {package}: pip install {package}") from None


def architecture(shape):
    """Whose network this is: "Llama", "Qwen2" or "Qwen3". SystemExit if it is nobody's."""
    if shape["qk_norm"] and shape["qkv_bias"]:
        raise SystemExit(f"{checkpoint}: has qk_norm, as Qwen3, and qkv_bias, as Qwen2; no one else computes both")
    name = "Qwen3" if shape["qk_norm"] else "Qwen2" if shape["qkv_bias"] else "Llama"
    if name != "Qwen3" and shape["head_dim"] * shape["n_heads"] != shape["dim"]:
        raise SystemExit(f"{checkpoint}: {shape['n_heads']} heads of {shape['head_dim']} are not its width, "
                         f"{shape['dim']}; only Qwen3 (qk_norm) is computed so elsewhere")
    return name


def write_json(name, value):
    with config.whole_file(f"{out}/{name}") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)
        f.write("\n")


# -----------------------------------------------------------------------------------------------------------------
# the vocabulary

def vocabulary(tok):
    """[(text, score, type)] of every id of one of our sentencepiece files; type as in GGUF: 1 text, 2 unknown,
    3 control, 6 byte. A space is a space in it."""
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=tok.name)
    return [(sp.id_to_piece(i).replace(tokenizers.SPACE, " "), sp.get_score(i),
             2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1) for i in range(sp.vocab_size())]


def merges(words):
    """The pairs that BPE joins, best first. sentencepiece joins any two neighbours that make a piece, the piece with
    the highest score first; `tokenizers` wants every such pair by name. words: {text: score}."""
    best_first = sorted((word for word in words if len(word) > 1), key=words.get, reverse=True)
    return [[word[:at], word[at:]] for word in best_first for at in range(len(word) - 1, 0, -1)
            if word[:at] in words and word[at:] in words]


def tokenizer_json(tok):
    """The tokenizer as `tokenizers` reads it: the same ids, byte for byte, with bos before them.

    Spaces stay spaces here, where sentencepiece writes U+2581, so U+2581 is a character as rare as others: bytes.
    """
    vocab = vocabulary(tok)
    controls = [{"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                 "special": True} for id, (text, _, kind) in enumerate(vocab) if kind in (2, 3)]
    bos, unknown = vocab[tok.bos_id][0], next(text for text, _, kind in vocab if kind == 2)
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": controls, "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, b],
                           "special_tokens": {bos: {"id": bos, "ids": [tok.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {text: id for id, (text, _, _) in enumerate(vocab)},
                  "merges": merges({text: score for text, score, kind in vocab if kind == 1})}}


# -----------------------------------------------------------------------------------------------------------------
# Hugging Face

def config_json(shape, tok, stop_ids):
    """config.json, with the names that transformers 4 and 5 both read."""
    name, scaling = architecture(shape), shape.get("rope_scaling")
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "vocab_size": shape["vocab_size"],
        "hidden_size": shape["dim"], "intermediate_size": shape["hidden_dim"], "num_hidden_layers": shape["n_layers"],
        "num_attention_heads": shape["n_heads"], "num_key_value_heads": shape["n_kv_heads"],
        "head_dim": shape["head_dim"], "hidden_act": "silu", "max_position_embeddings": shape["max_seq_len"],
        "rms_norm_eps": shape["norm_eps"], "rope_theta": shape["rope_theta"],
        "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None,
        "tie_word_embeddings": shape["tie_embeddings"], "attention_bias": False, "mlp_bias": False,
        "use_sliding_window": False, "bos_token_id": tok.bos_id, "eos_token_id": stop_ids, "pad_token_id": tok.pad_id,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def model_card(saved, model):
    """README.md of the folder: the figures that the checkpoint holds."""
    figures = {"parameters": f"{model.n_params():,}", "made by": f"{saved['stage']}.py", "optimizer steps": saved.get("step"),
               "validation loss, nats per token": saved.get("val_loss"),
               "validation loss, bits per byte of text": saved.get("val_bpb")}
    figures = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    rows = lambda table: "".join(f"| {name} | {value} |\n" for name, value in table.items() if value is not None)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {os.path.basename(os.path.abspath(out))}

A language model exported from `{checkpoint}`.

| figure | value |
|---|---|
{rows(figures)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
```

| shape | |
|---|---|
{rows(saved["shape"])}
| constant of the run | |
|---|---|
{rows(saved.get("constants", {}))}"""


def write_folder(saved, model, tok, stop_ids):
    save = needed("safetensors", "safetensors.torch").save
    settings = config_json(vars(model.config), tok, stop_ids)
    weights = {their_name(name): w.to(DTYPES[dtype]).contiguous() for name, w in model.state_dict().items()
               if name != "head.weight" or not model.config.tie_embeddings}
    with config.whole_file(f"{out}/model.safetensors", "wb") as f:
        f.write(save(weights, metadata={"format": "pt"}))
    write_json("config.json", settings)
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": stop_ids, "pad_token_id": tok.pad_id}
    write_json("generation_config.json", ids)
    with config.whole_file(f"{out}/README.md") as f:
        f.write(model_card(saved, model))
    for name in TOKENIZER_FILES:                              # of an export before this one
        if os.path.exists(f"{out}/{name}") and not os.path.samefile(f"{out}/{name}", tok.name):
            os.remove(f"{out}/{name}")
    if not tok.roles:
        print(f"{out}: without tokenizer files, because {tok.name} was not made by train_tokenizer.py; encode with ours")
        return
    vocab, spec = vocabulary(tok), tokenizer_json(tok)
    write_json("tokenizer.json", spec)
    write_json("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": vocab[tok.bos_id][0], "eos_token": vocab[tok.eos_id][0],
        "pad_token": vocab[tok.pad_id][0], "unk_token": spec["model"]["unk_token"],
        "additional_special_tokens": tokenizers.CONTROLS, "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_seq_len, "chat_template": CHAT_TEMPLATE})
    with open(tok.name, "rb") as source, config.whole_file(f"{out}/tokenizer.model", "wb") as f:
        shutil.copyfileobj(source, f)


# -----------------------------------------------------------------------------------------------------------------
# GGUF

def interleaved(w, n_heads):
    """Rows of a query or key projection in the order of llama.cpp's "llama": it turns neighbours (2 i, 2 i + 1), where
    we turn the pairs (i, i + D/2). w (n_heads * D, C)."""
    return w.reshape(n_heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(saved, model, tok, stop_ids):
    gguf = needed("gguf", "gguf")
    shape = vars(model.config)
    name = architecture(shape).lower()
    if not tok.roles:
        raise SystemExit(f"{out}: a GGUF file holds its tokenizer, and {tok.name} was not made by train_tokenizer.py; "
                         "--out=folder exports the weights alone")
    if shape.get("rope_scaling") and name != "llama":
        raise SystemExit(f"{checkpoint}: has rope_scaling, which llama.cpp computes for Llama and not for {name}")
    with config.whole_file(out, "wb") as aside:               # GGUFWriter opens the same file by its name
        writer = gguf.GGUFWriter(aside.name, name)
        writer.add_name(os.path.splitext(os.path.basename(out))[0])
        writer.add_file_type({"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
                              "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(shape["vocab_size"])
        writer.add_context_length(shape["max_seq_len"])
        writer.add_embedding_length(shape["dim"])
        writer.add_block_count(shape["n_layers"])
        writer.add_feed_forward_length(shape["hidden_dim"])
        writer.add_head_count(shape["n_heads"])
        writer.add_head_count_kv(shape["n_kv_heads"])
        writer.add_key_length(shape["head_dim"])
        writer.add_value_length(shape["head_dim"])
        writer.add_rope_dimension_count(shape["head_dim"])
        writer.add_rope_freq_base(shape["rope_theta"])
        writer.add_layer_norm_rms_eps(shape["norm_eps"])
        add_vocabulary(writer, gguf, tok, shape["vocab_size"], stop_ids)
        add_tensors(writer, gguf, model, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_vocabulary(writer, gguf, tok, rows, stop_ids):
    """The tokenizer as llama.cpp reads it: a sentencepiece BPE, with scores. rows: of the embedding, at least as many."""
    vocab = vocabulary(tok) + [(f"[unused {id}]", 0.0, gguf.TokenType.UNUSED) for id in range(tok.vocab_size, rows)]
    texts, scores, types = zip(*vocab)
    if " " not in texts:
        print(f"{out}: {tok.name} has no piece for a space; llama.cpp will encode texts with spaces otherwise than we do")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text.replace(" ", tokenizers.SPACE) if kind == 1 else text for text, _, kind in vocab])
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tok.bos_id)
    writer.add_eos_token_id(tok.eos_id)
    writer.add_pad_token_id(tok.pad_id)
    writer.add_unk_token_id(types.index(gguf.TokenType.UNKNOWN))
    if tok.end_id in stop_ids:
        writer.add_eot_token_id(tok.end_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)                        # left out it means true
    writer.add_chat_template(CHAT_TEMPLATE)


def add_tensors(writer, gguf, model, name):
    """Matrices in dtype, vectors in float32, as llama.cpp wants them."""
    c, kinds = model.config, gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), c.n_layers)
    kind, block = getattr(kinds, dtype.upper()), gguf.GGML_QUANT_SIZES[getattr(kinds, dtype.upper())][0]
    for ours, w in model.state_dict().items():
        if ours == "head.weight" and c.tie_embeddings:
            continue
        if name == "llama" and ours.endswith(("wq.weight", "wk.weight")):
            w = interleaved(w, c.n_heads if "wq" in ours else c.n_kv_heads)
        # rows that blocks of 32 weights do not fill stay in float16, as in llama.cpp's own converter
        stored = kinds.F32 if w.ndim == 1 else kind if w.shape[-1] % block == 0 else kinds.F16
        writer.add_tensor(names.get_name(their_name(ours), (".weight", ".bias")),
                          gguf.quants.quantize(w.float().contiguous().numpy(), stored), raw_dtype=stored)
    if getattr(c, "rope_scaling", None):                      # by what each frequency, read off the table, is divided
        cos, sin = model.rope[:, 1, 0, :c.head_dim // 2].double().numpy()
        plain = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / np.arctan2(sin, cos)).astype(np.float32))


def main():
    is_file = out.endswith(".gguf")
    if dtype not in (*DTYPES, *["q8_0"] * is_file):
        raise SystemExit(f"--dtype={dtype}: choose f32 or f16" + (" or q8_0" if is_file else "; q8_0 is for .gguf files"))
    saved = runtime.load_checkpoint(checkpoint)
    tok = tokenizers.load(tokenizer or saved["tokenizer"])
    if tok.sha256 != saved["tokenizer_sha256"]:
        raise SystemExit(f"{checkpoint} was trained with {saved['tokenizer']} as it was then, which is not {tok.name}")
    model = Model.from_state(saved["shape"], saved["model"])
    stop_ids = [tok.eos_id] if saved["stage"] == "pretrain" else sorted(tok.stop_ids)
    (write_gguf if is_file else write_folder)(saved, model, tok, stop_ids)
    print(f"{out}: {architecture(vars(model.config))}, {model.n_params():,} parameters in {dtype}")


if __name__ == "__main__":
    main()
