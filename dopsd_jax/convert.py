"""Moves weights between PyTorch folders, single files, converted checkpoints and LoRA files.

python -m dopsd_jax.convert COMMAND ...; from a clone also python tools/convert_weights.py.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # converting needs no accelerator

from dopsd_jax.common.errors import UserError, raise_if, report
from dopsd_jax.common.program import Parser, local_lora, local_name, local_path

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Of LoRA files, by their letters (weights/lora_dialects.py, WRITTEN): the programs that say so.
DIALECTS = {
    "D": ("diffusers", "comfyui"),
    "Cs": (),
    "Cn": (),
    "K": ("kohya",),
    "Q": ("peft",),
    "Y": ("lycoris",),
}
NAMED_DIALECTS = ", ".join(f"{x} ({', '.join(own)})" if own else x for x, own in DIALECTS.items())
EXAMPLES = """examples:
  %(prog)s import Tongyi-MAI/Z-Image-Turbo zimage-converted
  %(prog)s import z_image_turbo_bf16.safetensors zimage-converted --base Tongyi-MAI/Z-Image-Turbo
  %(prog)s export zimage-converted zimage-diffusers --format diffusers
  %(prog)s export zimage-converted zimage.safetensors --format comfyui --dtype bfloat16
  %(prog)s merge zimage-converted style.safetensors zimage-style --format diffusers
  %(prog)s merge zimage-converted dog.safetensors:0.8 style.safetensors:0.5 zimage-both
  %(prog)s lora style.safetensors style-kohya.safetensors --to kohya
  %(prog)s extract Tongyi-MAI/Z-Image-Turbo tuned-model tuned.safetensors --rank 64
  %(prog)s inspect zimage-converted
