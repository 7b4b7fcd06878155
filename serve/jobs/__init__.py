"""Fine-tuning jobs without HTTP: taken in, run beside serving, recorded, scored; updates by calls.
May import runtime, db, access, train/jobs and jaxlora.
The device thread never waits for the database: its news go into the recorder's queue. Restarts keep ids."""
