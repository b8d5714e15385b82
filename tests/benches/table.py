"""The results of tests/bench as tables on standard output, and as JSON.

Each line of the first file is a result, tab between its columns; the same again for each round.

- `calls`, backend, foreign rules, forwards, call, side, command, and a value for each run. The sides `mh-hook`, `limit`
  and those of OTHERS have ms, of several commands each apart; `processes` is a number, `memory` is MiB.
- `connections`, those of others, stale ones, call, what, value: ms and MiB.
- `program`, what, side, command, values: ms for `start-up`, MiB for `binary`.
- `packets`, backend, entries, uplinks, forwards, what, value: packets/s for `in` and `out`, µs for `last` and `no`.
"""

import json
import os
import platform
import statistics
import sys

# What is to be reached. Of ratios to the limit, by call and forwards; None is any number of them, and beside any number
# of others' rules. Beside many of those a change takes the time of iptables-save, which lists them all, and which the limit
# does without: what is to be reached there is told by the calls with nothing to do.
LIMITS = {
    ("first up", 1): 1.6,
    ("first up", 1000): 1.5,
    ("first up", 10000): 1.5,
    ("up, nothing to do", None): 1.3,
    ("one forward changed", 10000): 1.2,
}
PROCESSES, PROCESSES_IDLE = 4, 2
MEMORY = {10000: 16}
START_UP = 0.3
BINARY = 1.6
# Of calls beside so many connections of others, and with so many that are stale.
CONNECTIONS = {("first up", 1000000, 0): {"ms": 500, "MiB": 8}, ("new address", 0, 10000): {"ms": 500}}
# The other ways, and what they are beside.
OTHERS = {"typed recipe": "first up", "shorewall reload": "one forward changed"}
# How many times as long the other ways take at least, by forwards.
TIMES = {("typed recipe", 1): 3, ("typed recipe", 1000): 100}

MISSED = "✗"


def medians(results, part, width):
    """Of the values of all rounds: by the first columns, `width` of them, numbers as such."""
    values = {}
    with open(results, encoding="utf-8") as lines:
        for line in lines:
            found, *columns = line.rstrip("\n").split("\t")
            if found == part:
                key = tuple(int(column) if column.isdigit() else column for column in columns[:width])
                values.setdefault(key, []).extend(map(float, columns[width:]))
    return {key: statistics.median(found) for key, found in values.items()}


def grouped(values):
    """By all columns but the last one, which is what the values are."""
    groups = {}
    for (*case, what), value in values.items():
        groups.setdefault(tuple(case), {})[what] = value
    return groups


def summed(values):
    """Of the medians of several commands the sum: the last column is the command."""
    sums = {}
    for (*case, _), value in values.items():
        sums[tuple(case)] = sums.get(tuple(case), 0) + value
    return sums


def goal(row, key, most=None, least=None):
    """Notes beside the row's value what it is to reach, if anything."""
    bound = least if most is None else most
    if bound is not None and row[key] is not None:
        reached = row[key] <= bound if most is not None else row[key] >= bound
        row["goals"].append({"of": key, "to reach": f"{'≥' if most is None else '≤'} {bound}", "reached": reached})


def calls_rows(groups):
    rows = []
    for (backend, foreign, forwards, call), found in groups.items():
        row = {
            "backend": backend,
            "foreign rules": foreign,
            "forwards": forwards,
            "call": call,
            "ms": round(found["mh-hook"], 3),
            "limit": round(found["limit"], 3),
            "ratio": round(found["mh-hook"] / found["limit"], 3),
            "processes": int(found["processes"]),
            "MiB": round(found["memory"], 3),
            "goals": [],
        }
        goal(row, "ratio", LIMITS.get((call, None if foreign else forwards), LIMITS.get((call, None))))
        goal(row, "processes", PROCESSES_IDLE if call.endswith("nothing to do") else PROCESSES)
        goal(row, "MiB", MEMORY.get(forwards))
        rows.append(row)
    return rows


def others_rows(groups):
    rows = []
    for (backend, foreign, forwards, call), found in groups.items():
        for way, beside in OTHERS.items():
            if call != beside or way not in found:
                continue
            row = {
                "backend": backend,
                "foreign rules": foreign,
                "forwards": forwards,
                "way": way,
                "ms": round(found[way], 3),
                "beside": call,
                "mh-hook": round(found["mh-hook"], 3),
                "times": round(found[way] / found["mh-hook"], 3),
                "goals": [],
            }
            goal(row, "times", least=None if foreign else TIMES.get((way, forwards)))
            rows.append(row)
    return rows


def program_rows(groups):
    rows = []
    for (what,), found in groups.items():
        dash = found.get("dash -c :")
        row = {
            "what": what,
            "mh-hook": round(found["mh-hook"], 3),
            "dash": dash and round(dash, 3),
            "ratio": dash and round(found["mh-hook"] / dash, 3),
            "goals": [],
        }
        goal(row, "ratio", START_UP)
        goal(row, "mh-hook", BINARY if what == "binary" else None)
        rows.append(row)
    return rows


def connections_rows(groups):
    rows = []
    for (others, stale, call), found in groups.items():
        row = {"others": others, "stale": stale, "call": call, "goals": []}
        row |= {what: round(found[what], 3) if what in found else None for what in ("ms", "MiB")}
        for what, most in CONNECTIONS.get((call, others, stale), {}).items():
            goal(row, what, most)
        rows.append(row)
    return rows


def packets_order(item):
    backend, entries, uplinks, forwards = item[0]
    return ["nft", "legacy"].index(backend), ["none", "typed", "mh-hook"].index(entries), uplinks, forwards


