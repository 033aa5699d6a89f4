"""Export: a checkpoint -> a Hugging Face folder, or a GGUF file for llama.cpp and Ollama.

    python -m extras.export                                     out/sft/best.pt -> the folder out/hf
    python -m extras.export --out=out/model.gguf --dtype=q8_0   one file, 8 bits a weight
    python -m extras.export --checkpoint=out/pretrain/best.pt --out=out/base    it continues texts

The folder holds config.json, model.safetensors, generation_config.json, the tokenizer with the chat
template, and a model card. Both forms compute what model.py computes: Llama, with qk_norm Qwen3,
with qkv_bias Qwen2.
"""
import config                                  # before torch: sets how its threads wait
import importlib
import json
import os
import re

import torch

import checkpoints
import templates
import tokenizer as tokenizers
from extras.huggingface import SHAPE, their_name
from model import Model, scaled

checkpoint = "out/sft/best.pt"  # of pretrain.py, sft.py or dpo.py
tokenizer  = ""                 # empty: the one that the checkpoint names
out        = "out/hf"           # a folder, or a file that ends in .gguf
dtype      = "f32"              # of the weights: f32 | f16; in a GGUF file also q8_0, 8 bits each
config.override(globals())

DTYPES = {"f32": torch.float32, "f16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
                   "special_tokens_map.json", "added_tokens.json", "merges.txt",
                   "chat_template.jinja")


def needed(package, module):
    """The imported module; SystemExit if its package, which only exports need, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"--out={out}: needs the package {package}: "
                         f"pip install {package}") from None


def architecture(shape):
    """Whose network this is: "Llama", "Qwen2" or "Qwen3". SystemExit if it is nobody's."""
    refuse_unknown(shape)
    if shape["qk_norm"] and shape["qkv_bias"]:
        raise SystemExit(f"{checkpoint}: has qk_norm, as Qwen3, and qkv_bias, as Qwen2; nobody "
                         "else computes both")
    name = "Qwen3" if shape["qk_norm"] else "Qwen2" if shape["qkv_bias"] else "Llama"
    if name == "Llama" and shape["dim"] % shape["n_heads"]:
        raise SystemExit(f"{checkpoint}: n_heads ({shape['n_heads']}) must divide dim "
                         f"({shape['dim']}) in a Llama")
    return name


def refuse_unknown(shape):
    """SystemExit for a field of ModelConfig that is not written here and is not at its default."""
    written = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim",
               "max_seq_len", "rope_theta", "norm_eps", "tie_embeddings", "qk_norm", "qkv_bias",
               "rope_scaling")
    for name in shape.keys() - set(written):
        if shape[name] != checkpoints.LATER[name]:
            raise SystemExit(f"{checkpoint}: its {name} is {shape[name]}, which export.py cannot "
                             f"express; only {checkpoints.LATER[name]} can be exported")


def as_json(value):
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


def read(path):
    with open(path, "rb") as f:
        return f.read()


# -------------------------------------------------------------------------------------------------
# the vocabulary

def sentencepiece_file(tok):
    return f"{tok.name}/tokenizer.model" if os.path.isdir(tok.name) else tok.name


def is_ours(tok):
    """Whether train_tokenizer.py made it. Saved again by others, a folder lacks its file."""
    return tok.template == templates.OURS and os.path.exists(sentencepiece_file(tok))


def vocabulary(tok):
    """[(text, score, type)] of every id of one of our sentencepiece files.

    A space in a text is a space. type as in GGUF: 1 text, 2 unknown, 3 control, 6 byte.
    """
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_file(tok))
    vocab = []
    for id in range(sp.vocab_size()):
        kind = 2 if sp.is_unknown(id) else 3 if sp.is_control(id) else 6 if sp.is_byte(id) else 1
        text = sp.id_to_piece(id).replace(tokenizers.SPACE, " ")
        vocab.append((text, sp.get_score(id), kind))
    return vocab


def merges(words):
    """The pairs that BPE joins, best first. words: {text: score}.

    sentencepiece joins any two neighbours that make a piece, the piece with the highest score
    first; `tokenizers` wants every such pair by name.
    """
    pairs = []
    for word in sorted(words, key=words.get, reverse=True):
        for at in range(len(word) - 1, 0, -1):
            if word[:at] in words and word[at:] in words:
                pairs.append([word[:at], word[at:]])
    return pairs


