"""Words and numbers for people: one way to write a share, a time, a table."""
