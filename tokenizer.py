"""Text <-> token ids, and dialogues with their loss mask. No tensors and no training in here.

`load(name)` takes five kinds of vocabulary and gives back the same few methods for each:

    data/tokenizer.model  sentencepiece, made by train_tokenizer.py: a control token for every role
                          and for the end of a turn, identity normalisation, byte fallback, so that
                          decode(encode(text)) == text
    other *.model         any other sentencepiece file, such as ChatGLM2's: known by its content
    gpt2, cl100k_base     a tiktoken encoding by its name; tiktoken downloads it at the first use
    *.tiktoken            a local file of such ranks, one "base64(bytes) rank" per line, split as
                          GPT-2 splits
    a folder              of Hugging Face: its tokenizer.model (sentencepiece) or, through
                          `tokenizers`, tokenizer.json

A dialogue becomes one of these, by the table in templates.py:

    <s><|user|>你好<|end|><|assistant|>你好！<|end|>        our own models
    你好<bos>你好！<eos>                                    other sentencepiece files
    Human: 你好\nAssistant: 你好！<eos>                     tiktoken, and any other tokenizer.json
    <|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n你好！<|im_end|>\n
                                                           folders that have a chat template or its
                                                           control tokens: in their way

What users and data say is encoded as plain text: no string, not even "<|end|>", turns into a
control token.
"""
import base64
import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import templates

CONTROLS = list(templates.OURS.marks)               # ids 4 to 7 of our own models
SPACE = "\u2581"                                    # sentencepiece writes a space as this character
# How GPT-2 cuts a text into words before it merges bytes. Source: openai/gpt-2, src/encoder.py.
GPT2_SPLIT = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
              r"|\s+(?!\S)|\s+")
# {character: byte} of byte-level vocabularies, which write a space as Ġ. Source: the same file.
SHOWN = [byte for byte in range(33, 256) if chr(byte).isprintable()]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTE_OF = {chr(byte): byte for byte in SHOWN}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}
# The end of a document, by its name in Qwen's and GPT-2's, Llama 3's and Llama 2's vocabularies.
DOCUMENT_ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>"]
DOCUMENT_STARTS = ["<|begin_of_text|>", "<s>"]
OTHER_KIND = ("{}/tokenizer.json: of a kind that is not read here, neither byte-level nor with "
              "U+2581 for spaces")
MARKS = {mark for template in templates.TEMPLATES for mark in template.marks}


def load(name):
    """The Tokenizer that a file name or a tiktoken encoding name stands for.

    Raises SystemExit with one sentence if the file is missing or broken, or the encoding cannot be
    had.
    """
    if os.path.isdir(name):
        return from_folder(name)
    if name.endswith(".tiktoken"):
        return from_tiktoken(name, rank_file(name))
    if name.endswith(".model") or os.path.exists(name):
        return from_sentencepiece(name)
    return from_tiktoken(name, named_encoding(name))


