"""tokenizer.py and chat_template.py against transformers' ids and texts, and the stream against the whole."""

import json
import shutil
import time
import tracemalloc

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import load_json, smollm2_prompts, tiny_path
from tokenizers import decoders, models, pre_tokenizers

from jaxlora.checkpoints import chat_template
from jaxlora.checkpoints.chat_template import ChatTemplate
from jaxlora.checkpoints.gguf import GgufFile
from jaxlora.checkpoints.load import smollm2_path
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import InvalidRequest, ModelInvalid

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_gguf(GgufFile(smollm2_path()).metadata)


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.from_hf(tiny_path("tiny-llama-tied"))


# Ids --------------------------------------------------------------------------------------------------------------


def test_ids_of_the_fixture_prompts(smollm2):
    prompts = smollm2_prompts()
    assert len(prompts) == 20
    for prompt in prompts:
        assert smollm2.encode(prompt.text) == prompt.ids_T.tolist(), prompt.text
        assert smollm2.decode(prompt.ids_T.tolist(), skip_special=False) == prompt.text


@pytest.mark.parametrize("text", ["12", "1²", "½1", "１２", "٤٥", "x٤5", "²³"])
def test_every_numeric_character_stands_alone(smollm2, text):
    """A token never spans two characters when one of them is a digit of any script."""
    alone = [i for character in text for i in smollm2.encode(character)]
    assert smollm2.encode(text) == alone


def test_smollm2_specials(smollm2):
    assert (smollm2.eos_ids, smollm2.bos_id, smollm2.pad_id, smollm2.vocab_size) == ((2,), 1, 2, 49152)
    assert smollm2.encode("<|im_start|>a<|im_end|>") == [1, *smollm2.encode("a"), 2]
    assert smollm2.encode("") == []
    assert smollm2.decode([1, *smollm2.encode("a"), 2]) == "a"
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.token_text(smollm2.encode(" hi")[0]) == " hi"
    assert smollm2.token_bytes(10**9) == smollm2.token_bytes(-1) == b""


def test_the_name_of_a_special_token_can_be_plain_text(smollm2):
    text = "<|im_start|>a<|im_end|>"
    plain = smollm2.encode(text, parse_special=False)
    assert smollm2.decode(plain) == text
    assert not smollm2.special_ids & set(plain)
    assert smollm2.encode("no names", parse_special=False) == smollm2.encode("no names")
    assert smollm2.encode(text) == [1, *smollm2.encode("a"), 2]  # and the other way stays as it was


def test_a_lone_surrogate_is_the_callers_mistake(smollm2):
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        smollm2.encode("a\ud800b")


def test_tiny_tokenizer_equals_transformers(tiny):
    """Added bos, added special and plain tokens, decoding without specials."""
    rows = load_json("templates.json")["encodings"]
    assert len(rows) == 30
    for row in rows:
        assert tiny.encode(row["text"]) == row["ids"]
        assert tiny.encode(row["text"], add_special_tokens=False) == row["ids_bare"]
        assert tiny.decode(row["ids"]) == row["decoded"]
    assert (tiny.bos_id, tiny.eos_ids, tiny.pad_id) == (1, (2, 3), 0)


# Chat -------------------------------------------------------------------------------------------------------------


def test_chats_of_smollm2_equal_transformers(smollm2):
    for chat in load_json("smollm2.json")["chats"]:
        messages = chat["messages"]
        assert smollm2.template.render(messages) == chat["text"]
        assert smollm2.chat(messages) == chat["ids"]
        assert smollm2.template.render(messages, add_generation_prompt=False) == chat["text_without_prompt"]
        continued = smollm2.template.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert continued == chat["text_continued"]


