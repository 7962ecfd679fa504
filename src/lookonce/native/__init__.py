"""The only package that imports llama_cpp and touches ctypes.

It owns every native handle, checks every return code where it occurs, and raises Lookonce's errors with the
native library's own lines in them. It knows nothing of files' formats, prompts, stores or the command line.
"""
