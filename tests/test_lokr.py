"""LoKr as it is trained and written: against PEFT, diffusers and itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import ZImagePipeline
from flax import nnx
from lora_helpers import BLOCK, CONFIG, LAYERS, random_modules, torch_transformer
from peft import LoKrConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from test_lora import noisy

from dopsd_jax.adapters import attach, kinds
from dopsd_jax.adapters.lokr import Lokr, divided, kind_of
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.config.fields import defaults
from dopsd_jax.families.lora import attach_files
from dopsd_jax.families.zimage import family
from dopsd_jax.models import zimage, zimage_config
from dopsd_jax.models.layers import Dense
from dopsd_jax.training import trainable
from dopsd_jax.training.optimizers import decayed
from dopsd_jax.weights.lora_files import read_adapter
from dopsd_jax.weights.lora_write import write_lora
from dopsd_jax.weights.safetensors_io import read_header

SLOTS = attach.slots(zimage_config.names(CONFIG))
# The block's layers are [48, 48] and [128, 48]: with factor 4 a rank of 3 makes products, 16 is
# whole for the former.
RANK, ALPHA = 3, 5.0


def test_sizes_are_divided_as_lycoris_does():
    for size in (1, 7, 64, 96, 127, 250, 360, 1000, 3840, 10240):
        for factor in (0, 1, 2, 7, 8, 16, 60, 128):
            # PEFT leaves a factor above the root in front; LyCORIS has the smaller one there.
            assert divided(size, factor) == tuple(sorted(factorization(size, factor or -1)))


@pytest.mark.parametrize("rank, factor", [(3, 4), (16, 4), (2, 0)])
def test_its_tensors_are_those_of_peft_and_the_change_too(rank, factor):
    din, dout, kind = 24, 40, Lokr.of(factor)
    layer = nnx.Dict(dense=Dense(din, dout, rngs=nnx.Rngs(0)))
    slots = {"dense": attach.Slot("dense", 0, None, din, dout)}
    attach.attach(layer, slots, rank, ALPHA, jax.random.key(0), kind)
    adapter = layer["dense"].adapters["0"]
    assert not np.any(adapter.delta())  # the identity at the start
    own = nnx.state(layer, nnx.LoRAParam)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(own))
    assert numbers == kind.size(din, dout, rank)
    assert all(jax.tree.leaves(decayed(own)))
    nnx.update(layer, noisy(own))
    scale = kind.strength(din, dout, rank, ALPHA)
    (module,) = attach.export(nnx.state(layer, nnx.LoRAParam), slots, scale, kind).values()

    theirs = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(din, dout, bias=False)),
        LoKrConfig(r=rank, alpha=rank, target_modules=["0"], decompose_factor=factor or -1),
    )
    named = {n.split(".")[-2]: p for n, p in theirs.named_parameters() if "lokr" in n}
    assert {n: tuple(p.shape) for n, p in named.items()} == {
        f"lokr_{n}": f.shape for n, f in module.factors.items()
    }
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(module.factors[name.removeprefix("lokr_")]))
        expected = theirs.base_model.model[0].get_delta_weight("default").numpy()
    assert module.scale == scale == (1.0 if "w2" in module.factors else ALPHA / rank)
    assert relative_error(module.delta(), scale * expected) < 1e-6
    assert relative_error(adapter.delta().T, scale * expected) < 1e-6
    x = jax.random.normal(jax.random.key(1), (5, din))
    change = layer["dense"](x) - x @ layer["dense"].kernel[...]
    assert relative_error(change, x @ adapter.delta()) < 1e-5


@pytest.mark.parametrize("rank", [2, 9])
def test_parts_of_an_input_and_an_output_may_be_interleaved(rank):
    """As in FLUX.2's single blocks: one adapter for all, whose rows have another order."""
    layer = Dense((8, 16), (12, 4), groups=2, fused_before=True, rngs=nnx.Rngs(0))
    slots = {"": attach.Slot("dense", 0, None, 24, 16)}
    attach.attach(nnx.Dict(dense=layer), slots, rank, 4.0, jax.random.key(0), Lokr.of(4))
    nnx.update(layer, noisy(nnx.state(layer, nnx.LoRAParam)))
    x = jax.random.normal(jax.random.key(3), (5, 24))
    found = layer.outputs.plain(layer(x) - x @ layer.kernel[...])
    assert relative_error(found, layer.inputs.plain(x) @ layer.adapters["0"].delta()) < 1e-5


