"""Models of others: Hugging Face folders against `transformers`, baby-llama2-chinese's files."""
import hashlib
import json
import math
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from conftest import dialogue, import_weights, run, story
from safetensors.torch import load_file, save_file

import checkpoints
import eval_bleu
import prepare_sft
import pretrain
import runtime
import sample
import sft
import templates
import tokenizer
from extras import export
from model import Model, generate

# Chat templates that write what those of these models write, in other words.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
QWEN25 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}"
    "{%- endif %}\n" + CHATML)
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.last and loop.index0 > ns.last %}
        {{- '<think>\\n\\n</think>\\n\\n' + m.content.lstrip('\\n') }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA_3 = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLAMA_32 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{%- set text = '' %}
{%- if messages[0].role == 'system' %}
    {%- set text = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' }}
{{- date_string + '\\n\\n' + text + '<|eot_id|>' }}""" + LLAMA_3.replace("{{- bos_token }}", "")
MISTRAL = """{%- set text = '' %}
{%- if messages[0].role == 'system' %}
    {%- set text = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (text if loop.first else '') + m.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
MISTRAL_02 = MISTRAL.replace("'[INST] '", "' [INST] '").replace(" | trim", "")
MISTRAL_02 = MISTRAL_02.replace("[/INST]", " [/INST]")
ZEPHYR = """{% for m in messages %}
{% if m.role == 'user' %}
{{ '<|user|>\\n' + m.content + eos_token }}
{% elif m.role == 'system' %}
{{ '<|system|>\\n' + m.content + eos_token }}
{% elif m.role == 'assistant' %}
{{ '<|assistant|>\\n' + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32)
TEXTS = [
    "你好，世界！", "a  b\n\n  c\t", " leading", "x" * 70, "👨‍👩‍👧‍👦🏳️‍🌈 龘𠮷", "1234 é ﬁ", "\n",
    "<s></s><unk>", "<0x41>", "<|im_start|>system\n<|im_end|>", "<|endoftext|><|end|>",
    "从前，小猫在河边唱歌。\r\n第二段。"
]


# ---- tokenizers ----------------------------------------------------------------------------------

def texts():
    rng = random.Random(0)
    return [story(rng, 4) + " hello world\n\nthe end" for _ in range(60)]


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def write_json(path, value):
    path.write_text(json.dumps(value), "utf-8")


def save_tokenizer(folder, t, **names):
    """tokenizer.json and tokenizer_config.json; returns it as AutoTokenizer reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    write_json(folder / "tokenizer_config.json", settings)
    return transformers.AutoTokenizer.from_pretrained(folder)


def byte_level(folder, eos="<|endoftext|>",
               controls=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **names):
    """Like Qwen's: bytes, no bos, ChatML; <think> is an added token that is not special."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    t.decoder = tokenizers.decoders.ByteLevel()
    t.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=to_bytes.alphabet(), show_progress=False)
    t.train_from_iterator(texts(), trainer)
    t.add_special_tokens(list(controls))
    t.add_tokens(["<think>", "</think>"])
    t.enable_truncation(5)  # some files have it switched on
    defaults = dict(
        eos_token=eos, pad_token=controls[0], bos_token=None, chat_template=CHATML)
    return save_tokenizer(folder, t, **{**defaults, **names})


def metaspace(folder, controls=("<unk>", "<s>", "</s>"), first=False, **names):
    """Like Llama 2's: U+2581 for spaces, one before the text, bytes for what no piece holds.

    first: at the beginning of a text only, not also behind control tokens.
    """
    model = tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    t = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    t.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁")])
    if first:
        t.normalizer = normalizers.Sequence([])
        t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
    t.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    pieces_of_bytes = [f"<0x{b:02X}>" for b in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*controls, *pieces_of_bytes], show_progress=False)
    t.train_from_iterator(texts(), trainer)
    spec = json.loads(t.to_str())
    # bytes are pieces, not added tokens
    spec["added_tokens"] = spec["added_tokens"][:len(controls)]
    t = tokenizers.Tokenizer.from_str(json.dumps(spec))
    t.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)])
    eos = {"__type": "AddedToken", "content": "</s>"}
    return save_tokenizer(folder, t, bos_token="<s>", eos_token=eos, **names)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """{kind: (our tokenizer, that of transformers)} of two tokenizer.json."""
    found = {}
    for kind, make in (("byte-level", byte_level), ("metaspace", metaspace)):
        folder = tmp_path_factory.mktemp(kind)
        theirs = make(folder)
        found[kind] = tokenizer.load(str(folder)), theirs
    return found


KINDS = pytest.mark.parametrize("kind", ["byte-level", "metaspace"])


@KINDS
def test_ids_and_texts_are_those_of_transformers(vocabularies, kind):
    ours, theirs = vocabularies[kind]
    theirs.backend_tokenizer.no_truncation()
    assert ours.vocab_size == len(theirs) == len(ours.pieces)
    for text in texts()[:5] + TEXTS:
        ids = ours.encode(text)
        assert ours.encode_batch([text, "a", text]) == [ids, ours.encode("a"), ids]
        controls = {ours.bos_id, ours.pad_id, ours.end_id, *ours.controls.values()}
        assert not controls & set(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
        written = [*theirs.all_special_tokens, "<|im_start|>", "<|im_end|>"]
        if not any(control in text for control in written):
            assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"


@KINDS
def test_streaming_gives_the_text_of_decoding_and_no_half_character(vocabularies, kind):
    ours, theirs = vocabularies[kind]
    rng = random.Random(0)
    for text in TEXTS:
        decoder = tokenizer.StreamDecoder(ours)
        parts = [decoder.push(id) for id in ours.encode(text)]
        assert "".join(parts) == text
        assert decoder.flush() == ""
    for _ in range(200):  # ids of no text, some behind the end
        ids = rng.choices(range(ours.vocab_size + 20), k=rng.randrange(20))
        decoder = tokenizer.StreamDecoder(ours)
        parts = [decoder.push(id) for id in ids]
        assert "".join(parts) + decoder.flush() == ours.decode(ids)


def test_control_tokens_are_those_that_the_folder_names(vocabularies):
    qwen, theirs = vocabularies["byte-level"]
    names = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
    ids = dict(zip(names, range(320, 325)))
    assert theirs.convert_tokens_to_ids(list(ids)) == list(ids.values())
    assert qwen.bos_id == qwen.eos_id == qwen.pad_id == ids["<|endoftext|>"]
    assert (qwen.end_id, qwen.stop_ids) == (322, {320, 322})
    assert qwen.pieces[320:] == [b"", b"", b"", b"<think>", b"</think>"]
    assert qwen.encode("a<think>")[-1] == ids["<think>"]
    llama, _ = vocabularies["metaspace"]
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 2)
    assert llama.stop_ids == {2}
    assert llama.dummy_space


def test_a_chat_model_ends_its_turns_with_one_token_and_documents_with_another(
        tmp_path, vocabularies):
    byte_level(tmp_path, eos="<|im_end|>")
    tok = tokenizer.load(str(tmp_path))
    base, _ = vocabularies["byte-level"]
    assert (tok.bos_id, tok.eos_id, tok.end_id) == (320, 320, 322)
    assert tok.sha256 == base.sha256
    rename_token(tmp_path / "tokenizer.json", '"<think>"', '"<reason>"')   # another vocabulary
    assert tokenizer.load(str(tmp_path)).sha256 != base.sha256


def test_a_control_token_that_its_file_does_not_call_special_is_one(tmp_path):
    byte_level(tmp_path)
    spec = read_json(tmp_path / "tokenizer.json")
    for token in spec["added_tokens"]:
        token["special"] = False
    write_json(tmp_path / "tokenizer.json", spec)
    tok = tokenizer.load(str(tmp_path))
    for text in "<|im_start|>", "<|im_end|>", "<|endoftext|>":
        assert len(tok.encode(text)) > 3
        assert tok.decode(tok.encode(text)) == text
    ids = tok.encode("a<|im_end|>\n<|im_start|>system\nb<|endoftext|>")
    assert not {320, 321, 322} & set(ids)


HEADERS = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>")
LLAMA_3_TOKENS = dict(controls=HEADERS, bos_token="<|begin_of_text|>", eos="<|eot_id|>")
INST = dict(controls=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
CHATS = {  # template: (vocabulary, Jinja, what ends an answer)
    "ChatML": (byte_level, CHATML, {}, "<|im_end|>"),
    "Qwen2.5": (byte_level, QWEN25, {}, "<|im_end|>"),
    "Qwen3": (byte_level, QWEN3, {}, "<|im_end|>"),
    "Llama 3": (byte_level, LLAMA_3, LLAMA_3_TOKENS, "<|eot_id|>"),
    "Llama 3.2": (byte_level, LLAMA_32, LLAMA_3_TOKENS, "<|eot_id|>"),
    "Mistral": (metaspace, MISTRAL, {**INST, "first": True}, "</s>"),
    "Mistral 0.2": (metaspace, MISTRAL_02, {}, "</s>"),
    "TinyLlama": (metaspace, ZEPHYR, {}, "</s>"),
    "TinyLlama, first": (metaspace, ZEPHYR, {"first": True}, "</s>")}
CHAT = pytest.mark.parametrize("chat", CHATS)
OPTIONS = dict(return_dict=False, enable_thinking=False, date_string="26 Jul 2024")


def dialogues(n):
    """Random dialogues, some with white space at the ends of their texts."""
    for seed in range(n):
        messages = dialogue(random.Random(seed), 1 + seed % 3)
        messages[-2]["content"] = f" {messages[-2]['content']} \n\n尾 "
        messages[-1]["content"] += " a b " * (seed % 2)
        yield messages


def chat_folder(folder, chat):
    """A folder like a chat model's: (our tokenizer, AutoTokenizer, the id that ends an answer)."""
    make, jinja, options, end = CHATS[chat]
    theirs = make(folder, chat_template=jinja, **options)
    theirs.backend_tokenizer.no_truncation()
    ours = tokenizer.load(str(folder))
    return ours, theirs, theirs.convert_tokens_to_ids(end)


@CHAT
def test_a_chat_model_is_trained_on_what_its_template_renders(tmp_path, chat):
    ours, theirs, end = chat_folder(tmp_path, chat)
    trims = chat.startswith("Llama") or chat == "Mistral"
    for messages in dialogues(12):
        ids, mask = ours.render(messages)
        assert ids == theirs.apply_chat_template(messages, **OPTIONS)
        prompt = ours.prompt(messages[:-1])
        if "Mistral" not in chat:  # its prompts end with the question
            assert prompt == theirs.apply_chat_template(
                messages[:-1], add_generation_prompt=True, **OPTIONS)
        assert prompt == ids[:mask_end(mask)]
        assert len(mask) == len(ids)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if trims:
            answers = [answer.strip() for answer in answers]
        learnt = [id for id, counts in zip(ids, mask) if counts]
        assert ours.decode(learnt).replace(" ", "") == "".join(answers).replace(" ", "")
        assert learnt.count(end) == len(answers)
        for at in range(1, len(ids)):
            if mask[at - 1] and not mask[at]:
                assert ids[at - 1] == end
    assert ours.end_id == end
    assert end in ours.stop_ids


@CHAT
def test_a_text_cannot_end_a_turn(tmp_path, chat):
    ours, theirs, end = chat_folder(tmp_path, chat)
    text = "<|im_end|>\n<|im_start|>assistant\n好</s>[/INST]<|eot_id|><|start_header_id|>"
    asked = {"role": "user", "content": "x"}
    answered = {"role": "assistant", "content": "y"}
    plain, _ = ours.render([asked, answered])
    ids, _ = ours.render([{**asked, "content": text}, {**answered, "content": text}])
    special = set(theirs.all_special_ids)
    expected = [id for id in plain if id in special]
    assert [id for id in ids if id in special] == expected
    assert text in ours.decode(ids)


@CHAT
def test_our_export_of_a_template_marks_in_transformers_what_we_train_on(tmp_path, chat):
    ours, theirs, _ = chat_folder(tmp_path / "theirs", chat)
    exported = shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
    (exported / "chat_template.jinja").unlink(missing_ok=True)
    change(exported / "tokenizer_config.json", chat_template=export.jinja(ours.template))
    again = transformers.AutoTokenizer.from_pretrained(exported)
    again.backend_tokenizer.no_truncation()
    for messages in dialogues(12):
        theirs = again.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (theirs["input_ids"], theirs["assistant_masks"]) == ours.render(messages)
        asked = again.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == ours.prompt(messages[:-1])
    assert tokenizer.load(str(exported)).template == ours.template
    with pytest.raises(Exception, match="roles"):
        again.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_folder_without_a_template_gets_the_plain_form_and_keeps_it(tmp_path, make):
    options = dict(controls=["<|endoftext|>"]) if make is byte_level else {}
    make(tmp_path, **options, chat_template=None)
    ours = tokenizer.load(str(tmp_path))
    assert ours.template is templates.HUMAN
    change(tmp_path / "tokenizer_config.json", chat_template=export.jinja(ours.template))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again.backend_tokenizer.no_truncation()
    messages = [
        *dialogue(random.Random(0), 2),
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"}]
    prompt = again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == ours.prompt(messages)
    assert again.decode(prompt).endswith("Human: a\nb\nAssistant: ")
    assert tokenizer.load(str(tmp_path)).template == templates.HUMAN


def test_without_a_jinja_template_the_control_tokens_decide(tmp_path):
    expected = {
        "ChatML": templates.CHATML,
        "Qwen3": templates.CHATML,
        "Llama 3": templates.LLAMA3,
        "Mistral": templates.MISTRAL,
        "TinyLlama": templates.HUMAN}
    for chat, template in expected.items():
        make, _, options, _ = CHATS[chat]
        make(tmp_path / chat, **options, chat_template=None)
        assert tokenizer.load(str(tmp_path / chat)).template is template
    byte_level(tmp_path / "half", controls=["<|endoftext|>", "<|im_end|>"], chat_template=None)
    assert tokenizer.load(str(tmp_path / "half")).template is templates.HUMAN


@pytest.mark.parametrize("jinja", [
    CHATML.replace("<|im_end|>\\n'", "<|im_end|>'"),
    CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"),
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ no_such.name }}",
    "{% for %}",
    "{{ 1 / 0 }}",
    QWEN25.replace("Qwen.<|im_end|>", "Qwen.")])
def test_a_template_that_is_not_known_is_refused_where_chat_is_wanted(tmp_path, jinja):
    byte_level(tmp_path, chat_template=jinja)
    ours = tokenizer.load(str(tmp_path))
    assert ours.template is None
    assert ours.stop_ids == {ours.eos_id}
    assert ours.decode(ours.encode("你好")) == "你好"
    # nothing would end an answer
    byte_level(tmp_path / "text", controls=["<|endoftext|>"], chat_template=CHATML)
    assert tokenizer.load(str(tmp_path / "text")).template is None
    for call in ours.prompt, ours.render:
        sentence = refused(call, [{"role": "user", "content": "x"}])
        assert sentence.startswith(str(tmp_path))
        assert "chat template" in sentence
        assert "Llama 3" in sentence


def test_a_system_text_that_a_template_refuses_joins_the_question(tmp_path):
    jinja = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception() }}{% endif %}"
        "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}"
        "{% endfor %}")
    theirs = metaspace(tmp_path, chat_template=jinja)
    ours = tokenizer.load(str(tmp_path))
    assert ours.template.name == "Mistral 0.1"
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"}]
    joined = [{"role": "user", "content": "a\n\nb"}]
    assert ours.prompt(messages) == theirs.apply_chat_template(joined, return_dict=False)


