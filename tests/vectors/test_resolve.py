"""From names to vectors: bindings first, then the current folder and nothing outside it; all problems at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vectors.errors import ArtifactError, ExpressionError
from vectors.expression import LONGEST, Term
from vectors.probe import Probe, Readout
from vectors.resolve import Resolver, compose, compose_gated, folder_resolver
from vectors.steering import SteeringVector

BASE = {"base": {"digest": "sha256:ab", "name": "tiny"}}


def build(value: float, layers: tuple[int, ...] = (1, 2)) -> SteeringVector:
    return SteeringVector({i: torch.full((4,), value) for i in layers}, BASE)


def value(vector: SteeringVector) -> float:
    return float(next(iter(vector.layers.values()))[0])


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Path]:
    """Saves a vector of one value under a path relative to the current folder, which lies inside `tmp_path`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def saved(name: str, value: float) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        build(value).save(path)
        return path

    return saved


def test_a_name_is_the_file_of_that_name_in_the_current_folder(save: Callable[[str, float], Path]) -> None:
    save("warm.safetensors", 3)
    composition, vectors = compose("0.5*warm")
    assert composition.terms == (Term("add", "warm", 0.5),)
    assert {name: value(vector) for name, vector in vectors.items()} == {"warm": 3}


def test_a_binding_comes_before_a_file_of_the_same_name(save: Callable[[str, float], Path]) -> None:
    save("warm.safetensors", 3)
    elsewhere = save("../elsewhere/other.safetensors", 7)
    assert value(compose("warm", {"warm": elsewhere})[1]["warm"]) == 7
    assert value(compose("warm", {"warm": str(elsewhere)})[1]["warm"]) == 7
    assert value(compose("warm", {"warm": build(9)})[1]["warm"]) == 9


def test_a_binding_comes_before_a_file_that_has_the_bare_name(save: Callable[[str, float], Path]) -> None:
    Path("warm").write_text("no vector")
    assert value(compose("warm", {"warm": build(9)})[1]["warm"]) == 9


def test_a_binding_that_no_term_names_is_not_read(save: Callable[[str, float], Path]) -> None:
    assert list(compose("a", {"a": build(1), "b": "none.safetensors"})[1]) == ["a"]


def test_a_path_alone_is_that_vector_at_strength_one(save: Callable[[str, float], Path]) -> None:
    path = save("../elsewhere/warm-v2.safetensors", 5)
    composition, vectors = compose(str(path))
    assert composition.terms == (Term("add", "warm-v2", 1.0),)
    assert str(composition) == "'warm-v2'"
    assert value(vectors["warm-v2"]) == 5


def test_a_path_alone_acts_at_the_strength_that_is_given(save: Callable[[str, float], Path]) -> None:
    composition, _ = compose(str(save("warm.safetensors", 5)), strength=-1.5)
    assert composition.terms == (Term("add", "warm", -1.5),)


def test_an_expression_is_scaled_by_the_strength_that_is_given() -> None:
    composition, _ = compose("a - 2*b", {"a": build(1), "b": build(2)}, strength=0.5)
    assert str(composition) == "0.5*a - b"


def test_a_path_wins_over_a_binding_of_its_stem(save: Callable[[str, float], Path]) -> None:
    path = save("warm.safetensors", 5)
    assert value(compose(str(path), {"warm": build(9)})[1]["warm"]) == 5


@pytest.mark.parametrize("name", ["none.safetensors", "a/b/none.gguf", "none.pt"])
def test_a_path_that_is_not_there_is_an_error_of_a_missing_file(save: Callable[[str, float], Path], name: str) -> None:
    with pytest.raises(ExpressionError, match=f"there is no file {name}"):
        compose(name)


@pytest.mark.parametrize("text", ["./pw-fold", "models/warm", "../up", "~/warm", "/absent/my model", "a-b/c+d", "x/"])
def test_a_path_of_what_is_not_there_is_no_mistake_in_an_expression(
    save: Callable[[str, float], Path], text: str
) -> None:
    with pytest.raises(ExpressionError, match=f"there is no file or folder {re.escape(text)}$"):
        compose(text)


