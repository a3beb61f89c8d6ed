"""First stages.

    ldm train-autoencoder --config=configs/autoencoder.py:VARIANT --workdir=DIR

`digits` is ours, small: 1.5 minutes on two CPU cores, held-out PSNR >= 34 dB (`ldm demo`).
`photographs` is ours too, a kl-f4 of 48-pixel squares of bundled photographs, for experiments. The
rest are LDM's (Rombach et al., CVPR 2022): every row of its Table 8 and every released
configuration. PSNR and R-FID are *published*, of models trained on OpenImages and measured on
ImageNet's validation images at 256 pixels; none is measured by us yet. The number of steps is ours
(published: 176,991 to 1,608,649). Where nothing was released (an asterisk), widths, attention and
the adversary's settings are those of the nearest released model.

What every one of them needs, and how to do without it:
  pictures        --config.images.path=DIR (or another source)
  LPIPS weights   `ldm weights lpips`; --config.loss.perceptual_weight=0 trains without them

The learning rate is what is used; nothing multiplies it. That of the table is 4.5e-6 for every
image of one GPU's batch, as the released scripts compute it on one GPU; on how many the models were
trained is not published, so set --config.optim.lr together with --config.batch_size. The released
ImageNet trainings of kl-f4, kl-f8, kl-f16 and kl-f32 have 24 images a step (12, accumulated twice)
and so 1.08e-4. `start` is the step at which the adversary joins; the released values have no stated
reason, and where the reconstruction loss still falls, a later one is safer:
--config.adversarial.start=50001.

  sd-ft-ema, sd-ft-mse   decoder-only fine-tuning of kl-f8, as Stable Diffusion's later decoders:
                         --config.init_from=WORKDIR (`ldm import` makes one). Learning rate: ours.
  kl-f8-eq               kl-f8 fine-tuned with EQ-VAE's equivariance term (Kouzelis et al., 2025);
                         --config.init_from=WORKDIR, or from scratch without it.
  identity               f = 1, diffusion on pixels: nothing is trained, the workdir serves caching.
"""

import ml_collections

# name       latent multipliers attends middle C  codes batch start  weight layers R-FID PSNR
TABLE = """
kl-f2*       kl     1,2         -       yes    2  -     10    50001  0.5    3      0.086 32.47
kl-f4        kl     1,2,4       -       yes    3  -     10    50001  0.5    3      0.27  27.53
kl-f8        kl     1,2,4,4     -       yes    4  -     4     50001  0.5    3      0.90  24.19
kl-f16       kl     1,1,2,2,4   16      yes    16 -     6     50001  0.5    3      0.87  24.08
kl-f16-c8*   kl     1,1,2,2,4   16      yes    8  -     6     50001  0.5    3      2.63  21.94
kl-f32       kl     1,1,2,2,4,4 16,8    yes    64 -     6     50001  0.5    3      2.04  22.27
kl-f32-c16*  kl     1,1,2,2,4,4 16,8    yes    16 -     6     50001  0.5    3      7.3   20.38
vq-f2*       vq     1,2         -       yes    2  2048  8     0      0.75   3      0.16  30.85
vq-f2-n64*   vq     1,2         -       yes    2  64    8     0      0.75   3      0.40  29.13
vq-f4        vq     1,2,4       -       yes    3  8192  8     0      0.75   3      0.58  27.43
vq-f4-noattn vq     1,2,4       -       no     3  8192  8     11     0.75   3      1.06  25.21
vq-f4-n256*  vq     1,2,4       -       yes    3  256   8     0      0.75   3      0.47  26.43
vq-f8        vq     1,2,2,4     32      yes    4  16384 10    1      0.6    2      1.14  23.07
vq-f8-n256   vq     1,2,2,4     32      yes    4  256   10    250001 0.75   3      1.49  22.35
vq-f16       vq     1,1,2,2,4   16      yes    8  16384 14    250001 0.75   2      5.15  20.83
vq-f32*      vq     1,1,2,2,4,4 16,8    yes    16 16384 14    250001 0.75   2      31.83 17.45
"""
ROWS = {row.split()[0].rstrip("*"): row.split()[1:] for row in TABLE.strip().splitlines()}

VARIANTS = ("digits", "photographs", *ROWS, "sd-ft-ema", "sd-ft-mse", "kl-f8-eq", "identity")


