"""Messages -> token ids, and token ids -> text, from the files of a bundle's `processor/` folder.

`tokenizer.json` and `chat_template.jinja` are all it takes: the same ids as transformers' processor,
without it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer

from flashvlm.errors import BundleError, PromptError, no_panic
from flashvlm.files import MAX_JSON, parse_json, read_bytes
from flashvlm.text.chat_template import ChatTemplate
from flashvlm.text.tokenizer_file import load_tokenizer

Message = Mapping[str, Any]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Of the messages, and of the prompt made of them: some 100,000 tokens of English. Tokenizing 400,000 emoji as bytes
# takes 450 MB.
MAX_CHARACTERS = 400_000
MAX_PARTS = 1000  # of all messages: each text of the last one is rendered on its own, too

RUN = "{v}"  # in what stands for an image or video: a run of visual tokens

# At most 3 bytes of a character can be missing, and the 4 of the one before are decoded with them: a longer
# run of replacement characters will never become text.
_HOPELESS = "\ufffd" * 8


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt as the model reads it, with one placeholder id for each run of visual tokens.

    input_ids      int64 [T]
    question_mask  bool [T]: the tokens of the last user message's text
    text_mask      bool [T]: all tokens but placeholders and control tokens (BOS, turn markers)
    order          which image or video of the messages is the first, second, ... of the prompt: some templates write
                   all images before all videos
    """

    input_ids: np.ndarray
    question_mask: np.ndarray
    text_mask: np.ndarray
    order: tuple[int, ...] = ()


