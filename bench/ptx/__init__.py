"""Compiled PTX, run on the CPU: the arithmetic, the masks and the barriers of the code a GPU would be given.

Triton's interpreter runs the Python source, one lane-synchronous array operation after the other; it hides what the
compiler makes of it and every missing barrier. Here the threads of a program run the compiled instructions, memory
that nobody owns cannot be touched, and two threads that meet at an address without a barrier in between are an error.
"""
