"""Sizes of the trained miniature FLUX.2-klein, in the published configuration files' own keys."""

import dataclasses

from dopsd_jax.families.flux2_klein.pipeline import LAYERS
from dopsd_jax.families.flux2_klein.random import autoencoder as random_autoencoder
from dopsd_jax.miniature import captions, edits
from dopsd_jax.miniature.zimage import configs as zimage_configs
from dopsd_jax.models import qwen3
from dopsd_jax.models.flux2_autoencoder import FOLD, Flux2AutoencoderConfig
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.random_model.tokenizer import added_ids

MERGES = 456  # pairs that the tokenizer merges, all there are: every word is one token
IDS = added_ids(MERGES)
VOCABULARY = 768
ROWS = 48  # tokens of every text
LATENT_CHANNELS = zimage_configs.LATENT_CHANNELS  # of what the decoder takes
FACTOR = zimage_configs.FACTOR * FOLD
DEPTH = LAYERS[-1] + 1  # of the text encoder; the last layer is not used


@dataclasses.dataclass(frozen=True)
class Size:
    """Widths and depths; `axes` are the rotary axes of a head of the transformer.

    Of the text encoder only the layers whose outputs are used are there; see `export`.
    """

    heads: int = 4
    head_dim: int = 24
    axes: tuple[int, int, int, int] = (4, 8, 8, 4)
    double_layers: int = 2
    single_layers: int = 6
    text_dim: int = 96

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def of_zimage(self) -> zimage_configs.Size:
        """The miniature Z-Image whose text encoder has the same layers."""
        return zimage_configs.Size(text_dim=self.text_dim, text_layers=len(LAYERS) + 1)


def transformer(size: Size) -> Flux2Config:
    """The transformer's."""
    return Flux2Config(
        heads=size.heads,
        head_dim=size.head_dim,
        double_layers=size.double_layers,
        single_layers=size.single_layers,
        channels=LATENT_CHANNELS * FOLD**2,
        text_dim=len(LAYERS) * size.text_dim,
        axes_dims=size.axes,
        rope_theta=32.0,  # positions go to 8, not to 64
        time_frequencies=64,
        text_rows=ROWS,
    )


def text_encoder(size: Size, layers: int = DEPTH) -> dict:
    """text_encoder/config.json."""
    base = zimage_configs.text_encoder(size.of_zimage)
    return {
        **base,
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"],
        "max_window_layers": layers,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
    }


def language(size: Size, layers: int = DEPTH) -> qwen3.Qwen3Config:
    """The text encoder's, as the network takes it."""
    return qwen3.Qwen3Config.from_dict(text_encoder(size, layers), "miniature")


def autoencoder() -> dict:
    """vae/config.json: of the miniature Z-Image's sizes."""
    own, base = zimage_configs.autoencoder(), random_autoencoder()
    shape = ("block_out_channels", "down_block_types", "up_block_types", "latent_channels")
    shape += ("layers_per_block", "mid_block_add_attention")
    return {**base, **{name: own[name] for name in shape}}


def autoencoder_config() -> Flux2AutoencoderConfig:
    """The same as the network takes it."""
    return Flux2AutoencoderConfig.from_dict(autoencoder(), "miniature")


def words() -> list[str]:
    """What the tokenizer's merges are learned from."""
    return [*captions.vocabulary(), *edits.vocabulary()]
