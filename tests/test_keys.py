"""Every draw has a name: another purpose, step, seed or example draws other numbers."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.keys import example_keys, key_for, normal_like


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_keys_differ_in_seed_purpose_and_step_and_in_nothing_else():
    names = list(itertools.product((0, 1, 7), ("noise", "posterior", "timestep"), (0, 1, 2)))
    keys = [data(key_for(*name)) for name in names]
    assert len(set(keys)) == len(names)
    assert keys == [data(key_for(*name)) for name in names]


def test_key_is_the_same_in_another_process():
    # Python's hash() of a text is not.
    code = (
        "import jax; from ldm_jax.keys import key_for;"
        "print(*jax.random.key_data(key_for(3, 'noise', 5)).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(map(int, out.stdout.split())) == data(key_for(3, "noise", 5))


def test_traced_seed_and_step_give_the_key_of_the_same_numbers():
    traced = jax.jit(lambda seed, step: key_for(seed, "noise", step))
    for seed, step in ((0, 0), (3, 1), (2**31 + 5, 400_000)):
        got = traced(jnp.uint32(seed), jnp.int32(step))
        assert data(got) == data(key_for(seed, "noise", step))


def test_example_keys_depend_on_the_global_index_alone():
    key = key_for(0, "noise", 9)
    whole = jax.random.key_data(example_keys(key, jnp.arange(12)))
    assert len(np.unique(whole, axis=0)) == 12
    for indices in (jnp.arange(5), jnp.array([11, 0, 3])):
        part = jax.random.key_data(example_keys(key_for(0, "noise", 9), indices))
        np.testing.assert_array_equal(part, whole[indices])


def test_normal_like_draws_each_row_from_its_own_key():
    def noise(indices):
        return normal_like(
            example_keys(key_for(0, "noise", 0), jnp.asarray(indices)),
            jnp.zeros((len(indices), 3, 2)),
        )

    whole = noise(range(6))
    np.testing.assert_array_equal(noise([4]), whole[4:5])
    np.testing.assert_array_equal(noise([5, 1, 0]), whole[jnp.array([5, 1, 0])])
    assert len(np.unique(whole)) == whole.size


def test_normal_like_is_standard_normal_f32_whatever_the_input_type():
    keys = example_keys(key_for(1, "noise", 0), jnp.arange(500))
    noise = normal_like(keys, jnp.zeros((500, 40), jnp.bfloat16))
    assert noise.dtype == jnp.float32
    # 20,000 draws: five standard errors.
    assert abs(float(noise.mean())) < 5 / 20_000**0.5
    assert abs(float(jnp.square(noise).mean()) - 1) < 5 * (2 / 20_000) ** 0.5
