"""OpenAI's files: uploads checked as a job would read them, listed, fetched by ranges, deleted.
May import http, access, db, jaxlora/storage and train/data.
Bytes are synced and renamed before the row is written; what has no row goes at the start."""
