"""Messages -> token ids, and token ids -> text, from the files of a bundle's `processor/` folder.

`tokenizer.json` and `chat_template.jinja` are all it takes: the same ids as transformers' processor,
without it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from flashvlm.errors import BundleError, PromptError

Message = Mapping[str, Any]

# What transformers offers to a chat template as variables.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# At most 3 bytes of a character can be missing, and the 4 of the one before are decoded with them: a longer
# run of replacement characters will never become text.
_HOPELESS = "\ufffd" * 8


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt as the model reads it, with one placeholder id for each image.

    input_ids        int64 [T]
    question_mask    bool [T]: the tokens of the last user message's text
    text_mask        bool [T]: all tokens but placeholders and control tokens (BOS, turn markers)
    image_positions  int64 [n_images], ascending
    """

    input_ids: np.ndarray
    question_mask: np.ndarray
    text_mask: np.ndarray
    image_positions: np.ndarray


class TextProcessor:
    """The tokenizer and chat template of one model.

    Messages are `{"role": ..., "content": ...}`, where content is a string or a list of `{"type": "image"}`
    and `{"type": "text", "text": ...}`.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, named_tokens: Mapping[str, str]) -> None:
        # Either may be stored in tokenizer.json, and would cut or pad prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.named_tokens = dict(named_tokens)
        self._template = _compile(template)
        added = tokenizer.get_added_tokens_decoder().items()
        special = {i: token.content for i, token in added if token.special}
        # <unk> stands for ordinary text that the vocabulary lacks.
        self._control = {i: text for i, text in special.items() if text != named_tokens.get("unk_token")}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TextProcessor":
        """Read `tokenizer.json`, `chat_template.jinja` and `tokenizer_config.json`.

        Raises BundleError if one is missing or malformed.
        """
        folder = Path(folder)
        try:
            tokenizer = Tokenizer.from_str(_read(folder / "tokenizer.json"))
        except BundleError:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{folder / 'tokenizer.json'}: expected a tokenizer, found: {error}") from None
        try:
            config = json.loads(_read(folder / "tokenizer_config.json"))
            # A token is a string or an AddedToken dictionary.
            tokens = {name: config[name] for name in _NAMED_TOKENS if config.get(name)}
            named = {name: t if isinstance(t, str) else t["content"] for name, t in tokens.items()}
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            path = folder / "tokenizer_config.json"
            raise BundleError(f"{path}: expected a tokenizer configuration, found: {error}") from None
        try:
            return cls(tokenizer, _read(folder / "chat_template.jinja"), named)
        except jinja2.TemplateError as error:
            path = folder / "chat_template.jinja"
            raise BundleError(f"{path}: expected a Jinja template, found: {error}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as text. Raises PromptError for malformed messages or ones that the template refuses."""
        return self._render(_plain(messages), add_generation_prompt)

    def encode(self, messages: Sequence[Message], image_token: str | int) -> EncodedPrompt:
        """Messages -> ids and masks; `image_token` is the placeholder, as text or id.

        Special tokens are added (BOS, by the tokenizer's post-processor) unless the template has already
        rendered BOS: transformers' `apply_chat_template(tokenize=True)` of a processor decides the same way.

        Raises PromptError if there is no question, if a message's text contains a control token such as
        `<image>` or `</s>` (the tokenizer would take it for a real one), or if the number of placeholders
        is not the number of images in the messages.
        """
        image_id = self._token_id(image_token)
        plain = _plain(messages)
        self._refuse_control_tokens(plain, image_id)
        text = self._render(plain, True)
        spans = self._question_spans(plain, text)

        bos = self.named_tokens.get("bos_token")
        encoding = self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))
        ids = np.array(encoding.ids, dtype=np.int64)  # [T]
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T  # [T] each, in characters
        question = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            question |= (starts < end) & (ends > start)
        positions = np.flatnonzero(ids == image_id)
        images = sum(part["type"] == "image" for message in plain for part in message["content"])
        if len(positions) != images:
            raise PromptError(
                f"expected {images} image placeholders in the prompt, one for each image of the messages, "
                f"found {len(positions)}; check the chat template and which roles have images"
            )
        if not question.any():
            raise PromptError("expected a question, found no token in the last user message; ask something")
        added = np.array(encoding.special_tokens_mask, dtype=bool)
        control = np.isin(ids, [*self._control, image_id])
        return EncodedPrompt(ids, question, ~(added | control), positions)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Token ids -> text. Ids outside the vocabulary (padding of the embedding table) are left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> "TextStream":
        """A decoder for tokens that arrive one at a time."""
        return TextStream(self, skip_special)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.named_tokens
            )
        except Exception as error:  # a template is a program of the checkpoint: it may fail in any way
            raise PromptError(f"the chat template refuses these messages: {error}") from None

    def _token_id(self, token: str | int) -> int:
        found = self.tokenizer.token_to_id(token) if isinstance(token, str) else int(token)
        if found is None or self.tokenizer.id_to_token(found) is None:
            raise PromptError(f"image placeholder: expected a token of the vocabulary, found {token!r}")
        return found

    def _refuse_control_tokens(self, messages: list[dict[str, Any]], image_id: int) -> None:
        """A control token in someone's text would end the turn or stand for an image that is not there.

        The parts of a message are tokenized together: a template may join `<ima` and `ge>`.
        """
        control = {**self._control, image_id: self.tokenizer.id_to_token(image_id)}
        for number, message in enumerate(messages):
            text = "".join(part.get("text", "") for part in message["content"])
            for i in self.tokenizer.encode(text, add_special_tokens=False).ids:
                if i in control:
                    raise PromptError(
                        f"message {number} ({message['role']}): expected plain text, found the control token "
                        f"{control[i]}; remove it or write it with spaces"
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
        mark = "\ue000"  # for private use: no template has it
        while mark in text:
            mark += "\ue000"
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


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words for training; here, its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _compile(template: str) -> jinja2.Template:
    # The environment of transformers' `apply_chat_template`; sandboxed, as templates come with checkpoints.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{path}: expected a file, found: {error.strerror}; export the bundle again") from None
    except ValueError:
        raise BundleError(f"{path}: expected UTF-8 text, found other bytes; export the bundle again") from None


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages rebuilt of plain strings and lists: templates never see images or other objects."""
    if not messages:
        raise PromptError("messages: expected at least one, found none; add the question")
    plain = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
            raise PromptError(
                f"message {number}: expected a role and a content (text or parts), found role {role!r} and "
                f"content of type {type(content).__name__}"
            )
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        plain.append({"role": role, "content": [_plain_part(part, number) for part in parts]})
    return plain


def _plain_part(part: Any, number: int) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "image":
        return {"type": "image"}
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise PromptError(f"message {number}: expected parts of type image, or text with a text, found {kind}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"message {number}: expected Unicode text, found a lone surrogate; mend the text") from None
    return {"type": "text", "text": str(text)}
