"""Expressions: the grammar, one canonical text a composition, errors that name the place, and no other errors."""

from __future__ import annotations

import hashlib
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.documents.artifacts import HIGHEST_LAYER
from vectors.errors import ExpressionError
from vectors.expression import LONGEST, Composition, Condition, Scope, Term, parse, terms_in

steady = settings(database=None, derandomize=True, deadline=None, max_examples=100)

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.one_of(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,15}", fullmatch=True),
    st.sampled_from(["ablate", "clamp", "prompt", "first", "e5", "_", "é.ü", "深"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15).filter(
        lambda name: not ("'" in name and '"' in name)
    ),
)
layers = st.none() | st.sets(st.integers(0, HIGHEST_LAYER), min_size=1, max_size=8).map(lambda s: tuple(sorted(s)))
scopes = st.one_of(
    st.none(),
    st.sampled_from([Scope("prompt"), Scope("response")]),
    st.builds(Scope, st.sampled_from(["first", "after"]), st.integers(0, 10**9)),
)
conditions = st.lists(
    st.builds(
        Condition,
        st.sampled_from(["when", "while"]),
        names,
        st.sampled_from([">", "<", ">=", "<="]),
        finite,
        st.none() | st.integers(0, HIGHEST_LAYER),
    ),
    max_size=3,
).map(tuple)
sections = st.lists(st.builds(Condition, st.sampled_from(["answer", "thinking", "outside-tools"])), max_size=2)
conditions = st.tuples(conditions, sections.map(tuple)).map(lambda both: both[0] + both[1])
operations = st.one_of(
    st.tuples(st.sampled_from(["add", "share", "ablate", "mean_ablate", "clamp"]), finite),
    st.tuples(st.just("rotate"), st.floats(-180, 180)),
)
terms = st.one_of(
    st.builds(lambda o, *rest: Term(o[0], rest[0], o[1], *rest[1:]), operations, names, layers, scopes),
    st.builds(
        lambda o, *rest: Term(o[0], rest[0], o[1], *rest[1:]), operations, names, layers,
        scopes.filter(lambda s: s != Scope("prompt")), conditions,
    ),
)  # fmt: skip
compositions = st.lists(terms, min_size=1, max_size=6).map(lambda terms: Composition(tuple(terms)))


def refusal(text: str) -> str:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert caught.value.hint
    return str(caught.value)


def position(text: str) -> int:
    """The character, counted from 1, that the refusal of `text` names."""
    found = re.search(r"is wrong at character (\d+):", refusal(text))
    assert found
    return int(found[1])


