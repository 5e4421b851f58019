"""What every run has: its preparation, folder, session, problems, dumps, manifest, health and progress."""