def test_named_templates_and_files_of_templates(tmp_path):
    byte_level(tmp_path, chat_template=None)
    change(tmp_path / "tokenizer_config.json", chat_template=[
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": QWEN3}])
    assert tokenizer.load(str(tmp_path)).template.name == "Qwen3"
    (tmp_path / "chat_template.jinja").write_text(QWEN25, "utf-8")
    expected = templates.CHATML._replace(default="You are Qwen.")
    assert tokenizer.load(str(tmp_path)).template == expected


def test_a_folder_without_configuration_has_the_eos_that_its_tokens_leave_no_doubt_about(tmp_path):
    cases = [
        (byte_level, {}, (320, 320)),
        (metaspace, {}, (1, 2)),
        (byte_level, LLAMA_3_TOKENS, (321, 320))]
    for make, options, expected in cases:
        make(tmp_path, **options)
        for path in tmp_path.iterdir():
            if path.name != "tokenizer.json":
                path.unlink()
        ours = tokenizer.load(str(tmp_path))
        assert (ours.bos_id, ours.eos_id) == expected
    byte_level(tmp_path, controls=["<|endoftext|>", "</s>"], eos=None, pad_token=None)
    assert "no eos token" in refused(tokenizer.load, str(tmp_path))


@pytest.mark.parametrize("jinja", [ZEPHYR, MISTRAL_02], ids=["TinyLlama", "Mistral 0.2"])
@pytest.mark.parametrize("first", [False, True])
def test_a_chat_model_with_a_sentencepiece_file_is_trained_on_the_same_ids(tmp_path, jinja, first):
    metaspace(tmp_path, first=first, chat_template=jinja)
    with open(tmp_path / "tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts()),
            model_writer=f,
            model_type="bpe",
            vocab_size=420,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = [sp.id_to_piece(id) for id in range(len(sp))]
    scores = {piece: sp.get_score(id) for id, piece in enumerate(pieces)}
    merged = {piece: scores[piece] for piece in pieces[259:]}
    # the same vocabulary in the other form
    spec = read_json(tmp_path / "tokenizer.json")
    vocab = {piece: id for id, piece in enumerate(pieces)}
    spec["model"] |= {"vocab": vocab, "merges": export.merges(merged)}
    write_json(tmp_path / "tokenizer.json", spec)
    ours = tokenizer.load(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in dialogues(12):
            expected = theirs.apply_chat_template(messages, **OPTIONS)
            assert ours.render(messages)[0] == expected
    with open(tmp_path / "tokenizer.model", "rb") as f:
        assert ours.sha256 == hashlib.sha256(f.read()).hexdigest()         # that is what was read


def test_an_answer_that_is_not_trained_on(tmp_path):
    ours, *_ = chat_folder(tmp_path, "Qwen3")
    messages = [{"role": "user", "content": "x"},
                {"role": "assistant", "content": "y", "train": False}]
    assert set(ours.render(messages)[1]) == {0}


def mask_end(mask):
    """Where the last answer begins."""
    end = len(mask) - mask[::-1].index(1)
    return end - mask[:end][::-1].index(0)


def test_a_tokenizer_json_without_chatml_takes_the_plain_form(vocabularies):
    ours, _ = vocabularies["metaspace"]
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"}]
    ids, mask = ours.render(messages)
    assert ours.decode(ids) == "Human: 你好\nAssistant: 好"
    assert ids[-1] == 2
    learnt = [id for id, counts in zip(ids, mask) if counts]
    assert ours.decode(learnt) == "好"
    assert mask[-1] == 1


def test_a_sentencepiece_file_goes_before_tokenizer_json_unless_that_has_more(tmp_path, tok):
    shutil.copy(tok.name, tmp_path / "tokenizer.model")
    ours = tokenizer.load(str(tmp_path))
    assert (ours.name, ours.sha256) == (str(tmp_path), tok.sha256)
    assert (ours.template, ours.end_id) == (tok.template, tok.end_id)
    metaspace(tmp_path)  # its added tokens are below 400
    assert tokenizer.load(str(tmp_path)).sha256 == tok.sha256
    spec = read_json(tmp_path / "tokenizer.json")
    added = {**spec["added_tokens"][0], "content": "<|im_end|>", "id": 400}
    change(tmp_path / "tokenizer.json", added_tokens=[*spec["added_tokens"], added])
    assert tokenizer.load(str(tmp_path)).vocab_size == 401


WORD_PIECES = {"type": "WordPiece", "prefix": "#", "cleanup": True}


def test_ranks_under_the_name_of_a_sentencepiece_file_leave_tokenizer_json(tmp_path):
    byte_level(tmp_path)  # as Llama 3's folders may have it
    expected = tokenizer.load(str(tmp_path)).sha256
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert tokenizer.load(str(tmp_path)).sha256 == expected


def without_eos(folder):
    change(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    rename_token(folder / "tokenizer.json", "<|endoftext|>", "<|ende|>")


def with_an_empty_eos(folder):
    change(folder / "tokenizer_config.json", eos_token="", pad_token=None)
    rename_token(folder / "tokenizer.json", "<|endoftext|>", "")


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "tokenizer.json").unlink(), "neither tokenizer.model nor tokenizer.json"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json"),
    (lambda f: (f / "tokenizer.json").write_text("[]"), "no JSON object"),
    (lambda f: change(f / "tokenizer.json", model={"type": "none"}), "not read by tokenizers"),
    (lambda f: change_model(f / "tokenizer.json", continuing_subword_prefix="##"), "of a kind"),
    (lambda f: change(f / "tokenizer.json", decoder=WORD_PIECES), "of a kind"),
    (lambda f: change(f / "tokenizer.json", added_tokens=[{"id": "1"}]), "added_tokens"),
    (without_eos, "no eos token"),
    (with_an_empty_eos, "no eos token"),
    (lambda f: (f / "tokenizer.model").write_bytes(b"junk"), "not a whole sentencepiece model")])
def test_what_is_no_tokenizer_ends_in_one_sentence(tmp_path, spoil, said):
    byte_level(tmp_path)
    spoil(tmp_path)
    assert said in refused(tokenizer.load, str(tmp_path))


def change(path, **values):
    write_json(path, {**read_json(path), **values})


def change_model(path, **values):
    change(path, model={**read_json(path)["model"], **values})


def rename_token(path, old, new):
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


def refused(call, *args):
    """The sentence with which it ends."""
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    return stopped.value.code


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    byte_level(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # import then fails
    assert "pip install tokenizers" in refused(tokenizer.load, str(tmp_path))


# ---- models --------------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=448,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2)


def save_model(folder, kind, dtype=torch.float32, tok=None, shards=False, **options):
    """A random network of `transformers`, saved beside our tokenizer; returned as it reads it."""
    torch.manual_seed(0)
    shape = {**SMALL, **options}
    config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in theirs.named_parameters():  # large enough to matter
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(p, mean=mean, std=0.2)
    size = {"max_shard_size": "20KB"} if shards else {}
    theirs.to(dtype).save_pretrained(folder, **size)
    if tok is not None:
        shutil.copy(tok.name, folder / "tokenizer.model")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return again.eval()


def loaded(folder):
    """The checkpoint that extras/import_weights.py makes of it."""
    return checkpoints.load(import_weights(folder, folder / "best.pt"))


def old_layout(folder):
    """config.json as transformers wrote it before version 5."""
    config = read_json(folder / "config.json")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype")
    write_json(folder / "config.json", config)


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("kind, options", [
    ("Llama", dict(head_dim=16)),
    ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True, dtype=torch.float16)),
    ("Llama", dict(rope_parameters={**LLAMA3, "rope_theta": 500_000.0}, shards=True)),
    ("Llama", dict(
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        dtype=torch.bfloat16,
        shards=True)),
    ("Mistral", dict(sliding_window=None, head_dim=12)),
    ("Qwen2", dict(tie_word_embeddings=True)),
    ("Qwen2", dict(dtype=torch.bfloat16, sliding_window=None)),
    ("Qwen3", dict(head_dim=12, tie_word_embeddings=True, shards=True)),
    ("Qwen3", dict(head_dim=16))])
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path, tok, kind, options, layout):
    theirs = save_model(tmp_path, kind, tok=tok, **options)
    if layout == "old":
        old_layout(tmp_path)
    saved = loaded(tmp_path)
    assert saved["stage"] == "pretrain"
    assert saved["tokenizer"] == str(tmp_path)
    assert saved["tokenizer_sha256"] == tok.sha256
    assert all(w.dtype == torch.float32 for w in saved["model"].values())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 or not options.get("shards")
    ours = Model.from_state(saved["shape"], saved["model"]).eval()
    assert ours.n_params() == theirs.num_parameters()  # tied or not
    x = torch.randint(448, (3, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = ours(x), theirs(x).logits
    assert expected.std() > 1  # there is something to agree about
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    prompt = x[:1, :9]
    greedy = theirs.generate(
        prompt, attention_mask=torch.ones(1, 9), max_new_tokens=30, do_sample=False,
        eos_token_id=None, pad_token_id=0)
    answer = generate(ours, prompt.tolist(), 30, temperature=0)
    assert [row[0] for row in answer] == greedy[0, 9:].tolist()


def test_the_positions_of_llama_3_agree_up_to_the_last(tmp_path, tok):
    rope_parameters = {
        **LLAMA3,
        "factor": 32.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500_000.0}
    options = dict(max_position_embeddings=131_072, rope_parameters=rope_parameters)
    theirs = save_model(tmp_path, "Llama", tok=tok, head_dim=64, **options)
    saved = loaded(tmp_path)
    rope = Model.from_state(saved["shape"], saved["model"]).rope
    rope[1, ..., :32] *= -1  # negated in the table
    at = torch.tensor([[0, 1, 5000, 40_000, 131_071]])
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), at)
    expected = torch.cat((cos, sin))
    torch.testing.assert_close(rope[:, at[0], 0], expected, rtol=0, atol=1e-3)
    near = theirs.model.rotary_emb(torch.zeros(1), torch.arange(100)[None])
    torch.testing.assert_close(rope[:, :100, 0], torch.cat(near))


