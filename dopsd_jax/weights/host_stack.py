"""A stack of layers in the host's memory, filled with layers that come from devices."""

import jax
import numpy as np


class HostStack:
    """An array [layers, ...] of which every device has a share in its host's memory.

    Args:
      shape: of the whole array.
      sharding: in the host's memory; the axis of layers is not split.
    """

    def __init__(self, shape: tuple[int, ...], sharding: jax.NamedSharding):
        self.shape, self.sharding, self.missing = shape, sharding, set(range(shape[0]))
        self.shares: dict[jax.Device, np.ndarray] = {}

    def put(self, layer: jax.Array, index: int) -> bool:
        """Takes a layer, split over devices as in the stack; whether it was the last one."""
        for shard in layer.addressable_shards:
            if shard.device not in self.shares:
                own = self.sharding.shard_shape(self.shape)
                self.shares[shard.device] = np.empty(own, layer.dtype)
            self.shares[shard.device][index] = shard.data
        self.missing.discard(index)
        return not self.missing

    def array(self) -> jax.Array:
        """The whole stack; every process has its own devices' shares."""
        kind = self.sharding.memory_kind
        shares = []
        while self.shares:  # each is copied, and then freed
            device, share = self.shares.popitem()
            place = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            shares.append(jax.device_put(share, place))
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shares)