@dataclass(eq=False, repr=False)
class Tokenizer:
    """A vocabulary: what load() gives, whatever it was read from."""
    name: str               # as given to load(); a worker process loads its own by this name
    sha256: str             # hex digest of the vocabulary: the same ids, the same digest
    pieces: list            # the UTF-8 of each id, b"" for control tokens
    controls: dict          # {text: id} of the control tokens
    bos_id: int
    eos_id: int
    pad_id: int
    encoder: Callable       # list of str -> list of lists of ids, on one core
    template: templates.Template        # None: the folder has a chat template that is not known
    dummy_space: str = ""   # where encoding puts a space that the text does not have: "always"
                            # before text, also behind a control token; "first" at the very
                            # beginning only; "" nowhere

    def __post_init__(self):
        self.vocab_size = len(self.pieces)      # all ids are below it
        ids = {**self.controls, "{bos}": self.bos_id, "{eos}": self.eos_id}
        forms = "".join(map(str, self.template or ""))
        self._ids = {text: id for text, id in ids.items() if text in forms}
        self._in_forms = re.compile(f"({'|'.join(map(re.escape, ['{}', *self._ids]))})")
        self.end_id = self.eos_id               # what ends an answer
        if self.template:
            self.end_id = ids[self._in_forms.findall(self.template.answer)[-1]]
        self.stop_ids = {self.eos_id, self.end_id}

    @property
    def id_dtype(self):
        """The numpy type of ids in bins: two bytes where all ids fit, else four."""
        return "uint16" if self.vocab_size <= 65_536 else "uint32"

    def encode(self, text):
        """The ids of a text, without bos or eos; never a control token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """A list of ids for each text. One core: whoever wants more starts more processes."""
        return self.encoder([whole_characters(text) for text in texts])

    def piece(self, id):
        """The bytes of an id; none beyond the vocabulary, where a model may have unused rows."""
        return self.pieces[id] if id < self.vocab_size else b""

    def decode(self, ids):
        """The text of the ids. Control tokens vanish; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(map(self.piece, ids))
        if self.dummy_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def render(self, messages):
        """A whole dialogue for fine-tuning: (ids, mask), two lists of the same length.

        mask is 1 on the content of every assistant turn and on the token that ends it, and 0 on
        everything else; a message {"train": False} is not trained on.
        It belongs to the token as target: the loss of predicting ids[i] counts where mask[i] is 1.
        Raises SystemExit if the template is not known.
        """
        ids, mask = [], []
        for part, counts in self._parts(messages):
            ids += part
            mask += [int(counts)] * len(part)
        return ids, mask

    def prompt(self, messages):
        """The ids to generate an answer from: the dialogue, then the header of the answer.

        render(messages + [answer]) begins with them. Raises SystemExit as render() does.
        """
        return [id for part, _ in self._parts(messages, ask=True) for id in part]

    def _parts(self, messages, ask=False):
        """Yield (ids, whether the loss counts on them): the pieces of a dialogue in order.

        All text between two control tokens is encoded at once, as `transformers` does, except that
        an answer begins with an id of its own: generation starts there.
        """
        if self.template is None:
            known = ", ".join(template.name for template in templates.TEMPLATES)
            raise SystemExit(
                f"{self.name}: its chat template is none of those known here ({known}), so it can "
                "continue texts, but not chat; to fine-tune it in the form `Human: ... Assistant: "
                "...`, delete chat_template.jinja, or chat_template in tokenizer_config.json")
        run, continues = "", False
        for form, text, counts in self.template.written(messages, ask):
            ids = []
            if form == self.template.answer and run:
                yield self._encode_run(run, continues), False
                run, continues = "", True
            for piece in self._in_forms.split(form):
                if piece in self._ids:
                    ids += [*self._encode_run(run, continues), self._ids[piece]]
                    run, continues = "", self.dummy_space == "first"
                else:
                    run += text if piece == "{}" else piece
            yield ids, counts
        yield self._encode_run(run, continues), False

    def _encode_run(self, text, continues):
        """The ids of text between control tokens; without a dummy space if it continues another."""
        if continues and self.dummy_space:
            other = "\ue000"                    # for private use, so that no piece holds it
            return self.encode(other + text)[len(self.encode(other)):]
        return self.encode(text) if text else []


class StreamDecoder:
    """Decodes one id at a time. All push() and flush() together give the characters of decode().

    Bytes that are only part of a character wait for the rest. To continue a text, push its ids
    first.
    """

    def __init__(self, tokenizer):
        self.piece, self.at_start = tokenizer.piece, tokenizer.dummy_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id):
        """The characters that this id completes: "" for part of one, and for control tokens."""
        data = self.piece(id)
        if self.at_start and data:
            data, self.at_start = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self):
        """What is left at the end: "", or U+FFFD if the last character is not whole."""
        return self.utf8.decode(b"", final=True)