class TextProcessor:
    """The tokenizer and chat template of one model.

    Messages are `{"role": ..., "content": ...}`, where content is a string or a list of `{"type": "image"}`,
    `{"type": "video"}` and `{"type": "text", "text": ...}`.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, named_tokens: Mapping[str, str], rows: int | None = None
    ) -> None:
        # Either may be stored in tokenizer.json, and would cut or pad prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.named_tokens = dict(named_tokens)
        self._rows = rows
        self._template = ChatTemplate(template)
        added = tokenizer.get_added_tokens_decoder().items()
        special = {i: token.content for i, token in added if token.special}
        # <unk> stands for ordinary text that the vocabulary lacks.
        self._control = {i: text for i, text in special.items() if text != named_tokens.get("unk_token")}

    @classmethod
    def from_folder(cls, folder: str | Path, rows: int | None = None) -> "TextProcessor":
        """`from_files` of a folder. Raises BundleError if a file is missing or malformed."""
        path = Path(folder)
        return cls.from_files(lambda name: _read(path / name), path, rows)

    @classmethod
    def from_files(cls, read: Callable[[str], bytes], where: str | Path, rows: int | None = None) -> "TextProcessor":
        """Read `tokenizer.json`, `chat_template.jinja` and `tokenizer_config.json`.

        Args:
            read: name of one of them -> its content; raises BundleError if there is none.
            where: the folder they are in, for messages.
            rows: of the embedding table: no token may be beyond it.

        Raises:
            BundleError: one of them is malformed, or not of a kind that is safe to use.
        """
        tokenizer = load_tokenizer(read("tokenizer.json"), f"{where}/tokenizer.json", rows)
        named = _named_tokens(read("tokenizer_config.json"), f"{where}/tokenizer_config.json")
        path = f"{where}/chat_template.jinja"
        try:
            return cls(tokenizer, read("chat_template.jinja").decode("utf-8"), named, rows)
        except UnicodeDecodeError:
            raise BundleError(f"{path}: expected UTF-8 text, found other bytes; export the bundle again") from None
        except jinja2.TemplateError as error:
            raise BundleError(f"{path}: expected a Jinja template, found: {str(error)[:300]}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as text. Raises PromptError for malformed messages or ones that the template refuses."""
        return self._render(_plain(messages), add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Message],
        placeholders: Mapping[str, str | int],
        visuals: Sequence[str] | None = None,
        markers: Mapping[str, str] | None = None,
    ) -> EncodedPrompt:
        """Messages -> ids and masks.

        Special tokens are added (BOS, by the tokenizer's post-processor) unless the template has already
        rendered BOS: transformers' `apply_chat_template(tokenize=True)` of a processor decides the same way.

        Args:
            placeholders: of each modality, such as "image": the token that stands for a run of visual tokens, as
                text or id.
            visuals: what stands in the prompt for each image or video of the messages, in their order: a text with
                one ``{v}`` for each run of its visual tokens. None: one run each.
            markers: of modalities for which the template writes another text than the placeholder: that text.

        Raises PromptError if there is no question, if a message's text contains a control token such as
        `<image>` or `</s>` (the tokenizer would take it for a real one), or if the number of placeholders
        is not the number of images and videos in the messages.
        """
        tokens = {modality: self._token_id(token) for modality, token in placeholders.items()}
        names = {modality: self._name(token) for modality, token in tokens.items()}
        marks = names | dict(markers or {})
        what = " and ".join(names)
        plain = _plain(messages)
        self._refuse_control_tokens(plain, tokens.values(), marks.values())
        text = self._render(plain, True)
        shown = [part["type"] for message in plain for part in message["content"] if part["type"] != "text"]
        if unknown := [modality for modality in shown if modality not in tokens]:
            raise PromptError(f"messages: expected text and parts of type {what}, found {unknown[0]}")
        if visuals is None:
            visuals = [RUN] * len(shown)
        items = [
            (marks[modality], visual.replace(RUN, names[modality]))
            for modality, visual in zip(shown, visuals, strict=True)
        ]
        text, spans, order = _expanded(text, self._question_spans(plain, text), {*marks.values()}, items, what)

        bos = self.named_tokens.get("bos_token")
        encoding = self._tokenize(text, add_special_tokens=not (bos and text.startswith(bos)))
        ids = np.array(encoding.ids, dtype=np.int64)  # [T]
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T  # [T] each, in characters
        question = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            question |= (starts < end) & (ends > start)
        runs = sum(visual.count(RUN) for visual in visuals)
        if (found := int(np.isin(ids, [*tokens.values()]).sum())) != runs:
            raise PromptError(
                f"expected {runs} {what} placeholders among the tokens of the prompt, found {found}; "
                "check the chat template"
            )
        if not question.any():
            raise PromptError("expected a question, found no token in the last user message; ask something")
        added = np.array(encoding.special_tokens_mask, dtype=bool)
        control = np.isin(ids, [*self._control, *tokens.values()])
        return EncodedPrompt(ids, question, ~(added | control), order)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Token ids -> text. Ids outside the vocabulary (padding of the embedding table) are left out."""
        return _checked(self.tokenizer.decode, [int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> "TextStream":
        """A decoder for tokens that arrive one at a time."""
        return TextStream(self, skip_special)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        flags = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._template.render({**flags, **self.named_tokens})

    def _tokenize(self, text: str, add_special_tokens: bool) -> Any:
        if len(text) > MAX_CHARACTERS:
            raise PromptError(_too_long("prompt", len(text)))
        encoding = _checked(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        if self._rows is not None and max(encoding.ids, default=0) >= self._rows:
            raise PromptError(
                f"expected tokens of the table of {self._rows} rows, found id {max(encoding.ids)}; "
                "export the bundle again"
            )
        return encoding

    def _token_id(self, token: str | int) -> int:
        found = self.tokenizer.token_to_id(token) if isinstance(token, str) else int(token)
        if found is None or not 0 <= found < 2**32 or self.tokenizer.id_to_token(found) is None:
            raise PromptError(f"image placeholder: expected a token of the vocabulary, found {token!r}")
        return found

    def _name(self, token: int) -> str:
        """A token of the vocabulary as text."""
        return str(self.tokenizer.id_to_token(token))

    def _refuse_control_tokens(
        self, messages: list[dict[str, Any]], placeholders: Iterable[int], marks: Iterable[str]
    ) -> None:
        """A control token in someone's text would end the turn or stand for an image that is not there.

        The parts of a message are tokenized together: a template may join `<ima` and `ge>`.
        """
        control = self._control | {token: self.tokenizer.id_to_token(token) for token in placeholders}
        for number, message in enumerate(messages):
            text = "".join(part.get("text", "") for part in message["content"])
            ids = self._tokenize(text, add_special_tokens=False).ids
            found = [control[i] for i in ids if i in control] or [mark for mark in marks if mark in text]
            if found:
                raise PromptError(
                    f"message {number} ({message['role']}): expected plain text, found the control token "
                    f"{found[0]}; remove it or write it with spaces"
                )

    def _question_spans(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Where, in `text`, the rendered parts of the last user message are: (start, end) in characters.

        Searching for the question fails where it occurs twice ("A" also occurs in "ASSISTANT:"). So a part
        is replaced with a mark and rendered again: what precedes and follows the mark precedes and follows
        the part.
        """
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise PromptError("messages: expected one of the user, found none; add the question")
        message = messages[users[-1]]
        parts = [part for part in message["content"] if part.get("text", "").strip()]
        if not parts:
            raise PromptError("expected a question, found an empty prompt; ask something")
        # A character for private use, which no template has, and more of them than the text has together.
        mark = "\ue000" * (1 + max(map(len, re.findall("\ue000+", text)), default=0))
        spans = []
        for part in parts:
            content = [{**p, "text": mark} if p is part else p for p in message["content"]]
            marked = [{**m, "content": content} if m is message else m for m in messages]
            before, _, after = self._render(marked, True).partition(mark)
            question = text[len(before) : len(text) - len(after)]
            if before + question + after != text or mark in after or not question.strip():
                raise PromptError(
                    "expected a chat template that renders the last user message once, found another; "
                    "write the question without the template's own markers"
                )
            start = len(before) + len(question) - len(question.lstrip())
            spans.append((start, len(before) + len(question.rstrip())))
        return spans


