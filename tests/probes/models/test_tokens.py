"""Tokens that count: the completion's own, never the first of a sequence, never a special one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pico
import pytest
from tokenizers import AddedToken, pre_tokenizers, processors

from probes.data.examples import Example, Message
from probes.data.reading import read
from probes.directions.plan import plan
from probes.models.completions import completions_of
from probes.models.templates import problems_of_rendering, with_system_turn
from probes.models.tokens import Tokens, choose, plain_ids, rendered, templated, tokenise
from vectors.errors import ExampleError, ModelError, UsageError

BOS_ID, START_ID, END_ID = 1, 3, 4
STRIPPING = pico.CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
LEFT_STRIPPING = pico.CHAT_TEMPLATE.replace("message['content']", "message['content'].lstrip('\\n')")


def build(template: str | None = pico.CHAT_TEMPLATE, *, begins: bool = True) -> Any:
    """The pico tokenizer, with another template or none; `begins` tells whether it writes <|bos|> before a text."""
    built = pico.tokenizer()
    built.chat_template = template
    if not begins:
        built.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return built


BEGINS, BARE = build(), build(begins=False)
BASE = build(None)


def words(found: Tokens, tokenizer: Any = BEGINS) -> str:
    """The text of the tokens that count."""
    text: str = tokenizer.decode([found.ids[j] for j in found.counted])
    return text


def one(example: Example, which: str | int = "completion", tokenizer: Any = BEGINS) -> Tokens:
    (found,) = tokenise([example], tokenizer, which)
    assert found.counted == sorted(set(found.counted))
    assert 0 not in found.counted
    assert not {found.ids[j] for j in found.counted} & set(tokenizer.all_special_ids)
    return found


def complaints(examples: Sequence[Example], tokenizer: Any = BEGINS, **options: Any) -> tuple[tuple[str, ...], str]:
    with pytest.raises(ExampleError) as caught:
        tokenise(examples, tokenizer, **options)
    return caught.value.problems, caught.value.hint


# The option


@pytest.mark.parametrize("name", ["completion", "last", "all"])
def test_names_are_taken_as_they_are(name: str) -> None:
    assert choose(name) == name


@pytest.mark.parametrize(("text", "index"), [("0", 0), ("-1", -1), ("12", 12)])
def test_numbers_are_indices(text: str, index: int) -> None:
    assert choose(text) == index


@pytest.mark.parametrize("text", ["", "first", "1.5", "0-3"])
def test_other_words_are_a_wrong_use(text: str) -> None:
    with pytest.raises(UsageError, match="there are no tokens"):
        choose(text)


# What never counts


def test_after_a_special_beginning_every_token_of_a_text_counts() -> None:
    found = one(Example("warm"))
    assert found.ids[0] == BOS_ID
    assert words(found) == "warm"


def test_without_a_special_beginning_the_first_token_of_a_text_does_not_count() -> None:
    found = one(Example("warm"), tokenizer=BARE)
    assert BARE.decode(found.ids) == "warm"
    assert words(found) == "arm"


def test_the_first_token_of_a_completion_counts_where_a_prompt_precedes_it() -> None:
    assert words(one(Example("warm", "a"), tokenizer=build(None, begins=False))) == "warm"


@pytest.mark.parametrize("which", ["all", "completion"])
@pytest.mark.parametrize("special", pico.SPECIAL)
def test_special_tokens_in_a_text_do_not_count(special: str, which: str) -> None:
    assert words(one(Example(f"ab{special}cd"), which)) == "abcd"


def test_tokens_that_are_only_marked_special_do_not_count_either() -> None:
    tokenizer = build()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|header|>", special=True, normalized=False)])
    assert "<|header|>" not in tokenizer.all_special_tokens
    assert words(one(Example("ab<|header|>cd"), "all", tokenizer), tokenizer) == "abcd"
    assert templated([Example("c", "<|header|>user")], tokenizer)[0] is False


def test_padding_is_never_written() -> None:
    found = tokenise([Example("a"), Example("a much longer text")], BEGINS)
    assert all(BEGINS.pad_token_id not in each.ids for each in found)
    assert len(found[0].ids) < len(found[1].ids)


# Which tokens


def test_by_default_the_completion_counts_and_the_prompt_does_not() -> None:
    assert words(one(Example(" is warm", "The sea"), tokenizer=BASE)) == " is warm"


def test_all_counts_the_prompt_too() -> None:
    assert words(one(Example(" is warm", "The sea"), "all", BASE)) == "The sea is warm"


def test_last_counts_the_last_token_of_the_completion() -> None:
    assert words(one(Example(" is warm", "The sea"), "last", BASE)) == " warm"
    in_chat = one(Example("is warm", "The sea"), "last")
    assert words(in_chat) == " warm"
    assert in_chat.counted[0] < len(in_chat.ids) - 1  # the template's own end follows


@pytest.mark.parametrize(("index", "expected"), [(0, " is"), (1, " warm"), (2, " and"), (-1, " and"), (-3, " is")])
def test_an_index_counts_from_either_end_of_the_completion(index: int, expected: str) -> None:
    assert words(one(Example(" is warm and", "The sea"), index, BASE)) == expected


@pytest.mark.parametrize("index", [3, -4, 100])
def test_an_index_beyond_the_completion_is_an_error(index: int) -> None:
    found, _ = complaints([Example(" is warm and", "The sea", origin="file:3")], BASE, which=index)
    assert found == (f"file:3: the completion has no token {index} (it has 3)",)


@pytest.mark.parametrize(("prompt", "completion"), [("it is ", "warm"), ("it is w", "arm")])
def test_a_token_across_the_border_belongs_to_the_completion(prompt: str, completion: str) -> None:
    assert words(one(Example(completion, prompt), tokenizer=BASE)) == " warm"


def test_characters_of_several_bytes_count_with_all_their_tokens() -> None:
    assert words(one(Example("深い海", "日本"), tokenizer=BASE)) == "深い海"


def test_nothing_to_count_is_an_error_that_names_every_line() -> None:
    examples = [Example(pico.PAD, "Hi", origin="f:1"), Example("fine", "Hi", origin="f:2"), Example("a", origin="f:3")]
    found, hint = complaints(examples, build(None, begins=False))
    assert found == tuple(f"f:{n}: the completion has no token that counts (it has 0)" for n in (1, 3))
    assert "never count" in hint


# Chat templates


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Say warm", "warm"),
        ("user", "user"),
        ("assistant", "assistant\nuser"),
        ("warm", "m"),
        ("\n", "\nwarm\n\n"),
        ("  x  ", "  warm "),
        ("tell", "a 'quoted' {{ thing }} <b>"),
        ("tell", "\x02completion"),
    ],
)
@pytest.mark.parametrize("template", [pico.CHAT_TEMPLATE, STRIPPING, LEFT_STRIPPING])
def test_a_template_places_the_completion_exactly(template: str, prompt: str, completion: str) -> None:
    tokenizer = build(template)
    found = one(Example(completion, prompt), tokenizer=tokenizer)
    shown = {STRIPPING: str.strip, LEFT_STRIPPING: lambda s: s.lstrip("\n")}.get(template, str)(completion)
    assert words(found, tokenizer) == shown
    # The completion is the last turn: only the template's end follows it.
    assert tokenizer.decode(found.ids[found.counted[-1] + 1 :]) == "<|im_end|>\n"
    assert found.ids.count(BOS_ID) == 1


def test_the_tokens_are_those_of_the_rendered_conversation() -> None:
    turns = (Message("system", "Be kind."), Message("user", "Hi"))
    found = one(Example("Hello", turns))
    messages = [*(turn._asdict() for turn in turns), {"role": "assistant", "content": "Hello"}]
    assert found.ids == BEGINS.apply_chat_template(messages, return_dict=False)


def test_a_prompt_is_the_turn_of_a_user_with_a_chat_model_and_plain_text_with_a_base_model() -> None:
    example = Example("Hello", "Hi")
    assert BEGINS.decode(one(example).ids) == (
        "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )
    assert BASE.decode(one(example, tokenizer=BASE).ids) == "<|bos|>HiHello"
    assert templated([example], BEGINS)[0] is True
    assert templated([example], BASE)[0] is False
    assert "no chat template" in templated([example], BASE)[1]


def test_texts_and_conversations_need_no_note() -> None:
    assert templated([Example("text"), Example("Hello", (Message("user", "Hi"),))], BEGINS) == (False, "")


def test_the_completion_may_be_said_by_anyone() -> None:
    found = one(Example("Hi there", (), "user"))
    assert BEGINS.decode(found.ids) == "<|bos|><|im_start|>user\nHi there<|im_end|>\n"
    assert words(found) == "Hi there"


def test_prompts_that_are_rendered_already_are_taken_as_they_are() -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    found = one(Example("Hello", prompt))
    assert BEGINS.decode(found.ids) == f"<|bos|>{prompt}Hello"
    assert words(found) == "Hello"
    assert "<|im_start|> already" in templated([Example("Hello", prompt)], BEGINS)[1]


def test_one_prompt_about_a_special_token_does_not_turn_the_template_off_for_all() -> None:
    asked = Example("It ends a text.", "What does <|eos|> mean?", origin="f:7")
    (found,), hint = complaints([Example("Hello", "Hi", origin="f:6"), asked])
    assert found.startswith("1 of 2 prompts hold a special token (the first: <|eos|> in f:7)")
    assert "the others none (the first: f:6)" in found
    assert "all of them or none" in hint
    assert templated([asked], BEGINS)[0] is False


def test_prompts_to_answer_follow_the_rules_of_examples() -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert BEGINS.decode(rendered(["Hi", "warm"], BEGINS)[0]) == "<|bos|>" + turn
    for text in (turn, "<|bos|>" + turn):  # as they are, and begun once
        assert [BEGINS.decode(ids) for ids in rendered([text], BEGINS)] == ["<|bos|>" + turn]
    assert [BASE.decode(ids) for ids in rendered(["Hi"], BASE)] == ["<|bos|>Hi"]
    with pytest.raises(ExampleError, match=r"1 of 2 prompts hold a special token .* in prompt 2"):
        rendered(["Hi", turn], BEGINS)


@pytest.mark.parametrize("context", ["<|bos|>user Hi ", None])
def test_a_beginning_that_is_written_already_is_not_written_twice(context: str | None) -> None:
    completion = "Hello" if context else "<|bos|>Hello"
    found = one(Example(completion, context))
    assert found.ids.count(BOS_ID) == 1
    assert words(found) == "Hello"


def test_conversations_without_a_chat_template_are_an_error() -> None:
    found, _ = complaints([Example("a", (Message("user", "b"),), origin=f"f:{n}") for n in (1, 2)], BASE)
    assert found == tuple(f"f:{n}: messages need a chat template, and the model has none" for n in (1, 2))


def test_a_template_that_refuses_a_role_is_reported_with_its_reason() -> None:
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = build(strict + "{{ m.content }}{% endfor %}")
    found, _ = complaints([Example("a", (Message("system", "b"),), origin="f:1")], tokenizer)
    assert found == ("f:1: the chat template refuses the messages: no system role",)


@pytest.mark.parametrize("shown", ["messages[0].content", "m.content | upper", "'nothing'"])
def test_a_template_that_does_not_show_the_completion_is_an_error_and_not_a_guess(shown: str) -> None:
    tokenizer = build("{% for m in messages %}{{ " + shown + " }};{% endfor %}")
    found, _ = complaints([Example("warm", "Say", origin="f:1")], tokenizer)
    assert found == ("f:1: the chat template changes the text of the last message",)


# Length


def test_examples_beyond_the_context_are_all_reported_with_their_lengths() -> None:
    examples = [Example("x" * n, origin=f"f:{n}") for n in (5, 20, 10, 30)]
    found, hint = complaints(examples, longest=10)
    assert found == (
        "longer than the model's context of 10 tokens: f:20 (21 tokens), f:10 (11 tokens), f:30 (31 tokens)",
    )
    assert "--truncate" in hint
    found, _ = complaints([Example("x" * 20, origin="f")] * 9, longest=10)
    assert found[0].endswith(" and 4 more")


def test_an_example_that_just_fits_is_no_error() -> None:
    assert len(tokenise([Example("x" * 9)], BEGINS, longest=10)[0].ids) == 10


def test_truncating_cuts_the_end() -> None:
    (found,) = tokenise([Example("abcdefgh", "uvw")], BASE, longest=8, truncate=True)
    assert BASE.decode(found.ids) == "<|bos|>uvwabcd"
    assert words(found, BASE) == "abcd"


def test_an_example_without_a_completion_after_truncating_is_an_error() -> None:
    found, _ = complaints([Example("abc", "uvwxyz", origin="f:1")], BASE, longest=6, truncate=True)
    assert found == ("f:1: the completion has no token that counts (it has 0)",)


def test_a_prompt_beyond_the_context_is_reported_once() -> None:
    found, _ = complaints([Example("abc", "uvwxyz", origin="f:1")], BASE, longest=6)
    assert found == ("longer than the model's context of 6 tokens: f:1 (10 tokens)",)


# Tokenizers


def test_a_tokenizer_without_offsets_is_a_clear_error() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow does not say which characters"):
        tokenise([Example("a")], Slow())


def test_the_pretokenizer_may_add_a_space() -> None:
    tokenizer = build(None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert words(one(Example(" is warm", "The sea"), tokenizer=tokenizer)) == " is warm"


# Beginnings and ends


def build_ending(template: str | None = None) -> Any:
    """The pico tokenizer, made to write <|eos|> behind every plain text too, as several tokenizers do."""
    built = build(template)
    built.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{pico.BOS} $A {pico.EOS}", special_tokens=[(pico.BOS, 1), (pico.EOS, 2)]
            ),
        ]
    )
    return built


def test_no_plain_prompt_or_example_ends_in_an_end_token_that_only_the_tokenizer_writes() -> None:
    tokenizer = build_ending()
    assert tokenizer("Hi")["input_ids"][-1] == tokenizer.eos_token_id
    assert [tokenizer.decode(ids) for ids in rendered(["Hi"], tokenizer)] == ["<|bos|>Hi"]
    assert tokenizer.decode(one(Example(" there", "Hi"), tokenizer=tokenizer).ids) == "<|bos|>Hi there"
    assert tokenizer.decode(one(Example("Hi there"), tokenizer=tokenizer).ids) == "<|bos|>Hi there"
    assert [tokenizer.decode(ids) for ids in plain_ids(["Hi", "<|bos|>Hi"], tokenizer)] == ["<|bos|>Hi"] * 2


def test_a_completion_that_is_trained_on_has_one_end_token() -> None:
    for tokenizer in (build_ending(), build(None)):
        for text in (" there", " there<|eos|>"):
            (completion,) = completions_of([Example(text, "Hi")], tokenizer, None)
            assert tokenizer.decode(completion.ids) == "<|bos|>Hi there<|eos|>"


def test_the_end_that_a_template_writes_after_a_line_break_belongs_to_the_completion() -> None:
    tokenizer = build(pico.CHAT_TEMPLATE.replace("{{ message['content'] }}<", "{{ message['content'] }}\n<"))
    (completion,) = completions_of([Example("Hello", "Hi")], tokenizer, None)
    assert tokenizer.decode(completion.completion_ids) == "Hello\n<|im_end|>"


def test_rendered_prompts_begin_as_the_template_begins_a_conversation() -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    bare = build(pico.CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    assert [bare.decode(ids) for ids in rendered([turn, "<|bos|>" + turn], bare)] == [turn, "<|bos|>" + turn]
    assert bare.decode(one(Example("Hello", turn), tokenizer=bare).ids) == turn + "Hello"


# What a template leaves out

DROPPING = pico.CHAT_TEMPLATE.replace(
    "<|im_start|>{{", "{% if message['role'] != 'system' %}<|im_start|>{{", 1
).replace("<|im_end|>\n", "<|im_end|>\n{% endif %}", 1)


def test_a_system_turn_that_the_template_drops_is_named_with_figures() -> None:
    turns = (Message("system", "Be kind."), Message("user", "Be kind. Hi"))
    examples = [Example("Hello", turns, origin="f:1"), Example("Hello", turns[1:], origin="f:2")]
    (found,) = problems_of_rendering(examples, build(DROPPING), True)
    assert found == (
        "the model's chat template leaves out what the system says, in 1 of 2 conversations (the first: f:1)"
    )
    assert problems_of_rendering(examples, BEGINS, True) == []
    with pytest.warns(UserWarning, match="leaves out what the system says, in 1 of 2"):
        completions_of(examples, build(DROPPING), None)


def test_a_turn_whose_text_the_template_changes_is_named_too() -> None:
    thoughtless = build(pico.CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]"))
    turns = (Message("user", "Hi"), Message("assistant", "<think>hm</think>Hello"), Message("user", "Bye"))
    (found,) = problems_of_rendering([Example("Bye", turns)], thoughtless, True)
    assert "what the assistant says, in 1 of 1 conversations" in found


def test_a_teachers_prompt_that_the_template_drops_is_refused() -> None:
    assert "Be kind" in with_system_turn("Be kind.", (Message("user", "Hi"),), BEGINS)
    with pytest.raises(
        UsageError, match="leaves out the system turn: the 8 characters of the prompt would change nothing"
    ):
        with_system_turn("Be kind.", (Message("user", "Be kind."),), build(DROPPING))


def test_prompts_that_the_template_refuses_or_drops_are_named() -> None:
    strict = build("{{ raise_exception('no users') }}")
    with pytest.raises(ExampleError, match="prompt 1: the chat template refuses the messages: no users"):
        rendered(["Hi"], strict)
    with pytest.raises(ExampleError, match="prompt 1: the model's chat template leaves out what the user says"):
        rendered(["Hi"], build("<|im_start|>assistant\n"))


def test_classes_that_differ_in_a_dropped_turn_alone_are_no_contrast() -> None:
    lines = [
        [{"messages": [{"role": "system", "content": mood}, {"role": "user", "content": str(n)},
                       {"role": "assistant", "content": "Hello"}]} for n in range(3)]
        for mood in ("Be kind.", "Be cold.")
    ]  # fmt: skip
    contrast = read(*lines)  # type: ignore[arg-type]
    config = pico.config("llama")
    assert plan(contrast, BEGINS, config, truncate=False).warnings == ()
    with pytest.raises(ExampleError) as caught:
        plan(contrast, build(DROPPING), config, truncate=False)
    assert caught.value.problems[0].startswith("3 of 3 positive examples are the same tokens in both classes")
    assert "leaves out what the system says, in 6 of 6 conversations" in caught.value.problems[1]
