"""One run, and its proof: load, conversations, the ledger of counters, transfers."""
