"""Loads the suite's plugin; all else lives in disagglab/."""

pytest_plugins = [
    "disagglab.plugin",
    "disagglab.fixtures",
    "disagglab.storefixtures",
    "disagglab.routingfixtures",
    "disagglab.dynamofixtures",
    "disagglab.scalingfixtures",
]
