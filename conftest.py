"""Loads the suite's plugin; all else lives in disagglab/."""

pytest_plugins = [
    "disagglab.pytest_plugin.plugin",
    "disagglab.pytest_plugin.fixtures",
    "disagglab.pytest_plugin.storefixtures",
    "disagglab.pytest_plugin.routingfixtures",
    "disagglab.pytest_plugin.dynamofixtures",
    "disagglab.pytest_plugin.scalingfixtures",
]
