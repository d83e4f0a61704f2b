"""What a report says in words: what changes, where fewer tokens do not help, what to beware of, what is not known, how it was measured."""

from __future__ import annotations

from pathlib import Path

from sparse_vlm.bench.serving import HELPS
from sparse_vlm.report.comparison import Subject, change, longest_part, milliseconds, overlap, rate, short
from sparse_vlm.report.quality import Measure
from sparse_vlm.report.records import no_help, shorten

BUSY = 0.5  # threads at work beyond the cores, above which the machine did too much else


def verdicts(subject: Subject) -> list[str]:
    """What changes, in a few sentences."""
    now, then, answer = subject.now, subject.then, subject.case.answer
    first = milliseconds(now, "ttft"), milliseconds(then, "ttft")
    unclear = ", within the spread of the times" if overlap(now.first_token_spread(), then.first_token_spread()) else ""
    whose = "First token" if subject.case.batch == 1 else f"First tokens of {subject.case.batch} requests"
    said = [f"{whose} after {short(first[1])} ms instead of {short(first[0])} ms ({change(*first)}{unclear})."]
    served = rate(now, answer), rate(then, answer)
    hardly = f": hardly a difference, because {longest_part(then, answer)}" if abs(served[1] / served[0] - 1) < HELPS else ""
    said.append(
        f"{short(served[1])} requests a second instead of {short(served[0])} ({change(*served)}), by estimate, "
        f"with answers of {answer} tokens{hardly}."
    )
    held = [entry.request["kv_bytes_per_image"] / 1e6 for entry in (now, then)]
    if held[0] == held[1]:
        said.append(f"Keys and values of an image take {short(held[1])} MB as before: both give the LLM {then.request['tokens']} tokens.")
    else:
        said.append(f"Keys and values of an image take {short(held[1])} MB instead of {short(held[0])} MB ({change(*held)}).")
    compared = [line for measure in subject.measures if (line := _compared(subject, measure)) is not None]
    return said + (compared or ["Whether quality changes is not known from these files: no task was measured of both."])


def _compared(subject: Subject, measure: Measure) -> str | None:
    """What both reach, and whether that tells them apart; None where either was not measured."""
    quality, now, then = subject.quality, subject.now.worth, subject.then.worth
    before, after, more = quality.score(measure, now), quality.score(measure, then), quality.difference(measure, then, now)
    if before is None or after is None or more is None:
        return None
    better, worse = quality.tells_apart(measure, then, now), quality.tells_apart(measure, now, then)
    verdict = "better by more than chance" if better else "worse by more than chance" if worse else "not told apart"
    both = f"{measure.shown(after.value)} instead of {measure.shown(before.value)}"
    return f"{measure.title}: {both} ({measure.with_interval(more, signed=True)}), {verdict}."


def where_not(subject: Subject) -> list[str]:
    """Where fewer tokens do not help, of all models in the case."""
    counts = {entry.request["tokens"] for entry in subject.entries}
    if len(counts) == 1:
        return [f"All models here give the LLM {counts.pop()} tokens an image: what differs is the time of the tower alone."]
    case = f"{subject.case.llm}, {subject.case.dtype}: "  # which a page names once
    return [f"{line.removeprefix(case)}." for line in no_help(subject.document, subject.case, subject.entries)] or [
        f"Nowhere in this case: each model with fewer tokens than the one with most serves at least {HELPS:.0%} more requests a second."
    ]


def warnings(subject: Subject) -> list[str]:
    """What makes the numbers less than they seem."""
    document, machine, llm = subject.document, subject.document["machine"], subject.llm
    said = []
    if document["state"] != "finished":
        problem = f": {document['problem']}" if document["problem"] else ""
        said.append(f"The benchmark is not whole ({document['state']}{problem}); what is shown was measured to its end.")
    if machine["load_average"] + machine["threads"] > machine["cores"] + BUSY:
        said.append(
            f"The machine did other work when the benchmark began (a load of {machine['load_average']:.1f} on {machine['cores']} "
            f"cores): take ratios rather than times, and those with care."
        )
    if llm["measured_layers"] < llm["layers"]:
        said.append(f"{subject.llm_name} did not fit this machine: {llm['measured_layers']} of its {llm['layers']} layers stand for all.")
    if not all(entry.served[subject.case.answer]["fits"] for entry in (subject.now, subject.then)):
        said.append("What a request takes in memory does not fit this machine: requests a second are what the time alone would allow.")
    return said


