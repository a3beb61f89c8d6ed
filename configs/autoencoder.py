"""First stages.

    ldm train-autoencoder --config=configs/autoencoder.py:VARIANT --workdir=DIR

| variant | architecture and learning rate           | expected score                        |
|---------|------------------------------------------|---------------------------------------|
| digits  | ours, small; 1.5 minutes on two CPU cores| held-out PSNR >= 34 dB (`ldm demo`)   |
| kl-f4   | LDM, Table 8 and the released config     | not yet measured (published PSNR 27.53)|
| kl-f8   | LDM, Table 8 and the released config     | not yet measured (published PSNR 24.19)|
| kl-f16  | LDM, Table 8 and the released config     | not yet measured (published PSNR 24.08)|
| kl-f32  | LDM, Table 8 and the released config     | not yet measured (published PSNR 22.27)|

The published PSNRs are those of models trained with a perceptual and an adversarial loss on
OpenImages. Point `images` at your own pictures: --config.images.path=DIR.
"""

import ml_collections

# name: (width multipliers, attention at sides, C, images per step of one device as released)
PUBLISHED = {
    "kl-f4": ((1, 2, 4), (), 3, 10),
    "kl-f8": ((1, 2, 4, 4), (), 4, 4),
    "kl-f16": ((1, 1, 2, 2, 4), (16,), 16, 6),
    "kl-f32": ((1, 1, 2, 2, 4, 4), (16, 8), 64, 6),
}

VARIANTS = ("digits", *PUBLISHED)


def get_config(variant: str = "kl-f8") -> ml_collections.ConfigDict:
    return _digits() if variant == "digits" else _published(*PUBLISHED[variant])


def _published(multipliers, attention, channels, batch_size):
    c = ml_collections.ConfigDict()
    c.batch_size = batch_size
    c.num_steps = 500_000
    c.log_every = 100
    c.checkpoint_every = 5_000
    c.data_threads = 8
    c.images = ml_collections.ConfigDict(
        {"source": "folder", "path": "", "resolution": 256, "crop": "random", "flip": True}
    )
    c.model = ml_collections.ConfigDict(
        {
            "resolution": 256,
            "width": 128,
            "width_multipliers": multipliers,
            "num_res_blocks": 2,
            "attention_resolutions": attention,
            "z_channels": channels,
            "latent_channels": channels,
        }
    )
    # The released learning rate is 4.5e-6 times the images per step over all GPUs.
    c.optim = ml_collections.ConfigDict({"lr": 4.5e-6 * batch_size, "b1": 0.5, "b2": 0.9})
    return c


def _digits():
    c = ml_collections.ConfigDict()
    c.batch_size = 32
    c.num_steps = 260
    c.log_every = 20
    c.checkpoint_every = 130
    c.images = ml_collections.ConfigDict(
        {"source": "digits", "resolution": 32, "held_out_fraction": 1 / 6}
    )
    c.model = ml_collections.ConfigDict(
        {
            "resolution": 32,
            "width": 16,
            "width_multipliers": (1, 2, 4),
            "num_res_blocks": 1,
            "z_channels": 4,
            "latent_channels": 4,
            "norm_groups": 8,
        }
    )
    c.optim = ml_collections.ConfigDict(
        {"lr": 2e-3, "b1": 0.9, "b2": 0.99, "warmup_steps": 40, "schedule": "cosine"}
    )
    return c