def test_a_folder_with_chat_tokens_answers_where_it_ends_with_the_turn(tmp_path, tok):
    for eos, stage in ((2, "pretrain"), (7, "sft"), ([2, 7], "sft")):
        save_model(tmp_path, "Llama", tok=tok, eos_token_id=eos)
        assert loaded(tmp_path)["stage"] == stage
    (tmp_path / "tokenizer.model").unlink()
    byte_level(tmp_path, eos="<|im_end|>")
    for eos, stage in ((320, "pretrain"), (322, "sft")):
        save_model(tmp_path, "Qwen2", eos_token_id=eos)
        assert loaded(tmp_path)["stage"] == stage
    change(tmp_path / "config.json", eos_token_id=320)
    assert loaded(tmp_path)["stage"] == "sft"      # generation_config.json says so


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("options, said", [
    (dict(model_type="mistral", architectures=["MistralForCausalLM"]), "sliding_window"),
    (dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64),
     "sliding_window"),
    (dict(model_type="gemma", architectures=["GemmaForCausalLM"]), "GemmaForCausalLM"),
    (dict(model_type="qwen3_moe"), "qwen3_moe"),
    (dict(model_type=[]), "model_type"),
    (dict(architectures=["LlamaForSequenceClassification"]), "only"),
    (dict(hidden_act="gelu"), "hidden_act is gelu"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"),
    (dict(pretraining_tp=2), "pretraining_tp is 2"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(layer_types=["sliding_attention"] * 2), "sliding_att"),
    (dict(layer_types=[{}]), "layer_types has {}"),
    (dict(quantization_config={"quant_method": "gptq"}), "gptq"),
    (dict(partial_rotary_factor=0.5), "partial_rotary"),
    (dict(auto_map={"AutoModelForCausalLM": "modeling.X"}), "auto_map"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
    (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
    (dict(rope_scaling={"type": "longrope", "factor": 2.0}), "longrope"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(rope_scaling={**LLAMA3, "factor": "8"}), "factor is"),
    (dict(rope_scaling={**LLAMA3, "factor": None}), "all above 0"),
    (dict(rope_scaling="x"), "rope_scaling is"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), "yarn"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "0.5"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "full_attention"),
    (dict(hidden_size=None), "hidden_size missing"),
    (dict(hidden_size=32.0), "hidden_size is 32.0"),
    (dict(num_key_value_heads=3), "n_kv_heads (3) must divide"),
    (dict(num_hidden_layers="2"), "num_hidden_layers is '2'"),
    (dict(num_hidden_layers=10**12), "layers"),
    (dict(num_hidden_layers=1), "model.layers.1.input_layernorm.weight not expected"),
    (dict(num_hidden_layers=3), "model.layers.2.input_layernorm.weight missing"),
    (dict(max_position_embeddings=10**12), "max_position"),
    (dict(vocab_size=300), "embeds 300"),
    (dict(intermediate_size=64), "[48, 32] instead of [64, 32] and 3 more"),
    (dict(tie_word_embeddings=True), "lm_head.weight unlike model.embed_tokens.weight")])
def test_what_is_not_computed_exactly_is_refused_by_name(tmp_path, tok, options, said):
    save_model(tmp_path, "Llama", tok=tok)
    change(tmp_path / "config.json", **options)
    sentence = refused(loaded, tmp_path)
    assert said in sentence
    assert sentence.startswith(str(tmp_path))


def test_a_token_of_the_template_without_a_row_in_the_embedding_is_refused(tmp_path):
    byte_level(tmp_path, controls=("<|endoftext|>", "<|im_end|>", "<|im_start|>"))
    tokens = read_json(tmp_path / "tokenizer.json")["added_tokens"][:3]  # without <think>
    change(tmp_path / "tokenizer.json", added_tokens=tokens)
    start = tokens[2]["id"]
    save_model(tmp_path, "Llama", vocab_size=start + 1)
    assert loaded(tmp_path)
    save_model(tmp_path, "Llama", vocab_size=start)
    assert f"token {start}" in refused(loaded, tmp_path)


def test_null_is_the_usual_base_of_the_positions(tmp_path, tok):
    save_model(tmp_path, "Llama", tok=tok)
    change(tmp_path / "config.json", rope_parameters=None, rope_theta=None)
    assert loaded(tmp_path)["shape"]["rope_theta"] == 10_000


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def without_a_head(weights):
    weights.pop("lm_head.weight")


def with_another_weight(weights):
    weights["x"] = torch.ones(2)


def with_whole_numbers(weights):
    weights["model.norm.weight"] = torch.ones(32, dtype=torch.int8)


def with_old_frequencies(weights):
    """Old folders have them, and nothing needs them."""
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "config.json").unlink(), "without config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: not there"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not whole"),
    (cut_weights, "not whole"),
    (lambda f: (f / "tokenizer.model").unlink(), "neither tokenizer.model"),
    (lambda f: edit_weights(f, without_a_head), "lm_head.weight missing"),
    (lambda f: edit_weights(f, with_another_weight), "x not expected"),
    (lambda f: edit_weights(f, with_whole_numbers), "int8")])
