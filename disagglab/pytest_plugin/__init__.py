"""The pytest plugin, loaded by pytest.ini: options, hooks, the session, fixtures of more than one lesson."""

pytest_plugins = ["disagglab.pytest_plugin.plugin", "disagglab.pytest_plugin.fixtures"]