def whole_characters(text):
    """The text with every lone surrogate, which stands for no character, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# ---- sentencepiece ------------------------------------------------------------------------------

def from_sentencepiece(path, folder="", spec=None):
    """Read a sentencepiece file: one with our control tokens, or a plain one such as ChatGLM2's.

    folder: the Hugging Face folder that holds it, which may have a chat template; spec: what its
    tokenizer.json holds.
    """
    import sentencepiece
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; `python train_tokenizer.py` makes a tokenizer "
                         "(--tokenizer=gpt2 takes a ready one)") from None
    sp = sentencepiece.SentencePieceProcessor()
    names = []
    with suppress(RuntimeError, ValueError):                   # also a piece that is no UTF-8
        sp.LoadFromSerializedProto(data)
        names = [sp.id_to_piece(id) for id in range(sp.vocab_size())]
    if not names or sp.eos_id() < 0:
        raise SystemExit(f"{path}: not a whole sentencepiece model with an eos token ({len(data)} "
                         "bytes); make it again with `python train_tokenizer.py`")
    pieces = [piece_bytes(sp, id, name) for id, name in enumerate(names)]
    controls = {name: id for id, name in enumerate(names) if sp.is_control(id)}
    eos_id = sp.eos_id()
    bos_id = sp.bos_id() if sp.bos_id() >= 0 else eos_id
    tokens = {"bos": names[bos_id], "eos": names[eos_id]}
    jinja = chat_template(folder) if folder else ""
    template = templates.find(controls, tokens, jinja, templates.QUESTION)
    encode_batch = partial(sp.encode, num_threads=1)
    dummy_space = ""
    if template is templates.OURS and "<0x00>" in names:
        encode_batch = exact_encoder(sp, names)
    elif names[sp.encode("a")[0]].startswith(SPACE):
        dummy_space = dummy_space_of(spec or {})
    if len(names) == 64_789:
        pieces += [b""] * 4                     # ChatGLM2 has [MASK], [gMASK], [sMASK], sop on top
    return Tokenizer(
        folder or path, hashlib.sha256(data).hexdigest(), pieces, controls, bos_id, eos_id,
        max(sp.pad_id(), 0), encode_batch, template, dummy_space)


def exact_encoder(sp, names):
    """The encode_batch of our own models, which loses nothing.

    sentencepiece cannot tell U+2581 from a space, and cannot write a space that its training text
    did not have: both are spelled in bytes.
    """
    spelled = {SPACE: [names.index(f"<0x{byte:02X}>") for byte in SPACE.encode()]}
    if SPACE not in names:
        spelled[" "] = [names.index("<0x20>")]
    special = re.compile(f"([{''.join(spelled)}])")

    def encode_batch(texts):
        batch = sp.encode(texts, num_threads=1)
        for i, text in enumerate(texts):
            if special.search(text):
                parts = special.split(text)
                batch[i] = [id for part in parts for id in spelled.get(part) or sp.encode(part)]
        return batch
    return encode_batch


def piece_bytes(sp, id, name):
    """The UTF-8 that a sentencepiece id stands for; b"" for control, unknown and unused ids."""
    if sp.is_control(id) or sp.is_unknown(id) or sp.is_unused(id):
        return b""
    return bytes_of(name)


def bytes_of(name):
    """The UTF-8 of a piece's name, in which <0x0A> stands for a byte and U+2581 for a space."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace(SPACE, " ").encode("utf-8")


# ---- tiktoken -----------------------------------------------------------------------------------

def from_tiktoken(name, encoding):
    """A tiktoken encoding; its <|endoftext|> is bos, eos and pad at once, as in GPT-2."""
    pieces = [b""] * encoding.n_vocab           # some encodings leave ids unused
    for piece in encoding.token_byte_values():
        pieces[encoding.encode_single_token(piece)] = piece
    ranks = (b"%s %d\n" % (base64.b64encode(piece), id) for id, piece in enumerate(pieces) if piece)
    end = encoding.eot_token

    def encode_batch(texts):                    # "<|endoftext|>" is text like any other
        return [encoding.encode_ordinary(text) for text in texts]

    return Tokenizer(name, hashlib.sha256(b"".join(ranks)).hexdigest(), pieces,
                     {"<|endoftext|>": end}, end, end, end, encode_batch, templates.HUMAN)


