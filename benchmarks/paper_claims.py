"""What the paper claims, and what the records say to it.

A claim is a difference of two arms. *Reproduced*: its whole interval lies on the claimed side.
*Contradicted*: it lies on the other. *Open*: it holds zero.
"""

from collections.abc import Mapping
from typing import NamedTuple

from paper_arms import RATES, STYLE_RATE
from paper_records import (
    CONCEPT,
    CRISP,
    CRISPNESS,
    FID,
    MEASURES,
    ORDINARY_CRISP,
    RETENTION,
    SHAPE,
    Records,
)

from dopsd_jax.evaluation.statistics import Estimate


class Claim(NamedTuple):
    """`more` exceeds `less` in `measure` (`equal`: does not fall behind by more than that)."""

    text: str
    paper: str
    train: str
    more: str
    less: str
    measure: str
    equal: float | None = None
    kind: str = "alone"


CLAIMS = (
    Claim("D-OPSD learns the concept better than SFT", "Table 1, DINO-D .0823 against .2212",
          "lora", "dopsd", "sft", CONCEPT),
    Claim("D-OPSD keeps the quality that SFT loses", "Table 1, quality 3.80 against 2.42",
          "lora", "dopsd", "sft", CRISP),
    Claim("The same, in ordinary pictures", "the same", "lora", "dopsd", "sft", ORDINARY_CRISP),
    Claim("D-OPSD follows prompts better than SFT", "Table 1, CLIP-S .3664 against .3095",
          "lora", "dopsd", "sft", RETENTION),
    Claim("D-OPSD learns the concept better than SFT on teacher samples",
          "Table 1, DINO-D .0823 against .1588", "lora", "dopsd", "sft_teacher", CONCEPT),
    Claim("SFT on teacher samples keeps the quality that SFT loses",
          "Table 1, quality 3.61 against 2.42", "lora", "sft_teacher", "sft", CRISP),
    Claim("DreamBooth learns the concept about as well as D-OPSD",
          "Table 1, DINO-D .0902 against .0823", "lora", "dreambooth", "dopsd", CONCEPT, 0.05),
    Claim("D-OPSD keeps the quality that DreamBooth loses", "Table 1, quality 3.80 against 2.56",
          "lora", "dopsd", "dreambooth", CRISP),
    Claim("PSO comes closer to the concept than D-OPSD", "Table 1, DINO-D .0570 against .0823",
          "lora", "pso", "dopsd", CONCEPT),
    Claim("D-OPSD follows prompts better than PSO", "Table 1, CLIP-S .3664 against .2893",
          "lora", "dopsd", "pso", RETENTION),
    Claim("On-policy learns the concept better than off-policy", "ablation figure",
          "lora", "dopsd", "offpolicy", CONCEPT),
    Claim("On-policy keeps quality better than off-policy", "ablation figure",
          "lora", "dopsd", "offpolicy", CRISP),
    Claim("Full: D-OPSD learns the concept better than SFT", "Table 2, DINO-D .1088 against .1896",
          "full", "dopsd", "sft", CONCEPT),
    Claim("Full: D-OPSD keeps what the base can do, SFT does not",
          "Table 2, GenEval .717 against .159", "full", "dopsd", "sft", RETENTION),
    Claim("Full: D-OPSD keeps the quality that SFT loses", "Table 2, quality 3.84 against 2.61",
          "full", "dopsd", "sft", CRISP),
    Claim("Full: D-OPSD keeps what the base can do, PSO does not",
          "Table 2, GenEval .717 against .248", "full", "dopsd", "pso", RETENTION),
    Claim("Style: D-OPSD comes closer than SFT", "Table 2, FID 40.5 against 82.2",
          "full", "sft", "dopsd", FID, kind="whole"),
    Claim("Style: D-OPSD comes closer than PSO", "Table 2, FID 40.5 against 88.4",
          "full", "pso", "dopsd", FID, kind="whole"),
    Claim("Style: D-OPSD keeps the quality that SFT loses", "Table 2, quality 3.84 against 2.61",
          "full", "dopsd", "sft", CRISPNESS, kind="whole"),
    Claim("Style: D-OPSD keeps what the base can do, SFT does not",
          "Table 2, GenEval .717 against .159", "full", "dopsd", "sft", RETENTION, kind="whole"),
)  # fmt: skip

UNTESTABLE = (
    ("Judgements of a vision-language model, aesthetics (VLM-J, Aesthetic-S)", "Table 1",
     "nothing in a drawn world corresponds to them"),
    ("The method works on FLUX.2-klein", "Table 2", "no such model has been trained here"),
    ("Four times the work of SFT, twice the time", "text",
     "depends on the sizes; docs/methods.md counts it for the real ones"),
)  # fmt: skip

