import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from flashvlm.errors import BundleError, PromptError
from flashvlm.text.processor import TextProcessor

IMAGE = {"image": "<image>"}

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]

LLAVA = """\
{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}
{# Render all images first #}
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
{# Render all text next #}
{% if message['role'] != 'assistant' %}
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}
{% else %}
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""  # noqa: E501

WITH_BOS = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'narrator' %}{{ raise_exception('no narrators here') }}{% endif %}
    {{- '[' + message['role'] | tojson + ']\n' }}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'image' %}{{ '<image>' }}{% continue %}{% endif %}
        {{- part['text'] | trim }}
    {%- endfor %}
    {{- eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}
"""

CORPUS = [
    "USER: What is on the sofa? ASSISTANT: A cat and two dogs sleep on the red sofa.",
    "the quick brown fox jumps over the lazy dog; naïve café, Grüße, 12345 + 67890",
    "How many people are in the picture? There are three people in this picture.\nOne of them wears a hat.",
] * 5

STYLES = ["bytelevel", "llama", "metaspace"]

TEXTS = [
    "What is on the sofa?",
    "A",
    " ",
    "  leading and trailing  ",
    "line one\nline two\n\n\tthree",
    "naïve café, Grüße",
    "日本語のテキスト、中文",
    "emoji 😀👩‍👩‍👧 and 🇪🇺 flags",
    "a  b   c    d",
    "<not a token> & \"quotes\" 'too' \\ {{ braces }} {% raw %}",
    "ASSISTANT: USER:",
    "e\u0301 combining, \u00a0nbsp, \u200bzero width",
]


def train(style):
    """A small BPE tokenizer.

    "bytelevel" is as in GPT-2 and Qwen; "llama" has byte fallback and marks spaces in the normalizer (Llama's
    older tokenizer.json), "metaspace" marks them in the pre-tokenizer (what transformers 5 saves).
    """
    if style == "bytelevel":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        )
        # Training goes word by word; encoding does not, as in Llama's tokenizer.json.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + byte_tokens)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if style != "bytelevel":
        tokenizer.pre_tokenizer = None
        if style == "metaspace":
            tokenizer.normalizer = None
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        state = json.loads(tokenizer.to_str())  # byte tokens are ordinary entries of the vocabulary
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def save(folder, style, template):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=train(style),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=template,
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=[(s, t) for s in STYLES for t in ("llava", "with_bos")],
    ids="-".join,
)
def folder(request, tmp_path_factory):
    style, template = request.param
    return save(tmp_path_factory.mktemp(style), style, LLAVA if template == "llava" else WITH_BOS)


@pytest.fixture(scope="module")
def processor(folder):
    return TextProcessor.from_folder(folder)


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' own processor for the same folder."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    # One patch an image: transformers' placeholder expands to exactly one id, as ours does.
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=28,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversations():
    for text in TEXTS:
        if text.strip():
            yield [user(None, text)]
            yield [user(text)]
            yield [user(None, "first: " + text), assistant("yes. " + text), user(text)]
    yield [user(None, None, "Which of the two?"), assistant("None."), user(None, "And of the three?")]
    yield [user("before ", None, " after")]
    yield [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user(None, "Hello")]


def test_equals_transformers(processor, reference):
    import PIL.Image

    image = PIL.Image.new("RGB", (28, 28))
    for messages in conversations():
        for generate in (True, False):
            want = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            assert processor.render(messages, generate) == want
        shown = [
            {**m, "content": [{**p, "image": image} if p["type"] == "image" else p for p in m["content"]]}
            for m in messages
        ]
        want = reference.apply_chat_template(
            shown, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="np"
        )["input_ids"][0]
        prompt = processor.encode(messages, IMAGE)
        assert prompt.input_ids.dtype == np.int64
        np.testing.assert_array_equal(prompt.input_ids, want)
        assert np.count_nonzero(prompt.input_ids == reference.tokenizer.bos_token_id) == 1
        for skip in (True, False):
            assert processor.decode(want, skip) == reference.decode(want, skip_special_tokens=skip)