def tokenizer_json(tok):
    """The tokenizer as `tokenizers` reads it: the same ids, byte for byte, with bos before them.

    Spaces stay spaces here, where sentencepiece writes U+2581, so U+2581 is a character as rare as
    others: bytes.
    """
    vocab = vocabulary(tok)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    controls = [{"id": id, "content": text, **flags, "special": True}
                for id, (text, _, kind) in enumerate(vocab) if kind in (2, 3)]
    bos = vocab[tok.bos_id][0]
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": controls,
        "normalizer": None, "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, first], "pair": [start, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tok.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": vocab[0][0], "fuse_unk": False,
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "byte_fallback": True, "ignore_merges": False,
            "vocab": {text: id for id, (text, _, _) in enumerate(vocab)},
            "merges": merges({text: score for text, score, kind in vocab if kind == 1})}}


def jinja(template):
    """A template of templates.py as a chat template in Jinja.

    {% generation %} marks the answers, so that transformers' return_assistant_tokens_mask is the
    mask of Tokenizer.render().
    """
    def write(form, text=""):
        """The Jinja that writes a form with the value of the expression `text` in place of {}."""
        names = {"{}": text, "{bos}": "bos_token", "{eos}": "eos_token"}
        pieces = filter(None, re.split(r"(\{(?:bos|eos)?\})", form))
        joined = " + ".join(names.get(piece) or literal(piece) for piece in pieces)
        return f"{{{{ {joined} }}}}" if joined else ""

    def literal(text):
        text = json.dumps(text, ensure_ascii=False)
        # llama.cpp, where it does not run templates, would take ours for Phi-3's, with line feeds
        return text.replace("<|", '<" + "|') if template.name == "ours" else text

    def content(role):
        return "(message['content'] | trim)" if role in template.strip else "message['content']"

    start = write(template.begin)
    if template.default:
        start += ("{% if messages[0]['role'] != 'system' %}"
                  + write(template.system, literal(template.default)) + "{% endif %}")
    answer = write(template.header)
    if template.no_thoughts:
        answer += "{% if loop.last %}" + write(template.no_thoughts) + "{% endif %}"
    answer += ("{% generation %}" + write(template.answer, content("assistant"))
               + "{% endgeneration %}" + write(template.tail))
    if template.system:
        first = f"{literal(template.preface)} + {content('system')}"
        question = ("{% elif message['role'] == 'user' %}" + write(template.user, content("user"))
                    + "{% elif message['role'] == 'system' and loop.first %}"
                    + write(template.system, first) + "{% elif message['role'] == 'system' %}"
                    + write(template.system, content("system")))
    else:
        start += "{% set joined = namespace(text='') %}"
        question = ("{% elif message['role'] in ['system', 'user'] %}"
                    "{% if loop.first or loop.previtem['role'] == 'assistant' %}"
                    "{% set joined.text = " + content("user") + " %}{% else %}"
                    "{% set joined.text = joined.text + " + literal(template.joint) + " + "
                    + content("user") + " %}{% endif %}"
                    "{% if loop.last or loop.nextitem['role'] == 'assistant' %}"
                    + write(template.user, "joined.text") + "{% endif %}")
    return (start + "{% for message in messages %}{% if message['role'] == 'assistant' %}" + answer
            + question + "{% else %}{{ raise_exception('the roles are system, user and assistant')"
            " }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
            + write(template.header + template.no_thoughts) + "{% endif %}")


# -------------------------------------------------------------------------------------------------
# Hugging Face

def config_json(shape, tok):
    """config.json, with the names that transformers 4 and 5 both read."""
    name, scaling = architecture(shape), shape["rope_scaling"]
    names = {**SHAPE, "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
             "rope_theta": "rope_theta", "tie_embeddings": "tie_word_embeddings"}
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(),
        **{theirs: shape[ours] for ours, theirs in names.items()},
        "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "use_sliding_window": False, "bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id,
        "pad_token_id": tok.pad_id, "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def model_card(saved, model):
    """README.md of the folder: the figures that the checkpoint holds."""
    figures = {"parameters": f"{model.n_params():,}", "stage": saved["stage"],
               "optimizer steps": saved.get("step"),
               "validation loss, nats per token": saved.get("val_loss"),
               "validation loss, bits per byte of text": saved.get("val_bpb")}

    figures = {name: round(value, 4) if isinstance(value, float) else value
               for name, value in figures.items()}

    def rows(table):
        return "".join(f"| {name} | {value} |\n" for name, value in table.items()
                       if value is not None)

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


