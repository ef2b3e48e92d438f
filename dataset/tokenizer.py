"""Text <-> token ids: the shipped SentencePiece tokenizer, and any Hugging Face one behind the same door,
`TextTokenizer`.

What flows through, with the shipped 6,400-piece model:

    encode("Hello 世界") -> [4418, 625, 4355, 4351, 2070]      "H" "ell" "o" " " "世界", no <s> or </s> added
    encode("<|end|>")    -> [4568, 4440, 611, 4440, 4496]      "<" "|" "end" "|" ">": text is never control
    decode([5, 2070, 8]) -> "世界"                              control tokens are left out
    decode([5, 2070, 8], skip_control=False) -> "<|user|>世界<|end|>"

Every string without lone surrogates comes back exactly: what has no piece of its own is spelt in byte tokens
(<0x00> .. <0xFF>). The control tokens stand at the first ids, then the 256 bytes, then the pieces.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken

DEFAULT_TOKENIZER = Path(__file__).parent / "tokenizer_6400"

CONTROL_TOKENS = (
    "<unk>", "<s>", "</s>", "<pad>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>",
    "<think>", "</think>", "<tools>", "</tools>", "<tool_call>", "</tool_call>",
)  # fmt: skip
"""Control tokens in id order: <unk> is 0, <s> is 1, and so on."""

CHAT_TEMPLATE = "chat_template.jinja"

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    CHAT_TEMPLATE, "chat_template.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""What a tokenizer folder may hold; `save` copies those that are there."""

BREAK = "\x01"  # stands between what must not become one token
PROBE = "\U000f0000"  # a text to look for in what a template writes
DATA_ERRORS = (
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
)  # of a template about a value it does not expect

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character inside its pieces
SPACE_MARK_BYTES = [len(CONTROL_TOKENS) + byte for byte in SPACE_MARK.encode()]


class Token(NamedTuple):
    """An id, and the characters it stands for: the number of the first, and of the one after the last."""

    id: int
    start: int
    end: int


class IncrementalDecoder(Protocol):
    """Ids in one by one, text out in whole characters."""

    def push(self, token_id: int) -> str:
        """Text that this token completes ("" while a character is incomplete)."""

    def flush(self) -> str:
        """What was held back at the end, U+FFFD for an unfinished character."""


class TextTokenizer(Protocol):
    """What `Tokenizer` and `HFTokenizer` have in common, and all that the rest of the project asks of either."""

    folder: Path
    vocab_size: int
    eos_id: int
    pad_id: int
    end_of_turn_id: int
    stop_ids: tuple[int, ...]  # an answer ends at any of these
    control_ids: frozenset[int]

    @property
    def bos_id(self) -> int | None:
        """What a document starts with; None: with its text."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can render conversations."""

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): UTF-8 bytes each token stands for, 0 for control tokens."""

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's files: equal fingerprints give equal ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, which is never a control token. Raises ValueError for a lone surrogate."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""

    def decode(self, ids: list[int], skip_control: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""

    def token_text(self, token_id: int) -> str:
        """One token for display."""

    def stream_decoder(self, skip_control: bool = True) -> IncrementalDecoder:
        """A decoder for one answer that arrives id by id."""

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into a model folder."""