def test_template_dialect_equals_transformers():
    """Blocks and whitespace, namespaces, loop controls, generation tags, tojson, raise_exception."""
    data = load_json("templates.json")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    refused = 0
    for row in data["renders"]:
        template = ChatTemplate(data["templates"][row["template"]], special)

        def render(template=template, row=row):
            return template.render(
                row["messages"], add_generation_prompt=row["add_generation_prompt"], continue_final_message=False
            )

        if row["text"] is None:
            refused += 1
            with pytest.raises(InvalidRequest, match="no system role"):
                render()
        else:
            assert render() == row["text"]
    assert (len(data["renders"]), refused) == (36, 6)


def test_chat_adds_no_second_bos(tiny):
    assert tiny.chat(USER).count(tiny.bos_id) == 1


def test_a_message_that_is_stripped_can_be_continued():
    template = ChatTemplate("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", {})
    messages = [{"role": "assistant", "content": "so far \n"}]
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == "<so far"
    hidden = ChatTemplate("nothing", {})
    with pytest.raises(InvalidRequest, match="does not show the last message"):
        hidden.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert messages == [{"role": "assistant", "content": "so far \n"}]


def test_continue_and_generation_prompt_exclude_each_other(smollm2):
    with pytest.raises(InvalidRequest, match="exclude each other"):
        smollm2.template.render(USER, continue_final_message=True)


def test_no_template(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_path("tiny-llama-tied"), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer.from_hf(folder).chat(USER)
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ bos_token }}"}]
    for value, text in (("x{{ eos_token }}", "x</s>"), (named, "d<s>")):
        settings_file.write_text(json.dumps(settings | {"chat_template": value}))
        assert Tokenizer.from_hf(folder).template.render(USER) == text


BAD_MESSAGES = {
    "none": ([], "at least one"),
    "no content": ([{"role": "user"}], r"messages\[0\] has no content"),
    "no role": ([USER[0], {"content": "x"}], r"messages\[1\] has no role"),
    "a list": ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content must be text, got list"),
}


