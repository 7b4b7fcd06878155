"""Bodies of ops in C++ for x86 CPUs, how they are built with the package, and their loading.
Imports nothing of ours.
Where there is no compiler, or another CPU, they are not there and XLA's bodies run."""