def tokenizer_files(saved, tok):
    """{name: bytes} of the files that AutoTokenizer wants; none where there can be no such files.

    They are written for our own tokenizers, and copied from the folder of others, with the chat
    template that sft.py trains in the place of theirs.
    """
    if not is_ours(tok):
        return copied_files(tok, saved["stage"])
    vocab, shape = vocabulary(tok), saved["shape"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": vocab[tok.bos_id][0],
        "eos_token": vocab[tok.eos_id][0], "pad_token": vocab[tok.pad_id][0],
        "unk_token": vocab[0][0], "additional_special_tokens": tokenizers.CONTROLS,
        "clean_up_tokenization_spaces": False, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": shape["max_seq_len"], "chat_template": jinja(tok.template)}
    if shape["qkv_bias"]:           # or transformers 5 takes it for Qwen's, as in every Qwen2
        settings["auto_map"] = {"AutoTokenizer": ["", ""]}
    return {"tokenizer.json": as_json(tokenizer_json(tok)),
            "tokenizer_config.json": as_json(settings),
            "tokenizer.model": read(sentencepiece_file(tok))}


def copied_files(tok, stage):
    """{name: bytes} of the tokenizer's files in a folder, with the template that was trained.

    A base model whose answers would end like documents gets no template: it would be taken for a
    chat model.
    """
    files = {name: read(f"{tok.name}/{name}") for name in TOKENIZER_FILES
             if os.path.exists(f"{tok.name}/{name}")}
    if not files:
        return {}
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    settings["padding_side"] = "left"
    if tok.template:
        files.pop("chat_template.jinja", None)
        settings.pop("chat_template", None)
        if stage != "pretrain" or tok.end_id != tok.eos_id:
            settings["chat_template"] = jinja(tok.template)
    return {**files, "tokenizer_config.json": as_json(settings)}


def write_folder(saved, model, tok, stop_ids):
    save = needed("safetensors", "safetensors.torch").save
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": stop_ids, "pad_token_id": tok.pad_id}
    files = {
        "config.json": as_json(config_json(vars(model.config), tok)),
        "generation_config.json": as_json(ids), "README.md": model_card(saved, model).encode(),
        **tokenizer_files(saved, tok)}
    weights = {their_name(name): w.to(DTYPES[dtype]).contiguous()
               for name, w in model.state_dict().items()
               if name != "head.weight" or not model.config.tie_embeddings}
    files["model.safetensors"] = save(weights, metadata={"format": "pt"})
    stale = {*TOKENIZER_FILES, "model.safetensors.index.json"} - files.keys()
    for name in stale:                                        # of an export before this one
        if os.path.exists(f"{out}/{name}"):
            os.remove(f"{out}/{name}")
    for name, content in files.items():
        with config.whole_file(f"{out}/{name}", "wb") as f:
            f.write(content)
    if "tokenizer_config.json" not in files:
        print(f"{out}: without a tokenizer, since transformers reads none like {tok.name} exactly")


# -------------------------------------------------------------------------------------------------
# GGUF

def interleaved(w, n_heads):
    """Rows of a query or key projection in the order of llama.cpp's "llama". w (n_heads * D, C).

    It rotates the neighbours (2 i, 2 i + 1), where we rotate the pairs (i, i + D/2).
    """
    return w.reshape(n_heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(saved, model, tok, stop_ids):
    gguf = needed("gguf", "gguf")
    c = model.config
    name = architecture(vars(c)).lower()
    if not is_ours(tok):
        folder = out.removesuffix(".gguf")
        advice = "llama.cpp reads none like it"
        if os.path.exists(f"{tok.name}/tokenizer.json"):
            advice = (f"use --out={folder}, then llama.cpp's `python convert_hf_to_gguf.py "
                      f"{folder} --outfile={out}`")
        raise SystemExit(f"{out}: a GGUF file holds its tokenizer, and {tok.name} was not made by "
                         f"train_tokenizer.py: {advice}")
    if name != "llama" and c.rope_scaling or name == "qwen2" and c.n_heads * c.head_dim != c.dim:
        raise SystemExit(f"{checkpoint}: has rope_scaling or heads not dim / n_heads wide, which "
                         f"llama.cpp computes for Llama and not for {name}; transformers does: "
                         "give a folder as --out=")
    file_type = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    values = dict(
        name=os.path.splitext(os.path.basename(out))[0],
        quantization_version=gguf.GGML_QUANT_VERSION,
        file_type=getattr(gguf.LlamaFileType, file_type), vocab_size=c.vocab_size,
        context_length=c.max_seq_len, embedding_length=c.dim, block_count=c.n_layers,
        feed_forward_length=c.hidden_dim, head_count=c.n_heads, head_count_kv=c.n_kv_heads,
        key_length=c.head_dim, value_length=c.head_dim, rope_dimension_count=c.head_dim,
        rope_freq_base=c.rope_theta, layer_norm_rms_eps=c.norm_eps)
    with config.whole_file(out, "wb") as aside:               # GGUFWriter opens it by its name
        writer = gguf.GGUFWriter(aside.name, name)
        for key, value in values.items():
            getattr(writer, f"add_{key}")(value)
        add_vocabulary(writer, gguf, tok, c.vocab_size, stop_ids)
        add_tensors(writer, gguf, model, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_vocabulary(writer, gguf, tok, rows, stop_ids):
    """The tokenizer as llama.cpp reads it: a sentencepiece BPE with its scores.

    rows: of the embedding, each of which needs a text; there may be more than ids.
    """
    vocab = vocabulary(tok)
    for id in range(tok.vocab_size, rows):
        vocab.append((f"[unused {id}]", 0.0, gguf.TokenType.UNUSED))
    texts, scores, types = zip(*vocab)
    if " " not in texts:
        print(f"{out}: {tok.name} has no piece for a space: llama.cpp will encode texts with "
              "spaces unlike us")
    spelled = [text.replace(" ", tokenizers.SPACE) if kind == 1 else text
               for text, _, kind in vocab]
    values = dict(
        tokenizer_model="llama", tokenizer_pre="default", token_list=spelled, token_scores=scores,
        token_types=types, unk_token_id=0, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id,
        pad_token_id=tok.pad_id, add_bos_token=True, add_eos_token=False,
        chat_template=re.sub("{% (end)?generation %}", "", jinja(tok.template)),
        add_space_prefix=False)                               # left out it means true
    if tok.end_id in stop_ids:
        values["eot_token_id"] = tok.end_id
    for key, value in values.items():
        getattr(writer, f"add_{key}")(value)


def add_tensors(writer, gguf, model, name):
    """Matrices in dtype, vectors in float32, as llama.cpp wants them."""
    c, kinds = model.config, gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), c.n_layers)
    kind = kinds[dtype.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]                    # weights with one scale
    for ours, w in model.state_dict().items():
        if ours == "head.weight" and c.tie_embeddings:
            continue
        if name == "llama" and ours.endswith(("wq.weight", "wk.weight")):
            w = interleaved(w, c.n_heads if "wq" in ours else c.n_kv_heads)
        # rows that blocks do not fill stay in float16, as in llama.cpp's own converter
        matrix = kind if w.shape[-1] % block == 0 else kinds.F16
        stored = kinds.F32 if w.ndim == 1 else matrix
        data = gguf.quants.quantize(w.float().contiguous().numpy(), stored)
        theirs = names.get_name(their_name(ours), (".weight", ".bias"))
        writer.add_tensor(theirs, data, raw_dtype=stored)
    if c.rope_scaling:                                        # by what each frequency is divided
        positions = torch.arange(0, c.head_dim, 2).float() / c.head_dim
        frequency = 1 / c.rope_theta ** positions             # (D / 2,)
        factors = frequency / scaled(frequency, **c.rope_scaling)
        writer.add_tensor("rope_freqs.weight", factors.numpy())


def main():
    is_file, is_folder = out.endswith(".gguf"), os.path.isdir(out)
    if dtype not in DTYPES and not (is_file and dtype == "q8_0"):
        choices = "f32, f16 or q8_0" if is_file else "f32, f16; q8_0 is for .gguf files"
        raise SystemExit(f"--dtype={dtype}: choose {choices}")
    other = is_folder and os.listdir(out) and not os.path.exists(f"{out}/config.json")
    if not out or other or os.path.exists(out) and is_file == is_folder:
        raise SystemExit(f"--out={out}: name a new folder, an earlier export, or a file that ends "
                         "in .gguf")
    config.check_output("out", out if is_file else f"{out}/config.json")
    saved, tok = checkpoints.load_with_tokenizer(checkpoint, tokenizer)
    model = Model.from_state(saved["shape"], saved["model"])
    stop_ids = [tok.eos_id] if saved["stage"] == "pretrain" else sorted(tok.stop_ids)
    (write_gguf if is_file else write_folder)(saved, model, tok, stop_ids)
    print(f"{out}: {architecture(vars(model.config))}, {model.n_params():,} parameters in {dtype}")


if __name__ == "__main__":
    main()