def test_a_path_in_an_expression_gets_the_hint_to_bind_it(save: Callable[[str, float], Path]) -> None:
    for text in ("0.5*./warm.safetensors", "warm/2", "ablate(a/b)"):
        with pytest.raises(ExpressionError, match="is wrong at character") as caught:
            compose(text)
        assert caught.value.hint.startswith("a file in an expression stands by a name; bind it: --vector NAME=FILE")


@pytest.mark.parametrize(
    "name",
    ["../secret", "./../secret", "inner/secret", "..", "/etc/passwd", "inner/../../secret", "~/secret", "a\0b"],
)
def test_a_name_never_leaves_the_current_folder(save: Callable[[str, float], Path], name: str) -> None:
    for path in ("../secret.safetensors", "inner/secret.safetensors"):
        save(path, 1)
    with pytest.raises(ExpressionError, match="is not bound"):
        compose(f"1*'{name}'")


def test_an_absolute_name_does_not_leave_the_current_folder(save: Callable[[str, float], Path]) -> None:
    outside = save("../secret.safetensors", 1).resolve().with_suffix("")
    with pytest.raises(ExpressionError, match="is not bound"):
        compose(f"1*'{outside}'")


def test_a_binding_may_name_a_file_anywhere(save: Callable[[str, float], Path]) -> None:
    path = save("../secret.safetensors", 4)
    assert value(compose("1*'../secret'", {"../secret": path})[1]["../secret"]) == 4


def test_all_names_that_are_not_found_are_reported_at_once(save: Callable[[str, float], Path]) -> None:
    save("warm.safetensors", 1)
    with pytest.raises(ExpressionError) as caught:
        compose("warm + cold - calm + ablate(cold)")
    assert len(caught.value.problems) == 2
    assert "'cold' is not bound" in caught.value.problems[0]
    assert "'calm' is not bound" in caught.value.problems[1]
    assert "--vector cold=FILE" in caught.value.hint
    assert "--vector calm=FILE" in caught.value.hint


def test_a_missing_name_a_damaged_file_and_a_missing_layer_are_reported_together(
    save: Callable[[str, float], Path],
) -> None:
    Path("broken.safetensors").write_bytes(b"no vector")
    save("warm.safetensors", 1)
    with pytest.raises(ExpressionError) as caught:
        compose("cold + broken + warm[2-4,8]")
    cold, broken, warm = caught.value.problems
    assert "cold" in cold
    assert "broken.safetensors" in broken
    assert warm == "the vector warm holds no layer 3-4,8"
    assert "it holds 1-2" in caught.value.hint


def test_a_binding_to_a_file_that_is_not_there_names_the_file(save: Callable[[str, float], Path]) -> None:
    with pytest.raises(ExpressionError, match=r"there is no file none\.safetensors"):
        compose("warm", {"warm": "none.safetensors"})


def test_layers_that_a_term_names_may_be_any_that_the_vector_holds() -> None:
    composition, _ = compose("a[5]", {"a": build(1, (2, 5))})
    assert composition.terms[0].layers == (5,)


def test_a_folder_of_the_name_is_no_vector(save: Callable[[str, float], Path]) -> None:
    Path("warm.safetensors").mkdir()
    with pytest.raises(ExpressionError, match="warm"):
        compose("1*warm")


def test_an_expression_longer_than_any_file_name_is_read() -> None:
    text = " + ".join(["a[1]"] * 300)
    assert len(compose(text, {"a": build(1)})[0].terms) == 300
    with pytest.raises(ExpressionError, match="the limit is"):
        compose("a" * (LONGEST + 1))
    with pytest.raises(ExpressionError, match="is not bound"):
        compose("a" * 300)


@pytest.mark.parametrize("text", ["", "a +", "\0", "?", "a/b", "\ud800"])
def test_text_that_is_neither_path_nor_expression_is_an_expression_error(text: str) -> None:
    with pytest.raises(ExpressionError):
        compose(text, {"a": build(1)})


def test_a_path_whose_name_can_not_be_written_in_an_expression_is_refused(save: Callable[[str, float], Path]) -> None:
    path = save('it\'s "warm".safetensors', 1)
    with pytest.raises(ExpressionError, match="both kinds of quotes"):
        compose(str(path))