@pytest.mark.parametrize(("messages", "words"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_messages_are_named(smollm2, messages, words):
    with pytest.raises(InvalidRequest, match=words):
        smollm2.chat(messages)


HOSTILE_TEMPLATES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "subclasses": "{{ [].__class__.__base__.__subclasses__() }}",
    "change a message": "{{ messages.append(1) }}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "long output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "long repetition": "{{ 'x' * 10**9 }}",
    "huge power": "{{ 9 ** (9 ** 9) }}",
    "repetition of a list": "{% set x = [1] * 10**9 %}",
    "division by zero": "{{ 1 // 0 }}",
    "unknown attribute's attribute": "{{ messages[0].nothing.more }}",
    "wrong type": "{{ messages + 1 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}

DOUBLING = "{%% set n = namespace(x='abcdefgh') %%}{%% for i in range(99) %%}{%% set n.x = %s %%}{%% endfor %%}{{ n.x | length }}"
LISTS = "{%% set n = namespace(x=[], y='ab' * 9999) %%}{%% for i in range(9999) %%}{%% set n.x = n.x + [%s] %%}{%% endfor %%}{{ n.x | length }}"
LARGE_TEMPLATES = {
    "doubled by +": DOUBLING % "n.x + n.x",
    "doubled by ~": DOUBLING % "n.x ~ n.x",
    "doubled by *": DOUBLING % "n.x * 2",
    "doubled by %": DOUBLING % "'%s%s' % (n.x, n.x)",
    "doubled by format": DOUBLING % "'{0}{0}'.format(n.x)",
    "doubled by the filter format": DOUBLING % "'%s%s' | format(n.x, n.x)",
    "doubled by join": DOUBLING % "[n.x, n.x] | join",
    "doubled by a separator": DOUBLING % "n.x.join(['', '', ''])",
    "doubled by replace": DOUBLING % "n.x | replace('a', n.x)",
    "doubled by the method replace": DOUBLING % "n.x.replace('a', n.x)",
    "doubled by the method replace of nothing": DOUBLING % "n.x.replace('', n.x)",
    "doubled by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING % "f(n.x)",
    "doubled by a block": DOUBLING.replace(
        "{%% set n.x = %s %%}", "{%% set x %%}{{ n.x }}{{ n.x }}{%% endset %%}{%% set n.x = x %%}"
    )
    % (),
    "doubled by JSON": DOUBLING % "[n.x, n.x] | tojson",
    "doubled by indent": DOUBLING % "('\\n' ~ n.x) | indent(n.x)",
    "wide by %": "{{ ('%999999999d' % 1) | length }}",
    "wide by a value": "{{ ('%*d' % (999999999, 1)) | length }}",
    "wide by a key in brackets": "{{ ('%(a(b)c)999999999d' % {'a(b)c': 1}) | length }}",
    "wide by format": "{{ '{:999999999}'.format(1) | length }}",
    "wide by format of a value": "{{ '{:{w}}'.format(1, w=999999999) | length }}",
    "wide by ljust": "{{ 'x'.ljust(999999999) | length }}",
    "wide by zfill": "{{ 'x'.zfill(999999999) | length }}",
    "wide by tabs": "{{ '\t'.expandtabs(999999999) | length }}",
    "wide by indent": "{{ 'a\nb' | indent(999999999) | length }}",
    "wide by JSON": "{{ [1] | tojson(indent=999999999) | length }}",
    "wide by JSON's separator": "{% set x = 'x' * 999999 %}{{ (range(9999) | list | tojson(separators=(x, x))) | length }}",
    "bytes": "{{ ('x'.encode() * 999999999) | length }}",
    "bytes of a number": "{{ (1).to_bytes(999999999, 'big') | length }}",
    "a number": "{% set n = namespace(x=9**99) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "many batches": "{{ [1] | batch(999999999, 0) | list | length }}",
    "many slices": "{{ [1] | slice(999999999) | list | length }}",
    "sums of lists": "{{ ([range(9999) | list] * 9999) | sum(start=[]) | length }}",
    "nested lists as text": DOUBLING.replace("'abcdefgh'", "[1]").replace("n.x | length", "n.x") % "[n.x, n.x]",
    "nested lists through a filter": DOUBLING.replace("'abcdefgh'", "[1]").replace("n.x | length", "n.x | upper")
    % "[n.x, n.x]",
    "a namespace as text": "{% set n = namespace(y='ab' * 9999) %}{{ [n] * 9999 }}",
    "kept by +": LISTS % "n.y + 'x'",
    "kept by ~": LISTS % "n.y ~ i",
    "kept slices": LISTS % "n.y[1:]",
    "kept pieces": LISTS % "n.y.split('a')",
    "kept upper": LISTS % "n.y | upper",
    "kept lists": LISTS % "range(9999) | list",
    "kept by JSON": LISTS % "n.y | tojson",
    "kept by macros": "{% macro f(y) %}{{ y }}x{% endmacro %}" + LISTS % "f(n.y)",
    "pieces of a macro": "{% macro f() %}{% for i in range(99999) %}{% for j in range(99999) %}{% if 1 %}x{% endif %}{% endfor %}{% endfor %}{% endmacro %}{{ f() | length }}",
}


@pytest.mark.parametrize("source", LARGE_TEMPLATES.values(), ids=LARGE_TEMPLATES)
def test_a_template_that_makes_much_without_writing_it_is_refused_before_it_takes_memory(monkeypatch, source):
    """Python's allocations, a few times the limit of characters; the limit of time is not what ends it."""
    monkeypatch.setattr(chat_template, "MAX_MADE_CHARACTERS", 2**22)
    template = ChatTemplate(source, {})
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="chat template") as caught:
            template.render(USER, add_generation_prompt=True, continue_final_message=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2**22
    assert "longer than" not in caught.value.message


def test_what_a_template_may_make_grows_with_the_messages():
    """As templates do that collect the conversation in a variable."""
    collects = "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x ~ m.content ~ '\n' %}{% endfor %}{{ n.x }}"
    for count, size in ((100, 10_000), (1000, 30)):
        messages = [{"role": "user", "content": "é" * size}] * count
        text = ChatTemplate(collects, {}).render(messages, add_generation_prompt=False, continue_final_message=False)
        assert text == ("é" * size + "\n") * count


def test_what_templates_use_of_jinja_is_all_there():
    uses = {
        "{{ [1, 2] | join(d='-') }}{{ [{'a': 1}] | join(attribute='a') }}{{ ['a', 'b'] | map('upper') | join(', ') }}": "1-21A, B",
        "{{ 'a\nb' | indent(width=2, first=true) }}{{ 'aa' | replace(old='a', new='b', count=1) }}": "  a\n  bba",
        "{{ '%s in 2024: %03d%%' % ('x', 7) }}{{ '%(a)s' % {'a': 1} }}{{ '{} {a:>3}'.format(1, a=2) }}": "x in 2024: 007%11   2",
        "{{ {'b': [1], 'a': 'é'} | tojson(indent=2, sort_keys=true) }}": '{\n  "a": "é",\n  "b": [\n    1\n  ]\n}',
        "{{ messages[::-1] | length ~ messages[0].content[:1] ~ 2 ** 3 ~ ([1] + [2]) }}": "1h8[1, 2]",
        "{{ [[1, 2], [3]] | sum(start=0) if false else [1, 2] | sum }}{{ 'ab' * 2 }}{{ 'x'.ljust(3) }}|": "3ababx  |",
        "{{ [3, 1] | sort | batch(1) | list }}{{ (1, 'a') ~ none ~ true }}{{ range(3) | list | last }}": "[[1], [3]](1, 'a')NoneTrue2",
    }
    for source, text in uses.items():
        hi = [{"role": "user", "content": "hi"}]
        assert ChatTemplate(source, {}).render(hi, add_generation_prompt=False, continue_final_message=False) == text


@pytest.mark.fault("A9")
@pytest.mark.parametrize("source", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES)
def test_hostile_templates_end_soon_and_with_our_error(source):
    start_s = time.monotonic()
    with pytest.raises(InvalidRequest, match="chat template"):
        print(ChatTemplate(source, {}).render(USER, add_generation_prompt=True, continue_final_message=False)[:100])
    assert time.monotonic() - start_s < 6


SILENT_TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = 1 %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "its own clock": "{% set deadline_s = 10**9 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("source", SILENT_TEMPLATES.values(), ids=SILENT_TEMPLATES)
def test_a_template_that_writes_nothing_ends_soon(monkeypatch, source):
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.2)
    start_s = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"longer than 0\.2 seconds"):
        ChatTemplate(source, {}).render(USER, add_generation_prompt=True, continue_final_message=False)
    assert time.monotonic() - start_s < 6


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% unknown %}", "{{ x | nofilter }}", "x" * (2 << 20)])
def test_a_template_that_is_none(source):
    with pytest.raises(ModelInvalid, match="chat template"):
        ChatTemplate(source, {})


