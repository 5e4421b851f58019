"""Runs in an object store: the upload while a run goes on, and local copies of what is there.

    runs/NAME  ──► snapshot ──► new files ──► index.json ──► old files removed        (run.storage.upload)
    s3://BUCKET/PREFIX/NAME ──► index.json ──► the files that it names ──► a folder   (run.storage.copy)

A remote run is what its index says (`run.storage.index`). The index is one object, which a store replaces as a whole,
and it is written after everything that it names. So a kill at any moment leaves the snapshot before or the one after,
and each is a state in which the run's own folder was.
"""