def unmeasured(subject: Subject) -> list[str]:
    """What the files do not say."""
    document, quality, case, llm = subject.document, subject.quality, subject.case, subject.llm
    worth = {entry.worth for entry in subject.entries if entry.worth is not None}
    kinds = {quality.models[name]["kind"] for name in worth}
    dtypes = {quality.models[name]["dtype"] for name in worth}
    known = dict(zip(quality.models, shorten(list(quality.models)), strict=True))
    said = []
    if missing := [entry.name for entry in subject.entries if entry.worth is None]:
        said.append(f"The quality of {', '.join(missing)}.")
    if missing := [short_name for name, short_name in known.items() if name not in worth]:
        said.append(f"The cost of {', '.join(missing)} in this case.")
    for entry in subject.entries:
        if entry.worth is not None and (own := quality.models[entry.worth])["tokens"] != entry.request["tokens"]:
            before = f"its quality here is that of {known[entry.worth]} with {own['tokens']} tokens"
            said.append(f"What {entry.name} loses by giving the LLM {entry.request['tokens']} tokens: {before}.")
    if "vlm" in kinds:
        said.append("Whether the VLMs were trained alike: their quality is that of tower and training together.")
        said.append(f"Quality with {subject.llm_name}, unless the models answered with it: each VLM answered with its own language model.")
    if kinds - {"vlm"}:
        said.append("The quality of a VLM on these towers: their tasks are those of a tower alone, before any projector.")
    if llm["weights"] == "random":
        said.append(
            f"What {subject.llm_name} would answer: it has the shape of {llm['summary']} and random weights, on which no time depends."
        )
    if dtypes - {case.dtype}:
        said.append(f"Quality in {case.dtype}: it was measured in {' and '.join(sorted(dtypes))}.")
    if any(request["compiled"] for request in document["requests"]):
        said.append("Compiled towers, which are in the benchmark and left out here.")
    for file, versions in quality.versions.items():
        pairs = [(name, versions[name], have) for name, have in document["versions"].items() if name in versions]
        # the same torch names itself with or without what it was built for
        if differing := [f"{n} {one}, not {other}" for n, one, other in pairs if one.partition("+")[0] != other.partition("+")[0]]:
            said.append(f"Quality with the versions that costs were measured with: {Path(file).name} is of {'; '.join(differing)}.")
    said.append(f"A server at work: requests a second are put together from measured pieces, in batches of {case.batch}.")
    said.append("What it takes to train the projector for another tower; energy; price; other machines.")
    return said


def method(subject: Subject) -> list[str]:
    """How it was measured."""
    document, machine, settings = subject.document, subject.document["machine"], subject.document["settings"]
    accelerator = f"{machine['accelerator']['name']}, " if machine["accelerator"] else ""
    peaks = next(peak for peak in document["peaks"] if peak["dtype"] == subject.case.dtype)
    pictures = ", ".join(f"{Path(p['name']).name} ({p['pixels'][0]} x {p['pixels'][1]})" for p in document["pictures"])
    taken = "in one go" if subject.then.request["ttft_from"] == "measured" else "as the sum of its pieces"
    said = [
        f"Machine: {accelerator}{machine['processor']}, {machine['threads']} of {machine['cores']} threads, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}; load when it began: {machine['load_average']}.",
        f"Its own peaks: {peaks['macs_per_second'] / 1e9:,.1f} GMAC/s ({peaks['dtype']}), {peaks['bytes_per_second'] / 1e9:,.1f} GB/s.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in document['versions'].items())}. Begun: {document['started']}.",
        f"Times: models in turn, medians of up to {settings['rounds']} turns after {settings['warm_up']}; the first token {taken}, "
        "from the encoded image on. Of sums of pieces the quartiles are added.",
        f"A request: {pictures} and {settings['prompt_tokens']} tokens of text.",
    ]
    photos: dict[str, int] = {measure.task: measure.photos for measure in subject.shown}
    return said + [f"{task}: {count} photos; {subject.quality.protocols[task]}." for task, count in photos.items()]