def get_config(variant: str = "kl-f8") -> ml_collections.ConfigDict:
    special = {
        "digits": _digits,
        "photographs": _photographs,
        "sd-ft-ema": _ft_ema,
        "sd-ft-mse": _ft_mse,
        "kl-f8-eq": _equivariant,
        "identity": _identity,
    }
    return special[variant]() if variant in special else _published(variant)


def _published(name):
    latent, multipliers, attends, middle, channels, codes, batch, start, weight, layers, *_ = ROWS[
        name
    ]

    def numbers(text):
        return tuple(int(n) for n in text.split(",") if n != "-")

    c = ml_collections.ConfigDict()
    c.batch_size = int(batch)
    c.num_steps = 500_000
    c.log_every = 100
    c.checkpoint_every = 5_000
    c.eval_every = 5_000
    c.data_threads = 8
    c.images = ml_collections.ConfigDict(
        {"source": "folder", "path": "", "resolution": 256, "crop": "random", "flip": True}
    )
    c.model = ml_collections.ConfigDict(
        {
            "latent": latent,
            "resolution": 256,
            "width": 128,
            "width_multipliers": numbers(multipliers),
            "num_res_blocks": 2,
            "attention_resolutions": numbers(attends),
            "middle_attention": middle == "yes",
            "z_channels": int(channels),
            "latent_channels": int(channels),
        }
    )
    if latent == "vq":
        c.model.quantizer = ml_collections.ConfigDict({"codebook_size": int(codes)})
    # Sums over an image in the KL models, means in the VQ models: as published.
    c.loss = ml_collections.ConfigDict({"reduction": "sum" if latent == "kl" else "mean"})
    c.adversarial = ml_collections.ConfigDict(
        {
            "weight": float(weight),
            "start": int(start),
            "discriminator": {"num_layers": int(layers)},
        }
    )
    c.optim = ml_collections.ConfigDict({"lr": 4.5e-6 * int(batch), "b1": 0.5, "b2": 0.9})
    return c


def _ft_ema():
    """Published: 313,198 steps with L1 + LPIPS and an average of the weights, batch 192."""
    c = _published("kl-f8")
    c.train = "decoder"
    c.batch_size = 192
    c.num_steps = 313_198
    c.adversarial.weight = 0.0
    c.optim.lr = 1e-5
    c.ema = ml_collections.ConfigDict({"decay": 0.9999})
    return c


def _ft_mse():
    """Published: 280,000 further steps from ft-EMA with MSE + 0.1 LPIPS."""
    c = _ft_ema()
    c.num_steps = 280_000
    c.loss.pixel = "l2"
    c.loss.perceptual_weight = 0.1
    return c


def _equivariant():
    c = _published("kl-f8")
    c.loss.equivariance_weight = 1.0
    return c


def _identity():
    c = ml_collections.ConfigDict()
    c.images = ml_collections.ConfigDict({"source": "folder", "path": "", "resolution": 256})
    c.model = ml_collections.ConfigDict(
        {
            "latent": "identity",
            "resolution": 256,
            "width_multipliers": (1,),
            "z_channels": 3,
            "latent_channels": 3,
        }
    )
    c.loss = ml_collections.ConfigDict({"perceptual_weight": 0.0})
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
    c.loss = ml_collections.ConfigDict({"perceptual_weight": 0.0})
    c.optim = ml_collections.ConfigDict(
        {"lr": 2e-3, "b1": 0.9, "b2": 0.99, "warmup_steps": 40, "schedule": "cosine"}
    )
    return c


def _photographs():
    c = ml_collections.ConfigDict()
    c.batch_size = 16
    c.num_steps = 1200
    c.log_every = 50
    c.checkpoint_every = 600
    c.images = ml_collections.ConfigDict(
        {"source": "photographs", "resolution": 48, "crop": "random", "flip": True}
    )
    c.model = ml_collections.ConfigDict(
        {
            "resolution": 48,
            "width": 16,
            "width_multipliers": (1, 2, 4),
            "num_res_blocks": 1,
            "z_channels": 3,
            "latent_channels": 3,
            "norm_groups": 8,
        }
    )
    c.loss = ml_collections.ConfigDict({"perceptual_weight": 0.0})
    c.optim = ml_collections.ConfigDict(
        {"lr": 2e-3, "b1": 0.9, "b2": 0.99, "warmup_steps": 50, "schedule": "cosine"}
    )
    return c
