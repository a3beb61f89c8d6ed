"""The optimizer against torch's AdamW, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ldm_jax.train import optim
from tests.parity import reference

pytestmark = pytest.mark.parity

START = {"kernel": reference.draw(0, 5, 7), "bias": reference.draw(1, 7)}
INPUT = reference.draw(2, 16, 5)
NUM_STEPS = 5
RECIPES = {
    "plain": optim.OptimConfig(lr=1e-2),
    "decay, betas, epsilon": optim.OptimConfig(lr=1e-2, b1=0.5, b2=0.9, eps=1e-3, weight_decay=0.3),
    "warm-up": optim.OptimConfig(lr=1e-2, warmup_steps=3, weight_decay=0.01),
    "clipped": optim.OptimConfig(lr=1e-2, eps=1e-2, clip_norm=0.05, weight_decay=0.01),
}


def loss(xp, params):
    y = xp.tanh(INPUT_FOR[xp] @ params["kernel"] + params["bias"].reshape(1, -1))
    return (y**3 + y**2).mean()


INPUT_FOR = {jnp: INPUT, torch: torch.from_numpy(INPUT)}


def our_run(config):
    optimizer = optim.make_optimizer(config, NUM_STEPS)
    params = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(params)
    for _ in range(NUM_STEPS):
        gradients = jax.grad(lambda params: loss(jnp, params))(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        yield params


def their_run(config):
    params = {k: torch.from_numpy(v.copy()).requires_grad_() for k, v in START.items()}
    optimizer = torch.optim.AdamW(
        params.values(),
        lr=config.lr,
        betas=(config.b1, config.b2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    warmup = max(config.warmup_steps, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / warmup))
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(torch, params).backward()
        if config.clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(params.values(), config.clip_norm)
            assert norm > config.clip_norm
        optimizer.step()
        schedule.step()
        yield {k: p.detach().numpy().copy() for k, p in params.items()}


def largest_difference(ours, theirs):
    steps = zip(our_run(ours), their_run(theirs), strict=True)
    return max(np.abs(a[k] - b[k]).max() for a, b in steps for k in START)


@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_adamw_is_the_reference_step_by_step(config):
    assert largest_difference(config, config) < 1e-6


@pytest.mark.parametrize(
    "fields", [dict(weight_decay=0.0), dict(b1=0.9), dict(b2=0.999), dict(eps=1e-8)]
)
def test_another_recipe_is_caught(fields):
    config = RECIPES["decay, betas, epsilon"]
    changed = optim.OptimConfig(**{**vars(config), **fields})
    assert largest_difference(changed, config) > 1e-4
