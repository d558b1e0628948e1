"""FLUX.2's networks as in their authors' files and in ComfyUI.

In the transformer q, k and v are one tensor, and the last modulation is (shift, scale) where
diffusers has (scale, shift). The autoencoder has the names of the original LDM code.
"""

import dataclasses
import re
from collections.abc import Sequence

from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.weights import layouts_vae
from dopsd_jax.weights.layouts import Entry, Layout
from dopsd_jax.weights.validation import sources

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
ORIGINAL = "comfyui"
SWAPPED = "norm_out.linear.weight"

# diffusers -> the authors' names, as parts of the whole name, in this order.
RENAMED = (
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_", r"single_blocks.\1.norm."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.attn\.norm_added_", ".txt_attn.norm."),
    (r"\.attn\.norm_", ".img_attn.norm."),
    (r"\.norm\.q\.weight", ".norm.query_norm.scale"),
    (r"\.norm\.k\.weight", ".norm.key_norm.scale"),
    (r"\.attn\.to_out\.0", ".img_attn.proj"),
    (r"\.attn\.to_add_out", ".txt_attn.proj"),
    (r"\.ff\.linear_in", ".img_mlp.0"),
    (r"\.ff\.linear_out", ".img_mlp.2"),
    (r"\.ff_context\.linear_in", ".txt_mlp.0"),
    (r"\.ff_context\.linear_out", ".txt_mlp.2"),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^(\w+_stream_modulation\w*)\.linear", r"\1.lin"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
)
# The first of three tensors that are one, the others, and the name of the one.
STACKED = {
    ".attn.to_q.weight": ((".attn.to_k.weight", ".attn.to_v.weight"), ".img_attn.qkv.weight"),
    ".attn.add_q_proj.weight": (
        (".attn.add_k_proj.weight", ".attn.add_v_proj.weight"),
        ".txt_attn.qkv.weight",
    ),
}


def native_name(name: str) -> str:
    """The authors' name of a tensor that is one by itself."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def transformer(leaves: Sequence[Leaf]) -> Layout:
    """The single-file layout of a transformer whose diffusers names are `leaves`."""
    shapes = sources(leaves)
    entries = []
    for name, shape in shapes.items():
        start = next((end for end in STACKED if name.endswith(end)), None)
        if start is not None:
            stem, (others, whole) = name.removesuffix(start), STACKED[start]
            parts = [Source(stem + end, shapes[stem + end]) for end in (start, *others)]
            entries.append(Entry.stacked(native_name(stem + whole), parts))
        elif not any(name.endswith(others) for others, _ in STACKED.values()):
            own = Source(name, shape)
            entries.append(Entry(native_name(name), (own,), shape, swapped=name == SWAPPED))
    return Layout(ORIGINAL, tuple(entries), prefixes=PREFIXES)


def autoencoder(leaves: Sequence[Leaf], levels: int, unused: Sequence[Source]) -> Layout:
    """The layout of `flux2-vae.safetensors`: LDM's, with the statistics under diffusers' names."""
    same = lambda name, shape: Entry(name, (Source(name, shape),), shape)
    statistics = [leaf for leaf in leaves if leaf.sources[0].name.startswith("bn.")]
    base = layouts_vae.original([leaf for leaf in leaves if leaf not in statistics], levels)
    placed = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}

    def moved(entry: Entry) -> Entry:
        head = entry.name.partition(".")[0] + "."
        return dataclasses.replace(entry, name=entry.name.replace(head, placed.get(head, head), 1))

    return Layout(
        layouts_vae.ORIGINAL,
        (
            *map(moved, base.entries),
            *(same(name, shape) for name, shape in sources(statistics).items()),
        ),
        tuple(same(source.name, source.shape) for source in unused),
    )
