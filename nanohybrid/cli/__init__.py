"""The command line: one module per command. It parses arguments, calls a package and prints the result."""