def test_the_expression_of_the_design_is_read_term_by_term() -> None:
    composition = parse("1.2*warm - 0.4*formal + ablate(refusal) + 0.5*calm@response")
    assert composition.terms == (
        Term("add", "warm", 1.2),
        Term("add", "formal", -0.4),
        Term("ablate", "refusal", 1.0),
        Term("add", "calm", 0.5, scope=Scope("response")),
    )
    assert composition.names == ("warm", "formal", "refusal", "calm")


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("warm", Term("add", "warm", 1.0)),
        ("+warm", Term("add", "warm", 1.0)),
        ("-warm", Term("add", "warm", -1.0)),
        ("- 2 * warm", Term("add", "warm", -2.0)),
        (".5*warm", Term("add", "warm", 0.5)),
        ("2.*warm", Term("add", "warm", 2.0)),
        ("1e-3*warm", Term("add", "warm", 0.001)),
        ("'warm-v2'", Term("add", "warm-v2", 1.0)),
        ('2*"it\'s"', Term("add", "it's", 2.0)),
        ("_a.b", Term("add", "_a.b", 1.0)),
        ("warm[12]", Term("add", "warm", 1.0, (12,))),
        ("warm[ 7 , 12 - 15,3,13]", Term("add", "warm", 1.0, (3, 7, 12, 13, 14, 15))),
        ("ablate(warm)", Term("ablate", "warm", 1.0)),
        ("ablate( warm[1-2] , 0.5 )@prompt", Term("ablate", "warm", 0.5, (1, 2), Scope("prompt"))),
        ("clamp(warm, -2)", Term("clamp", "warm", -2.0)),
        ("clamp(warm,3)@first:8", Term("clamp", "warm", 3.0, None, Scope("first", 8))),
        ("warm%2.5", Term("share", "warm", 2.5)),
        ("-'q-1'[3] % .5@prompt", Term("share", "q-1", -0.5, (3,), Scope("prompt"))),
        ("warm%-3", Term("share", "warm", -3.0)),
        ("rotate(warm[2], -22.5)", Term("rotate", "warm", -22.5, (2,))),
        ("ablate(warm, to=mean)", Term("mean_ablate", "warm", 1.0)),
        ("ablate(warm[2], 0.5, to = mean)@first:3", Term("mean_ablate", "warm", 0.5, (2,), Scope("first", 3))),
        ("ablate(to)", Term("ablate", "to", 1.0)),
        ("warm@after:16", Term("add", "warm", 1.0, None, Scope("after", 16))),
        ("warm @ first : 0", Term("add", "warm", 1.0, None, Scope("first", 0))),
        (
            "warm@when:anger>0.5",
            Term("add", "warm", 1.0, None, Scope("response"), (Condition("when", "anger", ">", 0.5),)),
        ),
        (
            "clamp(warm, 1)@while : 'q-1' [ 3 ] <= -2.05 @first:8 @ when:b>=1",
            Term(
                "clamp",
                "warm",
                1.0,
                None,
                Scope("first", 8),
                (Condition("while", "q-1", "<=", -2.05, 3), Condition("when", "b", ">=", 1.0)),
            ),
        ),
        ("warm@answer", Term("add", "warm", 1.0, None, Scope("response"), (Condition("answer"),))),
        (
            "warm@first:8@thinking @ outside - tools@when:p>1",
            Term(
                "add",
                "warm",
                1.0,
                None,
                Scope("first", 8),
                (Condition("thinking"), Condition("outside-tools"), Condition("when", "p", ">", 1.0)),
            ),
        ),
        ("ablate", Term("add", "ablate", 1.0)),  # the name of an operation is a name without its parenthesis
        ("\twarm\n", Term("add", "warm", 1.0)),
    ],
)
def test_each_form_of_a_term_means_what_the_grammar_says(text: str, term: Term) -> None:
    assert parse(text).terms == (term,)


