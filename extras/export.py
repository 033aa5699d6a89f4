"""Export: a checkpoint -> a Hugging Face folder for transformers, or a GGUF file for llama.cpp and Ollama.

    python -m extras.export                                                    out/sft/best.pt -> the folder out/hf
    python -m extras.export --out=out/model.gguf --dtype=q8_0                  one file, 8 bits a weight
    python -m extras.export --checkpoint=out/pretrain/best.pt --out=out/base   a model that continues text

The folder holds config.json, model.safetensors, generation_config.json, the tokenizer with the chat template, and a
model card. Both forms compute what model.py computes: Llama, with qk_norm Qwen3, with qkv_bias Qwen2.
"""
import config                                  # before torch: sets how its threads wait
import importlib
import json
import os

import torch

import checkpoints
import tokenizer as tokenizers
from extras.huggingface import their_name
from model import Model, scaled

checkpoint = "out/sft/best.pt"  # of pretrain.py or sft.py
tokenizer  = ""                 # empty: the one that the checkpoint names
out        = "out/hf"           # a folder, or a file that ends in .gguf
dtype      = "f32"              # of the weights: f32 | f16; in a GGUF file also q8_0, 8 bits each
config.override(globals())

DTYPES = {"f32": torch.float32, "f16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
# What Tokenizer.render() and prompt() make, with our own vocabularies and with those of ChatML. "<|" stands apart from
# the names: llama.cpp, where it does not run templates, would else take the first for Phi-3's, which has line feeds.
OURS = ("{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
        "{{ raise_exception('the roles are system, user and assistant') }}{% endif %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|' + 'end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|' + 'assistant|>' }}{% endif %}")
CHATML = ("{% for message in messages %}{{ '' if loop.first else '\\n' }}"
          "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}")


def needed(package, module):
    """The imported module; SystemExit if its package, which only exports need, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"--out={out}: needs the package {package}: pip install {package}") from None


def architecture(shape):
    """Whose network this is: "Llama", "Qwen2" or "Qwen3". SystemExit if it is nobody's."""
    refuse_unknown(shape)
    if shape["qk_norm"] and shape["qkv_bias"]:
        raise SystemExit(f"{checkpoint}: has qk_norm, as Qwen3, and qkv_bias, as Qwen2; nobody else computes both")
    name = "Qwen3" if shape["qk_norm"] else "Qwen2" if shape["qkv_bias"] else "Llama"
    if name == "Llama" and shape["dim"] % shape["n_heads"]:
        raise SystemExit(f"{checkpoint}: n_heads ({shape['n_heads']}) must divide dim ({shape['dim']}) in a Llama")
    return name


def refuse_unknown(shape):
    """SystemExit for a field of ModelConfig that is not written here and is not at its default."""
    written = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim",
               "max_seq_len", "rope_theta", "norm_eps", "tie_embeddings", "qk_norm", "qkv_bias",
               "rope_scaling")
    for name in shape.keys() - set(written):
        default = checkpoints.SHAPE[name].default
        if shape[name] != default:
            raise SystemExit(f"{checkpoint}: its {name} is {shape[name]}, which export.py cannot "
                             f"express; only {default} can be exported")


def as_json(value):
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


def read(path):
    with open(path, "rb") as f:
        return f.read()


# -----------------------------------------------------------------------------------------------------------------
# the vocabulary

def sentencepiece_file(tok):
    return f"{tok.name}/tokenizer.model" if os.path.isdir(tok.name) else tok.name


def vocabulary(tok):
    """[(text, score, type)] of every id of one of our sentencepiece files; type as in GGUF: 1 text, 2 unknown,
    3 control, 6 byte. A space is a space in it."""
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_file(tok))
    kind = lambda id: 2 if sp.is_unknown(id) else 3 if sp.is_control(id) else 6 if sp.is_byte(id) else 1
    return [(sp.id_to_piece(id).replace(tokenizers.SPACE, " "), sp.get_score(id), kind(id))
            for id in range(sp.vocab_size())]


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
    bos = vocab[tok.bos_id][0]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": controls, "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": first,
                           "pair": first + [{"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {bos: {"id": bos, "ids": [tok.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": vocab[0][0], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {text: id for id, (text, _, _) in enumerate(vocab)},
                  "merges": merges({text: score for text, score, kind in vocab if kind == 1})}}


# -----------------------------------------------------------------------------------------------------------------
# Hugging Face

