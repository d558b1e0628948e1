"""What the paper claims, and what the records say to it.

A claim is a difference of two arms. *Reproduced*: its whole interval lies on the claimed side.
*Contradicted*: it lies on the other. *Open*: it holds zero.
"""

from collections.abc import Mapping
from typing import NamedTuple

from paper_arms import RATES
from paper_records import (
    COMPOSITION,
    CRISP,
    IDENTITY,
    ORDINARY_CRISP,
    RETENTION,
    Records,
    Runs,
)

from dopsd_jax.evaluation.statistics import Estimate

MARGIN = 0.05  # "about as well": behind by no more


class Claim(NamedTuple):
    """`more` exceeds `less` in `measure` (`equal`: does not fall behind by more than that)."""

    text: str
    paper: str
    train: str
    more: str
    less: str
    measure: str
    equal: float | None = None


CLAIMS = (
    Claim("D-OPSD learns the concept better than SFT", "Table 1, DINO-D .0823 against .2212",
          "lora", "dopsd", "sft", IDENTITY),
    Claim("D-OPSD keeps the quality that SFT loses", "Table 1, quality 3.80 against 2.42",
          "lora", "dopsd", "sft", CRISP),
    Claim("The same, in ordinary pictures", "the same", "lora", "dopsd", "sft", ORDINARY_CRISP),
    Claim("D-OPSD keeps the base's composition, SFT does not", "figure of LoRA results",
          "lora", "dopsd", "sft", COMPOSITION),
    Claim("D-OPSD follows prompts better than SFT", "Table 1, CLIP-S .3664 against .3095",
          "lora", "dopsd", "sft", RETENTION),
    Claim("D-OPSD learns the concept better than SFT on teacher samples",
          "Table 1, DINO-D .0823 against .1588", "lora", "dopsd", "sft on teacher samples",
          IDENTITY),
    Claim("SFT on teacher samples keeps the quality that SFT loses",
          "Table 1, quality 3.61 against 2.42", "lora", "sft on teacher samples", "sft", CRISP),
    Claim("DreamBooth learns the concept about as well as D-OPSD",
          "Table 1, DINO-D .0902 against .0823", "lora", "dreambooth", "dopsd", IDENTITY, MARGIN),
    Claim("D-OPSD keeps the quality that DreamBooth loses", "Table 1, quality 3.80 against 2.56",
          "lora", "dopsd", "dreambooth", CRISP),
    Claim("PSO comes closer to the concept than D-OPSD", "Table 1, DINO-D .0570 against .0823",
          "lora", "pso", "dopsd", IDENTITY),
    Claim("D-OPSD follows prompts better than PSO", "Table 1, CLIP-S .3664 against .2893",
          "lora", "dopsd", "pso", RETENTION),
    Claim("On-policy learns the concept better than off-policy", "ablation figure",
          "lora", "dopsd", "off-policy", IDENTITY),
    Claim("On-policy keeps quality better than off-policy", "ablation figure",
          "lora", "dopsd", "off-policy", CRISP),
    Claim("Full: D-OPSD learns the concept better than SFT", "Table 2, DINO-D .1088 against .1896",
          "full", "dopsd", "sft", IDENTITY),
    Claim("Full: D-OPSD keeps what the base can do, SFT does not",
          "Table 2, GenEval .717 against .159", "full", "dopsd", "sft", RETENTION),
    Claim("Full: D-OPSD keeps the quality that SFT loses", "Table 2, quality 3.84 against 2.61",
          "full", "dopsd", "sft", CRISP),
    Claim("Full: D-OPSD keeps what the base can do, PSO does not",
          "Table 2, GenEval .717 against .248", "full", "dopsd", "pso", RETENTION),
    Claim("A teacher that is the student itself is worse than EMA 0.9999", "ablation figure",
          "lora", "long, EMA 0.9999", "long, teacher live", IDENTITY),
    Claim("EMA 0.9 is worse than EMA 0.9999", "ablation figure",
          "lora", "long, EMA 0.9999", "long, EMA 0.9", IDENTITY),
    Claim("A frozen teacher teaches less than EMA 0.9999", "ablation figure",
          "lora", "long, EMA 0.9999", "long, teacher frozen", IDENTITY),
)  # fmt: skip

