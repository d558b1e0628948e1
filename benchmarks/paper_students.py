"""Other students for the study, which are not shipped: the miniature before its last stages.

    python benchmarks/paper_students.py --out=runs/students
    python benchmarks/paper.py --students="not distilled=runs/students/many,\\
endpoint=runs/students/endpoint,segment=runs/students/segment,words apart=runs/students/words"

Flow matching takes the shipped miniature back to a many-step model, whose first clean estimate is
a mean of pictures again. Endpoint regression goes on from there, as it did in the miniature's own
training. The third student learns from the same model the mean velocity of each segment between
nodes of the deployed grid, as the first miniature did: its first estimate stays a mean. The fourth
is the shipped one with a text encoder that tells invented words apart (paper_naming.py). The last
lines are scores of the gates. About an hour on two cores; a second call goes on.
"""

import jax
import jax.numpy as jnp
import numpy as np
import paper_naming
import transformers

import dopsd_jax
from dopsd_jax.common import program
from dopsd_jax.common.files import expand
from dopsd_jax.miniature import endpoint, families, few_steps, gates, optimizer, pretrain
from dopsd_jax.miniature import train as miniature
from dopsd_jax.miniature.optimizer import Parameters
from dopsd_jax.miniature.training import Loss, Source, Stage, run

OPTIONS = program.options(__name__)
START = OPTIONS.path("start", "examples/miniature/model", "model folder to begin with")
OUT = OPTIONS.path("out", None, "folder for states and students")
MANY_STEPS = OPTIONS.integer("many_steps", 1200, "of flow matching", lower_bound=1)
ENDPOINT_STEPS = OPTIONS.integer("endpoint_steps", 120, "of 32 samples", lower_bound=1)
SEGMENT_STEPS = OPTIONS.integer("segment_steps", 80, "of 32 samples", lower_bound=1)
NAMING_STEPS = OPTIONS.integer("naming_steps", 1500, "of 96 captions", lower_bound=51)
SEED = 1
SHOWN = "first", "crispness", "identity", "shape"  # scores of the gates


def main() -> None:
    out, family = expand(OUT.value), families.family("zimage")
    learned, vae = family.read(expand(START.value))
    out.mkdir(parents=True, exist_ok=True)
    family.write_words(out / "tokenizer")
    texts = family.texts(transformers.AutoTokenizer.from_pretrained(out / "tokenizer"))
    source = Source(family, SEED, texts, miniature.coders(vae)[0])

    def trained(name: str, stage: Stage, source: Source = source) -> Parameters:
        state = out / f"{name}.safetensors"
        found = run(state, stage, source, lambda parameters, step: None, print)
        if not (out / name).exists():
            family.write(out / name, found, vae)
        return found

    start = pretrain.start(family, SEED) | learned
    many = trained("many", pretrain.stage(family, start, MANY_STEPS.value))
    trained("endpoint", endpoint.stage(family, many, ENDPOINT_STEPS.value))
    tx = optimizer.muon(endpoint.MUON_RATE, endpoint.ADAM_RATE, SEGMENT_STEPS.value, warmup=10)
    counts = endpoint.TEXTS, endpoint.IMAGES
    segments = Stage("segments", SEGMENT_STEPS.value, loss(family, many), tx, many, *counts)
    trained("segment", segments)
    naming = source._replace(family=paper_naming.Naming(family))
    trained("words", paper_naming.stage(family, learned, NAMING_STEPS.value), naming)
    trial = gates.Trial()
    for name in ("many", "endpoint", "segment", "words"):
        scores = trial(gates.of_folder(dopsd_jax.load_pipeline(out / name)))
        print(f"{out / name}: " + ", ".join(f"{key} {scores[key]:.3f}" for key in SHOWN))


def loss(family: families.Family, many: Parameters) -> Loss:
    """Squared error of the velocities at all nodes; `many`: the many-step model's weights."""
    module, grid = family.abstract(), family.grid
    nodes = len(grid) - 1
    between = endpoint.STEPS // nodes
    at = np.arange(nodes * between + 1) / between
    fine = tuple(np.interp(at, np.arange(nodes + 1), grid))

    def evaluate(parameters: Parameters, batch: families.Batch, keys: jax.Array):
        drop, draw = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        noise = few_steps.normal(draw, batch.latents.shape[1:])
        teacher = few_steps.guided(optimizer.merge(module, many), batch, drop)
        states = jax.lax.stop_gradient(few_steps.path(teacher, noise, fine))[::between]
        sigmas = jnp.asarray(grid, jnp.float32)
        student = few_steps.told(optimizer.merge(module, parameters), batch, drop)

        def error(total, segment):
            x, after, sigma, following = segment
            mean = (after - x) / (following - sigma)
            return total + jnp.mean((student(x, jnp.full(len(x), sigma)) - mean) ** 2), None

        segments = states[:-1], states[1:], sigmas[:-1], sigmas[1:]
        return jax.lax.scan(error, jnp.zeros(()), segments)[0] / nodes

    return evaluate


if __name__ == "__main__":
    program.parse(required=("out",))
    program.run(main)
