"""Text <-> token ids, and the chat template with its loss mask. No tensors and no training in here.

`load(name)` takes five kinds of vocabulary and gives back the same few methods for each:

    data/tokenizer.model  sentencepiece, made by train_tokenizer.py: a control token for every role and for the end
                          of a turn, identity normalisation, byte fallback, so decode(encode(text)) == text
    other *.model         any other sentencepiece file, for example ChatGLM2's: recognised by its content
    gpt2, cl100k_base     a tiktoken encoding by its name; tiktoken downloads the ranks at the first use
    *.tiktoken            a local file of such ranks, one "base64(bytes) rank" per line, split as GPT-2 splits
    a folder              of Hugging Face: its tokenizer.model (sentencepiece) or, through `tokenizers`, tokenizer.json

A dialogue is a list of {"role": "system" | "user" | "assistant", "content": str} and becomes one of

    <s><|user|>你好<|end|><|assistant|>你好！<|end|>        our own models
    你好<bos>你好！<eos>                                    other sentencepiece files, as baby-llama2-chinese writes it
    Human: 你好\nAssistant: 你好！<eos>                     tiktoken, and any other tokenizer.json
    <|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n你好！<|im_end|>       those that have both (Qwen)

What users and data say is encoded as plain text: no string, not even "<|end|>", turns into a control token.
"""
import base64
import codecs
import hashlib
import json
import os
import re

CONTROLS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]   # ids 4 to 7 of our own models
CHATML = ["<|im_start|>", "<|im_end|>"]                             # around every turn in Qwen's vocabularies, for one
SPACE = "\u2581"                                                    # sentencepiece writes a space as this character
# How GPT-2 cuts a text into words before it merges bytes. Source: openai/gpt-2, src/encoder.py.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def load(name):
    """The Tokenizer that a file name or a tiktoken encoding name stands for.

    Raises SystemExit with one sentence if the file is missing or broken, or the encoding cannot be had.
    """
    if os.path.isdir(name):
        return from_folder(name)
    if name.endswith(".tiktoken"):
        return from_tiktoken(name, rank_file(name))
    if name.endswith(".model") or os.path.exists(name):
        return from_sentencepiece(name)
    return from_tiktoken(name, named_encoding(name))


