"""The parts of every run: its preparation, folder, session, problems, dumps, manifest, health and progress."""
