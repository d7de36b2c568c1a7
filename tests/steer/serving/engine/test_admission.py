"""Admission: what can't be applied is refused before the engine sees it; what can is resolved, its cache key salted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fakes
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from steer.serving.engine import admission as admission_module
from steer.serving.engine.admission import Admission
from steer.serving.engine.resolved import GIVEN, RESOLVED, ResolvedRequest, prompt_length
from steer.serving.settings import Settings
from vectors.errors import SteerError, UsageError
from vectors.expression import parse
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

VECTORS = fakes.vectors()


def admission(**settings: Any) -> Admission:
    return Admission(Settings(**{"vectors": VECTORS, **settings}), fakes.HIDDEN, fakes.LAYERS, None)


def admitted(found: Admission, expression: Any, **more: Any) -> Any:
    request = fakes.request("a", {"steer": expression}, **more)
    found.admit(request)
    return request


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("2*nobody + warm + neither", "no vector is called 'nobody', 'neither'; loaded: calm, formal, warm"),
        ("warm[9]", "warm holds no layer 9; it holds 0-3"),
        ("warm +", "a term expected"),
        ("nan*warm", "wrong at character"),
        ("1e39*warm", "too large for float32"),
        ("2e38*warm + 2e38*warm", "too large for float32"),
        ("clamp(warm, -1e39)", "too large for float32"),
        ("", "the expression is empty"),
        (5, "steer is 5, not an expression"),
        (None, "steer is None, not an expression"),
        (["warm"], "not an expression"),
        ("ablate(warm) + ablate(calm) + clamp(formal, 1)", "--steer-directions 3"),
        ("warm@prompt + calm@response + formal@first:3", "--steer-rows 3"),
        ("warm@when:calm>0.5", "has the condition @when:calm>0.5; the server was started without: --steer-gates 1"),
    ],
)
def test_what_cannot_be_applied_is_refused_with_its_reason(expression: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        admitted(admission(directions=2, rows=2), expression)
    assert reason in str(caught.value)


@given(st.text(alphabet="warmcl()@*+-:.,0123456789 []'\"e\x00é", max_size=40))
def test_whatever_is_sent_is_pinned_or_refused(text: str) -> None:
    try:
        request = admitted(admission(), text)
    except ValueError:
        return
    assert ResolvedRequest.of(request.sampling_params.extra_args) is not None


def test_what_is_not_steered_is_left_as_it_is() -> None:
    request = fakes.request("a", {"other": 1})
    admission().admit(request)
    assert (request.cache_salt, request.sampling_params.extra_args) == (None, {"other": 1})
    pooling = fakes.request("a")
    pooling.sampling_params = None
    admission().admit(pooling)


def test_a_client_cannot_bring_what_admission_makes() -> None:
    with pytest.raises(ValueError, match="can't be set by a client"):
        admission().admit(fakes.request("a", {RESOLVED: {"expression": "warm", "vectors": {}}}))


def test_a_prompt_that_arrives_in_parts_is_refused() -> None:
    request = fakes.request("a", {"steer": "warm"})
    request.resumable = True
    with pytest.raises(ValueError, match="streaming input"):
        admission().admit(request)


def test_equal_steering_has_one_salt_and_unequal_steering_never_the_same() -> None:
    found = admission()
    salts = [admitted(found, text).cache_salt for text in ("warm", "2*warm", "warm@prompt", "warm[0-3]", "calm")]
    assert len(set(salts)) == len(salts)
    assert admitted(found, " 1.0 * warm").cache_salt == salts[0]


def test_the_salt_holds_the_clients_own_and_under_a_scope_the_length_of_the_prompt() -> None:
    found = admission()
    own = fakes.request("a", {"steer": "warm"})
    own.cache_salt = "tenant"
    found.admit(own)
    assert own.cache_salt not in ("tenant", admitted(found, "warm").cache_salt)
    short, long = [1, 2], [1, 2, 3]
    assert admitted(found, "warm", prompt=short).cache_salt == admitted(found, "warm", prompt=long).cache_salt
    assert (
        admitted(found, "warm@prompt", prompt=short).cache_salt
        != admitted(found, "warm@prompt", prompt=long).cache_salt
    )


@given(st.text(max_size=80), st.sampled_from(["", "steer:", "user:", "user:steer:"]))
def test_no_salt_of_a_user_reaches_that_of_another_or_of_a_steered_request(salt: str, prefix: str) -> None:
    found = admission()
    steered = admitted(found, "warm").cache_salt
    theirs = [prefix + salt, steered, "user:" + steered, f"steer:{salt}", salt]
    results = {}
    for own in theirs:
        plain = fakes.request("a")
        plain.cache_salt = own
        found.admit(plain)
        assert not plain.cache_salt.startswith("steer:")
        results[own] = plain.cache_salt
    assert len(set(results.values())) == len(results), "different salts stay different"


def test_parts_of_a_salt_never_run_into_each_other() -> None:
    """A prompt of 30 tokens with the salt "5" was once a prompt of 305 tokens without one."""
    found, short, long = admission(), fakes.request("a", {"steer": "warm@prompt"}, prompt=range(30)), None
    short.cache_salt = "5"
    found.admit(short)
    long = admitted(found, "warm@prompt", prompt=range(305))
    assert short.cache_salt != long.cache_salt
    for own in ("", "5", "[5]", '","'):
        other = fakes.request("a", {"steer": "warm@prompt"}, prompt=range(30))
        other.cache_salt = own
        found.admit(other)
        assert (other.cache_salt == short.cache_salt) == (own == "5")


def test_a_request_keeps_the_vector_that_its_name_stood_for() -> None:
    found = admission()
    before = admitted(found, "calm")
    found.unbind("calm")
    other = SteeringVector({0: torch.ones(fakes.HIDDEN)})
    assert found.bind("calm", other, other.digest)
    after = admitted(found, "calm")
    digests = [ResolvedRequest.of(r.sampling_params.extra_args).vectors["calm"] for r in (before, after)]  # type: ignore[union-attr]
    assert digests == [VECTORS["calm"].digest, other.digest]
    assert before.cache_salt != after.cache_salt


def test_arms_are_listed_as_they_resolve_without_reading_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = admission(arms={"friendly": parse("2*warm - calm@response"), "cold": parse("-warm")})
    expected = {name: found.resolve(str(arm)) for name, arm in found.arms.items()}
    # A thousand long arms took seconds to read, in which the event loop served nothing else.
    monkeypatch.setattr(admission_module, "parse", None)
    assert found.resolved_arms() == expected


def test_names_are_given_once_and_those_of_arms_stay() -> None:
    found = admission(arms={"friendly": parse("2*warm")})
    assert not found.bind("warm", VECTORS["warm"], VECTORS["warm"].digest)  # the same again is no conflict
    with pytest.raises(UsageError, match="called 'warm' already"):
        found.bind("warm", VECTORS["calm"], VECTORS["calm"].digest)
    with pytest.raises(UsageError, match="part of the arm friendly"):
        found.unbind("warm")
    with pytest.raises(UsageError, match="no vector is called 'nobody'"):
        found.unbind("nobody")
    digest = found.unbind("calm")
    assert (digest, "calm" in found.bound) == (VECTORS["calm"].digest, False)


@pytest.mark.parametrize("name", ["", "a\nb", "'\"", "x" * 201])
def test_names_that_no_expression_can_quote_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name of a vector"):
        admission().bind(name, VECTORS["warm"], VECTORS["warm"].digest)


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (SteeringVector({0: torch.ones(5)}), "hidden size 5, the model 8"),
        (SteeringVector({7: torch.ones(8)}), "has layer 7; the model has layers 0 to 3"),
        (SteeringVector({0: torch.ones(8)}, {"base": {"digest": "sha256:1", "name": "another"}}), "belongs to another"),
    ],
)
def test_vectors_of_another_model_are_refused_at_the_start_and_later(vector: SteeringVector, reason: str) -> None:
    base = {"digest": "sha256:2", "name": "served"}
    running = Admission(Settings(VECTORS), fakes.HIDDEN, fakes.LAYERS, base)
    with pytest.raises(SteerError, match=reason):
        running.bind("odd", vector, vector.digest)
    with pytest.raises(UsageError, match=reason):
        Admission(Settings({"odd": vector}), fakes.HIDDEN, fakes.LAYERS, base)


def test_arms_that_need_more_than_the_server_has_end_the_start() -> None:
    with pytest.raises(UsageError, match=r"arm 'a': .*--steer-directions 2"):
        admission(directions=1, arms={"a": parse("ablate(warm) + ablate(calm)")})


def test_paths_stay_in_their_folders(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "v.safetensors").touch()
    (inside / "link.safetensors").symlink_to(outside / "v.safetensors")
    (inside / "v.pt").touch()
    found = admission(folders=(inside,))
    assert found.path("v.safetensors") == inside / "v.safetensors"
    (inside / "loop.safetensors").symlink_to(inside / "loop.safetensors")
    for text in (
        "loop.safetensors",
        "../out/v.safetensors",
        str(outside / "v.safetensors"),
        "link.safetensors",
        "v.pt",
        "",
        "\x00",
        ".",
        "x" * 5000,
    ):
        with pytest.raises(UsageError, match=r"is not a \.safetensors file in the folders"):
            found.path(text)
    with pytest.raises(UsageError, match="loads no vectors by path"):
        admission().path("v.safetensors")


def test_pinning_is_a_function_of_text_and_vectors() -> None:
    one, two = (fakes.resolve(text, VECTORS) for text in ("warm+calm", "1*warm + calm"))
    assert one.key == two.key != fakes.resolve("calm + warm", VECTORS).key
    assert ResolvedRequest.of({"steer": "x", RESOLVED: one.values()}) == one
    assert ResolvedRequest.of(None) is ResolvedRequest.of({}) is ResolvedRequest.of({"other": 1}) is None
    with pytest.raises(RuntimeError, match="did not pass admission"):
        ResolvedRequest.of({"steer": "warm"})


def test_arms_come_and_go_while_it_serves() -> None:
    found = admission(arms={"friendly": parse("2*warm")})
    resolved = found.add_arm("calm-down", "calm - 0.5*formal")
    assert resolved == fakes.resolve("calm - 0.5*formal", VECTORS)
    assert found.add_arm("calm-down", "calm-0.5*formal") == resolved, "the same again is no conflict"
    for name, text, reason in (
        ("calm-down", "calm", "an arm is called 'calm-down' already"),
        ("x", "2*nobody", "arm 'x': no vector is called 'nobody'"),
        ("x", "warm +", "a term expected"),
        ("a:b", "warm", "can't be part of a model's name"),
        ("..", "warm", "can't be part of a model's name"),
        ("", "warm", "can't be part of a model's name"),
    ):
        with pytest.raises(SteerError, match=re.escape(reason)):
            found.add_arm(name, text)
    with pytest.raises(UsageError, match="'calm' is part of the arm calm-down"):
        found.unbind("calm")
    assert str(found.remove_arm("calm-down")) == "calm - 0.5*formal"
    found.unbind("calm")
    found.remove_arm("friendly")
    assert found.arms == {}
    with pytest.raises(UsageError, match="no arm is called 'friendly'"):
        found.remove_arm("friendly")


def test_arms_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.serving.engine.admission.ARMS", 2)
    found = admission()
    found.add_arm("a", "warm")
    found.add_arm("b", "warm")
    found.add_arm("b", "warm")
    with pytest.raises(UsageError, match="has 2 arms, the most it keeps"):
        found.add_arm("c", "warm")


def test_a_strength_far_beyond_the_recommended_one_needs_a_server_that_allows_it() -> None:
    warm = SteeringVector(dict(VECTORS["warm"].layers), metadata={"recommended": {"strength": 1.0}})
    assert admission(vectors={"warm": warm}).resolve("20*warm").expression == "20*warm"
    with pytest.raises(SteerError, match=r"20.5 times the 1 recommended.*--allow-strength"):
        admission(vectors={"warm": warm}).resolve("20.5*warm")
    assert admission(vectors={"warm": warm}, allow_strength=True).resolve("1e9*warm").expression == "1000000000*warm"


def test_a_response_that_is_given_to_be_scored_is_no_part_of_the_prompt() -> None:
    found = admission()

    def salt(ids: list[int], given: int) -> Any:
        request = fakes.request("a", {"steer": "warm@response", GIVEN: given}, prompt=ids)
        found.admit(request)
        assert prompt_length(request) == len(ids) - given
        return request.cache_salt

    assert salt([1, 2, 3, 4, 5], 2) == salt([1, 2, 3], 0)  # the same tokens are steered in the same way
    assert salt([1, 2, 3, 4, 5], 2) != salt([1, 2, 3, 4, 5], 0)


@pytest.mark.parametrize("given", [-1, 3, 9, 1.0, True, "2", None, [1]])
def test_a_given_response_is_some_of_the_tokens(given: Any) -> None:
    for steered in ({}, {"steer": "warm"}):
        with pytest.raises(ValueError, match=GIVEN):
            admission().admit(fakes.request("a", {**steered, GIVEN: given}, prompt=[1, 2, 3]))


def with_gates(**settings: Any) -> Admission:
    return admission(**{"probes": fakes.probes(), "gates": 2, "gate_layers": (0, 1), **settings})


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("calm[2]@when:nobody>0", "no vector is called 'nobody'; loaded: anger, calm, formal, joy, warm"),
        ("calm@when:anger>0", "@when:anger>0 reads layer 0, and calm@when:anger>0 steers from layer 0"),
        ("calm[1]@when:joy>0", "what is read must lie below"),
        ("calm[3]@when:warm[2]>0", "reads layer 2; the server was started to read 0-1: --steer-gate-layers 0-2"),
        ("calm[3]@when:warm[9]>0", "warm holds no layer 9"),
        ("2*anger", "anger is a probe, which can be read (@when:anger>0) but not added"),
        ("calm[2]@when:anger>0@when:joy>0 + warm[3]@while:joy>0", "has 3 conditions; the server was started with 2"),
        ("calm[2]@when:anger>0@when:joy>0 + warm[3]@while:joy>0", "--steer-gates 3"),
        (" + ".join(f"calm[2]@when:anger>{i}" for i in range(100)), "at most --steer-gates 4"),
        (" + ".join(f"{i + 1}*calm[2]@after:{i}@when:anger>0" for i in range(9)), "act in 9 phases"),
        ("calm[2]@prompt@when:anger>0", "can only act on the response"),
    ],
)
def test_a_condition_that_cannot_be_decided_is_refused_with_its_reason(expression: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        admitted(with_gates(phases=64), expression)
    assert reason in str(caught.value)


def test_a_request_with_conditions_names_its_probes_by_digest_and_shares_the_salt_of_its_prompt() -> None:
    found = with_gates()
    request = admitted(found, "calm[2]@when:anger>0")
    values = request.sampling_params.extra_args[RESOLVED]
    assert values["vectors"] == {"calm": VECTORS["calm"].digest, "anger": fakes.probes()["anger"].digest}
    assert values["prompt_salt"] is None, "its prompt is that of a plain request"
    assert request.cache_salt.startswith("steer:")
    other = admitted(found, "calm[2]@when:anger>0.1")
    assert other.cache_salt != request.cache_salt
    steered, alone = admitted(found, "warm + calm[2]@when:anger>0"), admitted(found, "warm")
    assert steered.sampling_params.extra_args[RESOLVED]["prompt_salt"] == alone.cache_salt
    given = fakes.request("a", {"steer": "calm[2]@when:anger>0", GIVEN: 2}, prompt=range(8))
    found.admit(given)
    assert given.sampling_params.skip_reading_prefix_cache, "the token that decides must be computed"


def test_probes_are_bound_as_vectors_are_and_are_not_unbound_while_an_arm_reads_them() -> None:
    found, probe = with_gates(probes={}), fakes.probes()["anger"]
    assert found.bind("anger", probe, probe.digest)
    found.add_arm("calmer", "calm[2]@when:anger>0")
    assert found.resolved_arms()["calmer"].vectors["anger"] == probe.digest
    with pytest.raises(UsageError, match="part of the arm calmer"):
        found.unbind("anger")
    found.remove_arm("calmer")
    assert found.unbind("anger") == probe.digest
    with pytest.raises(SteerError, match="no vector is called 'anger'"):
        found.resolve("calm[2]@when:anger>0")
    with pytest.raises(UsageError, match="started without gates"):
        admission().bind("anger", probe, probe.digest)
    large = Probe({0: Readout(torch.zeros(fakes.HIDDEN + 1), 0.0)})
    with pytest.raises(SteerError, match="the probe anger has hidden size 9, the model 8"):
        found.bind("anger", large, large.digest)
