"""The scheduler (pure) and the engine that carries its plans out: slots, rows, pages, sampling, output.
May import jaxlora; knows no HTTP, no database and no training.
plan(now, ready) decides, the engine does, in the plan's order. At most six compiled steps for each size; all else is data."""