def named_encoding(name):
    """The tiktoken encoding of that name; SystemExit if there is none, or it cannot be fetched."""
    import tiktoken
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise SystemExit(f"{name or 'an empty name'}: neither a file (*.model, *.tiktoken) nor a "
                         f"tiktoken encoding ({', '.join(known)})")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: tiktoken could not fetch its vocabulary "
                         f"({type(error).__name__}); it needs the network once: try again online, "
                         f"or give a local {name}.tiktoken") from None


def rank_file(path):
    """The tiktoken encoding of a local rank file; SystemExit if it is not whole."""
    import tiktoken
    try:
        with open(path, "rb") as f:
            rows = [line.split() for line in f if line.strip()]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; --tokenizer=gpt2 downloads GPT-2's") from None
    except ValueError:
        ranks = {}
    is_whole = ranks.keys() >= {bytes([byte]) for byte in range(256)}
    if not is_whole or sorted(ranks.values()) != list(range(len(ranks))):
        raise SystemExit(f"{path}: not a whole rank file, which holds one `base64(bytes) rank` per "
                         "line, every single byte and every rank from 0; download the file again")
    return tiktoken.Encoding(os.path.basename(path), pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


# ---- Hugging Face folders -----------------------------------------------------------------------

def from_folder(folder):
    """The tokenizer of a Hugging Face folder.

    It is read from tokenizer.model where that has all of the folder's tokens, else from
    tokenizer.json.
    """
    spec = read_json(f"{folder}/tokenizer.json")
    added = added_tokens(folder, spec)
    path = f"{folder}/tokenizer.model"
    if os.path.exists(path) and not (spec and is_rank_file(path)):         # as Llama 3's is
        tok = from_sentencepiece(path, folder, spec)
        if all(token["id"] < tok.vocab_size for token in added.values()):
            return tok
    if not spec:
        raise SystemExit(f"{folder}: neither tokenizer.model nor tokenizer.json is there; name a "
                         "folder that has one")
    return from_tokenizer_json(folder, spec, added)


def is_rank_file(path):
    """Whether a file begins like tiktoken's: a piece in base64, and its rank."""
    return re.match(rb"[\w+/]+=* \d+\n", Path(path).read_bytes())


def from_tokenizer_json(folder, spec, added):
    """Read a tokenizer.json: byte-level, as Qwen's, or with U+2581 for spaces, as Llama 2's.

    The tokens that the folder names as bos, eos and pad, and those of chat templates, are control
    tokens whatever the file calls them. Its other special tokens are, too; added tokens that are
    not special are text, as in `transformers`.
    """
    bos, eos, pad = named_tokens(folder, added)
    if eos is None:
        raise SystemExit(f"{folder}: its tokenizer_config.json and config.json name no eos token "
                         "of tokenizer.json")
    tokens = {"bos": bos or "", "eos": eos}
    template = templates.find(added, tokens, chat_template(folder), templates.HUMAN)
    if template and template.answer.endswith("{}" + eos):      # it ends a turn, but not a document
        eos = next((name for name in DOCUMENT_ENDS if name in added), eos)
    for name in {bos, eos, pad, *MARKS} & added.keys():
        added[name]["special"] = True
    backend = backend_of(folder, spec)

    def encode_batch(texts):                    # the backend's own would take all cores
        return [backend.encode(text, add_special_tokens=False).ids for text in texts]

    vocabulary = backend.get_vocab()
    controls = {name: vocabulary[name] for name, token in added.items() if token["special"]}
    byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, id in vocabulary.items():
        if piece not in controls:
            as_it_is = piece in added
            pieces[id] = piece.encode("utf-8") if as_it_is else json_piece_bytes(piece, byte_level)
    bos_id, eos_id, pad_id = (controls[name or eos] for name in (bos, eos, pad))
    content = [spec.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    digest = hashlib.sha256(json.dumps([*content, bos_id, eos_id], sort_keys=True).encode())
    first = encode_batch(["a"])[0]
    has_dummy = b"".join(pieces[id] for id in first)[:1] == b" " and backend.decode(first) == "a"
    tok = Tokenizer(folder, digest.hexdigest(), pieces, controls, bos_id, eos_id, pad_id,
                    encode_batch, template, dummy_space_of(spec) if has_dummy else "")
    probe = tok.encode("Hello, 你好 é  x\n\n 1234 😀")
    if tok.decode(probe) != backend.decode(probe):
        raise SystemExit(OTHER_KIND.format(folder))
    return tok


def backend_of(folder, spec):
    """The `tokenizers` object of a tokenizer.json; control tokens in a text are text to it."""
    try:
        import tokenizers
    except ImportError:
        raise SystemExit(f"{folder}/tokenizer.json: pip install tokenizers to read it") from None
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("continuing_subword_prefix"):
        raise SystemExit(OTHER_KIND.format(folder))            # tokenizers would abort on such BPE
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:                  # tokenizers raises nothing more precise
        raise SystemExit(f"{folder}/tokenizer.json: not read by tokenizers "
                         f"{tokenizers.__version__} ({error})") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def dummy_space_of(spec):
    """Where a tokenizer.json that puts spaces before texts does so; without one, everywhere."""
    return "first" if '"first"' in json.dumps(spec.get("pre_tokenizer")) else "always"


def added_tokens(folder, spec):
    """{text: entry} of the added tokens of a tokenizer.json; SystemExit if they are none."""
    entries = spec.get("added_tokens", [])
    try:
        return {token["content"] + "": token for token in entries
                if token["content"] and token["id"] >= 0}
    except (TypeError, KeyError):
        raise SystemExit(f"{folder}/tokenizer.json: its added_tokens are damaged; download it "
                         "again") from None


def named_tokens(folder, added):
    """The texts of the bos, eos and pad token that the files of a folder name, each None if none.

    If no file names an eos, those that other vocabularies use are taken where just one is there.
    """
    bos, eos, pad = (named_token(folder, kind, added) for kind in ("bos", "eos", "pad"))
    ends = [name for name in DOCUMENT_ENDS if name in added]
    if eos is None and len(ends) == 1:
        return next((name for name in DOCUMENT_STARTS if name in added), bos), ends[0], pad
    return bos, eos, pad


def named_token(folder, kind, added):
    """The text of the bos, eos or pad token that a folder names; None if it is none of `added`."""
    for file in "tokenizer_config.json", "special_tokens_map.json":
        token = read_json(f"{folder}/{file}").get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in added:
            return token
    ids = read_json(f"{folder}/config.json").get(f"{kind}_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return next((name for name, token in added.items() if token["id"] in ids), None)


def chat_template(folder):
    """The Jinja source of a folder's chat template, "" if it has none."""
    path = Path(folder, "chat_template.jinja")
    if path.exists():
        return path.read_text("utf-8", "replace")
    found = read_json(f"{folder}/tokenizer_config.json").get("chat_template")
    for entry in found if isinstance(found, list) else []:     # several with names
        if isinstance(entry, dict) and entry.get("name") == "default":
            found = entry.get("template")
    return found if isinstance(found, str) else ""


def json_piece_bytes(piece, byte_level):
    """The UTF-8 that a piece of a tokenizer.json stands for."""
    if byte_level and set(piece) <= BYTE_OF.keys():
        return bytes(BYTE_OF[character] for character in piece)
    return bytes_of(piece)


def read_json(path):
    """The object of a JSON file, {} where there is no such file; SystemExit if it is not whole."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{path}: holds no JSON object; download it again")
    return content