# The stream -------------------------------------------------------------------------------------------------------


def streamed(tokenizer, ids, **options):
    stream = tokenizer.detokenizer(**options)
    return [*map(stream.push, ids), stream.flush()]


def test_a_character_comes_whole_with_its_last_token(smollm2):
    ids = smollm2.encode("１")
    assert len(ids) > 1
    assert streamed(smollm2, ids) == [""] * (len(ids) - 1) + ["１", ""]
    assert streamed(smollm2, ids[:1]) == ["", "\ufffd"]


def test_a_special_token_inside_a_character_is_skipped(smollm2):
    first, *rest = smollm2.encode("１")
    ids = [first, 2, *rest]
    assert "".join(streamed(smollm2, ids)) == smollm2.decode(ids) == "１"
    shown = "".join(streamed(smollm2, ids, skip_special=False))
    assert shown == smollm2.decode(ids, skip_special=False)
    assert "<|im_end|>" in shown


# SmolLM2 has no token for these bytes, so text loses them, in transformers too: a few control characters, and the
# first byte of planes 4 to 11 of Unicode, where nothing is assigned.
LOST = "\x04\x06\x13\x14\x16\x1d"
KEPT = st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters=LOST), max_size=40)


def test_the_bytes_smollm2_has_no_token_for(smollm2):
    kept = {byte for byte in range(256) if bytes([byte]) in smollm2._bytes}
    lost = set(range(256)) - kept
    assert {byte for byte in lost if byte < 0x80} == set(LOST.encode())
    assert {byte for byte in lost if byte >= 0x80} == {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    assert smollm2.encode(LOST) == []


@settings(max_examples=200)
@given(text=KEPT)
def test_text_survives_encode_stream_and_decode(smollm2, text):
    ids = smollm2.encode(text)
    assert smollm2.decode(ids, skip_special=False) == text
    assert "".join(streamed(smollm2, ids, skip_special=False)) == text


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=30), skip=st.booleans())
def test_any_tokens_stream_to_what_the_library_decodes(smollm2, ids, skip):
    """Random tokens: broken characters everywhere.  The library's own decoder is the reference."""
    text = smollm2._engine.decode(ids, skip_special_tokens=skip)
    assert smollm2.decode(ids, skip_special=skip) == text
    assert "".join(streamed(smollm2, ids, skip_special=skip)) == text
    assert not any("\ufffd" in part for part in streamed(smollm2, ids, skip_special=skip)) or "\ufffd" in text