def test_a_name_that_occurs_twice_is_named_once_and_keeps_its_two_terms() -> None:
    composition = parse("b + a@prompt - b@response")
    assert composition.names == ("b", "a")
    assert len(composition.terms) == 3


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("  1.0*warm-0.40*formal ", "warm - 0.4*formal"),
        ("-1*a + 0*b", "-a + 0*b"),
        ("-0*a", "0*a"),
        ("a[3,1,2,7]", "a[1-3,7]"),
        ("ablate(a,1)", "ablate(a)"),
        ("ablate('a',.50)", "ablate(a, 0.5)"),
        ("ablate('a', 1 ,to=mean) + rotate(a, -7.50)", "ablate(a, to=mean) + rotate(a, -7.5)"),
        ("a%-2 - b%-.5 - c%1", "-a%2 + b%0.5 - c%1"),
        ("clamp(a,1)", "clamp(a, 1)"),
        ('"warm-v2"@first:08', "'warm-v2'@first:8"),
        ('"it\'s"', '"it\'s"'),
        ("1e22*a", "1e+22*a"),
        ("1e3*a", "1000*a"),
        ("a@response@when:p>.50", "a@when:p>0.5"),
        ("a @ while:'p' < - 3 @ first:2", "a@first:2@while:p<-3"),
        ("a@outside-tools@response@answer", "a@outside-tools@answer"),
        ("a@when:'p-2'[07]>=1@while:p<=2", "a@when:'p-2'[7]>=1@while:p<=2"),
    ],
)
def test_different_spellings_have_one_canonical_text(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(text).digest == parse(canonical).digest


@steady
@given(compositions)
def test_the_canonical_text_reads_back_as_the_same_composition(composition: Composition) -> None:
    again = parse(str(composition))
    assert again == composition
    assert str(again) == str(composition)
    assert again.digest == composition.digest


@steady
@given(compositions, compositions)
def test_equal_compositions_have_equal_digests_and_different_ones_different_digests(
    a: Composition, b: Composition
) -> None:
    assert (a == b) == (a.digest == b.digest)


@given(compositions)
@settings(steady, max_examples=50)
def test_the_digest_is_that_of_the_canonical_text_and_of_nothing_else(composition: Composition) -> None:
    assert composition.digest == "sha256:" + hashlib.sha256(str(composition).encode()).hexdigest()


def test_the_order_of_terms_is_part_of_a_composition() -> None:
    assert parse("a + b") != parse("b + a")
    assert parse("a + b").digest != parse("b + a").digest


@pytest.mark.parametrize(
    ("text", "character", "expected"),
    [
        ("warm +", 7, "a term expected, the end found"),
        ("2*", 3, "the name of a vector expected, the end found"),
        ("2 warm", 3, "`*` expected, 'warm' found"),
        ("warm cold", 6, "`+`, `-` or `@` expected, 'cold' found"),
        ("warm +   ?", 10, "'?' found"),
        ("a ++ b", 4, "the name of a vector expected"),
        ("a b", 3, "`+`"),
        ("warm[]", 6, "a layer, a whole number up to 1000, expected"),
        ("warm[3", 7, "`]` expected, the end found"),
        ("warm[5-3]", 6, "a range that ascends expected, '5-3]' found"),
        ("warm[1.5]", 6, "a whole number"),
        ("warm[10001]", 6, "a whole number"),
        ("warm[-1]", 6, "a whole number"),
        ("warm@later", 6, "first:N, after:N, answer, thinking, outside-tools, when:PROBE>X or while:"),
        ("warm@first", 11, "`:` expected"),
        ("warm@first:x", 12, "a count of tokens"),
        ("warm@first:1.5", 12, "a count of tokens"),
        ("warm@prompt@response", 12, "a condition (a term has one scope) expected"),
        ("warm@outside", 13, "`outside-tools` expected"),
        ("warm@outside-tool", 14, "`outside-tools` expected"),
        ("warm@when", 10, "`:` expected"),
        ("warm@when:", 11, "the name of a probe or a vector expected"),
        ("warm@while:p", 13, "one of > < >= <= expected, the end found"),
        ("warm@when:p=1", 12, "'=1' found"),
        ("warm@when:p>", 13, "a number expected"),
        ("warm@when:p>>1", 13, "a number expected"),
        ("warm@when:p>+1", 13, "a number expected"),
        ("warm@when:p>1e999", 13, "a finite number"),
        ("warm@when:p[1-2]>3", 14, "`]` expected"),
        ("warm > 1", 6, "`+`, `-` or `@` expected"),
        ("turn(warm)", 1, "ablate or clamp or rotate expected"),
        ("rotate(warm)", 12, "`,` and the degrees to turn by"),
        ("rotate(warm, 180.5)", 1, "degrees from -180 to 180"),
        ("- rotate(warm, 1)", 3, "an operation can't be subtracted"),
        ("ablate(b, to=zero)", 14, "`mean` expected"),
        ("ablate(b, to mean)", 14, "`=` expected"),
        ("ablate(b, 1, 2)", 14, "`to=mean` expected"),
        ("clamp(b, 1, to=mean)", 11, "`)` expected"),
        ("warm%", 6, "a number expected"),
        ("2*warm%3", 7, "`+`, `-` or `@` expected"),
        ("a - ablate(b)", 5, "an operation can't be subtracted"),
        ("2*ablate(b)", 3, "an operation takes its strength inside"),
        ("ablate(2*b)", 8, "the name of a vector"),
        ("ablate(b", 9, "`)` expected"),
        ("ablate(b,)", 10, "a number expected"),
        ("clamp(b)", 8, "the value to clamp to"),
        ("1e999*a", 1, "a finite number"),
        ("'open", 1, "a name"),
        ("''", 1, "the name of a vector"),
        ("é + 3é", 6, "`*`"),
    ],
)
def test_an_error_names_the_character_and_what_was_expected_there(text: str, character: int, expected: str) -> None:
    assert position(text) == character
    assert expected in refusal(text)


def test_a_condition_is_listed_once_and_names_what_it_reads_beside_the_vectors() -> None:
    composition = parse("a@when:p>0 - b@first:8@when:p>0@while:q<-1 + c@when:p<0")
    assert composition.names == ("a", "b", "c")
    assert composition.probes == ("p", "q")
    assert parse("a@answer@when:p>0").probes == ("p",)
    assert [str(condition) for condition in composition.conditions] == ["@when:p>0", "@while:q<-1", "@when:p<0"]
    assert terms_in(str(composition)) == 3


@pytest.mark.parametrize("text", ["a@prompt@when:p>0", "a@while:p>0@prompt"])
def test_a_condition_on_the_prompt_is_refused(text: str) -> None:
    assert "a term with a condition can only act on the response" in refusal(text)


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (">", [False, False, True]),
        ("<", [True, False, False]),
        (">=", [False, True, True]),
        ("<=", [True, True, False]),
    ],
)
def test_a_condition_compares_a_value_with_its_threshold(comparison: str, expected: list[bool]) -> None:
    condition = parse(f"a@when:p{comparison}-2.05").terms[0].conditions[0]
    assert [condition.holds(value) for value in (-3.0, -2.05, 1.0)] == expected


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_expression_is_refused_as_such(text: str) -> None:
    assert "empty" in refusal(text)


