"""How probing decided, in sentences."""

from __future__ import annotations

from asag_deploy.bundle.manifest import Level, Manifest
from asag_deploy.errors import plural
from asag_deploy.images.level_pictures import candidates_of
from asag_deploy.loop.stopping import FAST_MIN_SELECTED
from asag_deploy.loop.trace import ProbingTrace, StopReason


def story(trace: ProbingTrace, *, deepest: Level, deadline_ms: float | None) -> str:
    """Tell in a few sentences what each level found, and why probing stopped.

    deepest: the deepest level that the bundle has.  deadline_ms: what the call was allowed, if limited.
    """
    steps = [_step(trace, number) for number in range(len(trace.levels) - 1)]
    steps.append(_end(trace, deepest, deadline_ms))
    dropped = sum(level.patches_dropped for level in trace.levels)
    if dropped:
        steps.append(f"{_capital(_were(dropped, 'patch', 'patches'))} left out for want of room.")
    anchors = _were(trace.anchor_count, "anchor", "anchors")
    return " ".join([*steps, f"{_capital(anchors)} given to the decoder."])


def level_caption(trace: ProbingTrace, number: int) -> str:
    """Say what became of a level's anchors, as in `P4: 32 anchors on 2 patches; 9 went on, 3 asked ...`."""
    level = trace.levels[number]
    found = candidates_of(trace, number)
    asked, went_on = int(found.asked.sum()), int((found.passed & ~found.asked).sum())
    where = plural(level.patches, "patch") if level.patches == 1 else f"{level.patches} patches"
    text = f"{level.level}: {plural(len(found.scores), 'anchor')} on {where}; {went_on} went on"
    if not asked:
        return f"{text}, none asked for a closer look"
    if number + 1 < len(trace.levels):
        return f"{text}, {asked} asked and {_be(asked)} replaced on {trace.levels[number + 1].level}"
    return f"{text}, {asked} asked for a closer look in vain"


def decoder_caption(trace: ProbingTrace) -> str:
    """Say how many anchors reached the decoder, by level."""
    parts = [
        f"{int(candidates_of(trace, number).passed.sum())} of {level.level}"
        for number, level in enumerate(trace.levels)
    ]
    return f"Decoder: {plural(trace.anchor_count, 'anchor')}, {', '.join(parts)}"


def about(manifest: Manifest, backend: str) -> str:
    """Say what the bundle is: variant, classes, levels, precision, backend."""
    levels = ", ".join(["P5", *(level.level for level in manifest.probing.levels)])
    classes = len(manifest.categories)
    return (
        f"{manifest.variant} · {classes} {'class' if classes == 1 else 'classes'} · {levels} · "
        f"{manifest.precision_in_words} · {backend}"
    )


def _step(trace: ProbingTrace, number: int) -> str:
    """Say what a level asked for that another came after."""
    level, below = trace.levels[number], trace.levels[number + 1]
    anchors = f"{plural(level.selected, 'anchor')} on {level.level}"
    patches = "1 patch" if below.patches == 1 else f"{below.patches} patches"
    return f"{anchors} asked for a closer look, so {patches} of {below.level} {_be(below.patches)} probed."


def _end(trace: ProbingTrace, deepest: Level, deadline_ms: float | None) -> str:
    level = trace.levels[-1]
    asked = f"{plural(level.selected, 'anchor')} asked for a closer look"
    match trace.stop:
        case StopReason.NOTHING_SELECTED:
            reason = "no anchor there asked for a closer look"
        case StopReason.FEW_SELECTED:
            reason = f"only {asked}, and fast mode goes on for {FAST_MIN_SELECTED} or more"
        case StopReason.DEADLINE:
            allowed = "" if deadline_ms is None else f" of {deadline_ms:g} ms"
            reason = f"the deadline{allowed} had passed" + (f"; {asked}" if level.selected else "")
        case StopReason.MAX_LEVEL:
            here = level.level == deepest
            reason = "this bundle has no deeper level" if here else "deeper levels are not allowed"
            reason += f", although {asked}" if level.selected else ""
        case StopReason.LAST_LEVEL:
            reason = "there is no level below it"
    return f"Probing stopped after {level.level}: {reason}."


def _were(count: int, one: str, several: str) -> str:
    return f"{count} {one} was" if count == 1 else f"{count} {several} were"


def _be(count: int) -> str:
    return "was" if count == 1 else "were"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
