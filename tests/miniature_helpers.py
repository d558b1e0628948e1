"""What the tests of the miniatures' training begin with."""

from pathlib import Path

import jax
import transformers

from dopsd_jax.miniature import optimizer, pool
from dopsd_jax.miniature.families import Family
from dopsd_jax.miniature.optimizer import Parameters


def texts_of(family: Family, folder: Path) -> pool.Texts:
    """A family's prompts to token rows, by the tokenizer that it writes into `folder`."""
    family.write_words(folder / "tokenizer")
    return family.texts(transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"))


def moving(family: Family) -> Parameters:
    """First parameters whose velocity is not zero."""
    _, parameters = optimizer.flat(family.start(0))
    name = "transformer.final_linear.kernel"
    noise = jax.random.normal(jax.random.key(1), parameters[name].shape)
    return parameters | {name: 0.1 * noise}
