"""What was found: records, metrics, the folder of a session, its report, history over sessions."""
