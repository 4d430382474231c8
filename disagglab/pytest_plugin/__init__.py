"""The pytest plugin, loaded by pytest.ini: options, hooks, the session, fixtures of more than one lesson.

PYTEST_DONT_REWRITE, because this file asserts nothing, and elsewhere.py may have imported it before.
"""

pytest_plugins = [
    "disagglab.pytest_plugin.plugin",
    "disagglab.pytest_plugin.endings",
    "disagglab.pytest_plugin.fixtures",
]