def test_question_mask_marks_the_last_question_only(processor):
    for messages in conversations():
        prompt = processor.encode(messages, {"image": processor.tokenizer.token_to_id("<image>")})
        ids, mask = prompt.input_ids, prompt.question_mask
        text = "".join(p.get("text", "") for p in messages[-1]["content"])
        assert mask.dtype == bool
        # Decoded on its own, the question is the user's text but for spaces at its borders.
        got = processor.decode(ids[mask])
        assert "".join(got.split()) == "".join(text.split()), messages
        last = np.flatnonzero(mask)
        before = processor.decode(ids[: last[0]], skip_special=False)
        after = processor.decode(ids[last[-1] + 1 :], skip_special=False)
        assert before.rstrip().endswith((":", "]", ">"))
        assert after.strip().lower().replace("</s>", "").strip() in ("assistant:", "[assistant]")
        # text_mask: everything but BOS, turn markers and placeholders
        control = [processor.tokenizer.token_to_id(t) for t in SPECIAL[1:]]
        np.testing.assert_array_equal(prompt.text_mask, ~np.isin(ids, control))
        assert not (mask & ~prompt.text_mask).any()


def test_a_question_that_is_part_of_the_template(processor):
    # "A", ":" and "ASSISTANT:" also occur after the question.
    for text in ("A", ":", "ASSISTANT:", "USER", "[", "assistant"):
        messages = [user(None, text), assistant(text), user(text)]
        prompt = processor.encode(messages, IMAGE)
        assert processor.decode(prompt.input_ids[prompt.question_mask]).strip() == text


def test_parts_around_an_image(processor):
    prompt = processor.encode([user("left", None, "right")], IMAGE)
    image = prompt.input_ids == processor.tokenizer.token_to_id("<image>")
    assert image.sum() == 1
    assert not prompt.question_mask[image].any()
    assert processor.decode(prompt.input_ids[prompt.question_mask]).replace(" ", "") == "leftright"


def test_string_content_is_text(processor):
    plain = [{"role": "user", "content": "What?"}]
    assert processor.render(plain) == processor.render([user("What?")])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one"),
        ([user(None, "")], "empty prompt"),
        ([user(None, " \n\t\u3000")], "empty prompt"),
        ([user(None)], "empty prompt"),
        ([user("x"), assistant("y"), user("  ")], "empty prompt"),
        ([assistant("y")], "one of the user"),
        ([user("what is <image> for?")], r"message 0 \(user\): .* control token <image>"),
        ([user("what is </s> for?")], "control token </s>"),
        ([user("<ima", "ge>")], "control token <image>"),
        ([user("x"), assistant("<s>"), user("y")], r"message 1 \(assistant\): .* control token <s>"),
        ([{"role": "user"}], "message 0: expected a role and a content"),
        ([{"role": 1, "content": "x"}], "message 0: expected a role"),
        ([{"role": "user", "content": 5}], "content of type int"),
        ([{"role": "user", "content": [{"type": "video"}]}], "found video"),
        ([{"role": "user", "content": [{"type": "text"}]}], "found text"),
        ([{"role": "user", "content": ["hello"]}], "found str"),
        ([user("lone \ud83d surrogate")], "lone surrogate"),
    ],
)
def test_bad_messages_are_refused(processor, messages, words):
    with pytest.raises(PromptError, match=words) as refusal:
        processor.encode(messages, IMAGE)
    assert "\n" not in str(refusal.value)


def test_unknown_placeholder_is_refused(processor):
    for token in ("<video>", 10**6):
        with pytest.raises(PromptError, match="image placeholder: expected a token of the vocabulary"):
            processor.encode([user("x")], {"image": token})


