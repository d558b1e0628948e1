"""config.remat = auto: the fastest that leaves a tenth of the memory free, by the account."""

import pytest
from conftest import ROOT, run_program

from dopsd_jax.common.errors import UserError
from dopsd_jax.config.loading import load
from dopsd_jax.estimation import counted_step, remat
from dopsd_jax.estimation.abstract_step import Workload, abstract_mesh, find_network

PIXELS, ROWS = 256, 64


def step(**changes):
    """A configuration for a small picture on the published network, and its workload."""
    spec = f"{ROOT}/configs/zimage.py:lora"
    config = load(spec, {"remat": "auto", "batch_size": "1", **changes})
    family, size, *_ = find_network(config, full_size=True)
    rows = {"rows_student": ROWS, "rows_teacher": ROWS}
    return config, Workload(family, size, height=PIXELS, width=PIXELS, **rows)


def needs(config, case) -> dict[str, int]:
    gpu, found = counted_step.find_gpu("80GB"), {}
    for name in remat.ORDER:
        own = config.copy_and_resolve_references()
        own.remat = name
        found[name] = counted_step.count_step(own, case, gpu).needed
    return found


def choose(config, case, capacity, platform="gpu", kind="card"):
    return remat.choose(config, case, abstract_mesh(config, 1), platform, kind, capacity)


def gib_needed(choice) -> float:
    return float(choice.why.partition("about ")[2].split()[0])


def test_the_fastest_that_fits_with_a_tenth_free():
    config, case = step()
    needed = needs(config, case)
    assert needed["none"] > needed["dots"] > needed["full"]
    for name, slower in (("none", "dots"), ("dots", "full")):
        enough = needed[name] / (1 - remat.FREE)
        assert choose(config, case, enough + 1).remat == name
        chosen = choose(config, case, enough - 1)
        assert chosen.remat == slower
        assert f"{name} would need {needed[name] / 2**30:.1f}" in chosen.why
    assert "less than" not in chosen.why
    tight = choose(config, case, needed["full"])
    assert tight.remat == "full" and "leaves less than 10% free" in tight.why
    assert config.remat == "auto"  # what the user asked for stands


def test_layers_in_the_hosts_memory_are_not_kept_for_the_backward_pass():
    config, case = step(offload="base")
    assert choose(config, case, 1 << 50).remat == "dots"


def test_a_device_that_does_not_tell_its_memory_is_refused():
    config, case = step()
    with pytest.raises(UserError, match=r"config\.remat: auto goes by .* a card does not tell it"):
        choose(config, case, None)


def test_a_processor_keeps_as_little_of_attention_as_a_kernel():
    config, case = step()
    big = 1 << 50
    gib = [gib_needed(choose(config, case, big, platform)) for platform in ("cpu", "gpu")]
    assert gib[0] == pytest.approx(gib[1], rel=0.02)


def test_a_base_that_the_compiler_writes_twice_is_counted_twice():
    config, case = step()
    other, twice = (
        gib_needed(choose(config, case, 1 << 50, "tpu", kind)) for kind in ("TPU v6 lite", "TPU7x")
    )
    assert twice - other == pytest.approx(12309818424 / 2**30, rel=0.01)  # docs/scaling.jsonl


@pytest.mark.slow
def test_estimate_says_what_would_be_chosen():
    own = "--config=zimage:lora", "--config.remat=auto", "--config.batch_size=1"
    done = run_program("estimate", *own, "--device=80GB")
    assert done.returncode == 0, done.stderr
    assert "remat: none, chosen by auto" in done.stdout and ", remat none," in done.stdout
    done = run_program("estimate", *own, "--device=24GB")
    assert "remat: full, chosen by auto" in done.stdout and ", remat full," in done.stdout
