"""Nothing more: pytest.ini loads the suite's plugin; a lesson's own fixtures are in its conftest.py."""
