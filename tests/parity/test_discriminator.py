"""The patch discriminator against torch.nn layers in the published order: same weights and numbers.

Logits, gradients with respect to images and parameters, and what one batch leaves in the norms.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
import torch

from ldm_jax.models import discriminator
from tests.parity import reference

pytestmark = pytest.mark.parity

CONFIGS = {
    f"{norm}, {num_layers} layers": discriminator.DiscriminatorConfig(
        width=8, num_layers=num_layers, norm=norm, compute_dtype="float32"
    )
    for norm in discriminator.NORMS
    for num_layers in (2, 3)
}
X = np.tanh(reference.draw(0, 4, 40, 32, 3))


class ActNorm(torch.nn.Module):
    """scale * (h + bias); the first batch in training mode sets both."""

    def __init__(self, channels):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.weight = torch.nn.Parameter(torch.ones(1, channels, 1, 1))
        self.started = False

    def forward(self, h):
        if not self.started:
            deviation, mean = torch.std_mean(h.detach(), (0, 2, 3), keepdim=True)
            self.bias.data.copy_(-mean)
            self.weight.data.copy_(1 / (deviation + 1e-6))
            self.started = True
        return self.weight * (h + self.bias)


NORMS = {"batch": torch.nn.BatchNorm2d, "act": ActNorm, "none": torch.nn.Identity}


def their_model(config):
    """Randomly drawn, so that nothing is zero or one; in training mode."""
    norm = NORMS[config.norm]
    widths = [config.width * min(2**i, 8) for i in range(config.num_layers + 1)]
    model = torch.nn.Sequential()
    model.add_module("conv0", torch.nn.Conv2d(3, widths[0], 4, 2, 1))
    model.add_module("act0", torch.nn.LeakyReLU(0.2))
    for i, (c_in, c_out) in enumerate(itertools.pairwise(widths), 1):
        stride = 1 if i == config.num_layers else 2
        bias = config.norm == "none"
        model.add_module(f"conv{i}", torch.nn.Conv2d(c_in, c_out, 4, stride, 1, bias=bias))
        model.add_module(f"norm{i}", norm(c_out))
        model.add_module(f"act{i}", torch.nn.LeakyReLU(0.2))
    model.add_module("logits", torch.nn.Conv2d(widths[-1], 1, 4, 1, 1))
    return reference.randomize(model).train()


def as_tree(config, tensors):
    """Tensors by their names (parameters or gradients) -> our tree."""
    tree = {}
    for name in ["conv0", *(f"conv{i}" for i in range(1, config.num_layers + 1)), "logits"]:
        tree[name] = {"kernel": tensors[f"{name}.weight"].transpose(2, 3, 1, 0)}
        norm = name.replace("conv", "norm")
        if f"{name}.bias" in tensors:
            tree[name]["bias"] = tensors[f"{name}.bias"]
        else:
            scale, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
            tree[name]["norm"] = {"scale": scale.reshape(-1), "bias": bias.reshape(-1)}
    return tree


def logits_shape(config):
    _, height, width, _ = X.shape
    return len(X), height // 2**config.num_layers - 2, width // 2**config.num_layers - 2, 1


@functools.cache
def our_answers(config):
    """Logits, gradients by parameters and images, running statistics; parameters in use."""

    @jax.jit
    def answers(params, running, x, cotangent):
        if config.norm == "act":
            params = discriminator.start_act_norm(config, params, x)
        apply = functools.partial(discriminator.apply, config)
        logits, pullback, batch = jax.vjp(apply, params, x, has_aux=True)
        running = discriminator.update_statistics(running, batch)
        return logits, *pullback(cotangent), running, params

    params = as_tree(config, reference.tensors(their_model(config)))
    running = discriminator.init_statistics(config)
    return answers(params, running, X, reference.draw(1, *logits_shape(config)))


def errors(config, mutate=lambda model: None):
    """Our largest error in each answer."""
    model = their_model(config)
    mutate(model)
    cotangent = reference.draw(1, *logits_shape(config))
    logits, dx = reference.value_and_pullback(model, X, cotangent)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    running = {
        name.replace("norm", "conv"): {
            "mean": module.running_mean.numpy(),
            "variance": module.running_var.numpy(),
        }
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    }
    params = as_tree(config, reference.tensors(model))
    theirs = logits, as_tree(config, gradients), dx, running, params
    ours = our_answers(config)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    return [
        max(jax.tree.leaves(jax.tree.map(reference.error, *pair)), default=0.0)
        for pair in zip(ours, theirs, strict=True)
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_gradients_and_statistics_are_the_reference(config):
    assert max(errors(config)) < 1e-5


def of_kind(model, kind):
    return [module for module in model if isinstance(module, kind)]


def another_slope(model):
    for module in of_kind(model, torch.nn.LeakyReLU):
        module.negative_slope = 0.1


def another_epsilon(model):
    for module in of_kind(model, torch.nn.BatchNorm2d):
        module.eps = 1e-3


def running_statistics_in_use(model):
    for module in of_kind(model, torch.nn.BatchNorm2d):
        module.eval().running_mean.fill_(0.1)


@pytest.mark.parametrize("mutate", [another_slope, another_epsilon, running_statistics_in_use])
def test_another_discriminator_is_caught(mutate):
    logits, gradients, dx, *_ = errors(CONFIGS["batch, 2 layers"], mutate)
    assert min(logits, gradients, dx) > 1e-4


def test_another_momentum_is_caught():
    def mutate(model):
        for module in of_kind(model, torch.nn.BatchNorm2d):
            module.momentum = 0.2

    *_, running, _ = errors(CONFIGS["batch, 2 layers"], mutate)
    assert running > 1e-2


def test_a_norm_that_has_not_started_is_caught():
    def mutate(model):
        for module in of_kind(model, ActNorm):
            module.started = True

    assert min(np.delete(errors(CONFIGS["act, 2 layers"], mutate), 3)) > 1e-2
