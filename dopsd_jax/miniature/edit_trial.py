"""What an editor must do: what an instruction names happens, and all else stays."""

import numpy as np

from dopsd_jax.miniature import captions, edits, identity, judge, render, world
from dopsd_jax.miniature.artist import Artist, Pictures
from dopsd_jax.miniature.edits import Edit

COUNT = 24  # edits of each kind
SEED = 20012  # none is of the training
SEEN = ("ground", "place", "size")


def scores(artist: Artist, rng: np.random.Generator) -> dict[str, float]:
    """Scores of an editor; `rng` draws its noise."""
    source = np.random.default_rng(SEED)
    own = [_new_thing(source, i) for i in range(COUNT)]
    told = [(kind, edits.random_edit(source, (kind,), thing)) for kind in SEEN for thing in own]
    named = [edits.random_edit(source, ("thing",)) for _ in range(COUNT)]
    placed = [edits.random_edit(source, ("thing",), instead=thing) for thing in own]
    last = [world.random_scene(source, edit.after.things) for edit in placed]

    def draw(asked: list[Edit], *more: Pictures, said: str = "") -> Pictures:
        noise = rng.standard_normal((len(asked), *artist.shape), np.float32)
        before = world.pictures([edit.before for edit in asked])
        prompts = [f"{edit.text} {said}".strip() for edit in asked]
        return artist.decode(artist.edited(prompts, [before, *more], noise))

    drawn, swapped = draw([edit for _, edit in told]), draw(named)
    result = draw(placed, world.pictures(last), said=edits.LIKE_LAST)
    unseen = draw(placed)
    happened, stayed = [], []
    for (kind, edit), found in zip(told, _arranged(drawn, [e for _, e in told]), strict=True):
        for name in SEEN:
            right = found[name] == _wanted(edit)[name]
            (happened if name == kind else stayed).append(right)
    for edit, found, seen in zip(named, _arranged(swapped, named), judge.see(swapped), strict=True):
        (thing,) = edit.after.things
        happened.append(seen.shape == thing.shape and seen.colour == thing.colour)
        stayed += [found[name] == _wanted(edit)[name] for name in SEEN]
    return {
        "edited": float(np.mean(happened)),
        "left alone": float(np.mean(stayed)),
        "edited identity": _likeness(artist, drawn, [edit for _, edit in told]),
        "result": _likeness(artist, result, placed),
        "result unseen": _likeness(artist, unseen, placed),
    }


def _new_thing(rng: np.random.Generator, number: int) -> world.Thing:
    word = captions.NEW_WORDS[number % len(captions.NEW_WORDS)]
    return world.random_thing(rng, world.random_concept(rng), word)


def _wanted(edit: Edit) -> dict[str, int]:
    (thing,) = edit.after.things
    return {"ground": edit.after.ground, "place": thing.place, "size": thing.size}


def _arranged(images: Pictures, asked: list[Edit]) -> list[dict[str, int]]:
    """Ground, place and size of what each picture shows."""
    ground = judge.lit_distance(identity.grounds(images).ground[:, None], world.GROUND_PALETTE)
    places = identity.named_places(identity.centres(images)[0])
    found = identity.find(images, world.compose([edit.after for edit in asked], None)).scenes
    sizes = np.abs(found.objects.radius[:, :1] - world.RADII).argmin(1)
    rows = zip(ground.argmin(1), places, sizes, strict=True)
    return [dict(zip(SEEN, map(int, row), strict=True)) for row in rows]


def _likeness(artist: Artist, images: Pictures, asked: list[Edit]) -> float:
    truth = world.compose([edit.after for edit in asked], None)
    again = artist.decode(artist.encode(render.render(truth)))
    reach = identity.find(again, truth).identity
    return float((identity.find(images, truth).identity / reach).mean())