class Tokenizer:
    """A vocabulary: what load() gives, whatever it was read from. A worker process loads its own by name.

    name         as given to load()
    sha256       hex digest of the file, or of the ranks of a tiktoken encoding: the same ids, the same digest
    vocab_size   number of ids: all of them are below it
    pieces       list of vocab_size bytes: the UTF-8 that each id stands for, b"" for control tokens
    bos_id, eos_id, pad_id
    roles        {role: id}, the control tokens of our own models; None where a vocabulary has none
    end_id       the control token behind every turn, in our own models and in ChatML; None where there is none
    start_id     that before every turn in ChatML, else None
    turn         the text before and after a user's turn and the ids behind it, where there are no such tokens
    stop_ids     set of the ids that end an assistant's turn; eos_id is one of them
    """

    def __init__(self, name, sha256, pieces, bos_id, eos_id, pad_id, encode_batch, roles=None, end_id=None,
                 start_id=None, turn=None, dummy_space=False):
        self.name, self.sha256, self.pieces, self.vocab_size = name, sha256, pieces, len(pieces)
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.roles, self.end_id, self.start_id, self.turn = roles, end_id, start_id, turn
        self.stop_ids = {eos_id} if end_id is None else {eos_id, end_id}
        self.dummy_space = dummy_space          # sentencepiece put a space before the text: decode takes it away
        self._encode_batch = encode_batch       # list of str -> list of lists of ids, on one core

    @property
    def id_dtype(self):
        """The numpy type of ids in bins: two bytes where all ids fit, else four."""
        return "uint16" if self.vocab_size <= 65_536 else "uint32"

    def encode(self, text):
        """The ids of a text, without bos or eos; never a control token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """A list of ids for each text. One core: whoever wants more starts more processes."""
        return self._encode_batch([whole_characters(text) for text in texts])

    def piece(self, id):
        """The bytes of an id; none behind the vocabulary, where a model may have rows for ids that do not exist."""
        return self.pieces[id] if id < self.vocab_size else b""

    def decode(self, ids):
        """The text of the ids. Control tokens vanish; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(map(self.piece, ids))
        return (data[1:] if self.dummy_space and data[:1] == b" " else data).decode("utf-8", "replace")

    def render(self, messages):
        """A whole dialogue for fine-tuning: (ids, mask), two lists of the same length.

        mask is 1 on the content of every assistant turn and on the token that ends it, and 0 on everything else;
        a message {"train": False} is not trained on.
        It belongs to the token as target: the loss of predicting ids[i] counts where mask[i] is 1.
        """
        ids, mask = [], []
        for part, counts in self._parts(messages):
            ids += part
            mask += [counts] * len(part)
        return ids, mask

    def prompt(self, messages):
        """The ids to generate an answer from: the dialogue, then the header of the assistant's turn.

        render(messages + [answer]) begins with them.
        """
        *asked, (part, counts) = self._parts(messages + [{"role": "assistant", "content": ""}])
        assert counts                                               # the last part is the empty answer with its end
        return [id for part, _ in asked for id in part]

    def _parts(self, messages):
        """The pieces of a dialogue in order, as (ids, 1 if the loss counts on them, else 0)."""
        contents = self.encode_batch([message["content"] for message in messages])
        if self.roles:
            yield [self.bos_id], 0
            for message, content in zip(messages, contents):
                yield [self.roles[message["role"]]], 0
                yield content + [self.end_id], int(message["role"] == "assistant" and message.get("train", True))
            return
        if self.start_id is not None:
            for i, (message, content) in enumerate(zip(messages, contents)):
                answers, line = message["role"] == "assistant", self.encode("\n") if i else []
                role = self.encode(message["role"] + "\n" + message["content"] * (not answers))
                yield line + [self.start_id] + role + [self.end_id] * (not answers), 0
                if answers:
                    yield content + [self.end_id], int(message.get("train", True))
            return
        before, after, then = self.turn
        asked = []                              # a system text, or a second user turn, joins the turn that it stands by
        for message, content in zip(messages, contents):
            if message["role"] != "assistant":
                asked.append(message["content"])
                continue
            yield self.encode(before + "\n".join(asked) + after) + then, 0
            yield content + [self.eos_id], int(message.get("train", True))
            asked = []
        if asked:
            yield self.encode(before + "\n".join(asked)), 0


class StreamDecoder:
    """Decodes one id at a time. The characters of all push() and flush() together are those of decode().

    What is only part of a character waits for the rest. To continue a text, push the ids of that text first.
    """

    def __init__(self, tokenizer):
        self.piece, self.at_start = tokenizer.piece, tokenizer.dummy_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id):
        """The characters that this id completes; "" while it is part of one, and for control tokens."""
        data = self.piece(id)
        if self.at_start and data:
            data, self.at_start = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self):
        """What is left at the end: "", or U+FFFD if the last character is not whole."""
        return self.utf8.decode(b"", final=True)