class TextStream:
    """Token ids, one at a time, -> the text they add. Joined, pieces of valid UTF-8 are `decode` of all ids.

    A character whose bytes are spread over several tokens comes out with the last of them. As a tokenizer
    drops the space at the start of a text, new tokens are decoded together with the ones before them.
    """

    def __init__(self, processor: TextProcessor, skip_special: bool = True) -> None:
        self._processor = processor
        self._skip_special = skip_special
        self._window: list[int] = []  # the tokens of the last piece, then those that are not yet text
        self._done = 0  # how many of the window are

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; often, but not always, one word."""
        self._window.append(int(token_id))
        return self._emit(final=False)

    def flush(self) -> str:
        """The rest, at the end of an answer; bytes that never became a character come out as U+FFFD."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        text = self._processor.decode(self._window, self._skip_special)
        piece = text[len(self._processor.decode(self._window[: self._done], self._skip_special)) :]
        if not piece or (piece.endswith("\ufffd") and not piece.endswith(_HOPELESS) and not final):
            return ""
        self._window = self._window[self._done :]
        self._done = len(self._window)
        return piece


def _expanded(
    text: str, spans: list[tuple[int, int]], marks: Iterable[str], items: Sequence[tuple[str, str]], what: str
) -> tuple[str, list[tuple[int, int]], tuple[int, ...]]:
    """The text with the mark of each item in it replaced by what stands for it, where the spans are then, and which
    items they are.

    ``items``: mark and replacement of each, in order among those of one mark. ``what`` they are, for messages.
    """
    pattern = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
    found = list(re.finditer(pattern, text)) if pattern else []
    if sorted(match[0] for match in found) != sorted(mark for mark, _ in items):
        raise PromptError(
            f"expected {len(items)} {what} placeholders in the prompt, one for each {what.replace('and', 'or')} of the "
            f"messages, found {len(found)}; check the chat template and which roles have images"
        )
    waiting = {mark: [i for i, item in enumerate(items) if item[0] == mark] for mark, _ in items}
    order = tuple(waiting[match[0]].pop(0) for match in found)
    pieces, moved, done = [], [[*span] for span in spans], 0
    for match, item in zip(found, order, strict=True):
        mark, new = items[item]
        pieces += [text[done : match.start()], new]
        done = match.end()
        for new_span, span in zip(moved, spans, strict=True):
            for i, end in enumerate(span):
                new_span[i] += len(new) - len(mark) if end >= done else 0
    return "".join([*pieces, text[done:]]), [(start, end) for start, end in moved], order


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_JSON)
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{path}: expected a file, found: {reason}; export the bundle again") from None


def _named_tokens(content: bytes, path: str) -> dict[str, str]:
    """What transformers offers to a chat template as variables. A token is a string or an AddedToken dictionary."""
    try:
        config = parse_json(content)
    except ValueError as error:
        raise BundleError(f"{path}: expected a tokenizer configuration, found: {error}") from None
    if not isinstance(config, dict):
        raise BundleError(f"{path}: expected a tokenizer configuration, found a {type(config).__name__}")
    named = {}
    for name in _NAMED_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise BundleError(f"{path}: expected text in {name}, found {str(text)[:80]}; export the bundle again")
        if text:
            named[name] = text
    return named


def _checked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of the tokenizers library, which panics at some inputs and raises plain Exception at others."""
    try:
        with no_panic():
            return function(*args, **kwargs)
    except Exception as error:
        raise PromptError(f"the tokenizer fails: {str(error)[:300]}; export the bundle again") from None


def _too_long(what: str, characters: int) -> str:
    return f"{what}: expected at most {MAX_CHARACTERS:,} characters, found {characters:,}; shorten the messages"


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages rebuilt of plain strings and lists: templates never see images or other objects."""
    if not messages:
        raise PromptError("messages: expected at least one, found none; add the question")
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
            raise PromptError(
                f"message {number}: expected a role and a content (text or parts), found role {role!r} and "
                f"content of type {type(content).__name__}"
            )
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        plain.append({"role": role, "content": [_plain_part(part, number) for part in parts]})
    texts = [part.get("text", "") for message in plain for part in message["content"]]
    if len(plain) + len(texts) > MAX_PARTS:
        raise PromptError(
            f"messages: expected at most {MAX_PARTS} with their parts, found {len(plain) + len(texts)}; join some"
        )
    characters = sum(map(len, texts)) + sum(len(message["role"]) for message in plain)
    if characters > MAX_CHARACTERS:
        raise PromptError(_too_long("messages", characters))
    return plain


def _plain_part(part: Any, number: int) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("image", "video"):
        return {"type": kind}
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise PromptError(f"message {number}: expected parts of type image or video, or text with a text, found {kind}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"message {number}: expected Unicode text, found a lone surrogate; mend the text") from None
    return {"type": "text", "text": str(text)}
