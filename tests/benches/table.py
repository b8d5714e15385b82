"""The results of tests/bench as a table on standard output and as JSON.

Each line of the first file is backend, forwards, name and value, tab between them; values are milliseconds, but for the
peak memory's MiB. `NAME: limit` is what the same takes with the tools alone.
"""

import json
import os
import platform
import sys

LIMIT = ": limit"


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} processors, Linux {platform.release()}"


def main(results, target):
    values = {}
    with open(results, encoding="utf-8") as lines:
        for line in lines:
            backend, forwards, name, value = line.rstrip("\n").split("\t")
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
    with open(target, "w", encoding="utf-8") as out:
        json.dump({"machine": machine(), "rows": rows}, out, indent=2)
    print(f"{machine()}; medians in ms, the typed recipe beside our first up\n")
    print("| backend | forwards | what | median | limit | ratio |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["backend"], row["forwards"] or "", row["what"], row["value"], row["limit"] or "", row["ratio"] or ""]
        print("| " + " | ".join(f"{cell:.1f}" if isinstance(cell, float) and cell >= 10 else str(cell) for cell in cells) + " |")


main(*sys.argv[1:])
