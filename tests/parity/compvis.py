"""A first stage in PyTorch whose modules have the names of CompVis' checkpoints, for comparison.

Written from the published architecture: any config of ours, and nothing that training needs.
"""

import torch
from torch import nn
from torch.nn import functional

from ldm_jax.models import autoencoder


def norm(config, width):
    return nn.GroupNorm(config.norm_groups, width, eps=1e-6)


class Block(nn.Module):
    def __init__(self, config, width_in, width):
        super().__init__()
        self.norm1, self.norm2 = norm(config, width_in), norm(config, width)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.norm = norm(config, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        h = functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Downsampling pads on the right and at the bottom; upsampling repeats the nearest."""

    def __init__(self, width, *, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        if self.down:
            return self.conv(functional.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, -1).repeat_interleave(2, -2))


class Half(nn.Module):
    """An encoder or a decoder; its levels count from the finest in both."""

    def __init__(
        self, config: autoencoder.AutoencoderConfig, channels_in, channels_out, *, encoder
    ):
        super().__init__()
        widths = [config.width * m for m in config.width_multipliers]
        self.order = list(enumerate(widths)) if encoder else list(enumerate(widths))[::-1]
        self.encoder = encoder
        width = config.width if encoder else widths[-1]
        self.conv_in = nn.Conv2d(channels_in, width, 3, padding=1)
        levels: dict[int, nn.Module] = {}
        for i, wanted in self.order:
            level = levels[i] = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + (not encoder)):
                level.block.append(Block(config, width, wanted))
                width = wanted
                if config.resolution // 2**i in config.attention_resolutions:
                    level.attn.append(Attention(config, width))
            if i != self.order[-1][0]:
                resample = "downsample" if encoder else "upsample"
                setattr(level, resample, Resample(width, down=encoder))
        ordered = nn.ModuleList([levels[i] for i in sorted(levels)])
        setattr(self, "down" if encoder else "up", ordered)
        self.mid = nn.Module()
        self.mid.block_1 = Block(config, widths[-1], widths[-1])
        if config.middle_attention:
            self.mid.attn_1 = Attention(config, widths[-1])
        self.mid.block_2 = Block(config, widths[-1], widths[-1])
        self.norm_out = norm(config, width)
        self.conv_out = nn.Conv2d(width, channels_out, 3, padding=1)

    def middle(self, x):
        return self.mid.block_2(getattr(self.mid, "attn_1", lambda h: h)(self.mid.block_1(x)))

    def forward(self, x):
        x = self.conv_in(x)
        x = x if self.encoder else self.middle(x)
        for i, _ in self.order:
            level = (self.down if self.encoder else self.up)[i]
            for j, block in enumerate(level.block):
                x = block(x)
                x = level.attn[j](x) if len(level.attn) else x
            for resample in ("downsample", "upsample"):
                x = getattr(level, resample)(x) if hasattr(level, resample) else x
        x = self.middle(x) if self.encoder else x
        return self.conv_out(functional.silu(self.norm_out(x)))


class FirstStage(nn.Module):
    def __init__(self, config: autoencoder.AutoencoderConfig):
        super().__init__()
        gaussian = 2 if config.latent == "kl" else 1
        z, c = config.z_channels, config.latent_channels
        self.encoder = Half(config, config.image_channels, gaussian * z, encoder=True)
        self.decoder = Half(config, z, config.image_channels, encoder=False)
        self.quant_conv = nn.Conv2d(gaussian * z, gaussian * c, 1)
        self.post_quant_conv = nn.Conv2d(c, z, 1)
        if config.latent == "vq":
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(config.quantizer.codebook_size, c)

    def encode(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        if hasattr(self, "quantize"):
            codes = self.quantize.embedding.weight
            distances = (z.movedim(1, -1)[..., None, :] - codes).square().sum(-1)
            z = codes[distances.argmin(-1)].movedim(-1, 1)
        return self.decoder(self.post_quant_conv(z))


def checkpoint(module: nn.Module, prefix: str = "") -> dict:
    """What a `.ckpt` of the module holds, with a loss and an average that are no weights of it."""
    state = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    more = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(4)}
    state |= {f"{prefix}{name}": tensor for name, tensor in more.items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {"state_dict": state, "global_step": 7, "epoch": 1}