def test_the_place_is_shown_also_in_a_long_expression() -> None:
    text = "a + " * 100 + "? + " + "b + " * 100 + "c"
    message = refusal(text)
    assert position(text) == 401
    assert "'?" in message
    assert len(message) < 300


def test_an_expression_at_the_limit_is_read_and_one_past_it_refused() -> None:
    assert parse("a" * LONGEST).names == ("a" * LONGEST,)
    assert "4097 characters; the limit is 4096" in refusal("a" * (LONGEST + 1))


def test_an_expression_whose_canonical_text_is_past_the_limit_is_refused() -> None:
    assert "the limit is 4096" in refusal("+".join("a" * 1500))


def test_text_that_is_no_unicode_is_refused() -> None:
    assert "Unicode" in refusal("'\ud800'")


HOSTILE = [
    "(" * 4000,
    "[" * 4000,
    "-" * 4096,
    "'" * 4095,
    "9" * 4096,
    "a[" + "9" * 4000 + "]",
    "a@first:" + "9" * 4000,
    "a[" + "0-1000," * 500 + "1]",
    "+".join(["a[0-1000]"] * 360),
    "clamp(" * 600,
    "1e" + "9" * 4000 + "*a",
    "." * 4096,
    "a\0b",
    "'a\0b'",
    "²*a",
    "١*a",
    "a[²]",
    "\u202ea",
    "a" + " " * 4000 + "?",
]


def must_read_or_refuse(text: str) -> bool:
    """Whether `text` is an expression; anything but a composition that reads back, or ExpressionError, fails."""
    try:
        composition = parse(text)
    except ExpressionError:
        return False
    assert parse(str(composition)) == composition
    assert composition.digest.startswith("sha256:")
    return True


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    must_read_or_refuse(text)