def test_nothing_of_the_size_of_the_whole_product_is_made_and_the_work_is_counted():
    layer = Dense(64, 96, rngs=nnx.Rngs(0))
    for rank in (2, 64):
        slots = {"": attach.Slot("dense", 0, None, 64, 96)}
        attach.attach(nnx.Dict(dense=layer), slots, rank, 4.0, jax.random.key(0), Lokr.of(4))
        adapter = layer.adapters["0"]
        graph = jax.make_jaxpr(lambda x, a=adapter: Lokr.updates([a], x, [[96]]))(jnp.ones((1, 64)))
        products, sizes = 0, []
        for line in graph.eqns:
            sizes += [v.aval.size for v in line.outvars]
            if line.primitive.name == "dot_general":
                (contracted, _), _ = line.params["dimension_numbers"]
                depth = np.prod([line.invars[0].aval.shape[axis] for axis in contracted])
                products += int(depth) * line.outvars[0].aval.size
        assert max(sizes) <= 64 * 96 // 16
        assert products == Lokr.of(4).products(64, 96, rank)


def trained(rank=RANK, alpha=ALPHA, factor=4):
    """Adapters of the block's layers with numbers in them, as a run would write them."""
    net, kind = zimage.ZImage(CONFIG, rngs=nnx.Rngs(0)), Lokr.of(factor)
    chosen = {name: SLOTS[name] for name in BLOCK}
    attach.attach(net, chosen, rank, alpha, jax.random.key(1), kind)
    state = noisy(nnx.state(net, nnx.LoRAParam))
    return state, chosen, attach.export(state, chosen, alpha / rank, kind), kind


@pytest.mark.parametrize("dialect", ["D", "Cs", "Y"])
@pytest.mark.parametrize("rank, alpha", [(RANK, ALPHA), (RANK, 6.0), (16, 5.0)])
def test_a_file_is_read_back_bit_for_bit(tmp_path, dialect, rank, alpha):
    state, chosen, modules, kind = trained(rank, alpha)
    path = tmp_path / "x.safetensors"
    write_lora(path, modules, LAYERS, dialect)
    file = read_adapter(path, LAYERS)
    assert file.modules.keys() == modules.keys() and file.dialect == dialect
    for name, module in file.modules.items():
        np.testing.assert_array_equal(module.delta(), modules[name].delta())
    ranks = [m.rank or max(m.w2.shape) for m in modules.values()]
    assert kind_of(file.modules.values()) == (kind, max(ranks))
    # What a run has in memory, too; a scale in the first factor is exact if it is a power of two.
    back = attach.load(state, chosen, file.modules, alpha / rank, "file", kind)
    bound = 0 if dialect == "Y" or alpha == 2 * rank else 2e-7
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=bound), back, state)
    about = read_header(path).metadata
    assert about["ss_network_module"] == "lycoris.kohya"
    assert json.loads(about["ss_network_args"])["algo"] == "lokr"


