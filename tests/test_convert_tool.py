"""The converter as a user meets it: memory, progress, command line."""

import json
import math
import runpy
import shutil
import sys

import numpy as np
import pytest
from conftest import left_by_killed
from lora_helpers import LAYERS, random_modules
from safetensors.numpy import save_file
from weights_helpers import ROOT, SMALL, Interrupt, run_python, tensors_of

from dopsd_jax import families
from dopsd_jax.conversion import importing
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.models.zimage_config import ZImageConfig, names
from dopsd_jax.random_model import write_random_model
from dopsd_jax.weights import converted
from dopsd_jax.weights.lora_dialects import layers_of
from dopsd_jax.weights.lora_write import write_lora
from dopsd_jax.weights.safetensors_io import TensorFiles
from dopsd_jax.weights.validation import sources


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("tiny") / "model", size=SMALL)


# Memory.

MEMORY = """
import json, resource, sys
from pathlib import Path
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.conversion.export import export_diffusers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
warm, model, out, part = sys.argv[1:]
run = lambda source, name: (
    import_model(Path(source), Path(out) / name, part_bytes=int(part)),
    export_diffusers(Path(out) / name, Path(out) / f"{name}-back"),
)
run(warm, "warm")  # loads the libraries' code and threads
before = peak()
run(model, "model")
print(json.dumps(peak() - before))
"""


