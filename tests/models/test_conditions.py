"""Conditions: one token per class, one more for "no class"; several of them side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import conditions
from ldm_jax.models.conditions import ClassCondition, Signals, Widths

CLASS = ClassCondition(num_classes=7, context_dim=6)
ONE = {"class": CLASS}


@dataclasses.dataclass(frozen=True)
class Text:
    """A row for these tests: tokens through a learned scale, or nothing said at all."""

    name: str = "text"
    width: int = 6
    always: bool = False  # kept: it has no null

    @property
    def widths(self):
        return Widths(tokens=self.width)

    def entries(self):
        return {self.name: jax.ShapeDtypeStruct((2, self.width), jnp.float32)}

    def init(self, key):
        return {f"{self.name}_scale": jax.random.normal(key, (self.width,))}

    def axes(self):
        return {f"{self.name}_scale": (None,)}

    def apply(self, params, cond):
        scale = params[f"{self.name}_scale"].reshape(1, 1, -1)
        return Signals(tokens=cond[self.name] * scale)

    def null(self, batch_size):
        return {} if self.always else {self.name: jnp.zeros((batch_size, 2, self.width))}

    def read(self, rows):
        return {self.name: rows[self.name]}


@dataclasses.dataclass(frozen=True)
class Plain:
    """A row without parameters whose entry is a signal as it is; it is always kept."""

    name: str
    kind: str  # "vector" | "maps"
    width: int

    @property
    def widths(self):
        return Widths(**{self.kind: self.width})

    def entries(self):
        side = () if self.kind == "vector" else (4, 4)
        return {self.name: jax.ShapeDtypeStruct((*side, self.width), jnp.float32)}

    def init(self, key):
        return {}

    def axes(self):
        return {}

    def apply(self, params, cond):
        return Signals(**{self.kind: cond[self.name]})

    def null(self, batch_size):
        return {}

    def read(self, rows):
        return {self.name: rows[self.name]}


@pytest.fixture(scope="module")
def params():
    return conditions.init(ONE, jax.random.key(0))


def tokens(params, labels):
    return conditions.apply(ONE, params, {"label": jnp.asarray(labels, jnp.int32)}).tokens


def test_each_class_and_the_null_class_have_a_token_of_their_own(params):
    context = tokens(params, range(8))
    assert context.shape == (8, 1, 6) and context.dtype == jnp.float32
    np.testing.assert_array_equal(context[:, 0], params["embedding"])
    assert len(np.unique(context, axis=0)) == 8


def test_null_condition_is_the_token_after_the_last_class(params):
    null = conditions.unconditioned(ONE, {"label": jnp.arange(3)})
    assert null["label"].dtype == jnp.int32
    signals = conditions.apply(ONE, params, null)
    np.testing.assert_array_equal(signals.tokens, np.tile(params["embedding"][7], (3, 1, 1)))
    assert signals.vector is None and signals.maps is None


def test_rows_start_standard_normal():
    config = ClassCondition(num_classes=1000, context_dim=64)
    rows = config.init(jax.random.key(0))["embedding"]
    assert rows.shape == (1001, 64)
    assert abs(float(rows.mean())) < 5 / rows.size**0.5
    assert abs(float(jnp.square(rows).mean()) - 1) < 5 * (2 / rows.size) ** 0.5


def test_unconditional_model_has_no_parameters_signals_or_entries():
    assert conditions.init({}, jax.random.key(0)) == {} == conditions.axes({})
    assert conditions.apply({}, {}, {}) == Signals(None, None, None)
    assert conditions.entries({}) == {} == conditions.unconditioned({}, {})
    assert conditions.widths({}) == Widths(0, 0, 0)
    assert conditions.drop({}, {}, jnp.array([True])) == {}
    assert conditions.num_classes({}) == 0


def test_axes_name_every_dimension(params):
    jax.tree.map(
        lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim),
        params,
        conditions.axes(ONE),
    )


@pytest.mark.parametrize("kind", conditions.CONDITIONS)
def test_every_row_agrees_with_its_own_specs(kind):
    """Entries, null, signals and axes have the shapes that the row says."""
    condition = conditions.CONDITIONS[kind](**{"class": dict(num_classes=7)}[kind])
    null = condition.null(2)
    for name, spec in condition.entries().items():
        assert (null[name].shape, null[name].dtype) == ((2, *spec.shape), spec.dtype)
        assert conditions.read({kind: condition}, {name: 5, "other": 6}) == {name: 5}
    params = jax.eval_shape(condition.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.ndim, params) == jax.tree.map(
        len, condition.axes(), is_leaf=lambda x: isinstance(x, tuple)
    )
    signals = jax.eval_shape(condition.apply, params, null)
    widths = [0 if s is None else s.shape[-1] for s in signals]
    assert Widths(*widths) == condition.widths


def test_a_class_condition_without_classes_is_refused():
    with pytest.raises(InputError, match=r"num_classes 0 must be positive for the class"):
        ClassCondition()


@pytest.mark.parametrize("width", [0, -4])
def test_a_token_without_channels_is_refused(width):
    with pytest.raises(InputError, match=rf"context_dim {width} must be at least 1"):
        ClassCondition(num_classes=7, context_dim=width)


def test_rows_with_parameters_of_one_name_are_refused():
    conditions.check_names({"class": CLASS, "text": Text(), "more": Text("more")})
    with pytest.raises(
        InputError, match=r"'class' and 'b' both have parameters 'embedding'.*\.b\.kind"
    ):
        conditions.check_names({"class": CLASS, "text": Text(), "b": CLASS})


def test_dropped_condition_is_the_null_one_and_a_kept_one_stays():
    cond = {"label": jnp.array([1, 2, 3], jnp.int32)}
    dropped = conditions.drop(ONE, cond, jnp.array([True, False, True]))
    np.testing.assert_array_equal(dropped["label"], [7, 2, 7])


def test_dropping_a_condition_of_any_rank_drops_whole_rows():
    cond = {"text": jnp.ones((3, 2, 6))}
    dropped = conditions.drop({"text": Text()}, cond, jnp.array([False, True, False]))
    np.testing.assert_array_equal(dropped["text"].mean((1, 2)), [1, 0, 1])


def test_a_condition_whose_null_is_empty_is_always_kept():
    both = {"class": CLASS, "kept": Text("kept", always=True)}
    cond = {"label": jnp.array([1, 2]), "kept": jnp.ones((2, 2, 6))}
    for silent in (
        conditions.drop(both, cond, jnp.array([True, True])),
        conditions.unconditioned(both, cond),
    ):
        assert silent["kept"] is cond["kept"]
        np.testing.assert_array_equal(silent["label"], [7, 7])


def test_tokens_of_two_conditions_stand_side_by_side_in_their_order():
    both = {"class": CLASS, "text": Text()}
    params = conditions.init(both, jax.random.key(0))
    cond = {"label": jnp.array([4, 5]), "text": jnp.ones((2, 2, 6))}
    together = conditions.apply(both, params, cond).tokens
    assert together.shape == (2, 3, 6)
    np.testing.assert_array_equal(together[:, 0], params["embedding"][jnp.array([4, 5])])
    np.testing.assert_array_equal(together[:, 1:], np.tile(params["text_scale"], (2, 2, 1)))
    turned = conditions.apply(dict(reversed(both.items())), params, cond).tokens
    np.testing.assert_array_equal(turned, together[:, jnp.array([1, 2, 0])])
    assert set(conditions.entries(both)) == {"label", "text"}
    assert conditions.num_classes(dict(reversed(both.items()))) == 7


def test_a_second_condition_leaves_the_parameters_of_the_first_as_they_are(params):
    both = {"class": CLASS, "text": Text(), "more": Text("more")}
    drawn = conditions.init(both, jax.random.key(0))
    np.testing.assert_array_equal(drawn["embedding"], params["embedding"])
    assert drawn.keys() == {"embedding", "text_scale", "more_scale"} == conditions.axes(both).keys()
    assert not np.any(drawn["text_scale"] == drawn["more_scale"])


def test_two_conditions_of_one_name_for_their_parameters_are_our_mistake():
    with pytest.raises(AssertionError, match="condition 'b'"):
        conditions.init({"a": Text(), "b": Text()}, jax.random.key(0))


def test_vectors_are_added_up_and_maps_stand_side_by_side():
    each = {
        "a": Plain("a", "vector", 3),
        "b": Plain("b", "vector", 3),
        "c": Plain("c", "maps", 1),
        "d": Plain("d", "maps", 2),
    }
    cond = {
        "a": jnp.full((2, 3), 1.0),
        "b": jnp.full((2, 3), 10.0),
        "c": jnp.full((2, 4, 4, 1), 3.0),
        "d": jnp.full((2, 4, 4, 2), 4.0),
    }
    signals = conditions.apply(each, {}, cond)
    np.testing.assert_array_equal(signals.vector, np.full((2, 3), 11.0))
    np.testing.assert_array_equal(signals.maps, np.tile([3.0, 4.0, 4.0], (2, 4, 4, 1)))
    assert signals.tokens is None
    assert conditions.widths(each) == Widths(vector=3, tokens=0, maps=3)


@pytest.mark.parametrize("kind, other", [("tokens", Text("b", 5)), ("vector", None)])
def test_widths_that_do_not_fit_are_refused(kind, other):
    each = {"a": Text("a", 6), "b": other} if other else {}
    each = each or {"a": Plain("a", "vector", 6), "b": Plain("b", "vector", 5)}
    with pytest.raises(InputError, match=rf"{kind} of different widths {{'a': 6, 'b': 5}}"):
        conditions.widths(each)