def test_ten_thousand_strings_of_the_languages_own_pieces_are_read_or_refused() -> None:
    words = (
        "warm cold 'q-1' \"it's\" ablate( clamp( rotate( , to=mean) %2 ( ) [ ] , @ : + - * 1 2.5 .5 1e9 1e999 007 "
        "first: after: "
        "prompt response @first:3 @when:p>1 while: > <= [1-3] [5,7] 12-15 \ud800 é \0 \u202e ² ? \\ ' \" ;"
    )
    pieces = [*words.split(), " ", "\n", "\t"]
    chance = random.Random(0)
    read = 0
    for _ in range(10_000):
        read += must_read_or_refuse("".join(chance.choices(pieces, k=chance.randint(1, 9))))
    assert 200 < read < 5000  # or the test tries one side alone


def test_valid_expressions_with_one_character_changed_are_read_or_refused() -> None:
    valid = (
        "1.2*warm[3,5-9] - 0.4*'a b'@first:8 + ablate(refusal, -0.5)@prompt + clamp(calm, 2)@when:p[3]>=-1.5"
        " + a%2 + rotate(b, 9) + ablate(c, 0.5, to=mean)"
    )
    chance = random.Random(1)
    for _ in range(2000):
        text = list(valid)
        text[chance.randrange(len(text))] = chr(chance.choice([chance.randrange(128), chance.randrange(0x11000)]))
        must_read_or_refuse("".join(text))


@steady
@given(st.text(st.characters(), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    must_read_or_refuse(text)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("prompt", (0, 10)),
        ("response", (10, math.inf)),
        ("first:8", (10, 18)),
        ("first:0", (10, 10)),
        ("after:8", (18, math.inf)),
        ("after:0", (10, math.inf)),
    ],
)
def test_a_scope_covers_the_positions_that_its_name_says(scope: str, expected: tuple[int, float]) -> None:
    found = parse(f"a@{scope}").terms[0].scope
    assert found is not None
    assert found.span(prompt_length=10) == expected


def test_first_and_after_divide_the_response_between_them() -> None:
    first, after, response = Scope("first", 5).span(7), Scope("after", 5).span(7), Scope("response").span(7)
    assert first[1] == after[0]
    assert (first[0], after[1]) == response
    assert Scope("prompt").span(7)[1] == response[0]


def test_scaling_multiplies_every_strength_and_nothing_else() -> None:
    scaled = parse("warm[3]@prompt - 0.5*cold + ablate(refusal)").scaled(2)
    assert scaled == parse("2*warm[3]@prompt - cold + ablate(refusal, 2)")


def test_scaling_turns_further_but_not_beyond_a_half_turn() -> None:
    assert parse("rotate(a, 30) + b%2 + ablate(c, to=mean)").scaled(-2) == parse(
        "rotate(a, -60) + b%-4 + ablate(c, -2, to=mean)"
    )
    with pytest.raises(ExpressionError, match="more than a half turn"):
        parse("rotate(a, 100)").scaled(2)


def test_scaling_by_one_changes_nothing_and_by_zero_leaves_no_strength() -> None:
    composition = parse("warm - 0.5*cold")
    assert composition.scaled(1) == composition
    assert str(composition.scaled(0)) == "0*warm + 0*cold"


def test_scaling_a_clamp_is_refused_because_it_sets_a_level() -> None:
    with pytest.raises(ExpressionError, match=r"a \+ clamp\(b, 2\) can't be scaled by 0.5: clamp sets a level"):
        parse("a + clamp(b, 2)").scaled(0.5)


@pytest.mark.parametrize("factor", [1e200, math.inf, math.nan])
def test_scaling_to_a_strength_that_is_not_finite_is_refused(factor: float) -> None:
    with pytest.raises(ExpressionError, match="finite"):
        parse("1e200*a").scaled(factor)


def test_a_composition_can_not_be_changed() -> None:
    composition = parse("a")
    with pytest.raises(AttributeError):
        composition.terms = ()  # type: ignore[misc]
    assert len({composition, parse("1*a")}) == 1