class Tokenizer:
    """The project's own tokenizer: a SentencePiece BPE model with byte fallback.

    >>> tokenizer = Tokenizer(DEFAULT_TOKENIZER)
    >>> tokenizer.decode(tokenizer.encode("  两个  spaces\\r\\n"))
    '  两个  spaces\\r\\n'
    """

    bos_id = CONTROL_TOKENS.index("<s>")
    eos_id = CONTROL_TOKENS.index("</s>")
    pad_id = CONTROL_TOKENS.index("<pad>")
    end_of_turn_id = CONTROL_TOKENS.index("<|end|>")
    stop_ids: tuple[int, ...] = (eos_id, end_of_turn_id)
    control_ids = frozenset(range(len(CONTROL_TOKENS)))
    has_chat_template = True

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError when `folder` holds no tokenizer.model, or one that is not this project's."""
        self.folder = Path(folder)
        self._model = _read_model(self.folder / "tokenizer.model")
        self.vocab_size: int = self._model.get_piece_size()
        self._bytes = [_bytes_of_piece(self._model.id_to_piece(i), i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Raises ValueError for a lone surrogate, which no UTF-8 text can hold."""
        check_encodable(text)
        if SPACE_MARK not in text:
            return self._model.encode(text)
        # A literal U+2581 would come back as a space, so it is spelt in its three bytes.
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            ids += SPACE_MARK_BYTES * (i > 0) + self._model.encode(part)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text (one thread: who encodes much data does so in several processes)."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int], skip_control: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id out of range."""
        return b"".join(self._id_bytes(i, skip_control) for i in ids).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        """One token for display: a control token or a lone byte by its name, anything else as its text."""
        piece = self._model.id_to_piece(token_id)
        return piece if self._model.is_byte(token_id) else piece.replace(SPACE_MARK, " ")

    def stream_decoder(self, skip_control: bool = True) -> IncrementalDecoder:
        """A decoder for one answer that arrives id by id."""
        return StreamDecoder(self, skip_control)

    def token_id(self, control_token: str) -> int:
        """Id of a control token given by name, e.g. "<|user|>" -> 5."""
        return CONTROL_TOKENS.index(control_token)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): UTF-8 bytes each token stands for, 0 for control tokens."""
        return np.array([len(piece) for piece in self._bytes], dtype=np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the model and the chat template: equal fingerprints give equal ids."""
        return _hash_files(self.folder, ("tokenizer.model", CHAT_TEMPLATE))

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into a model folder."""
        _copy_files(self.folder, Path(folder))

    def _id_bytes(self, token_id: int, skip_control: bool) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary: expected 0 to {self.vocab_size - 1}")
        if token_id in self.control_ids:
            return b"" if skip_control else CONTROL_TOKENS[token_id].encode()
        return self._bytes[token_id]


class StreamDecoder:
    """Turns ids into text as they come, holding back a character whose bytes are not all there yet.

    The three bytes of "世" as three byte tokens: push -> "", "", "世".
    """

    def __init__(self, tokenizer: Tokenizer, skip_control: bool) -> None:
        self._tokenizer, self._skip_control = tokenizer, skip_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that this token completes ("" while a character is incomplete)."""
        return self._utf8.decode(self._tokenizer._id_bytes(token_id, self._skip_control))

    def flush(self) -> str:
        """What was held back at the end: U+FFFD for an unfinished character, else ""."""
        return self._utf8.decode(b"", final=True)


class HFTokenizer:
    """Any Hugging Face tokenizer folder (Llama 3, Qwen3, ...) with the interface of `Tokenizer`.

    Chat goes through the folder's own template; see `dataset.chat`.
    """

    def __init__(self, folder: str | Path, chat_template: str | None = None) -> None:
        """`chat_template`, "chatml" or a Jinja file, stands in for the folder's own, also in what `save` writes."""
        from transformers import AutoTokenizer  # seconds to import; only foreign folders need it

        self.folder = Path(folder)
        # untyped: which class it is, and so what its attributes are, depends on the folder
        self.hf: Any = AutoTokenizer.from_pretrained(str(self.folder))
        self._backend = _fast_backend(self.hf, self.folder)
        self._given = {} if chat_template is None else {CHAT_TEMPLATE: _read_template(chat_template, self.hf)}
        self.hf.chat_template = self._given.get(CHAT_TEMPLATE, self.hf.chat_template)
        self.vocab_size = len(self.hf)
        self.has_chat_template = self.hf.chat_template is not None
        self.control_ids = frozenset(i for i, t in self.hf.added_tokens_decoder.items() if self._is_control(t))
        self._control_name = _any_of([self.hf.added_tokens_decoder[i].content for i in self.control_ids])
        self.bos_id: int | None = self.hf.bos_token_id
        self.unk_id: int | None = self.hf.unk_token_id
        ends = self._read_end_ids()
        self.eos_id: int = ends[0]
        self.end_of_turn_id = self._find_end_of_turn()
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*ends, self.end_of_turn_id)))
        self.pad_id: int = self.eos_id if self.hf.pad_token_id is None else self.hf.pad_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: a control token's name in it stays text, and no <s> is added."""
        check_encodable(text)
        breaks = [start + 1 for start, _ in self.find_controls(text)]
        if not breaks:
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids  # no characters: faster
        return [token.id for token in self.encode_apart(text, breaks)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_template(self, text: str) -> list[int]:
        """Ids of a chat template's own text, in which control tokens' names are control tokens."""
        return [token.id for token in self.encode_apart(text)]

    def encode_apart(self, text: str, breaks: Sequence[int] = ()) -> list[Token]:
        """Tokens of `text`, in which control tokens' names are control tokens, but none reaches over a break.

        "a<end>b" -> a, <end>, b; with a break at 2: a, <, end, >, b. At each break (a character's number, ascending)
        stands a character of its own while the text is encoded, and its token is taken out again: what is left and
        right of it is encoded as in the middle of a text, for many tokenizers treat a text's beginning differently.
        Raises ValueError where the tokenizer merges that character with its neighbours.
        """
        edges = [0, *breaks, len(text)]
        encoding = self._backend.encode(
            BREAK.join(text[a:b] for a, b in itertools.pairwise(edges)), add_special_tokens=False
        )
        stand = [place + i for i, place in enumerate(breaks)]  # where each BREAK stands
        tokens = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            before, within = bisect_left(stand, start), bisect_left(stand, end)
            if before == within:
                tokens.append(Token(token_id, start - before, end - before))
            elif end - start > 1:
                around = text[max(0, start - before - 10) : end + 10]
                raise ValueError(f"{around!r} holds a control token's name that this tokenizer cannot keep as text")
        return tokens

    def find_controls(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control tokens' names stand in a text, also where they overlap: first character, and the one after the
        last."""
        found = self._control_name.search(text)
        while found is not None:
            yield found.span()
            found = self._control_name.search(text, found.start() + 1)

    def apply_template(
        self, messages: Sequence[Mapping[str, object]], tools: object, add_generation_prompt: bool
    ) -> str:
        """The folder's chat template applied to messages and the tools they may call (None: none).

        Raises ValueError when the folder has no template, and when its template refuses the messages.
        """
        if not self.has_chat_template:
            raise ValueError(
                f"{self.folder}: this tokenizer has no chat template; train with --chat_template chatml (or FILE), "
                "or add a chat_template.jinja for chat"
            )
        from jinja2 import TemplateError  # not for our own tokenizer

        try:
            return self.hf.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, *DATA_ERRORS) as error:  # its own raise_exception, or what it trips over
            raise ValueError(
                f"the chat template of {self.folder} refuses these messages: {str(error) or type(error).__name__}"
            ) from None

    @cached_property
    def generation_header(self) -> str:
        """What the template writes to let the assistant speak, e.g. "<|im_start|>assistant\\n"; where it writes
        nothing for that, as Llama 2's, what it writes after a user's text, " [/INST]"."""
        probe = [{"role": "user", "content": PROBE}]
        asked, plain = self._probe(probe, True), self._probe(probe, False)
        return (asked.removeprefix(plain) if asked.startswith(plain) else "") or asked.partition(PROBE)[2]

    def decode(self, ids: list[int], skip_control: bool = True) -> str:
        """Text of ids."""
        return self.hf.decode(ids, skip_special_tokens=skip_control, clean_up_tokenization_spaces=False)

    def token_text(self, token_id: int) -> str:
        """One token for display."""
        return self.decode([token_id], skip_control=False)

    def stream_decoder(self, skip_control: bool = True) -> IncrementalDecoder:
        """A decoder for one answer that arrives id by id."""
        return HFStreamDecoder(self, skip_control)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): UTF-8 bytes each token stands for, 0 for special tokens."""
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.hf.backend_tokenizer.to_str())["decoder"])
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for i, piece in enumerate(self.hf.convert_ids_to_tokens(list(range(self.vocab_size)))):
            if i not in self.control_ids and piece is not None:
                # In a byte-level vocabulary every character of a piece stands for one byte.
                sizes[i] = len(piece) if byte_level else len(_bytes_of_piece(piece, len(CONTROL_TOKENS)))
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the folder's tokenizer files: equal fingerprints give equal ids."""
        return _hash_files(self.folder, TOKENIZER_FILES, self._given)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into a model folder."""
        _copy_files(self.folder, Path(folder))
        for name, text in self._given.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")

    def _read_end_ids(self) -> list[int]:
        """The tokenizer's eos, then whatever the generation config names as the end."""
        path = self.folder / "generation_config.json"
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        named = [named] if isinstance(named, int) else (named or [])
        own = [] if self.hf.eos_token_id is None else [self.hf.eos_token_id]
        if not own + named:
            raise ValueError(f"{self.folder}: found no eos token, expected one in tokenizer_config.json")
        return own + named

    def _find_end_of_turn(self) -> int:
        """The first special token the template writes after an answer (base models' eos is another)."""
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
        after = self._probe(messages, False).partition(PROBE)[2]
        return next((i for i in self.encode_template(after) if i in self.control_ids), self.eos_id)

    def _probe(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """What the template makes of messages, after a system prompt where it insists on one; "" where it refuses both,
        or there is none: chat will tell, if it is asked for."""
        for head in ([], [{"role": "system", "content": "x"}]):
            with contextlib.suppress(ValueError):
                return self.apply_template([*head, *messages], None, add_generation_prompt)
        return ""

    def _is_control(self, token: AddedToken) -> bool:
        """Special tokens, and those that the template writes: Qwen3's <think> and <tool_call> are not called special.
        What else was added (a word, a run of spaces) is text."""
        written = isinstance(self.hf.chat_template, str) and token.content in self.hf.chat_template
        return token.special or (written and not token.content.isspace())


class HFStreamDecoder:
    """`StreamDecoder` for a Hugging Face tokenizer: decodes until the text ends in a whole character."""

    def __init__(self, tokenizer: HFTokenizer, skip_control: bool) -> None:
        self._tokenizer, self._skip_control = tokenizer, skip_control
        self._shown: list[int] = []  # the ids shown last: some tokenizers drop the space of a text's first token
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Text that this token completes ("" while a character is incomplete)."""
        self._pending.append(token_id)
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._show(text)

    def flush(self) -> str:
        """What was held back at the end."""
        return self._show(self._new_text())

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._shown, self._skip_control)
        return self._tokenizer.decode(self._shown + self._pending, self._skip_control)[len(shown) :]

    def _show(self, text: str) -> str:
        self._shown, self._pending = self._pending, []
        return text


def load_tokenizer(folder: str | Path, chat_template: str | None = None) -> Tokenizer | HFTokenizer:
    """The tokenizer of a model folder: this project's own, or any Hugging Face one, and that with another
    `chat_template` ("chatml" or a Jinja file) where it is to chat differently from what its folder says, if anything.

    Raises ValueError when the folder holds neither, and for a template beside our own, which chats in one way alone.
    """
    folder = Path(folder)
    if _is_ours(folder / "tokenizer.model"):
        if chat_template is not None:
            raise ValueError(
                f"--chat_template {chat_template}: {folder} holds this project's own tokenizer, which brings its own "
                "chat format; leave the flag out"
            )
        return Tokenizer(folder)
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return HFTokenizer(folder, chat_template)
    found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise ValueError(f"{folder}: found {found}, expected a folder with tokenizer.model or tokenizer.json")


def _read_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a tokenizer folder such as {DEFAULT_TOKENIZER}")
    if not _is_ours(path):
        raise ValueError(
            f"{path}: not this project's tokenizer, expected the pieces {' '.join(CONTROL_TOKENS)} and then "
            "256 bytes; open other models' folders with load_tokenizer, make one with scripts/train_tokenizer.py"
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:  # not a SentencePiece file at all
        return False
    first = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    return [model.id_to_piece(i) for i in range(min(len(first), model.get_piece_size()))] == first


def _bytes_of_piece(piece: str, token_id: int) -> bytes:
    """UTF-8 bytes of a piece: "▁the" -> b" the", "<0xE4>" -> b"\\xe4", a control token -> b""."""
    if token_id < len(CONTROL_TOKENS):
        return b""
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 10) : error.start + 10]
        raise ValueError(
            f"text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start} "
            f"({around!r}), expected valid Unicode; repair or drop this text"
        ) from None


def _fast_backend(hf: Any, folder: Path) -> tokenizers.Tokenizer:
    """What does the work inside a Hugging Face tokenizer, in the form that tells each token's characters."""
    backend = getattr(hf, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(f"{folder}: found a {type(hf).__name__} without tokenizer.json, expected a fast tokenizer")
    backend.encode_special_tokens = False
    backend.post_processor = None  # it would add <s>, and leave spaces out of a token's characters
    backend.no_truncation()
    backend.no_padding()
    return backend


def _any_of(names: list[str]) -> re.Pattern[str]:
    """Matches the longest of the names that stands at a place; nothing where there are none."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _read_template(chat_template: str, hf: Any) -> str:
    """The template that `--chat_template` names. Raises FileNotFoundError for a file that is not there."""
    path = Path(__file__).parent / "chatml.jinja" if chat_template == "chatml" else Path(chat_template)
    if not path.is_file():
        raise FileNotFoundError(f"--chat_template {chat_template}: no such file; give chatml, or a Jinja file")
    text = path.read_text(encoding="utf-8")
    if chat_template == "chatml" and "<|im_end|>" not in hf.added_tokens_encoder:
        # a turn ends with one token that the model knows, and a text cannot hold
        text = text.replace("<|im_end|>", "' ~ eos_token ~ '")
    return text


def _hash_files(folder: Path, names: tuple[str, ...], given: Mapping[str, str] | None = None) -> str:
    """Hash of the files of these names that are there; some may be `given` as text instead."""
    contents = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    contents |= {name: text.encode() for name, text in (given or {}).items()}
    digest = hashlib.sha256()
    for name in (name for name in names if name in contents):
        digest.update(name.encode() + b"\0" + hashlib.sha256(contents[name]).digest())
    return digest.hexdigest()


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if source.resolve() == target.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
        else:  # of another tokenizer that was here before, and would decide when the folder is opened
            (target / name).unlink(missing_ok=True)
