"""Checks that a dashboard and alert rules ask only for what a daemon exports.

usage: metric_names.py SCRAPE FILE...

SCRAPE is the text of /metrics. Of each FILE (Grafana's JSON, Prometheus' YAML) the PromQL expressions are read: every
metric `blktapd_*` or `process_*` in them must be a family of the scrape, every label that a selector or a `by (...)`
names must be on that family, and every name with a colon must be recorded by one of the files.
"""

import json
import re
import sys

SUFFIXES = ("_bucket", "_sum", "_count")
# Prometheus adds the first two to everything that it scrapes; `le` belongs to histograms.
EVERYWHERE = {"job", "instance", "le"}


def families(scrape):
    """Name of each sample line -> the set of its labels."""
    found = {}
    for line in scrape.splitlines():
        if not line or line.startswith("#"):
            continue
        name, labels = re.match(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s", line).groups()
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels or ""))
    return found


def expressions(path):
    """PromQL expressions of a file, as text."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if path.endswith(".json"):
        return list(json_expressions(json.loads(text)))
    # Enough YAML for rule files: `expr:` on one line, or a block of deeper lines.
    found, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        match = re.match(r"(\s*)(?:- )?expr:\s*(.*)", line)
        if not match:
            continue
        indent, value = len(match[1]), match[2]
        if value in ("|", ">", "|-", ">-"):
            block = []
            for deeper in lines[number + 1 :]:
                if deeper.strip() and len(deeper) - len(deeper.lstrip()) <= indent:
                    break
                block.append(deeper)
            value = "\n".join(block)
        found.append(value)
    return found


def json_expressions(node):
    """Every `expr`, and the query of every variable, anywhere in a dashboard."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from json_expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from json_expressions(value)


def faults_of(expression, scraped, recorded):
    """Yields what is wrong with one expression."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    used = set()
    for match in re.finditer(r"([A-Za-z_:][\w:]*)(\{[^}]*\})?", bare):
        name, selector = match.groups()
        if ":" in name:
            if name not in recorded:
                yield f"{name} is recorded by no rule"
            continue
        if not name.startswith(("blktapd_", "process_")):
            continue
        used.add(name)
        if name not in scraped:
            yield f"{name} is not exported"
            continue
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector or ""):
            if label not in scraped[name] | EVERYWHERE:
                yield f"{name} has no label {label} (it has {', '.join(sorted(scraped[name])) or 'none'})"
    known = EVERYWHERE.union(*(scraped.get(name, set()) for name in used)) if used else None
    if known is not None:
        for labels in re.findall(r"\bby\s*\(([^)]*)\)", bare):
            for label in re.findall(r"\w+", labels):
                if label not in known:
                    yield f"by ({label}): no metric of the expression has that label"


def main(arguments):
    if len(arguments) < 2:
        sys.exit(__doc__)
    with open(arguments[0], encoding="utf-8") as file:
        scraped = families(file.read())
    recorded = set()
    for path in arguments[1:]:
        with open(path, encoding="utf-8") as file:
            recorded.update(re.findall(r"^\s*- record:\s*(\S+)", file.read(), re.MULTILINE))
    count, faults = 0, []
    for path in arguments[1:]:
        for expression in expressions(path):
            count += 1
            faults += [f"{path}: {fault}\n    in: {expression.strip()}" for fault in faults_of(expression, scraped, recorded)]
    if not count:
        faults.append("no expression was found: the files are not what this check expects")
    if faults:
        sys.exit("\n".join(faults))
    print(f"{count} expressions ask only for what is exported")


if __name__ == "__main__":
    main(sys.argv[1:])
