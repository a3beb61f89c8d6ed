"""Conditions: one token per class, one more for "no class"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import conditioners

CLASS = conditioners.ConditionerConfig(kind="class", num_classes=7, context_dim=6)


@pytest.fixture(scope="module")
def params():
    return conditioners.init(CLASS, jax.random.key(0))


def test_each_class_and_the_null_class_have_a_token_of_their_own(params):
    labels = jnp.arange(8, dtype=jnp.int32)
    context = conditioners.apply(CLASS, params, {"label": labels})
    assert context.shape == (8, 1, 6) and context.dtype == jnp.float32
    np.testing.assert_array_equal(context[:, 0], params["embedding"])
    assert len(np.unique(context, axis=0)) == 8


def test_null_condition_is_the_token_after_the_last_class(params):
    null = conditioners.null(CLASS, 3)
    assert null["label"].dtype == jnp.int32
    context = conditioners.apply(CLASS, params, null)
    np.testing.assert_array_equal(context, np.tile(params["embedding"][7], (3, 1, 1)))


def test_rows_start_standard_normal():
    config = conditioners.ConditionerConfig(kind="class", num_classes=1000, context_dim=64)
    rows = conditioners.init(config, jax.random.key(0))["embedding"]
    assert rows.shape == (1001, 64)
    assert abs(float(rows.mean())) < 5 / rows.size**0.5
    assert abs(float(jnp.square(rows).mean()) - 1) < 5 * (2 / rows.size) ** 0.5


def test_unconditional_model_has_no_parameters_context_or_condition():
    config = conditioners.ConditionerConfig()
    assert conditioners.init(config, jax.random.key(0)) == {} == conditioners.axes(config)
    assert conditioners.apply(config, {}, {}) is None
    assert conditioners.null(config, 4) == {}


def test_axes_name_every_dimension(params):
    jax.tree.map(
        lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim),
        params,
        conditioners.axes(CLASS),
    )


def test_configurations_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"conditioner 'clas' is unknown; choose one of .*'class'"):
        conditioners.ConditionerConfig(kind="clas")
    with pytest.raises(InputError, match=r"num_classes 0 must be positive for the class"):
        conditioners.ConditionerConfig(kind="class")