def whole_characters(text):
    """The text with every lone surrogate replaced by U+FFFD: those stand for no character and have no UTF-8."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# ---- sentencepiece --------------------------------------------------------------------------------------------

def from_sentencepiece(path):
    """Read a sentencepiece file: with our control tokens, or a plain one such as ChatGLM2's or Llama 2's."""
    import sentencepiece
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; `python train_tokenizer.py` makes a tokenizer "
                         "(--tokenizer=gpt2 takes a ready one)") from None
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        n = sp.vocab_size() if data else 0
    except (RuntimeError, TypeError, ValueError):
        n = 0
    if not n or sp.eos_id() < 0:
        raise SystemExit(f"{path}: not a whole sentencepiece model with an eos token ({len(data)} bytes); "
                         "make it again with `python train_tokenizer.py`")
    piece_id = {sp.id_to_piece(i): i for i in range(n)}
    pieces = [piece_bytes(sp, i) for i in range(n)]
    bos_id, pad_id = (i if i >= 0 else other for i, other in ((sp.bos_id(), sp.eos_id()), (sp.pad_id(), 0)))
    common = dict(name=path, sha256=hashlib.sha256(data).hexdigest(), bos_id=bos_id, eos_id=sp.eos_id(), pad_id=pad_id)

    def encode_batch(texts):
        return sp.encode(texts, num_threads=1)

    # sentencepiece cannot tell U+2581 from a space, nor write a space that its training text did not have: spell them
    spelled = {SPACE: [piece_id.get(f"<0x{byte:02X}>") for byte in SPACE.encode()]}
    if SPACE not in piece_id:
        spelled[" "] = [piece_id.get("<0x20>")]
    special = re.compile(f"([{''.join(spelled)}])")

    def encode_batch_exactly(texts):
        return [[id for part in special.split(text) for id in spelled.get(part) or sp.encode(part)]
                if special.search(text) else ids for text, ids in zip(texts, encode_batch(texts))]

    if all(c in piece_id and sp.is_control(piece_id[c]) for c in CONTROLS) and "<0x00>" in piece_id:
        ids = [piece_id[c] for c in CONTROLS]
        return Tokenizer(pieces=pieces, encode_batch=encode_batch_exactly, end_id=ids[3],
                         roles=dict(zip(("system", "user", "assistant"), ids)), **common)
    if n == 64_789:
        pieces += [b""] * 4                     # ChatGLM2 keeps [MASK], [gMASK], [sMASK], sop behind its file
    return Tokenizer(pieces=pieces, encode_batch=encode_batch, turn=("", "", [bos_id]),
                     dummy_space=sp.id_to_piece(sp.encode("a")[0]).startswith(SPACE), **common)


def piece_bytes(sp, id):
    """The UTF-8 that a sentencepiece id stands for; b"" for control tokens, <unk> and unused ids."""
    if sp.is_byte(id):
        return bytes([int(sp.id_to_piece(id)[3:5], 16)])
    if sp.is_control(id) or sp.is_unknown(id) or sp.is_unused(id):
        return b""
    return sp.id_to_piece(id).replace(SPACE, " ").encode("utf-8")


# ---- tiktoken -------------------------------------------------------------------------------------------------

def from_tiktoken(name, encoding):
    """A tiktoken encoding; its <|endoftext|> is bos, eos and pad at once, as in GPT-2."""
    pieces = [b""] * encoding.n_vocab
    for id in range(encoding.n_vocab):
        try:
            if not encoding.is_special_token(id):
                pieces[id] = encoding.decode_single_token_bytes(id)
        except KeyError:
            pass                                # some encodings leave ids between their special tokens unused
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(piece), id) for id, piece in enumerate(pieces) if piece)
    end = encoding.eot_token

    def encode_batch(texts):
        return [encoding.encode_ordinary(text) for text in texts]           # "<|endoftext|>" is text like any other

    return Tokenizer(name, hashlib.sha256(ranks).hexdigest(), pieces, end, end, end, encode_batch,
                     turn=("Human: ", "\nAssistant: ", []))


def named_encoding(name):
    """The tiktoken encoding of that name; SystemExit if there is none, or its ranks cannot be downloaded."""
    import tiktoken
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise SystemExit(f"{name}: neither a file (*.model, *.tiktoken) nor a tiktoken encoding ({', '.join(known)})")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: tiktoken could not fetch its vocabulary ({type(error).__name__}); it needs the "
                         f"network once: try again online, or give a local {name}.tiktoken") from None


def rank_file(path):
    """The tiktoken encoding of a local rank file; SystemExit names the first line that is wrong."""
    import tiktoken
    ranks = {}
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, start=1):
                if line.strip():
                    piece, rank = line.split()
                    ranks[base64.b64decode(piece, validate=True)] = int(rank)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; a rank file holds one `base64(bytes) rank` per line, "
                         "--tokenizer=gpt2 downloads GPT-2's") from None
    except ValueError:
        raise SystemExit(f"{path}: line {number} is not `base64(bytes) rank`; download the file again") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise SystemExit(f"{path}: not a whole rank file: the ranks must be 0, 1, 2 ... without a gap and every "
                         "single byte one of them; download the file again")
    return tiktoken.Encoding(os.path.basename(path), pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


# ---- Hugging Face folders -------------------------------------------------------------------------------------

def from_folder(folder):
    """The tokenizer of a Hugging Face folder: tokenizer.model where that has all of its tokens, else tokenizer.json."""
    spec = read_json(f"{folder}/tokenizer.json")
    if os.path.exists(f"{folder}/tokenizer.model"):
        tok = from_sentencepiece(f"{folder}/tokenizer.model")
        if all(token["id"] < tok.vocab_size for token in spec.get("added_tokens", [])):
            tok.name = folder
            return tok
    if not spec:
        raise SystemExit(f"{folder}: neither tokenizer.model nor tokenizer.json is there; name a folder that has one")
    return from_tokenizer_json(folder, spec)


def from_tokenizer_json(folder, spec):
    """Read a tokenizer.json: byte-level like Qwen's and Llama 3's, or with U+2581 for spaces like Llama 2's.

    The tokens that the folder names as bos, eos and pad, and those of ChatML, are control tokens whatever the file
    calls them. Its other special tokens are, too; added tokens that are not special are text, as in `transformers`.
    """
    try:
        import tokenizers
    except ImportError:
        raise SystemExit(f"{folder}/tokenizer.json: pip install tokenizers to read it") from None
    added = {token["content"]: token for token in spec.get("added_tokens", [])}
    bos, eos, pad = (named_token(folder, kind, added) for kind in ("bos", "eos", "pad"))
    if eos is None:
        raise SystemExit(f"{folder}: its tokenizer_config.json and config.json name no eos token of tokenizer.json")
    for name in {bos, eos, pad, *CHATML} & added.keys():
        added[name]["special"] = True
    try:
        theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:                  # tokenizers raises nothing more precise
        raise SystemExit(f"{folder}/tokenizer.json: not read by tokenizers {tokenizers.__version__} ({error})") from None
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True         # "<|im_end|>" in a text is text

    def encode_batch(texts):                    # its own encode_batch would take all cores
        return [theirs.encode(text, add_special_tokens=False).ids for text in texts]

    vocabulary, byte_level = theirs.get_vocab(), '"ByteLevel"' in json.dumps(spec.get("decoder"))
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, id in vocabulary.items():
        if piece not in added:
            pieces[id] = json_piece_bytes(piece, byte_level)
        elif not added[piece]["special"]:
            pieces[id] = piece.encode("utf-8")
    ids = {name: vocabulary[name] for name in added}
    start_id, end_id = map(ids.get, CHATML) if set(CHATML) <= ids.keys() else (None, None)
    if ids[eos] == end_id:                      # what ends a turn of a chat model does not end a document
        eos = "<|endoftext|>" if "<|endoftext|>" in ids else eos
    bos_id, eos_id, pad_id = (ids[name or eos] for name in (bos, eos, pad))
    what = [spec.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")] + [bos_id, eos_id]
    first = encode_batch(["a"])[0]
    dummy_space = b"".join(pieces[id] for id in first)[:1] == b" " and theirs.decode(first)[:1] != " "
    tok = Tokenizer(folder, hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(), pieces, bos_id,
                    eos_id, pad_id, encode_batch, end_id=end_id, start_id=start_id,
                    turn=("Human: ", "\nAssistant: ", []), dummy_space=dummy_space)
    probe = tok.encode("Hello, 你好 é  x\n\n 1234 😀")
    if tok.decode(probe) != theirs.decode(probe):
        raise SystemExit(f"{folder}/tokenizer.json: of a kind that is not read here, neither byte-level nor with U+2581 "
                         "for spaces")
    return tok


def named_token(folder, kind, added):
    """The text of the bos, eos or pad token that the files of a folder name; None if they name none of `added`."""
    for file in "tokenizer_config.json", "special_tokens_map.json":
        token = read_json(f"{folder}/{file}").get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in added:
            return token
    ids = read_json(f"{folder}/config.json").get(f"{kind}_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return next((name for name, token in added.items() if token["id"] in ids), None)


def json_piece_bytes(piece, byte_level):
    """The UTF-8 that a piece of a tokenizer.json stands for."""
    if byte_level and set(piece) <= BYTE_OF.keys():
        return bytes(BYTE_OF[character] for character in piece)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode("utf-8")


def byte_characters():
    """{character: byte} of byte-level vocabularies, which write a space as Ġ. Source: openai/gpt-2, src/encoder.py."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


BYTE_OF = byte_characters()


def read_json(path):
    """The object of a JSON file, {} where there is no such file; SystemExit if it is not whole."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{path}: holds no JSON object; download it again")
    return content
