"""`jaxlora bench kernels`: measured ceilings of the device, and every op beside other forms of it.

May import all ops; nothing imports it but the command line.
The least of several rounds counts; cases says what is timed beside what.
"""
