"""OpenAI's fine-tuning jobs over serve/jobs, with pause, resume, priority and evaluation of ours.
May import serve/jobs, http, access and db.
A move is answered when the news of it are stored."""
