"""`jaxlora bench kernels`: measured ceilings of the device, and every op beside other forms of it.
May import all ops; the command line, train/bench.py and benchmarks time their own programs with it.
The least of several rounds counts; cases says what is timed beside what."""