def test_memory_stays_in_proportion(tmp_path):
    """4 GiB of 24.6 GB, in proportion: here 400 MB, whose largest layer has the true one's share.

    The libraries' own fixed cost is not counted: a first small conversion pays it.
    """
    config = ZImageConfig(
        dim=480,
        layers=30,
        heads=10,
        caption_dim=320,
        axes_dims=(16, 16, 16),
        axes_lens=(64, 64, 64),
    )
    warm, model = (write_random_model(tmp_path / "in" / m, size=SMALL) for m in ("warm", "model"))
    folder = model / "transformer"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shapes = sources(names(config))
    save_file(
        {n: np.zeros(s, np.float32) for n, s in shapes.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    size = 4 * sum(math.prod(s) for s in shapes.values())
    assert size > 380e6
    share = size / 24.62e9
    growth = int(run_python("-c", MEMORY, warm, model, tmp_path, int(converted.PART_BYTES * share)))
    assert growth < 4 * 2**30 * share


def test_the_import_counts_every_byte(tiny, tmp_path):
    progress = Interrupt(-1)
    import_model(tiny, tmp_path / "out", progress=progress)
    stored = importing.open_all(tiny, vlm=tiny / "vlm")
    expected = sum(i.nbytes for _, _, s in stored.values() for i in s.tensors.infos.values())
    assert progress.done == progress.total == expected


# The command line.


def _tool(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / "convert_weights.py"), run_name="__main__")
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


def test_the_tool_goes_all_the_way_round(tiny, tmp_path, monkeypatch, capsys):
    tool = lambda *args: _tool(monkeypatch, capsys, *args)
    count = len(TensorFiles.open(tiny / "transformer").infos)
    assert tool("import", tiny, tmp_path / "c")[0] == 0
    code, out, _ = tool("inspect", tmp_path / "c")
    assert code == 0 and "converted model, family zimage" in out
    assert f"transformer: {count} tensors" in out and "vlm:" in out
    assert tool("export", tmp_path / "c", tmp_path / "x.safetensors", "--format", "comfyui")[0] == 0
    code, out, _ = tool("inspect", tmp_path / "x.safetensors", "--model", tiny)
    assert code == 0 and "transformer in comfyui names: complete" in out
    args = ("import", tmp_path / "x.safetensors", tmp_path / "d", "--base", tiny)
    assert tool(*args)[0] == 0
    for name in ("e", "d"):  # of this output a line later, and of another
        left_by_killed(tmp_path / name).mkdir()
    assert tool("export", tmp_path / "d", tmp_path / "e")[0] == 0
    assert [path.name.partition(".partial")[0] for path in tmp_path.glob(".*")] == [".d"]
    assert tensors_of(tmp_path / "e" / "transformer") == tensors_of(tiny / "transformer")
    code, _, err = tool("inspect", tmp_path / "e")
    assert code == 0 and not err


@pytest.mark.parametrize(
    "args, message",
    [
        (["import", "nowhere/at/all", "out"], "no such folder, and not a hub id"),
        (["import", "{tiny}/model_index.json", "out"], "--base"),
        (["import", "{tiny}", "out", "--base", "{tiny}"], "--base goes with a single file"),
        (["export", "{tiny}/vae", "out"], "neither model_index.json nor dopsd_jax.json"),
        (["merge", "{tiny}", "no.safetensors", "out"], "no such file"),
        (["export", "{tiny}", "out", "--max-shard-gb", "0"], "--max-shard-gb 0.0: must be above 0"),
        (["inspect", "nowhere"], "no such file"),
        (["lora", "a", "b", "--to", "X"], "'X' is not one of D (diffusers, comfyui), Cs, Cn, K ("),
    ],
)
def test_the_tools_errors_are_clear_lines(tiny, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = _tool(monkeypatch, capsys, *(a.format(tiny=tiny) for a in args))
    assert code == 2
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_a_forgotten_output_does_not_cost_the_last_file_that_is_read(
    tiny, tmp_path, monkeypatch, capsys
):
    """Whatever the command writes: the last name is taken for the new file."""
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "style"):
        save_file({"x": np.zeros(2, np.float32)}, f"{name}.safetensors")
    before = (tmp_path / "style.safetensors").read_bytes()
    commands = (
        ["merge", tiny, "dog.safetensors", "style.safetensors", "--format", "comfyui"],
        ["export", tiny, "style.safetensors", "--format", "comfyui"],
        ["lora", "dog.safetensors", "style.safetensors"],
        ["extract", tiny, "dog.safetensors", "style.safetensors"],
    )
    for command in commands:
        code, _, err = _tool(monkeypatch, capsys, *map(str, command))
        assert code == 2 and "style.safetensors: already there" in err
    assert (tmp_path / "style.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/x.safetensors", "nowhere: no such folder; create it first"),
        ("folder", "folder: is a folder; give the name of a new file"),
        ("x", "x: give a name that ends in .safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["lora", "extract"])
def test_an_output_that_cannot_be_is_told_before_the_work(
    tiny, tmp_path, monkeypatch, capsys, command, out, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dog.safetensors").write_text("nothing, which would be told if it were read")
    sources = ("dog.safetensors",) if command == "lora" else (str(tiny), "dog.safetensors")
    code, _, err = _tool(monkeypatch, capsys, command, *sources, out)
    assert code == 2 and message in err


def test_a_name_that_is_too_long_is_told(tmp_path, monkeypatch, capsys):
    write_lora(tmp_path / "dog.safetensors", random_modules(), LAYERS)
    out = tmp_path / ("x" * 300 + ".safetensors")
    code, _, err = _tool(monkeypatch, capsys, "lora", tmp_path / "dog.safetensors", out)
    assert code == 2 and "cannot be written (File name too long)" in err


def test_a_lora_file_is_of_the_published_model_that_it_fits(tmp_path, monkeypatch, capsys):
    """Without a header that names it: by its layers, and of two sizes by their shapes."""
    for family in families.every():
        for name, size in family.PUBLISHED.items():
            layers = layers_of(family.NETWORKS["transformer"], size)
            path = next(p for p in layers.native if len(layers.native[p].paths) == 3)
            target = layers.native[path]
            factors = {"down": (2, target.width), "up": (sum(target.rows), 2)}
            stem = "lora_unet_" + path.replace(".", "_")
            arrays = {f"{stem}.lora_{k}.weight": np.ones(v, np.float32) for k, v in factors.items()}
            path = tmp_path / f"{name}.safetensors"
            save_file(arrays | {f"{stem}.alpha": np.ones((), np.float32)}, path)
            code, out, err = _tool(monkeypatch, capsys, "inspect", path)
            assert code == 0 and "3 layers adapted" in out, err


def test_a_dialect_has_its_letter_and_the_names_of_programs(tmp_path, monkeypatch, capsys):
    write_lora(tmp_path / "dog.safetensors", random_modules(), LAYERS)
    for name, letter in (("kohya", "K"), ("ComfyUI", "D"), ("diffusers", "D"), ("Cs", "Cs")):
        command = ("lora", tmp_path / "dog.safetensors", tmp_path / f"{name}.safetensors")
        code, out, err = _tool(monkeypatch, capsys, *command, "--to", name)
        assert code == 0 and f"-> {letter}," in out, err
    command = ("lora", tmp_path / "dog.safetensors", tmp_path / "folder", "--to", "peft")
    assert _tool(monkeypatch, capsys, *command)[0] == 0 and (tmp_path / "folder").is_dir()


def test_the_folder_of_a_run_is_told_with_what_to_name_instead(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"config": {"steps": 3}, "facts": {}}')
    code, _, err = _tool(monkeypatch, capsys, "inspect", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1
    assert "is the folder of a run; name its result, lora/step_N.safetensors or model/step_N" in err


def test_what_does_not_read_a_dialect_is_told(tmp_path, monkeypatch, capsys):
    write_lora(tmp_path / "dog.safetensors", random_modules(), LAYERS)
    for dialect, told in (("D", False), ("K", False), ("Cn", True), ("Y", True)):
        out = tmp_path / f"{dialect}.safetensors"
        command = ("lora", tmp_path / "dog.safetensors", out, "--to", dialect)
        code, out, err = _tool(monkeypatch, capsys, *command)
        assert code == 0, err
        assert told == ("note:" in out)


@pytest.mark.parametrize("command", [[], ["import"], ["export"], ["merge"], ["lora"], ["inspect"]])
def test_the_tool_explains_itself(monkeypatch, capsys, command):
    code, out, _ = _tool(monkeypatch, capsys, *command, "--help")
    assert code == 0 and "usage" in out