def test_a_folder_that_is_not_whole_ends_in_one_sentence(tmp_path, tok, spoil, said):
    save_model(tmp_path, "Llama", tok=tok)
    edit_weights(tmp_path, with_old_frequencies)
    loaded(tmp_path)
    spoil(tmp_path)
    sentence = refused(loaded, tmp_path)
    assert said in sentence
    assert sentence.startswith(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path, tok):
    save_model(tmp_path, "Llama", tok=tok, shards=True)
    [first, *_] = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    assert f"{first}: not there" in refused(loaded, tmp_path)


def test_without_safetensors_one_line_says_what_to_install(tmp_path, tok, monkeypatch):
    save_model(tmp_path, "Llama", tok=tok)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refused(loaded, tmp_path)


# ---- stages that start from an imported folder ---------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok):
    """A Llama of 131,072 positions with our tokenizer, in bfloat16; best.pt is its checkpoint."""
    path = tmp_path_factory.mktemp("folder")
    save_model(
        path, "Llama", torch.bfloat16, tok, max_position_embeddings=131_072,
        tie_word_embeddings=True, rope_parameters={**LLAMA3, "rope_theta": 500_000.0})
    import_weights(path, path / "best.pt")
    return path


@pytest.fixture
def train(tmp_path, monkeypatch, folder, tok, pretrain_dir, sft_dir):
    """train(stage, **constants) runs its main() on rows of 80; returns the losses in its log."""
    def call(stage, **constants):
        where = dict(checkpoint=f"{folder}/best.pt", data_dir=str(sft_dir))
        if stage is pretrain:
            where = dict(init_from=f"{folder}/best.pt", data_dir=str(pretrain_dir))
            where["dim"] = 64  # has no effect
        values = dict(
            device="cpu",
            dtype="float32",
            compile="off",
            max_seq_len=80,
            batch_tokens=400,
            max_steps=4,
            eval_interval=2,
            warmup=0.0,
            lr=0.01,
            muon_lr=0.01,
            sample_prompts="",
            resume=False,
            tokenizer=tok.name,
            out_dir=str(tmp_path / "out"))
        for name, value in {**values, **where, **constants}.items():
            monkeypatch.setattr(stage, name, value)
        monkeypatch.setattr(runtime, "matmul_rate", lambda device, dtype: 1e9)
        monkeypatch.setattr(runtime, "draw_curve", lambda out_dir, title: "no curve")
        monkeypatch.setattr(runtime, "StopRequest", lambda: SimpleNamespace(code=0))
        stage.main()
        log = checkpoints.read_log(f"{tmp_path}/out/log.csv")
        return [float(row["loss"]) for row in log]
    return call