SAMPLES = (  # rows of the paper's Tables 1 and 2 (Z-Image-Turbo), by this experiment's names
    ("lora", "base", ".2373", "3.51", ".3043"), ("lora", "sft", ".2212", "2.42", ".3095"),
    ("lora", "sft_teacher", ".1588", "3.61", ".3201"),
    ("lora", "dreambooth", ".0902", "2.56", ".3328"), ("lora", "pso", ".0570", "3.34", ".2893"),
    ("lora", "dopsd", ".0823", "3.80", ".3664"), ("full", "base", ".1274", "3.76", ".7543"),
    ("full", "sft", ".1896", "2.61", ".1588"), ("full", "pso", ".1716", "2.87", ".2475"),
    ("full", "dopsd", ".1088", "3.84", ".7170"),
)  # fmt: skip


def table(records: Records) -> list[str]:
    """Every claim with its verdict, both methods at the same rate."""
    lines = [
        "Both methods at the same rate, at each of the two. *Reproduced*: the whole interval lies",
        "on the claimed side. Not reproduced are *contradicted*, where it lies on the other side,",
        "and *open*, where it holds both.",
        "",
        "| claim | in the paper | difference here | verdict |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS:
        rates = RATES[claim.train] if claim.kind == "alone" else (STYLE_RATE,)
        found = {rate: _difference(records, claim, rate) for rate in rates}
        cell = f"{claim.measure}: {', '.join(_signed(one) for one in found.values())}"
        lines.append(f"| {claim.text} | {claim.paper} | {cell} | {_verdict(claim, found)} |")
    lines += [
        f"| {text} | {where} | {why} | not testable here |" for text, where, why in UNTESTABLE
    ]
    return lines


def _difference(records: Records, claim: Claim, rate: float) -> Estimate | None:
    one, two = (records.arm(n, claim.train, rate, claim.kind) for n in (claim.more, claim.less))
    return one.less(two, claim.measure) if one and two else None


def _verdict(claim: Claim, found: Mapping[float, Estimate | None]) -> str:
    """One word if the rates agree."""
    said = {rate: _word(claim, one) for rate, one in found.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{word} at {rate:g}" for rate, word in said.items())


def _word(claim: Claim, found: Estimate | None) -> str:
    if found is None or found.half is None:
        return "not run"
    bound = -claim.equal if claim.equal else 0.0
    if found.value - found.half > bound:
        return "**reproduced**"
    if found.value + found.half < bound:
        return "**contradicted**"
    return "open"


def _signed(found: Estimate | None) -> str:
    if found is None:
        return "not run"
    return f"{found.value:+.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def goals(records: Records) -> list[str]:
    """What the project asked of itself before the first run."""
    own = [arm for rate in RATES["lora"] if (arm := records.arm("dopsd", "lora", rate))]
    if not own or not records.best("sft", "lora"):
        return ["not run"]
    base = records.base("lora")[MEASURES.index(SHAPE)].value
    asked = (
        ("D-OPSD: concept at least 0.75", CONCEPT, 0.75),
        ("D-OPSD: crispness at least 0.95 of the base's", CRISP, 0.95),
        (f"D-OPSD: named shapes within 0.03 of the base's {base:.3f}", SHAPE, base - 0.03),
    )
    lines = []
    for text, measure, least in asked:
        values = {arm.rate: arm.final(measure).value for arm in own}
        said = [f"{_met(v >= least)} at rate {rate:g} ({v:.3f})" for rate, v in values.items()]
        lines.append(f"* {text}: {', '.join(said)}")
    return [*lines, _equal_score(records)]


def _equal_score(records: Records) -> str:
    """SFT beside D-OPSD where both have learned equally much."""
    text = "SFT at equal concept score: at least 0.1 lower in crispness or retention"
    own, sft = records.best("dopsd", "lora"), records.best("sft", "lora")
    level = min(own.final(CONCEPT).value, sft.final(CONCEPT).value)
    pairs = [(own.when(level, m), sft.when(level, m)) for m in (CRISP, RETENTION)]
    if any(value is None for pair in pairs for value in pair):
        return f"* {text}: cannot be said, no common level"
    lower = [one - two for one, two in pairs]
    return (
        f"* {text}: {_met(max(lower) >= 0.1)} (at concept {level:.3f} lower by {lower[0]:.3f} in "
        f"crispness, {lower[1]:.3f} in retention; rates {own.rate:g}, {sft.rate:g})"
    )


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def beside(records: Records) -> list[str]:
    """The paper's rows beside ours: other measures of the same three things."""
    lines = [
        "The paper's columns measure the same three things otherwise: likeness to the target,",
        "picture quality, and what is kept of prompt following (LoRA: CLIP-S, full: GenEval). Each",
        "method at the rate where its concept, crispness and retention sum to more.",
        "",
        "| training | method | paper: DINO-D ↓ | quality ↑ | CLIP-S or GenEval ↑ "
        "| here: concept ↑ | crispness ↑ | retention ↑ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for train, name, *paper in SAMPLES:
        if name == "base":
            found = records.base(train) if records.any(train) else None
            cells = [f"{found[i].value:.3f}" for i in (0, 1, 3)] if found else ["not run"] * 3
        else:
            arm = records.best(name, train)
            measures = (CONCEPT, CRISP, RETENTION)
            cells = [f"{arm.final(m).value:.3f}" if arm else "not run" for m in measures]
        lines.append(f"| {train} | {name} | {' | '.join(paper)} | {' | '.join(cells)} |")
    return lines
