"""Programs of their own that say what should have come out; they share no code with what they check."""
