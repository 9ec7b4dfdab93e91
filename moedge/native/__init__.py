"""The C kernels: sources, how they are compiled, and how the library is loaded and called."""
