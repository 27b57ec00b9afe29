#!/usr/bin/env python3
"""Fails when one of the sibling libraries depends on another (reads `cargo metadata --no-deps` on stdin).

mesh-core knows none of them, and they know only mesh-core; what joins two of them lives in mesh-core or in examples.
"""

import json
import sys

SIBLINGS = {"mesh-route", "mesh-tls", "mesh-telemetry", "mesh-authz"}
WORKSPACE_ONLY = {"mesh-examples", "mesh-benches"}

bad = []
for package in json.load(sys.stdin)["packages"]:
    name = package["name"]
    for dependency in package["dependencies"]:
        if dependency.get("path") is None:
            continue
        other, kind = dependency["name"], dependency["kind"] or "normal"
        if name in SIBLINGS and other in SIBLINGS and other != name:
            bad.append(f"{name} depends on its sibling {other} ({kind})")
        if name == "mesh-core" and other in SIBLINGS:
            bad.append(f"mesh-core depends on {other} ({kind})")
        if name in SIBLINGS | {"mesh-core"} and other in WORKSPACE_ONLY:
            bad.append(f"{name} depends on {other} ({kind})")
        if name in SIBLINGS | {"mesh-core"} and other == "mesh-testkit" and kind != "dev":
            bad.append(f"{name} depends on mesh-testkit outside its tests")
print("\n".join(bad) or "no sibling depends on another")
sys.exit(bool(bad))