"""


def dialect(text: str) -> str:
    """The letter of a dialect, from an argument that is the letter or the name of a program."""
    for letter, programs in DIALECTS.items():
        if text == letter or text.lower() in programs:
            return letter
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {NAMED_DIALECTS}")


def parser(program: str) -> argparse.ArgumentParser:
    top = Parser(
        program,
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    p = add("import", run_import, "Turn a PyTorch model into a converted checkpoint.")
    p.add_argument(
        "source",
        type=local_name,
        help="model folder, hub id (owner/name[@revision]) or single file",
    )
    p.add_argument(
        "out", type=local_path, help="new folder; or that of an interrupted import, to go on"
    )
    p.add_argument(
        "--base", type=local_name, help="with a single file: the model of all other parts"
    )
    p.add_argument("--vae", type=local_path, help="single file to take the autoencoder from")
    p.add_argument(
        "--text-encoder", type=local_path, help="single file to take the text encoder from"
    )
    p.add_argument(
        "--vlm",
        type=local_name,
        help="folder or hub id of the vision-language model, to import it too",
    )
    p.add_argument("--dtype", choices=TYPES, help="store in this type; default: as it is")

    p = add("export", run_export, "Write a model as a diffusers folder or a ComfyUI single file.")
    _add_export(p)
    p.set_defaults(lora=[])

    p = add("merge", run_export, "Merge LoRAs into a model's transformer and write the model.")
    _add_export(p, merges=True)
    _add_transformer_only(p)

    p = add("lora", run_lora, "Rewrite a LoRA or LoKr file in another dialect.")
    p.add_argument("source", type=local_path, help="LoRA file, or folder that PEFT saved")
    p.add_argument("out", type=local_path, help="new file (dialect Q: folder)")
    p.add_argument("--to", type=dialect, metavar="DIALECT", default="D", help=(
        f"letter, or name of a program: {NAMED_DIALECTS}; default D. Cs and Cn: names that begin "
        "with diffusion_model., split and fused attention; Q: a folder; a LoKr can be written as "
        "D, Cs, Y"
    ))  # fmt: skip
    p.add_argument("--model", type=local_path, help=(
        "model it is for; default: what its header names, else the published one that it fits"
    ))  # fmt: skip
    _add_transformer_only(p)
    p.add_argument("--dtype", choices=TYPES, help="default: as the source file has it")

    p = add("extract", run_extract, "Write the difference of two models' transformers as a LoRA.")
    p.add_argument("base", type=local_name, help="model folder, converted model or hub id")
    p.add_argument(
        "tuned", type=local_name, help="the changed model, likewise; or single file of it"
    )
    p.add_argument("out", type=local_path, help="new file, dialect D")
    p.add_argument("--rank", type=int, default=64, help="largest rank (default %(default)d)")
    p.add_argument("--energy", type=float, default=1.0, help=(
        "a layer gets no more rank than this share of its change needs, measured by its squared "
        "norm (default 1: the whole rank)"
    ))  # fmt: skip
    p.add_argument("--dtype", choices=TYPES, default="float32", help="default %(default)s")

    p = add("inspect", run_inspect, "Say what a file or folder is, and what is wrong with it.")
    p.add_argument("path", type=local_path, help="model, network folder, single file or LoRA")
    p.add_argument("--model", type=local_path, help="for a lone file: the model it belongs to")
    p.add_argument("--verify", action="store_true", help="read and check every number")
    return top


def _add_export(p: argparse.ArgumentParser, merges: bool = False) -> None:
    p.add_argument("model", type=local_name, help="converted model, Hugging Face folder or hub id")
    if merges:
        p.add_argument("lora", type=local_lora, nargs="+", help=(
            "LoRA or LoKr file, or folder that PEFT saved, or FILE:STRENGTH; several add up"
        ))  # fmt: skip
    p.add_argument("out", type=local_path, help="new folder (diffusers) or file (comfyui)")
    p.add_argument("--format", choices=("diffusers", "comfyui"), default="diffusers")
    p.add_argument("--dtype", choices=TYPES, help="write in this type; default: as it is")
    p.add_argument("--max-shard-gb", type=float, default=10.0, help="default %(default)g")


def _add_transformer_only(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--transformer-only", action="store_true", help="leave out a LoRA's text encoder layers"
    )


# The commands. Each imports what it needs, so that a wrong option is reported at once.


def run_import(args: argparse.Namespace) -> None:
    from dopsd_jax.common.progress import byte_progress
    from dopsd_jax.conversion.importing import import_model
    from dopsd_jax.weights import hub
    from dopsd_jax.weights.found_files import components, strangers
    from dopsd_jax.weights.safetensors_io import TensorFiles

    files = {"vae": args.vae, "text_encoder": args.text_encoder}
    single = os.path.isfile(args.source)
    if single and not args.base:
        raise UserError(
            f"{args.source}: is one file; name the model of all other parts with --base"
        )
    if args.base and not single:
        raise UserError(f"{args.source}: --base goes with a single file, which this is not")
    if single:
        names = TensorFiles.open(args.source).infos
        inside = components(names)
        if others := strangers(names):
            print(
                f"note: {args.source}: {len(others)} tensors belong to none of its networks that "
                f"are read here, and are left out, such as {others[0]!r}"
            )
        for name in inside | {"transformer"}:
            files[name] = files.get(name) or Path(args.source)
    files = {name: file for name, file in files.items() if file is not None}
    wanted = [
        pattern
        for pattern in hub.PIPELINE
        if not any(pattern == f"{name}/*.safetensors" for name in files)
    ]
    model = args.base or args.source
    folder, revision = hub.resolve(model, patterns=wanted)
    vlm = hub.resolve(args.vlm, patterns=hub.ROOT).path if args.vlm else None
    import_model(
        folder,
        args.out,
        described=model,
        revision=revision,
        files=files,
        vlm=vlm,
        dtype=TYPES.get(args.dtype),
        progress=byte_progress("importing"),
    )
    print(f"{args.out}: imported")


def run_export(args: argparse.Namespace) -> None:
    from dopsd_jax.common.progress import byte_progress
    from dopsd_jax.conversion.export import export_diffusers, export_single
    from dopsd_jax.conversion.inspection import layers_for
    from dopsd_jax.weights import hub
    from dopsd_jax.weights.lora_mix import read_changes

    if not 0 < args.max_shard_gb < 1e6:
        raise UserError(f"--max-shard-gb {args.max_shard_gb}: must be above 0")
    model = hub.resolve(args.model).path
    lora = None
    if args.lora:
        lora = read_changes(args.lora, layers_for(model), args.transformer_only)
    dtype, progress = TYPES.get(args.dtype), byte_progress("writing")
    if args.format == "diffusers":
        shard = int(args.max_shard_gb * 1e9)
        export_diffusers(
            model, args.out, lora=lora, dtype=dtype, max_shard=shard, progress=progress
        )
    else:
        export_single(model, args.out, lora=lora, dtype=dtype, progress=progress)
    print(f"{args.out}: written" + (f", {len(lora)} layers merged" if lora else ""))


def run_lora(args: argparse.Namespace) -> None:
    from dopsd_jax.common.progress import size
    from dopsd_jax.conversion.inspection import layers_for
    from dopsd_jax.weights.lora_dialects import unread
    from dopsd_jax.weights.lora_files import read_adapter
    from dopsd_jax.weights.lora_header import kept
    from dopsd_jax.weights.lora_write import write_lora

    layers = layers_for(args.model, args.source)
    lora = read_adapter(args.source, layers, args.transformer_only)
    dtype = TYPES.get(args.dtype, lora.dtype)
    write_lora(args.out, lora.modules, layers, args.to, dtype, kept(lora.metadata))
    written = args.out.stat().st_size if os.path.isfile(args.out) else None
    print(
        f"{args.out}: {len(lora.modules)} layers, dialect {lora.dialect} -> {args.to}"
        + (f", {size(written)}" if written else "")
    )
    if why := unread(layers, args.to):
        print(f"note: {args.out}: {why}; all of them read --to D")


def run_extract(args: argparse.Namespace) -> None:
    from dopsd_jax.common.progress import Progress
    from dopsd_jax.conversion.extraction import extract
    from dopsd_jax.weights import hub
    from dopsd_jax.weights.lora_write import write_lora

    raise_if(
        f"--{name} {value}: must be {what}"
        for name, value, good, what in (
            ("rank", args.rank, args.rank > 0, "above 0"),
            ("energy", args.energy, 0 < args.energy <= 1, "above 0 and at most 1"),
        )
        if not good
    )
    single = os.path.isfile(args.tuned)
    base, tuned = hub.resolve(args.base), Path(args.tuned)
    if not single:
        tuned = hub.resolve(args.tuned).path
    found = extract(base.path, tuned, args.rank, args.energy, Progress("layer"))
    write_lora(args.out, found.modules, found.layers, dtype=TYPES[args.dtype])
    print("\n".join([f"{args.out}: written", *found.summary]))


def run_inspect(args: argparse.Namespace) -> None:
    from dopsd_jax.conversion.inspection import inspect

    for line in inspect(args.path, args.model, args.verify):
        print(line)


def run(args: argparse.Namespace) -> None:
    if "out" in args:
        from dopsd_jax.common.atomic import need_file, need_free, remove_leftovers

        if args.run is not run_import:  # which goes on with what it left
            if "source" in args and args.out.resolve() == Path(args.source).resolve():
                raise UserError(f"{args.out}: is the source; give another name")
            # A forgotten name makes the last file that is read the output.
            (need_file if _makes_file(args) else need_free)(args.out)
            if _makes_file(args) and args.out.suffix != ".safetensors":
                raise UserError(
                    f"{args.out}: give a name that ends in .safetensors; other programs show no "
                    "other files"
                )
        remove_leftovers(args.out.parent, name=args.out.name)
        remove_leftovers(args.out, *args.out.glob("*"))
    args.run(args)


def _makes_file(args: argparse.Namespace) -> bool:
    """Whether the output is a file, not a folder."""
    if args.run is run_lora:
        return args.to != "Q"
    return args.run is run_extract or ("format" in args and args.format == "comfyui")


def main(program: str = "python -m dopsd_jax.convert") -> None:
    args = parser(program).parse_args()
    sys.exit(report(lambda: run(args)))


if __name__ == "__main__":
    main()