@pytest.fixture
def pieces(tmp_path):
    """A tokenizer.json of the SentencePiece kind: a mark for space, bytes as <0xNN>, the first space dropped."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "<0xZZ>"]
    engine = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    return tmp_path


def test_pieces_with_byte_fallback(pieces):
    tokenizer = Tokenizer.from_hf(pieces)
    assert tokenizer.eos_ids == (2,)
    for text in ("a a", "aé１a", " a", "🙂", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer._engine.decode(ids)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(tokenizer.encode("aé a")) == "aé a"
    assert tokenizer.token_bytes(259 + 3) == b"<0xZZ>"
    assert tokenizer.token_bytes(3 + 0xE9) == b"\xe9"


# What is refused --------------------------------------------------------------------------------------------------

GGML = "tokenizer.ggml."


def small_gguf(**changes):
    """Metadata of a byte-level tokenizer with the 256 byte tokens, one merge and two specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    meta = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*alphabet, "ab", "<s>", "</s>"],
        "token_type": [1] * 257 + [3, 3],
        "merges": ["a b"],
        "bos_token_id": 257,
        "eos_token_id": 258,
    } | changes
    return {GGML + key: value for key, value in meta.items() if value is not None}


def test_small_gguf_adds_what_its_flags_say():
    def ids(**changes):
        return Tokenizer.from_gguf(small_gguf(**changes)).encode("ab")

    assert ids() == [256]
    assert ids(add_bos_token=True) == [257, 256]
    assert ids(add_bos_token=True, add_eos_token=True) == [257, 256, 258]
    assert ids(pre="qwen2") == [256]
    assert ids(pre="llama-bpe") == [257, 256]  # Llama 3 adds bos unless told otherwise
    assert ids(pre="llama-bpe", add_bos_token=False) == [256]


