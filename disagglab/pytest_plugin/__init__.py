"""The pytest plugin: options, hooks, the session, fixtures that more than one lesson needs."""