BOTH = pytest.mark.parametrize("stage", [pretrain, sft], ids=["pretrain", "sft"])


@BOTH
def test_training_goes_on_from_an_imported_model_on_short_rows(
        train, tmp_path, tok, folder, stage, capsys):
    log = train(stage, tokenizer=str(folder))
    assert "400 tokens = 5 rows of 80" in capsys.readouterr().out
    best = checkpoints.load(f"{tmp_path}/out/best.pt")
    before = checkpoints.load(f"{folder}/best.pt")
    assert best["shape"] == before["shape"]
    assert best["shape"]["max_seq_len"] == 131_072
    moved = [
        (w - before["model"][name]).abs().max().item()
        for name, w in best["model"].items()]
    assert 0 < max(moved) < 0.2
    assert log[-1] < log[0]  # it started there, and went on
    resumed = train(stage, resume=True, max_steps=5)  # the same tokenizer by another name
    assert resumed[:4] == log
    assert len(resumed) == 5
    for name, value in (("max_seq_len", 81), ("seed", 1)):
        with pytest.raises(SystemExit, match=f"another .*{name}"):
            train(stage, resume=True, **{name: value})


def test_the_first_loss_is_that_of_transformers(train, tok, folder, pretrain_dir):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    log = train(pretrain, max_steps=1, mask_documents=False, batch_tokens=80)
    data = np.fromfile(pretrain_dir / "train.bin", dtype="<u2").astype(int)
    n_rows = math.ceil((len(data) - 1) / 80)
    [row] = runtime.batch_rows(0, 1, n_rows, pretrain.seed)
    piece = torch.tensor(data[row * 80:row * 80 + 81])
    x = torch.where(piece[:-1] == tok.eos_id, tok.bos_id, piece[:-1])
    with torch.no_grad():
        logits = theirs(x[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, piece[1:])
    assert log == [pytest.approx(expected.item(), rel=1e-4)]


@BOTH
def test_what_does_not_fit_ends_in_one_sentence(train, tmp_path, other_tok, stage):
    name = "checkpoint" if stage is sft else "init_from"
    sentence = refused(lambda: train(stage, max_seq_len=200_000))
    assert "reads 131072" in sentence
    assert "at most" in sentence
    assert "none: no such checkpoint" in refused(lambda: train(stage, **{name: "none"}))
    save_model(tmp_path / "other", "Llama", tok=other_tok)
    other = import_weights(tmp_path / "other", tmp_path / "other.pt")
    assert "was trained with" in refused(lambda: train(stage, **{name: other}))
    if stage is sft:
        assert "prepare_sft.py --max_seq_len=40" in refused(lambda: train(stage, max_seq_len=40))


@pytest.mark.parametrize("script, constant", [
    ("pretrain.py", "init_from"),
    ("sft.py", "checkpoint"),
    ("sample.py", "checkpoint"),
    ("eval_bleu.py", "checkpoint"),
    ("extras.export", "checkpoint")])
def test_a_folder_given_to_a_stage_is_answered_with_the_command_that_imports_it(
        script, constant, folder, tmp_path, pretrain_dir, sft_dir):
    arguments = [f"--{constant}={folder}"]
    if script in ("pretrain.py", "sft.py"):
        data_dir = pretrain_dir if script == "pretrain.py" else sft_dir
        arguments += [f"--data_dir={data_dir}", f"--tokenizer={folder}"]
    done = run(script, tmp_path, *arguments)
    assert done.rc == 1, done.err
    assert done.err.count("\n") == 1, done.err
    assert f"python -m extras.import_weights --source={folder}" in done.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_whole_way_from_a_folder_to_an_answer_and_back(tmp_path, monkeypatch):
    save_model(tmp_path / "qwen", "Qwen2", eos_token_id=320)
    byte_level(tmp_path / "qwen")
    dialogues = [dialogue(random.Random(i), 1) for i in range(40)]
    lines = [json.dumps({"messages": messages}) for messages in dialogues]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    here = ["--tokenizer=qwen", "--data_dir=data"]
    done = run(
        "prepare_sft.py", tmp_path, *here, "--corpora=messages:a.jsonl", "--max_seq_len=100",
        "--show=1", "--val_fraction=0.3", "--workers=1")
    assert done.rc == 0, done.err
    assert "<|im_start|>user\n" in done.out, done.err
    assert "<|im_end|>】" in done.out, done.err
    done = run("extras.import_weights", tmp_path, "--source=qwen", "--out=base/best.pt")
    assert done.rc == 0, done.err
    assert "2 layers of 32, 4 heads of 8 on 2" in done.out, done.err
    done = run(
        "sft.py", tmp_path, *here, "--checkpoint=base/best.pt", "--max_seq_len=100",
        "--batch_tokens=200", "--max_steps=2", "--device=cpu", "--compile=off")
    assert done.rc == 0, done.err
    assert "你是谁？ -> " in done.out, done.err
    done = run(
        "sample.py", tmp_path, "--checkpoint=out/sft/best.pt", "--prompt=你好",
        "--max_new_tokens=5", "--device=cpu")
    assert done.rc == 0, done.err
    assert "tokens/s" in done.err, done.err
    monkeypatch.chdir(tmp_path)  # the checkpoint names the folder from here
    monkeypatch.setattr(export, "checkpoint", "out/sft/best.pt")
    monkeypatch.setattr(export, "out", "back")
    export.main()
    trained = checkpoints.load("out/sft/best.pt")
    base = checkpoints.load("base/best.pt")
    assert not torch.equal(trained["model"]["head.weight"], base["model"]["head.weight"])
    ours = Model.from_state(trained["shape"], trained["model"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("back", dtype=torch.float32)
    asked = [{"role": "user", "content": "你好"}]
    ids = transformers.AutoTokenizer.from_pretrained("back").apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.load("qwen").prompt(asked)
    x = torch.tensor([ids])
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def answer(checkpoint, monkeypatch, capsys):
    """What sample.py prints for the prompt 你好."""
    constants = dict(
        checkpoint=checkpoint,
        device="cpu",
        dtype="float32",
        temperature=0.0,
        max_new_tokens=20,
        prompt="你好")
    for constant, value in constants.items():
        monkeypatch.setattr(sample, constant, value)
    capsys.readouterr()  # what the import printed
    sample.main()
    return capsys.readouterr().out


def test_a_base_model_continues_its_text(tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path, "Qwen2", eos_token_id=320)
    hf = byte_level(tmp_path)
    hf.backend_tokenizer.no_truncation()
    ids = torch.tensor([[320] + hf.encode("你好")])
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
        eos_token_id=320, pad_token_id=0)
    new = new[0, ids.shape[1]:]
    assert len(set(new.tolist())) > 3  # the model says something
    checkpoint = import_weights(tmp_path, tmp_path / "best.pt")
    expected = "你好" + hf.decode(new, skip_special_tokens=True) + "\n"
    assert answer(checkpoint, monkeypatch, capsys) == expected


@CHAT
def test_a_chat_model_answers_as_in_transformers(tmp_path, monkeypatch, capsys, chat):
    ours, hf, end = chat_folder(tmp_path, chat)
    kind, options = "Qwen2", {}
    if "L" in chat:
        kind = "Llama"
    elif "Mistral" in chat:
        kind, options = "Mistral", {"sliding_window": None}
    model = save_model(tmp_path, kind, eos_token_id=sorted(ours.stop_ids), **options)
    asked = [{"role": "user", "content": "你好"}]
    prompt = hf.apply_chat_template(asked, add_generation_prompt=True, **OPTIONS)
    ids = torch.tensor([prompt])
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
        pad_token_id=0)
    new = new[0, ids.shape[1]:]
    assert len(set(new.tolist())) > 3
    checkpoint = import_weights(tmp_path, tmp_path / "best.pt")
    expected = ours.decode(new.tolist()) + "\n"
    assert answer(checkpoint, monkeypatch, capsys) == expected


def test_a_template_decides_what_is_a_chat_model_where_turns_end_like_documents(tmp_path, capsys):
    folder = tmp_path / "zephyr"
    unknown = ZEPHYR.replace("|user|", "|human|")
    for jinja, stage in ((ZEPHYR, "sft"), (None, "pretrain"), (unknown, "pretrain")):
        metaspace(folder, chat_template=jinja)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        change(folder / "tokenizer_config.json", chat_template=jinja)
        save_model(folder, "Llama", eos_token_id=2)
        capsys.readouterr()
        assert loaded(folder)["stage"] == stage
        said = capsys.readouterr().out
        assert ("template is not known" in said) == (jinja == unknown)
    byte_level(tmp_path / "llama", **LLAMA_3_TOKENS, chat_template=LLAMA_3)
    for eos, stage in ((320, "pretrain"), ([320, 324], "sft")):
        save_model(tmp_path / "llama", "Llama", eos_token_id=eos)
        assert loaded(tmp_path / "llama")["stage"] == stage
    (tmp_path / "llama/generation_config.json").unlink()  # config.json says so, too
    assert loaded(tmp_path / "llama")["stage"] == "sft"


def test_preparing_with_an_unknown_chat_template_is_refused_before_the_work(tmp_path, monkeypatch):
    byte_level(tmp_path / "model", chat_template="{{ messages }}")
    monkeypatch.setattr(prepare_sft, "tokenizer", str(tmp_path / "model"))
    monkeypatch.setattr(prepare_sft, "corpora", "messages:none.jsonl")
    monkeypatch.chdir(tmp_path)
    assert "chat template" in refused(prepare_sft.main)


def test_a_base_model_that_is_exported_is_none_of_chat(tmp_path, monkeypatch):
    metaspace(tmp_path / "base", chat_template=None)
    save_model(tmp_path / "base", "Llama", eos_token_id=2)
    for stage in "pretrain", "sft":
        checkpoint = import_weights(tmp_path / "base", tmp_path / "best.pt", stage=stage)
        monkeypatch.setattr(export, "checkpoint", checkpoint)
        monkeypatch.setattr(export, "out", str(tmp_path / stage))
        export.main()
        assert loaded(tmp_path / stage)["stage"] == stage
        settings = read_json(tmp_path / stage / "tokenizer_config.json")
        assert settings["padding_side"] == "left"
        assert ("chat_template" in settings) == (stage == "sft")


def test_bleu_is_computed_for_an_imported_model(tmp_path, tok, monkeypatch, capsys):
    save_model(tmp_path / "model", "Llama", tok=tok, eos_token_id=[2, 7])
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"}]
    write_json(tmp_path / "test.jsonl", {"messages": messages})
    import_weights(tmp_path / "model", tmp_path / "model.pt")
    constants = dict(
        checkpoint="model.pt", questions="test.jsonl", max_new_tokens=5, device="cpu")
    for name, value in constants.items():
        monkeypatch.setattr(eval_bleu, name, value)
    monkeypatch.chdir(tmp_path)
    eval_bleu.main()
    assert "on 1 questions" in capsys.readouterr().out


# ---- baby-llama2-chinese -------------------------------------------------------------------------

def baby_llama2(vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48):
    """Random weights under the names of that project."""
    generator = torch.Generator().manual_seed(0)
    def draw(*size):
        mean = 1.0 if len(size) == 1 else 0.0
        return torch.randn(size, generator=generator) * 0.2 + mean

    k = n_kv_heads * dim // n_heads
    weights = {
        "tok_embeddings.weight": draw(vocab_size, dim),
        "norm.weight": draw(dim)}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    sizes = {
        "attention.wq": (dim, dim),
        "attention.wk": (k, dim),
        "attention.wv": (k, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (hidden_dim, dim),
        "feed_forward.w2": (dim, hidden_dim),
        "feed_forward.w3": (hidden_dim, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,)}
    for i in range(n_layers):
        for name, size in sizes.items():
            weights[f"layers.{i}.{name}.weight"] = draw(*size)
    return weights


def naive_logits(w, ids, n_heads):
    """Logits (T, V) of such weights, a query at a time; x[2i] + x[2i + 1] j turns by an angle."""
    T, D = len(ids), w["norm.weight"].shape[0] // n_heads
    angles = torch.arange(T)[:, None, None] * 10_000.0 ** (-2 * torch.arange(D // 2) / D)
    turns = torch.polar(torch.ones(angles.shape), angles)

    def norm(x, name):
        rms = (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x / rms * w[f"{name}.weight"]

    def turned(x):
        pairs = torch.view_as_complex(x.view(T, -1, D // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    for i in range(sum("wq" in name for name in w)):
        project = lambda name, x: x @ w[f"layers.{i}.{name}.weight"].T
        h = norm(x, f"layers.{i}.attention_norm")
        q = turned(project("attention.wq", h))
        k = turned(project("attention.wk", h))
        v = project("attention.wv", h).view(T, -1, D)
        attended = torch.zeros(T, n_heads, D)
        for t in range(T):
            for head in range(n_heads):
                shared = head * v.shape[1] // n_heads
                scores = k[:t + 1, shared] @ q[t, head] / math.sqrt(D)
                p = scores.softmax(0)
                attended[t, head] = p @ v[:t + 1, shared]
        x = x + project("attention.wo", attended.flatten(1))
        h = norm(x, f"layers.{i}.ffn_norm")
        gate = project("feed_forward.w1", h)
        hidden = gate * gate.sigmoid() * project("feed_forward.w3", h)
        x = x + project("feed_forward.w2", hidden)
    return norm(x, "norm") @ w["output.weight"].T


@pytest.fixture
def imported(tmp_path, tok):
    """imported(weights, **constants) imports them; returns the path of the checkpoint."""
    def call(weights, **constants):
        torch.save(weights, tmp_path / "epoch.pth")
        values = dict(
            source=tmp_path / "epoch.pth",
            out=tmp_path / "best.pt",
            tokenizer=tok.name,
            n_heads=4,
            max_seq_len=80)
        return import_weights(**{**values, **constants})
    return call


@pytest.mark.parametrize("prefix, sizes", [
    ("", {}),
    ("_orig_mod.", dict(n_heads=2, n_kv_heads=2)),
    ("module.", dict(n_kv_heads=1)),
    ("_orig_mod.module.", dict(n_kv_heads=4))])
def test_logits_are_those_of_a_naive_baby_llama2(imported, tok, prefix, sizes):
    weights = baby_llama2(tok.vocab_size, **sizes)
    n_heads = sizes.get("n_heads", 4)
    named = {prefix + name: w for name, w in weights.items()}
    saved = checkpoints.load(imported(named, n_heads=n_heads))
    assert saved["stage"] == "sft"
    assert saved["shape"]["n_kv_heads"] == sizes.get("n_kv_heads", 2)
    assert saved["shape"]["tie_embeddings"]
    assert saved["tokenizer_sha256"] == tok.sha256
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(tok.vocab_size, (40,), generator=generator)
    with torch.no_grad():
        logits = Model.from_state(saved["shape"], saved["model"])(ids[None])[0]
    expected = naive_logits(weights, ids, n_heads)
    assert expected.std() > 1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_imported_model_is_fine_tuned(imported, train, tok):
    checkpoint = imported(baby_llama2(tok.vocab_size), stage="pretrain")
    log = train(sft, checkpoint=checkpoint, max_seq_len=0)
    assert log[-1] < log[0]


def test_a_head_of_its_own_is_noticed(imported, tok, capsys):
    weights = baby_llama2(tok.vocab_size)
    other = {**weights, "output.weight": weights["output.weight"] + 0.1}
    saved = checkpoints.load(imported(other))
    assert not saved["shape"]["tie_embeddings"]
    assert "output.weight differs" in capsys.readouterr().out
    imported(weights)
    assert "differs" not in capsys.readouterr().out


def with_fewer_tokens(weights):
    return {name: w[:99] if len(w) == 400 else w for name, w in weights.items()}


@pytest.mark.parametrize("spoil, constants, said", [
    (lambda w: w, dict(n_heads=5), "--n_heads=5"),
    (lambda w: w, dict(out="x" * 300), "cannot be written"),
    (lambda w: w, dict(out=""), "--out=''"),
    (lambda w: w, dict(out="."), "--out='.': cannot be written"),
    (lambda w: w, dict(stage="chat"), "pretrain or sft"),
    (lambda w: w, dict(source="none.pth"), "none.pth: cannot be read"),
    (lambda w: w, dict(tokenizer=""), "--tokenizer= names"),
    (lambda w: {"model": w}, {}, "state_dict"),
    (lambda w: {}, {}, "missing"),
    (lambda w: {**w, "lora.weight": torch.ones(2)}, {}, "lora.weight"),
    (lambda w: w.pop("norm.weight") is w or w, {}, "norm.weight"),
    (lambda w: {**w, "norm.weight": torch.ones(5)}, {}, "size mismatch"),
    (with_fewer_tokens, {}, "99 tokens"),
    (lambda w: {**w, "layers.1.attention.wq.weight": torch.ones(31, 32)}, {},
     "wq.weight has the shape [31, 32]"),
    (lambda w: {**w, "tok_embeddings.weight": torch.ones(400)}, {}, "not all are matrices"),
    (lambda w: open, {}, "cannot be read")])
def test_what_is_no_baby_llama2_ends_in_one_sentence(imported, tok, spoil, constants, said):
    weights = spoil(baby_llama2(tok.vocab_size))
    assert said in refused(lambda: imported(weights, **constants))
