"""Model folders of the published sizes with random weights, for machines that reach no hub.

Written in about a minute and kept between cases: all tensors are parts of one random block. A dry
run takes the family's random miniature.
"""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from dopsd_jax import families
from dopsd_jax.families.base import Family
from dopsd_jax.families.flux2_klein import random as klein
from dopsd_jax.random_model import configs, write_json
from dopsd_jax.weights.safetensors_write import write_sharded
from dopsd_jax.weights.tensors import TensorInfo

FACTS = Path(__file__).resolve().parents[1] / "tests" / "data"  # published configurations
BLOCK, DEVIATION = 1 << 24, 0.02
DONE = "big"  # a file in the folder that is whole


def folder(name: str, dry: bool) -> Path:
    """The model folder of a family."""
    family = families.load(name)
    path = Path(tempfile.gettempdir()) / "dopsd_on_gpu" / f"{name}{'_dry' * dry}"
    if not (path / DONE).exists():
        family.write_random_model(path)
        if not dry:
            print(f"writing {path}", flush=True)
            enlarge(family, path)
        (path / DONE).touch()
    return path


def enlarge(family: Family, path: Path) -> None:
    """Gives the networks of a miniature the published sizes; its tokenizers stay."""
    for name, config in networks(family).items():
        network, place = family.NETWORKS[name], path / name
        for old in place.glob("*.safetensors*"):
            old.unlink()
        size = network.read_config(config, name)
        infos = {
            source.name: TensorInfo("BF16", source.shape)
            for leaf in network.names(size)
            for source in leaf.sources
        }
        if name == "vae":
            infos |= {s.name: TensorInfo("I64", s.shape) for s in network.unused(size)}
        write_json(place / "config.json", config)
        write_sharded(place, network.base, Repeated(infos), metadata={"format": "pt"})


def networks(family: Family) -> dict[str, dict]:
    """config.json of each network, as published; the ids of special tokens are the miniature's."""
    facts = lambda name: json.loads((FACTS / f"{name}.json").read_text("utf-8"))["config"]
    size = next(iter(family.PUBLISHED.values()))
    found = {"transformer": size.to_dict(), "text_encoder": facts("qwen3_4b")}
    if "vlm" in family.NETWORKS:
        ids = {k: v for k, v in configs.vlm(configs.Size()).items() if k.endswith("_token_id")}
        return found | {"vae": facts("zimage_vae"), "vlm": facts("qwen3_vl_4b") | ids}
    vae = {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": size.channels // 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 1024,
    }
    return found | {"vae": klein.autoencoder() | vae}


class Repeated:
    """Tensors that repeat one random block; see `weights.tensors.Tensors`."""

    where = "random numbers"

    def __init__(self, infos: dict[str, TensorInfo]):
        self.infos = infos
        block = DEVIATION * np.random.default_rng(0).standard_normal(BLOCK, np.float32)
        self.block = block.astype(ml_dtypes.bfloat16)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        info = self.infos[name]
        if info.dtype == "I64":
            return np.zeros(info.shape, np.int64)[rows]
        if name.endswith("running_var") or (len(info.shape) == 1 and name.endswith("weight")):
            return np.ones(info.shape, ml_dtypes.bfloat16)[rows]
        return np.resize(self.block, info.shape)[rows]
