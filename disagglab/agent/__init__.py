"""What runs on every host and owns its processes, ports and leftovers; standard library of Python 3.10."""
