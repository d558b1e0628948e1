"""A small program that runs as one of several processes; run by test_processes.py.

python process_group.py SCENARIO --coordinator=... --num_processes=2 --process_id=I
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dopsd_jax.common.errors import UserError
from dopsd_jax.parallel import cluster, multihost, sharding

SCENARIO = sys.argv.pop(1)


def agree():
    """What the processes say to each other, and what lies on their devices."""
    index = jax.process_index()
    assert multihost.gather({"i": index, "é": "x" * index}) == [
        {"i": i, "é": "x" * i} for i in range(jax.process_count())
    ]
    multihost.need_same({"data": "one"})
    try:
        multihost.need_same({"data": "one", "config.steps": 4 + index})
    except multihost.SharedError as error:
        (problem,) = error.problems
        assert problem.startswith("config.steps: is 4 in process 0 and 5 in process 1; start all")
    else:
        raise AssertionError("not reached")
    order = []
    multihost.first_alone(lambda: order.append(index))
    assert order == [index]
    for sizes in (
        {"data": 4, "fsdp": 2},
        {"data": 2, "tensor": 4},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"context": 8},
        {"tensor": 8},
    ):
        mesh = sharding.make_mesh(sizes)
        whole = {"a": np.arange(2 * 8 * 3.0).reshape(2, 8, 3), "n": np.arange(16).reshape(2, 8)}
        own = sharding.own_samples(mesh, 8)
        placed = sharding.put_batch({k: v[:, own] for k, v in whole.items()}, mesh, 8)
        for name, array in whole.items():
            assert placed[name].shape == array.shape
            np.testing.assert_array_equal(multihost.to_host(placed[name]), array)
        assert len(own) == (4 if sizes.keys() & {"data", "fsdp"} else 8)
    # Random numbers do not depend on how they are placed.
    mesh = sharding.make_mesh({"data": -1})
    where = NamedSharding(mesh, PartitionSpec("data"))
    draw = jax.jit(lambda: jax.random.normal(jax.random.key(3), (8, 5)), out_shardings=where)
    np.testing.assert_array_equal(
        multihost.to_host(draw()), np.asarray(jax.random.normal(jax.random.key(3), (8, 5)))
    )
    none_begins_before_all_have_compiled()
    a_program_of_4_bit_weights_runs_and_is_compiled_once(NamedSharding(mesh, PartitionSpec()))
    print("agreed", flush=True)


def none_begins_before_all_have_compiled():
    """What is early would wait in a collective, which gloo ends after half a minute."""
    compiled = []

    class Slow:
        """Stands for a jitted function."""

        def lower(self, x, *, size):
            assert size == 3
            return self

        def compile(self):
            time.sleep(jax.process_index())
            compiled.append(time.time())

        def __call__(self, x, *, size):
            return time.time(), x

    run = multihost.begin_together(Slow())
    begun, x = run(np.ones(2), size=3)
    run(np.zeros(2), size=3)
    assert (x == 1).all() and len(compiled) == 1, "compiled again for the same shapes"
    times = multihost.gather([begun, *compiled])
    assert min(t for t, _ in times) >= max(t for _, t in times)
    run(np.ones(3), size=3)
    assert len(compiled) == 2


def a_program_of_4_bit_weights_runs_and_is_compiled_once(everywhere):
    seen = []
    listen = lambda event, seconds, fun_name="", **more: seen.append((event, fun_name))
    jax.monitoring.register_event_duration_secs_listener(listen)

    @jax.jit
    def of_4_bits(codes):
        return jnp.sum(codes.astype(jnp.float32))

    codes = jax.device_put(np.full((3, 4), 7, np.uint8).astype(jnp.uint4), everywhere)
    assert multihost.begin_together(of_4_bits)(codes) == 84
    own = [event for event, name in seen if "of_4_bits" in name]
    assert own.count("/jax/core/compile/backend_compile_duration") == 1, own


def refuse():
    with multihost.together():
        if jax.process_index() == 1:
            raise UserError("config.model: is not on this machine; copy it")
    raise AssertionError("not reached")


def fail():
    """An error that only process 0 knows of, while the other computes with it."""
    if jax.process_index() == 0:
        raise UserError("metrics.jsonl: the disk is full; free some space")
    mesh = sharding.make_mesh({"data": -1})
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("data")))
    print(jax.jit(jnp.sum, out_shardings=everywhere)(x))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    cluster.run({"agree": agree, "refuse": refuse, "fail": fail}[SCENARIO])
