"""Z-Image's transformer as in its authors' files and in ComfyUI: q, k and v in one tensor."""

from collections.abc import Sequence

from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.weights.layouts import Entry, Layout
from dopsd_jax.weights.validation import sources

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
ORIGINAL = "comfyui"
# In some published single files; no forward pass uses it, and diffusers drops it.
NORM_FINAL = "norm_final.weight"


def native_name(name: str) -> str:
    """The authors' name of a tensor or module whose rows are not fused."""
    head, _, rest = name.partition(".")
    if head in ("all_x_embedder", "all_final_layer"):  # the patch size stands in the name: 2-1
        name = f"{head.removeprefix('all_')}.{rest.partition('.')[2]}"
    return (
        name.replace(".attention.to_out.0", ".attention.out")
        .replace(".attention.norm_q", ".attention.q_norm")
        .replace(".attention.norm_k", ".attention.k_norm")
    )


def original(leaves: Sequence[Leaf], dim: int) -> Layout:
    """The single-file layout of a transformer whose diffusers names are `leaves`."""
    shapes = sources(leaves)
    entries = []
    for name, shape in shapes.items():
        if name.endswith(".attention.to_q.weight"):
            stem = name.removesuffix("to_q.weight")
            parts = [Source(f"{stem}to_{p}.weight", shapes[f"{stem}to_{p}.weight"]) for p in "qkv"]
            entries.append(Entry.stacked(f"{stem}qkv.weight", parts))
        elif not name.endswith((".attention.to_k.weight", ".attention.to_v.weight")):
            entries.append(Entry(native_name(name), (Source(name, shape),), shape))
    extra = Entry(NORM_FINAL, (Source(NORM_FINAL, (dim,)),), (dim,))
    return Layout(ORIGINAL, tuple(entries), (extra,), PREFIXES)