def test_diffusers_loads_it_at_its_strength(tmp_path):
    """Also a file in which some second factors are whole."""
    for rank in (RANK, 7):
        _, _, modules, _ = trained(rank)
        assert {m.rank for m in modules.values()} == ({RANK} if rank == RANK else {7, None})
        path = tmp_path / f"{rank}.safetensors"
        write_lora(path, modules, LAYERS)
        transformer = torch_transformer()
        ZImagePipeline.load_lora_into_transformer(
            ZImagePipeline.lora_state_dict(path), transformer, "default"
        )
        found = dict(transformer.named_modules())
        for name, module in modules.items():
            with torch.no_grad():
                theirs = found[name].get_delta_weight("default").numpy()
            assert relative_error(theirs, module.delta()) < 1e-6


def test_a_file_is_attached_for_sampling_with_its_strength(tmp_path):
    for rank in (RANK, 7):
        _, chosen, modules, _ = trained(rank)
        path = tmp_path / f"{rank}.safetensors"
        write_lora(path, modules, LAYERS)
        net = zimage.ZImage(CONFIG, rngs=nnx.Rngs(0))
        attach_files(net, family, CONFIG, [LoraOption(path, 0.5)])
        kind, _ = kind_of(modules.values())
        attached = attach.export(nnx.state(net, nnx.LoRAParam), chosen, 1.0, kind)
        for name, module in attached.items():
            assert relative_error(module.delta(), 0.5 * modules[name].delta()) < 1e-6


def test_a_smaller_rank_fits_and_acts_as_it_did():
    """In adapters of a larger one, of whose own numbers none that act stay."""
    (_, chosen, modules, _), (wide, _, _, kind) = trained(3, 6.0), trained(5, 5.0)
    loaded = attach.load(wide, chosen, modules, 1.0, "file", kind)
    for name, module in attach.export(loaded, chosen, 1.0, kind).items():
        assert relative_error(module.delta(), modules[name].delta()) < 1e-6


def test_what_cannot_be_attached_or_written_is_a_line(tmp_path):
    modules = trained()[2]
    path, plain = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_lora(path, modules, LAYERS)
    write_lora(plain, random_modules(BLOCK[:2]), LAYERS)
    net = zimage.ZImage(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"is a LoKr, where only a LoRA will do; .* merge"):
        attach_files(net, family, CONFIG, [LoraOption(path), LoraOption(plain)])
    uneven = dict(modules)
    uneven[BLOCK[1]] = trained(factor=8)[2][BLOCK[1]]
    write_lora(path, uneven, LAYERS)
    attach_files(net, family, CONFIG, [LoraOption(plain)])
    before = nnx.state(net, nnx.LoRAParam)
    with pytest.raises(UserError, match=r"factors of several kinds; .* merge"):
        attach_files(net, family, CONFIG, [LoraOption(path)])
    # What was attached before stays.
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net, nnx.LoRAParam), before)
    part = dict(modules)
    part[BLOCK[0]] = dataclasses.replace(part[BLOCK[0]], first=4)
    out = tmp_path / "c.safetensors"
    for given, dialect, message in (
        (modules, "K", "'K' cannot hold a LoKr; D, Cs, Y can"),
        (modules | random_modules(BLOCK[:1]), "D", "LoRA and LoKr adapters"),
        (part, "D", "a part of the LoKr of several layers"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            write_lora(out, given, LAYERS, dialect)
        assert len(caught.value.problems) == 1 and not out.exists()


def test_the_configuration_names_the_kind(tmp_path):
    path, config = tmp_path / "a.safetensors", defaults()
    write_lora(path, trained()[2], LAYERS)
    config.lora.init_from = str(path)
    with pytest.raises(UserError, match=r"a\.safetensors is no LoRA, which config\.lora\.kind"):
        trainable.trained(config, family, CONFIG).check()
    config.lora.kind = "lokr"
    trainable.trained(config, family, CONFIG).check()
    config = defaults()
    assert kinds.kind_of(config.lora).title == "LoRA"
    config.lora.kind, config.lora.factor = "lokr", 16
    kind = kinds.kind_of(config.lora)
    assert kind is Lokr.of(16) and kind.sizes(3840, 10240) == (16, 240, 16, 640)