def config_json(shape, tok):
    """config.json, with the names that transformers 4 and 5 both read."""
    name, scaling = architecture(shape), shape["rope_scaling"]
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "vocab_size": shape["vocab_size"],
        "hidden_size": shape["dim"], "intermediate_size": shape["hidden_dim"], "num_hidden_layers": shape["n_layers"],
        "num_attention_heads": shape["n_heads"], "num_key_value_heads": shape["n_kv_heads"],
        "head_dim": shape["head_dim"], "hidden_act": "silu", "max_position_embeddings": shape["max_seq_len"],
        "rms_norm_eps": shape["norm_eps"], "rope_theta": shape["rope_theta"],
        "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None,
        "tie_word_embeddings": shape["tie_embeddings"], "attention_bias": False, "mlp_bias": False,
        "use_sliding_window": False, "bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.pad_id,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def model_card(saved, model):
    """README.md of the folder: the figures that the checkpoint holds."""
    figures = {"parameters": f"{model.n_params():,}", "stage": saved["stage"], "optimizer steps": saved.get("step"),
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


def tokenizer_files(tok, model):
    """{name: bytes} of the files that AutoTokenizer wants: written for our own tokenizers, copied from the folder of
    others, with the template that sft.py trains in the place of theirs. None for those that have no such files."""
    if not tok.roles:
        files = {name: read(f"{tok.name}/{name}") for name in TOKENIZER_FILES if os.path.exists(f"{tok.name}/{name}")}
        settings = json.loads(files.get("tokenizer_config.json", "{}"))
        files.pop("chat_template.jinja", None)
        settings.pop("chat_template", None)
        if tok.start_id is not None:
            settings["chat_template"] = CHATML
        return {**files, "tokenizer_config.json": as_json(settings)} if files else {}
    vocab = vocabulary(tok)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": vocab[tok.bos_id][0],
                "eos_token": vocab[tok.eos_id][0], "pad_token": vocab[tok.pad_id][0], "unk_token": vocab[0][0],
                "additional_special_tokens": tokenizers.CONTROLS, "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"], "model_max_length": model.config.max_seq_len,
                "chat_template": OURS}
    if model.config.qkv_bias:                                 # or transformers 5 takes it for Qwen's, as in every Qwen2
        settings["auto_map"] = {"AutoTokenizer": ["", ""]}
    return {"tokenizer.json": as_json(tokenizer_json(tok)), "tokenizer_config.json": as_json(settings),
            "tokenizer.model": read(sentencepiece_file(tok))}


def write_folder(saved, model, tok, stop_ids):
    save = needed("safetensors", "safetensors.torch").save
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": stop_ids, "pad_token_id": tok.pad_id}
    files = {"config.json": as_json(config_json(vars(model.config), tok)), "generation_config.json": as_json(ids),
             "README.md": model_card(saved, model).encode(), **tokenizer_files(tok, model)}
    weights = {their_name(name): w.to(DTYPES[dtype]).contiguous() for name, w in model.state_dict().items()
               if name != "head.weight" or not model.config.tie_embeddings}
    files["model.safetensors"] = save(weights, metadata={"format": "pt"})
    for name in {*TOKENIZER_FILES, "model.safetensors.index.json"} - files.keys():   # of an export before this one
        if os.path.exists(f"{out}/{name}"):
            os.remove(f"{out}/{name}")
    for name, content in files.items():
        with config.whole_file(f"{out}/{name}", "wb") as f:
            f.write(content)
    if "tokenizer_config.json" not in files:
        print(f"{out}: without a tokenizer, since transformers reads none like {tok.name} exactly")


# -----------------------------------------------------------------------------------------------------------------
# GGUF