@pytest.mark.parametrize("name", ["it's", "a b", "2nd", "日本"])
def test_any_other_file_name_is_quoted_where_it_must_be(save: Callable[[str, float], Path], name: str) -> None:
    composition, vectors = compose(str(save(f"{name}.safetensors", 2)))
    assert list(vectors) == [name]
    assert compose(str(composition), vectors)[0] == composition


def test_a_damaged_path_alone_is_an_error_that_names_it(save: Callable[[str, float], Path]) -> None:
    Path("broken.safetensors").write_bytes(b"no vector")
    with pytest.raises((ArtifactError, ExpressionError), match=r"broken\.safetensors"):
        compose("broken.safetensors")


def test_a_store_plugs_in_as_a_resolver_before_or_behind_the_current_folder(
    save: Callable[[str, float], Path],
) -> None:
    save("warm.safetensors", 3)
    store = Resolver({"warm": build(7), "calm": build(8)}.get, lambda: ["warm", "calm"])
    assert value(compose("warm", resolvers=[store, folder_resolver()])[1]["warm"]) == 7
    assert value(compose("warm", resolvers=[folder_resolver(), store])[1]["warm"]) == 3
    assert value(compose("warm", {"warm": build(9)}, resolvers=[store])[1]["warm"]) == 9
    with pytest.raises(ExpressionError, match=r"'clam' is not bound.*did you mean calm\?"):
        compose("1*clam", resolvers=[store])


def test_a_folder_that_is_not_the_current_one_can_be_searched(save: Callable[[str, float], Path]) -> None:
    save("../elsewhere/cold.safetensors", 5)
    assert value(compose("cold", resolvers=[folder_resolver(Path("../elsewhere"))])[1]["cold"]) == 5


def probe(*layers: int, hidden: int = 4, site: str = "resid_post") -> Probe:
    return Probe({i: Readout(torch.ones(hidden), 0.0) for i in layers}, {"site": site})


def test_the_names_of_conditions_stand_for_probes_or_vectors_through_the_same_resolvers(
    save: Callable[[str, float], Path],
) -> None:
    save("warm.safetensors", 1)
    probe(0).save("anger.safetensors")
    composed = compose_gated("warm@when:anger>0.5 + warm[2]@while:warm[1]<-1@when:other>0", {"other": probe(0, 1)})
    assert list(composed.vectors) == ["warm"]
    assert {name: type(source) for name, source in composed.probes.items()} == {
        "anger": Probe, "warm": SteeringVector, "other": Probe,
    }  # fmt: skip


def test_a_condition_is_refused_by_everything_that_does_not_apply_it() -> None:
    with pytest.raises(ExpressionError, match=r"warm@when:p>0 depends on @when:p>0, which is known only while"):
        compose("warm@when:p>0", {"warm": build(1), "p": probe(0)})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("warm@when:nothing>0", "'nothing' is not bound"),
        ("low + warm@when:low>0", "low is a probe, which reads the model; a term needs a vector"),
        ("warm@when:high>0", "@when:high>0 reads layer 1, and warm@when:high>0 steers from layer 1"),
        ("warm[2]@while:both[2]>0", "reads layer 2, and warm"),
        ("warm@when:both[7]>0", "both holds no layer 7; it holds 0-2"),
        ("warm@when:warm>0", "@when:warm>0 reads layer 2, and warm@when:warm>0 steers from layer 1"),
        ("warm@when:wide>0", "wide has hidden size 8, the vector warm 4"),
        ("warm@when:inner>0", "the probe inner reads attn_out; a condition reads resid_post"),
        ("warm@when:zero[0]>0", "the vector zero is zero at layer 0, so there is nothing to read"),
    ],
)
def test_a_condition_that_can_not_be_read_below_its_term_is_refused_with_the_reason(text: str, reason: str) -> None:
    bindings = {
        "warm": build(1), "low": probe(0), "high": probe(1), "both": probe(0, 1, 2), "wide": probe(0, hidden=8),
        "inner": probe(0, site="attn_out"), "zero": build(0, (0,)),
    }  # fmt: skip
    with pytest.raises(ExpressionError) as caught:
        compose_gated(text, bindings)
    assert reason in str(caught.value)
    assert "inner" not in text or "trained without --site" in caught.value.hint
