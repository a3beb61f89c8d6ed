"""What a training run carries from step to step: data only; functions come by closure."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything is f32 except `step`.

    `averages` are trees like the parameters, by the names that they have in checkpoints: "ema" the
    main one, "ema-0.999" and "ema-power-0.05" those beside it (train/ema.py). `extra` is what a
    training carries besides its model: the discriminator of a first stage with its optimizer, the
    counts of a codebook, an uncertainty. Empty for most.
    """

    step: jax.Array  # int32 [], number of updates done
    params: Any
    opt_state: Any
    averages: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def weights(self) -> Any:
        """What is judged and sampled from: the main average, or the parameters without one."""
        return self.averages.get("ema", self.params)
