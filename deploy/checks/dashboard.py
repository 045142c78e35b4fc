"""Checks Grafana's dashboard: its structure here, its expressions with promtool.

usage: dashboard.py DASHBOARD

A dashboard that people import must name its data source by a variable, tell apart instances and disks, and explain each
panel; panels must not lie over each other.
"""

import json
import os
import subprocess
import sys
import tempfile

# What Grafana puts in before it asks Prometheus.
VARIABLES = {
    "$__rate_interval": "5m",
    "$__interval": "1m",
    "$__range": "1h",
    "$instance": ".*",
    "$disk": ".*",
    "$quantile": "0.99",
}


def panels(dashboard):
    """All panels that draw something: those of folded rows too."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", [])
        else:
            yield panel


def structure_faults(dashboard):
    for key in ("uid", "title", "schemaVersion", "templating", "panels", "time"):
        if key not in dashboard:
            yield f"the dashboard has no {key}"
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    for name, kind in (("datasource", "datasource"), ("instance", "query"), ("disk", "query")):
        if variables.get(name, {}).get("type") != kind:
            yield f"variable {name} of type {kind} is missing"
    if not variables.get("disk", {}).get("multi"):
        yield "variable disk must allow several disks"
    identifiers = set()
    for panel in [*panels(dashboard), *(p for p in dashboard["panels"] if p["type"] == "row")]:
        if panel["id"] in identifiers:
            yield f"panel id {panel['id']} is used twice"
        identifiers.add(panel["id"])
    places = {}
    for panel in panels(dashboard):
        title = panel.get("title") or f"panel {panel['id']}"
        if not panel.get("description"):
            yield f"{title}: no description"
        if (panel.get("datasource") or {}).get("uid") != "${datasource}":
            yield f"{title}: its data source is not the variable"
        if not panel.get("targets"):
            yield f"{title}: asks for nothing"
        if "unit" not in panel.get("fieldConfig", {}).get("defaults", {}):
            yield f"{title}: no unit"
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if not 0 <= x < 24:
                    yield f"{title}: wider than the dashboard"
                if (x, y) in places:
                    yield f"{title} lies over {places[x, y]}"
                places[x, y] = title


def expression_faults(dashboard):
    """promtool parses expressions of rules only, so each becomes a recording rule."""
    rules = []
    for panel in panels(dashboard):
        for target in panel.get("targets", []):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            if "$" in expression:
                yield f"{panel['title']}: unknown variable in {target['expr']}"
            rules.append({"record": f"panel:{panel['id']}:{target['refId']}", "expr": expression})
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rules.yml")
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"groups": [{"name": "dashboard", "rules": rules}]}, file)  # JSON is YAML
        result = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            yield result.stdout + result.stderr
    print(f"{len(rules)} expressions of the dashboard were parsed")


def main(arguments):
    if len(arguments) != 1:
        sys.exit(__doc__)
    with open(arguments[0], encoding="utf-8") as file:
        dashboard = json.load(file)
    faults = list(dict.fromkeys([*structure_faults(dashboard), *expression_faults(dashboard)]))
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