def packets_row(case):
    return dict(zip(("backend", "entries", "uplinks", "forwards"), case))


def flows_rows(groups):
    """A flow that stands, beside the same without entries."""
    rows = []
    for case, found in groups.items():
        row = packets_row(case)
        none = groups[case[0], "none", 0, 0]
        for what in ("in", "out"):
            row[what] = int(round(found[what], -3))
            row[f"{what} of none"] = round(found[what] / none[what], 2)
        rows.append(row)
    return rows


def answers_rows(groups):
    """New connections, beside the same entries with the fewest forwards and one uplink."""
    rows = []
    for case, found in groups.items():
        if "last" not in found:
            continue
        row = packets_row(case)
        fewest = min(other for other in groups if other[:3] == (*case[:2], 1))
        for what in ("last", "no"):
            row[what] = round(found[what], 1)
            row[f"{what} of fewest"] = round(found[what] / groups[fewest][what], 1)
        rows.append(row)
    return rows


def number(value):
    """As it is read: three figures or so."""
    if isinstance(value, float):
        return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def cell(row, key, unit=""):
    """A value, if there is one; of goals, what is to be reached. A value that misses its goal has a mark."""
    goals = row.get("goals", ())
    if key == "to reach":
        return ", ".join(found["to reach"] for found in goals)
    is_missed = any(found["of"] == key and not found["reached"] for found in goals)
    return number(row.get(key)) + unit + f" {MISSED}" * is_missed


def table(title, headings, rows):
    """Headings are those of the rows, by key."""
    if rows:
        print(f"\n{title}\n")
        print("| " + " | ".join(headings.values()) + " |")
        print("|---" * len(headings) + "|")
        for row in rows:
            print("| " + " | ".join(cell(row, key) for key in headings) + " |")


def size(row):
    """The column of a row: how many forwards, and rules of others."""
    return number(row["forwards"]) + (f", beside {number(row['foreign rules'])}" if row["foreign rules"] else "")


def by_size(rows, keys, text):
    """Headings, and the same rows with the sizes side by side, each as this text."""
    lines = {}
    for row in rows:
        line = lines.setdefault(tuple(row[key] for key in keys), {key: row[key] for key in keys})
        line[size(row)] = text(row)
    return same(*keys, *dict.fromkeys(size(row) for row in rows)), list(lines.values())


def beside(ratio):
    return lambda row: f"{number(row['ms'])} = {cell(row, ratio, ' ×')}"


def most_memory(rows):
    """The most that any call has needed, as a row for each size."""
    most = {}
    for row in rows:
        if row["MiB"] >= most.get(size(row), row)["MiB"]:
            most[size(row)] = row
    return [row | {"what": "mh-hook's own memory, MiB"} for row in most.values()]


def same(*keys):
    return {key: key for key in keys}


def place(row):
    """What a row is about, in words."""
    case = [row[key] for key in ("backend", "way", "call", "what") if key in row]
    case += [f"{key} {row[key]}" for key in ("forwards", "foreign rules") if row.get(key)]
    return ", ".join(case)


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} processors, Linux {platform.release()}"


def main(results, target):
    calls = grouped(summed(medians(results, "calls", 6)))
    packets = dict(sorted(grouped(medians(results, "packets", 5)).items(), key=packets_order))
    rows = {
        "calls": calls_rows(calls),
        "others": others_rows(calls),
        "program": program_rows(grouped(summed(medians(results, "program", 3)))),
        "connections": connections_rows(grouped(medians(results, "connections", 4))),
        "flows": flows_rows(packets),
        "answers": answers_rows(packets),
    }
    with open(target, "w", encoding="utf-8") as out:
        json.dump({"machine": machine(), **rows}, out, indent=2, ensure_ascii=False)

    print(f"{machine()}; medians; {MISSED}: not reached")
    table(
        "Calls, by forwards, and beside so many rules of others: ms, and how many times as long as their tools take with "
        "ready-made input",
        *by_size(rows["calls"], ("backend", "call", "processes"), beside("ratio")),
    )
    table(
        "Other ways to the same end: ms, and how many times as long as mh-hook",
        *by_size(rows["others"], ("backend", "way", "beside"), beside("times")),
    )
    table(
        "The most memory of any call",
        *by_size(most_memory(rows["calls"]), ("what",), lambda row: cell(row, "MiB")),
    )
    table(
        "The program: start-up, `mh-hook --version` beside `dash -c :`, in ms, and the binary, in MiB",
        same("what", "mh-hook", "dash", "ratio", "to reach"),
        rows["program"],
    )
    table(
        "Beside tracked connections of others, and with stale ones to be ended",
        same("call", "others", "stale", "ms", "MiB", "to reach"),
        rows["connections"],
    )
    case = same("backend", "entries", "uplinks", "forwards")
    table(
        "A flow that stands: packets/s that one processor forwards, from the client (in) and to it (out)",
        case | {"in": "packets/s in", "in of none": "of none", "out": "packets/s out", "out of none": "of none"},
        rows["flows"],
    )
    table(
        "A new connection's first answer, in µs: at the last forward's port, at a port that no forward has",
        case | {"last": "last", "last of fewest": "× of fewest", "no": "no", "no of fewest": "× of fewest"},
        rows["answers"],
    )
    missed = [
        f"not reached: {place(row)}: {found['of']} {row[found['of']]}, to reach {found['to reach']}"
        for row in sum(rows.values(), [])
        for found in row.get("goals", ())
        if not found["reached"]
    ]
    if missed:
        print("", *missed, sep="\n")


main(*sys.argv[1:])
