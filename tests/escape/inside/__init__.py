"""What runs inside a sandbox and tries to get out. Standard library alone: the sandbox sees this folder and the interpreter.

A module per subject; each attempt is a function whose first docstring line says what it tries.
"""