WORDS = {
    "smollm": ["a", "1", "2", "3", "4", " b"],
    "qwen2": ["a", "1", "2", "3", "4", " b"],
    "llama-bpe": ["a", "123", "4", " b"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_how_digits_are_cut(pre):
    engine = Tokenizer.from_gguf(small_gguf(pre=pre))._engine
    words = [word.replace("Ġ", " ") for word, _ in engine.pre_tokenizer.pre_tokenize_str("a1234 b")]
    assert words == WORDS[pre]


REFUSED_GGUF = {
    "spm": ({"model": "llama"}, "model 'llama' is not supported"),
    "pre": ({"pre": "deepseek-llm"}, "pre 'deepseek-llm' is not supported; supported: smollm"),
    "no pre": ({"pre": None}, "pre None"),
    "no tokens": ({"tokens": None}, "tokens must be"),
    "no merges": ({"merges": None}, "merges must be"),
    "a token twice": ({"tokens": ["a"] * 259}, "a token twice"),
    "types too short": ({"token_type": [1]}, "token_type must be 259"),
    "types are text": ({"token_type": "1" * 259}, "token_type must be 259"),
    "merge of three": ({"merges": ["a b c"]}, "merges has 'a b c'"),
    "merge of strangers": ({"merges": ["Ω Ω"]}, "merges does not fit"),
    "eos outside": ({"eos_token_id": 259}, "eos_token_id must be a token id below 259"),
    "no eos": ({"eos_token_id": None}, "no end-of-sequence"),
    "bos asked, not named": ({"add_bos_token": True, "bos_token_id": None}, "no bos_token_id"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED_GGUF.values(), ids=REFUSED_GGUF)
def test_gguf_refused_by_name(changes, words):
    with pytest.raises(ModelInvalid, match=words):
        Tokenizer.from_gguf(small_gguf(**changes))


def test_hf_refused_by_name(tmp_path):
    with pytest.raises(ModelInvalid, match=r"no tokenizer\.json"):
        Tokenizer.from_hf(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ModelInvalid, match="only a SentencePiece file"):
        Tokenizer.from_hf(tmp_path)
    for content in ("{}", "[" * 100_000, "\0"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelInvalid, match="is not a tokenizer"):
            Tokenizer.from_hf(tmp_path)


def test_vocab_and_merges_alone_give_the_ids_of_transformers(tmp_path):
    """Older checkpoints have no tokenizer.json; how their family splits text (Qwen2: digits one by one) is not in the files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "he", "12", "<|endoftext|>"])}
    models.BPE(vocabulary, [("h", "e"), ("1", "2")]).save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.from_hf(tmp_path)
    text = "he 12<|endoftext|>"
    from transformers import AutoTokenizer

    assert ours.encode(text) == AutoTokenizer.from_pretrained(str(tmp_path)).encode(text)
    assert vocabulary["he"] in ours.encode(text)
    assert vocabulary["12"] not in ours.encode(text)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nnobody here\n")
    with pytest.raises(ModelInvalid, match=r"transformers cannot make one of its vocab\.json"):
        Tokenizer.from_hf(tmp_path)


REFUSED_SETTINGS = {
    "strange eos": ("tokenizer_config.json", {"eos_token": "<nobody>"}, "eos_token '<nobody>' is not in"),
    "no bos after all": ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token = False"),
    "template is a number": ("tokenizer_config.json", {"chat_template": 3}, "chat_template must be text"),
    "eos list with text": ("generation_config.json", {"eos_token_id": [2, "x"]}, "eos_token_id must be"),
    "eos outside": ("generation_config.json", {"eos_token_id": 4000}, "eos token id 4000 is not in"),
}


@pytest.mark.parametrize(("name", "change", "words"), REFUSED_SETTINGS.values(), ids=REFUSED_SETTINGS)
def test_hf_settings_refused_by_name(tmp_path, name, change, words):
    folder = tmp_path / "base"
    shutil.copytree(tiny_path("tiny-llama-tied"), folder)
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    with pytest.raises(ModelInvalid, match=words):
        Tokenizer.from_hf(folder)


def test_an_unknown_decoder_is_refused(pieces):
    engine = tokenizers.Tokenizer.from_file(str(pieces / "tokenizer.json"))
    engine.decoder = decoders.WordPiece()
    engine.save(str(pieces / "tokenizer.json"))
    with pytest.raises(ModelInvalid, match="decoder WordPiece is not supported"):
        Tokenizer.from_hf(pieces)
