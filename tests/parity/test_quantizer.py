"""Vector quantisation against diffusers' VectorQuantizer: same codes, loss and gradients."""

import functools

import jax
import pytest
import torch
from diffusers.models.autoencoders.vq_model import VectorQuantizer

from ldm_jax.models import quantizer
from tests.parity import reference

pytestmark = pytest.mark.parity

N, C = quantizer.CHUNK + 100, 4
CODEBOOK = reference.draw(0, N, C)
Z = reference.draw(1, 2, 8, 8, C)
COTANGENT = reference.draw(2, *Z.shape) / Z.size  # as small as the gradient of a mean


@functools.cache
def our_answers(legacy):
    """Codes, indices, loss, and the gradients of loss + <codes, cotangent> by latents and codes."""
    config = quantizer.QuantizerConfig(codebook_size=N, beta=0.25, legacy_beta=legacy)

    @jax.jit
    def answers(z, codebook):
        def total(z, codebook):
            z_q, indices = quantizer.quantize(codebook, z)
            loss = quantizer.loss(config, z, z_q)
            passed = quantizer.straight_through(z, z_q)
            return loss + (passed * COTANGENT).sum(), (passed, indices, loss)

        gradients, values = jax.grad(total, (0, 1), has_aux=True)(z, codebook)
        return *values, *gradients

    return answers(Z, CODEBOOK)


def errors(legacy, beta=0.25, mutate=lambda model: None):
    model = VectorQuantizer(N, C, beta=beta, legacy=legacy, sane_index_shape=True)
    model.embedding.weight.data.copy_(torch.from_numpy(CODEBOOK))
    mutate(model)
    z = reference.to_torch(Z).requires_grad_()
    z_q, loss, (_, _, indices) = model(z)
    (loss + (z_q * reference.to_torch(COTANGENT)).sum()).backward()
    theirs = (
        reference.from_torch(z_q),
        indices.numpy(),
        loss.detach().numpy(),
        reference.from_torch(z.grad),
        model.embedding.weight.grad.numpy(),
    )
    return [reference.error(*pair) for pair in zip(our_answers(legacy), theirs, strict=True)]


@pytest.mark.parametrize("legacy", [True, False])
def test_codes_loss_and_gradients_are_the_reference(legacy):
    found = errors(legacy)
    assert found[1] == 0
    assert max(found) < 1e-5


@pytest.mark.parametrize("legacy", [True, False])
def test_another_beta_is_caught(legacy):
    _, _, loss, to_z, to_codes = errors(legacy, beta=0.5)
    assert loss > 1e-2
    assert (to_codes if legacy else to_z) > 1e-2


def test_codes_in_another_order_are_caught():
    def mutate(model):
        model.embedding.weight.data = model.embedding.weight.data.flip(0)

    codes, indices, loss, *_ = errors(True, mutate=mutate)
    assert indices > 0.1
    assert max(codes, loss) < 1e-5