def test_a_template_that_drops_images_or_questions_is_refused(processor):
    def having(template):
        return TextProcessor(processor.tokenizer, template, processor.named_tokens)

    with pytest.raises(PromptError, match=r"expected 2 image placeholders .* found 0"):
        having("{{ messages[0].content[-1].text }}").encode([user(None, None, "x")], IMAGE)
    with pytest.raises(PromptError, match=r"expected 0 image placeholders .* found 1"):
        having("<image>{{ messages[0].content[-1].text }}").encode([user("x")], IMAGE)
    for template in (
        "nothing",
        "{{ messages[0].content[0].text * 2 }}",
        "{{ messages[0].content[0].text | length }}",
    ):
        with pytest.raises(PromptError, match="renders the last user message once"):
            having(template).encode([user("x")], IMAGE)
    for template in ("{{ raise_exception('not today') }}", "{{ 'a' + 1 }}", "{{ messages.append(1) }}"):
        with pytest.raises(PromptError, match="the chat template refuses"):
            having(template).encode([user("x")], IMAGE)
    assert having("{{ strftime_now('%Y') }} {{ messages[0].content[0].text }}").render([user("x")])[:2] == "20"


def test_templates_see_plain_data_only(processor):
    seen = TextProcessor(processor.tokenizer, "{{ messages | tojson }}", {})
    message = {
        "role": "user",
        "content": [{"type": "image", "image": object(), "url": "x"}, {"type": "text", "text": "<é>"}],
    }
    assert json.loads(seen.render([message]))[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "<é>"},
    ]
    assert "<é>" in seen.render([message])


@pytest.mark.parametrize("skip", [True, False])
def test_stream_joined_is_decode(processor, skip):
    for text in [*TEXTS, "".join(TEXTS), "</s>" + TEXTS[0] + "<pad> x</s> end"]:
        ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
        stream = processor.stream(skip)
        pieces = [stream.push(i) for i in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == processor.decode(ids, skip)
        assert stream.flush() == ""


@pytest.fixture(scope="module", params=STYLES)
def bare(request):
    return TextProcessor(train(request.param), "", {})


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_stream_of_any_text(bare, text):
    processor = bare
    ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
    stream = processor.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == processor.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_emits_words_as_they_come(processor):
    ids = processor.tokenizer.encode("the cat 😀", add_special_tokens=False).ids
    stream = processor.stream()
    pieces = [stream.push(i) for i in ids]
    assert sum(bool(p) for p in pieces) >= 3
    assert pieces[-1].endswith("😀")


def test_stream_of_bytes_that_never_become_text(processor):
    first = processor.tokenizer.encode("😀", add_special_tokens=False).ids[-4]
    stream = processor.stream()
    pieces = [stream.push(first) for _ in range(50)]
    assert any(pieces)  # it neither waits for ever nor grows for ever
    assert set("".join(pieces) + stream.flush()) == {"\ufffd"}
    assert [stream.push(10**6), stream.flush()] == ["", ""]  # an id of the padding


def test_skipped_tokens_do_not_break_a_character(processor):
    eos = processor.tokenizer.token_to_id("</s>")
    word, face = (processor.tokenizer.encode(t, add_special_tokens=False).ids for t in ("a cat", "a 😀"))
    stream = processor.stream()
    text = "".join(stream.push(i) for i in [*word, *[eos] * 20, *face]) + stream.flush()
    assert text == processor.decode([*word, *face])
    assert "\ufffd" not in text


def test_damaged_folders_are_refused(processor, folder, tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for broken in names:
        for content in (None, b"\xff\xfe", b"{% if %}" if broken.endswith("jinja") else b"[]"):
            for name in names:
                (tmp_path / name).unlink(missing_ok=True)
                if name != broken:
                    (tmp_path / name).write_bytes((folder / name).read_bytes())
                elif content is not None:
                    (tmp_path / name).write_bytes(content)
            with pytest.raises(BundleError, match=broken):
                TextProcessor.from_folder(tmp_path)


def test_stored_truncation_and_padding_do_not_apply(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    messages = [user(None, TEXTS[0])]
    got, want = (TextProcessor.from_folder(f).encode(messages, IMAGE).input_ids for f in (tmp_path, folder))
    np.testing.assert_array_equal(got, want)
