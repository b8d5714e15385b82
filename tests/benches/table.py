"""The results of tests/bench as a table on standard output and as JSON.

Each line of the first file is backend, forwards, name and value, tab between them; values are milliseconds, but for the
peak memory's MiB. `NAME: limit` is what the same takes with the tools alone.

A line of the packets' part is `packets`, backend, entries, uplinks, forwards, what and value: packets/s for `in` and
`out`, µs for `last` and `no`; the same again for each round.
"""

import json
import os
import platform
import statistics
import sys

LIMIT = ": limit"


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} processors, Linux {platform.release()}"


def packets_values(results):
    """The medians over the rounds: what by case, a case being backend, entries, uplinks and forwards."""
    rounds = {}
    with open(results, encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("packets\t"):
                continue
            _, backend, entries, uplinks, forwards, what, value = line.rstrip("\n").split("\t")
            case = backend, entries, int(uplinks), int(forwards)
            rounds.setdefault(case, {}).setdefault(what, []).append(float(value))
    return {
        case: {what: statistics.median(values) for what, values in found.items()}
        for case, found in sorted(rounds.items(), key=packets_order)
    }


def packets_order(item):
    backend, entries, uplinks, forwards = item[0]
    return ["nft", "legacy"].index(backend), ["none", "typed", "mh-hook"].index(entries), uplinks, forwards


def packets_case(case):
    return dict(zip(("backend", "entries", "uplinks", "forwards"), case))


def packets_flows(values):
    """A flow that stands, beside the same without entries."""
    rows = []
    for case, found in values.items():
        row = packets_case(case)
        none = values[case[0], "none", 0, 0]
        for what in ("in", "out"):
            row[what] = round(found[what], -3)
            row[f"{what} of none"] = round(found[what] / none[what], 2)
        rows.append(row)
    return rows


def packets_answers(values):
    """New connections, beside the same entries with the fewest forwards and one uplink."""
    rows = []
    for case, found in values.items():
        if "last" not in found:
            continue
        row = packets_case(case)
        fewest = min(other for other in values if other[:3] == (*case[:2], 1))
        for what in ("last", "no"):
            row[what] = round(found[what], 1)
            row[f"{what} of fewest"] = round(found[what] / values[fewest][what], 1)
        rows.append(row)
    return rows


def packets_print(title, headings, rows):
    print(f"\n{title}\n")
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    for row in rows:
        cells = [f"{cell:,.0f}" if isinstance(cell, float) and cell >= 1000 else str(cell) for cell in row.values()]
        print("| " + " | ".join(cells) + " |")


def packets_tables(flows, answers):
    case = ["backend", "entries", "uplinks", "forwards"]
    packets_print(
        "A flow that stands: packets/s that one processor forwards, from the client (in) and to it (out)",
        [*case, "packets/s in", "of none", "packets/s out", "of none"],
        flows,
    )
    packets_print(
        "A new connection's first answer, in µs: at the last forward's port, at a port that no forward has",
        [*case, "last", "× of fewest", "no", "× of fewest"],
        answers,
    )


def main(results, target):
    values = {}
    with open(results, encoding="utf-8") as lines:
        for line in lines:
            part, *columns = line.rstrip("\n").split("\t")
            if part != "processes":
                continue
            backend, forwards, name, value = columns
            values.setdefault((backend, int(forwards)), {})[name] = float(value)
    rows = []
    for (backend, forwards), found in values.items():
        for name, value in found.items():
            if name.endswith(LIMIT):
                continue
            limit = found.get(name + LIMIT)
            if name == "typed recipe":
                limit = found["first up"]
            rows.append(
                {
                    "backend": backend,
                    "forwards": forwards,
                    "what": name,
                    "value": round(value, 3),
                    "limit": limit and round(limit, 3),
                    "ratio": limit and round(value / limit, 2),
                }
            )
    values = packets_values(results)
    flows, answers = packets_flows(values), packets_answers(values)
    with open(target, "w", encoding="utf-8") as out:
        json.dump({"machine": machine(), "rows": rows, "flows": flows, "answers": answers}, out, indent=2)
    print(f"{machine()}; medians in ms, the typed recipe beside our first up\n")
    print("| backend | forwards | what | median | limit | ratio |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["backend"], row["forwards"] or "", row["what"], row["value"], row["limit"] or "", row["ratio"] or ""]
        print("| " + " | ".join(f"{cell:.1f}" if isinstance(cell, float) and cell >= 10 else str(cell) for cell in cells) + " |")
    if values:
        packets_tables(flows, answers)


main(*sys.argv[1:])