NOT_HERE = "not testable here"
WITHOUT_RUNS = (  # claims that no pair of arms is about: text, source, what is known, verdict
    ("Judgements of a vision-language model, aesthetics (VLM-J, Aesthetic-S)", "Table 1",
     "nothing in a drawn world corresponds to them", NOT_HERE),
    ("Many pictures of a style, by full fine-tuning (FID)", "Table 2",
     "measured on the first miniature only (docs/results.md of version 7f1c1d0)", NOT_HERE),
    ("The method works on FLUX.2-klein", "Table 2",
     "on its miniature: [flux2-klein.md](flux2-klein.md)", "seen, one run of each method"),
    ("Four times the work of SFT, twice the time", "text",
     "depends on the sizes; docs/methods.md counts it for the real ones", NOT_HERE),
)  # fmt: skip


def table(records: Records) -> list[str]:
    """Every claim with its verdict, both methods at the same rate."""
    lines = [
        "Both methods at the same rate, at each that was run. *Reproduced*: the whole interval",
        "lies on the claimed side. Not reproduced are *contradicted*, where it lies on the other",
        "side, and *open*, where it holds both.",
        "",
        "| claim | in the paper | difference here | verdict |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS:
        found = {rate: _difference(records, claim, rate) for rate in RATES[claim.train]}
        said = [signed(one) for one in found.values() if one is not None]
        cell = f"{claim.measure}: {', '.join(said)}" if said else ""
        lines.append(f"| {claim.text} | {claim.paper} | {cell} | {_verdict(claim, found)} |")
    return lines + [f"| {' | '.join(row)} |" for row in WITHOUT_RUNS]


def _difference(records: Records, claim: Claim, rate: float) -> Estimate | None:
    one, two = (records.arm(name, claim.train, rate) for name in (claim.more, claim.less))
    return one.less(two, claim.measure) if one and two else None


def _verdict(claim: Claim, found: Mapping[float, Estimate | None]) -> str:
    """One word if the rates agree; rates that were not run say nothing."""
    said = {rate: _word(claim, one) for rate, one in found.items() if one is not None}
    if not said:
        return "not run"
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{word} at {rate:g}" for rate, word in said.items())


def _word(claim: Claim, found: Estimate) -> str:
    if found.half is None:
        return "one run"
    bound = -claim.equal if claim.equal else 0.0
    if found.value - found.half > bound:
        return "**reproduced**"
    if found.value + found.half < bound:
        return "**contradicted**"
    return "open"


def signed(found: Estimate | None) -> str:
    if found is None:
        return "not run"
    return f"{found.value:+.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def goals(records: Records) -> list[str]:
    """What the project asked of itself before the first run."""
    own, sft, held = (records.arm(name) for name in ("dopsd", "sft", "dopsd + anchor"))
    if not own or not sft:
        return ["not run"]
    lines = [_equal_identity(own, sft)]
    for measure in (ORDINARY_CRISP, COMPOSITION):
        less = own.final(measure).value - records.base(measure).value
        met = _met(less >= -0.02)
        lines.append(f"* D-OPSD within .02 of the base's {measure}: {met} ({less:+.3f})")
    if held:
        kept = held.final(RETENTION).value / records.base(RETENTION).value
        met = _met(kept >= 0.98)
        lines.append(f"* Retention with anchors at least .98 of the base's: {met} ({kept:.3f})")
    return lines


def _equal_identity(own: Runs, sft: Runs) -> str:
    """Crispness of both where they have learned equally much."""
    text = "At equal identity D-OPSD at least .25 crisper than SFT"
    level = min(own.final(IDENTITY).value, sft.final(IDENTITY).value)
    pair = own.when(level, CRISP), sft.when(level, CRISP)
    if None in pair:
        return f"* {text}: cannot be said, no common level"
    more = pair[0] - pair[1]
    return f"* {text}: {_met(more >= 0.25)} ({more:+.3f} at identity {level:.3f})"


def _met(met: bool) -> str:
    return "met" if met else "**missed**"