def interleaved(w, n_heads):
    """Rows of a query or key projection in the order of llama.cpp's "llama": it turns neighbours (2 i, 2 i + 1), where
    we turn the pairs (i, i + D/2). w (n_heads * D, C)."""
    return w.reshape(n_heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(saved, model, tok, stop_ids):
    gguf = needed("gguf", "gguf")
    c = model.config
    name = architecture(vars(c)).lower()
    if not tok.roles:
        raise SystemExit(f"{out}: a GGUF file holds its tokenizer, and {tok.name} was not made by train_tokenizer.py: "
                         "give a folder as --out=, and that to llama.cpp's convert_hf_to_gguf.py")
    if name != "llama" and c.rope_scaling or name == "qwen2" and c.n_heads * c.head_dim != c.dim:
        raise SystemExit(f"{checkpoint}: has rope_scaling or heads not dim / n_heads wide, which llama.cpp computes "
                         f"for Llama and not for {name}; transformers does: give a folder as --out=")
    with config.whole_file(out, "wb") as aside:               # GGUFWriter opens the same file by its name
        writer = gguf.GGUFWriter(aside.name, name)
        for key, value in dict(
                name=os.path.splitext(os.path.basename(out))[0], quantization_version=gguf.GGML_QUANT_VERSION,
                file_type=getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"),
                vocab_size=c.vocab_size, context_length=c.max_seq_len, embedding_length=c.dim, block_count=c.n_layers,
                feed_forward_length=c.hidden_dim, head_count=c.n_heads, head_count_kv=c.n_kv_heads,
                key_length=c.head_dim, value_length=c.head_dim, rope_dimension_count=c.head_dim,
                rope_freq_base=c.rope_theta, layer_norm_rms_eps=c.norm_eps).items():
            getattr(writer, f"add_{key}")(value)
        add_vocabulary(writer, gguf, tok, c.vocab_size, stop_ids)
        add_tensors(writer, gguf, model, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_vocabulary(writer, gguf, tok, rows, stop_ids):
    """The tokenizer as llama.cpp reads it: a sentencepiece BPE with its scores, and a text for each of the embedding's
    rows, of which there may be more."""
    vocab = vocabulary(tok) + [(f"[unused {id}]", 0.0, gguf.TokenType.UNUSED) for id in range(tok.vocab_size, rows)]
    texts, scores, types = zip(*vocab)
    if " " not in texts:
        print(f"{out}: {tok.name} has no piece for a space: llama.cpp will encode texts with spaces unlike us")
    spelled = [text.replace(" ", tokenizers.SPACE) if kind == 1 else text for text, _, kind in vocab]
    for key, value in dict(
            tokenizer_model="llama", tokenizer_pre="default", token_list=spelled, token_scores=scores,
            token_types=types, unk_token_id=0, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id,
            pad_token_id=tok.pad_id, add_bos_token=True, add_eos_token=False, chat_template=OURS,
            add_space_prefix=False,                           # left out it means true
            **({"eot_token_id": tok.end_id} if tok.end_id in stop_ids else {})).items():
        getattr(writer, f"add_{key}")(value)


def add_tensors(writer, gguf, model, name):
    """Matrices in dtype, vectors in float32, as llama.cpp wants them."""
    c, kinds = model.config, gguf.GGMLQuantizationType
    names, kind = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), c.n_layers), kinds[dtype.upper()]
    for ours, w in model.state_dict().items():
        if ours == "head.weight" and c.tie_embeddings:
            continue
        if name == "llama" and ours.endswith(("wq.weight", "wk.weight")):
            w = interleaved(w, c.n_heads if "wq" in ours else c.n_kv_heads)
        # rows that blocks of 32 weights do not fill stay in float16, as in llama.cpp's own converter
        stored = kinds.F32 if w.ndim == 1 else kind if w.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else kinds.F16
        writer.add_tensor(names.get_name(their_name(ours), (".weight", ".bias")),
                          gguf.quants.quantize(w.float().contiguous().numpy(), stored), raw_dtype=stored)
    if c.rope_scaling:                                        # by what each frequency is divided
        frequency = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)            # (D / 2,)
        writer.add_tensor("rope_freqs.weight", (frequency / scaled(frequency, **c.rope_scaling)).numpy())


def main():
    is_file = out.endswith(".gguf")
    if dtype not in (*DTYPES, *["q8_0"] * is_file):
        raise SystemExit(f"--dtype={dtype}: choose f32, f16" + (" or q8_0" if is_file else "; q8_0 is for .gguf files"))
    is_folder = os.path.isdir(out)
    if not out or is_file == is_folder and os.path.exists(out) or \
            is_folder and os.listdir(out) and not os.path.exists(f"{out}/config.json"):
        raise SystemExit(f"--out={out}: name a new folder, an earlier export, or a file that ends in .gguf")
    config.check_output("out", out if is_file else f"{out}/config.json")
    saved, tok = checkpoints.load_with_tokenizer(checkpoint, tokenizer)
    model = Model.from_state(saved["shape"], saved["model"])
    stop_ids = [tok.eos_id] if saved["stage"] == "pretrain" else sorted(tok.stop_ids)
    (write_gguf if is_file else write_folder)(saved, model, tok, stop_ids)
    print(f"{out}: {architecture(vars(model.config))}, {model.n_params():,} parameters in {dtype}")


if __name__ == "__main__":
    main()
