import numpy as np

from ldm_jax.data import draws


def test_uniforms_depend_on_the_position_alone_and_fill_the_unit_interval():
    positions = np.arange(5000)
    whole = draws.uniforms(1, "flip", positions, 2)
    some = np.array([4999, 3, 255, 256, 1 << 40])
    np.testing.assert_array_equal(draws.uniforms(1, "flip", some, 2)[:4], whole[some[:4]])
    assert len(np.unique(whole)) == whole.size
    assert abs(whole.mean() - 0.5) < 0.02 and whole.min() >= 0 and whole.max() < 1
    assert abs(np.corrcoef(whole.T)[0, 1]) < 0.05
    assert not np.array_equal(whole, draws.uniforms(2, "flip", positions, 2))
    assert not np.array_equal(whole, draws.uniforms(1, "augment", positions, 2))
